"""Tables of numbers: CSV and Parquet, parsed by polars; a hole is NaN."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aevb.config import InputError
from aevb.data.files import MISSING, Part, opened, parsing, shown

if TYPE_CHECKING:
    import polars as pl

__all__ = ["are_numbers", "check_names", "csv_cells", "numbers", "parquet_frame", "polars", "read_csv", "read_parquet"]

_LARGEST_WHOLE = 2**53  # up to here float64 tells every whole number from the next


def polars() -> Any:
    """The module, imported when a table is first read or written.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import polars as pl
    except ImportError:
        raise InputError("Tables need polars, which is not installed. Install it: pip install 'aevb[apps]'.") from None
    return pl


def check_names(names: Sequence[str], where: str) -> None:
    """Names must be there, and differ.

    Raises:
        InputError: If they do not.
    """
    if "" in names:
        raise InputError(
            f"{where}: column {names.index('')} (counting from 0) has no name; every column needs one. "
            "Name it, or remove it if it only numbers the rows (pandas: to_csv(path, index=False))."
        )
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError(
            f"{where} has the column name `{shown(doubled[0])}` more than once; names must differ. Rename one."
        )


def read_csv(path: Path) -> Part:
    """A table whose first line names the columns, or, if that line is all numbers, is data like the rest.

    Returns:
        Values `(N, P)` in float64, NaN where a cell is one of `MISSING`; `true` and `false` count as 1 and 0.

    Raises:
        InputError: If a cell is text, or the lines differ in length.
    """
    where = f"`{path}`"
    frame, named = csv_cells(path)
    values = _stack([_numbers(series, series.name, where) for series in frame])
    return Part(where=where, values=values, columns=tuple(frame.columns), named=named)


def csv_cells(path: Path) -> tuple[pl.DataFrame, bool]:
    """Cells as text under their names, and whether the first line names the columns; without, they are x1, x2, ...

    Raises:
        InputError: If the lines differ in length, or names are missing or doubled.
    """
    pl, where = polars(), f"`{path}`"
    with opened(path) as file, parsing(where, "a CSV file in UTF-8"):
        content = _plain_lines(file.read())
        first, lines = _check_lines(content, where)
        frame = pl.read_csv(io.BytesIO(content), has_header=False, infer_schema=False)
        if frame.shape != (lines, len(first)):
            raise ValueError("its quotation marks do not pair")
    named = not _is_data(first)
    columns = tuple(first) if named else tuple(f"x{j + 1}" for j in range(len(first)))
    check_names(columns, where)
    frame.columns = list(columns)
    return frame[int(named) :], named


def _plain_lines(content: bytes) -> bytes:
    """Without byte-order mark and blank lines at the end; every line ended by one byte, whichever system wrote it."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content.rstrip(b"\n")


def _check_lines(content: bytes, where: str) -> tuple[list[str], int]:
    """The first line's cells and the number of rows; polars fills short lines silently, and cannot name long ones."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8", newline=""), strict=True)
    first = [cell.strip() for cell in next(reader, [])]
    if not first:
        raise InputError(f"{where} starts with a blank line; the first line must name the columns. Remove it.")
    count = 1
    for cells in reader:
        count += 1
        # In a table of one column a blank line is a cell that is missing.
        if len(cells) != len(first) and (cells or len(first) > 1):
            raise InputError(
                f"{where}, line {reader.line_num}: {len(cells)} cells where the first line has {len(first)}; all lines "
                "must have equally many, separated by commas. Mend that line, or leave a missing cell empty."
            )
    return first, count


def are_numbers(cells: Sequence[str]) -> list[bool]:
    """Which cells of a CSV file read as numbers."""
    pl = polars()
    read = pl.Series(cells, dtype=pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    return list(read.is_not_null())


def _is_data(first: list[str]) -> bool:
    observed = [number for number, cell in zip(are_numbers(first), first, strict=True) if cell not in MISSING]
    return bool(observed) and all(observed)


def _numbers(cells: pl.Series, name: str, where: str) -> NDArray[Any]:
    pl = polars()
    text = cells.str.strip_chars()
    read = text.cast(pl.Float64, strict=False)
    values: NDArray[Any] = read.fill_null(np.nan).to_numpy()
    unread = read.is_null() & text.is_not_null() & ~text.is_in(MISSING)
    if not unread.any():
        return values
    words = text.str.to_lowercase()
    if len(texts := (unread & ~words.is_in(("true", "false"))).arg_true()):
        raise _text(where, name, text[texts[0]], texts[0])
    return np.where(unread.to_numpy(), (words == "true").fill_null(False).to_numpy(), values)


def _text(where: str, name: str, value: object, row: int) -> InputError:
    return InputError(
        f"{where}, column `{shown(name)}`: '{shown(str(value))}' in row {row} (counting from 0) is not a number; all "
        "columns must be numeric, cells separated by commas, missing ones empty, NA, NaN, null or ?. "
        "Remove the column, or code its categories as numbers or as one 0/1 column each."
    )


def _stack(columns: list[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(columns, axis=1) if columns else np.empty((0, 0))


def read_parquet(path: Path) -> Part:
    """A Parquet table of numbers and booleans; null is NaN.

    Returns:
        Values `(N, P)` in float64.

    Raises:
        InputError: If a column is neither, or holds whole numbers too large for float64.
    """
    where, frame = f"`{path}`", parquet_frame(path)
    return Part(where=where, values=numbers(frame, where), columns=tuple(frame.columns), named=True)


def numbers(frame: pl.DataFrame, where: str) -> NDArray[Any]:
    """A frame's entries, `(N, P)`, null as NaN: bytes and float32 where all columns are, else float64.

    Raises:
        InputError: As `read_parquet`.
    """
    pl = polars()
    kinds = set(frame.dtypes)
    if kinds == {pl.Float32} or (kinds == {pl.UInt8} and not frame.null_count().sum_horizontal().item()):
        return frame.to_numpy(writable=True)
    return _stack([_column(series, where) for series in frame])


def parquet_frame(path: Path) -> pl.DataFrame:
    """The table in a Parquet or Arrow (Feather) file, as it is.

    Raises:
        InputError: If it cannot be read.
    """
    pl = polars()
    form, read = ("Parquet", pl.read_parquet) if path.suffix.lower() == ".parquet" else ("an Arrow file", pl.read_ipc)
    with opened(path) as file, parsing(f"`{path}`", form):
        try:
            # Read from memory: polars expands * and [ in paths.
            frame = read(io.BytesIO(file.read()))
            return frame  # type: ignore[no-any-return]
        except pl.exceptions.PanicException as error:  # not an Exception
            raise ValueError(str(error)) from None


def _column(series: pl.Series, where: str) -> NDArray[Any]:
    pl = polars()
    if not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null)):
        seen = series.is_not_null().arg_true()
        row = int(seen[0]) if len(seen) else 0
        raise _text(where, series.name, series[row] if len(seen) else f"type {series.dtype}", row)
    extremes: list[Any] = [series.min(), series.max()] if series.dtype.is_integer() else []
    if any(abs(v) > _LARGEST_WHOLE for v in extremes if v is not None):
        raise InputError(
            f"{where}, column `{shown(series.name)}` has whole numbers beyond 2**53, which no float tells apart. "
            "Remove the column if it holds identifiers; else divide it."
        )
    values: NDArray[Any] = series.cast(pl.Float64).fill_null(np.nan).to_numpy()
    return values
