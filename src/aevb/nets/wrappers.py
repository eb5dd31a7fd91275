"""Nets around a net."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from aevb._shapes import by_rows, join
from aevb.config import InputError

__all__ = ["Holes", "Rows", "Standardize"]


@final
class Holes(nn.Module):
    """Shows `net` which entries are missing: `net(filled..., mask...)`, NaN becoming 0 in `filled` and in `mask`.

    A net that handles NaN in another way says so by an attribute `sees_holes = True`.

    Args:
        net: Takes the filled parents, then their masks (1 where known, 0 where missing), each `(*, D_i)`: twice the
            width.

    Example:
        >>> import torch
        >>> from aevb import MLP
        >>> net = Holes(MLP(2 * 3, [8], 4))
        >>> net(torch.tensor([[1.0, float("nan"), 0.0]])).isfinite().all().item()
        True
    """

    sees_holes = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)`, with NaN for missing, to what `net` returns."""
        missing = [parent.isnan() for parent in parents]
        filled = [parent.masked_fill(gap, 0.0) for parent, gap in zip(parents, missing, strict=True)]
        result: Tensor = self.net(
            *filled, *((~gap).to(parent.dtype) for parent, gap in zip(parents, missing, strict=True))
        )
        return result


@final
class Standardize(nn.Module):
    """Hands `net` its one parent centred and scaled, `net((x - loc) / scale)`; NaN stays NaN.

    Args:
        net: Takes `(*, D)`.
        loc: Centre of the data, `(D,)`.
        scale: Spread of the data, `(D,)`, above 0.

    Example:
        >>> import torch
        >>> Standardize(nn.Identity(), torch.tensor([1.0]), torch.tensor([2.0]))(torch.tensor([[5.0]]))
        tensor([[2.]])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, parent: Tensor) -> Tensor:
        """Parent `(*, D)` to what `net` returns."""
        if parent.shape[-1] != self.loc.shape[0]:
            raise InputError(
                f"The net's parent must end in {self.loc.shape[0]} entries; got shape {tuple(parent.shape)}. "
                "Flatten images with `x.flatten(1)`, or build the model for these columns."
            )
        result: Tensor = self.net((parent - self.loc) / self.scale)
        return result


@final
class Rows(nn.Module):
    """A module that takes one batch `(M, D)`, as a net of ours: parents are joined, their leading axes made one.

    The result gets the leading axes back. Inside, M counts everything the library holds at once, classes and draws as
    well as data, (E..., K, N): statistics over the batch are taken over all of it.

    Args:
        net: Maps `(M, D)` to `(M, *)`.

    Example:
        >>> import torch
        >>> net = Rows(nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.Flatten()))
        >>> net(torch.zeros(5, 3, 16)).shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)` to what `net` returns, `(*, ...)`."""
        return by_rows(self.net, join(parents))
