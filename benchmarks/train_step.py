"""Examples per second of `aevb.fit` against what else trains the same net, on the same data in memory.

    python -m venv peers && peers/bin/pip install torch==2.13.0 -e . -r benchmarks/requirements.txt
    python -m venv peers-jax && peers-jax/bin/pip install -r benchmarks/requirements-jax.txt
    peers/bin/python benchmarks/train_step.py [--jax peers-jax/bin/python] [--rounds 5] [--batches 100 500]

Same net, batch, precision and number of threads for all; a process for each contestant, and they take turns. A turn is
an epoch or more. The figures are medians over rounds, of rates and of ratios within a round, with the ratios' range.
Set-up (data, checks, compilation and a first turn) is told apart. Who the contestants are, `contestants.py` tells; one
that is not installed is left out, and bfloat16 where the processor has no units for it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from contestants import CONTESTANTS, NETS, Setting
from race import race, ratio, spread
from results import conditions, write

OURS = ("aevb compiled", "aevb eager")


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by units of its own."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's


def compare(setting: Setting, rounds: int, steps: int, jax: str, cpu_time: bool) -> list[dict[str, object]]:
    """One race, printed and as rows of the table."""
    names = [name for name in CONTESTANTS if name != "matrix products"]
    lanes = race({name: dataclasses.replace(setting, contestant=name) for name in names}, rounds, steps, jax, cpu_time)
    rows = []
    for name, lane in lanes.items():
        row: dict[str, object] = {
            "contestant": name,
            "batch": setting.batch,
            "precision": setting.precision,
            "setup_s": lane.setup,
        }
        if lane.missing:
            print(f"  {name:22s} left out: {lane.missing}")
            continue
        row["examples_s"] = spread(lane.rates)[0]
        told = f"  {name:22s}{row['examples_s']:8.0f} examples/s  set-up {lane.setup:4.0f} s"
        for our in OURS:
            median, low, high = ratio(lanes[our], lane)
            short = our.split()[-1]
            row |= {f"{short}_ratio": median, f"{short}_low": low, f"{short}_high": high}
            told += f"   {our} / it {median:5.2f} ({low:.2f} to {high:.2f})"
        print(told, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=int, default=20_000, help="at least so many examples a turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[20, 100, 500, 2000])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a busy machine")
    parser.add_argument("--jax", default="", help="interpreter of the environment that has NumPyro")
    options = parser.parse_args()
    told = conditions(options.threads, options.jax)
    print(told, flush=True)
    precisions = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
    rows = []
    for net in options.nets:
        for precision in precisions:
            for batch in options.batches:
                print(f"{net}, batch {batch}, {precision}, {options.rounds} rounds", flush=True)
                setting = Setting(
                    contestant="", batch=batch, rows=options.rows, precision=precision, threads=options.threads,
                    **NETS[net],
                )  # fmt: skip
                found = compare(setting, options.rounds, -(-options.turn // batch), options.jax, options.cpu_time)
                rows += [{"net": net} | row for row in found]
    if precisions == ["float32"]:
        print("bfloat16 left out: this processor has no units for it")
        rows.append({"contestant": "all: left out, no units for it", "precision": "bfloat16"})
    write("train_step", rows, told)


if __name__ == "__main__":
    main()
