r"""How far each code stands for one known factor of variation: MIG, DCI and SAP.

Codes are the latents' values or posterior means; factors are what the data were made from. All three judge a `(D, F)`
table of how much code d tells of factor f: mutual information (MIG), importance in a prediction (DCI), accuracy of a
prediction from that code alone (SAP).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb.config import InputError

__all__ = ["Disentanglement", "disentanglement"]

_TREES = 50
_LEAVES = (0.005, 0.02, 0.08)
"""Least shares of the rows in a leaf to choose from. Leaves too small fit noise, and codes that tell nothing then share
in the importance: Eastwood and Williams choose the trees' depth by validation for the same reason."""


@dataclass(frozen=True, kw_only=True)
class Disentanglement:
    """Scores of codes against factors, higher is better in each, and the tables that they are made of."""

    mig: float  # in [0, 1], mean over factors of the gap in mutual information
    sap: float  # in [0, 1], mean over factors of the gap in accuracy; 1 - 1 / classes is the most for classes
    disentanglement: float  # in [0, 1], DCI: each code matters for one factor
    completeness: float  # in [0, 1], DCI: each factor takes one code
    informativeness: float  # at most 1, DCI: mean over factors of held-out accuracy, or R^2 for a continuous one
    information: Tensor  # (D, F) nats, plug-in
    importance: Tensor  # (D, F) at least 0, columns sum to 1, or to 0 where the forest finds nothing to split
    accuracy: Tensor  # (D, F) in [0, 1], balanced accuracy, or R^2 for a continuous factor; 0 for a constant code


def disentanglement(
    codes: Tensor, factors: Tensor, *, discrete: bool | Sequence[bool] = True, bins: int = 20, seed: int = 0
) -> Disentanglement:
    r"""Score codes against known factors of variation.

    .. math:: \text{MIG} = \frac{1}{F} \sum_f \frac{I(z_{(1)}; v_f) - I(z_{(2)}; v_f)}{H(v_f)}, \quad
        \text{D} = \sum_d \rho_d \Bigl(1 + \sum_f P_{df} \log_F P_{df}\Bigr), \quad
        \text{C} = \frac{1}{F} \sum_f \Bigl(1 + \sum_d \tilde P_{df} \log_D \tilde P_{df}\Bigr)

    with (1) and (2) the codes that tell most of factor f, P and :math:`\tilde P` the importances with rows and columns
    made to sum to one, :math:`\rho` the share of a row in all importance.

    MIG (Chen et al., 2018, eq. 6) is computed on histograms, each code's and each continuous factor's range cut into
    `bins` of equal width; its information is biased upwards by about (bins - 1) (classes - 1) / 2N nats. DCI (Eastwood
    and Williams, 2018) takes importances from a random forest that sees every code at every split, the size of its
    leaves chosen by the rows each tree has not seen; a quarter of all rows, held out, judges its predictions. SAP
    (Kumar et al., 2018, section 3) is the gap between the two codes that alone predict a factor best: by balanced
    accuracy of thresholds on the code, one fewer than classes, for a discrete factor; by R² of a line for a continuous
    one.

    Figures depend on these choices, `bins` above all, and compare only where they are the same.

    Args:
        codes: `(N, D)`, at least two.
        factors: `(N, F)`, at least two.
        discrete: Whether factors are classes, told by equal values; for all of them, or one answer each.
        bins: Cells of a histogram.
        seed: Of the forest and of the rows held out.

    Returns:
        The scores.

    Raises:
        InputError: For tables that do not fit one another, values that are not finite, a factor with one value only,
            or fewer rows than cells of a histogram; without scikit-learn.

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0)).repeat(10, 1)
        >>> found = disentanglement(-2 * factors.flip(1), factors)
        >>> round(found.mig, 4), round(found.sap, 4), found.disentanglement, found.completeness
        (1.0, 0.775, 1.0, 1.0)
    """
    z, v = _table("codes", codes), _table("factors", factors)
    if len(z) != len(v):
        raise InputError(f"`codes` and `factors` must have the same rows; got {len(z)} and {len(v)}.")
    kinds = _kinds(discrete, v.shape[1])
    if bins < 2:
        raise InputError(f"`bins` must be at least 2; got {bins}.")
    # A discrete factor as its classes 0, 1, ...; a continuous one as its bins.
    cells = [_classes(v[:, f]) if kinds[f] else _bin(v[:, f], bins) for f in range(v.shape[1])]
    _check_counts(cells, kinds, bins)
    targets = [cells[f].double() if kinds[f] else v[:, f] for f in range(v.shape[1])]

    binned = [_bin(code, bins) for code in z.unbind(1)]
    information = torch.tensor(
        [[_mutual_information(code, cell) for cell in cells] for code in binned], dtype=torch.float64
    )
    entropy = torch.tensor([_mutual_information(cell, cell) for cell in cells], dtype=torch.float64)
    importance, informativeness = _forest(z, targets, kinds, seed)
    clear, complete = _dci(importance)
    accuracy = _accuracy(z, targets, kinds)
    return Disentanglement(
        mig=float((_gap(information) / entropy).mean()),
        sap=float(_gap(accuracy).mean()),
        disentanglement=clear,
        completeness=complete,
        informativeness=informativeness,
        information=information,
        importance=importance,
        accuracy=accuracy,
    )


def _table(name: str, values: Tensor) -> Tensor:
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(
            f"`{name}` must be (N, columns) with at least two columns, the scores being about which of several belong "
            f"together; got shape {tuple(values.shape)}."
        )
    table = values.detach().to("cpu", torch.float64)
    if not bool(table.isfinite().all()):
        column = int((~table.isfinite()).any(0).nonzero()[0, 0])
        raise InputError(f"`{name}` must be finite; column {column} has NaN or infinity. Drop these rows from both.")
    return table


def _kinds(discrete: bool | Sequence[bool], factors: int) -> list[bool]:
    kinds = [discrete] * factors if isinstance(discrete, bool) else list(discrete)
    if len(kinds) != factors:
        raise InputError(
            f"`discrete` must be True, False or one answer for each of {factors} factors; got {len(kinds)}."
        )
    return kinds


def _check_counts(cells: list[Tensor], kinds: list[bool], bins: int) -> None:
    for column, (cell, kind) in enumerate(zip(cells, kinds, strict=True)):
        rows, count = len(cell), len(cell.unique())
        if count < 2:
            raise InputError(f"Factor {column} has one value only: no code can tell anything of it. Drop it.")
        if rows < (needed := bins * count):
            raise InputError(
                f"Factor {column} has {count} {'classes' if kind else 'bins in use'}, and needs {needed} rows, one for "
                f"each cell of a histogram with {bins} bins; got {rows}. Give more rows or fewer bins"
                + (", or say that it is continuous in `discrete`." if kind else ".")
            )


def _classes(values: Tensor) -> Tensor:
    inverse: Tensor = values.unique(return_inverse=True)[1]
    return inverse


def _bin(values: Tensor, bins: int) -> Tensor:
    """Cell `(N,)` of each value, `bins` of equal width from the least to the largest; all 0 for a constant."""
    least, largest = values.min(), values.max()
    if least == largest:
        return torch.zeros_like(values, dtype=torch.int64)
    return ((values - least) / (largest - least) * bins).long().clamp(max=bins - 1)


def _mutual_information(one: Tensor, other: Tensor) -> float:
    r""":math:`\sum_{ab} p_{ab} \log (p_{ab} / p_a p_b)` of two columns of cells, nats; of one with itself, entropy."""
    shape = (int(one.max()) + 1, int(other.max()) + 1)
    counts = torch.bincount(one * shape[1] + other, minlength=math.prod(shape)).reshape(shape)
    joint = counts.double() / len(one)
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    full = joint > 0
    # Rounding can leave -1e-17 where there is none.
    return max(0.0, float((joint[full] * (joint[full] / independent[full]).log()).sum()))


def _gap(table: Tensor) -> Tensor:
    """Largest entry of each column less the next, `(D, F)` to `(F,)`."""
    first, second = table.topk(2, dim=0).values.unbind(0)
    return first - second


def _dci(importance: Tensor) -> tuple[float, float]:
    """Disentanglement and completeness of a table of importances `(D, F)`."""
    codes = importance.sum(1)
    weights = codes / codes.sum().clamp(min=torch.finfo(codes.dtype).tiny)
    return float((weights * _concentration(importance)).sum()), float(_concentration(importance.T).mean())


def _concentration(table: Tensor) -> Tensor:
    """For each row, 1 less its entropy in units of that of even shares: 1 for one entry alone, 0 for a row of zeros."""
    total = table.sum(1, keepdim=True)
    shares = table / torch.where(total > 0, total, 1.0)
    entropy = -torch.special.xlogy(shares, shares).sum(1) / math.log(table.shape[1])
    return torch.where(total[:, 0] > 0, 1 - entropy, 0.0)


def _forest(z: Tensor, targets: list[Tensor], kinds: list[bool], seed: int) -> tuple[Tensor, float]:
    """Importance `(D, F)` of the codes for predicting each factor, and the mean of the predictions' scores."""
    try:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    except ImportError:
        raise InputError(
            "`disentanglement` needs scikit-learn, which is not installed. Install it: pip install 'aevb[apps]'."
        ) from None
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(z) // 4], order[len(z) // 4 :]
    importances, scores = [], []
    for target, kind in zip(targets, kinds, strict=True):
        # Every code at every split: a random part of them would hand a code's importance on to those that tell less.
        forests = [
            (RandomForestClassifier if kind else RandomForestRegressor)(
                _TREES, max_features=None, min_samples_leaf=leaf, oob_score=True, random_state=seed
            ).fit(z[kept].numpy(), target[kept].numpy())
            for leaf in _LEAVES
        ]
        forest = max(forests, key=lambda forest: forest.oob_score_)
        importances.append(torch.from_numpy(forest.feature_importances_))
        scores.append(float(forest.score(z[held].numpy(), target[held].numpy())))
    return torch.stack(importances, 1), sum(scores) / len(scores)


def _accuracy(z: Tensor, targets: list[Tensor], kinds: list[bool]) -> Tensor:
    """How well each code alone tells each factor, `(D, F)`; 0 for a constant code, as Kumar et al. have it."""
    result = torch.zeros(z.shape[1], len(targets), dtype=torch.float64)
    for d, code in enumerate(z.unbind(1)):
        if bool(code.min() < code.max()):
            for f, (target, kind) in enumerate(zip(targets, kinds, strict=True)):
                result[d, f] = (_thresholds if kind else _line)(code, target)
    return result


def _line(code: Tensor, target: Tensor) -> float:
    """R² of the best line."""
    return float(torch.corrcoef(torch.stack([code, target]))[0, 1].square())


def _thresholds(code: Tensor, classes: Tensor) -> float:
    """Balanced accuracy, on the same rows, of thresholds on the code, one fewer than classes, set by a tree."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.tree import DecisionTreeClassifier

    column, wanted = code[:, None].numpy(), classes.numpy()
    tree = DecisionTreeClassifier(max_leaf_nodes=len(classes.unique()), class_weight="balanced", random_state=0)
    return float(balanced_accuracy_score(wanted, tree.fit(column, wanted).predict(column)))
