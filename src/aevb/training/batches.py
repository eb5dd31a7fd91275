"""Which rows a step takes, and what every draw of a run is keyed by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from aevb._shapes import rows_of
from aevb.config import InputError, TrainConfig

__all__ = ["Arrays", "Dataset", "Order", "key", "split_rows"]


@runtime_checkable
class Dataset(Protocol):
    """Rows by index, for data that are not plain arrays in memory."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def take(self, indices: Tensor) -> Mapping[str, Tensor]:
        """Nodes by name at `indices` `(B,)`, each `(B, *event)`; what it draws comes from torch's generator."""
        ...


class Arrays:
    """Arrays in memory, in their own dtype; a batch is one index."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        if not isinstance(data, Mapping):
            raise InputError(
                f"`data` must map node names to arrays, or have len and take(indices); got {type(data).__name__}. "
                "Write {'x': x}."
            )
        self.values = {name: torch.as_tensor(value) for name, value in data.items()}
        self.rows = rows_of(self.values)

    def __len__(self) -> int:
        return self.rows

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows at `indices`."""
        return {name: value.index_select(0, indices.to(value.device)) for name, value in self.values.items()}


class Order:
    """An endless stream of permutations of some rows, each drawn from (seed, epoch), cut into batches of one size."""

    def __init__(self, rows: Tensor, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, min(batch_size, len(rows)), seed
        self.epochs: dict[int, Tensor] = {}

    def batch(self, step: int) -> Tensor:
        """Indices of the rows of one step."""
        size, count = self.batch_size, len(self.rows)
        first, last = step * size, (step + 1) * size
        parts = []
        for epoch in range(first // count, (last - 1) // count + 1):
            order = self._epoch(epoch)
            parts.append(order[max(0, first - epoch * count) : last - epoch * count])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self.epochs:
            generator = torch.Generator().manual_seed(key(self.seed, "epoch", epoch))
            order = self.rows[torch.randperm(len(self.rows), generator=generator)]
            # A batch spans two epochs at most, where it does not hold several whole ones.
            self.epochs = {e: o for e, o in self.epochs.items() if e == epoch - 1} | {epoch: order}
        return self.epochs[epoch]


def key(seed: int, purpose: str, number: int) -> int:
    """Seed of torch's generator for one purpose and one number."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def split_rows(rows: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Indices of the rows that `fit` trains on and of those it holds out, as `config` decides them."""
    if rows < 1:
        raise InputError("`data` has no rows; give at least one to train on.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(key(config.seed, "split", 0)))
    held_out = min(rows - 1, math.ceil(rows * config.validation))
    return order[held_out:].sort().values, order[:held_out].sort().values
