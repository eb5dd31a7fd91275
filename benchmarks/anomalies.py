"""Semi-supervised anomaly detection on ADBench's classical tables: AEVB beside PCA, KNN, a Gaussian and PyOD's VAE.

    python benchmarks/anomalies.py [--data ../shared/data/adbench] [--sets 42_WBC 4_breastw] [--seeds 0 1 2 3 4]
        [--methods AEVB PCA KNN GMM] [--out anomalies.csv]

The protocol is that of Livernoche et al. (2024, "On diffusion modeling for anomaly detection"): half of the normal rows
train, the other half and all anomalies are the test, StandardScaler, five seeds, no tuning. Figures are AUROC, in
percent, and seconds to fit and to score. Everything runs at its defaults. PCA: the sum of squared principal components
in units of their variance. KNN: the distance to the fifth neighbour, as PyOD has it. GMM: scikit-learn's, one full
Gaussian. PyOD's VAE joins where pyod is installed, in an environment of its own (`benchmarks/requirements.txt`).

AEVB's defaults were chosen by the log-density of held-out normal rows, printed beside its AUROC, never by an AUROC.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

import aevb

Scorer = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def by_aevb(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return -aevb.AEVB(random_state=seed).fit(train).score_samples(test)


def by_pca(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    pca = PCA(random_state=seed).fit(train)
    kept = pca.explained_variance_ > 1e-12 * pca.explained_variance_[0]
    return (np.square(pca.transform(test))[:, kept] / pca.explained_variance_[kept]).sum(1)


def by_neighbours(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return NearestNeighbors(n_neighbors=5).fit(train).kneighbors(test)[0][:, -1]


def by_gaussian(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    return -GaussianMixture(random_state=seed).fit(train).score_samples(test)


def by_pyod(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    from pyod.models.vae import VAE

    return VAE(random_state=seed, verbose=0).fit(train).decision_function(test)


METHODS: dict[str, Scorer] = {"AEVB": by_aevb, "PCA": by_pca, "KNN": by_neighbours, "GMM": by_gaussian}
if importlib.util.find_spec("pyod") is not None:
    METHODS["PyOD VAE"] = by_pyod


def split(path: Path, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, test rows, and 1 for an anomaly among these."""
    with np.load(path) as file:
        x, y = file["X"].astype(np.float64), file["y"].ravel().astype(int)
    normal = np.random.default_rng(seed).permutation(np.flatnonzero(y == 0))
    train, rest = normal[: len(normal) // 2], normal[len(normal) // 2 :]
    test = np.concatenate([rest, np.flatnonzero(y == 1)])
    scaler = StandardScaler().fit(x[train])
    return scaler.transform(x[train]), scaler.transform(x[test]), y[test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "adbench")
    parser.add_argument("--sets", nargs="+", help="all of them if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("anomalies.csv"))
    options = parser.parse_args()
    names = options.sets or sorted(path.stem for path in options.data.glob("*.npz"))
    if not names:
        sys.exit(f"No .npz files in {options.data}: give the folder of ADBench's classical sets with --data.")
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "rows", "columns", "anomalies", "method", "seed", "auroc", "log_prob", "seconds"])
        print(f"{'AUROC, %':16s}" + "".join(f"{method:>16s}" for method in options.methods) + "   log p, AEVB")
        for name in names:
            heights = []
            for seed in options.seeds:
                train, test, y = split(options.data / f"{name}.npz", seed)
                for method in options.methods:
                    began = time.perf_counter()
                    scores = METHODS[method](train, test, seed)
                    seconds, auroc = time.perf_counter() - began, 100 * roc_auc_score(y, scores)
                    height = -scores[y == 0].mean() if method in ("AEVB", "GMM") else np.nan
                    heights += [height] if method == "AEVB" else []
                    found[name, method].append(auroc)
                    writer.writerow(
                        [name, len(train), train.shape[1], y.sum(), method, seed, f"{auroc:.3f}", f"{height:.4f}",
                         f"{seconds:.2f}"]
                    )  # fmt: skip
                    file.flush()
            cells = [f"{np.mean(found[name, m]):10.1f} ± {np.std(found[name, m]):3.1f}" for m in options.methods]
            print(f"{name:16s}" + "".join(cells) + (f"   {np.mean(heights):10.2f}" if heights else ""), flush=True)
    means = [np.mean([np.mean(found[name, m]) for name in names]) for m in options.methods]
    print(f"{'mean':16s}" + "".join(f"{mean:10.1f}      " for mean in means))


if __name__ == "__main__":
    main()
