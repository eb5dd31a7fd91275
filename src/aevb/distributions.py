r"""What torch.distributions lacks: drawing with the density, keyed noise, densities with holes, closed-form KLs.

The reparameterization (notes, *Reparameterization trick*): with :math:`z = g(\epsilon, \phi, x)`,
:math:`\log q(z) = \log p(\epsilon) - \log |\det \partial z / \partial \epsilon|`.
For Gaussians the pair is read off the noise, so that drawing with the density solves no triangular system.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

from aevb.config import InputError

__all__ = [
    "CLOSED_KL",
    "Binomial",
    "Noise",
    "check_factorizes",
    "closed_kl",
    "draw",
    "log_prob",
    "reparameterize",
    "rsample_and_log_prob",
    "support_violation",
]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()
_LOG_2PI = math.log(2 * math.pi)


class Noise(Protocol):
    """Where draws come from, when not from torch's current generator."""

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard normals of `shape`, with the dtype and device of `like`."""
        ...

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """A reparameterized draw `(*shape, *event)` of a distribution whose own noise is not known to be normal."""
        ...


def _base(d: td.Distribution) -> td.Distribution:
    """The distribution of one entry, where entries are independent given the parents; else `d` itself."""
    if isinstance(d, td.Independent) and d.reinterpreted_batch_ndims == len(d.event_shape):
        base: td.Distribution = d.base_dist
        return base
    return d


@final
class Binomial(td.Distribution):
    r"""Counts out of n, elementwise; torch's own loses 25 nats over 64 entries at n = 1e6 in float32.

    The terms of :math:`\log \binom{n}{x} + x\, l - n \log(1 + e^l)` are as large as n and cancel. The coefficient has
    no gradient and is taken in float64, on the values' own axes; above n = 1000 the rest is, too.

    Args:
        total_count: n.
        logits: l, `(*batch,)`.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, total_count: int, logits: Tensor) -> None:
        self.total_count, self.logits = total_count, logits
        super().__init__(logits.shape, validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """0, 1, ..., n."""
        return td.constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """Expected count, n pi."""
        return self.total_count * self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        """Spread of the count, n pi (1 - pi)."""
        return self.total_count * self.logits.sigmoid() * (-self.logits).sigmoid()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Binomial:
        """The same over more leading axes."""
        return Binomial(self.total_count, self.logits.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            probs = self.logits.sigmoid().expand(torch.Size(sample_shape) + self.batch_shape)
            return torch.binomial(torch.full_like(probs, self.total_count), probs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        n, x = self.total_count, value.double()
        coefficient = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        if n > 1000:
            logits = self.logits.double()
            return (coefficient + x * logits - n * F.softplus(logits)).to(self.logits.dtype)
        return coefficient.to(self.logits.dtype) + (value * self.logits - n * F.softplus(self.logits))


def draw(d: td.Distribution, shape: torch.Size, noise: Noise | None = None) -> Tensor:
    r"""The notes' :math:`g(\epsilon, \phi, x)`: one draw for each of the leading axes `shape`.

    Args:
        d: Its batch shape broadcasts to `shape`.
        shape: Leading axes, `(K, N)`.
        noise: Source of randomness; torch's current generator if None.

    Returns:
        `(*shape, *event)`, differentiable in the parameters of `d`.

    Raises:
        InputError: If `d` has no reparameterized draw.
    """
    return reparameterize(d, shape, noise)[0]


def rsample_and_log_prob(d: td.Distribution, shape: torch.Size, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
    """A draw `(*shape, *event)` with its log-density in nats, `(*shape,)`; arguments as for `draw`.

    A distribution may bring its own method of this name (a flow, which would otherwise invert itself).

    Example:
        >>> z, log_q = rsample_and_log_prob(td.Independent(td.Normal(torch.zeros(2), 1.0), 1), torch.Size([5]))
        >>> z.shape, log_q.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    z, log_density = reparameterize(d, shape, noise)
    return z, log_density()


def reparameterize(
    d: td.Distribution, shape: torch.Size, noise: Noise | None = None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """As `rsample_and_log_prob`, with the log-density computed only when asked for: a closed-form KL needs none."""
    if hasattr(d, "rsample_and_log_prob"):
        z, log_density = d.rsample_and_log_prob(shape, noise)
        return z, lambda: log_density
    base, full = _base(d), shape + d.event_shape
    if type(base) is td.Normal:  # not a subclass, whose draws are its own
        loc, scale = base.loc, base.scale
        eps = _normal(full, loc, noise)
        dims = tuple(range(-len(d.event_shape), 0))
        if not dims:
            return loc + scale * eps, lambda: -0.5 * (eps.square() + _LOG_2PI) - scale.log()
        return loc + scale * eps, lambda: (-0.5 * (eps.square() + _LOG_2PI) - scale.log()).sum(dims)
    if type(d) is td.MultivariateNormal:
        tril = d.scale_tril
        eps = _normal(full, d.loc, noise)
        z = d.loc + (tril @ eps.unsqueeze(-1)).squeeze(-1)
        return z, lambda: -0.5 * (eps.square() + _LOG_2PI).sum(-1) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if not d.has_rsample:
        raise InputError(
            f"{type(base).__name__} has no reparameterized draw, so it cannot be latent under this bound. "
            "Use a continuous family in q, or give the node's values."
        )
    expanded = d.expand(shape)
    sample = expanded.rsample() if noise is None else noise.rsample(expanded, shape)
    return sample, lambda: expanded.log_prob(sample)


def _normal(shape: torch.Size, like: Tensor, noise: Noise | None) -> Tensor:
    if noise is None:
        return torch.randn(shape, dtype=like.dtype, device=like.device)
    return noise.normal(shape, like)


def log_prob(d: td.Distribution, value: Tensor, known: Tensor | None = None) -> Tensor:
    r"""Log-density in nats with the unknown entries integrated out, event axes summed.

    Args:
        d: Density of `value`.
        value: `(*, *event)`; anything, NaN included, where `known` is false.
        known: True where `value` is given; None if it is throughout.

    Returns:
        :math:`\log p(x_{\text{known}})`, `(*,)`.

    Raises:
        InputError: If entries are missing and `d` does not factorize over them.
    """
    if known is None:
        return d.log_prob(value)
    check_factorizes(d)
    base = _base(d)
    # The density never sees the NaN: where() after log_prob would keep it out of the value but not of the gradient.
    entries = base.log_prob(torch.where(known, value, _filler(base)))
    entries = torch.where(known, entries, 0.0)
    return entries.sum(tuple(range(-len(d.event_shape), 0))) if d.event_shape else entries


def check_factorizes(d: td.Distribution) -> None:
    """Raise unless the entries of `d` are independent given the parents, so that single ones can be left out."""
    if _base(d) is d and d.event_shape:
        raise InputError(
            f"{type(d).__name__} does not factorize over its entries, so missing ones cannot be integrated out. "
            "Use a factorized likelihood, or fill the missing entries."
        )


def _filler(base: td.Distribution) -> float | Tensor:
    """A value inside the support of every entry, found without reading a tensor (this runs inside compiled steps)."""
    support = base.support
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if lower is None:
        return 0.0
    if upper is None:
        return lower + 1.0  # type: ignore[no-any-return]
    return lower if support.is_discrete else 0.5 * (lower + upper)  # type: ignore[union-attr, no-any-return]


def support_violation(d: td.Distribution, value: Tensor) -> tuple[int, ...] | None:
    """Index into `value` `(N, *event)` of the first entry outside the support of `d`, NaN passing as missing.

    Args:
        d: A distribution whose support does not depend on the row, its batch shape all ones or empty.
        value: Data.
    """
    base = _base(d)
    inside = base.support.check(torch.where(value.isnan(), _filler(base), value))  # type: ignore[union-attr]
    # Bounds that are tensors carry the leading axes of `d`, all ones.
    inside = inside.reshape(inside.shape[max(0, inside.ndim - value.ndim) :])
    if bool(inside.all()):
        return None
    return tuple(int(i) for i in (~inside).nonzero()[0])


def _kl_normal_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    """Elementwise, as in Kingma and Welling (2014), appendix B, with p's location and scale."""
    a, b = _base(q), _base(p)
    assert isinstance(a, td.Normal)
    assert isinstance(b, td.Normal)
    ratio = a.scale / b.scale
    # log of the ratio, not of its square, which underflows first
    return 0.5 * (ratio.square() + ((a.loc - b.loc) / b.scale).square() - 1.0) - ratio.log()


def _kl_full_normal(q: td.Distribution, p: td.Distribution) -> Tensor:
    r"""½[Σ_i (ΣL_ij² + (μ_i − m_i)²)/s_i² − D] − Σ log L_ii + Σ log s_i, one group for all dimensions."""
    b = _base(p)
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
        >>> unit = td.Independent(td.Normal(torch.zeros(3), torch.ones(3)), 1)
        >>> closed_kl(unit, unit)
        tensor([0., 0., 0.])
    """
    if len(q.event_shape) != 1 or len(p.event_shape) != 1:
        return None
    rule = CLOSED_KL.get((type(_base(q)), type(_base(p))))
    return None if rule is None else rule(q, p)
