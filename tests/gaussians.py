"""Affine Gaussian conditionals, and the noise that makes means over them exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributions as td
from torch import Tensor

from aevb import MLP, DiagonalNormal, FullNormal, Normal


def raw(scale: Tensor | float) -> Tensor:
    """What softplus turns into `scale`."""
    return torch.as_tensor(scale).expm1().log()


def affine(weight: Tensor, bias: Tensor) -> MLP:
    """The net a -> weight a + bias."""
    net = MLP(weight.shape[1], [], weight.shape[0])
    with torch.no_grad():
        net.last.weight.copy_(weight)
        net.last.bias.copy_(bias)
    return net


def likelihood(weight: Tensor, bias: Tensor, scale: float) -> Normal:
    """N(weight a + bias, scale^2 I)."""
    conditional = Normal(affine(weight, bias), len(bias), "global")
    with torch.no_grad():
        conditional.raw_noise.fill_(raw(scale))
    return conditional


def factorized(weight: Tensor, bias: Tensor, scale: Tensor) -> DiagonalNormal:
    """N(weight a + bias, diag scale^2)."""
    return DiagonalNormal(affine(torch.cat([weight, torch.zeros_like(weight)]), torch.cat([bias, raw(scale)])))


def correlated(weight: Tensor, bias: Tensor, cov: Tensor) -> FullNormal:
    """N(weight a + bias, cov)."""
    dims = len(bias)
    tril = torch.linalg.cholesky(cov)
    rest = torch.zeros(dims + dims * dims, weight.shape[1])
    net = affine(torch.cat([weight, rest]), torch.cat([bias, raw(tril.diagonal()), tril.flatten()]))
    return FullNormal(net, dims)


class Points:
    """The same given noise for every datum."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        assert shape[0] == len(self.points)
        return self.points.reshape(len(self.points), *(1,) * (len(shape) - 2), -1).expand(shape)

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        raise AssertionError("only Gaussians are asked for here")


def sigma_points(dims: dict[str, int]) -> tuple[int, Callable[[str], Points]]:
    """How many points, and the part of them that is each latent node's noise."""
    total = sum(dims.values())
    points = math.sqrt(total) * torch.cat([torch.eye(total), -torch.eye(total)])
    parts = dict(zip(dims, points.split(list(dims.values()), dim=1), strict=True))
    return 2 * total, lambda node: Points(parts[node])
