"""Tables of any kind of column: what is found in them, numbers there and back, and one sentence for each mistake."""

from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aevb.config import InputError
from aevb.data import Column, Schema, decode, encode, find_schema, load_table

NAN = math.nan


def put(folder: Path, text: str) -> Path:
    path = folder / "a.csv"
    path.write_text(text)
    return path


def column(series: pl.Series | list, kind: str | None = None) -> Column:
    overrides = None if kind is None else {"x": kind}
    return find_schema(pl.DataFrame({"x": series}), overrides).columns[0]


RNG = np.random.default_rng(0)
FOUND = {
    "constant": [[4, 4, None], ["a", "a"], [True, True]],
    "empty": [[None, None], [NAN, NAN]],
    "binary": [[0, 1, 1, None], ["no", "yes", "no"], [True, False], [1.5, 2.5, 2.5]],
    "categorical": [["a", "b", "c"] * 5, [f"town {i % 40}" for i in range(200)]],
    "identifier": [
        [f"P{i}" for i in range(30)], list(range(100, 150)), list(range(50, 0, -1)), [2**60 + i for i in range(9)],
    ],
    "text": [[f"the patient {i} feels better today" for i in range(30)], [f"town {i // 2}" for i in range(3000)]],
    "count": [RNG.poisson(3.0, 400) * RNG.integers(1, 4, 400), RNG.integers(0, 5000, 100)],
    "ordinal": [RNG.integers(1, 6, 100), RNG.integers(17, 91, 200), RNG.normal(size=90).round()],
    "continuous": [RNG.normal(size=100), RNG.normal(100, 10, 100), RNG.integers(-5000, 5000, 100)],
    "positive": [RNG.lognormal(0, 1.5, 300)],
    "date": [[dt.date(2020, 1, i) for i in range(1, 20)], [dt.datetime(2020, 1, 1, i) for i in range(20)]],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "values"), [(kind, values) for kind, each in FOUND.items() for values in each])
def test_kinds_are_found_with_a_reason(kind, values):
    found = column(values)
    assert found.kind == kind, found.reason
    assert found.reason
    assert (found.model_kind is None) == (kind in ("constant", "empty", "identifier", "text"))


def test_declared_categories_are_categories():
    found = column(pl.Series(["c", "a", None, "b"], dtype=pl.Categorical))
    assert (found.kind, found.values) == ("categorical", ("a", "b", "c"))
    found = column(pl.Series(["lo", "hi", "hi"], dtype=pl.Enum(["lo", "mid", "hi"])))
    assert (found.kind, found.values) == ("categorical", ("lo", "mid", "hi"))


def test_numbers_by_name_are_identifiers():
    frame = pl.DataFrame({"patient_id": [17, 3, 99, 41], "ward": [17, 3, 99, 41]})
    assert [found.kind for found in find_schema(frame).columns] == ["identifier", "ordinal"]


def test_cells_of_a_csv_file_have_the_form_that_all_fit(tmp_path):
    path = put(
        tmp_path,
        "n,f,b,d,t,zip,s\n1,1.5,true,2020-01-31,2020-01-31T12:30,01234,a b\n"
        "2,2,FALSE,1999-12-01,1999-12-01 00:00:01.25,99999,7\nNA,,?,null,,,\n",
    )
    found = {each.name: (each.kind, each.dtype) for each in find_schema(path).columns}
    assert found == {
        "n": ("binary", "Int64"), "f": ("binary", "Float64"), "b": ("binary", "Boolean"), "d": ("date", "Date"),
        "t": ("date", "Datetime"), "zip": ("binary", "String"), "s": ("binary", "String"),
    }  # fmt: skip
    schema = find_schema(path)
    x = encode(schema, path)
    assert np.isnan(x[2]).all()
    assert x[0, 3] == (dt.date(2020, 1, 31) - dt.date(1970, 1, 1)).days
    back = decode(schema, x)
    assert back["t"].to_list() == [dt.datetime(2020, 1, 31, 12, 30), dt.datetime(1999, 12, 1, 0, 0, 1, 250_000), None]
    assert back["b"].to_list() == [True, False, None]
    assert back["zip"].to_list() == ["01234", "99999", None]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_files_and_frames_tell_the_same(tmp_path, suffix):
    frame = pl.DataFrame(
        {"a": [1.5, None, 2.25, 9.0], "b": ["x", "y", "x", "z"], "c": [dt.date(2000, 1, 1)] * 3 + [None]}
    )
    frame = frame.with_columns(pl.Series("c", [dt.date(2000, 1, i + 1) for i in range(4)]))
    path = tmp_path / f"a.{suffix}"
    (frame.write_parquet if suffix == "parquet" else frame.write_ipc)(path)

    class Arrow:  # as pyarrow's tables are
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return frame.__arrow_c_stream__(requested_schema)

    schema = find_schema(frame, {"b": "categorical"})
    for other in (path, Arrow()):
        assert find_schema(other, {"b": "categorical"}) == schema
        np.testing.assert_array_equal(encode(schema, other), encode(schema, frame))


def test_columns_are_matched_by_name_and_those_set_aside_may_be_absent():
    frame = pl.DataFrame(
        {"id": [f"P{i}" for i in range(9)], "one": [1] * 9, "a": list(range(9)), "b": ["u", "v", "v"] * 3}
    )
    schema = find_schema(frame, {"a": "ordinal"})
    assert schema.names == ("a", "b")
    other = frame.select("b", "a")
    np.testing.assert_array_equal(encode(schema, other), encode(schema, frame))
    assert decode(schema, encode(schema, frame)).columns == ["one", "a", "b"]
    assert decode(schema, encode(schema, frame), frame).equals(frame)
    assert decode(schema, encode(schema, other), other).columns == ["a", "b"]


# -- there and back ----------------------------------------------------------------------------------------------------

WHOLE = st.integers(-(2**50), 2**50)
TIMES = st.datetimes(dt.datetime(1850, 1, 1), dt.datetime(2100, 1, 1))
SERIES = {
    pl.Int64: WHOLE, pl.Int8: st.integers(-128, 127), pl.UInt16: st.integers(0, 2**16 - 1),
    pl.Float64: st.floats(-1e15, 1e15), pl.Float32: st.floats(-(2.0**50), 2.0**50, width=32),
    pl.Boolean: st.booleans(), pl.String: st.text(max_size=4), pl.Date: st.dates(), pl.Datetime("us"): TIMES,
    pl.Enum(["lo", "mid", "hi"]): st.sampled_from(["lo", "mid", "hi"]),
}  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    rows = draw(st.integers(1, 12))
    columns = {}
    for j in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(list(SERIES)))
        cells = st.lists(st.none() | SERIES[dtype], min_size=rows, max_size=rows)
        columns[f"c{j}"] = pl.Series(draw(cells), dtype=dtype)
    return pl.DataFrame(columns)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables())
def test_tables_come_back_as_they_were(frame):
    """Values, types, names, holes; the mask is where the table has none."""
    schema = find_schema(frame)
    schema = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    if not schema.names:
        return
    x = encode(schema, frame)
    assert x.shape == (frame.height, len(schema.names))
    for j, name in enumerate(schema.names):
        assert np.isnan(x[:, j]).tolist() == frame[name].is_null().to_list()
    assert decode(schema, x, frame).equals(frame)
    alone = decode(schema, x)
    for name in schema.names:
        assert alone[name].dtype == frame[name].dtype
    none = decode(schema, np.full_like(x, NAN))
    assert all(none[name].null_count() == frame.height for name in schema.names)


@settings(max_examples=80, deadline=None)
@given(tables(), st.randoms())
def test_any_numbers_make_a_table_that_can_be_read_again(frame, random):
    """What a model may say, far out and between codes, is a value of each column."""
    schema = find_schema(frame)
    if not schema.names:
        return
    rng = np.random.default_rng(random.randrange(2**32))
    x = rng.normal(size=(20, len(schema.names))) * 10.0 ** rng.integers(0, 30, (20, 1))
    for j, each in enumerate(schema.modelled):
        if each.kind == "positive":
            x[:, j] = np.abs(x[:, j]) + 1e-3
    made = decode(schema, x)
    assert encode(schema, made).shape == x.shape


# -- a schema in a file ------------------------------------------------------------------------------------------------


def test_a_schema_is_saved_edited_and_loaded(tmp_path):
    schema = find_schema(pl.DataFrame({"a": ["x", "y", "z"] * 3, "b": list(range(1, 10))}), {"b": "ordinal:0:20"})
    path = tmp_path / "schema.json"
    schema.save(path)
    assert Schema.load(path) == schema
    with pytest.raises(InputError, match="exists already"):
        schema.save(path)
    content = json.loads(path.read_text())
    content["columns"][1] = {"name": "b", "kind": "count", "reason": "as told", "dtype": "Int64"}
    path.write_text(json.dumps(content))
    assert Schema.load(path).kinds == ("categorical:3", "count")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"kind": "number"}, "none of"),
        ({"kind": "binary"}, "0 values"),
        ({"kind": "categorical", "values": ["a", "a"]}, "different"),
        ({"kind": "ordinal"}, "low < high"),
        ({"kind": "ordinal", "low": 3, "high": 1}, "low < high"),
        ({"level": 3}, "level"),
    ],
)
def test_a_schema_that_is_none_is_told(tmp_path, edit, told):
    path = tmp_path / "schema.json"
    path.write_text(
        json.dumps({"format": 1, "columns": [{"name": "x", "kind": "count", "reason": "", "dtype": "Int64"} | edit]})
    )
    with pytest.raises(InputError, match=rf"cannot be read as a schema.*{told}"):
        Schema.load(path)


def test_files_that_are_no_schema(tmp_path):
    path = tmp_path / "schema.json"
    for text in ("{", "[]", '{"format": 2, "columns": []}', '{"columns": [3]}'):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot be read as a schema"):
            Schema.load(path)


# -- mistakes ----------------------------------------------------------------------------------------------------------

MANY = [f"c{i // 2}" for i in range(200_000)]
REFUSED = {
    "kind unknown": ({"x": [1, 2]}, "number", "cannot be 'number'"),
    "levels of a count": ({"x": [1, 2]}, "count:3", "cannot be 'count:3'"),
    "negative counts": ({"x": [1, 2, -3]}, "count", "-3.0 in row 2 is no count"),
    "float counts": ({"x": [1, 2.5]}, "count", "2.5 in row 1 is no count"),
    "fractions as levels": ({"x": [1, 2.5]}, "ordinal", "2.5 in row 1 is no whole number"),
    "beyond the levels": ({"x": [1, 2, 9]}, "ordinal:1:5", "9.0 in row 2 lies out of the column's levels, 1 to 5"),
    "one level": ({"x": [2, 2]}, "ordinal", "one value"),
    "one value": ({"x": [2.0, 2.0]}, "continuous", "one value"),
    "no value": ({"x": [None, None]}, "count", "no value"),
    "zero as positive": ({"x": [1.0, 0.0]}, "positive", "0.0 in row 1 is not above 0"),
    "text as number": ({"x": [None, "a"]}, "continuous", "'a' in row 1 is no number"),
    "numbers as dates": ({"x": [1, 2]}, "date", "is no date"),
    "three values as two": ({"x": [1, 2, 3]}, "binary", "3 different values"),
    "too many categories": ({"x": MANY}, "categorical", "100000 different values"),
    "infinite": ({"x": [1.0, 2.5, float("inf")]}, None, "inf in row 2 is infinite"),
    "lists": ({"x": [[1], [2]]}, None, "of type List"),
    "whole numbers too large": ({"x": [2**60, 1, 2**60, 5]}, "count", "beyond 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_do_not_fit_are_told(name):
    columns, kind, told = REFUSED[name]
    with pytest.raises(InputError, match=told) as caught:
        find_schema(pl.DataFrame(columns, strict=False), None if kind is None else {"x": kind})
    assert "`x`" in str(caught.value)
    assert "\n" not in str(caught.value)


CELLS = {
    "no rows": ("a,b\n", "0 rows"),
    "names doubled": ("a,a\n1,2\n", "more than once"),
    "names empty": ("a,\n1,2\n", "has no name"),
    "mixed types": ("a\n1\n2\n3\nseveral\n", "'several' in row 3 is text where most cells are number"),
    "mixed times": ("a\n1\n2020-01-01\n2\n", "'2020-01-01' in row 1 is date where most cells are number"),
    "no such day": ("a\n2020-01-01\n2020-02-30\n", "'2020-02-30' in row 1 is no date"),
    "no such year": ("a\n0000-01-01\n2020-02-20\n", "row 0"),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_that_are_wrong_are_told(tmp_path, name):
    text, told = CELLS[name]
    with pytest.raises(InputError, match=told):
        find_schema(put(tmp_path, text))


def test_a_column_of_mixed_cells_may_be_categorical(tmp_path):
    found = find_schema(put(tmp_path, "a,b\n1,x\n2,y\n2,z\n1,x\nmany,y\n"), {"a": "categorical"})
    assert found.columns[0].values == ("1", "2", "many")


def test_dates_out_of_range_are_told():
    far = pl.Series("x", [0, 10_000_000], dtype=pl.Int32).cast(pl.Date)
    with pytest.raises(InputError, match="the date in row 1 lies out of the years 1 to 9999"):
        find_schema(far.to_frame())


SCORED = {
    "a category never seen": ({"city": ["Rome", "Ulm"], "n": [1, 2]}, "column `city`: 'Ulm' in row 1 is none of the 3"),
    "a column missing": ({"city": ["Rome"]}, "lacks the columns `n`"),
    "a column too many": ({"city": ["Rome"], "n": [1], "m": [1]}, "has the columns `m`, unknown"),
    "a count below 0": ({"city": ["Rome"], "n": [-1]}, "column `n`: -1.0 in row 0 is no count"),
    "text for a count": ({"city": ["Rome"], "n": ["few"]}, "column `n`: 'few' in row 0 is no number"),
    "numbers for names": ({"city": [3], "n": [1]}, "column `city`: 3 in row 0 is no text"),
    "no rows": ({"city": [], "n": []}, "0 rows"),
}


@pytest.mark.parametrize("name", SCORED)
def test_rows_that_do_not_fit_a_schema_are_told(name):
    columns, told = SCORED[name]
    schema = find_schema(
        pl.DataFrame({"city": ["Rome", "Oslo", "Bern"], "n": [0, 3, 1]}), {"city": "categorical", "n": "count"}
    )
    with pytest.raises(InputError, match=told):
        encode(schema, pl.DataFrame(columns))


def test_a_column_may_be_missing_throughout_when_rows_are_scored():
    schema = find_schema(
        pl.DataFrame({"city": ["Rome", "Oslo", "Bern"], "n": [0, 3, 1]}), {"city": "categorical", "n": "count"}
    )
    x = encode(schema, pl.DataFrame({"city": [None, "Bern"], "n": [None, None]}))
    np.testing.assert_array_equal(x, [[NAN, NAN], [0, NAN]])


def test_columns_of_which_nothing_can_be_learned_are_told():
    schema = find_schema(pl.DataFrame({"x": [1.5, 2.5, 3.5], "n": [0, 1, 9]}))
    with pytest.raises(InputError, match="column `x` has one value"):
        load_table(pl.DataFrame({"x": [1.5, 1.5, None], "n": [0, 1, 9]}), schema)
    with pytest.raises(InputError, match="column `n` has no value at all"):
        load_table(pl.DataFrame({"x": [1.5, 2.5, None], "n": [None, None, None]}), schema)
    with pytest.raises(InputError, match="one row"):
        load_table(pl.DataFrame({"x": [1.5], "n": [3]}), schema)
    with pytest.raises(InputError, match="no column to model"):
        load_table(pl.DataFrame({"x": [1.5, 1.5]}), find_schema(pl.DataFrame({"x": [1.5, 1.5]})))


def test_pandas_frames():
    frame = pd.DataFrame(
        {"a": [1.0, NAN, 3.5], "b": ["x", None, "y"], "c": pd.to_datetime(["2020-01-01", None, "2021-01-01"])}
    )
    schema = find_schema(frame)
    assert [found.kind for found in schema.columns] == ["binary", "binary", "date"]
    assert np.isnan(encode(schema, frame)[1]).all()
    grades = pd.DataFrame({"g": pd.Categorical(["u", "v", None, "w"])})
    assert find_schema(grades).columns[0].values == ("u", "v", "w")
    with pytest.raises(InputError, match="more than once"):
        find_schema(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(InputError, match=r"column `a`: 'x' in row 1 is str where row 0 has int"):
        find_schema(pd.DataFrame({"a": [1, "x"]}))
