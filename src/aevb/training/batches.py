"""Which rows a step takes, and what every draw of a run is keyed by."""

from __future__ import annotations

import hashlib
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from aevb._shapes import rows_of
from aevb.config import InputError, TrainConfig

__all__ = ["WINDOW", "Arrays", "Dataset", "Order", "dataset", "key", "split_blocks", "split_rows"]

WINDOW = 8
"""Blocks whose rows are shuffled among one another."""


@runtime_checkable
class Dataset(Protocol):
    """Rows by index, for data that are not plain arrays in memory.

    Where rows can only be had many at a time, an attribute `blocks` tells how many stand together, in their order: then
    `fit` asks for rows of at most twice `WINDOW` blocks in a step, and goes on to other blocks but seldom.
    """

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
        with warnings.catch_warnings():  # of a read-only memory map; nothing is written here
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self.values = {name: torch.as_tensor(value) for name, value in data.items()}
        self.rows = rows_of(self.values)

    def __len__(self) -> int:
        return self.rows

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows at `indices`."""
        return {name: value.index_select(0, indices.to(value.device)) for name, value in self.values.items()}


def dataset(data: Mapping[str, Any] | Dataset) -> Dataset:
    """What `fit` was given, as rows by index; a tensor, which has `len` and `take` of another kind, is refused."""
    return data if isinstance(data, Dataset) and not isinstance(data, Tensor) else Arrays(data)


class Order:
    """An endless stream of permutations of some rows, each drawn from (seed, epoch), cut into batches of one size.

    Of rows in blocks the blocks are permuted, and then the rows within each `WINDOW` of them, so that a step needs no
    more than the blocks of a window, or of two, and nothing is as long as the data set.
    """

    def __init__(self, rows: Tensor | Sequence[range], batch_size: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.count = len(rows) if isinstance(rows, Tensor) else sum(map(len, rows))
        self.batch_size = min(batch_size, self.count)
        self.epochs: dict[int, tuple[list[list[range]], list[int]]] = {}
        self.windows: dict[tuple[int, int], Tensor] = {}

    def batch(self, step: int) -> Tensor:
        """Indices of the rows of one step."""
        at, last, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while at < last:
            epoch, place = divmod(at, self.count)
            start, window = self._window(epoch, place)
            parts.append(window[place - start : place - start + last - at])
            at += len(parts[-1])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _window(self, epoch: int, place: int) -> tuple[int, Tensor]:
        """The permuted rows among which a place of an epoch lies, and the place where they begin."""
        rows = self.rows
        if isinstance(rows, Tensor):
            return 0, self._kept((epoch, 0), lambda: self._permuted(rows, "epoch", epoch))
        if epoch not in self.epochs:
            order = _permutation(len(rows), self.seed, "epoch", epoch).tolist()
            groups = [[rows[i] for i in order[first : first + WINDOW]] for first in range(0, len(order), WINDOW)]
            ends = list(accumulate(sum(map(len, group)) for group in groups))
            self.epochs = {e: o for e, o in self.epochs.items() if e == epoch - 1} | {epoch: (groups, ends)}
        groups, ends = self.epochs[epoch]
        number = bisect_right(ends, place)
        return ends[number - 1] if number else 0, self._kept((epoch, number), lambda: self._permuted(
            torch.cat([torch.arange(b.start, b.stop) for b in groups[number]]), f"window of epoch {epoch}", number
        ))  # fmt: skip

    def _kept(self, window: tuple[int, int], make: Callable[[], Tensor]) -> Tensor:
        if window not in self.windows:
            # A batch may span two of them.
            self.windows = dict(list(self.windows.items())[-1:]) | {window: make()}
        return self.windows[window]

    def _permuted(self, rows: Tensor, purpose: str, number: int) -> Tensor:
        return rows[_permutation(len(rows), self.seed, purpose, number)]


def key(seed: int, purpose: str, number: int) -> int:
    """Seed of torch's generator for one purpose and one number."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _permutation(count: int, seed: int, purpose: str, number: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(key(seed, purpose, number)))


def split_rows(rows: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Indices of the rows that `fit` trains on and of those it holds out, as `config` decides them."""
    if rows < 1:
        raise InputError("`data` has no rows; give at least one to train on.")
    order = _permutation(rows, config.seed, "split", 0)
    held_out = min(rows - 1, math.ceil(rows * config.validation))
    return order[held_out:].sort().values, order[:held_out].sort().values


def split_blocks(lengths: Sequence[int], config: TrainConfig) -> tuple[list[range], Tensor]:
    """As `split_rows`, of rows in blocks: whole blocks, drawn at random, are held out, at least the share asked for."""
    ends = list(accumulate(lengths))
    if not ends or min(lengths) < 1:
        raise InputError("`data` has no block, or one without rows; give at least one row in each.")
    blocks = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    held_out: list[range] = []
    for i in torch.randperm(
        len(blocks), generator=torch.Generator().manual_seed(key(config.seed, "split", 0))
    ).tolist():
        if sum(map(len, held_out)) >= ends[-1] * config.validation:
            break
        held_out.append(blocks[i])
    if len(held_out) == len(blocks):
        raise InputError(
            f"`data` has {len(blocks)} block(s), of which at least one is held out and none is left to train on. Cut "
            "it into smaller blocks, give `validation` rows, or set `validation` to 0."
        )
    return [block for block in blocks if block not in held_out], torch.cat(
        [torch.arange(0), *(torch.arange(b.start, b.stop) for b in sorted(held_out, key=lambda b: b.start))]
    )
