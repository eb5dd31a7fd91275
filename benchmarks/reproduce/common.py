"""What the reproductions share: data, and the file that each run adds its row to."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import aevb

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = (
    "what",
    "setting",
    "seed",
    "figure",
    "value",
    "std_error",
    "minutes",
    "threads",
    "aevb",
    "torch",
    "cpu",
    "date",
)


def mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grey values 0..255 `(N, 784)` and labels `(N,)`, train and test."""
    with np.load(folder / "mnist" / "mnist.npz") as file:
        x_train, y_train, x_test, y_test = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    return (
        torch.from_numpy(x_train).flatten(1), torch.from_numpy(y_train.astype("int64")),
        torch.from_numpy(x_test).flatten(1), torch.from_numpy(y_test.astype("int64")),
    )  # fmt: skip


def silhouettes(folder: Path) -> dict[str, Tensor]:
    """Caltech-101 silhouettes, 1 for the object (the file has 1 for the background)."""
    with np.load(folder / "caltech101_silhouettes" / "caltech101_silhouettes_28_split1.npz") as file:
        bits = {part: np.unpackbits(file[f"x_{part}_bits"], axis=1)[:, :784] for part in ("train", "val", "test")}
    return {part: 1.0 - torch.from_numpy(values).float() for part, values in bits.items()}


def binarized(grey: Tensor) -> Tensor:
    """Zeros and ones drawn from grey values 0..255, by torch's current generator."""
    return (torch.rand(grey.shape) * 255 < grey).float()


class Binarized:
    """Grey rows, drawn black or white anew each time they are used."""

    def __init__(self, grey: Tensor) -> None:
        self.grey = grey

    def __len__(self) -> int:
        return len(self.grey)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": binarized(self.grey[indices])}


def record(what: str, setting: str, seed: int, minutes: float, figures: dict[str, float | tuple[float, float]]) -> None:
    """Add one row a figure; a pair is a value with its standard error."""
    fresh = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for figure, found in figures.items():
            value, error = found if isinstance(found, tuple) else (found, None)
            cells = (f"{value:.6g}", "" if error is None else f"{error:.3g}", f"{minutes:.1f}")
            versions = (torch.get_num_threads(), aevb.__version__, torch.__version__, platform.machine())
            writer.writerow((what, setting, seed, figure, *cells, *versions, datetime.date.today().isoformat()))
    told = ", ".join(f"{figure} {found}" for figure, found in figures.items())
    print(f"{what}, {setting}, seed {seed}: {told} ({minutes:.1f} min)", flush=True)
