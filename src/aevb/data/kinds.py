"""Finding what each column of a table holds, with the reason in words; every choice can be overridden."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aevb.config import InputError, Kind
from aevb.data.files import listed, shown
from aevb.data.frames import Frame, at_row, form_of, formed, numbers_of, read_frame
from aevb.data.schema import KINDS, MAX_CATEGORIES, SET_ASIDE, Column, Schema
from aevb.data.tables import polars

if TYPE_CHECKING:
    import polars as pl

__all__ = ["find_schema"]

_LEVELS = 256
"""Most levels of a whole-number column that are told apart one by one."""
_FEW = 20
"""Text with so few different values is categorical however few the rows."""
_IDENTIFIER = re.compile(r"(^|[_\W])(id|index|key|uuid|guid)$|^(id|uuid|guid)[_\W]", re.IGNORECASE)


def find_schema(source: Any, overrides: Mapping[str, str] | None = None) -> Schema:
    """The kind of each column of a table, with its reason.

    - one value: `constant`; none: `empty`; two different values: `binary`
    - dates and times: `date`, continuous in days or seconds
    - text: `categorical` where values repeat, `identifier` where none does, else `text`
    - whole numbers: `identifier` where all differ and the name or their sequence says so; `count` where they start at 0
      and scatter as counts do (variance at least the mean) or are many; `ordinal` up to 256 levels; else `continuous`
    - other numbers: `positive` where they are and their logarithms are less skewed, else `continuous`

    Constant, empty, identifier and text columns are set aside: a model has no likelihood for them.

    Args:
        source: A CSV, Parquet or Arrow file, or a frame of polars, pyarrow or pandas.
        overrides: Kinds by column: one of the above, `ordinal:LOW:HIGH`, or `drop`.

    Raises:
        InputError: If the table cannot be read, a column holds cells of different forms, or an override does not fit.

    Example:
        >>> import polars as pl
        >>> frame = pl.DataFrame({"smokes": ["yes", "no", None, "no"], "height": [1.8, 1.65, 1.7, 1.59]})
        >>> [(column.name, column.kind) for column in find_schema(frame).columns]
        [('smokes', 'binary'), ('height', 'continuous')]
    """
    frame = source if isinstance(source, Frame) else read_frame(source)
    overrides = dict(overrides or {})
    if unknown := [name for name in overrides if name not in frame.table.columns]:
        raise InputError(f"{frame.where} has no column {listed(unknown)}; it has {listed(frame.table.columns)}.")
    return Schema(columns=tuple(_column(frame, name, overrides.get(name)) for name in frame.table.columns))


def _column(frame: Frame, name: str, wish: str | None) -> Column:
    kind = (wish or "").partition(":")[0]
    if wish is not None and (kind not in (*KINDS, *SET_ASIDE[1:]) or (":" in wish and kind != "ordinal")):
        raise InputError(
            f"Column `{shown(name)}` cannot be {wish!r}; its kind is one of {', '.join(KINDS)}, ordinal:LOW:HIGH, "
            "identifier, text or drop. Choose one of these."
        )
    if kind in ("drop", "text", "identifier", "empty"):
        return Column(name=name, kind=kind, reason="as told", dtype=_dtype(frame.table[name]))
    try:
        series = formed(frame, name)
    except InputError:
        if kind not in ("categorical", "binary"):
            raise
        series = formed(frame, name, as_text=True)
    found = _Found(frame.where, series)
    if wish is None:
        return found.judged()
    return found.told(kind, wish)


def _dtype(series: pl.Series) -> str:
    return str(series.dtype).partition("(")[0]


class _Found:
    """One column looked at."""

    def __init__(self, where: str, series: pl.Series) -> None:
        self.where, self.series, self.name = where, series, series.name
        self.form = form_of(series)
        self.known = series.drop_nulls()
        self.distinct = self.known.n_unique()

    def column(self, kind: str, reason: str, **more: Any) -> Column:
        """The result."""
        return Column(name=self.name, kind=kind, reason=reason, dtype=_dtype(self.series), **more)

    def judged(self) -> Column:
        """By its values."""
        n, u = len(self.known), self.distinct
        if n == 0:
            return self.column("empty", "no value at all")
        if u == 1:
            return self.column("constant", f"one value, {self._shown(self.known[0])}", values=self._values())
        if self.form in ("date", "datetime"):
            numbers_of(self.where, self.series)
            unit = "days" if self.form == "date" else "seconds"
            return self.column("date", f"{self.form}s, modelled in {unit} from 1970-01-01")
        values = self._values() if self.series.dtype == polars().Enum else ()
        if 2 < len(values) <= MAX_CATEGORIES:
            return self.column("categorical", f"an enumeration of {len(values)} values", values=values)
        if u == 2:
            values = self._values()
            told = " and ".join(self._shown(value) for value in values)
            return self.column("binary", f"two values, {told}", values=values)
        return self._text(n, u) if self.form == "text" else self._number(n, u)

    def _text(self, n: int, u: int) -> Column:
        words = float(self.known.cast(polars().String).str.split(" ").list.len().mean())  # type: ignore[arg-type]
        if u == n and n > 2:
            if words > 3:
                return self.column("text", f"{n} texts of {words:.0f} words, all different")
            return self.column("identifier", f"{n} short texts, all different")
        if u <= min(MAX_CATEGORIES, max(_FEW, n // 2)):
            return self.column("categorical", f"text with {u} different values in {n} rows", values=self._values())
        why = f"more than {MAX_CATEGORIES}" if u > MAX_CATEGORIES else "most of them rare"
        return self.column("text", f"text with {u} different values in {n} rows, {why}")

    def _number(self, n: int, u: int) -> Column:
        pl = polars()
        if self.series.dtype.is_integer() and bool((self.known.cast(pl.Float64).abs() > 2**53).any()):
            return self.column("identifier", "whole numbers beyond 2**53, which no float tells apart")
        values = numbers_of(self.where, self.series).drop_nulls()
        low, high = float(values.min()), float(values.max())  # type: ignore[arg-type]
        if bool((values == values.round()).all()) and abs(low) < 2**53 and abs(high) < 2**53:
            return self._whole(values, n, u, int(low), int(high))
        if low > 0:
            plain, log = abs(_skewness(values)), abs(_skewness(values.log()))
            if plain > 1 and log < plain / 2:
                return self.column(
                    "positive", f"numbers above 0, less skewed as logarithms ({log:.1f} against {plain:.1f})"
                )
        return self.column("continuous", f"numbers with fractions, {u} different values from {low:g} to {high:g}")

    def _whole(self, values: pl.Series, n: int, u: int, low: int, high: int) -> Column:
        if u == n > 2:
            if _IDENTIFIER.search(self.name):
                return self.column("identifier", f"{n} whole numbers, all different, named like an identifier")
            if n >= _FEW and high - low == n - 1 and values.diff().drop_nulls().abs().max() == 1:
                return self.column("identifier", "whole numbers that only number the rows")
        told = f"whole numbers from {low} to {high}"
        levels = high - low + 1
        mean, variance = float(values.mean()), float(values.var() or 0.0)  # type: ignore[arg-type]
        if low == 0 and variance >= mean:
            return self.column("count", f"{told} that scatter as counts do (mean {mean:.1f}, variance {variance:.1f})")
        if levels <= _LEVELS:
            return self.column("ordinal", f"{told}, {u} of {levels} levels seen", low=low, high=high)
        if low >= 0:
            return self.column("count", f"{told}, too many for levels")
        return self.column("continuous", f"{told}, too many for levels, and negative")

    def told(self, kind: str, wish: str) -> Column:
        """By a wish, if the values allow it."""
        if not len(self.known):
            raise InputError(f"{self.where}, column `{shown(self.name)}` has no value to be {wish}. Drop it.")
        if kind in ("binary", "categorical"):
            most, values = 2 if kind == "binary" else MAX_CATEGORIES, self._values()
            if not 2 <= len(values) <= most:
                raise InputError(
                    f"{self.where}, column `{shown(self.name)}` has {len(values)} different values; {kind} columns "
                    f"have {'2' if most == 2 else f'2 to {most}'}. Join rare values into one, or call it text or drop."
                )
            return self.column(kind, "as told", values=values)
        if kind == "date":
            if self.form not in ("date", "datetime"):
                row = int(self.series.is_not_null().arg_true()[0])
                raise at_row(
                    self.where, self.name, row, self.series[row], "is no date", "Write dates as 2024-12-31, or choose "
                    "another kind.",
                )  # fmt: skip
            return self.column(kind, "as told")
        if self.form not in ("number", "boolean"):
            row = int(self.series.is_not_null().arg_true()[0])
            raise at_row(
                self.where, self.name, row, self.series[row], f"is no number, which {kind} columns need",
                "Mend it, or choose another kind.",
            )  # fmt: skip
        return self._told_number(kind, wish)

    def _told_number(self, kind: str, wish: str) -> Column:
        values = numbers_of(self.where, self.series)
        more = {}
        if kind == "ordinal":
            if ":" in wish:
                spelt = Kind.parse(wish)
                more = {"low": spelt.low, "high": spelt.high}
            else:
                more = {"low": int(values.min()), "high": int(values.max())}  # type: ignore[arg-type]
                if self.distinct < 2:
                    raise InputError(
                        f"{self.where}, column `{shown(self.name)}` has one value, and no order can be seen in it. "
                        "Drop it, or write ordinal:LOW:HIGH."
                    )
        check_numbers(self.where, self.name, values, kind, more.get("low"), more.get("high"))
        if kind in ("continuous", "positive") and self.distinct < 2:
            raise InputError(
                f"{self.where}, column `{shown(self.name)}` has one value, and the scale of a {kind} column would go "
                "to zero. Drop it."
            )
        return self.column(kind, "as told", **more)

    def _values(self) -> tuple[Any, ...]:
        """Different values in order; a frame's enumeration tells its own, the unseen ones, too."""
        pl = polars()
        if self.series.dtype == pl.Enum and self.distinct > 1:
            return tuple(self.series.dtype.categories.to_list())  # type: ignore[attr-defined]
        known = self.known
        if known.dtype in (pl.Date, pl.Datetime):
            return (str(known[0]),)
        if self.form == "number":
            known = numbers_of(self.where, known)
        values = known.unique().sort().to_list()
        whole = self.form == "number" and all(value == int(value) for value in values)
        return tuple(int(value) for value in values) if whole else tuple(values)

    def _shown(self, value: Any) -> str:
        return shown(repr(value) if isinstance(value, str) else str(value))


def check_numbers(
    where: str, name: str, values: pl.Series, kind: str, low: int | None = None, high: int | None = None
) -> None:
    """Raise unless a column's numbers are values of its kind."""
    rules = {
        "count": ((values < 0) | (values != values.round()), "is no count: counts are whole numbers from 0"),
        "ordinal": (values != values.round(), "is no whole number"),
        "positive": (values <= 0, "is not above 0"),
    }
    bad, fault = rules.get(kind, (values.is_null() & False, ""))
    if not bad.any() and low is not None and high is not None:
        bad, fault = (values < low) | (values > high), f"lies out of the column's levels, {low} to {high}"
    if bad.any():
        row = int(bad.fill_null(False).arg_true()[0])
        raise at_row(where, name, row, values[row], fault, "Mend it, leave it empty, or choose another kind.")


def _skewness(values: pl.Series) -> float:
    return float(values.skew() or 0.0)
