"""The form of a conditional, and the checks that all of ours make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.distributions as td
from torch import Tensor, nn

from aevb.config import InputError

__all__ = ["Conditional", "check_out", "check_width", "independent"]


class Conditional(Protocol):
    """A module that maps its parents' values, each `(*, D_i)`, to a distribution with batch shape `(*,)`."""

    def __call__(self, *parents: Tensor) -> td.Distribution:
        """p(child | parents)."""
        ...


def independent(entries: td.Distribution) -> td.Distribution:
    """The entries of the last axis as one event."""
    return td.Independent(entries, 1, validate_args=False)


def check_out(owner: str, out: Tensor, width: int) -> None:
    """What `_check_width` could not know; a last axis of 1, or chunks of unequal width, broadcast without a word."""
    if out.shape[-1] != width:
        raise InputError(
            f"{owner} needs a net of output width {width}; got {out.shape[-1]}. Change the net's last width."
        )


def check_width(owner: str, net: nn.Module, fits: Callable[[int], bool], rule: str) -> None:
    """Raise if `net` tells its output width and it does not fit."""
    width = getattr(net, "outputs", None)
    if width is not None and not fits(width):
        raise InputError(f"{owner} needs a net of output width {rule}; got {width}. Change the net's last width.")
