"""Seconds per step of `aevb.fit` against rows, latents, features, batch, draws and layers, one at a time.

    python benchmarks/scaling.py [--rounds 3] [--steps 100] [--threads 2] [--contestant "aevb eager"] [--plot FILE]

The others stay at 784-200-200-z50, batch 100, one draw, 20,000 rows (bytes in memory). The sizes of an axis take turns
in processes of their own; medians over rounds. `setup_s` is the time before the first update and that of a first turn:
it grows with the rows, since each is checked once, while the step should not.
"""

from __future__ import annotations

import argparse
import dataclasses

from contestants import Setting
from race import race, spread
from results import conditions, read, write

AXES = {
    "rows": [2_000, 20_000, 200_000],
    "latents": [2, 10, 50, 250],
    "features": [50, 200, 784, 3136],
    "batch": [20, 100, 500, 2000],
    "samples": [1, 5, 25, 100],
    "layers": [1, 2, 4, 8],
}


def with_size(base: Setting, axis: str, size: int) -> Setting:
    if axis == "layers":
        return dataclasses.replace(base, hidden=(base.hidden[0],) * size)
    return dataclasses.replace(base, **{axis: size})


def plot(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read("scaling")
    figure, panels = plt.subplots(2, 3, figsize=(9, 5), layout="constrained", sharey=True)
    for axis, panel in zip(AXES, panels.flat, strict=True):
        for name in dict.fromkeys(row["contestant"] for row in rows):
            points = [row for row in rows if row["axis"] == axis and row["contestant"] == name]
            panel.loglog([int(p["size"]) for p in points], [float(p["ms_step"]) for p in points], "o-", label=name)
        sizes = sorted({int(row["size"]) for row in rows if row["axis"] == axis})
        panel.set(xlabel=axis, xticks=sizes, xticklabels=[f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    figure.supylabel("milliseconds a step")
    panels[0, 0].legend()
    plt.rcParams["svg.hashsalt"] = "aevb"
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="a turn")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--contestants", nargs="+", default=["aevb eager"], help='"aevb compiled" takes minutes more')
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a busy machine")
    parser.add_argument("--plot", help="file to draw to")
    options = parser.parse_args()
    told, rows = conditions(options.threads), []
    print(told, flush=True)
    for axis in options.axes:
        for name in options.contestants:
            base = Setting(contestant=name, dtype="uint8", threads=options.threads)
            entries = {str(size): with_size(base, axis, size) for size in AXES[axis]}
            for size, lane in race(entries, options.rounds, options.steps, cpu_time=options.cpu_time).items():
                median, low, high = spread([1e3 * lane.setting.batch / rate for rate in lane.rates])
                print(
                    f"{name}, {axis:9s}{size:>8s}: {median:8.3f} ms a step ({low:.3f} to {high:.3f}), "
                    f"{1e3 * median / lane.setting.batch:8.2f} us a row, set-up {lane.setup:.1f} s",
                    flush=True,
                )
                row = {"contestant": name, "axis": axis, "size": size, "ms_step": median, "low": low, "high": high}
                rows.append(row | {"us_row": 1e3 * median / lane.setting.batch, "setup_s": lane.setup})
    write("scaling", rows, told)
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    main()
