"""Batches of cells: what a model that is given them computes, what it gains, and the verbs and refusals on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import aevb
from aevb import VAE, BayesNet, InputError
from aevb.data import Batch, SparseRows, load, read_rows
from test_counts import annotated, counts

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
            obs.attrs.create("column-order", np.array(["depth", "donor"], dtype=object), dtype=text)
        if dense:
            del file["X"]
            file["X"] = x
    return path


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
                behind = {2 + 3: slice(2, 5), 5 + 3: slice(5, 8), 2 * (5 + 3): slice(5, 8)}[width]
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


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_rows_carry_their_batch_and_genes_stay_what_they_are(tmp_path: Path, dense: bool) -> None:
    x = counts()
    x[:, 2] = 0
    path = cells(tmp_path, x.astype(np.float32), dense=dense)
    data, bare = load(path, batch="donor", drop_constant=True), load(path, drop_constant=True)
    assert data.batch == Batch(column="donor", values=("A", "B", "C"), counts=tuple(map(DONORS.count, "ABC")))
    for name in ("features", "columns", "constant", "dropped", "kept"):
        assert getattr(data, name) == getattr(bare, name)
    one_hot = torch.eye(3)[[("A", "B", "C").index(donor) for donor in DONORS]]
    training, at = data.training(), torch.tensor([5, 0])
    assert isinstance(training, SparseRows) is not dense
    taken = training.take(at) if isinstance(training, SparseRows) else {k: v[at] for k, v in training.items()}
    torch.testing.assert_close(taken, {"x": bare.train[at], "batch": one_hot[at]})
    told = data.describe()
    assert told["batch"] == {"column": "donor", "values": ["A", "B", "C"], "counts": list(data.batch.counts)}
    assert told["sha256"] != bare.describe()["sha256"]
    swapped = load(cells(tmp_path, x.astype(np.float32), DONORS[::-1], "b.h5ad", dense=dense), batch="donor")
    assert swapped.describe()["sha256"] != load(path, batch="donor").describe()["sha256"]
    again = read_rows(path, columns=data.columns, kept=data.kept, dropped=data.dropped, batch=data.batch)
    np.testing.assert_array_equal(again[:].numpy(), data.train[:].numpy())
    config = aevb.ModelConfig(features=7, likelihood="negative-binomial", library="observed", batches=3, hidden=(4,))
    starts = []
    for rows in (data.train, bare.train):
        torch.manual_seed(0)
        starts.append(aevb.build_vae(config, rows).state_dict())
    torch.testing.assert_close(*starts)


WRITTEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "text": (np.array(DONORS), ("A", "B", "C")),
    "whole numbers": (np.array([10 if donor == "A" else 9 for donor in DONORS]), ("9", "10")),
    "booleans": (np.array([donor == "A" for donor in DONORS]), ("False", "True")),
    "nullable": ((np.arange(60) % 2, np.zeros(60, dtype=bool)), ("0", "1")),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_column_of_batches_may_be_of_several_types(tmp_path: Path, kind: str) -> None:
    column, values = WRITTEN[kind]
    data = load(cells(tmp_path, counts(), column), batch="donor")
    assert data.batch is not None
    assert data.batch.values == values
    assert sum(data.batch.counts) == 60


BAD: dict[str, tuple[Any, str, str]] = {
    "no such column": (DONORS, "plate", "has no column `plate` in .obs, .* it has `depth`, `donor`"),
    "missing": ([*DONORS[:3], None, *DONORS[4:]], "donor", "row 3 .counting from 0. has no value of `donor`"),
    "missing in a mask": ((np.arange(60) % 2, np.arange(60) == 7), "donor", "row 7 .* has no value of `donor`"),
    "empty text": (np.array(["", *DONORS[1:]]), "donor", "row 0 .* has no value of `donor`"),
    "one batch": (["A"] * 60, "donor", "one batch only, `donor` being 'A' in every row"),
    "names of cells": ([str(i) for i in range(60)], "donor", "60 values of `donor` in 60 rows, which look like names"),
    "fractions": (np.linspace(0, 1, 60), "donor", "holds float64, and a batch is a category, text"),
    "a gene": (DONORS, "gene1", "names of both .obs and .var"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_column_that_tells_no_batches_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    donors, column, told = BAD[name]
    path = cells(tmp_path, counts(), donors)
    if name == "a gene":
        with h5py.File(path, "r+") as file:
            file["obs"].move("donor", "gene1")
    with pytest.raises(InputError, match=told):
        load(path, batch=column)
