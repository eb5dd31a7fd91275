"""Data larger than memory: rows in blocks, read from files when training comes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from aevb.config import InputError
from aevb.data.files import Part, listed, opened, parsing
from aevb.data.frames import Frame
from aevb.data.loading import table_rows
from aevb.data.rows import rows_from
from aevb.data.schema import Schema
from aevb.data.sparse import SparseRows
from aevb.data.tables import check_names, numbers, polars
from aevb.training.batches import WINDOW

__all__ = ["Blocks", "open_array", "open_shards"]

_BLOCK_BYTES = 2**24
_SLOTS = 2 * WINDOW
"""A batch at the border of two windows takes rows from both."""


@final
class Blocks:
    r"""Rows in blocks of which a few are in memory at a time; `aevb.fit` takes it in the place of arrays.

    `fit` permutes the blocks anew in each epoch, and the rows within every eight of them; it holds out whole blocks, so
    that rows should not stand in an order that means something, such as that of time, or rows of one's own be given to
    it as `validation`. Memory is that of sixteen blocks, however many there are.

    Args:
        lengths: Rows in each block.
        read: Reads a block: its number, from 0, to rows `(lengths[number], *event)`, all blocks of one type and shape.
        node: Name of the node whose values they are.

    Example:
        >>> rows = torch.arange(6.0).reshape(6, 1)
        >>> blocks = Blocks([4, 2], lambda number: rows[:4] if number == 0 else rows[4:])
        >>> blocks.take(torch.tensor([5, 0]))["x"]
        tensor([[5.],
                [0.]])
    """

    def __init__(self, lengths: Sequence[int], read: Callable[[int], Tensor], node: str = "x") -> None:
        self.blocks, self.node, self._read = tuple(lengths), node, read
        self._ends = torch.tensor(list(accumulate(self.blocks)), dtype=torch.long)
        self._longest = max(self.blocks, default=0)
        self._slots: dict[int, int] = {}  # block to where it stands in memory; the least recently used one first
        self._memory: Tensor | None = None  # (slots, longest block, *event)
        # Of each row's block, where it stands less where its first row would: a row's place is its number and this.
        self._shift = torch.zeros(len(self.blocks), dtype=torch.long)

    def __len__(self) -> int:
        """Rows of all blocks."""
        return int(self._ends[-1]) if self.blocks else 0

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows `indices`, `(B,)`; `{node: (B, *event)}`.

        Raises:
            InputError: If they lie in more than sixteen blocks, or a block is not as it was said to be.
        """
        block = torch.bucketize(indices, self._ends, right=True)
        wanted = set(block.tolist())  # a tensor's unique() takes four times as long
        if len(wanted) > _SLOTS:
            parts = [self.take(some)[self.node] for some in indices.split(max(1, len(indices) // 2))]
            return {self.node: torch.cat(parts)}
        # Those that are there are touched first, so that they do not make way for others of this batch.
        for number in sorted(wanted, key=lambda number: (number not in self._slots, number)):
            self._hold(number)
        assert self._memory is not None
        return {self.node: self._memory.index_select(0, indices + self._shift[block])}

    def _hold(self, number: int) -> None:
        slot, longest = self._slots.pop(number, None), self._longest
        if slot is None:
            rows = self._read(number)
            if self._memory is None:
                self._memory = rows.new_empty((min(_SLOTS, len(self.blocks)) * longest, *rows.shape[1:]))
            like = (self.blocks[number], *self._memory.shape[1:])
            if rows.shape != like or rows.dtype != self._memory.dtype:
                raise InputError(
                    f"Block {number} has shape {tuple(rows.shape)} and type {rows.dtype}; {like} and "
                    f"{self._memory.dtype} were to be expected. Do not change data while they are trained on."
                )
            taken = set(self._slots.values())
            free = (slot for slot in range(len(self._memory) // longest) if slot not in taken)
            slot = next(free, None)
            if slot is None:
                slot = self._slots.pop(next(iter(self._slots)))
            self._memory[slot * longest : slot * longest + len(rows)] = rows
            self._shift[number] = slot * longest - int(self._ends[number]) + self.blocks[number]
        self._slots[number] = slot


def open_array(path: str | Path, *, block_rows: int | None = None, node: str = "x") -> Blocks:
    """A NumPy array `(N, *event)` in a `.npy` file, read by blocks through a memory map.

    Args:
        path: The file; bytes stay uint8, all else becomes float32.
        block_rows: Rows in a block; None is what takes 16 MiB.
        node: Name of the node whose values they are.

    Raises:
        InputError: If it is no such file, or, when a block is read, if float32 cannot hold its entries or one is
            infinite.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.npy"
        >>> np.save(path, np.zeros((1000, 3)))
        >>> open_array(path, block_rows=400).blocks
        (400, 400, 200)
    """
    where = f"`{path}`"
    with opened(Path(path)), parsing(where, "a NumPy array"):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.memmap) or values.ndim < 1 or values.size == 0:
        raise InputError(f"{where} must hold one array with at least one row. Save it with np.save.")
    dtype = torch.uint8 if values.dtype == np.uint8 else torch.float32
    starts = _starts(len(values), block_rows, values[0].size * dtype.itemsize)

    def read(number: int) -> Tensor:
        rows = np.array(values[starts[number] : starts[number + 1]])
        told = f"{where}, from row {starts[number]} on"
        flat = rows.reshape(len(rows), -1)  # whatever the axes mean: they stay as they are
        return _as(rows_from(Part(where=told, values=flat)).x, dtype, told).reshape(rows.shape)

    return Blocks([b - a for a, b in pairwise(starts)], read, node)


def open_shards(
    paths: Sequence[str | Path], schema: Schema | None = None, *, block_rows: int | None = None, node: str = "x"
) -> Blocks:
    """Parquet files with the same columns, one after another, read by blocks.

    Rows are read fastest where the files' row groups are no larger than a block.

    Args:
        paths: The files, in the order in which their rows are numbered.
        schema: What the columns hold, as `find_schema` tells of one of the files; None if all are numbers, of which
            bytes stay uint8 and all else becomes float32.
        block_rows: Rows in a block; None is what takes 16 MiB.
        node: Name of the node whose values they are.

    Raises:
        InputError: If one is no such file, their columns differ, or, when a block is read, an entry cannot be used.

    Example:
        >>> import polars as pl, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in "ab":
        ...     pl.DataFrame({"u": [1.0, 2.0, 3.0], "v": [0.5, None, 2.5]}).write_parquet(folder / f"{name}.parquet")
        >>> shards = open_shards(sorted(folder.glob("*.parquet")))
        >>> len(shards), shards.take(torch.tensor([4]))["x"]
        (6, tensor([[2., nan]]))
    """
    pl = polars()
    if not paths:
        raise InputError("`paths` names no file. Give at least one Parquet file.")
    scans, places, first = [], [], None
    for path in map(Path, paths):
        with opened(path), parsing(f"`{path}`", "Parquet"):
            scan = pl.scan_parquet(path, glob=False)
            columns, rows = scan.collect_schema(), scan.select(pl.len()).collect().item()
        first = first or (path, columns)
        if columns != first[1]:
            differing = [f"{n} {t}" for n, t in set(columns.items()) ^ set(first[1].items())]
            raise InputError(
                f"`{path}` and `{first[0]}` differ in the columns {listed(sorted(differing))}; all files must have the "
                "same names and types in the same order. Write them again."
            )
        check_names(list(columns), f"`{path}`")
        width = len(columns) if schema is None else len(schema.names)
        starts = _starts(rows, block_rows, width * _type(columns, schema).itemsize) if rows else [0]
        scans.append(scan)
        places += [(len(scans) - 1, a, b - a) for a, b in pairwise(starts)]
    if not places:
        raise InputError(f"{listed([str(path) for path in paths])} have no rows; give at least one to train on.")
    assert first is not None
    dtype = _type(first[1], schema)

    def read(number: int) -> Tensor:
        file, start, rows = places[number]
        where = f"`{paths[file]}`, from row {start} on"
        with parsing(where, "Parquet"):
            table = scans[file].slice(start, rows).collect()
        if schema is not None:
            return _as(table_rows(Frame(where=where, table=table, cells=False), schema), dtype, where)
        part = Part(where=where, values=numbers(table, where), columns=tuple(table.columns), named=True)
        return _as(rows_from(part).x, dtype, where)

    return Blocks([rows for _, _, rows in places], read, node)


def _type(columns: Mapping[str, Any], schema: Schema | None) -> torch.dtype:
    return torch.uint8 if schema is None and set(columns.values()) == {polars().UInt8} else torch.float32


def _starts(rows: int, block_rows: int | None, row_bytes: int) -> list[int]:
    """Where blocks begin, and the last one ends."""
    size = max(1, _BLOCK_BYTES // row_bytes) if block_rows is None else block_rows
    if size < 1:
        raise InputError(f"`block_rows` must be at least 1; got {block_rows}.")
    return [*range(0, rows, size), rows]


def _as(x: Tensor | SparseRows, dtype: torch.dtype, where: str) -> Tensor:
    """Of the type of the other blocks, which may not need what one of them does."""
    assert isinstance(x, Tensor)  # arrays and tables are dense
    if x.dtype == torch.float64:
        raise InputError(
            f"{where}: float32 cannot hold the differences among these numbers, such as times in seconds. Subtract a "
            "common start, or scale the column."
        )
    return x.to(dtype)
