"""How far a step of `aevb.fit` is from the bare float32 matrix products it contains.

    python benchmarks/matmul_share.py [--rounds 5] [--batches 100 500] [--threads 2]

Counted are, a layer: its output, the gradient of its weight, and the gradient of its input but for the encoder's first
layer, whose input is data. They run in turns with `fit`, on the same sizes, into memory that is kept. The figure is the
time of a step over the time of its products, median over rounds with its range; 1 would be a step of products alone.
"""

from __future__ import annotations

import argparse
import itertools

from contestants import NETS, Setting
from race import race, ratio, spread
from results import conditions, write

NAMES = ("aevb compiled", "aevb eager", "hand-written PyTorch", "matrix products")


def operations(setting: Setting) -> int:
    """Floating-point operations of a step's products."""
    encoder, decoder = setting.widths()
    pairs = [a * b for widths in (encoder, decoder) for a, b in itertools.pairwise(widths)]
    return 2 * setting.batch * (3 * sum(pairs) - pairs[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="at least so many a turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--net", choices=NETS, default=next(iter(NETS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a busy machine")
    options = parser.parse_args()
    told, rows = conditions(options.threads), []
    print(told, flush=True)
    for batch in options.batches:
        entries = {
            name: Setting(contestant=name, batch=batch, threads=options.threads, **NETS[options.net]) for name in NAMES
        }
        lanes = race(entries, options.rounds, options.steps, cpu_time=options.cpu_time)
        for name, lane in lanes.items():
            median, low, high = ratio(lanes["matrix products"], lane)
            seconds = batch / spread(lane.rates)[0]
            speed = operations(entries[name]) / seconds / 1e9
            print(
                f"batch {batch:4d}  {name:22s}{1e3 * seconds:8.3f} ms a step, {speed:6.1f} GFLOP/s in products   "
                f"step / products {median:5.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )
            row = {"net": options.net, "contestant": name, "batch": batch, "ms_step": 1e3 * seconds, "gflop_s": speed}
            rows.append(row | {"products_ratio": median, "products_low": low, "products_high": high})
    write("matmul_share", rows, told)


if __name__ == "__main__":
    main()
