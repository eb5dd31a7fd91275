r"""How well q(y | x) tells a target: of rows where it is known, beside what is said of them without x."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from aevb.apps.summary.finding import Finding, figure, mean_and_error, plain, told_from_zero
from aevb.data import Target
from aevb.distributions import LogNormal, OneHot, base_of

__all__ = ["of_prediction"]

_CLASSES = 10
"""Most classes that are told one by one."""
_Z, _LEVEL = 1.6448536269514722, 0.9
"""Standard deviations to either side that hold nine tenths of a Gaussian."""


def of_prediction(d: td.Distribution, y: Tensor, seen: Tensor, target: Target, rows: int, *, chose: bool) -> Finding:
    """The finding.

    Args:
        d: q(y | x) of the rows where y is known, as `BayesNet.distribution` returns it.
        y: Their true values, codes of classes or numbers, `(N,)`.
        seen: Those of the training rows, `(M,)`: what is said without x.
        target: The column.
        rows: All rows of the evaluation.
        chose: Whether these rows decided which weights were kept.
    """
    y, seen = y.double(), seen.double()
    made = _of_classes if isinstance(d, OneHot) else _of_numbers
    facts, verdicts, figures = made(d, y, seen, target)
    known = f"{len(y)} of {rows}, where `{target.name}` is known"
    caution = "These rows chose the weights that were kept, so that the figures are a little too good."
    return Finding(
        title=f"Prediction of {target.name} by q(y | x)",
        facts=(("rows", known), *facts),
        meaning=(*verdicts, *([caution] if chose else [])),
        figures=plain(figures | {"target": target.name, "kind": target.kind, "rows": len(y)}),
    )


_Told = tuple[list[tuple[str, str]], list[str], dict[str, Any]]

_NO_ERROR = "One row tells no error, so that nothing is concluded."


def _of_classes(d: td.Distribution, y: Tensor, seen: Tensor, target: Target) -> _Told:
    assert isinstance(d, OneHot)
    codes, labels, classes = y.long(), [str(label) for label in target.labels], target.classes
    chosen = d.logits.argmax(-1)
    right = (chosen == codes).double()
    loss = -d.logits.double().gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    counts = torch.bincount(seen.long(), minlength=classes).double()
    usual = int(counts.argmax())
    plain_right = (codes == usual).double()
    share = (counts + 0.5) / (counts + 0.5).sum()  # a class that training lacks is not impossible
    plain_loss = -share.log()[codes]
    gain, gain_loss = mean_and_error(right - plain_right), mean_and_error(plain_loss - loss)
    without = f"the most frequent class of the training rows, {labels[usual]}"
    facts = [
        ("accuracy", f"{figure(*mean_and_error(right))}, of the most probable class"),
        ("log loss", f"{figure(*mean_and_error(loss))} nats, mean of -log q(y | x)"),
        ("without x", f"accuracy {figure(*mean_and_error(plain_right))} of {without}"),
        ("", f"log loss {figure(*mean_and_error(plain_loss))} nats of the shares in training"),
    ]
    pairs = Counter(zip(codes.tolist(), chosen.tolist(), strict=True))
    common = torch.bincount(codes, minlength=classes).argsort(descending=True, stable=True)[:_CLASSES].tolist()
    for place, c in enumerate(c for c in common if bool((codes == c).any())):
        right_of_c = f"{labels[c]}: {pairs[c, c]} of {int((codes == c).sum())} right"
        facts.append(("by class" if not place else "", right_of_c))
    verdicts = [
        f"q(y | x) is {'right' if gain[0] > 0 else 'wrong'} more often than {without}, by "
        f"{figure(abs(gain[0]), gain[1])} of the rows."
        if told_from_zero(*gain, len(y))
        else f"By their number of errors these rows do not tell q(y | x) from {without}.",
        f"Its log loss is {'lower' if gain_loss[0] > 0 else 'higher'} than that of the shares, by "
        f"{figure(abs(gain_loss[0]), gain_loss[1])} nats."
        if told_from_zero(*gain_loss, len(y))
        else "By their log loss they do not tell it from the shares.",
    ]
    return (
        facts,
        verdicts if math.isfinite(gain[1]) else [_NO_ERROR],
        {
            "accuracy": mean_and_error(right),
            "log_loss": mean_and_error(loss),
            "without_x": {"accuracy": mean_and_error(plain_right), "log_loss": mean_and_error(plain_loss)},
            "gain": {"accuracy": gain, "log_loss": gain_loss},
            "labels": labels,
            "confusion": [[pairs[i, j] for j in range(classes)] for i in range(classes)],
        },
    )


def _of_numbers(d: td.Distribution, y: Tensor, seen: Tensor, target: Target) -> _Told:
    base = base_of(d)
    normal, at = (base.log, y.log()) if isinstance(base, LogNormal) else (base, y)
    assert isinstance(normal, td.Normal)
    loc, scale = (each.squeeze(-1).double() for each in (normal.loc, normal.scale))
    mean, loss = base.mean.squeeze(-1).double(), -d.log_prob(y.unsqueeze(-1).to(normal.loc)).double()
    held = ((at - loc).abs() <= _Z * scale).double()
    missed, spread = (y - mean).square(), (y - y.mean()).square()
    unit = {"Date": " days", "Datetime": " seconds"}.get(target.column.dtype, "")
    # As a share of what is missed without x: the difference of two heavy-tailed squares would rarely be told from none.
    gain = _share_explained(missed, (y - seen.mean()).square())
    facts = [
        ("R2", f"{figure(*_share_explained(missed, spread))}, of the mean of q(y | x)"),
        ("RMSE", f"{figure(*_root(missed))}{unit}"),
        ("without x", f"RMSE {figure(*_root((y - seen.mean()).square()))}{unit} of the mean of the training rows"),
        (f"{_LEVEL:.0%} intervals", f"hold {figure(*mean_and_error(held))} of the values"),
        ("log loss", f"{figure(*mean_and_error(loss))} nats, mean of -log q(y | x), a density in the target's units"),
    ]
    if not math.isfinite(gain[1]):
        verdict = _NO_ERROR
    elif not told_from_zero(*gain, len(y)):
        verdict = "These rows do not tell the mean of q(y | x) from that of the training rows."
    elif gain[0] > 0:
        verdict = (
            f"The mean of q(y | x) takes a share of {figure(*gain)} off the squared error of that of the training rows."
        )
    else:
        verdict = "The mean of q(y | x) is farther from the values than that of the training rows."
    return (
        facts,
        [verdict],
        {
            "r2": _share_explained(missed, spread),
            "rmse": _root(missed),
            "without_x": {"rmse": _root((y - seen.mean()).square())},
            "gain": gain,
            "coverage": mean_and_error(held),
            "log_loss": mean_and_error(loss),
            "true": y,
            "predicted": mean,
        },
    )


def _root(squares: Tensor) -> tuple[float, float]:
    """Root of the mean of squares `(N,)` with its standard error, by the delta method."""
    mean, error = mean_and_error(squares)
    root = math.sqrt(mean)
    return root, error / (2 * root) if root else error


def _share_explained(missed: Tensor, spread: Tensor) -> tuple[float, float]:
    r""":math:`1 - \sum_i e_i^2 / \sum_i t_i^2` with its standard error, by the delta method."""
    total = float(spread.mean())
    if not total:
        return math.nan, math.nan
    ratio = float(missed.mean()) / total
    return 1 - ratio, mean_and_error(missed - ratio * spread)[1] / total
