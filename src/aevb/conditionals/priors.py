"""Priors: conditionals without parents."""

from __future__ import annotations

from typing import final

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb.conditionals.form import independent
from aevb.config import InputError

__all__ = ["StandardNormal"]


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
        return independent(td.Normal(self.loc, self.scale, validate_args=False))
