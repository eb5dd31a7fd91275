"""`aevb train --target`: from a table some of whose rows lack a label to predictions, figures and refusals."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.datasets import load_wine

import aevb
from aevb.apps.runs import open_run, predicted, target_of
from aevb.data import Schema, load_table, table_rows
from test_cli import refuse, succeed

FAST = ["--hidden", "16", "--latents", "2", "--batch-size", "50", "--learning-rate", "0.02", "--log-every", "30"]


def wine() -> tuple[pl.DataFrame, pl.Series]:
    """Measurements of 178 wines of three growers, with some holes, every second one without its grower; the truth."""
    data, rng = load_wine(), np.random.default_rng(0)
    x = np.where(rng.random((178, 6)) < 0.05, np.nan, data.data[:, :6])
    frame = pl.DataFrame(x, schema=data.feature_names[:6]).fill_nan(None)
    grower = pl.Series("grower", [f"grower {code}" for code in data.target])
    bare = pl.Series(rng.permutation(178) % 2 == 0)
    return frame.insert_column(
        2, pl.select(pl.when(bare).then(None).otherwise(grower).alias("grower"))["grower"]
    ), grower


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table, and a run on it."""
    folder = tmp_path_factory.mktemp("wine")
    wine()[0].write_csv(folder / "wine.csv")
    words = ["--steps", 70, "--validate-every", 35, "--checkpoint-every", 35, "--keep-checkpoints", 9]
    told = succeed("train", folder / "wine.csv", "--target", "grower", "--out", folder / "run", *FAST, *words)
    assert "178 rows of 6 and the target grower (categorical:3), known in 89, likelihood mixed" in told
    assert "(validation bound + 20.0 log q(y | x): " in told
    return folder


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a positive number to predict, and a run on it."""
    folder, rng = tmp_path_factory.mktemp("prices"), np.random.default_rng(1)
    size, district = rng.normal(5, 1, 160), rng.choice(["east", "west"], 160)
    price = np.exp(10 + 0.8 * (size - 5) + 0.5 * (district == "east") + 0.1 * rng.normal(size=160)).round()
    frame = pl.DataFrame({"size": size, "price": price, "district": district, "id": [f"H{i:03}" for i in range(160)]})
    bare = pl.int_range(pl.len()) % 4 == 0
    frame = frame.with_columns(pl.when(bare).then(None).otherwise(pl.col("price")).alias("price"))
    frame.write_csv(folder / "prices.csv")
    words = ["--column", "price=positive", "--steps", 90, "--validate-every", 30]
    told = succeed("train", folder / "prices.csv", "--target", "price", "--out", folder / "run", *FAST, *words)
    assert "2 and the target price (positive, Gaussian on the log scale), known in 120" in told
    return folder


def test_classes_are_predicted_better_than_by_the_most_frequent(folder, tmp_path):
    """On the rows whose label was hidden: the gain is at least four of its standard errors above none."""
    full = tmp_path / "full.csv"
    told = succeed("impute", folder / "run", folder / "wine.csv", "--out", full, "--samples", 50)
    assert "`grower` by q(y | x) in 89 rows, with `grower:probability`" in told
    (before, truth), after = wine(), pl.read_csv(full)
    hidden = before["grower"].is_null()
    assert after.columns == [*before.columns[:3], "grower:probability", *before.columns[3:]]
    assert after["grower"].filter(~hidden).equals(before["grower"].filter(~hidden))
    assert (after["grower:probability"].is_null() == ~hidden).all()
    right = (after["grower"] == truth).filter(hidden).to_numpy().astype(float)
    usual = before["grower"].drop_nulls().mode()[0]
    gain = right - (truth.filter(hidden) == usual).to_numpy()
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    # The probabilities mean what they say: as many are right as they add up to.
    sure = after["grower:probability"].filter(hidden).to_numpy()
    assert abs((right - sure).sum()) < 4 * np.sqrt((sure * (1 - sure)).sum()) + 4


def test_a_file_need_not_have_the_target_and_draws_follow_its_probabilities(folder, tmp_path):
    bare = tmp_path / "bare.csv"
    table = wine()[0].drop("grower")
    table[:20].write_csv(bare)
    words = ("impute", folder / "run", bare, "--samples", 20, "--out")
    for name in ("one", "other"):
        succeed(*words, tmp_path / f"{name}.csv", "-m", 2)
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "other.csv").read_text()
    assert sum(pl.read_csv(tmp_path / "one.csv").null_count().row(0)) == 0
    whole = table.drop_nulls()
    whole.write_csv(bare)
    succeed(*words, tmp_path / "best.csv")
    succeed(*words, tmp_path / "many.csv", "-m", 40)
    many, run = pl.read_csv(tmp_path / "many.csv"), open_run(folder / "run")
    p = predicted(run, table_rows(bare, schema(run), "grower")).mean.double().numpy()
    labels = [f"grower {c}" for c in range(3)]
    drawn = np.stack([(many["grower"] == label).to_numpy().reshape(40, len(whole)) for label in labels], -1)
    z = (drawn.sum((0, 1)) - 40 * p.sum(0)) / np.sqrt(40 * (p * (1 - p)).sum(0))
    assert np.abs(z).max() < 4
    one = pl.read_csv(tmp_path / "best.csv")
    assert one["grower"].to_list() == [labels[c] for c in p.argmax(1)]
    np.testing.assert_allclose(one["grower:probability"], p.max(1), rtol=1e-5)


def schema(run: aevb.checkpoint.Run) -> Schema:
    return Schema.from_json(run.data["command"]["schema"])


def test_an_evaluation_tells_the_prediction_everywhere_alike(folder):
    told = succeed("evaluate", folder / "run", "--samples", 5)
    found = json.loads(succeed("evaluate", folder / "run", "--samples", 5, "--json"))
    assert "validation log p(x, y) = " in told
    finding = found["findings"]["prediction"]
    run = open_run(folder / "run")
    data = load_table(folder / "wine.csv", schema(run), "grower")
    held = data.train[aevb.training.split_rows(178, run.config)[1]]
    y = held[:, 2]
    p = predicted(run, held[~y.isnan()]).mean
    right = (p.argmax(-1) == y[~y.isnan()]).double()
    assert finding["figures"]["accuracy"] == pytest.approx(
        [float(right.mean()), float(right.std()) / len(right) ** 0.5]
    )
    loss = -p.double().gather(1, y[~y.isnan()].long()[:, None]).log()
    assert finding["figures"]["log_loss"][0] == pytest.approx(float(loss.mean()), rel=1e-5)
    assert sum(map(sum, finding["figures"]["confusion"])) == len(right)
    assert all(name in told and value in told for name, value in finding["facts"])
    assert all(sentence in told for sentence in finding["meaning"])


def test_numbers_are_predicted_in_their_units(prices, tmp_path):
    found = json.loads(succeed("evaluate", prices / "run", "--samples", 5, "--json"))
    succeed("report", prices / "run")
    page = html.unescape((prices / "run" / "report.html").read_text())
    finding = found["findings"]["prediction"]
    assert all(told in page for told in (finding["title"], *(value for _, value in finding["facts"])))
    figures = finding["figures"]
    true, mean = np.array(figures["true"]), np.array(figures["predicted"])
    missed, spread = (true - mean) ** 2, (true - true.mean()) ** 2
    assert figures["rmse"][0] == pytest.approx(missed.mean() ** 0.5)
    assert figures["r2"][0] == pytest.approx(1 - missed.mean() / spread.mean())
    # The errors are those of the jackknife, to first order.
    n, at = len(true), np.arange(len(true))
    one = [[(missed[at != i].mean()) ** 0.5, 1 - missed[at != i].sum() / spread[at != i].sum()] for i in at]
    jackknife = np.std(one, axis=0) * (n - 1) ** 0.5 * ((n - 1) / n) ** 0.5 * (n / (n - 1)) ** 0.5
    np.testing.assert_allclose([figures["rmse"][1], figures["r2"][1]], jackknife, rtol=0.35)
    assert figures["rmse"][0] + 2 * figures["rmse"][1] < figures["without_x"]["rmse"][0]
    succeed("impute", prices / "run", prices / "prices.csv", "--out", tmp_path / "full.csv")
    full, before = pl.read_csv(tmp_path / "full.csv"), pl.read_csv(prices / "prices.csv")
    gone = before["price"].is_null()
    assert full.columns == ["size", "price", "price:std", "district", "id"]
    assert full["price"].min() > 0
    assert (full["price:std"].filter(gone) > 0).all()
    assert full["id"].equals(before["id"])
    succeed("impute", prices / "run", prices / "prices.csv", "--out", tmp_path / "drawn.csv", "-m", 60)
    drawn = pl.read_csv(tmp_path / "drawn.csv")["price"].to_numpy().reshape(60, 160)[:, gone.to_numpy()]
    z = (drawn.mean(0) - full["price"].filter(gone)) / (full["price:std"].filter(gone) / 60**0.5)
    assert np.abs(z).max() < 4.5


def test_scores_are_of_x_and_y_or_of_x(folder, prices, tmp_path):
    """log p(x) of a row is the sum over the classes of p(x, y), and a cell's figure the difference of the two."""
    row = wine()[0][10].with_columns(pl.lit("grower 0").alias("grower"))
    each = pl.concat(
        [row.with_columns(pl.lit(label).alias("grower")) for label in ("grower 0", "grower 1", "grower 2")]
    )
    bare = row.with_columns(pl.lit(None, dtype=pl.String).alias("grower"))
    pl.concat([each, bare]).write_csv(tmp_path / "rows.csv")
    words = ("score", folder / "run", tmp_path / "rows.csv", "--samples", 1000, "--by-column", "--out")
    told = succeed(*words, tmp_path / "scores.csv", "--top", 1)
    assert "rows.csv log p(x, y) = " in told
    scores = pl.read_csv(tmp_path / "scores.csv")
    log_p, error = (scores[name].to_numpy() for name in ("log_prob", "std_error"))
    assert abs(np.logaddexp.reduce(log_p[:3]) - log_p[3]) < 4 * (error**2).sum() ** 0.5
    np.testing.assert_allclose(scores["grower_nll"][:3], log_p[3] - log_p[:3], rtol=0, atol=1e-5)
    assert np.isnan(scores["grower_nll"][3])
    assert scores.columns[4:] == [f"{name}_nll{end}" for name in row.columns for end in ("", "_std_error")]
    assert np.exp(-scores["grower_nll"][:3].to_numpy()).sum() == pytest.approx(1, abs=0.1)
    succeed("score", prices / "run", prices / "prices.csv", "--samples", 20)
    (tmp_path / "parts").mkdir()
    bare.write_parquet(tmp_path / "parts" / "a.parquet")
    told = succeed("score", folder / "run", tmp_path / "parts", "--samples", 20, "--out", tmp_path / "scored")
    assert "1 rows, mean log p(x, y) -" in told


def test_codes_of_rows_without_a_class_are_mixtures(folder, prices, tmp_path):
    row = wine()[0][10]
    labels = ["grower 0", "grower 1", "grower 2", None]
    rows = pl.concat([row.with_columns(pl.lit(label, dtype=pl.String).alias("grower")) for label in labels])
    rows.write_csv(tmp_path / "rows.csv")
    assert "4 columns" in succeed("encode", folder / "run", tmp_path / "rows.csv", "--out", tmp_path / "codes.csv")
    codes, run = pl.read_csv(tmp_path / "codes.csv"), open_run(folder / "run")
    p = predicted(run, table_rows(tmp_path / "rows.csv", schema(run))[3:]).mean[0].double().numpy()
    for j in (1, 2):
        mean, std = (codes[f"z{j}_{name}"].to_numpy() for name in ("mean", "std"))
        assert mean[3] == pytest.approx(p @ mean[:3], abs=1e-4)
        assert std[3] ** 2 == pytest.approx(p @ (std[:3] ** 2 + mean[:3] ** 2) - (p @ mean[:3]) ** 2, abs=1e-4)
    succeed("encode", prices / "run", prices / "prices.csv", "--out", tmp_path / "other.csv")
    assert sum(pl.read_csv(tmp_path / "other.csv").null_count().row(0)) == 0


def test_samples_meet_conditions_on_both(folder, prices, tmp_path):
    words = ("sample", folder / "run", "-n", 200, "--samples", 4000, "--out", tmp_path / "made.csv")
    succeed(*words[:-2], "--out", tmp_path / "free.csv")
    free = pl.read_csv(tmp_path / "free.csv")
    assert free.columns == wine()[0].columns
    assert free["grower"].n_unique() == 3
    succeed(*words, "--given", "grower=grower 1", "--given", "alcohol>12")
    made = pl.read_csv(tmp_path / "made.csv")
    assert set(made["grower"]) == {"grower 1"}
    assert made["alcohol"].min() > 12
    told = succeed("sample", prices / "run", "-n", 50, "--samples", 4000, "--out", tmp_path / "p.csv",
                   "--given", "price>=30000", "--given", "price<40000")  # fmt: skip
    assert "log p of the conditions" in told
    assert pl.read_csv(tmp_path / "p.csv")["price"].is_between(30_000, 40_000).all()


def test_a_stopped_run_goes_on_to_the_same_bits(folder, tmp_path):
    """As it is where its later checkpoints were never written."""
    shutil.copytree(folder / "run", tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        if json.loads((checkpoint / "run.json").read_bytes())["resume"]["step"] > 35:
            shutil.rmtree(checkpoint)
    assert "trained 70 steps" in succeed("train", "--resume", tmp_path / "run")
    one, other = (open_run(where / "run") for where in (folder, tmp_path))
    for name, value in one.vae.state_dict().items():
        assert torch.equal(value, other.vae.state_dict()[name]), name
    assert one.history[-1]["objective"] == other.history[-1]["objective"]
    assert one.data["label_weight"] == 20.0


def test_runs_with_and_without_a_target_compare(folder, prices, tmp_path):
    """p(x, y) is that of the whole row, whichever of its columns is the target."""
    words = ["--steps", 5, "--validate-every", 5]
    succeed("train", folder / "wine.csv", "--out", tmp_path / "plain", *FAST, *words)
    told = succeed("compare", folder / "run", tmp_path / "plain", "--samples", 5)
    assert "18 rows" in told
    assert "data" in refuse("compare", folder / "run", prices / "run", "--samples", 20)
    assert "has a target" in refuse("export", folder / "run", "--out", tmp_path / "nets")
    assert "without a target" in refuse("evaluate", folder / "run", "--also", "gaps")


REFUSED = {
    "no column": (["--target", "colour"], "has no `colour`, it has `grower`"),
    "an identifier": (["--target", "id"], "set aside as identifier"),
    "text": (["--target", "notes"], "set aside as text"),
    "a constant": (["--target", "unit"], "set aside as constant"),
    "dropped": (["--target", "grower", "--column", "grower=drop"], "set aside as drop"),
    "no value": (["--target", "nothing"], "set aside as empty"),
    "too many classes": (["--target", "many", "--column", "many=categorical"], "categorical columns have 2 to 1000"),
    "one kind for all": (["--target", "grower", "--likelihood", "normal"], "`--target`.*Drop one"),
    "iwae": (["--target", "grower", "--objective", "iwae"], "`--objective iwae`.*elbo"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_cannot_be_are_told(name, tmp_path):
    words, told = REFUSED[name]
    rows = 1100 if name in ("text", "too many classes") else 60
    frame = pl.DataFrame(
        {
            "grower": ["a", "b"] * (rows // 2),
            "size": np.random.default_rng(0).normal(size=rows),
            "id": [f"W{i:04}" for i in range(rows)],
            "notes": [f"note {i % 1050}" for i in range(rows)],
            "many": [f"kind {i % 1050}" for i in range(rows)],
            "unit": ["cm"] * rows,
            "nothing": [None] * rows,
        }
    )
    frame.write_csv(tmp_path / "table.csv")
    message = refuse("train", tmp_path / "table.csv", "--out", tmp_path / "run", *words)
    assert re.search(told, message), message
    assert not (tmp_path / "run").exists()


def test_tables_without_a_target_to_learn_are_told(folder, tmp_path):
    np.save(tmp_path / "x.npy", np.eye(4))
    words = ("--target", "grower", "--out", tmp_path / "run")
    assert "is no table with named columns" in refuse("train", tmp_path / "x.npy", *words)
    table, run = wine()[0], open_run(folder / "run")
    schema(run).save(tmp_path / "schema.json")
    for grower, told in ((None, "has no known value of the target `grower`"), ("grower 1", "has one class only")):
        table.with_columns(pl.lit(grower, dtype=pl.String).alias("grower")).write_csv(tmp_path / "t.csv")
        assert told in refuse("train", tmp_path / "t.csv", *words, "--schema", tmp_path / "schema.json")
    table.select("grower").write_csv(tmp_path / "t.csv")
    assert "no other column" in refuse("train", tmp_path / "t.csv", *words)
    table.with_columns(pl.lit("grower 9").alias("grower")).write_csv(tmp_path / "new.csv")
    told = refuse("score", folder / "run", tmp_path / "new.csv")
    assert "`grower`: 'grower 9' in row 0" in told
    assert "is none of the 3 values of this column in training" in told
    named = table.with_columns(pl.lit(0.5).alias("grower:probability"))
    named.write_csv(tmp_path / "named.csv")
    assert "unknown to the model" in refuse(
        "impute", folder / "run", tmp_path / "named.csv", "--out", tmp_path / "o.csv"
    )
    assert target_of(run).labels == ("grower 0", "grower 1", "grower 2")
