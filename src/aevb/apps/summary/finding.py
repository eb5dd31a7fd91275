"""What one deeper diagnosis found, and how a figure with its error is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

__all__ = ["SURE", "Finding", "figure", "mean_and_error", "plain", "told_from_zero"]

SURE = 2.0
"""Standard errors from zero on, of many rows, beyond which a difference is called one."""
_MOST_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One diagnosis in figures and words."""

    title: str
    facts: tuple[tuple[str, str], ...]  # name and figure
    meaning: tuple[str, ...]  # sentences, the verdict first
    figures: Mapping[str, Any]  # JSON-able, for programs and pictures; None where not a finite number

    def lines(self) -> list[str]:
        """The finding as the terminal shows it."""
        width = max(len(name) for name, _ in self.facts)
        return [self.title, *(f"  {name:<{width}}  {value}" for name, value in self.facts), *self.meaning]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, after a passage through JSON."""
        facts = tuple((name, value) for name, value in fields["facts"])
        return cls(**{**fields, "facts": facts, "meaning": tuple(fields["meaning"])})


def plain(value: Any) -> Any:
    """Tensors, arrays and records of them as JSON has them; what is not a finite number is None."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_and_error(figures: Tensor) -> tuple[float, float]:
    """Mean over rows and its standard error, of `(N,)`; the error is NaN for one row."""
    rows = len(figures)
    return float(figures.mean()), float(figures.std()) / math.sqrt(rows) if rows > 1 else math.nan


def told_from_zero(value: float, error: float, rows: int) -> bool:
    """Whether a mean over rows is told from zero: of few rows Student's quantile takes the place of `SURE`."""
    from scipy.special import ndtr, stdtrit

    return rows > 1 and abs(value) > float(stdtrit(rows - 1, ndtr(SURE))) * error


def figure(value: float, error: float | None = None) -> str:
    """`value ± error` with two digits of the error at least; the value alone where no error is known."""
    if error is None or not math.isfinite(error):
        return f"{value:.2f}"
    digits = 2 if error == 0 else min(_MOST_DIGITS, max(2, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
