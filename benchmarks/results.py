"""Tables of figures in `results/`, with the conditions that they hold under."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "conditions", "read", "write"]

FOLDER = Path(__file__).with_name("results")
_TELL = """
import importlib.metadata as m
print(*(f"{d.name}={d.version}" for d in m.distributions() if d.name.lower() in ("jax", "numpyro")), sep=" ")
"""


def conditions(threads: int, jax: str = "") -> dict[str, Any]:
    """Versions, threads, processor, load and date."""
    versions = []
    for name in ("aevb", "torch", "pythae", "pyro-ppl"):
        try:
            versions.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if jax:
        versions.append(subprocess.run([jax, "-c", _TELL], check=True, capture_output=True, text=True).stdout.strip())
    return {
        "threads": threads,
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "versions": " ".join(versions),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, rows: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """`rows` as `results/NAME.csv`, each with the conditions."""
    FOLDER.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in (*row, *told)))
    with open(FOLDER / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = (row | told).items()
            writer.writerow({column: f"{cell:.4g}" if isinstance(cell, float) else cell for column, cell in cells})


def read(name: str) -> list[dict[str, str]]:
    """The rows of `results/NAME.csv`; none where it does not exist."""
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
