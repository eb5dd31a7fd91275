r"""Drawing with the density of the draw.

The reparameterization (notes, *Reparameterization trick*): with :math:`z = g(\epsilon, \phi, x)`,
:math:`\log q(z) = \log p(\epsilon) - \log |\det \partial z / \partial \epsilon|`.
For Gaussians the pair is read off the noise, so that drawing with the density solves no triangular system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol, final

import torch
import torch.distributions as td
from torch import Tensor

from aevb.config import InputError
from aevb.distributions.density import base_of
from aevb.distributions.mixed import LogNormal

__all__ = ["Given", "Noise", "draw", "normals", "reparameterize", "rsample_and_log_prob"]

_LOG_2PI = math.log(2 * math.pi)


class Noise(Protocol):
    """Where draws come from, when not from torch's current generator."""

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard normals of `shape`, `(K, N, *event)`, with the dtype and device of `like`."""
        ...

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """A reparameterized draw `(*shape, *event)` of a distribution whose own noise is not known to be normal."""
        ...


@final
class Given:
    """Noise that was drawn beforehand, a tensor for each time that it is asked for; it may be common to rows."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = iter(tensors)

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """The next one."""
        return next(self.tensors).to(like).expand(shape)

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """Such noise is normal only."""
        raise InputError(f"{type(d).__name__} draws noise that is not normal, and no other was given. Draw it anew.")


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
    base = base_of(d)
    if type(base) is td.Normal:  # not a subclass, whose draws are its own
        loc, scale = base.loc, base.scale
        eps = normals(shape, d.event_shape, loc, noise)
        dims = tuple(range(-len(d.event_shape), 0))
        if not dims:
            return loc + scale * eps, lambda: -0.5 * (eps.square() + _LOG_2PI) - scale.log()
        return loc + scale * eps, lambda: (-0.5 * (eps.square() + _LOG_2PI) - scale.log()).sum(dims)
    if isinstance(base, LogNormal):
        log_z, log_density = reparameterize(
            td.Independent(base.log, len(d.event_shape), validate_args=False), shape, noise
        )
        dims = tuple(range(-len(d.event_shape), 0))
        return base.bounded(log_z.exp()), lambda: log_density() - (log_z.sum(dims) if dims else log_z)
    if type(d) is td.MultivariateNormal:
        tril = d.scale_tril
        eps = normals(shape, d.event_shape, d.loc, noise)
        z = d.loc + torch.einsum("...ij,...j->...i", tril, eps)  # @ would copy the factors K times
        return z, lambda: -0.5 * (eps.square() + _LOG_2PI).sum(-1) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if not d.has_rsample:
        raise InputError(
            f"{type(base).__name__} has no reparameterized draw, so it cannot be latent under this bound. "
            "Use a continuous family in q, or give the node's values."
        )
    expanded = d.expand(shape)
    sample = expanded.rsample() if noise is None else noise.rsample(expanded, shape)
    return sample, lambda: expanded.log_prob(sample)


def normals(lead: torch.Size, event: torch.Size, like: Tensor, noise: Noise | None) -> Tensor:
    """Standard normals `(*lead, *event)`, each its own; from `noise` the states in front of (K, N) share theirs.

    A sum over states stays unbiased with noise that they share, and a row's noise then depends on nothing but the row:
    not on whether the rows beside it leave a class open.
    """
    if noise is None:
        return torch.randn(lead + event, dtype=like.dtype, device=like.device)
    extra = max(0, len(lead) - 2)
    return noise.normal(lead[extra:] + event, like).expand(lead + event)
