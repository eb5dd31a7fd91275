"""Closed-form KL divergences, one function a pair of families."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

from aevb.distributions.density import base_of
from aevb.distributions.families import Bernoulli
from aevb.distributions.finite import OneHot
from aevb.distributions.mixed import LogNormal

__all__ = ["CLOSED_KL", "closed_kl"]


def _kl_normal_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    """Elementwise, as in Kingma and Welling (2014), appendix B, with p's location and scale."""
    return _kl_of_normals(base_of(q), base_of(p))


def _kl_log_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    """That of the logarithms: a KL does not change with the units."""
    a, b = base_of(q), base_of(p)
    assert isinstance(a, LogNormal)
    assert isinstance(b, LogNormal)
    return _kl_of_normals(a.log, b.log)


def _kl_of_normals(a: td.Distribution, b: td.Distribution) -> Tensor:
    assert isinstance(a, td.Normal)
    assert isinstance(b, td.Normal)
    ratio = a.scale / b.scale
    # log of the ratio, not of its square, which underflows first
    return 0.5 * (ratio.square() + ((a.loc - b.loc) / b.scale).square() - 1.0) - ratio.log()


def _kl_full_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    r"""½[(Σ_j L_ij² + (μ_i − m_i)²)/s_i² − 1] − log L_ii + log s_i by dimension.

    Each entry is E KL(q(z_i | z_1, ..., z_{i-1}) || p(z_i)), since L is triangular and p factorizes: at least zero.
    """
    b = base_of(p)
    assert isinstance(q, td.MultivariateNormal)
    assert isinstance(b, td.Normal)
    tril = q.scale_tril
    moments = (tril.square().sum(-1) + (q.loc - b.loc).square()) / b.scale.square()
    return 0.5 * (moments - 1.0) - tril.diagonal(dim1=-2, dim2=-1).log() + b.scale.log()


def _kl_one_hot(q: td.Distribution, p: td.Distribution) -> Tensor:
    """One group: the classes are one variable."""
    assert isinstance(q, OneHot)
    assert isinstance(p, OneHot)
    none = q.mean == 0  # a class of no probability counts for nothing, in value and gradient
    ratio = torch.where(none, 0.0, q.logits) - torch.where(none, 0.0, p.logits)
    return (q.mean * ratio).sum(-1, keepdim=True)


def _kl_bernoulli(q: td.Distribution, p: td.Distribution) -> Tensor:
    """Elementwise, from the logits."""
    a, b = base_of(q), base_of(p)
    assert isinstance(a, td.Bernoulli)
    assert isinstance(b, td.Bernoulli)
    on = a.probs * (F.logsigmoid(a.logits) - F.logsigmoid(b.logits))
    return on + (1 - a.probs) * (F.logsigmoid(-a.logits) - F.logsigmoid(-b.logits))


CLOSED_KL: dict[tuple[type, type], Callable[[td.Distribution, td.Distribution], Tensor]] = {
    (td.Normal, td.Normal): _kl_normal_normal,
    (LogNormal, LogNormal): _kl_log_normal,
    (td.MultivariateNormal, td.Normal): _kl_full_normal,
    (OneHot, OneHot): _kl_one_hot,
    (Bernoulli, Bernoulli): _kl_bernoulli,
    (td.Bernoulli, td.Bernoulli): _kl_bernoulli,  # of a conditional of one's own
}
"""(family of q, family of p) to KL(q || p) by groups of dimensions, `(*, G)`, G = D, or 1 for classes."""


def closed_kl(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    """KL(q || p) in nats by groups of dimensions, `(*, G)`, to be summed over G; None if no form is known.

    Example:
        >>> unit = td.Independent(td.Normal(torch.zeros(3), torch.ones(3)), 1)
        >>> closed_kl(unit, unit)
        tensor([0., 0., 0.])
    """
    if len(q.event_shape) != 1 or len(p.event_shape) != 1:
        return None
    rule = CLOSED_KL.get((type(base_of(q)), type(base_of(p))))
    return None if rule is None else rule(q, p)
