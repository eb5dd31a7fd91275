r"""Conditionals p(child | parents): modules whose `forward(*parents)` returns a distribution. They know no names.

Every distribution is built with `validate_args=False`: values are checked once, where they enter the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb import distributions
from aevb.config import InputError

__all__ = [
    "Bernoulli",
    "Binomial",
    "Conditional",
    "DiagonalNormal",
    "FullNormal",
    "Normal",
    "StandardNormal",
]


class Conditional(Protocol):
    """A module that maps its parents' values, each `(*, D_i)`, to a distribution with batch shape `(*,)`."""

    def __call__(self, *parents: Tensor) -> td.Distribution:
        """p(child | parents)."""
        ...


@final
class StandardNormal(nn.Module):
    r"""The prior :math:`N(0, I)` over `dims` dimensions.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        if dims < 1:
            raise InputError(f"`dims` must be at least 1; got {dims}. Give the number of latent dimensions.")
        self.register_buffer("loc", torch.zeros(dims), persistent=False)
        self.register_buffer("scale", torch.ones(dims), persistent=False)

    def forward(self) -> td.Distribution:
        """A root has no parents."""
        return _independent(td.Normal(self.loc, self.scale, validate_args=False))


@final
class DiagonalNormal(nn.Module):
    r"""Factorized Gaussian :math:`N(\mu(a), \operatorname{diag} \sigma^2(a))` given its parents `a`.

    Args:
        net: Returns `(*, 2 D)`: :math:`\mu`, then what softplus turns into :math:`\sigma`.

    Example:
        >>> from aevb import MLP
        >>> DiagonalNormal(MLP(784, [200], 2 * 50))(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        _check_width("DiagonalNormal", net, lambda width: width >= 2 and width % 2 == 0, "2 D, a mean and a scale each")
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        _check_out("DiagonalNormal", out, out.shape[-1] // 2 * 2)
        loc, raw = out.chunk(2, dim=-1)
        # softplus, not exp: exp overflows past 88.7 in float32, and its gradient is as large as its value.
        return _independent(td.Normal(loc, F.softplus(raw), validate_args=False))


@final
class FullNormal(nn.Module):
    r"""Gaussian with full covariance, built as in Algorithm 2 of the notes.

    :math:`(\mu, s, L') = \operatorname{net}(a)`, :math:`\sigma = \operatorname{softplus}(s)`,
    :math:`L = L_{\text{mask}} \odot L' + \operatorname{diag} \sigma` with ones below the diagonal of
    :math:`L_{\text{mask}}` and zeros elsewhere; :math:`z = \mu + L \epsilon`, :math:`\Sigma = L L^T`.

    Args:
        net: Returns `(*, 2 D + D * D)`: :math:`\mu`, :math:`s`, and :math:`L'` row by row.
        dims: D.

    Example:
        >>> from aevb import MLP
        >>> FullNormal(MLP(4, [8], 2 * 3 + 3 * 3), 3)(torch.zeros(5, 4)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    def __init__(self, net: nn.Module, dims: int) -> None:
        super().__init__()
        wanted = 2 * dims + dims * dims
        _check_width("FullNormal", net, lambda width: width == wanted, f"2 D + D * D = {wanted} for D = {dims}")
        self.net, self.dims = net, dims

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        _check_out("FullNormal", out, 2 * self.dims + self.dims**2)
        loc, raw, rows = out.split([self.dims, self.dims, self.dims**2], dim=-1)
        tril = rows.unflatten(-1, (self.dims, self.dims)).tril(-1) + torch.diag_embed(F.softplus(raw))
        return td.MultivariateNormal(loc, scale_tril=tril, validate_args=False)


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
        _check_width("Normal", net, lambda width: width == wanted, f"{wanted} for D = {dims} and noise={noise!r}")
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
        _check_out("Normal", out, 2 * self.dims if self.noise == "datum" else self.dims)
        mean, raw = out.chunk(2, dim=-1) if self.noise == "datum" else (out, self.raw_noise)
        sigma = self.scale * F.softplus(raw)
        return _independent(td.Normal(self.loc + self.scale * mean, sigma.expand_as(mean), validate_args=False))


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
        return _independent(td.Bernoulli(logits=self.net(*parents), validate_args=False))


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
        return _independent(distributions.Binomial(self.total_count, self.net(*parents)))


def _independent(entries: td.Distribution) -> td.Distribution:
    return td.Independent(entries, 1, validate_args=False)


def _check_out(owner: str, out: Tensor, width: int) -> None:
    """What `_check_width` could not know; a last axis of 1, or chunks of unequal width, broadcast without a word."""
    if out.shape[-1] != width:
        raise InputError(
            f"{owner} needs a net of output width {width}; got {out.shape[-1]}. Change the net's last width."
        )


def _check_width(owner: str, net: nn.Module, fits: Callable[[int], bool], rule: str) -> None:
    width = getattr(net, "outputs", None)
    if width is not None and not fits(width):
        raise InputError(f"{owner} needs a net of output width {rule}; got {width}. Change the net's last width.")
