"""Likelihoods of observed data, normalised in the units of the data."""

from __future__ import annotations

from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb import distributions
from aevb.conditionals.form import check_out, check_width, independent
from aevb.config import InputError

__all__ = ["Bernoulli", "Binomial", "Normal"]


@final
class Normal(nn.Module):
    r"""Gaussian likelihood with learned noise, in the units of the data.

    :math:`p(x | a) = \prod_j N(x_j;\, m_j + s_j \mu_j(a),\, (s_j \sigma_j)^2)`: the net works on standardised values,
    the density is that of x itself (the Jacobian :math:`-\sum_j \log s_j` is part of it).

    Args:
        net: Returns :math:`\mu`, `(*, D)`; with `noise="datum"` also what softplus turns into :math:`\sigma`,
            `(*, 2 D)`.
        dims: D.
        noise: One learned :math:`\sigma` ("global"), one per dimension ("dimension"), or from the net ("datum").
        loc: m, the centre of the data; a number or `(D,)`.
        scale: s > 0, the spread of the data; a number or `(D,)`.

    Example:
        >>> from aevb import MLP
        >>> Normal(MLP(2, [8], 3), 3)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        net: nn.Module,
        dims: int,
        noise: str = "dimension",
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        if noise not in ("global", "dimension", "datum"):
            raise InputError(f"`noise` must be one of global, dimension, datum; got {noise!r}.")
        wanted = 2 * dims if noise == "datum" else dims
        check_width("Normal", net, lambda width: width == wanted, f"{wanted} for D = {dims} and noise={noise!r}")
        self.net, self.dims, self.noise = net, dims, noise
        self.register_buffer("loc", torch.as_tensor(loc, dtype=torch.get_default_dtype()).expand(dims).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.get_default_dtype()).expand(dims).clone())
        if not bool((self.scale > 0).all()):
            raise InputError("`scale` must be above 0 in every dimension; drop constant columns, or give them a scale.")
        if noise != "datum":
            self.raw_noise = nn.Parameter(torch.zeros(1 if noise == "global" else dims))

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("Normal", out, 2 * self.dims if self.noise == "datum" else self.dims)
        mean, raw = out.chunk(2, dim=-1) if self.noise == "datum" else (out, self.raw_noise)
        sigma = self.scale * F.softplus(raw)
        return independent(td.Normal(self.loc + self.scale * mean, sigma.expand_as(mean), validate_args=False))


@final
class Bernoulli(nn.Module):
    r"""Independent binary entries, :math:`\prod_j \pi_j^{x_j} (1 - \pi_j)^{1 - x_j}`.

    Args:
        net: Returns the logits, `(*, D)`.

    Example:
        >>> from aevb import MLP
        >>> Bernoulli(MLP(50, [200], 784))(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(td.Bernoulli(logits=self.net(*parents), validate_args=False))


@final
class Binomial(nn.Module):
    r"""Independent counts out of n, :math:`\prod_j \binom{n}{x_j} \pi_j^{x_j} (1 - \pi_j)^{n - x_j}`.

    Args:
        net: Returns the logits of :math:`\pi`, `(*, D)`.
        total_count: n.

    Example:
        >>> from aevb import MLP
        >>> Binomial(MLP(32, [200], 64), 16)(torch.zeros(3, 32)).event_shape
        torch.Size([64])
    """

    def __init__(self, net: nn.Module, total_count: int) -> None:
        super().__init__()
        if total_count < 1:
            raise InputError(f"`total_count` must be at least 1; got {total_count}. Give the largest possible count.")
        self.net, self.total_count = net, total_count

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.Binomial(self.total_count, self.net(*parents)))
