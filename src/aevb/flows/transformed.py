"""The distribution that every flow returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, final

import torch
import torch.distributions as td
from torch import Tensor

from aevb.config import InputError
from aevb.distributions import Noise, normals

__all__ = ["Map", "TransformedNormal", "chain", "log_normal", "scaled", "standardized"]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()
Map = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x `(*, D)` to y `(*, D)` and log |det dy/dx|, which broadcasts to `(*,)`."""

_LOG_2PI = math.log(2 * math.pi)


@final
class TransformedNormal(td.Distribution):
    r"""Distribution of :math:`z = f(\epsilon)`, :math:`\epsilon \sim N(0, I)`, with f invertible.

    Args:
        like: `(*batch, D)`, read for its shape, dtype and device.
        push: :math:`\epsilon \mapsto (z, \log |\det \partial z / \partial \epsilon|)`, over any leading axes.
        pull: :math:`z \mapsto (\epsilon, \log |\det \partial \epsilon / \partial z|)`; None if there is no closed form.

    Example:
        >>> d = TransformedNormal(torch.zeros(2), lambda e: (2 * e, e.new_tensor(2 * math.log(2))))
        >>> z, log_q = d.rsample_and_log_prob(torch.Size([5]))
        >>> torch.allclose(log_q, td.Normal(0.0, 2.0).log_prob(z).sum(-1))
        True
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, like: Tensor, push: Map, pull: Map | None = None) -> None:
        self.like, self.push, self.pull = like, push, pull
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """All real vectors."""
        return td.constraints.real_vector

    @property
    def mean(self) -> Tensor:
        r"""The centre :math:`f(0)`, image of the mean of the noise, `(*batch, D)`: not E z, which has no closed form.

        A deterministic embedding, equal to E z for a fresh flow; for D = 1 the median. Average draws for E z.
        """
        return self.push(torch.zeros_like(self.like))[0]

    def expand(self, batch_shape: _Shape, _instance: object = None) -> TransformedNormal:
        """The same over more leading axes."""
        return TransformedNormal(self.like.expand(*batch_shape, -1), self.push, self.pull)

    def rsample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Draws `(*sample_shape, *batch, D)`, differentiable in the parameters."""
        return self.rsample_and_log_prob(torch.Size(sample_shape) + self.batch_shape)[0]

    def rsample_and_log_prob(self, shape: torch.Size, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Draws `(*shape, D)` with their log-density in nats, `(*shape,)`; the batch shape broadcasts to `shape`."""
        eps = normals(shape, self.event_shape, self.like, noise)
        z, log_det = self.push(eps)
        return z, log_normal(eps) - log_det

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats at `value` `(*, D)`.

        Raises:
            InputError: If the flow has no inverse in closed form.
        """
        if self.pull is None:
            raise InputError(
                "This flow has no inverse in closed form, so it knows the density of its own draws only "
                "(`rsample_and_log_prob`), not of a given value. Where the density at a point is needed, use "
                "InverseAutoregressiveFlow or SplineFlow."
            )
        # Some of zuko's log-determinants take the shape of the value, and cannot be wider.
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        eps, log_det = self.pull(value.expand(*batch, -1))
        return log_normal(eps) + log_det


def log_normal(eps: Tensor) -> Tensor:
    """Log-density of N(0, I) at `(*, D)`, `(*,)`."""
    return -0.5 * (eps.square() + _LOG_2PI).sum(-1)


def chain(*maps: Map) -> Map:
    """The maps one after another, their log-determinants added."""

    def through(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(())
        for one in maps:
            x, log_det = one(x)
            total = total + log_det
        return x, total

    return through


def scaled(loc: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x to loc + scale x, with its log-determinant."""
    return loc + scale * x, scale.log().sum(-1)


def standardized(loc: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `scaled`."""
    return (x - loc) / scale, -scale.log().sum(-1)
