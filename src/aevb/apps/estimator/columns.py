r"""A table's columns on the scale that nets are trained on: :math:`u_j = (x_j - m_j) / s_j`.

A density of u is one of x once the Jacobian is kept: :math:`\log p(x) = \log p(u) - \sum_j \log s_j`, the sum over the
entries that are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aevb.config import InputError

__all__ = ["Columns", "Floats", "refuse_infinite"]

Floats = NDArray[np.float64]

_LEAST = 1e-3
"""Floor of a column's noise, in its standard deviations, where its own resolution is finer."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Centre and scale of each column, and the least noise that is believed of it."""

    loc: Floats  # (D,)
    scale: Floats  # (D,) above 0
    floor: Floats  # (D,) in units of `scale`

    @classmethod
    def of(cls, x: Floats, name: str = "X") -> Columns:
        r"""The columns of training rows `(N, D)`, NaN for missing.

        The resolution h of a column is the median step between its neighbouring distinct values, and its noise is
        never believed to be below :math:`h / \sqrt{12}`, what rounding to steps of h brings: else a net that is right
        to the last digit makes a density that grows without limit. A constant column counts as known to its own size,
        or where that is nothing beside the other columns, to their median scale.

        Raises:
            InputError: If a column has no known value.
        """
        known = ~np.isnan(x)
        if not known.any(0).all():
            empty = np.flatnonzero(~known.any(0))
            raise InputError(
                f"`{name}` has no known value in column {', '.join(map(str, empty[:10]))}; a column needs one. Drop it."
            )
        loc = np.nanmean(x, 0)
        loc = loc + np.nanmean(x - loc, 0)  # a second pass takes back the rounding of a large mean
        scale, steps = np.nanstd(x - loc, 0), np.empty_like(loc)
        values = [np.unique(x[known[:, j], j]) for j in range(x.shape[1])]
        # What is left of a constant column by rounding is no spread.
        constant = np.array([len(each) == 1 for each in values]) | (scale <= 1e-13 * np.abs(loc))
        typical = float(np.median(scale[~constant])) if not constant.all() else 1.0
        for j, distinct in enumerate(values):
            if constant[j]:
                size = abs(float(loc[j]))
                scale[j] = steps[j] = size if size > 1e-9 * typical else typical
                continue
            gaps = np.diff(distinct)
            gaps = gaps[gaps > 1e-9 * scale[j]]  # 0.1 + 0.2 and 0.3 are one value
            steps[j] = np.median(gaps) if len(gaps) else scale[j]
        return cls(loc=loc, scale=scale, floor=np.maximum(steps / scale / math.sqrt(12), _LEAST))

    @classmethod
    def plain(cls, features: int) -> Columns:
        """Columns that are taken in their own units, and have no least noise."""
        one = np.ones(features)
        return cls(loc=0 * one, scale=one, floor=0 * one)

    def standardized(self, x: Floats) -> Tensor:
        """U of rows `(N, D)`, float64; one NaN and one zero each, since draws are keyed by a row's bytes."""
        u = (x - self.loc) / self.scale + 0.0
        u[np.isnan(u)] = np.nan
        return torch.from_numpy(u)

    def in_units(self, u: Tensor) -> Floats:
        """X of rows `(*, D)`."""
        result: Floats = self.loc + self.scale * u.numpy()
        return result

    def log_jacobian(self, x: Floats) -> Floats:
        """What is taken off log p(u) to make it log p(x), nats, `(N,)`."""
        return np.asarray((~np.isnan(x)) @ np.log(self.scale))


def refuse_infinite(values: NDArray[Any], name: str) -> None:
    """Raise if an entry of `(N,)` or `(N, D)` is infinite."""
    if (infinite := np.argwhere(np.isinf(values))).size:
        at = ", ".join(f"{axis} {i}" for axis, i in zip(("row", "column"), infinite[0], strict=False))
        raise InputError(f"`{name}` is infinite in {at}; values must be finite, or NaN for missing. Clean that entry.")
