"""Batches of cells: what a model that is given them computes, what it gains, and the verbs and refusals on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch

import aevb
from aevb import VAE, BayesNet, InputError
from aevb.data import load
from test_cli import refuse, succeed
from test_counts import annotated, counts, saved
from test_export import call

FAST = ["--steps", "40", "--hidden", "8", "--latents", "2", "--validate-every", "20", "--log-every", "20"]
DONORS = [("A", "B", "C")[i % 7 % 3] for i in range(60)]


def cells(folder: Path, x: np.ndarray, donors: Any = DONORS, name: str = "a.h5ad", *, dense: bool = False) -> Path:
    """A file with the column `donor` in .obs, as AnnData writes what it is given; None is missing in categories."""
    path, text = annotated(folder, np.nan_to_num(x), name), h5py.string_dtype()
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        if isinstance(donors, list):
            names = sorted({donor for donor in donors if donor is not None})
            group = obs.create_group("donor")
            group.create_dataset("categories", data=names, dtype=text)
            group["codes"] = np.array([-1 if each is None else names.index(each) for each in donors], dtype=np.int8)
            group.attrs["encoding-type"] = "categorical"
        elif isinstance(donors, tuple):  # values, and which of them are missing
            group = obs.create_group("donor")
            group["values"], group["mask"] = donors
        elif donors is not None:
            kind = {"dtype": text} if donors.dtype.kind in "OU" else {}
            obs.create_dataset("donor", data=donors.astype(object) if kind else donors, **kind)
        if donors is not None:
            named(obs, "donor")
        if dense:
            del file["X"]
            file["X"] = x
    return path


def named(obs: Any, *columns: str) -> None:
    """Names columns of .obs as AnnData does."""
    obs.attrs.create("column-order", np.array(["depth", *columns], dtype=object), dtype=h5py.string_dtype())


def composed(vae: VAE) -> VAE:
    """By hand what `build_vae` made, of the same conditionals."""
    p = {"z": vae.p.conditional("z"), "x | z, batch, library": vae.p.conditional("x")}
    q = {"z | x, batch": vae.q.conditional("z"), "library | x": vae.q.conditional("library")}
    return VAE(BayesNet(p), BayesNet(q), given="batch")


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["negative-binomial", "zero-inflated"])
def test_the_density_given_batch_and_library_is_that_of_its_nets(likelihood: str) -> None:
    """log p(x | z, batch, l) with mu = l softmax(net(z beside the one-hot batch)), and q(z | x, batch) likewise."""
    torch.manual_seed(0)
    x, batch = torch.from_numpy(counts(6)).double(), torch.eye(3).double()[[0, 1, 2, 2, 1, 0]]
    config = aevb.ModelConfig(features=8, likelihood=likelihood, library="observed", batches=3, latents=2, hidden=(4,))
    vae = aevb.build_vae(config, x.float()).double()
    z, size = torch.randn(6, 2).double(), x.sum(1, keepdim=True).clamp(min=1).log()
    with torch.no_grad():
        likely = vae.p.conditional("x")
        out = likely.net(torch.cat([z, batch], 1))
        mean = out[:, :8].log_softmax(-1) + size
        family = aevb.distributions.NegativeBinomial(mean, likely.log_theta)
        if likelihood == "zero-inflated":
            family = aevb.distributions.ZeroInflatedNegativeBinomial(mean, likely.log_theta, out[:, 8:])
        found = vae.p.distribution("x", {"z": z, "batch": batch, "library": size}).log_prob(x)
        torch.testing.assert_close(found, family.log_prob(x).sum(1))
        seen = vae.q.conditional("z").net
        shown = torch.cat([(x.log1p() - seen.loc) / seen.scale, batch], 1)
        codes = vae.posterior({"x": x, "batch": batch})["z"]
        torch.testing.assert_close(codes.mean, seen.net(shown)[:, :2])
    assert (vae.given, vae.context) == (("batch",), ("library",))
    assert vae.p.keys == ("z", "x | z, batch, library")
    figures = []
    for each in (vae, composed(vae)):
        torch.manual_seed(1)
        figures.append(aevb.elbo(each, {"x": x, "batch": batch}, samples=3))
    torch.testing.assert_close(*figures)


@pytest.mark.parametrize(
    "choice",
    [
        {"likelihood": "negative-binomial", "library": "latent"},
        {"likelihood": "poisson", "posterior": "planar"},
        {"likelihood": "normal", "holes": True, "net": "gated"},
        {"likelihood": "bernoulli", "prior": "flow"},
        {"likelihood": "autoregressive"},
    ],
)
def test_other_likelihoods_and_posteriors_take_a_batch(choice: dict[str, Any]) -> None:
    """Its columns are no data: with the weights of the batch at zero the figures are those of any other batch."""
    torch.manual_seed(0)
    x = (torch.rand(8, 5) < 0.5).float()
    vae = aevb.build_vae(aevb.ModelConfig(features=5, batches=3, latents=2, hidden=(8,), **choice), x)
    figures = []
    for batch in torch.eye(3).unsqueeze(1).expand(3, 8, 3):
        torch.manual_seed(0)
        figures.append(aevb.elbo(vae, {"x": x, "batch": batch}))
    assert not torch.equal(figures[0], figures[1])
    with torch.no_grad():
        for net in vae.modules():
            if isinstance(net, aevb.MLP):
                width, first = net.inputs, net.layers[0]
                behind = {2 + 3: slice(2, 5), 5 + 3: slice(5, 8), 5 + 3 + 5: slice(5, 8), 3: slice(0, 3)}[width]
                first.weight[:, behind] = 0
    for batch in torch.eye(3).unsqueeze(1).expand(3, 8, 3):
        torch.manual_seed(0)
        figures.append(aevb.elbo(vae, {"x": x, "batch": batch}))
    torch.testing.assert_close(figures[3], figures[4])
    assert vae.p.sample(2, {"batch": torch.eye(3)[:2]})["x"].shape == (2, 5)


def test_what_batches_go_with() -> None:
    for wrong, told in (
        ({"batches": 1}, "0, or at least 2"),
        ({"batches": 2, "prior": "vamp"}, "`prior` vamp has no place for"),
        ({"batches": 2, "posterior": "product"}, "`posterior` product has no place for"),
        ({"batches": 2, "likelihood": "mixed", "kinds": ("count",) * 4}, "`likelihood` mixed has no place for"),
        ({"batches": 2, "net": "convolutional", "image": (1, 2, 2)}, "`net` convolutional has no place for"),
    ):
        with pytest.raises(InputError, match=told):
            aevb.ModelConfig(features=4, **wrong)
    with pytest.raises(InputError, match="Context has no value: `batch`"):
        aevb.elbo(aevb.build_vae(aevb.ModelConfig(features=4, batches=2)), {"x": torch.zeros(1, 4)})


def test_a_batch_that_is_given_is_what_z_need_not_tell() -> None:
    """Batches multiply the rates of some genes: given them, held-out rows are likelier, and z tells of them less.

    The margin of log p is in standard errors of the paired difference; batches are told by the ten nearest codes.
    """
    rng = np.random.default_rng(0)
    rows, genes, kept = 600, 20, 400
    batch = rng.integers(0, 3, rows)
    scores, effect = rng.normal(size=(rows, 2)) @ rng.normal(size=(2, genes)), np.zeros((3, genes))
    for each in effect:
        each[rng.choice(genes, 6, replace=False)] = 1.5
    share = np.exp(0.6 * scores + effect[batch])
    share /= share.sum(1, keepdims=True)
    x = torch.from_numpy(rng.poisson(200 * share)).float()
    told = torch.eye(3)[torch.from_numpy(batch)]
    log_prob, right = [], []
    for batches in (0, 3):
        torch.manual_seed(0)
        config = aevb.ModelConfig(
            features=genes, likelihood="negative-binomial", library="observed", batches=batches, latents=4, hidden=(32,)
        )
        vae = aevb.build_vae(config, x[:kept])
        values = {"x": x, "batch": told} if batches else {"x": x}
        unseen = {name: each[kept:] for name, each in values.items()}
        seen = {name: each[:kept] for name, each in values.items()}
        aevb.fit(vae, seen, aevb.TrainConfig(steps=400, learning_rate=5e-3, validation=0.0, compile=False))
        log_prob.append(aevb.log_marginal(vae, unseen, samples=200).log_prob)
        z, at = vae.posterior(values)["z"].mean, torch.from_numpy(batch)
        near = torch.cdist(z[kept:], z[:kept]).topk(10, largest=False).indices
        right.append(float((at[near].mode(1).values == at[kept:]).double().mean()))
    gain = log_prob[1] - log_prob[0]
    assert float(gain.mean()) > 4 * float(gain.std()) / (rows - kept) ** 0.5
    # A third right is chance, with a standard error of 0.033 over 200 rows; without the batch all are.
    assert right[1] < 0.5 < 0.9 < right[0]


# ---- the verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("batches")
    path = cells(folder, counts())
    told = succeed("train", path, "--out", folder / "run", "--batch", "donor", *FAST)
    assert "a.h5ad: 60 rows of 8, in 3 batches by donor, likelihood negative-binomial" in told
    return folder / "run", path


def nodes(path: Path) -> dict[str, torch.Tensor]:
    data = load(path, batch="donor")
    assert data.batch is not None
    return data.batch.split(data.train[:])


def test_figures_say_what_is_given_and_are_the_librarys(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = trained
    told = succeed("evaluate", run, "--samples", 50)
    assert "validation log p(x | batch, library) = " in told
    assert "batch, told of each row, and library, computed of x itself: compare with models that are given them" in told
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["features"], found["known"]) == (8, 6 * 8)
    assert "log p(x | batch, library)" in succeed("score", run, path, "--samples", 50, "--out", tmp_path / "s.csv",
                                                  "--by-column", "--top", 2)  # fmt: skip
    scores, vae = pl.read_csv(tmp_path / "s.csv"), aevb.load(run).vae
    exact = aevb.log_marginal(vae, nodes(path), 50).log_prob
    np.testing.assert_allclose(scores["log_prob"], exact, rtol=1e-12)
    assert scores.columns[-1] == "gene7_nll_std_error"
    succeed("score", run, path, "--samples", 50, "--out", tmp_path / "s.h5ad")
    with h5py.File(tmp_path / "s.h5ad") as file:
        np.testing.assert_array_equal(file["obs/aevb_log_prob"][()], exact)
        assert [*file["obs"].attrs["column-order"]][:3] == ["depth", "donor", "aevb_log_prob"]


def test_codes_are_those_given_the_batch(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = trained
    vae, values = aevb.load(run).vae, nodes(path)
    codes = vae.posterior(values)["z"]
    succeed("encode", run, path, "--out", tmp_path / "codes.h5ad", "--expected")
    with h5py.File(tmp_path / "codes.h5ad") as file:
        np.testing.assert_allclose(file["obsm/X_aevb"][()], codes.mean, rtol=1e-5, atol=1e-6)
        layer = file["layers/aevb_expected"][()]
    # Of each entry the mean over draws of z, in the row's own batch and at its own size.
    known = values | {"z": codes.sample(torch.Size([400]))}
    known["library"] = vae.computed(values | {"z": codes.mean}, ("z",))["library"]
    with torch.no_grad():
        drawn = vae.p.distribution("x", known).mean
    error = drawn.std(0) * (1 / 25 + 1 / 400) ** 0.5
    assert ((torch.from_numpy(layer) - drawn.mean(0)).abs() <= 6 * error + 1e-5).all()


def test_diagnoses_and_report(trained: tuple[Path, Path]) -> None:
    run, _ = trained
    assert "mutual information" in succeed("evaluate", run, "--samples", 20, "--also", "information")
    assert "draws them only where library is given" in refuse("evaluate", run, "--samples", 20, "--also", "checks")
    succeed("report", run, "--samples", 20)
    page = (run / "report.html").read_text()
    assert "log p(x | batch, library)" in page
    assert "Colours are the batches, donor" in page
    assert "these two directions do not tell the batches apart; others" in page
    assert "by donor: A, B, C" in page


def test_a_model_without_a_library_is_diagnosed_in_full(tmp_path: Path) -> None:
    """Rows are simulated in the batches of the rows at hand; the rows are dense, and have holes."""
    x = counts().astype(np.float32)
    x[3, 1] = x[5] = np.nan
    path, run = cells(tmp_path, x, dense=True), tmp_path / "run"
    succeed("train", path, "--out", run, "--batch", "donor", *FAST, "--likelihood", "poisson")
    few = ["--also-rows", 2, "--temperatures", 5]
    told = succeed("evaluate", run, "--samples", 20, "--also", "ais", "calibration", "checks", *few)
    assert "validation log p(x | batch) = " in told
    assert "batch, told of each row: compare with models that are given it, too" in told
    told = succeed("impute", run, path, "--out", tmp_path / "filled.csv", "--samples", 50)
    assert "9 missing entries of 60 rows filled in" in told
    assert "filled in from the prior: 1" in told
    filled = pl.read_csv(tmp_path / "filled.csv")
    assert filled.columns == [f"gene{j}" for j in range(8)]
    known = ~np.isnan(x)
    np.testing.assert_array_equal(filled.to_numpy()[known], x[known])
    exact = aevb.impute(aevb.load(run).vae, nodes(path), 50).mean["x"]
    np.testing.assert_allclose(filled.to_numpy(), exact, rtol=1e-6)
    assert "rows that hold nothing, whose log p is 0: 1" in succeed("score", run, path, "--samples", 20)
    assert "median distance" in succeed("sample", run, "-n", 5, "--out", tmp_path / "made.csv")
    assert "x, batch to" in succeed("export", run, "--out", tmp_path / "nets")


def test_samples_tell_their_batch(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = trained
    assert "last column: donor\n" in succeed("sample", run, "-n", 900, "--out", tmp_path / "made.csv")
    made = pl.read_csv(tmp_path / "made.csv")
    assert made.columns == [*(f"gene{j}" for j in range(8)), "donor"]
    for donor in "ABC":
        share = DONORS.count(donor) / 60
        drawn = float((made["donor"] == donor).mean())
        assert abs(drawn - share) < 4 * (share * (1 - share) / 900) ** 0.5
    succeed("sample", run, "-n", 7, "--given", "donor=B", "--out", tmp_path / "b.parquet")
    assert pl.read_parquet(tmp_path / "b.parquet")["donor"].to_list() == ["B"] * 7
    assert "0 for A, 1 for B, 2 for C" in succeed("sample", run, "-n", 5, "--given", "donor == C", "--out",
                                                  tmp_path / "c.npy")  # fmt: skip
    assert np.load(tmp_path / "c.npy")[:, 8].tolist() == [2.0] * 5
    assert "written" in succeed("sample", run, "-n", 2, "--given", " donor = A ", "--out", tmp_path / "e.csv")
    for wrong in (["donor=D"], ["gene1>2"], ["donor=A", "gene1>2"], ["donor>A"], ["donorA"]):
        words = [word for each in wrong for word in ("--given", each)]
        told = refuse("sample", run, "-n", 5, *words, "--out", tmp_path / "d.csv")
        assert "donor=VALUE, with one of `A`, `B`, `C`" in told


def test_runs_given_other_batches_are_not_compared(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = trained[0], tmp_path / "a.h5ad"
    shutil.copyfile(trained[1], path)
    with h5py.File(path, "r+") as file:
        file["obs/plate"] = np.arange(60) % 2
        named(file["obs"], "donor", "plate")
    for name, batch in (("bare", []), ("plate", ["--batch", "plate"]), ("twin", ["--batch", "donor", "--seed", "0"])):
        succeed("train", path, "--out", tmp_path / name, *FAST, *batch)
    told = refuse("compare", run, tmp_path / "bare", "--samples", 20)
    assert "is given batch and library, `bare` library: log p(x | batch, library) is no log p(x | library)" in told
    told = refuse("compare", run, tmp_path / "plate", "--samples", 20)
    assert "from different columns, `donor` and `plate`" in told
    told = succeed("compare", run, tmp_path / "twin", "--samples", 20)
    assert "validation log p(x | batch, library) of 6 rows" in told


def test_a_run_goes_on_to_the_bit(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = trained
    words = ["train", path, "--batch", "donor", *FAST, "--checkpoint-every", "20", "--average", "0"]
    succeed(*words, "--out", tmp_path / "whole")
    stopped = _stopped_at(20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("aevb.apps.train.steps_done", stopped)
        told = refuse(*words, "--out", tmp_path / "cut")
    assert "go on with: aevb train --resume" in told
    succeed("train", "--resume", tmp_path / "cut")
    one, other = (aevb.load(tmp_path / name) for name in ("whole", "cut"))
    assert other.history[-1]["step"] == 40
    assert all(torch.equal(value, other.vae.state_dict()[name]) for name, value in one.vae.state_dict().items())
    assert "Drop them" in refuse("train", "--resume", tmp_path / "cut", "--batch", "donor")


def test_parts_of_a_batch_and_coarse_products(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = trained
    words = ["--batch-size", "20", "--shards", "2", "--steps", "4", "--hidden", "8", "--latents", "2"]
    succeed("train", path, "--batch", "donor", *words, "--out", tmp_path / "run")
    told = succeed("evaluate", tmp_path / "run", "--samples", 30, "--precision", "bfloat16")
    assert "Matrix products in bfloat16" in told
    assert "validation log p(x | batch, library) = " in told


def _stopped_at(step: int) -> Callable[..., Any]:
    """Progress that interrupts training once a record of that step is out."""
    import contextlib

    @contextlib.contextmanager
    def shown(*_: Any, **__: Any) -> Any:
        def bar(record: dict[str, Any]) -> None:
            if record["step"] >= step:
                raise KeyboardInterrupt

        yield bar

    return shown


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_exported_parts_take_the_batch(trained: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    run, path = trained
    succeed("export", run, "--out", tmp_path / "nets", "--format", form)
    record = json.loads((tmp_path / "nets" / "export.json").read_text())
    assert record["batch"]["values"] == ["A", "B", "C"]
    assert list(record["parts"]["encoder"]["inputs"]) == ["x", "batch"]
    vae, values = aevb.load(run).vae, {name: value[:5] for name, value in nodes(path).items()}
    mean, _, library = call(tmp_path / "nets", "encoder", values["x"], values["batch"])
    torch.testing.assert_close(mean, vae.posterior(values)["z"].mean, atol=2e-6, rtol=1e-5)
    (found,) = call(tmp_path / "nets", "decoder", torch.cat([mean, values["batch"], library], 1))
    wanted = vae.p.distribution("x", {"z": mean, "batch": values["batch"], "library": library}).mean
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if form == "onnx":  # which has no gamma function
        assert "scorer" in record["left_out"]
        return
    assert list(record["parts"]["scorer"]["inputs"]) == ["x", "noise", "batch"]
    assert "log p(x | batch, library)" in record["parts"]["scorer"]["outputs"]["log_prob"]
    (scored,) = call(tmp_path / "nets", "scorer", values["x"], torch.zeros(1, 5, 2), values["batch"])
    known = values | {"z": mean, "library": library}
    terms = sum(value for name, value in vae.p.log_prob(known).items())
    at_mean = vae.posterior(values)["z"].log_prob(mean)
    torch.testing.assert_close(scored, terms - at_mean, atol=1e-4, rtol=1e-5)


def test_a_published_model_knows_its_batches(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = trained
    hub = tmp_path / "hub"
    told = succeed("export", run, "--out", hub, "--format", "pretrained")
    assert "hold the names of all 3 batches (donor) and their numbers of rows" in told
    text = (hub / "README.md").read_text()
    assert f"`donor`, given to the model: `A` ({DONORS.count('A')} rows)" in text
    assert "given batch, which each row brings" in text
    assert "holds the names of all batches" in text
    assert "drawn from q(z | x, batch)" in text
    vae = aevb.from_pretrained(hub)
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in aevb.load(run).vae.state_dict().items())
    for each in (run, hub):
        succeed("score", each, path, "--samples", 20, "--out", tmp_path / f"{each.name}.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "run.npy"), np.load(tmp_path / "hub.npy"))
    succeed("sample", hub, "-n", 3, "--given", "donor=A", "--out", tmp_path / "made.csv")


def test_other_files_must_tell_a_batch_that_is_known(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = trained
    few = counts(6)
    same = cells(tmp_path, few, np.array(["C", "C", "A", "A", "C", "A"]), "text.h5ad")  # of another type and order
    succeed("score", run, same, "--samples", 20)
    for name, donors, told in (
        ("new.h5ad", ["A", "B", "Z", "A", "B", "A"], "`donor` is 'Z' in row 2 (counting from 0), a batch that the "
         "model was not trained on; it knows `A`, `B`, `C`"),
        ("gap.h5ad", ["A", "B", "C", "A", None, "A"], "row 4 (counting from 0) has no value of `donor`"),
        ("none.h5ad", None, "has no column `donor` in .obs, which is to name each row's batch; it has `depth`"),
    ):  # fmt: skip
        path = cells(tmp_path, few, donors, name)
        for verb in ("score", "encode", "impute"):
            assert told in refuse(verb, run, path, "--out", tmp_path / "out.csv")
    assert "in the column `donor`; " in refuse("score", run, saved(tmp_path, few, "few.npz"))
    for donors, told in (
        (DONORS[::-1], "its content is another"),
        (["A", "B", "D"] * 20, "`donor` names other batches"),
    ):
        assert told in refuse("evaluate", run, "--data", cells(tmp_path, counts(), donors, "moved.h5ad"))
