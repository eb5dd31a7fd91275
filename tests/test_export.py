"""Exported networks: the files alone give the run's figures, for any number of rows and draws."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
import torch.distributions as td

import aevb
from test_cli import refuse, succeed

TRAIN = ["--steps", "40", "--hidden", "8", "--latents", "2", "--validate-every", "20", "--log-every", "20"]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zeros and ones with holes, and a run on them."""
    folder = tmp_path_factory.mktemp("binary")
    x = (np.random.default_rng(0).random((80, 5)) < [0.1, 0.3, 0.5, 0.7, 0.9]).astype(np.float32)
    x[::7, 1] = np.nan
    np.save(folder / "x.npy", x)
    succeed("train", folder / "x.npy", "--out", folder / "run", *TRAIN, "--likelihood", "bernoulli")
    return folder


@pytest.fixture(scope="module", params=["torch", "onnx"])
def exported(request: pytest.FixtureRequest, binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / str(request.param)  # new each time: it may be made more than once
    told = succeed("export", binary / "run", "--out", folder, "--format", request.param)
    assert [line.split(":")[0].rsplit(".")[0].rsplit("/")[-1] for line in told.splitlines()] == [
        "encoder", "decoder", "scorer",
    ]  # fmt: skip
    return folder


def call(folder: Path, part: str, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A part, run by what is not this library."""
    record = json.loads((folder / "export.json").read_text())
    told = record["parts"][part]
    path = folder / told["file"]
    if record["format"] == "torch":
        found = torch.export.load(path).module()(*given)
        return tuple(found) if isinstance(found, tuple | list) else (found,)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(told["inputs"])
    feed = {name: each.numpy() for name, each in zip(told["inputs"], given, strict=True)}
    return tuple(torch.from_numpy(each) for each in session.run(list(told["outputs"]), feed))


@pytest.mark.parametrize(("rows", "draws"), [(1, 1), (1, 300), (37, 5)])
def test_parts_are_the_runs_own(exported: Path, binary: Path, rows: int, draws: int) -> None:
    """Against the formulas, written out from the moments of the first two parts."""
    x = torch.from_numpy(np.load(binary / "x.npy"))[:rows]
    vae = aevb.load(binary / "run").vae
    mean, std = call(exported, "encoder", x)
    codes = vae.posterior({"x": x})["z"]
    torch.testing.assert_close(mean, codes.mean, atol=2e-6, rtol=0)
    torch.testing.assert_close(std, codes.stddev, atol=2e-6, rtol=0)
    noise = torch.randn(draws, rows, 2, generator=torch.Generator().manual_seed(1))
    z = mean + std * noise
    probs = call(exported, "decoder", z.flatten(0, 1))[0].unflatten(0, (draws, rows))
    known = td.Bernoulli(probs.double()).log_prob(x.double().nan_to_num(0.0)).where(~x.isnan(), 0.0).sum(-1)
    prior = td.Normal(0.0, 1.0).log_prob(z.double()).sum(-1)
    q = td.Normal(mean.double(), std.double()).log_prob(z.double()).sum(-1)
    wanted = (known + prior - q).logsumexp(0) - math.log(draws)
    (found,) = call(exported, "scorer", x, noise)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)


def test_the_record_tells_shapes_and_parity(exported: Path) -> None:
    record = json.loads((exported / "export.json").read_text())
    assert record["left_out"] == {}
    assert record["made"]["aevb"] == aevb.__version__
    for part in record["parts"].values():
        assert part["compared_rows"] == 8
        assert part["largest_difference"].keys() == part["outputs"].keys()
        assert all(0 <= away < 2e-5 for away in part["largest_difference"].values())
        assert all(text.startswith("(") for text in [*part["inputs"].values(), *part["outputs"].values()])


def test_a_table_is_exported_with_its_schema(tmp_path: Path) -> None:
    """Columns of several kinds, and a posterior with full covariance, whose products need two rows or more."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"sex": rng.choice(["f", "m"], 90), "height": rng.normal(1.7, 0.1, 90).round(3)})
    frame.write_csv(tmp_path / "people.csv")
    run, out = tmp_path / "run", tmp_path / "nets"
    succeed("train", tmp_path / "people.csv", "--out", run, *TRAIN, "--posterior", "product")
    assert "on 9 rows at most" in succeed("export", run, "--out", out)
    record = json.loads((out / "export.json").read_text())
    assert record["columns"] == ["sex", "height"]
    assert [column["name"] for column in record["schema"]["columns"]] == ["sex", "height"]
    assert {part["least_rows_and_draws"] for part in record["parts"].values()} == {1, 2}
    assert len(record["parts"]) == 3


def test_what_has_no_closed_form_or_operator_is_left_out_and_named(binary: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "nets"
    flow = ["--likelihood", "negative-binomial", "--posterior", "planar"]
    succeed("train", binary / "x.npy", "--out", run, *TRAIN, *flow)
    told = succeed("export", run, "--out", out, "--format", "onnx")
    assert "encoder: left out, q(z | x) is a flow, which has no moments in closed form" in told
    assert re.search(r"scorer: left out, which onnx cannot hold: .*lgamma", told)
    record = json.loads((out / "export.json").read_text())
    assert set(record["parts"]) == {"decoder"}
    assert set(record["left_out"]) == {"encoder", "scorer"}
    assert {path.name for path in out.iterdir()} == {"decoder.onnx", "export.json"}


def test_counts_of_cells_are_exported_with_their_library_size(tmp_path: Path) -> None:
    """The encoder gives what the decoder takes; columns that were dropped are told."""
    counts = np.random.default_rng(0).poisson(2.0, (60, 5)).astype(np.float32)
    counts[:, 1] = 0
    np.save(tmp_path / "x.npy", counts)
    run, out = tmp_path / "run", tmp_path / "nets"
    likelihood = ["--likelihood", "negative-binomial", "--library", "observed", "--drop-constant"]
    succeed("train", tmp_path / "x.npy", "--out", run, *TRAIN, *likelihood)
    succeed("export", run, "--out", out)
    record = json.loads((out / "export.json").read_text())
    assert record["kept"] == [0, 2, 3, 4]
    assert list(record["parts"]["encoder"]["outputs"]) == ["mean_z", "std_z", "library"]
    x = torch.from_numpy(counts[:3][:, record["kept"]])
    mean, _, library = call(out, "encoder", x)
    torch.testing.assert_close(library, x.sum(1, keepdim=True).log())
    (expected,) = call(out, "decoder", torch.cat([mean, library], 1))
    torch.testing.assert_close(expected.sum(1), x.sum(1))  # shares of the library


def test_a_file_that_is_off_is_left_out(binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aevb.apps.export._ROUNDING", -1.0)
    assert "Try --format torch" in refuse("export", binary / "run", "--out", tmp_path / "nets")
    assert not (tmp_path / "nets").exists()


def test_mistakes_are_told(binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "exists already" in refuse("export", binary / "run", "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = refuse("export", binary / "run", "--out", tmp_path / "new", "--format", "onnx")
    assert "pip install 'aevb[onnx]'" in told
    assert not (tmp_path / "new").exists()
