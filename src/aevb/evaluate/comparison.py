r"""Which model gives the same rows a higher log p(x): paired differences, with what they allow to be said.

For models a and b the difference of row n is :math:`d_n = \log p_a(x_n) - \log p_b(x_n)`; its mean over rows has the
standard error :math:`s_d / \sqrt N`, most often far below those of the two means, since hard rows are hard for both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb.config import InputError

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Paired differences between M models over the same N rows; nats a row, above 0 where the first is better."""

    names: tuple[str, ...]  # M
    mean: Tensor  # (M,) of log p(x)
    std_error: Tensor  # (M,) over rows
    difference: Tensor  # (M, M) mean of log p of the row's model less the column's
    difference_error: Tensor  # (M, M) standard error over rows, the draws' scatter in it
    low: Tensor  # (M, M) interval of the difference that covers all pairs together at `confidence`
    high: Tensor  # (M, M)
    confidence: float
    rows: int

    @property
    def ranks(self) -> list[tuple[int, int]]:
        """Best and worst place of each model that the intervals allow; 1 is the highest log p(x)."""
        better = (self.high < 0).sum(1)  # models that beat this one
        worse = (self.low > 0).sum(1)
        return [(1 + int(b), len(self.names) - int(w)) for b, w in zip(better, worse, strict=True)]

    @property
    def best(self) -> int:
        """The model with the highest mean."""
        return int(self.mean.argmax())


def compare(log_probs: Mapping[str, Tensor], confidence: float = 0.95) -> Comparison:
    r"""Compare models by their log-densities of the same rows.

    Intervals are Student's, with Bonferroni's correction for the pairs: together they hold all true differences with
    at least `confidence`. Where a difference of the estimates is that of lower bounds (importance sampling), it is the
    bounds that are compared.

    Args:
        log_probs: By name, log p(x) of each row, `(N,)`, nats, in one order of rows; two models or more.
        confidence: Of the intervals together.

    Returns:
        The paired differences.

    Raises:
        InputError: For fewer than two models or rows, unequal lengths, figures that are not finite, or a confidence
            outside 0 to 1.

    Example:
        >>> x = torch.linspace(-3, 3, 50)
        >>> found = compare({"a": x, "b": x - 0.2 + 0.01 * x.sin()})
        >>> found.ranks, round(float(found.difference[0, 1]), 3)
        ([(1, 1), (2, 2)], 0.2)
    """
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise InputError(f"`confidence` must lie between 0 and 1; got {confidence}. 0.95 is a common choice.")
    names, counts = tuple(log_probs), [tuple(value.shape) for value in log_probs.values()]
    if len(names) < 2:
        raise InputError(f"`log_probs` must hold two models or more; got {len(names)}. Give those to compare.")
    if len(set(counts)) > 1 or len(counts[0]) != 1 or counts[0][0] < 2:
        came = ", ".join(f"`{name}` {shape}" for name, shape in zip(names, counts, strict=True))
        raise InputError(f"The models must be judged on the same two rows or more, (N,) each; got {came}.")
    table = torch.stack([value.double().cpu() for value in log_probs.values()])  # (M, N)
    if bool((bad := ~table.isfinite()).any()):
        model, row = (int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"log p of `{names[model]}` is {float(table[model, row])} in row {row}; a mean needs finite figures. "
            "Look at that row, or leave it out for all models."
        )
    rows, pairs = table.shape[1], len(names) * (len(names) - 1) // 2
    difference = torch.zeros(len(names), len(names), dtype=torch.float64)
    error = torch.zeros_like(difference)
    for a, b in itertools.combinations(range(len(names)), 2):
        d = table[a] - table[b]
        difference[a, b], difference[b, a] = d.mean(), -d.mean()
        error[a, b] = error[b, a] = d.std() / math.sqrt(rows)
    half = float(stdtrit(rows - 1, 1 - (1 - confidence) / (2 * pairs))) * error
    return Comparison(
        names=names,
        mean=table.mean(1),
        std_error=table.std(1) / math.sqrt(rows),
        difference=difference,
        difference_error=error,
        low=difference - half,
        high=difference + half,
        confidence=confidence,
        rows=rows,
    )
