"""A node that is computed."""

from __future__ import annotations

from typing import final

import torch.distributions as td
from torch import Tensor, nn

from aevb.distributions import Delta

__all__ = ["Deterministic"]


@final
class Deterministic(nn.Module):
    r"""A node with a value and no density, :math:`h = \operatorname{net}(a)`, for what several nodes share.

    The features that a ladder's bottom-up path hands to every level are one; so is a layer that two likelihoods share.

    Args:
        net: Takes the parents; returns the value, `(*, D)`.

    Example:
        >>> import torch
        >>> from aevb import MLP
        >>> Deterministic(MLP(4, [], 3))(torch.zeros(2, 4)).mean.shape
        torch.Size([2, 3])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return Delta(self.net(*parents))
