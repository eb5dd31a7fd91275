"""A table as numbers, one a column, and numbers as a table again: types and names of categories restored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aevb.config import InputError
from aevb.data.files import listed
from aevb.data.frames import Frame, at_row, form_of, formed, numbers_of, read_frame
from aevb.data.kinds import check_numbers
from aevb.data.schema import Column, Schema
from aevb.data.tables import polars

if TYPE_CHECKING:
    import polars as pl

__all__ = ["decode", "encode", "widened"]

_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # 0001-01-01 and 9999-12-31


def encode(schema: Schema, source: Any) -> NDArray[np.float64]:
    """The modelled columns of a table as numbers.

    Columns are matched by name, whatever their order. Those that are set aside may be there or not.

    Args:
        schema: What the columns hold.
        source: A CSV, Parquet or Arrow file, or a frame of polars, pyarrow or pandas.

    Returns:
        `(N, P)`: codes of categories, days of dates, seconds of times (to a microsecond until 2106), numbers as they
        are; NaN where missing.

    Raises:
        InputError: If a column is missing or unknown, or a cell is no value of its column; it names the row.

    Example:
        >>> import polars as pl
        >>> column = Column(name="smokes", kind="binary", reason="", dtype="String", values=("no", "yes"))
        >>> encode(Schema(columns=(column,)), pl.DataFrame({"smokes": ["yes", None]}))
        array([[ 1.],
               [nan]])
    """
    frame = source if isinstance(source, Frame) else read_frame(source)
    names = frame.table.columns
    if missing := [name for name in schema.names if name not in names]:
        raise InputError(
            f"{frame.where} lacks the columns {listed(missing)}; the model needs all {len(schema.names)} it was "
            "trained on. Add them, empty if they were not observed."
        )
    known = {column.name for column in schema.columns}
    if extra := [name for name in names if name not in known]:
        raise InputError(f"{frame.where} has the columns {listed(extra)}, unknown to the model. Remove them.")
    return np.stack([_numbers(frame, column) for column in schema.modelled], axis=1)


def _numbers(frame: Frame, column: Column) -> NDArray[np.float64]:
    pl = polars()
    name, texts = column.name, any(isinstance(value, str) for value in column.values)
    series = formed(frame, name, as_text=texts)
    if texts:
        if form_of(series) != "text" and series.null_count() < len(series):
            raise _wrong(frame, column, series, "text")
        values = _codes(frame.where, column, series.cast(pl.String))
    elif series.null_count() == len(series):
        return np.full(len(series), math.nan)
    else:
        form = form_of(series)
        wanted = {"Date": ("date",), "Datetime": ("datetime", "date")}.get(column.dtype, ("number", "boolean"))
        if form not in wanted:
            raise _wrong(frame, column, series, wanted[0])
        if column.dtype == "Datetime" and form == "date":
            series = series.cast(pl.Datetime("us"))
        values = numbers_of(frame.where, series)
        if column.values:
            values = _codes(frame.where, column, values)
        else:
            check_numbers(frame.where, name, values, column.kind, column.low, column.high)
    found: NDArray[np.float64] = values.cast(pl.Float64).fill_null(math.nan).to_numpy()
    return found


def _wrong(frame: Frame, column: Column, series: pl.Series, wanted: str) -> InputError:
    row = int(series.is_not_null().arg_true()[0])
    return at_row(
        frame.where, column.name, row, series[row], f"is no {wanted}, which this column held in training",
        "Mend the column, or leave it empty.",
    )  # fmt: skip


def _codes(where: str, column: Column, series: pl.Series) -> pl.Series:
    pl = polars()
    old = pl.Series(list(column.values), dtype=series.dtype, strict=False)
    codes = series.replace_strict(old, list(range(len(old))), default=None, return_dtype=pl.Float64)
    if len(unseen := (codes.is_null() & series.is_not_null()).arg_true()):
        row = int(unseen[0])
        raise at_row(
            where, column.name, row, series[row],
            f"is none of the {len(old)} values of this column in training, {listed([str(v) for v in column.values])}",
            "Mend it, leave it empty, or train again with it.",
        )  # fmt: skip
    return codes


def widened(values: NDArray[Any]) -> NDArray[np.float64]:
    """Numbers in float64; those of float32 as the shortest decimals that mean them, 0.1 as 0.1.

    Example:
        >>> float(widened(np.array([0.1], dtype=np.float32))[0])
        0.1
    """
    if values.dtype != np.float32:
        return values.astype(np.float64)
    return values.astype(str).astype(np.float64)


def decode(schema: Schema, x: NDArray[Any], beside: pl.DataFrame | None = None) -> pl.DataFrame:
    """Numbers as a table with the types and names it was read with.

    Whole-number columns are rounded, codes of categories are named, constant columns get their value; an ordinal stays
    within its levels, a count and a date within what there is.

    Args:
        schema: What the columns hold.
        x: `(N, P)`, the modelled columns; NaN for missing.
        beside: Where the columns that are set aside come from, N rows; without, they are left out, but constant ones.

    Returns:
        The table, in the order of the schema.

    Example:
        >>> column = Column(name="smokes", kind="binary", reason="", dtype="String", values=("no", "yes"))
        >>> decode(Schema(columns=(column,)), np.array([[1.0], [np.nan]])).to_dict(as_series=False)
        {'smokes': ['yes', None]}
    """
    pl = polars()
    if x.ndim != 2 or x.shape[1] != len(schema.names):
        raise InputError(
            f"`x` must be (rows, {len(schema.names)}), a column for each of {listed(schema.names)}; got {x.shape}."
        )
    position = {name: j for j, name in enumerate(schema.names)}
    columns = []
    for column in schema.columns:
        if column.name in position:
            columns.append(_restored(column, widened(x[:, position[column.name]])))
        elif beside is not None and column.name in beside.columns:
            columns.append(beside[column.name])
        elif column.kind == "constant" and beside is None:
            value = pl.Series(column.name, [column.values[0]])
            if column.dtype in ("Date", "Datetime"):
                value = value.str.to_datetime(time_unit="us")
            value = value.cast(_type(column), strict=False)
            columns.append(value.new_from_index(0, len(x)))
    return pl.DataFrame(columns)  # type: ignore[no-any-return]


def _type(column: Column) -> Any:
    pl = polars()
    if column.dtype in ("Enum", "Categorical"):
        return pl.Enum([str(value) for value in column.values])
    if column.dtype == "Datetime":
        return pl.Datetime("us")
    return getattr(pl, column.dtype, pl.Float64)


def _restored(column: Column, values: NDArray[np.float64]) -> pl.Series:
    pl = polars()
    dtype, missing = _type(column), np.isnan(values)
    if column.values:
        codes = np.where(missing, 0, values).round().clip(0, len(column.values) - 1).astype(int)
        named = [None if gone else column.values[code] for code, gone in zip(codes, missing, strict=True)]
        made = pl.Series(column.name, named, strict=False).cast(dtype, strict=False)
        return made  # type: ignore[no-any-return]
    series = pl.Series(column.name, values).fill_nan(None)
    if column.kind == "ordinal":
        series = series.round().clip(column.low, column.high)
    elif column.kind == "count":
        series = series.round().clip(0)
    if column.dtype == "Date":
        return series.round().clip(_FIRST_DAY, _LAST_DAY).cast(pl.Int32).cast(pl.Date)  # type: ignore[no-any-return]
    if column.dtype == "Datetime":
        seconds = series.clip(_FIRST_DAY * 86_400, _LAST_DAY * 86_400)
        return (seconds * 1e6).round().cast(pl.Int64).cast(dtype)  # type: ignore[no-any-return]
    if dtype.is_integer():
        # One step inside: as floats, the ends of 64 bits round to what 64 bits do not hold.
        low, high = _ends(dtype)
        return series.round().clip(low, high).cast(dtype)  # type: ignore[no-any-return]
    return series.cast(dtype)  # type: ignore[no-any-return]


def _ends(dtype: Any) -> tuple[float, float]:
    bits, signed = int(str(dtype).lstrip("UInt")), not str(dtype).startswith("U")
    high = min(2.0 ** (bits - signed) - 1, 2.0**53)
    return (-min(2.0 ** (bits - 1), 2.0**53) if signed else 0.0), high
