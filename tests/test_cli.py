"""The command line, run as its user runs it: figures, files, and one clear sentence for each mistake."""

from __future__ import annotations

import contextlib
import errno
import gzip
import html
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from aevb import load
from aevb.apps.choices import model_config
from aevb.apps.cli import main
from aevb.config import InputError, ModelConfig, TrainConfig
from aevb.data import Data, SparseRows
from aevb.data import load as load_data

AEVB = [sys.executable, "-c", "import sys; sys.argv[0] = 'aevb'; from aevb.apps.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
FAST = ["--steps", "60", "--hidden", "16", "--latents", "4", "--validate-every", "30", "--log-every", "20"]


def aevb(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, as the console script calls it: torch is imported once, not for each test."""
    out, errors, before = io.StringIO(), io.StringIO(), warnings.showwarning
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["aevb", *map(str, words)])
        try:
            main()
            code: object = 0
        except SystemExit as error:
            code = error.code or 0
        finally:
            warnings.showwarning = before
    if isinstance(code, str):  # what the interpreter prints for it
        print(code, file=errors)
        code = 1
    return subprocess.CompletedProcess(words, int(code), out.getvalue(), errors.getvalue())


def succeed(*words: object) -> str:
    done = aevb(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(*words: object) -> str:
    """The one message of a command that must fail."""
    done = aevb(*words)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("aevb: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("digits") / "run"
    succeed("train", "digits", "--out", run, *FAST)
    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 1)) @ rng.normal(size=(1, 3)) + 0.3 * rng.normal(size=(120, 3))
    frame = pl.DataFrame(x * 10 + 100, schema=["height", "weight", "age"])
    path = tmp_path / "people.csv"
    frame.with_columns(
        pl.when(pl.int_range(pl.len()) % 5 == 0).then(None).otherwise(pl.col("age")).alias("age")
    ).write_csv(path)
    return path


# -- what works --------------------------------------------------------------------------------------------------------


def test_the_console_script_answers_help_without_torch() -> None:
    code = "import sys; sys.argv = ['aevb', '--help']\nfrom aevb.apps.cli import main\ntry: main()\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0
    assert done.stdout.endswith("False\n")


def test_help_lists_the_verbs_and_every_configuration_field() -> None:
    from dataclasses import fields

    from aevb import ModelConfig, TrainConfig

    listed = succeed("--help")
    for verb in "inspect train evaluate compare sample encode impute score report export check".split():
        assert verb in listed
    flags = succeed("train", "--help")
    for field in (*fields(ModelConfig), *fields(TrainConfig)):
        if field.name not in ("features", "kinds", "image", "target", "batches"):
            assert f"--{field.name.replace('_', '-')}" in flags, field.name


def test_train_then_evaluate_prints_one_headline(digits) -> None:
    printed = succeed("evaluate", digits, "--samples", 300)
    headlines = re.findall(r"^test log p\(x\) = -\d+\.\d\d ± \d+\.\d\d nats \(300 samples\)$", printed, re.MULTILINE)
    assert len(headlines) == 1
    assert printed.splitlines()[-1] == headlines[0]
    assert "lower bound" in printed.splitlines()[-2]
    assert "k-hat > 0.7 in" in printed.splitlines()[-2]
    stored = json.loads((digits / "evaluation.json").read_text())
    assert headlines[0].startswith(f"test log p(x) = {stored['log_prob']:.2f} ")


def test_json_carries_the_same_figures(digits) -> None:
    told = json.loads(succeed("evaluate", digits, "--samples", 300, "--json"))
    again = json.loads(succeed("evaluate", digits, "--samples", 300, "--json"))
    assert told == again
    assert told["rows"] == 297
    assert told["gap"] == pytest.approx(told["log_prob"] - told["elbo"])


def test_bfloat16_is_kept_to_where_its_rounding_is_lost(digits, tmp_path) -> None:
    """Told beside the evaluation either way; of one row no sampling error is known, so that nothing hides a change."""
    plain = json.loads(succeed("evaluate", digits, "--samples", 100, "--json"))
    printed = succeed("evaluate", digits, "--samples", 100, "--precision", "bfloat16")
    told = json.loads((digits / "evaluation.json").read_text())
    change = told["findings"]["bfloat16"]["figures"]
    used = "bfloat16" if change["row_change"] else "float32"  # a processor without units for it
    assert (told["precision"], change["allowed"], change["rows"]) == (used, True, 297)
    assert told["log_prob"] == pytest.approx(plain["log_prob"] + change["change"], abs=1e-9)
    assert ("matrix products in bfloat16\n" in printed) == (used == "bfloat16")
    assert ("have no effect" in printed) == (used == "float32")
    stamp = (digits / "evaluation.npy").stat().st_mtime_ns
    for precision in ("float32", "bfloat16"):  # what the run holds answers both
        succeed("evaluate", digits, "--samples", 100, "--also", "information", "--precision", precision)
    assert (digits / "evaluation.npy").stat().st_mtime_ns == stamp
    assert f"change of the mean  {change['change']:.2g} nats" in printed
    assert "bfloat16" not in json.loads(succeed("evaluate", digits, "--samples", 100, "--json"))["findings"]
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    succeed("train", tmp_path / "x.npy", "--out", tmp_path / "run", *FAST, "--validation", "0.05")
    printed = succeed("evaluate", tmp_path / "run", "--samples", 100, "--precision", "bfloat16")
    assert re.search("The errors are not known, .*: all rows were evaluated in float32|They have no effect", printed)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["precision"] == "float32"


def test_compare_is_paired_on_the_same_rows(digits, tmp_path) -> None:
    """The figures are those of the evaluations, row by row; the ranks and the verdict follow from the interval."""
    longer = tmp_path / "longer"
    succeed("train", "digits", "--out", longer, *FAST[2:], "--steps", 300)
    told = json.loads(succeed("compare", digits, longer, "--samples", 100, "--json"))
    rows = [np.load(run / "evaluation.npy") for run in (digits, longer)]
    stored = [json.loads((run / "evaluation.json").read_text()) for run in (digits, longer)]
    assert told["mean"] == pytest.approx([s["log_prob"] for s in stored])
    assert told["difference"][1][0] == pytest.approx((rows[1] - rows[0]).mean())
    assert told["difference_error"][1][0] == pytest.approx((rows[1] - rows[0]).std(ddof=1) / np.sqrt(297))
    assert told["low"][1][0] > 0
    assert [run["ranks"] for run in told["runs"]] == [[2, 2], [1, 1]]
    printed = succeed("compare", digits, longer, "--samples", 100)
    assert printed.splitlines()[-1] == told["verdict"]
    assert "verdict: longer is better than run, by " in told["verdict"]
    assert f"{told['difference'][0][1]:+.3f} ± {told['difference_error'][0][1]:.3f}" in printed
    # The evaluations that the runs hold are used again: here one that was tampered with, mean and rows alike.
    np.save(longer / "evaluation.npy", rows[1] - 1.0)
    mean = float(torch.from_numpy(rows[1] - 1.0).mean())  # numpy's may differ in the last digit
    (longer / "evaluation.json").write_text(json.dumps(stored[1] | {"log_prob": mean}))
    again = json.loads(succeed("compare", digits, longer, "--samples", 100, "--json"))
    assert again["mean"][1] == pytest.approx(told["mean"][1] - 1)
    other = json.loads(succeed("compare", digits, longer, "--samples", 101, "--json"))
    assert other["mean"][1] == pytest.approx(told["mean"][1], abs=0.3)


def test_codes_of_a_flow_are_moments_of_draws_and_depend_on_no_other_row(tmp_path) -> None:
    x = (np.random.default_rng(0).random((60, 5)) < 0.4).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "two.npy", x[[7, 3]])
    run = tmp_path / "run"
    succeed("train", tmp_path / "x.npy", "--out", run, *FAST, "--likelihood", "bernoulli", "--posterior", "planar")
    for name in ("x", "two"):
        succeed("encode", run, tmp_path / f"{name}.npy", "--out", tmp_path / f"{name}-codes.npy")
    codes, two = np.load(tmp_path / "x-codes.npy"), np.load(tmp_path / "two-codes.npy")
    np.testing.assert_allclose(two, codes[[7, 3]], rtol=0, atol=1e-6)
    vae = load(run).vae
    draws = vae.posterior({"x": torch.from_numpy(x)})["z"].sample(torch.Size([4000]))
    error = draws.std(0).numpy() * (1 / 1000 + 1 / 4000) ** 0.5
    assert (np.abs(codes[:, :4] - draws.mean(0).numpy()) < 5 * error).all()  # 5: 240 comparisons
    np.testing.assert_allclose(codes[:, 4:], draws.std(0).numpy(), rtol=0.15)


def test_runs_that_cannot_be_compared(digits, table, tmp_path) -> None:
    assert "two runs or more" in refuse("compare", digits)
    assert "a folder twice" in refuse("compare", digits, digits)
    people = tmp_path / "people"
    succeed("train", table, "--out", people, *FAST)
    assert "`run` and `people` differ in their data" in refuse("compare", digits, people)
    other_rows = tmp_path / "other_rows"
    succeed("train", table, "--out", other_rows, *FAST, "--seed", 1)
    assert "would be judged on different rows" in refuse("compare", people, other_rows)
    counted = tmp_path / "counted"
    whole = tmp_path / "whole.csv"
    pl.DataFrame({"a": [0, 1, 2, 3] * 10, "b": [5, 0, 1, 1] * 10}).write_csv(whole)
    succeed("train", whole, "--out", counted, *FAST, "--likelihood", "poisson")
    measured = tmp_path / "measured"
    succeed("train", whole, "--out", measured, *FAST, "--likelihood", "normal")
    assert "one is a density where the other is a probability" in refuse("compare", counted, measured)


ALSO = ["ais", "gaps", "information", "calibration", "checks"]
FEW = ["--also-rows", 4, "--temperatures", 3]


def test_diagnoses_say_the_same_in_terminal_json_and_report(digits, tmp_path, monkeypatch) -> None:
    from aevb.apps import diagnoses

    assert list(diagnoses.DIAGNOSES) == ALSO
    assert "{" + ",".join(ALSO) + "}" in succeed("evaluate", "--help").replace("\n", "")
    run = shutil.copytree(digits, tmp_path / "run")
    told = json.loads(succeed("evaluate", run, "--samples", 40, "--also", *reversed(ALSO), *FEW, "--json"))
    assert list(told["findings"]) == ALSO
    stored = (run / "evaluation.json").read_text()
    assert json.loads(stored) == told

    # What is of these weights stays when the evaluation is made anew, and the report computes none of it again.
    monkeypatch.setattr(diagnoses, "DIAGNOSES", {})
    printed = succeed("evaluate", run, "--samples", 40)
    assert (run / "evaluation.json").read_text() == stored
    succeed("report", run)
    page = " ".join(html.unescape((run / "report.html").read_text()).split())
    for finding in told["findings"].values():
        assert f"<h2>{finding['title']}</h2>" in page
        assert f"\n\n{finding['title']}\n" in printed
        for name, figure in finding["facts"]:
            assert re.search(rf"^  {re.escape(name)} +{re.escape(figure)}$", printed, re.MULTILINE)
            assert f'<th scope="row">{name}</th><td>{figure}</td>' in page
        for sentence in finding["meaning"]:
            assert sentence in printed.splitlines()
            assert f">{sentence}</p>" in page
    for title in ("Two-sided bracket", "Where the gap comes from", "Aggregated posterior", "Ranks of the truth"):
        assert f"<b>{title}</b>" in page
    for name in ("likelihood", "rows", "importance samples"):
        assert f'<th scope="row">{name}</th>' in page

    # Findings of other weights are stale.
    (run / "evaluation.json").write_text(json.dumps(told | {"weights": "others"}))
    succeed("report", run)
    assert "Two-sided bracket" not in (run / "report.html").read_text()
    assert json.loads((run / "evaluation.json").read_text())["findings"] == {}


def test_diagnoses_that_cannot_be_are_refused_before_the_evaluation(digits) -> None:
    before = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    assert "`--also` knows no `aid`; it knows ais, gaps," in refuse("evaluate", digits, "--also", "ais", "aid")
    assert "`--also-rows` must be at least 1; got 0" in refuse("evaluate", digits, "--also", "ais", "--also-rows", 0)
    assert "`--temperatures` must be at least 1" in refuse("evaluate", digits, "--also", "gaps", "--temperatures", 0)
    assert {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_sample_encode_and_score_write_each_format(digits, tmp_path, suffix) -> None:
    rows = tmp_path / f"rows{suffix}"
    succeed("sample", digits, "-n", 7, "--out", rows, "--seed", 3)
    assert _read(rows).shape == ((7, 8, 8) if suffix == ".npy" else (7, 64))
    succeed("encode", digits, rows, "--out", tmp_path / f"codes{suffix}")
    assert _read(tmp_path / f"codes{suffix}").shape == (7, 8)
    printed = succeed("score", digits, rows, "--out", tmp_path / f"scores{suffix}", "--samples", 100)
    scores = _read(tmp_path / f"scores{suffix}")
    assert scores.shape == (7, 4)
    assert f"{scores[:, 0].mean():.2f}" in printed


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colour images in two classes, in `all`, and in `run` a model of them."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for i in range(16):
        pixels = np.full((16, 17, 3), rng.integers(0, 60, 3), np.uint8)
        pixels[4 + i % 3 : 12] = rng.integers(100, 256, 3) if i % 2 else 255
        (folder / "all" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "all" / "ab"[i % 2] / f"{i:02}.png")
    few = ["--steps", 6, "--channels", 2, 3, "--latents", 2, "--batch-size", 8, "--validate-every", 3]
    told = succeed("train", folder / "all", "--out", folder / "run", "--validation", 0.25, *few)
    assert "all: 16 rows of 816, likelihood discretized-logistic, net convolutional" in told
    return folder


def test_images_are_evaluated_reported_and_made(shapes, tmp_path) -> None:
    found = json.loads(succeed("evaluate", shapes / "run", "--samples", 30, "--json"))
    assert found["rows"] == 4
    bits = -found["log_prob"] / (16 * 17 * 3 * math.log(2))
    assert found["bits_per_dim"] == pytest.approx(bits, rel=1e-12)
    shown = f"{bits:.3f} ± {found['std_error'] / (816 * math.log(2)):.3f} (-log p(x) / (816 log 2))"
    assert f"bits per dimension   {shown}" in succeed("evaluate", shapes / "run", "--samples", 30)
    succeed("report", shapes / "run")
    page = (shapes / "run" / "report.html").read_text()
    assert shown in page
    assert "Red, green and blue are shown from 0, dark, to 255, light." in page
    succeed("sample", shapes / "run", "-n", 3, "--out", tmp_path / "made.npy")
    made = np.load(tmp_path / "made.npy")
    assert (made.shape, made.dtype) == ((3, 16, 17, 3), np.uint8)
    succeed("sample", shapes / "run", "-n", 3, "--out", tmp_path / "made.png")
    grid = np.asarray(Image.open(tmp_path / "made.png"))
    np.testing.assert_array_equal(grid[:16, 19:36], made[1])
    assert "must end in .npy, .csv, .parquet, .png" in refuse("sample", shapes / "run", "-n", 3, "--out", "made.gif")


def test_new_images_are_scored_encoded_and_filled_in(shapes, tmp_path) -> None:
    run = shapes / "run"
    succeed("score", run, shapes / "all", "--out", tmp_path / "all.npy", "--samples", 10)
    every = np.load(tmp_path / "all.npy")
    succeed("score", run, shapes / "all" / "b", "--out", tmp_path / "b.npy", "--samples", 10)
    np.testing.assert_allclose(every[8:, 0], np.load(tmp_path / "b.npy")[:, 0], rtol=1e-5)
    files = sorted((shapes / "all").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    np.save(tmp_path / "pixels.npy", pixels)
    succeed("score", run, tmp_path / "pixels.npy", "--out", tmp_path / "again.npy", "--samples", 10)
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), every)
    succeed("encode", run, shapes / "all", "--out", tmp_path / "codes.npy")
    assert np.load(tmp_path / "codes.npy").shape == (16, 4)
    (tmp_path / "off").mkdir()
    Image.fromarray(pixels[0].transpose(1, 0, 2)).save(tmp_path / "off" / "a.png")
    message = refuse("score", run, tmp_path / "off")
    assert "images of 16 x 17 pixels" in message
    assert "trained on images of 17 x 16 pixels (width x height) in colour" in message
    assert "has no missing entry" in refuse("impute", run, shapes / "all", "--out", tmp_path / "a.npy")
    message = refuse("train", shapes / "all", "--net", "gated", "--channels", 3, "--out", tmp_path / "a")
    assert "`channels` goes with net convolutional only; got (3,) with gated" in message


def test_holes_in_images_are_seen_and_filled_in(tmp_path) -> None:
    """What is known stays; what is filled in lies among the levels; a folder without holes fits the same model."""
    x = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3)).astype(float)
    x[:, 1, 2] = np.where(np.arange(20)[:, None] < 7, np.nan, x[:, 1, 2])
    np.save(tmp_path / "holed.npy", x)
    few = ["--steps", 4, "--net", "convolutional", "--channels", 2, "--latents", 2, "--batch-size", 9]
    told = succeed("train", tmp_path / "holed.npy", "--out", tmp_path / "run", *few)
    assert "likelihood discretized-logistic, net convolutional" in told
    assert "of the entries that are known" in succeed("score", tmp_path / "run", tmp_path / "holed.npy", "--samples", 5)
    succeed("impute", tmp_path / "run", tmp_path / "holed.npy", "--out", tmp_path / "full.npy", "--samples", 20)
    full = np.load(tmp_path / "full.npy")
    known = np.isfinite(x)
    np.testing.assert_array_equal(full[known], x[known])
    assert ((full[~known] > 0) & (full[~known] < 255)).all()
    Image.fromarray(np.nan_to_num(x[0]).astype(np.uint8)).save(tmp_path / "one.png")
    assert "1, one.png" in succeed("score", tmp_path / "run", tmp_path / "one.png", "--samples", 5)


def _config(data: Data, **flags: object) -> ModelConfig:
    return model_config(flags, data)


def test_bytes_are_no_floats(tmp_path) -> None:
    """White is 1 to a model of floats: images of bytes would be scored 255 times too large."""
    grey = np.random.default_rng(0).random((60, 4, 4))
    np.save(tmp_path / "floats.npy", grey)
    np.save(tmp_path / "bytes.npy", (255 * grey).astype(np.uint8))
    succeed("train", tmp_path / "floats.npy", "--out", tmp_path / "run", *FAST)
    message = refuse("score", tmp_path / "run", tmp_path / "bytes.npy", "--out", tmp_path / "scores.csv")
    assert "has images of bytes, 0 to 255; the model was trained on floats" in message


def test_what_is_taken_for_images_of_bytes() -> None:
    """Nothing changes for counts with a limit, zeros and ones, and what is not bytes."""
    digits, grey = load_data("digits"), torch.randint(0, 256, (9, 16 * 18), dtype=torch.uint8)
    assert (_config(digits).likelihood, _config(digits).net) == ("binomial", "plain")
    images = Data(name="a", train=grey, image_shape=(16, 18))
    found = _config(images)
    assert (found.likelihood, found.net, found.image) == ("discretized-logistic", "convolutional", (1, 16, 18))
    assert _config(images, net="plain").image == ()
    assert _config(images, hidden=(8,)).net == _config(images, posterior="product").net == "plain"
    colour = Data(name="a", train=grey.repeat(1, 3), image_shape=(3, 16, 18))
    assert _config(colour).image == (3, 16, 18)
    small = _config(Data(name="a", train=grey, image_shape=(12, 24)))
    assert (small.likelihood, small.net) == ("discretized-logistic", "plain")
    assert _config(Data(name="a", train=grey.float(), image_shape=(16, 18))) == found
    holed = grey.float()
    holed[2, 3] = math.nan
    found = _config(Data(name="a", train=holed, image_shape=(16, 18)))
    assert (found.likelihood, found.net, found.holes) == ("discretized-logistic", "convolutional", True)
    for other, likelihood in (
        (Data(name="a", train=grey, image_shape=(16, 18), binarize="epoch"), "bernoulli"),
        (Data(name="a", train=(grey > 9).byte(), image_shape=(16, 18)), "bernoulli"),
        (Data(name="a", train=grey / 255, image_shape=(16, 18)), "normal"),
        (Data(name="a", train=grey), "normal"),
    ):
        found = _config(other)
        assert (found.likelihood, found.net) == (likelihood, "plain")
    assert _config(other, net="plain").net == "plain"
    with pytest.raises(InputError, match="`--net convolutional` is for images, and the rows of a are none"):
        _config(other, net="convolutional")


def test_sizes_of_models_of_cells() -> None:
    """Those of the field where there is a library, each overruled by its flag; batch statistics need a whole batch."""
    from scipy.sparse import csr_array

    rows = SparseRows(csr_array(np.random.default_rng(0).poisson(0.5, (30, 6)) * 2.0))
    cells = Data(name="a", train=rows)

    def sizes(config: ModelConfig) -> tuple[str, int, tuple[int, ...], bool]:
        return config.library, config.latents, config.hidden, config.batch_norm

    assert sizes(_config(cells)) == ("observed", 10, (128,), True)
    assert sizes(_config(cells, library="latent")) == ("latent", 10, (128,), True)
    assert sizes(_config(cells, library="none")) == ("none", 32, (256, 256), False)
    assert sizes(_config(Data(name="a", train=rows[:]), likelihood="negative-binomial")) == (
        "none", 32, (256, 256), False
    )  # fmt: skip
    stored_dense = Data(name="a.h5ad", train=rows[:])
    assert sizes(_config(stored_dense)) == sizes(_config(cells))
    holed = rows[:].index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(math.nan))
    assert sizes(_config(Data(name="a.h5ad", train=holed))) == ("none", 32, (256, 256), False)
    given = {"latents": 32, "hidden": (256, 256), "batch_norm": False}
    assert sizes(_config(cells, **given)) == ("observed", 32, (256, 256), False)
    assert sizes(_config(cells, hidden=())) == ("observed", 10, (), False)
    for model, training in (
        ({"net": "gated"}, {}), ({"prior": "vamp"}, {}), ({}, {"shards": 2}), ({}, {"batch_size": 1}),
    ):  # fmt: skip
        assert not model_config(model, cells, TrainConfig(**training)).batch_norm


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    return (pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)).to_numpy()


def test_report_is_written_with_the_evaluations_figures(digits) -> None:
    succeed("evaluate", digits, "--samples", 300)
    succeed("report", digits)
    page = (digits / "report.html").read_text()
    stored = json.loads((digits / "evaluation.json").read_text())
    assert f"{stored['log_prob']:.2f}" in page


def test_a_table_with_holes_is_trained_scored_and_reported(table, tmp_path) -> None:
    run = tmp_path / "run"
    assert "likelihood mixed" in succeed("train", table, "--out", run, *FAST)
    printed = succeed("evaluate", run, "--samples", 50)
    assert "validation log p(x) = " in printed
    succeed("report", run)
    succeed("score", run, table, "--out", tmp_path / "scores.csv", "--samples", 50)
    assert pl.read_csv(tmp_path / "scores.csv").columns == ["log_prob", "std_error", "ess", "pareto_k"]
    succeed("sample", run, "-n", 3, "--out", tmp_path / "new.csv")
    assert pl.read_csv(tmp_path / "new.csv").columns == ["height", "weight", "age"]


def test_mnist_files_with_per_epoch_binarisation_named_in_the_run(tmp_path) -> None:
    folder, rng = tmp_path / "mnist", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 60), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images.tobytes())
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels.tobytes())
    run = tmp_path / "run"
    assert "likelihood bernoulli" in succeed("train", folder, "--binarize", "epoch", "--out", run, *FAST)
    assert "drawn anew from Bernoulli(grey)" in succeed("evaluate", run, "--samples", 20)


def test_check_compares_with_closed_forms_and_can_fail(monkeypatch) -> None:
    from aevb.apps import check

    printed = succeed("check")
    assert printed.count(" ok (") == len(printed.splitlines()) - 1
    right = check.log_marginal

    def wrong(*args, **settings):
        found = right(*args, **settings)
        return type(found)(**{**vars(found), "log_prob": found.log_prob + 0.01})

    monkeypatch.setattr(check, "log_marginal", wrong)
    monkeypatch.setattr(check, "_after_training", lambda seed: [])
    broken = aevb("check")
    assert broken.returncode != 0
    assert "known answers are off: log marginal likelihood" in broken.stderr
    assert "OFF" in broken.stdout


# -- bad input ---------------------------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MISTAKES = {
    "missing file": (lambda d: [d / "absent.csv"], "absent.csv"),
    "empty file": (lambda d: [_write(d / "a.csv", "")], "a.csv"),
    "text column": (lambda d: [_write(d / "a.csv", "name,x\nAnn,1\nBob,2\n"), "--likelihood", "normal"], "name"),
    "ragged rows": (lambda d: [_write(d / "a.csv", "a,b\n1,2\n3\n4,5\n")], "line"),
    "infinity": (lambda d: [_write(d / "a.csv", "a,b\n1,2\n3,inf\n4,5\n")], "infinite"),
    "one row": (lambda d: [_write(d / "a.csv", "a,b\n1,2\n")], "row"),
    "all constant": (lambda d: [_write(d / "a.csv", "a,b\n1,2\n1,2\n1,2\n")], "constant"),
    "one constant": (
        lambda d: [_write(d / "a.csv", "a,b\n1,2\n1,3\n1,4\n"), "--likelihood", "normal"],
        "--drop-constant",
    ),
    "not an npy": (lambda d: [_write(d / "a.npy", "not an array")], "a.npy"),
    "grey to bernoulli": (
        lambda d: [_write(d / "a.csv", "a,b\n0.5,1\n0,1\n1,0\n"), "--likelihood", "bernoulli"],
        "outside the support of its Bernoulli",
    ),
    "17 of 16": (
        lambda d: [_write(d / "a.csv", "a,b\n17,1\n0,3\n1,0\n"), "--likelihood", "binomial", "--total-count", 16],
        "outside the support of its Binomial",
    ),
    "too many latents": (lambda d: ["digits", "--latents", 10_001], "`latents` must be between 1 and 10000"),
    "too large a batch": (lambda d: ["digits", "--samples", 10**9], "GiB"),
    "not binary": (lambda d: ["digits", "--total-count", 16, "--likelihood", "bernoulli"], "`total_count` goes with"),
    "iwae of one": (lambda d: ["digits", "--objective", "iwae"], "`samples` of 2 or more"),
    "no data": (lambda d: [], "needs DATA"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_ends_in_one_sentence_and_no_run(name, tmp_path) -> None:
    words, expected = MISTAKES[name]
    message = refuse("train", *words(tmp_path), "--out", tmp_path / "run")
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_an_out_that_cannot_be_made_is_told_before_training(tmp_path) -> None:
    file = _write(tmp_path / "file.csv", "a,b\n1,2\n3,4\n")
    assert "Could not write" in refuse("train", "digits", "--out", file / "run")


def test_resume_takes_no_settings_and_no_finished_run(digits) -> None:
    assert "other settings have no effect" in refuse("train", "--resume", digits, "--steps", 90)
    assert "is finished" in refuse("train", "--resume", digits)


def test_a_model_of_whole_rows_scores_rows_with_holes_if_asked_to(tmp_path) -> None:
    rng = np.random.default_rng(0)
    whole, holed = tmp_path / "whole.npy", tmp_path / "holed.npy"
    x = rng.normal(size=(80, 3)).astype(np.float32)
    np.save(whole, x)
    x[:5, 1] = np.nan
    np.save(holed, x[:10])
    blind, seeing = tmp_path / "blind", tmp_path / "seeing"
    succeed("train", whole, "--out", blind, *FAST)
    assert "train with --holes" in refuse("score", blind, holed, "--out", tmp_path / "a.csv")
    succeed("train", whole, "--out", seeing, "--holes", *FAST)
    succeed("score", seeing, holed, "--out", tmp_path / "a.csv", "--samples", 20)


def test_an_offset_changes_no_likelihood(tmp_path) -> None:
    """Times in seconds since 1970: float32 has steps of 128 there."""
    x = np.random.default_rng(0).normal(size=(200, 2)) * 10
    found = []
    for name, offset in (("near", 0.0), ("far", 1.7e9)):
        np.save(tmp_path / f"{name}.npy", np.round(x * 64) / 64 + offset)
        succeed("train", tmp_path / f"{name}.npy", "--out", tmp_path / name, *FAST)
        found.append(json.loads(succeed("evaluate", tmp_path / name, "--samples", 200, "--json")))
    near, far = found
    assert abs(near["log_prob"] - far["log_prob"]) < 0.02 + 4 * (near["monte_carlo_error"] + far["monte_carlo_error"])


def test_a_report_is_of_the_weights_it_shows(digits) -> None:
    """An evaluation of other weights is made anew."""
    succeed("evaluate", digits, "--samples", 50)
    stale = json.loads((digits / "evaluation.json").read_text()) | {"weights": "others", "log_prob": -1.0}
    (digits / "evaluation.json").write_text(json.dumps(stale))
    succeed("report", digits, "--samples", 60)
    fresh = json.loads((digits / "evaluation.json").read_text())
    assert fresh["samples"] == 60
    assert fresh["log_prob"] < -50
    assert str(digits.parent) not in (digits / "report.html").read_text()


def test_equal_rows_share_their_draws_and_the_error_says_so(digits, tmp_path) -> None:
    row = np.tile(np.arange(64) % 17, (40, 1)).astype(np.float32)
    for name, rows in (("one", row[:1]), ("forty", row)):
        np.save(tmp_path / f"{name}.npy", rows)
    one, forty = (
        json.loads(
            succeed("score", digits, tmp_path / f"{n}.npy", "--out", tmp_path / f"{n}.csv", "--samples", 40, "--json")
        )
        for n in ("one", "forty")
    )
    assert forty["monte_carlo_error"] == pytest.approx(one["monte_carlo_error"], rel=1e-3)
    assert one["std_error"] is None


def test_an_out_that_exists_is_left_alone(digits, tmp_path) -> None:
    keep = _write(tmp_path / "keep.csv", "precious")
    before = sorted((path, path.stat().st_mtime_ns) for path in digits.rglob("*"))
    assert "exists already" in refuse("train", "digits", "--out", digits, *FAST)
    assert "keep.csv" in refuse("sample", digits, "-n", 3, "--out", keep)
    assert keep.read_text() == "precious"
    assert sorted((path, path.stat().st_mtime_ns) for path in digits.rglob("*")) == before


def test_what_is_no_run_is_named(tmp_path, digits) -> None:
    assert "is not a run" in refuse("evaluate", tmp_path)
    assert "`samples`" in refuse("evaluate", digits, "--samples", 0)
    assert "`n` must be at least 1" in refuse("sample", digits, "-n", 0, "--out", tmp_path / "x.csv")
    wrong = _write(tmp_path / "narrow.csv", "a,b\n1,2\n3,4\n")
    assert "64" in refuse("score", digits, wrong, "--out", tmp_path / "s.csv")
    assert ".npy, .csv" in refuse("sample", digits, "-n", 1, "--out", tmp_path / "x.txt")


def test_data_that_changed_since_training_are_refused(table, tmp_path) -> None:
    run = tmp_path / "run"
    succeed("train", table, "--out", run, *FAST)
    table.write_text(table.read_text() + "1,2,3\n")
    assert "its content is another" in refuse("evaluate", run)


def test_a_full_disk_is_told_and_leaves_nothing(digits, tmp_path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", full)
    for words in (
        ["train", "digits", "--out", tmp_path / "run", *FAST],
        ["sample", digits, "-n", 3, "--out", tmp_path / "x.npy"],
        ["evaluate", digits, "--samples", 5],
    ):
        assert "No space left on device" in refuse(*words)
    assert not list(tmp_path.iterdir())
    assert {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()} == before


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on(tmp_path) -> None:
    run = tmp_path / "run"
    words = [
        "train",
        "digits",
        "--out",
        str(run),
        "--steps",
        "600",
        "--hidden",
        "16",
        "--latents",
        "4",
        "--log-every",
        "10",
    ]
    process = subprocess.Popen(
        [*AEVB, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not (run / "history.csv").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"aevb train --resume {run}" in errors
    assert "trained 600 steps" in succeed("train", "--resume", run)
