"""Synthetic rows of the Adult census: a classifier learns from them and is tested on real rows; how near they come.

    python benchmarks/adult.py DATA [--keep FOLDER] [--seeds 0 1 2 3 4] [--methods aevb TVAE]

DATA holds adult_train.csv.xz and adult_test.csv.xz, missing cells written `?`. Each method is trained on the training
rows at its defaults and draws as many; scikit-learn's HistGradientBoostingClassifier, at its own, learns the income
from the draws, and its AUC is that on the real test rows. aevb is run as a user runs it, `aevb train`, `aevb sample`.
TVAE is that of ctgan, in an environment of its own (`benchmarks/requirements-adult.txt`), to which `?` is a category
like another. The ceiling is the classifier that learned from the real training rows.

Distance to the closest record: of drawn rows to the training rows beside that of the test rows, Gower's (see
`aevb.distance_to_closest`); copies are those at distance 0. Rows that --keep holds already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

import aevb

TARGET = "income"
NUMBERS = ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week")
COMPARED = 5000
"""Rows, evenly spaced, whose closest record is looked for."""


def by_aevb(train: pd.DataFrame, out: Path, seed: int) -> None:
    command = [sys.executable, "-c", "from aevb.apps.cli import main; main()"]
    with tempfile.TemporaryDirectory() as folder:
        train.to_csv(Path(folder) / "train.csv", index=False)
        for words in (
            ["train", f"{folder}/train.csv", "--out", f"{folder}/run", "--seed", str(seed)],
            ["sample", f"{folder}/run", "-n", str(len(train)), "--out", f"{folder}/{out.name}", "--seed", str(seed)],
        ):
            subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
        out.write_bytes((Path(folder) / out.name).read_bytes())


def by_tvae(train: pd.DataFrame, out: Path, seed: int) -> None:
    from ctgan import TVAE

    torch.manual_seed(seed)
    model = TVAE(enable_gpu=False)
    model.set_random_state(seed)
    model.fit(train, [name for name in train if name not in NUMBERS])
    model.sample(len(train)).to_csv(out, index=False)


METHODS: dict[str, Callable[[pd.DataFrame, Path, int], None]] = {"aevb": by_aevb, "TVAE": by_tvae}


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, na_values="?", keep_default_na=False)


def auc(train: pd.DataFrame, test: pd.DataFrame, values: dict[str, list[str]], seed: int) -> float:
    """Of a classifier that learned the income from `train`."""
    x, y = [], []
    for rows in (train, test):
        columns = {n: pd.Categorical(rows[n], values[n]) if n in values else rows[n].astype(float) for n in rows}
        x.append(pd.DataFrame(columns).drop(columns=TARGET))
        y.append((rows[TARGET] == values[TARGET][-1]).to_numpy())
    model = HistGradientBoostingClassifier(categorical_features="from_dtype", random_state=seed).fit(x[0], y[0])
    return float(roc_auc_score(y[1], model.predict_proba(x[1])[:, 1]))


def distances(rows: pd.DataFrame, train: pd.DataFrame, values: dict[str, list[str]]) -> np.ndarray:
    """Of some of the rows to the closest of the training rows."""
    rows = rows.iloc[np.linspace(0, len(rows) - 1, min(COMPARED, len(rows))).astype(int)]
    coded = []
    for frame in (rows, train):
        columns = [
            np.where(frame[n].isna(), np.nan, pd.Categorical(frame[n], values[n]).codes) if n in values else frame[n]
            for n in train
        ]
        coded.append(torch.from_numpy(np.stack(columns, 1).astype(np.float64)))
    categories = [j for j, name in enumerate(train) if name in values]
    return aevb.distance_to_closest(*coded, categories).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--keep", type=Path, help="folder of the rows drawn, and of adult.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    if "TVAE" in options.methods and importlib.util.find_spec("ctgan") is None:
        sys.exit("TVAE is ctgan's: install benchmarks/requirements-adult.txt, or give --methods aevb.")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    keep = options.keep or Path(tempfile.mkdtemp(prefix="adult-"))
    keep.mkdir(parents=True, exist_ok=True)
    train, test = (read(options.data / f"adult_{part}.csv.xz") for part in ("train", "test"))
    whole = pd.concat([train, test])
    values = {name: sorted(whole[name].dropna().unique()) for name in train if name not in NUMBERS}
    with (keep / "adult.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rows", "seed", "auc", "distance_median", "distance_5%", "copies", "seconds"])

        def judged(name: str, rows: pd.DataFrame, learned: pd.DataFrame, seed: int, seconds: float) -> list[float]:
            gap = distances(rows, train, values)
            found = [
                auc(learned, test, values, seed), float(np.median(gap)), float(np.quantile(gap, 0.05)),
                float((gap == 0).mean()),
            ]  # fmt: skip
            writer.writerow([name, seed, *(f"{figure:.5f}" for figure in found), f"{seconds:.0f}"])
            file.flush()
            print(
                f"{name:6s} seed {seed}: AUC {found[0]:.4f}; closest record {found[1]:.4f}, 5 % {found[2]:.4f}; "
                f"copies {100 * found[3]:.2f} %; {seconds:.0f} s",
                flush=True,
            )
            return found

        judged("real", test, train, 0, 0.0)
        figures: dict[str, list[float]] = {}
        for method in options.methods:
            for seed in options.seeds:
                path, began = keep / f"{method}-{seed}.csv", time.perf_counter()
                if not path.exists():
                    written = keep / f"part-{method}-{seed}.csv"
                    METHODS[method](train.fillna("?"), written, seed)
                    written.rename(path)
                rows, seconds = read(path), time.perf_counter() - began
                figures.setdefault(method, []).append(judged(method, rows, rows, seed, seconds)[0])
    for method, each in figures.items():
        spread = float(np.std(each, ddof=1)) if len(each) > 1 else np.nan
        half = stats.t.ppf(0.975, len(each) - 1) * spread / np.sqrt(len(each)) if len(each) > 1 else np.nan
        print(f"{method}: AUC {np.mean(each):.4f} ± {spread:.4f}, 95 % limits {np.mean(each) - half:.4f} and "
              f"{np.mean(each) + half:.4f}")  # fmt: skip
    print(f"figures and rows are in {keep}")


if __name__ == "__main__":
    main()
