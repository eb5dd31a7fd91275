r"""Entries held between two bounds: the probability of the bounds, and a draw inside them.

.. math:: \log P(l_j \le x_j \le h_j), \qquad x_j \sim p(x_j | l_j \le x_j \le h_j)
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

from aevb.distributions.density import support_filler
from aevb.distributions.mixed import LogNormal, Mixed

__all__ = ["between"]

_MOST_LEVELS = 1024


def between(family: td.Distribution, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log-weight of each entry's bounds and a value inside them; together they stand for p restricted to the bounds.

    The weight is the probability of the bounds where it is had in closed form (Gaussians, or up to 1024 levels, which
    are summed over), and the density where both bounds of a continuous entry are one number. Elsewhere the entry is
    drawn, and the weight is 1 if it lies inside and 0 if not, whose mean is that probability.

    Args:
        family: The distribution of one entry, as `base_of` tells it, `(*, P)`.
        low: Lowest value of each entry, `(P,)` in float64; -inf where there is none.
        high: Highest, likewise; not below `low`.

    Returns:
        Log-weights in float64 and values, `(*, P)` each; the weight of an entry without bounds is 1, its value a draw.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1, dtype=torch.float64)
        >>> log_weight, value = between(td.Normal(zero, zero + 1), 0 * one, math.inf * one)
        >>> round(float(log_weight.exp()), 4), bool(value > 0)
        (0.5, True)
    """
    if isinstance(family, Mixed):
        found = [between(part.family, low[part.at] - part.lowest, high[part.at] - part.lowest) for part in family.parts]
        values = [value + part.lowest for (_, value), part in zip(found, family.parts, strict=True)]
        return family.in_order([log_weight for log_weight, _ in found]), family.in_order(values)
    if isinstance(family, LogNormal):
        return _log_normal(family, low, high)
    point, free = low == high, (low == -math.inf) & (high == math.inf)
    log_weight, value = _inside(family, low, high, ~(point | free))
    if bool(point.any()):
        known = torch.where(point, low, math.nan).to(value)
        here = torch.where(point, known, support_filler(family)).expand(value.shape)
        fits = family.support.check(here)  # type: ignore[union-attr]
        log_prob = family.log_prob(torch.where(fits, here, support_filler(family)))
        log_weight = torch.where(point, torch.where(fits, log_prob.double(), -math.inf), log_weight)
        value = torch.where(point, known, value)
    return torch.where(free, 0.0, log_weight), value


def _inside(family: td.Distribution, low: Tensor, high: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """As `between`, right where `wanted` and both bounds differ, and a draw where there are none."""
    value = family.sample()
    if not bool(wanted.any()):
        return torch.zeros_like(value, dtype=torch.float64), value
    if isinstance(family, td.Normal):
        log_weight, inside = _normal(family, low, high)
        return log_weight, torch.where(wanted, inside.to(value), value)
    support = family.support
    if support.is_discrete:  # type: ignore[union-attr]
        first, last = low[wanted].amin(), high[wanted].amax()
        first = first.clamp(min=float(getattr(support, "lower_bound", 0))).ceil()
        last = last.clamp(max=float(getattr(support, "upper_bound", math.inf))).floor()
        if float(last - first) < _MOST_LEVELS:
            log_weight, inside = _levels(family, low, high, range(int(first), int(last) + 1), value)
            return log_weight, torch.where(wanted, inside, value)
    log_weight = torch.where((value >= low) & (value <= high), 0.0, -math.inf).double()
    return log_weight, value


def _levels(family: td.Distribution, low: Tensor, high: Tensor, levels: range, like: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over levels, and the level whose log-mass with Gumbel noise is the largest."""
    total = best = torch.full_like(like, -math.inf, dtype=torch.float64)
    value = torch.zeros_like(like)
    for level in levels:
        log_mass = family.log_prob(torch.full_like(like, level)).double()
        log_mass = torch.where((low <= level) & (level <= high), log_mass, -math.inf)
        noisy = log_mass - torch.empty_like(log_mass).exponential_().log()
        value = torch.where(noisy > best, float(level), value)
        total, best = torch.logaddexp(total, log_mass), torch.maximum(best, noisy)
    return total, value


def _normal(family: td.Normal, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\log(\Phi(b) - \Phi(a))` and :math:`\Phi^{-1}` of a uniform between, on the side where both are small."""
    loc, scale = family.loc.double(), family.scale.double()
    a, b = (low - loc) / scale, (high - loc) / scale
    flip = torch.where(a + b > 0, -1.0, 1.0)  # NaN, of no bounds at all, stays on this side
    a, b = torch.where(flip < 0, -b, a), torch.where(flip < 0, -a, b)
    below, up_to = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    ratio = (below - up_to).exp()
    log_weight = up_to + torch.log1p(-ratio)
    u = torch.rand_like(ratio)
    inside = torch.special.ndtri(up_to.exp() * (u + (1 - u) * ratio)).clamp(a, b)
    return log_weight, (loc + scale * flip * inside).clamp(low, high)


def _log_normal(family: LogNormal, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds and value by their logarithms; at a point the density brings its Jacobian."""
    point = low == high
    log_low, log_high = (torch.where(each > 0, each, 0.0).log() for each in (low, high))
    log_weight, log_value = between(family.log, log_low, log_high)
    value = torch.where(point, low.to(log_value), family.bounded(log_value.exp()))
    log_weight = torch.where(point, log_weight - log_low, log_weight)
    return torch.where(high <= 0, -math.inf, log_weight), value
