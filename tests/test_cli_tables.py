"""The command line on a table of columns of all kinds with holes: from the file to what a reader takes away."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from aevb import InputError
from aevb.apps.runs import open_run
from aevb.apps.tables import sample_file
from test_cli import refuse, succeed

TRAIN = ["--steps", "150", "--hidden", "16", "--latents", "2", "--validate-every", "50", "--log-every", "50"]
COLUMNS = ("sex", "city", "age", "visits", "income", "height", "smokes", "born")


def people(rows: int = 160) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    z = rng.normal(size=rows)
    frame = pl.DataFrame(
        {
            "id": [f"P{i:04d}" for i in range(rows)],
            "sex": np.where(rng.random(rows) < 0.5, "f", "m"),
            "city": rng.choice(["Rome", "Oslo", "Bern"], rows),
            "age": (45 + 15 * z).round().clip(17, 90).astype(int),
            "visits": rng.poisson(np.exp(0.5 + z)),
            "income": np.exp(8 + z + 0.5 * rng.normal(size=rows)).round(2),
            "height": (1.7 + 0.1 * rng.normal(size=rows)).round(3),
            "smokes": rng.random(rows) < 0.3,
            "born": [dt.date(1970, 1, 1) + dt.timedelta(int(days)) for days in rng.integers(0, 9000, rows)],
            "unit": ["cm"] * rows,
        }
    )
    gone = rng.random((rows, len(COLUMNS))) < 0.15
    gone[3], gone[4] = True, False
    holes = [
        pl.when(pl.Series(gone[:, j])).then(None).otherwise(pl.col(name)).alias(name) for j, name in enumerate(COLUMNS)
    ]
    return frame.with_columns(holes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table, and a run on it."""
    folder = tmp_path_factory.mktemp("people")
    people().write_csv(folder / "people.csv")
    told = succeed("train", folder / "people.csv", "--out", folder / "run", *TRAIN)
    assert told.startswith("set aside: id (identifier), unit (constant)\n")
    assert "160 rows of 8, likelihood mixed" in told
    return folder


def test_inspect_shows_kinds_and_writes_them(folder, tmp_path):
    schema = tmp_path / "schema.json"
    told = succeed("inspect", folder / "people.csv", "--out", schema, "--column", "age=ordinal:0:120")
    for kind in ("binary", "categorical", "ordinal:0:120", "count", "positive", "continuous", "date", "identifier"):
        assert kind in told
    assert "10 columns, 8 to model" in told
    stored = {column["name"]: column for column in json.loads(schema.read_text())["columns"]}
    assert stored["city"]["values"] == ["Bern", "Oslo", "Rome"]
    assert all(column["reason"] for column in stored.values())
    assert json.loads(succeed("inspect", folder / "people.csv", "--schema", schema, "--json")) == json.loads(
        schema.read_text()
    )
    other = json.loads(succeed("inspect", folder / "people.csv", "--schema", schema, "--column", "city=drop", "--json"))
    assert {c["name"]: c["kind"] for c in other["columns"]} == {n: c["kind"] for n, c in stored.items()} | {
        "city": "drop"
    }
    assert "exists already" in refuse("inspect", folder / "people.csv", "--out", schema)


def test_a_schema_file_decides_what_is_trained(folder, tmp_path):
    schema = tmp_path / "schema.json"
    succeed("inspect", folder / "people.csv", "--out", schema, "--column", "born=drop", "smokes=drop")
    told = succeed("train", folder / "people.csv", "--out", tmp_path / "run", "--schema", schema, *TRAIN, "--steps", 20)
    assert "born (drop)" in told
    assert "rows of 6" in told


def test_evaluate_and_report_read_the_table_again(folder):
    told = succeed("evaluate", folder / "run", "--samples", 100)
    assert "mixed: p(x) is a product of both, by column, in the data's units" in told
    succeed("report", folder / "run")


def test_impute_fills_holes_and_leaves_the_rest(folder, tmp_path):
    before = pl.read_csv(folder / "people.csv", try_parse_dates=True)
    told = succeed("impute", folder / "run", folder / "people.csv", "--out", tmp_path / "full.csv", "--samples", 200)
    assert "rows that hold nothing, filled in from the prior: 1" in told
    after = pl.read_csv(tmp_path / "full.csv", try_parse_dates=True)
    assert after.columns == before.columns
    assert after.dtypes == before.dtypes
    assert sum(after.null_count().row(0)) == 0
    for name in before.columns:
        known = before[name].is_not_null()
        assert after[name].filter(known).equals(before[name].filter(known)), name
    assert set(after["city"]) == {"Rome", "Oslo", "Bern"}
    assert after["visits"].min() >= 0
    assert after["income"].min() > 0


def test_multiple_imputations_stand_below_one_another(folder, tmp_path):
    before = pl.read_csv(folder / "people.csv", try_parse_dates=True)
    words = ("impute", folder / "run", folder / "people.csv", "-m", 3, "--samples", 200, "--out")
    succeed(*words, tmp_path / "a.parquet")
    succeed(*words, tmp_path / "b.parquet")
    drawn = pl.read_parquet(tmp_path / "a.parquet")
    assert drawn.equals(pl.read_parquet(tmp_path / "b.parquet"))
    assert drawn["imputation"].to_list() == [1] * 160 + [2] * 160 + [3] * 160
    assert sum(drawn.null_count().row(0)) == 0
    for name, part in (("a", drawn[:160]), ("b", drawn[160:320])):
        known = before["height"].is_not_null()
        assert part["height"].filter(known).equals(before["height"].filter(known)), name
    gone = before["height"].is_null()
    assert not drawn[:160]["height"].filter(gone).equals(drawn[160:320]["height"].filter(gone))


def test_score_tells_rows_and_columns_with_their_errors(folder, tmp_path):
    out = tmp_path / "scores.csv"
    told = succeed(
        "score", folder / "run", folder / "people.csv", "--by-column", "--samples", 200, "--out", out, "--top", 4
    )
    assert "rows that hold nothing, whose log p is 0: 1" in told
    scores = pl.read_csv(out)
    assert scores.columns[:4] == ["log_prob", "std_error", "ess", "pareto_k"]
    assert scores.columns[4:] == [f"{name}_nll{end}" for name in COLUMNS for end in ("", "_std_error")]
    assert scores.row(3)[:2] == (0.0, 0.0)
    before = pl.read_csv(folder / "people.csv")
    for name in COLUMNS:
        assert scores[f"{name}_nll"].is_nan().to_list() == before[name].is_null().to_list()
    least = scores["log_prob"].arg_sort()[:4].to_list()
    lines = [line for line in told.splitlines() if any(line.split()[:1] == [str(row)] for row in least)]
    assert [line.split()[0] for line in lines] == [str(row) for row in least]


def test_score_needs_no_file(folder):
    told = succeed("score", folder / "run", folder / "people.csv", "--samples", 50)
    assert "people.csv log p(x) = " in told
    assert "written" not in told
    assert "`top`" in refuse("score", folder / "run", folder / "people.csv", "--top", -1)


def test_an_odd_cell_is_named(folder, tmp_path):
    """An income that its age and visits do not explain stands first, and income is the column named."""
    frame = pl.read_csv(folder / "people.csv", try_parse_dates=True).with_columns(
        pl.when(pl.col("id") == "P0004").then(1e9).otherwise(pl.col("income")).alias("income")
    )
    frame.write_csv(tmp_path / "odd.csv")
    told = succeed("score", folder / "run", tmp_path / "odd.csv", "--samples", 100, "--top", 1)
    row = next(line for line in told.splitlines() if line.split()[:1] == ["4"])
    assert "income = 1000000000.0 (+" in row.replace("  ", "")


def test_samples_have_types_and_names(folder, tmp_path):
    succeed("sample", folder / "run", "-n", 50, "--out", tmp_path / "new.parquet")
    new = pl.read_parquet(tmp_path / "new.parquet")
    assert new.columns == [*COLUMNS, "unit"]
    assert new.dtypes == [
        pl.String,
        pl.String,
        pl.Int64,
        pl.Int64,
        pl.Float64,
        pl.Float64,
        pl.Boolean,
        pl.Date,
        pl.String,
    ]
    assert set(new["city"]) <= {"Rome", "Oslo", "Bern"}
    assert set(new["unit"]) == {"cm"}
    assert ".csv, .parquet" in refuse("sample", folder / "run", "-n", 5, "--out", tmp_path / "new.npy")
    assert succeed("score", folder / "run", tmp_path / "new.parquet", "--samples", 50)


def test_encode_gives_mean_and_spread_of_each_row(folder, tmp_path):
    succeed("encode", folder / "run", folder / "people.csv", "--out", tmp_path / "codes.csv")
    codes = pl.read_csv(tmp_path / "codes.csv")
    assert codes.shape == (160, 4)
    assert codes["z1_std"].min() > 0


def test_a_table_of_one_kind_is_imputed_too(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    x[::4, 1] = math.nan
    np.save(tmp_path / "a.npy", x)
    succeed("train", tmp_path / "a.npy", "--out", tmp_path / "run", *TRAIN, "--steps", 20)
    succeed("impute", tmp_path / "run", tmp_path / "a.npy", "--out", tmp_path / "full.npy", "--samples", 50)
    full = np.load(tmp_path / "full.npy")
    np.testing.assert_allclose(full[~np.isnan(x)], x[~np.isnan(x)], rtol=1e-6)
    assert np.isfinite(full).all()
    succeed("impute", tmp_path / "run", tmp_path / "a.npy", "--out", tmp_path / "m.csv", "--samples", 50, "-m", 2)
    assert pl.read_csv(tmp_path / "m.csv").columns == ["imputation", "x1", "x2", "x3"]
    assert "no missing entry" in refuse("impute", tmp_path / "run", tmp_path / "full.npy", "--out", tmp_path / "b.npy")


def changed(folder: Path, tmp_path: Path, **columns: list[object]) -> Path:
    path = tmp_path / "new.csv"
    people()[:2].with_columns(**{name: pl.Series(values) for name, values in columns.items()}).write_csv(path)
    return path


SCORED = {
    "category never seen": ({"city": ["Rome", "Ulm"]}, "column `city`: 'Ulm' in row 1 is none of the 3 values"),
    "negative count": ({"visits": [3, -1]}, "column `visits`: -1.0 in row 1 is no count"),
    "older than any": ({"age": [120, 20]}, "column `age`: 120.0 in row 0 lies out of the column's levels"),
    "text in numbers": ({"height": ["tall", "1.7"]}, "column `height`: 'tall' in row 0"),
    "unknown column": ({"shoe": [1, 2]}, "has the columns `shoe`"),
}


@pytest.mark.parametrize("name", SCORED)
def test_rows_that_do_not_fit_are_told(name, folder, tmp_path):
    columns, told = SCORED[name]
    assert told in refuse("score", folder / "run", changed(folder, tmp_path, **columns))


def test_a_missing_column_is_told(folder, tmp_path):
    people()[:4].drop("city").write_csv(tmp_path / "new.csv")
    assert "lacks the columns `city`" in refuse(
        "encode", folder / "run", tmp_path / "new.csv", "--out", tmp_path / "z.csv"
    )


REFUSED = {
    "no such column": (["--column", "agee=count"], "no column `agee`"),
    "no kind": (["--column", "age"], "NAME=KIND"),
    "unknown kind": (["--column", "age=number"], "cannot be 'number'"),
    "kinds and one likelihood": (["--column", "age=count", "--likelihood", "normal"], "Drop one of the two"),
    "no schema": (["--schema", "absent.json"], "absent.json"),
    "noise": (["--noise", "datum"], "`noise` goes with"),
    "vamp": (["--prior", "vamp"], "vamp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wishes_that_do_not_fit_are_told_before_training(name, folder, tmp_path):
    words, told = REFUSED[name]
    assert told in refuse("train", folder / "people.csv", "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_kinds_are_for_tables_only(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    assert "no table" in refuse("inspect", tmp_path / "a.npy")
    assert "no table" in refuse("train", tmp_path / "a.npy", "--out", tmp_path / "run", "--column", "x1=count")


# -- a folder of files -------------------------------------------------------------------------------------------------


def _placed(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """As torchrun starts a process; those that share files out never talk to one another."""
    for name, value in (("TORCHELASTIC_RUN_ID", 0), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size), ("RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    """The people in five files, the last but one without a hole, in the order of their names."""
    parts = tmp_path / "parts"
    parts.mkdir()
    table = people()
    for i, rows in enumerate((40, 1, 40, 1, 60)):
        first = (0, 40, 41, 4, 82)[i]
        table.slice(first, rows).write_parquet(parts / f"part-{i}.parquet")
    return parts


@pytest.mark.parametrize(
    "words",
    [
        ("score", "--by-column", "--samples", 100),
        ("encode",),
        ("impute", "--samples", 100),
        ("impute", "--samples", 20, "-m", 2),
    ],
)
def test_processes_share_files_out_and_each_is_written_once(words, folder, shards, tmp_path, monkeypatch):
    verb, *flags = words
    out = tmp_path / "out"
    names = [f"part-{i}.parquet" for i in range(5)]
    _placed(monkeypatch, 1, 2)
    told = succeed(verb, folder / "run", shards, "--out", out, *flags)
    assert sorted(path.name for path in out.glob("*.parquet")) == names[1::2]
    assert told.count("written to") == 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    # The job was killed here, and is begun again on one process: only what is lacking is made.
    _placed(monkeypatch, 0, 1)
    told = succeed(verb, folder / "run", shards, "--out", out, *flags)
    assert f"2 of 5 files are in {out} already" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in out.iterdir()) == [*names, "shards.json"]
    # Each file holds what its rows give alone, in their order.
    for name in names[:1] + names[2:3]:
        succeed(verb, folder / "run", shards / name, "--out", tmp_path / name, *flags)
        assert pl.read_parquet(out / name).equals(pl.read_parquet(tmp_path / name))
    if verb != "encode":
        told = refuse(verb, folder / "run", shards, "--out", out, *flags, "--seed", 3)
        assert f"`{out}` holds results that were made otherwise (seed)" in told


def test_what_cannot_be_shared_out_is_refused(folder, shards, tmp_path, monkeypatch):
    assert "must name a folder" in refuse("score", folder / "run", shards)
    assert "tell of one file" in refuse("score", folder / "run", shards, "--out", tmp_path / "out", "--top", 3)
    assert not (tmp_path / "out").exists()
    assert "is no result of this command" in refuse("encode", folder / "run", shards, "--out", shards)
    _placed(monkeypatch, 0, 2)
    told = refuse("encode", folder / "run", folder / "people.csv", "--out", tmp_path / "codes.csv")
    assert "no folder of Parquet files, which is what the 2 processes can share out" in told


def test_sample_meets_conditions_in_the_tables_own_types(folder, tmp_path):
    before = pl.read_csv(folder / "people.csv", try_parse_dates=True)
    words = ("sample", folder / "run", "-n", 300, "--samples", 20_000, "--seed", 2)
    given = ["--given", "sex=f", "--given", "age>60", "--given", "born < 1985-01-01", "--given", "smokes=true"]
    told = succeed(*words, "--out", tmp_path / "a.parquet", *given)
    assert re.search(r"^log p of the conditions -\d+\.\d\d ± 0\.\d\d nats; 20000 draws are worth \d+ under", told)
    assert "closest row trained on: 0." in told
    assert "of 300 rows made" in told
    made = pl.read_parquet(tmp_path / "a.parquet")
    assert made.columns == before.columns[1:]  # but the identifier
    assert made.dtypes == before.dtypes[1:]
    assert sum(made.null_count().row(0)) == 0
    assert set(made["sex"]) == {"f"}
    assert made["smokes"].all()
    assert made["age"].min() == 61
    assert made["born"].max() < dt.date(1985, 1, 1)
    assert made["height"].n_unique() > 290
    succeed(*words, "--out", tmp_path / "b.parquet", *given)
    assert made.equals(pl.read_parquet(tmp_path / "b.parquet"))


def test_a_condition_changes_what_goes_with_it(tmp_path):
    """Two columns of one cause, and a day that is written in whole numbers: fixed, and its neighbours bounded."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=1500)
    days = [dt.date(2000, 1, 1) + dt.timedelta(int(day)) for day in 100 * z + 20 * rng.normal(size=1500)]
    x, group = z + 0.2 * rng.normal(size=1500), np.where(z > 0.5, "high", "low")
    pl.DataFrame({"day": days, "x": x, "group": group}).write_csv(tmp_path / "t.csv")
    words = [*TRAIN, "--steps", "600", "--learning-rate", "0.01"]
    succeed("train", tmp_path / "t.csv", "--out", tmp_path / "run", *words)
    run = open_run(tmp_path / "run")

    def draw(name: str, *given: str) -> str:
        return sample_file(run, tmp_path / name, 400, given, samples=20_000, seed=0, moved=None)[0]

    # A day is an interval, a number a point.
    assert draw("high.parquet", "day=2000-05-01").startswith("log p of the conditions")
    assert draw("point.parquet", "x=-1").startswith("log-density of the conditions")
    high, point = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("high", "point"))
    assert set(high["day"]) == {dt.date(2000, 5, 1)}
    assert set(point["x"]) == {-1.0}
    # By the law of (day, x): E[x | day = 121] = 121 * 100 / (100^2 + 20^2), its spread 0.28, and likewise x = -1.
    assert abs(high["x"].mean() - 1.163) < 0.15
    assert (high["group"] == "high").mean() > 0.9
    assert (point["group"] == "low").mean() > 0.98
    draw("late.csv", "day>=2000-01-01", "day<2000-01-03")
    assert set(pl.read_csv(tmp_path / "late.csv")["day"]) == {"2000-01-01", "2000-01-02"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["sex=x"], "`sex` is one of f, m; got 'x'"),
        (["sex>f"], "`sex` holds categories, which have no order"),
        (["sux=f"], "takes a column of the model"),
        (["age"], "takes a column of the model"),
        (["age>"], "takes a column of the model"),
        (["age>old"], "'old' is no number"),
        (["born>5"], "'5' is no date"),
        (["age>60", "age<=60"], "no value of `age` meets all that is given of it"),
        (["age>90"], "None of 90 draws of the model meets the conditions"),
        (["smokes=true"], "(the effective sample size), and below 100 rows repeat a few"),
    ],
)
def test_conditions_that_cannot_be_met_are_told(folder, tmp_path, given, told):
    out = tmp_path / "a.csv"
    with pytest.raises(InputError, match=re.escape(told)):
        sample_file(open_run(folder / "run"), out, 5, given, samples=90, seed=0, moved=None)
    assert not out.exists()


def test_rows_are_made_without_the_data_they_were_trained_on(folder, tmp_path):
    moved, run = tmp_path / "moved.csv", open_run(folder / "run")
    (folder / "people.csv").rename(moved)
    try:
        _, told = sample_file(run, tmp_path / "a.csv", 3, (), samples=1, seed=0, moved=None)
        assert told.startswith("not compared with the rows trained on: ")
        _, told = sample_file(run, tmp_path / "b.csv", 3, (), samples=1, seed=0, moved=str(moved))
        assert "of 3 rows made" in told
        assert "of 16 rows held out" in told
    finally:
        moved.rename(folder / "people.csv")
