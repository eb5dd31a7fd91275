"""A table with holes, behind scikit-learn's interface (notes, *Motivation*, *Marginal likelihood*; N2, N17).

Data: scikit-learn's breast cancer table, 30 measurements of 569 tumours, a tenth of the entries taken out.

- A density: log p(x) of rows never trained on, in nats and in the units of the data, with its Monte Carlo error.
- Novelties: trained on benign tumours alone, how often is a malignant one less likely than a benign one?
- Imputation: E[missing | known], beside the mean of each column.
- Labels in ten rows of 381, chosen five times: a classifier that also learns from the others, beside itself on the ten.

Defaults throughout; an illustration on one table, no benchmark.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import aevb


def table(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, the same with holes, and 1 for a benign tumour."""
    x, y = load_breast_cancer(return_X_y=True)
    hidden = np.random.default_rng(seed).random(x.shape) < 0.1
    return x, np.where(hidden, np.nan, x), y


def main(seed: int = 0, draws: int = 5, steps: int | None = None) -> dict[str, float]:
    x, holed, y = table(seed)
    parts = train_test_split(x, holed, y, test_size=0.33, stratify=y, random_state=seed)
    _, full, train, test, y_train, y_test = parts
    found: dict[str, float] = {}

    model = aevb.AEVB(steps=steps, random_state=seed).fit(train[y_train == 1])
    log_prob, error = model.score_samples(test, return_std=True)
    benign = log_prob[y_test == 1]
    found["log p"], found["monte carlo"] = float(benign.mean()), float(error.max())
    found["auroc"] = float(roc_auc_score(y_test, log_prob))
    print(f"benign test rows: log p(x) = {benign.mean():.1f} +- {benign.std() / len(benign) ** 0.5:.1f} nats a row,")
    print(f"  of which Monte Carlo: at most {error.max():.2f} in a row")
    print(f"a malignant row is less likely than a benign one in {100 * found['auroc']:.1f} % of pairs")

    everyone = aevb.AEVB(steps=steps, random_state=seed).fit(train)
    missing, spread = np.isnan(test), np.nanstd(train, 0)
    means = np.where(missing, np.nanmean(train, 0), test)
    for name, filled in (("imputed", everyone.impute(test)), ("column means", means)):
        away = np.square((filled - full) / spread)[missing]
        found[name], found[f"{name}, error"] = float(away.mean()), float(away.std() / len(away) ** 0.5)
        print(f"{name}: squared error {away.mean():.3f} +- {found[f'{name}, error']:.3f} of the columns' variance")

    rng = np.random.default_rng(seed)
    right: dict[str, list[float]] = {"ten labels": [], "and 371 rows without": []}
    for _ in range(draws):
        shown = np.concatenate([rng.choice(np.flatnonzero(y_train == c), 5, replace=False) for c in (0, 1)])
        labels = np.full(len(y_train), -1)
        labels[shown] = y_train[shown]
        for name, rows in zip(right, (shown, np.arange(len(labels))), strict=True):
            classifier = aevb.AEVBClassifier(unlabelled=-1, random_state=seed).fit(train[rows], labels[rows])
            right[name].append(float(classifier.score(test, y_test)))
    for name, scores in right.items():
        found[name] = float(np.mean(scores))
        told = ", ".join(f"{100 * score:.1f}" for score in scores)
        print(f"{name}: {100 * found[name]:.1f} % of {len(y_test)} test rows right ({told})")
    return found


if __name__ == "__main__":
    main()
