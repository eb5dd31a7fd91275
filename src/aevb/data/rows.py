"""From stored arrays to checked tensors: two axes, no infinities, the smallest type that loses nothing that matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aevb.config import InputError
from aevb.data.batch import Batch
from aevb.data.binary import Binarize, check_binarize, check_grey, draw_once
from aevb.data.files import Part, as_float, listed, shown
from aevb.data.images import as_rows, described
from aevb.data.sources import open_source
from aevb.data.sparse import SparseRows, compressed

__all__ = ["Rows", "column_name", "grey_of", "read_rows", "rows_from", "with_batch"]

_FLOAT64_WHOLE = 2**53


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Checked rows."""

    where: str
    x: Tensor | SparseRows  # (N, P): uint8, float32 or float64; NaN is missing
    labels: Tensor | None  # (N,) int64, -1 is missing
    columns: tuple[str, ...] | None
    named: bool
    image_shape: tuple[int, ...] | None  # (H, W), or (3, H, W) in colour
    batches: tuple[str | None, ...] | None = None  # (N,), where they were asked for


def column_name(columns: Sequence[str] | None, j: int) -> str:
    """The column's name, or its position counting from 0."""
    return columns[j] if columns is not None else f"column {j}"


def rows_from(part: Part) -> Rows:
    """Checks what a file held and makes tensors of it.

    Raises:
        InputError: If the array is not of numbers, has no rows or columns, too many axes, or infinite entries.
    """
    values, where = part.values, part.where
    if not isinstance(values, np.ndarray):
        return Rows(
            where=where,
            x=SparseRows(compressed(values, where, part.columns), columns=part.columns),
            labels=_labels(part),
            columns=part.columns,
            named=part.named,
            image_shape=None,
            batches=part.batches,
        )
    if values.dtype.kind not in "buif":
        raise InputError(
            f"{where} holds entries of type {values.dtype}; real numbers are needed. "
            "Convert it: x.astype(float), or code categories as numbers."
        )
    flat, shape = as_rows(values, where)
    x = flat if flat.dtype == np.uint8 else as_float(flat, where)
    _check_finite(x, part)
    return Rows(
        where=where,
        x=torch.from_numpy(x),
        labels=_labels(part),
        columns=part.columns,
        named=part.named,
        image_shape=shape,
        batches=part.batches,
    )


def _check_finite(x: NDArray[Any], part: Part) -> None:
    if x.dtype.kind == "f" and (infinite := np.isinf(x)).any():
        row, j = (int(i) for i in np.argwhere(infinite)[0])
        raise InputError(
            f"{part.where}: the entry in row {row} (counting from 0), {shown(column_name(part.columns, j))}, is "
            "infinite; entries must be finite, or missing. Replace it, or leave it out as NaN."
        )


def with_batch(x: Tensor | SparseRows, batch: Batch, names: Sequence[str | None], where: str) -> Tensor | SparseRows:
    """Rows `(N, P)` with the one-hot columns of their batches behind, `(N, P + B)`.

    Raises:
        InputError: As `Batch.codes`.
    """
    if isinstance(x, SparseRows):
        return x.beside(batch, names, where)
    return torch.cat([x, batch.one_hot(batch.codes(names, where)).to(x)], 1)


def _labels(part: Part) -> Tensor | None:
    labels, rows = part.labels, part.values.shape[0]
    if labels is None:
        return None
    if labels.size != rows or labels.shape[:1] != (rows,):
        raise InputError(
            f"{part.where} has {rows} rows and its labels have shape {labels.shape}; there must be one label a row. "
            "Save them together again, as codes 0, 1, 2 and so on."
        )
    if labels.dtype.kind not in "buif":
        return None  # names
    wide = labels.reshape(-1).astype(np.float64)
    codes = np.where(np.isnan(wide), -1, wide)
    if (np.abs(codes) > _FLOAT64_WHOLE).any() or (codes != np.round(codes)).any():
        return None  # the target of a regression
    return torch.from_numpy(codes.astype(np.int64))


def grey_of(rows: Rows, total_count: int | None) -> Tensor:
    """Entries as grey values: bytes, floats in [0, 1], or counts over their limit.

    Raises:
        InputError: If they are none of these.
    """
    if isinstance(rows.x, SparseRows):
        raise InputError(f"{rows.where} is a sparse matrix, which is not binarised. Leave `binarize` at 'none'.")
    x = rows.x / total_count if total_count else rows.x
    check_grey(x, rows.where)
    return x


def read_rows(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    kept: Sequence[int] | None = None,
    features: int | None = None,
    image_shape: Sequence[int] | None = None,
    dropped: Sequence[str] = (),
    part: Literal["train", "test"] = "test",
    binarize: Binarize = "none",
    seed: int = 0,
    layer: str = "",
    batch: Batch | None = None,
) -> Tensor | SparseRows:
    """Rows for a trained model: to score, to encode, to impute. One row is enough.

    Columns are matched by name where the file and the model both have names, whatever their order; else by count.

    Args:
        path: Anything that `load` takes.
        columns: The model's `Data.columns`.
        kept: The model's `Data.kept`: where the columns stood that were kept, if constant ones were dropped.
        features: The model's `Data.features`, P.
        image_shape: The model's `Data.image_shape`. Images must have it, except that grey ones are also read as colour
            ones; rows that are flat already are taken to be in the order that it tells.
        dropped: The model's `Data.dropped`; tells the columns that the file may have beyond the model's. If it is
            empty while `kept` is given, a file laid out like the training file is trusted to hold nothing else.
        part: The rows wanted, where the source has both; a source with one part gives that.
        binarize: If not "none", grey values are drawn to 0 or 1 once, as `load` draws that part.
        seed: Keys that draw.
        layer: Of an AnnData file, the matrix to read in place of X.
        batch: The model's `Data.batch`: the rows of an AnnData file, whose `.obs` must have its column.

    Returns:
        `(N, P)`, uint8 where the file has bytes, else float; NaN is missing. A sparse matrix stays one. With `batch`
        `(N, P + B)`, its one-hot columns behind the others.

    Raises:
        InputError: If the file cannot be read, its columns do not fit, or a row's batch is missing or not known.

    Example:
        >>> read_rows("digits", features=64).shape
        torch.Size([297, 64])
    """
    check_binarize(binarize, seed)
    if part not in ("train", "test"):
        raise InputError(f"`part` must be train or test; got {part!r}. Choose one of these names.")
    source = open_source(path, layer, "" if batch is None else batch.column)
    chosen = source.test if part == "test" and source.test is not None else source.train
    rows = rows_from(chosen)
    if image_shape is not None and rows.image_shape is not None:
        rows = _of_shape(rows, tuple(image_shape))
    picked: list[int] | None
    if columns is not None and rows.named and rows.columns is not None:
        picked = _by_name(rows.where, rows.columns, columns, kept, dropped)
    else:
        picked = _by_count(rows, columns, kept, dropped, features)
    if picked is not None:
        at = torch.tensor(picked)
        x = rows.x.select(columns=at) if isinstance(rows.x, SparseRows) else rows.x[:, at]
        rows = replace(rows, x=x)
    if batch is not None and rows.batches is not None:
        return with_batch(rows.x, batch, rows.batches, rows.where)
    if binarize == "none":
        return rows.x
    return draw_once(grey_of(rows, source.total_count), seed=seed, part="train" if chosen is source.train else "test")


def _of_shape(rows: Rows, shape: tuple[int, ...]) -> Rows:
    """Images as a model takes them."""
    if rows.image_shape == shape:
        return rows
    assert isinstance(rows.x, Tensor)  # no sparse matrix holds images
    if rows.image_shape == shape[1:]:
        return replace(rows, x=rows.x.repeat(1, shape[0]), image_shape=shape)
    assert rows.image_shape is not None
    raise InputError(
        f"{rows.where} has images of {described(rows.image_shape)}; the model was trained on images of "
        f"{described(shape)}. Crop, resize or convert them as those were."
    )


def _by_name(
    where: str, names: Sequence[str], columns: Sequence[str], kept: Sequence[int] | None, dropped: Sequence[str]
) -> list[int]:
    position = {name: j for j, name in enumerate(names)}
    if missing := [name for name in columns if name not in position]:
        raise InputError(
            f"{where} lacks the columns {listed(missing)}; the model needs all {len(columns)} it was trained on. "
            "Add them, empty if they were not observed."
        )
    known = {*columns, *dropped}
    if kept is not None and not dropped and [names[j] for j in kept if j < len(names)] == list(columns):
        known.update(names)  # laid out like the training file: what is not kept was dropped
    if extra := [name for name in names if name not in known]:
        raise InputError(f"{where} has the columns {listed(extra)}, unknown to the model. Remove them.")
    return [position[name] for name in columns]


def _by_count(
    rows: Rows, columns: Sequence[str] | None, kept: Sequence[int] | None, dropped: Sequence[str], features: int | None
) -> list[int] | None:
    """Positions to pick; None for all."""
    width = rows.x.shape[1]
    expected = len(columns) if columns is not None else len(kept) if kept is not None else features
    if expected is None or width == expected:
        return None
    if kept is not None and (width == expected + len(dropped) if dropped else width > max(kept)):
        return list(kept)
    before = f" ({expected + len(dropped)} before constant ones were dropped)" if dropped else ""
    raise InputError(
        f"{rows.where} has {width} columns; the model was trained on {expected}{before}. "
        "Give the same columns in the same order."
    )
