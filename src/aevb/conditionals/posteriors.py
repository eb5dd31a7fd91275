"""Gaussian posteriors, whose draws are reparameterized."""

from __future__ import annotations

from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width, independent
from aevb.config import InputError
from aevb.distributions import base_of

__all__ = ["DiagonalNormal", "FullNormal", "LadderNormal"]


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
