"""A Gaussian conditional in the units of the data."""

from __future__ import annotations

from typing import final

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb.conditionals.form import independent
from aevb.config import InputError
from aevb.distributions import LogNormal, base_of

__all__ = ["Scaled"]


@final
class Scaled(nn.Module):
    r"""What a factorized Gaussian conditional says of standardised values, said of the values themselves.

    With :math:`u | a \sim N(\mu, \operatorname{diag} \sigma^2)` of `inner`: :math:`y = m + s u`, or on the log scale
    :math:`\log y = m + s u`, and :math:`r \ge 0` is added to the spread,

    .. math:: y_j | a \sim N(m_j + s_j \mu_j,\, (r_j + s_j \sigma_j)^2), \quad \text{or} \quad
        \log y_j | a \sim N(m_j + s_j \mu_j,\, (r_j + s_j \sigma_j)^2).

    The density is that of y in its own units: the Jacobian :math:`-\log s_j`, or :math:`-\log s_j - \log y_j`, is part
    of it. Unlike a likelihood it can be drawn with a gradient, and so be a factor of q.

    Args:
        inner: A factorized Gaussian of D dimensions given its parents: `StandardNormal`, `LearnedNormal` or
            `DiagonalNormal`.
        loc: m, `(D,)`.
        scale: s > 0, `(D,)`.
        resolution: r, `(D,)`, the step of the values (on the log scale of their logarithms): without it a net that is
            right to the last digit makes a density that grows without limit.
        log: On the log scale: y is above 0.

    Example:
        >>> from aevb import StandardNormal
        >>> price = Scaled(StandardNormal(1), torch.tensor([9.0]), torch.tensor([0.5]), log=True)
        >>> price().log_prob(torch.tensor([8000.0])).exp()
        tensor(9.9...e-05)
    """

    loc: Tensor
    scale: Tensor
    resolution: Tensor

    def __init__(
        self, inner: nn.Module, loc: Tensor, scale: Tensor, resolution: Tensor | None = None, *, log: bool = False
    ) -> None:
        super().__init__()
        self.inner, self.log = inner, log
        given = torch.zeros_like(scale) if resolution is None else resolution
        for name, value in (("loc", loc), ("scale", scale), ("resolution", given)):
            self.register_buffer(name, value.clone())
        if not bool((self.scale > 0).all() and (self.resolution >= 0).all()):
            raise InputError("`scale` must be above 0 and `resolution` not below 0; a constant value has no scale.")

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        base = base_of(self.inner(*parents))
        if type(base) is not td.Normal:
            raise InputError(f"Scaled needs a factorized Gaussian; got {type(base).__name__}. Use DiagonalNormal.")
        loc, scale = self.loc + self.scale * base.loc, self.resolution + self.scale * base.scale
        return independent(LogNormal(loc, scale) if self.log else td.Normal(loc, scale, validate_args=False))
