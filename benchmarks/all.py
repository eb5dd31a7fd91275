"""Every benchmark of training, one after another; a table and plots for the docs out of their results.

    peers/bin/python benchmarks/all.py [--quick] [--jax peers-jax/bin/python] [--threads 2]

The environments are those of `train_step.py`. Figures go to `benchmarks/results/`, one CSV a benchmark and
`training.md`, the plots beside them. `--quick` shows in minutes that everything runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from results import FOLDER, read

HERE = Path(__file__).parent
QUICK = {
    "train_step": ["--rounds", "1", "--turn", "2000", "--rows", "2000", "--batches", "100", "--nets", "784-400-z20"],
    "matmul_share": ["--rounds", "1", "--steps", "20", "--batches", "100"],
    "scaling": ["--rounds", "1", "--steps", "10", "--axes", "batch", "layers"],
    "footprint": ["--rows", "10000", "20000", "--steps", "5"],
}


def table(name: str, columns: dict[str, str]) -> list[str]:
    """The results of one benchmark in markdown, `columns` with their headings."""
    rows = read(name)
    if not rows:
        return []
    told = f"{rows[0]['cpu']}, {rows[0]['threads']} threads, load {rows[0]['load']}, {rows[0]['date']}"
    lines = [f"## {name}.py", "", f"{told}; {rows[0]['versions']}", "", "| " + " | ".join(columns.values()) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        cells = []
        for column in columns:
            low, high = (row.get(column.replace("_ratio", "") + end, "") for end in ("_low", "_high"))
            cells.append(f"{row.get(column, '')} ({low} to {high})" if low else row.get(column, ""))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot_train_step(path: Path) -> None:
    """What the compiled step makes of each contestant's rate, against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read("train_step") if row.get("compiled_ratio")]
    groups = list(dict.fromkeys((row["net"], row["precision"]) for row in rows))
    names, batches = list(dict.fromkeys(row["contestant"] for row in rows)), sorted({int(row["batch"]) for row in rows})
    across = min(2, len(groups))
    down = -(-len(groups) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(5 * across, 3.8 * down), layout="constrained", squeeze=False, sharey=True
    )
    for (net, precision), panel in zip(groups, panels.flat, strict=False):
        for name in names:
            points = [r for r in rows if (r["net"], r["precision"], r["contestant"]) == (net, precision, name)]
            x, y = ([float(point[column]) for point in points] for column in ("batch", "examples_s"))
            panel.loglog(x, y, "o-", label=name, linewidth=2.5 if name.startswith("aevb") else 1.0)
        panel.set(title=f"{net}, {precision}", xlabel="batch", xticks=batches, xticklabels=batches)
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("examples a second")
    panels[0, 0].legend(fontsize="small")
    plt.rcParams["svg.hashsalt"] = "aevb"
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--jax", default="", help="interpreter of the environment that has NumPyro")
    options = parser.parse_args()
    for name, quick in QUICK.items():
        flags = ["--threads", options.threads, *(quick if options.quick else [])]
        flags += ["--jax", options.jax] if name == "train_step" else []
        print(f"{name}.py {' '.join(flags)}", flush=True)
        subprocess.run([sys.executable, HERE / f"{name}.py", *flags], check=True)
    lines = table(
        "train_step",
        {
            "net": "net", "precision": "precision", "batch": "batch", "contestant": "contestant",
            "examples_s": "examples/s", "compiled_ratio": "`fit`, compiled / it", "eager_ratio": "`fit`, eager / it",
            "setup_s": "set-up, s",
        },
    )  # fmt: skip
    lines += table(
        "matmul_share",
        {"batch": "batch", "contestant": "contestant", "ms_step": "ms a step", "products_ratio": "step / products"},
    )
    lines += table(
        "scaling",
        {"contestant": "contestant", "axis": "axis", "size": "size", "ms_step": "ms a step", "us_row": "µs a row"},
    )
    lines += table(
        "footprint", {"contestant": "contestant", "rows": "rows", "data_mb": "data, MB", "peak_mb": "peak above, MB"}
    )
    (FOLDER / "training.md").write_text("\n".join(["# Speed and memory of training", "", *lines]))
    plot_train_step(FOLDER / "train_step.svg")
    from scaling import plot

    plot(str(FOLDER / "scaling.svg"))
    print(FOLDER / "training.md")


if __name__ == "__main__":
    main()
