"""Tables of any kind of column: files and data frames in, polars columns with one of five forms out.

The forms are number, boolean, text, date and datetime. Cells of a CSV file have the form that all of them fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.config import InputError
from aevb.data.files import MISSING, parsing, shown
from aevb.data.tables import check_names, csv_cells, parquet_frame, polars

if TYPE_CHECKING:
    import polars as pl

__all__ = ["SUFFIXES", "Frame", "at_row", "form_of", "formed", "numbers_of", "read_frame"]

SUFFIXES = (".csv", ".parquet", ".arrow", ".feather", ".ipc")
"""Files that hold tables with named columns."""

_DATE = r"^\d{4}-\d{2}-\d{2}$"
_TIME = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?$"
_CODE = r"^0\d"  # numbers are not written with leading zeros; postal codes are


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A table as it was given."""

    where: str  # how an error names it
    table: pl.DataFrame  # cells of a CSV file as text, None where missing
    cells: bool  # whether columns are text whose form is to be found
    named: bool = True  # whether the names stand in the table; else they were made up


def read_frame(source: Any, may_lack: str = "") -> Frame:
    """A table from a CSV, Parquet or Arrow file, or from a frame of polars, pyarrow or pandas.

    If it is without the column `may_lack`, it gets one without any value.

    Raises:
        InputError: If it cannot be read, has no rows or columns, or names are missing or doubled.
    """
    pl = polars()
    if isinstance(source, str | Path):
        path = Path(source)
        where, suffix = f"`{path}`", path.suffix.lower()
        if suffix not in SUFFIXES:
            raise InputError(f"{where} is no table: it must end in {', '.join(SUFFIXES)}. Save it in one of them.")
        named = True
        if suffix == ".csv":
            table, named = csv_cells(path)
            stripped = pl.all().str.strip_chars()
            table = table.select(pl.when(stripped.is_in(MISSING)).then(None).otherwise(stripped).name.keep())
        else:
            table = parquet_frame(path)
        frame = Frame(where=where, table=table, cells=suffix == ".csv", named=named)
    else:
        frame = Frame(where="the table", table=_from_object(source), cells=False)
    if 0 in frame.table.shape:
        raise InputError(
            f"{frame.where} has {frame.table.height} rows and {frame.table.width} columns; at least one of each is "
            "needed. Write it again."
        )
    check_names(frame.table.columns, frame.where)
    if may_lack and may_lack not in frame.table.columns:
        return replace(frame, table=frame.table.with_columns(pl.lit(None, dtype=pl.String).alias(may_lack)))
    return frame


def _from_object(source: Any) -> pl.DataFrame:
    pl = polars()
    if isinstance(source, pl.DataFrame):
        made = source
        return made  # type: ignore[no-any-return]
    with parsing("the table", "a data frame"):
        if hasattr(source, "__arrow_c_stream__") and type(source).__module__.partition(".")[0] != "pandas":
            made = pl.DataFrame(source)
            return made  # type: ignore[no-any-return]
        try:
            import narwhals as nw
        except ImportError:
            raise InputError("pandas frames need narwhals, which is not installed: pip install narwhals.") from None
        check_names([str(name) for name in getattr(source, "columns", ())], "the table")
        given = nw.from_native(source, eager_only=True)
        columns = []
        for name in given.columns:
            cells = zip(given[name].to_list(), given[name].is_null().to_list(), strict=True)
            values = [None if gone or cell != cell else cell for cell, gone in cells]
            try:
                made = pl.Series(str(name), values, strict=True)
                columns.append(made.cast(pl.Categorical) if given[name].dtype == nw.Categorical else made)
            except TypeError:
                raise _mixed("the table", str(name), values) from None
        made = pl.DataFrame(columns)
    return made  # type: ignore[no-any-return]


def _mixed(where: str, name: str, values: list[Any]) -> InputError:
    known = [(row, value) for row, value in enumerate(values) if value is not None]
    row, value = next((row, value) for row, value in known if type(value) is not type(known[0][1]))
    return at_row(
        where, name, row, value, f"is {type(value).__name__} where row {known[0][0]} has {type(known[0][1]).__name__}",
        "Give the column one type.",
    )  # fmt: skip


def at_row(where: str, name: str, row: int, value: Any, fault: str, remedy: str) -> InputError:
    """The error about one cell."""
    return InputError(f"{where}, column `{shown(name)}`: {shown(repr(value))} in row {row} {fault}. {remedy}")


def form_of(series: pl.Series) -> str:
    """number, boolean, text, date or datetime; "" for what no table of ours holds."""
    pl = polars()
    dtype = series.dtype
    if dtype.is_numeric() or dtype == pl.Null:
        return "number"
    named = {pl.Boolean: "boolean", pl.Date: "date", pl.Datetime: "datetime"}
    text = dtype in (pl.String, pl.Categorical, pl.Enum)
    return "text" if text else next((form for each, form in named.items() if dtype == each), "")


def formed(frame: Frame, name: str, *, as_text: bool = False) -> pl.Series:
    """A column in the form that its cells have.

    Args:
        frame: The table.
        name: The column's.
        as_text: Leave cells of a CSV file as they are.

    Raises:
        InputError: If cells are of different forms, or no table of ours holds such.
    """
    pl = polars()
    series = frame.table[name]
    if not frame.cells:
        if not form_of(series):
            raise InputError(
                f"{frame.where}, column `{shown(name)}` is of type {series.dtype}; columns are numbers, booleans, "
                "text, dates or times. Convert it, or leave it out."
            )
        if series.dtype.is_float():
            return series.fill_nan(None)
        if series.dtype == pl.Categorical:  # as an enumeration of what it holds
            text = series.cast(pl.String)
            return text.cast(pl.Enum(text.drop_nulls().unique().sort()))
        return series
    if as_text or series.null_count() == len(series):
        return series
    forms = _forms(series)
    found = forms.drop_nulls().value_counts(sort=True)["forms"].to_list()
    if set(found) == {"date", "datetime"}:
        found = ["datetime"]
    if len(found) == 1:
        return _cast(frame.where, series, found[0])
    text = forms == "text"
    if text.sum() * 2 >= len(forms.drop_nulls()):
        return series
    usual = next(form for form in found if form != "text")
    row = int(((forms != usual) & forms.is_not_null()).arg_true()[0])
    raise at_row(
        frame.where, name, row, series[row], f"is {forms[row]} where most cells are {usual}",
        "Mend it, leave it empty, or call the column categorical.",
    )  # fmt: skip


def _forms(series: pl.Series) -> pl.Series:
    """The form of each cell; None where it is missing."""
    pl = polars()
    cell = pl.col(series.name)
    number = cell.cast(pl.Float64, strict=False).is_not_null() & ~cell.str.contains(_CODE)
    decided = (
        pl.when(cell.is_null()).then(None)
        .when(number).then(pl.lit("number"))
        .when(cell.str.to_lowercase().is_in(["true", "false"])).then(pl.lit("boolean"))
        .when(cell.str.contains(_DATE)).then(pl.lit("date"))
        .when(cell.str.contains(_TIME)).then(pl.lit("datetime"))
        .otherwise(pl.lit("text"))
    )  # fmt: skip
    return series.to_frame().select(decided.alias("forms"))["forms"]


def _cast(where: str, series: pl.Series, form: str) -> pl.Series:
    """Cells that all have a form, in it."""
    pl = polars()
    if form == "number":
        whole = series.drop_nulls().str.contains(r"^[+-]?\d+$").all()
        made = series.cast(pl.Int64, strict=False) if whole else None
        if made is None or made.null_count() > series.null_count():
            made = series.cast(pl.Float64)
        return made
    if form == "boolean":
        return series.str.to_lowercase() == "true"
    if form == "date":
        made = series.str.to_date("%Y-%m-%d", strict=False)
    elif form == "datetime":
        text = series.str.replace("T", " ").str.replace(_DATE, "${0} 00:00:00").str.replace(r"(\d{2}:\d{2})$", "${1}")
        text = text.str.replace(r"^(\S+ \d{2}:\d{2})$", "${1}:00")
        made = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us")
    else:
        return series
    if len(lost := (made.is_null() & series.is_not_null()).arg_true()):
        row = int(lost[0])
        raise at_row(where, series.name, row, series[row], f"is no {form}", "Mend it, or leave it empty.")
    return made


_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # 0001-01-01 and 9999-12-31 in days from 1970-01-01


def numbers_of(where: str, series: pl.Series) -> pl.Series:
    """A column that is no text in float64: dates as days from 1970-01-01, times as seconds, those with zones in UTC.

    Raises:
        InputError: For what is infinite, beyond 2**53, or a date out of the years 1 to 9999.
    """
    pl = polars()
    form = form_of(series)
    if form == "date":
        values, day = series.to_physical().cast(pl.Float64), 1
    elif form == "datetime":
        # Divided by numpy: polars multiplies by the rounded reciprocal, and loses the last microsecond.
        seconds = series.dt.epoch("us").cast(pl.Float64).to_numpy() / 1e6
        values, day = pl.Series(series.name, seconds).fill_nan(None), 86_400
    else:
        values, day = series.cast(pl.Float64), 0
    off = values.is_infinite()
    if off.any():
        row = int(off.arg_true()[0])
        raise at_row(where, series.name, row, values[row], "is infinite", "Replace it, or leave it empty.")
    if day and len(
        off := ((values < _FIRST_DAY * day) | (values >= (_LAST_DAY + 1) * day)).fill_null(False).arg_true()
    ):
        row = int(off[0])
        raise InputError(
            f"{where}, column `{shown(series.name)}`: the date in row {row} lies out of the years 1 to 9999. "
            "Mend it, or leave it empty."
        )
    if series.dtype.is_integer() and len(off := (values.abs() > 2**53).fill_null(False).arg_true()):
        row = int(off[0])
        raise at_row(
            where, series.name, row, series[row], "is beyond 2**53, where no float tells whole numbers apart",
            "Divide the column, or drop it if it holds identifiers.",
        )  # fmt: skip
    return values.fill_nan(None)
