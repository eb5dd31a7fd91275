"""Results to files: whole, or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from aevb.checkpoint import write_atomically
from aevb.config import InputError
from aevb.data.annotated import SUFFIX
from aevb.data.tables import are_numbers, check_names, polars

if TYPE_CHECKING:
    import polars as pl

__all__ = ["check_destination", "write_frame", "write_rows"]


def write_rows(
    path: str | Path, array: Tensor | ArrayLike, columns: Sequence[str] | None = None, *, overwrite: bool = False
) -> None:
    r"""Writes a table as `.npy`, `.csv` or `.parquet`, by suffix.

    The file appears whole or not at all: it is written under another name in the same folder, flushed to the disk, and
    renamed. Numbers in CSV have the fewest digits that give back the same float of their type.

    Args:
        path: Where to; the folder must exist.
        array: `(N, P)`, or `(N,)` for one column.
        columns: P names; x1, x2 and so on if None. `.npy` has no place for them.
        overwrite: Replace a file that is there.

    Raises:
        InputError: If the suffix is another one, the file exists, names do not fit, or the disk refuses. Nothing that
            existed is lost.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "codes.csv"
        ...     write_rows(path, torch.tensor([[0.1, 2.0]]), ["z1", "z2"])
        ...     path.read_text()
        'z1,z2\n0.1,2.0\n'
    """
    path = Path(path)
    check_destination(path, overwrite=overwrite)
    rows = _table(array)
    names = [f"x{j + 1}" for j in range(rows.shape[1])] if columns is None else list(columns)
    if len(names) != rows.shape[1]:
        raise InputError(
            f"`columns` must have {rows.shape[1]} names, one a column; got {len(names)}. Name every column."
        )
    check_names(names, "`columns`")
    write_atomically(path, _WRITERS[path.suffix.lower()](rows, names))


def write_frame(path: str | Path, frame: pl.DataFrame, *, overwrite: bool = False) -> None:
    r"""Writes a table of any kind of column as `.csv` or `.parquet`, by suffix, whole or not at all.

    Args:
        path: Where to; the folder must exist.
        frame: The table.
        overwrite: Replace a file that is there.

    Raises:
        InputError: As for `write_rows`.
    """
    path = Path(path)
    check_destination(path, overwrite=overwrite, tables=True)
    check_names(frame.columns, "the table")
    content = io.BytesIO()
    if path.suffix.lower() == ".csv":
        frame.write_csv(content)
    else:
        frame.write_parquet(content)
    write_atomically(path, content.getvalue())


def _table(array: Tensor | ArrayLike) -> NDArray[Any]:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array
    rows = np.asarray(array)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype.kind not in "buif":
        raise InputError(
            f"`array` must be real numbers of shape (rows, columns); got {rows.dtype} of shape {rows.shape}. "
            "Flatten it: array.reshape(len(array), -1)."
        )
    # polars reads the machine's byte order only, and no floats of 16 bytes.
    dtype = np.dtype(np.float64) if rows.dtype.itemsize > 8 else rows.dtype.newbyteorder("=")
    return rows.astype(dtype, copy=False)


def check_destination(
    path: str | Path, *, overwrite: bool = False, tables: bool = False, images: bool = False,
    source: str | Path | None = None,
) -> None:  # fmt: skip
    """Raise what `write_rows`, or its fellow for tables or images, would of its path, before the work.

    Results about the rows of an AnnData file, `source`, may go to another such file.

    Example:
        >>> check_destination("codes.txt")
        Traceback (most recent call last):
        aevb.config.InputError: `codes.txt` must end in .npy, .csv, .parquet; got '.txt'. Choose one of these suffixes.
    """
    path = Path(path)
    annotated = source is not None and str(source).lower().endswith(SUFFIX)
    allowed = [suffix for suffix in _WRITERS if not tables or suffix != ".npy"]  # which holds numbers only
    allowed += [SUFFIX] if annotated else [".png"] if images else []
    if path.suffix.lower() not in allowed:
        raise InputError(
            f"`{path}` must end in {', '.join(allowed)}; got {path.suffix!r}. Choose one of these suffixes."
        )
    if os.path.isdir(path):
        raise InputError(f"`{path}` is a folder. Give the path of a file.")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"`{path}` exists already. A file is never overwritten unasked. Choose another name.")
    if not os.path.isdir(path.parent):
        raise InputError(f"`{path}` cannot be written: there is no folder `{path.parent}`. Create it first.")


def _npy(rows: NDArray[Any], names: list[str]) -> bytes:
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    return content.getvalue()


def _csv(rows: NDArray[Any], names: list[str]) -> bytes:
    if all(are_numbers(names)):
        raise InputError(
            "`columns` are all numbers, which a CSV reader takes for data. Give at least one name a letter."
        )
    content = io.BytesIO()
    _frame(rows, names).write_csv(content)
    return content.getvalue()


def _parquet(rows: NDArray[Any], names: list[str]) -> bytes:
    content = io.BytesIO()
    _frame(rows, names).write_parquet(content)
    return content.getvalue()


def _frame(rows: NDArray[Any], names: list[str]) -> Any:
    # Booleans are 0 and 1 everywhere here; half floats are no type of a table.
    if rows.dtype in (np.bool_, np.float16):
        rows = rows.astype(np.uint8 if rows.dtype == np.bool_ else np.float32)
    return polars().from_numpy(rows, schema=names, orient="row")


_WRITERS: dict[str, Callable[[NDArray[Any], list[str]], bytes]] = {
    ".npy": _npy,
    ".csv": _csv,
    ".parquet": _parquet,
}
