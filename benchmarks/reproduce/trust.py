"""The pictures of *What log p(x) means, and how far to trust it*, from what an evaluated run keeps.

    aevb evaluate RUN --samples 5000 --also ais gaps information calibration checks
    python benchmarks/reproduce/trust.py RUN docs/_static

Nothing is computed anew: the pictures are those of the run's report, one SVG file each.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from matplotlib import style

from aevb.apps.report.drawing import STYLE, Picture
from aevb.apps.report.findings import drawn
from aevb.apps.report.pictures import rise
from aevb.apps.summary import Summary

SHOWN = {"ais": 2, "gaps": 2, "calibration": 1}
"""Findings, and how many of each one's pictures the page shows."""


def write(picture: Picture, path: Path) -> None:
    path.write_bytes(base64.b64decode(picture.uri.split(",", 1)[1]))
    print(f"{path}: {picture.alt}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    summary = Summary.load(args.run / "evaluation.json")
    with style.context(["default", STYLE]):
        write(rise(summary)["rise"], args.out / "trust-rise.svg")
        for name, pictures in drawn(summary).items():
            for number, picture in enumerate(pictures[: SHOWN.get(name, 0)], 1):
                write(picture, args.out / f"trust-{name}-{number}.svg")


if __name__ == "__main__":
    main()
