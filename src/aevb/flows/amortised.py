"""Planar and Sylvester flows: all their parameters come from the net; they know the density of their own draws."""

from __future__ import annotations

import functools
import math
from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width
from aevb.config import InputError
from aevb.flows.transformed import Map, TransformedNormal, chain, scaled

__all__ = ["PlanarFlow", "SylvesterFlow", "check_counts"]

_SLOPE = 1e-3
_UNIT = math.log(math.expm1(1 - _SLOPE))
"""Where `_SLOPE + softplus` is 1."""


@final
class PlanarFlow(nn.Module):
    r"""Gaussian pushed along one direction a layer (Rezende and Mohamed, 2015).

    :math:`z_0 \sim N(\mu, \operatorname{diag} \sigma^2)`, then for each layer (eqs. 10, 12)

    .. math:: z' = z + \hat u \tanh(w^T z + b), \qquad
        \det \partial z' / \partial z = 1 + (1 - \tanh^2(w^T z + b))\, w^T \hat u .

    As in their appendix A.1 it is invertible since :math:`\hat u = u + (m(w^T u) - w^T u)\, w / \|w\|^2` makes
    :math:`w^T \hat u = m(w^T u) > -1`; ours, :math:`m(t) = -1 + 10^{-3} + \operatorname{softplus}(t + t_0)` with
    :math:`m(0) = 0`, leaves u = 0 as it is, which theirs does not. u is the net's, times a learned gain a layer that
    starts at zero.

    Args:
        net: Returns `(*, PlanarFlow.width(dims, layers))`: :math:`\mu`, what softplus turns into :math:`\sigma`, then
            w, u, b of each layer.
        dims: D.
        layers: Number of maps; each bends one direction.

    Example:
        >>> from aevb import MLP
        >>> q = PlanarFlow(MLP(5, [8], PlanarFlow.width(2, 4)), dims=2, layers=4)
        >>> q(torch.zeros(3, 5)).rsample().shape
        torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module, dims: int, layers: int) -> None:
        super().__init__()
        check_counts(dims=dims, layers=layers)
        wanted = self.width(dims, layers)
        check_width("PlanarFlow", net, lambda width: width == wanted, f"{wanted} = PlanarFlow.width({dims}, {layers})")
        self.net, self.dims, self.layers = net, dims, layers
        self.gain = nn.Parameter(torch.zeros(layers))

    @staticmethod
    def width(dims: int, layers: int) -> int:
        """Output width of the net, 2 D + layers (2 D + 1)."""
        return 2 * dims + layers * (2 * dims + 1)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("PlanarFlow", out, self.width(self.dims, self.layers))
        loc, raw, *layers = out.split([self.dims, self.dims, *[2 * self.dims + 1] * self.layers], dim=-1)
        steps: list[Map] = []
        for layer, gain in zip(layers, self.gain, strict=True):
            w, u, b = layer.split([self.dims, self.dims, 1], dim=-1)
            steps.append(functools.partial(_planar, w, *_planar_direction(w, gain * u), b))
        return TransformedNormal(loc, chain(functools.partial(scaled, loc, F.softplus(raw)), *steps))


def _planar_direction(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\hat u` `(*, D)` and :math:`1 + w^T \hat u > 0` `(*, 1)`."""
    inner = (w * u).sum(-1, keepdim=True)
    stretch = _SLOPE + F.softplus(inner + _UNIT)
    # Both |inner| and |stretch - 1| are at most |w| |u| here, so the quotient stays bounded as w goes to zero.
    square = w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return u + (stretch - 1 - inner) * w / square, stretch


def _planar(w: Tensor, u: Tensor, stretch: Tensor, b: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    bent = ((w * z).sum(-1, keepdim=True) + b).tanh()
    square = bent.square()
    # A mean of 1 and `stretch`, both above zero: 1 + (1 - square) (stretch - 1) would cancel.
    return z + u * bent, (square + (1 - square) * stretch).log().squeeze(-1)


@final
class SylvesterFlow(nn.Module):
    r"""Gaussian pushed along all directions at once, triangular variant T-SNF of van den Berg et al. (2018).

    :math:`z_0 \sim N(\mu, \operatorname{diag} \sigma^2)`, then for each layer

    .. math:: z' = z + P R \tanh(\tilde R P^T z + b), \qquad
        \det \partial z' / \partial z = \prod_i \left(1 + (1 - \tanh^2(\cdot)_i)\, r_{ii} \tilde r_{ii}\right)

    by Sylvester's identity (their Theorem 1), with :math:`R, \tilde R` upper triangular and P the identity and the
    reversal of the dimensions by turns, so that :math:`P R P^T` is lower triangular in every other layer. Invertible
    by their Theorem 2, :math:`r_{ii} \tilde r_{ii} > -1`: the diagonals pass through tanh, the inner one times
    :math:`1 - 10^{-3}`. R is the net's, times a learned gain a layer that starts at zero.

    Args:
        net: Returns `(*, SylvesterFlow.width(dims, layers))`: :math:`\mu`, what softplus turns into :math:`\sigma`,
            then for each layer a `(D, D)` matrix row by row, which holds R above and on its diagonal and
            :math:`\tilde R^T` below it, the diagonal of :math:`\tilde R`, and b.
        dims: D.
        layers: Number of maps; from two on, every dimension depends on every other.

    Example:
        >>> from aevb import MLP
        >>> q = SylvesterFlow(MLP(5, [8], SylvesterFlow.width(2, 4)), dims=2, layers=4)
        >>> q(torch.zeros(3, 5)).rsample().shape
        torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module, dims: int, layers: int) -> None:
        super().__init__()
        check_counts(dims=dims, layers=layers)
        wanted = self.width(dims, layers)
        rule = f"{wanted} = SylvesterFlow.width({dims}, {layers})"
        check_width("SylvesterFlow", net, lambda width: width == wanted, rule)
        self.net, self.dims, self.layers = net, dims, layers
        self.gain = nn.Parameter(torch.zeros(layers))

    @staticmethod
    def width(dims: int, layers: int) -> int:
        """Output width of the net, 2 D + layers (D * D + 2 D)."""
        return 2 * dims + layers * (dims * dims + 2 * dims)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("SylvesterFlow", out, self.width(self.dims, self.layers))
        loc, raw, *layers = out.split([self.dims, self.dims, *[self.dims * (self.dims + 2)] * self.layers], dim=-1)
        steps: list[Map] = []
        for index, (layer, gain) in enumerate(zip(layers, self.gain, strict=True)):
            rows, inner, b = layer.split([self.dims**2, self.dims, self.dims], dim=-1)
            matrix, inner = rows.unflatten(-1, (self.dims, self.dims)), (1 - _SLOPE) * inner.tanh()
            outer = (gain * matrix.diagonal(dim1=-2, dim2=-1)).tanh()
            out_factor = gain * matrix.triu(1) + torch.diag_embed(outer)
            in_factor = matrix.tril(-1).mT + torch.diag_embed(inner)
            if index % 2:
                out_factor, in_factor = out_factor.mT, in_factor.mT
            steps.append(functools.partial(_sylvester, out_factor, in_factor, outer * inner, b))
        return TransformedNormal(loc, chain(functools.partial(scaled, loc, F.softplus(raw)), *steps))


def _sylvester(out_factor: Tensor, in_factor: Tensor, diagonal: Tensor, b: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    # einsum, not @: the product of (N, D, D) and (K, N, D, 1) would copy the matrices K times.
    bent = (torch.einsum("...ij,...j->...i", in_factor, z) + b).tanh()
    log_det = ((1 - bent.square()) * diagonal).log1p().sum(-1)
    return z + torch.einsum("...ij,...j->...i", out_factor, bent), log_det


def check_counts(**counts: int) -> None:
    """Raise unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"`{name}` must be at least 1; got {count}.")
