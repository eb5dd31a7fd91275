"""Tensors at the boundary: how parents are joined and which shapes a node may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aevb.config import InputError

__all__ = ["Values", "by_rows", "check_event", "evenly", "join", "rows_of"]

Values = Mapping[str, Tensor]
"""Observed nodes by name, each `(N, *event)`; NaN marks a missing entry."""


def join(parents: tuple[Tensor, ...]) -> Tensor:
    """Parents `(*batch_i, D_i)` side by side, `(*batch, sum D_i)`: leading axes broadcast, vectors concatenated."""
    if len(parents) == 1:
        return parents[0]
    batch = torch.broadcast_shapes(*(parent.shape[:-1] for parent in parents))
    return torch.cat([parent.expand(*batch, parent.shape[-1]) for parent in parents], dim=-1)


def by_rows(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`apply`, which maps `(M, D)` to `(M, *event)`, at `(*batch, D)`: `(*batch, *event)`."""
    rows = apply(x.reshape(-1, x.shape[-1]))
    return rows.reshape(*x.shape[:-1], *rows.shape[1:])


def rows_of(values: Values) -> int:
    """The number of data N that all `values` share.

    Raises:
        InputError: If there are none, or they disagree.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"`values` must map node names to arrays; got {type(values).__name__}. Write {{'x': x}}.")
    if not values:
        raise InputError("`values` is empty; give at least one observed node, e.g. {'x': x}.")
    first = next(iter(values.values())).shape[:1]
    if any(value.shape[:1] != first for value in values.values()) or not first:
        told = ", ".join(f"{name}: {tuple(value.shape)}" for name, value in values.items())
        raise InputError(
            f"`values` must share their first axis, the data; got {told}. Give every node one entry a row."
        )
    return first[0]


def check_event(name: str, value: Tensor, event_shape: torch.Size) -> None:
    """Raise unless `value` is `(N, *event_shape)`; nothing broadcasts silently."""
    if value.shape[1:] != event_shape:
        raise InputError(
            f"`{name}` must be (N, {', '.join(map(str, event_shape)) or 'no further axes'}); got shape "
            f"{tuple(value.shape)}. Flatten images with `x.flatten(1)`, or build the model with that event shape."
        )


def evenly(rows: int, most: int) -> Tensor:
    """Positions of at most `most` of `rows`, evenly spaced: data are often sorted."""
    return torch.linspace(0, rows - 1, min(rows, most), dtype=torch.float64).round().long()
