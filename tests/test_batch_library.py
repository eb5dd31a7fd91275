"""Library sizes by batch: what rows are drawn with, where the latent form starts, and what drawn rows then are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import sparse, stats

import aevb
from aevb import VAE, BayesNet
from aevb.apps.summary import sizes
from aevb.data import Batch, SparseRows
from test_batch import cells
from test_cli import succeed

FAST = ["--hidden", "16", "--latents", "2", "--validate-every", "100", "--log-every", "100"]
DONORS = ["A", "B", "B"] * 40
DEPTH = {"A": 400.0, "B": 4000.0}


def by_depth() -> np.ndarray:
    """Counts `(120, 6)` of cells of two depths; gene 0 is half of what donor A's cells hold, gene 5 of B's."""
    rng = np.random.default_rng(0)
    share = {"A": np.array([5, 1, 1, 1, 1, 1]) / 10, "B": np.array([1, 1, 1, 1, 1, 5]) / 10}
    return np.stack([rng.poisson(DEPTH[each] * rng.lognormal(0, 0.3) * share[each]) for each in DONORS])


def config(library: str, batches: int = 2) -> aevb.ModelConfig:
    return aevb.ModelConfig(
        features=6, likelihood="negative-binomial", library=library, batches=batches, latents=2, hidden=(4,)
    )  # fmt: skip


def seen(x: np.ndarray, donors: list[str] = DONORS) -> SparseRows:
    return SparseRows(sparse.csr_array(x)).beside(Batch.of("donor", donors), donors)


@pytest.mark.parametrize("dense", [False, True])
def test_sizes_start_at_those_of_each_batch(dense: bool) -> None:
    rows, logs = seen(by_depth()), np.log(by_depth().sum(1))
    net = aevb.build_vae(config("observed"), rows[:] if dense else rows).q.conditional("library").net
    for code, donor in enumerate("AB"):
        own = logs[np.array(DONORS) == donor]
        np.testing.assert_allclose(float(net.loc[code]), own.mean(), rtol=1e-6)
        np.testing.assert_allclose(float(net.scale[code]), own.std(), rtol=1e-5)


def test_a_batch_without_a_spread_has_that_of_all_rows() -> None:
    """One row, and rows of one size; where no rows differ at all, a floor."""
    x, donors = by_depth(), ["C", *DONORS[1:]]
    x[np.array(DONORS) == "B"] = [10, 20, 30, 40, 50, 60]
    logs = np.log(x.sum(1))
    net = aevb.build_vae(config("observed", 3), seen(x, donors)).q.conditional("library").net
    np.testing.assert_allclose(net.loc[1:].numpy(), [math.log(210), logs[0]], rtol=1e-6)
    np.testing.assert_allclose(net.scale[1:].numpy(), logs.std(), rtol=1e-5)
    for library in ("observed", "latent"):
        vae = aevb.build_vae(config(library), seen(np.ones_like(by_depth())))
        d = vae.p.distribution("library", {"batch": torch.eye(2)}) if library == "latent" else None
        scale = vae.q.conditional("library").net.scale if d is None else d.stddev
        np.testing.assert_allclose(scale.detach().numpy().ravel(), 1e-2, rtol=1e-5)


def test_rows_are_drawn_with_the_sizes_of_their_batch() -> None:
    """Mean log size of a donor's drawn rows within four standard errors; counts given a size are all but Poisson."""
    torch.manual_seed(0)
    x = by_depth()
    vae, batch = aevb.build_vae(config("observed"), seen(x)), torch.eye(2).repeat_interleave(2000, 0)
    with torch.no_grad():
        vae.p.conditional("x").log_theta.fill_(20.0)
        drawn = vae.p.sample(4000, {"batch": batch, **sizes(vae, 4000, batch)})["x"].sum(1).log()
    for donor, found in zip("AB", drawn.split(2000), strict=True):
        wanted = np.log(x.sum(1))[np.array(DONORS) == donor].mean()
        assert abs(float(found.mean()) - wanted) < 4 * float(found.std()) / 2000**0.5


def test_a_latent_size_has_a_prior_of_its_own_in_each_batch() -> None:
    """p(library | batch) starts at each donor's mean and spread, and log p(x, z, library | batch) has that factor."""
    torch.manual_seed(0)
    x = by_depth()
    rows, logs = seen(x), np.log(x.sum(1))
    vae = aevb.build_vae(config("latent"), rows)
    assert vae.p.keys == ("z", "library | batch", "x | z, batch, library")
    values = rows.take(torch.arange(120)) | {"z": torch.zeros(120, 2), "library": torch.from_numpy(logs[:, None] + 0.1)}
    found = vae.p.log_prob({name: each.float() for name, each in values.items()})["library"]
    for donor in "AB":
        own = np.array(DONORS) == donor
        wanted = stats.norm(logs[own].mean(), logs[own].std()).logpdf(logs[own] + 0.1)
        np.testing.assert_allclose(found[torch.from_numpy(own)].detach().numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert aevb.build_vae(config("latent", 0), torch.from_numpy(x).float()).p.keys[1] == "library"


def test_gaps_take_the_size_and_the_batch_of_each_row() -> None:
    """The figures are those of the same nets with the size given as context, within Monte Carlo errors."""
    torch.manual_seed(0)
    rows = seen(by_depth())
    vae, values = aevb.build_vae(config("observed"), rows), rows.take(torch.arange(4))
    told = VAE(vae.p, BayesNet({"z | x, batch": vae.q.conditional("z")}), given=("batch", "library"))
    settings = {"samples": 500, "temperatures": 5, "steps": 5}
    own = aevb.inference_gaps(vae, values, **settings)
    sized = values | {"library": values["x"].sum(1, keepdim=True).log()}
    other = aevb.inference_gaps(told, sized, **settings)
    for name in ("elbo", "log_prob"):  # noise is keyed by all that a row holds
        error = torch.hypot(getattr(own, f"{name}_error"), getattr(other, f"{name}_error"))
        assert bool(((getattr(own, name) - getattr(other, name)).abs() < 5 * error).all())


def test_a_latent_size_is_inferred_of_row_and_batch_by_a_net_of_its_own() -> None:
    """At first it is the sum of the row alone, since the last layer of that net is zero."""
    torch.manual_seed(0)
    rows = seen(by_depth())
    vae = aevb.build_vae(config("latent"), rows)
    x = rows.take(torch.arange(3))["x"]
    net = vae.q.conditional("library").net.net.net
    means = []
    for _ in range(2):
        with torch.no_grad():
            means += [vae.posterior({"x": x, "batch": torch.eye(2)[[i] * 3]})["library"].mean for i in range(2)]
            net.last.weight.fill_(0.5)
    torch.testing.assert_close(means[0], x.sum(1, keepdim=True).log())
    torch.testing.assert_close(means[0], means[1])
    assert bool(((means[2] - means[3]).abs() > 1e-3).all())
    assert not torch.equal(net.layers[0].weight, vae.q.conditional("z").net.net.layers[0].weight)


@pytest.fixture(scope="module", params=["observed", "latent"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    path = cells(folder, by_depth(), DONORS)
    succeed("train", path, "--out", folder / "run", "--batch", "donor", *FAST, "--steps", "300", "--learning-rate",
            "1e-2", "--library", request.param)  # fmt: skip
    return folder / "run"


def test_drawn_rows_differ_by_donor_as_their_genes_do(deep: Path, tmp_path: Path) -> None:
    """Of both forms; means over cells in 4 standard errors and a tenth: the model is learned of 120 cells."""
    succeed("sample", deep, "-n", 600, "--out", tmp_path / "made.csv")
    made, x = pl.read_csv(tmp_path / "made.csv"), by_depth()
    donor, drawn = made["donor"].to_numpy(), made.drop("donor").to_numpy()
    for each in "AB":
        mine, own = drawn[donor == each], x[np.array(DONORS) == each]
        gap = np.log(mine.sum(1).clip(1)).mean() - np.log(own.sum(1)).mean()
        assert abs(gap) < 0.1 + 4 * np.log(own.sum(1)).std() * (1 / len(mine) + 1 / len(own)) ** 0.5
        share = mine[:, [0, 5]].sum(0) / mine.sum()
        np.testing.assert_allclose(share, own[:, [0, 5]].sum(0) / own.sum(), atol=0.1)
    succeed("sample", deep, "-n", 50, "--given", "donor=A", "--out", tmp_path / "a.csv")
    assert pl.read_csv(tmp_path / "a.csv").drop("donor").to_numpy().sum(1).max() < 0.5 * DEPTH["B"]


def test_both_forms_are_evaluated_and_reported(deep: Path) -> None:
    latent = aevb.load(deep).vae.config.library == "latent"
    told = succeed("evaluate", deep, "--samples", 20, "--also", "information")
    assert f"validation log p(x | batch{'' if latent else ', library'}) = " in told
    assert ("mutual information  " in told) is not latent
    assert ("factor of `library` depends on `batch`, which is observed: the rows share no prior" in told) is latent
    succeed("report", deep, "--samples", 20)
