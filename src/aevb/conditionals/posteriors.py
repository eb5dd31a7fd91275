"""Gaussian posteriors, whose draws are reparameterized."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width, independent
from aevb.config import InputError
from aevb.distributions import base_of

__all__ = ["DiagonalNormal", "FullNormal", "LadderNormal", "ProductNormal"]


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
        check_width("DiagonalNormal", net, lambda width: width >= 2 and width % 2 == 0, "2 D, a mean and a scale each")
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("DiagonalNormal", out, out.shape[-1] // 2 * 2)
        loc, raw = out.chunk(2, dim=-1)
        # softplus, not exp: exp overflows past 88.7 in float32, and its gradient is as large as its value.
        return independent(td.Normal(loc, F.softplus(raw), validate_args=False))


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
        check_width("FullNormal", net, lambda width: width == wanted, f"2 D + D * D = {wanted} for D = {dims}")
        self.net, self.dims = net, dims

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("FullNormal", out, 2 * self.dims + self.dims**2)
        loc, raw, rows = out.split([self.dims, self.dims, self.dims**2], dim=-1)
        tril = rows.unflatten(-1, (self.dims, self.dims)).tril(-1) + torch.diag_embed(F.softplus(raw))
        return td.MultivariateNormal(loc, scale_tril=tril, validate_args=False)


@final
class LadderNormal(nn.Module):
    r"""A level of a ladder's q: the Gaussian evidence from below times p's own Gaussian from above.

    With :math:`N(\hat\mu, \operatorname{diag} \hat\sigma^2)` from the net and, given the level above, the prior
    :math:`N(\mu_p, \operatorname{diag} \sigma_p^2)`, precisions add (Sonderby et al., 2016, eqs. 17 to 19):

    .. math:: \sigma^{-2} = \hat\sigma^{-2} + \sigma_p^{-2}, \quad
        \mu = \sigma^2 (\hat\mu \hat\sigma^{-2} + \mu_p \sigma_p^{-2}).

    `prior` is the very module that is p's factor of this node: its weights are trained and saved once.

    Args:
        net: Takes the first parent, what comes from below; returns `(*, 2 D)` as for `DiagonalNormal`.
        prior: p's factor of this node; takes the remaining parents, and returns a factorized Gaussian.

    Example:
        >>> from aevb import MLP
        >>> prior = DiagonalNormal(MLP(2, [8], 2 * 3))
        >>> LadderNormal(MLP(5, [8], 2 * 3), prior)(torch.zeros(4, 5), torch.zeros(4, 2)).event_shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, prior: nn.Module) -> None:
        super().__init__()
        check_width("LadderNormal", net, lambda width: width >= 2 and width % 2 == 0, "2 D, a mean and a scale each")
        self.net, self.prior = net, prior

    def forward(self, below: Tensor, *above: Tensor) -> td.Distribution:
        """What comes from below `(*, D_0)`, then p's parents of the node."""
        above_d = base_of(self.prior(*above))
        if not isinstance(above_d, td.Normal):
            raise InputError(
                f"LadderNormal needs a prior that is a factorized Gaussian; got {type(above_d).__name__}. "
                "Give the node a DiagonalNormal or StandardNormal in p."
            )
        out = self.net(below)
        check_out("LadderNormal", out, 2 * above_d.loc.shape[-1])
        loc, raw = out.chunk(2, dim=-1)
        below_scale, above_scale = F.softplus(raw), above_d.scale
        # Shares of the two in the mean, from the hypotenuse: squares and their reciprocals would leave float32's range.
        norm = torch.hypot(below_scale, above_scale)
        mean = loc * (above_scale / norm).square() + above_d.loc * (below_scale / norm).square()
        return independent(td.Normal(mean, below_scale * (above_scale / norm), validate_args=False))


@final
class ProductNormal(nn.Module):
    r"""Gaussian with full covariance: N(0, I) times a Gaussian factor for each thing that is known, then corrected.

    .. math:: N(z; \mu_0, L L^T) \propto N(z; 0, I) \prod_{i=1}^F N(t_i;\, w_i^T z,\, 1), \qquad
        z = \mu_0 + L (\delta + \sigma \odot \epsilon)

    with :math:`(w_1, ..., w_F, t, \delta, s) = \operatorname{net}(a)`, L lower triangular and
    :math:`\sigma = \operatorname{softplus}(s + c)`, c such that s = 0 makes :math:`\sigma = 1`. Precisions add,
    :math:`(L L^T)^{-1} = I + \sum_i w_i w_i^T` and :math:`\mu_0 = L L^T \sum_i t_i w_i`, so that a factor whose
    :math:`w_i` is 0 is left out: `Evidence` does so with those of missing entries. For every pattern of them the
    posterior of a linear-Gaussian model is one of these, at :math:`\delta = s = 0`.

    Args:
        net: Returns `(*, F D + F + 2 D)`: w factor by factor, t, :math:`\delta` and s.
        dims: D.
        factors: F.

    Example:
        >>> from aevb import MLP, Evidence, Holes
        >>> net = Holes(Evidence(MLP(2 * 4, [8], 2 * 3), [1] * 4, 3))
        >>> ProductNormal(net, 3, 4)(torch.tensor([[1.0, torch.nan, 0.0, 2.0]])).covariance_matrix.shape
        torch.Size([1, 3, 3])
    """

    def __init__(self, net: nn.Module, dims: int, factors: int) -> None:
        super().__init__()
        self._width = factors * dims + factors + 2 * dims
        rule = f"F D + F + 2 D = {self._width} for D = {dims} and F = {factors}"
        check_width("ProductNormal", net, lambda width: width == self._width, rule)
        self.net, self.dims, self.factors = net, dims, factors

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("ProductNormal", out, self._width)
        # Double: beside the prior's precision of 1 there are those of columns with little noise, 1e6 and more.
        parts = out.double().split([self.factors * self.dims, self.factors, self.dims, self.dims], dim=-1)
        w, (t, shift, raw) = parts[0].unflatten(-1, (self.factors, self.dims)), parts[1:]
        one = torch.eye(self.dims, dtype=w.dtype, device=w.device)
        precision = w.mT @ w + one
        # U U^T is the precision, U upper triangular: Cholesky's factor with the axes turned round. L is U^-T.
        upper = torch.linalg.cholesky(precision.flip(-2, -1)).flip(-2, -1)
        tril = torch.linalg.solve_triangular(upper.mT, one.expand_as(upper), upper=False)
        told = (t.unsqueeze(-2) @ w @ tril).squeeze(-2)  # L^T sum_i t_i w_i, which L takes to mu_0
        loc = (tril @ (told + shift).unsqueeze(-1)).squeeze(-1)
        tril = tril * F.softplus(raw + _ONE).unsqueeze(-2)
        return td.MultivariateNormal(loc.to(out), scale_tril=tril.to(out), validate_args=False)


_ONE = math.log(math.expm1(1.0))
"""What softplus turns into 1."""
