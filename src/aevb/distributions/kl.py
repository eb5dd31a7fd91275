"""Closed-form KL divergences, one function a pair of families."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributions as td
from torch import Tensor

from aevb.distributions.density import base_of

__all__ = ["CLOSED_KL", "closed_kl"]


def _kl_normal_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    """Elementwise, as in Kingma and Welling (2014), appendix B, with p's location and scale."""
    a, b = base_of(q), base_of(p)
    assert isinstance(a, td.Normal)
    assert isinstance(b, td.Normal)
    ratio = a.scale / b.scale
    # log of the ratio, not of its square, which underflows first
    return 0.5 * (ratio.square() + ((a.loc - b.loc) / b.scale).square() - 1.0) - ratio.log()


def _kl_full_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    r"""½[Σ_i (ΣL_ij² + (μ_i − m_i)²)/s_i² − D] − Σ log L_ii + Σ log s_i, one group for all dimensions."""
    b = base_of(p)
    assert isinstance(q, td.MultivariateNormal)
    assert isinstance(b, td.Normal)
    tril = q.scale_tril
    moments = (tril.square().sum(-1) + (q.loc - b.loc).square()) / b.scale.square()
    entries = 0.5 * (moments - 1.0) - tril.diagonal(dim1=-2, dim2=-1).log() + b.scale.log()
    return entries.sum(-1, keepdim=True)


CLOSED_KL: dict[tuple[type, type], Callable[[td.Distribution, td.Distribution], Tensor]] = {
    (td.Normal, td.Normal): _kl_normal_normal,
    (td.MultivariateNormal, td.Normal): _kl_full_normal,
}
"""(family of q, family of p) to KL(q || p) by independent groups of dimensions, `(*, G)`, G = D or 1."""


def closed_kl(q: td.Distribution, p: td.Distribution) -> Tensor | None:
    """KL(q || p) in nats by independent groups of dimensions, `(*, G)`, to be summed over G; None if no form is known.

    Example:
        >>> import torch
        >>> unit = td.Independent(td.Normal(torch.zeros(3), torch.ones(3)), 1)
        >>> closed_kl(unit, unit)
        tensor([0., 0., 0.])
    """
    if len(q.event_shape) != 1 or len(p.event_shape) != 1:
        return None
    rule = CLOSED_KL.get((type(base_of(q)), type(base_of(p))))
    return None if rule is None else rule(q, p)
