"""Imputation of tables with half of their entries missing: AEVB beside the mean, KNN, IterativeImputer and a Gaussian.

    python benchmarks/imputation.py [DATA] [--sets breast_cancer yeast] [--seeds 0 1 2 3 4]
        [--methods AEVB "Gaussian EM"] [--out imputation.csv]

DATA holds tabular/*.csv.xz and uci_regression/concrete.npz (default ../shared/data); breast cancer is scikit-learn's.
Of each table the columns that describe are used, not the one to be predicted. They are standardised on all their
values, then `numpy.random.RandomState(seed).rand(*X.shape) < .5` go missing (Mattei and Frellsen, 2019, "MIWAE").

The error is the mean of the squared difference over the missing entries: of the rows that a method was trained on, and,
by methods trained on four fifths of them, of the fifth held out (the permutation of `numpy.random.default_rng(seed)`).
Everything runs at its defaults, AEVB too: they were chosen by held-out log-likelihoods, never by this error. Gaussian
EM: one Gaussian with full covariance at its maximum likelihood, missing entries at their conditional means.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

import aevb

Filler = Callable[[np.ndarray], np.ndarray]


def gaussian_em(x: np.ndarray, rounds: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance that maximise the likelihood of rows `(N, D)` with NaN; stops where none moves by 1e-4."""
    mean, cov = np.nanmean(x, 0), np.diag(np.nanvar(x, 0))
    for _ in range(rounds):
        filled, gone = conditional(x, mean, cov)
        before = mean, cov
        mean = filled.mean(0)
        cov = (filled - mean).T @ (filled - mean) / len(x) + gone.mean(0)
        if max(np.abs(new - old).max() for new, old in zip((mean, cov), before, strict=True)) < 1e-4:
            break
    return mean, cov


def conditional(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `(N, D)` with missing entries at their conditional means, and conditional covariances `(N, D, D)`."""
    known = (~np.isnan(x)).astype(float)
    both = known[:, :, None] * known[:, None, :]
    # The covariance of what is known, with ones on the diagonal elsewhere: one shape for all patterns of holes.
    seen = both * (cov + 1e-9 * np.eye(len(cov))) + (1 - known)[:, :, None] * np.eye(len(cov))
    gain = np.linalg.solve(seen, known[:, :, None] * cov)  # (N, known, all)
    guess = mean + np.einsum("nij,ni->nj", gain, np.where(known > 0, x - mean, 0.0))
    gone = (1 - known)[:, :, None] * (1 - known)[:, None, :]
    spread = cov - np.einsum("nki,nk,kj->nij", gain, known, cov)
    return np.where(known > 0, x, guess), gone * spread


def by_aevb(train: np.ndarray, seed: int) -> Filler:
    return aevb.AEVB(random_state=seed).fit(train).impute


def by_gaussian(train: np.ndarray, seed: int) -> Filler:
    mean, cov = gaussian_em(train)
    return lambda x: conditional(x, mean, cov)[0]


METHODS: dict[str, Callable[[np.ndarray, int], Filler]] = {
    "AEVB": by_aevb,
    "Gaussian EM": by_gaussian,
    "Iterative": lambda train, seed: IterativeImputer(random_state=seed).fit(train).transform,
    "KNN": lambda train, seed: KNNImputer().fit(train).transform,
    "mean": lambda train, seed: SimpleImputer().fit(train).transform,
}
SETS = {
    "breast_cancer": "",
    "banknote": "class",
    "concrete": "",
    "winequality_red": "quality",
    "winequality_white": "quality",
    "yeast": "name class",
}
"""Sets, each with the columns that are left out."""


def table(folder: Path, name: str) -> np.ndarray:
    """The standardised columns of a set."""
    if name == "breast_cancer":
        x = load_breast_cancer().data
    elif name == "concrete":
        with np.load(folder / "uci_regression" / "concrete.npz") as file:
            x = file["x"]
    else:
        x = pd.read_csv(folder / "tabular" / f"{name}.csv.xz").drop(columns=SETS[name].split()).to_numpy(float)
    return (x - x.mean(0)) / x.std(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("imputation.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # IterativeImputer's, at its default of ten rounds
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "rows", "columns", "seed", "method", "error", "held_out_error", "seconds"])
        for name in options.sets:
            whole = table(options.data, name)
            for seed in options.seeds:
                gone = np.random.RandomState(seed).rand(*whole.shape) < 0.5
                x = np.where(gone, np.nan, whole)
                order = np.random.default_rng(seed).permutation(len(x))
                held, rest = order[: len(x) // 5], order[len(x) // 5 :]
                for method in options.methods:
                    began = time.process_time()
                    filled = METHODS[method](x, seed)(x)
                    seconds = time.process_time() - began
                    error = np.square(filled - whole)[gone].mean()
                    fresh = METHODS[method](x[rest], seed)(x[held])
                    held_error = np.square(fresh - whole[held])[gone[held]].mean()
                    found[name, method].append(error)
                    found[name, method + ", held out"].append(held_error)
                    writer.writerow(
                        [name, *whole.shape, seed, method, f"{error:.4f}", f"{held_error:.4f}", f"{seconds:.1f}"]
                    )
                    file.flush()
                    print(f"{name:18s}{seed:3d} {method:12s}{error:8.4f}{held_error:8.4f}{seconds:8.1f} s", flush=True)
    print(f"\n{'mean over seeds':18s}" + "".join(f"{method:>22s}" for method in options.methods))
    for name in options.sets:
        pairs = [[np.mean(found[name, each]) for each in (m, m + ", held out")] for m in options.methods]
        print(f"{name:18s}" + "".join(f"{one:12.3f} ({other:6.3f})" for one, other in pairs))


if __name__ == "__main__":
    main()
