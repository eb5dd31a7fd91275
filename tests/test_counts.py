"""Sparse counts: kept sparse to the batch, a library size, refusals in a sentence, and the verbs on them."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse, stats

import aevb
from aevb.apps.tables.filling import _expectation
from aevb.config import InputError
from aevb.data import SparseRows, check_h5ad, load, read_rows, write_h5ad
from aevb.evaluate.path import Path as Annealing
from test_cli import refuse, succeed

FAST = ["--steps", "40", "--hidden", "8", "--latents", "2", "--validate-every", "20", "--log-every", "20"]


def counts(rows: int = 60, columns: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(rng.gamma(0.4, 2.0, (rows, columns)))


def saved(folder: Path, x, name: str = "a.npz") -> Path:
    sparse.save_npz(folder / name, x if sparse.issparse(x) else sparse.csr_matrix(x))
    return folder / name


def annotated(folder: Path, x, name: str = "a.h5ad", *, layers: dict | None = None) -> Path:
    """A file as AnnData 0.12 writes it: X by rows, layers, a column of obs, names, and things that are not ours."""
    text = h5py.string_dtype()
    with h5py.File(folder / name, "w") as file:
        for home, matrix in (("X", x), *((f"layers/{key}", value) for key, value in (layers or {}).items())):
            matrix = sparse.csr_matrix(matrix)
            group = file.create_group(home)
            group.attrs["encoding-type"], group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
            group.attrs["shape"] = matrix.shape
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(matrix, part)
        for table, label, count in (("obs", "cell", x.shape[0]), ("var", "gene", x.shape[1])):
            group = file.create_group(table)
            group.attrs["encoding-type"], group.attrs["encoding-version"] = "dataframe", "0.2.0"
            group.attrs["_index"] = "_index"
            group.attrs.create("column-order", np.array(["depth"], dtype=object), dtype=text)
            group.create_dataset("_index", data=[f"{label}{i}" for i in range(count)], dtype=text)
            group["depth"] = np.arange(count)
            for each in ("_index", "depth"):
                group[each].attrs["encoding-type"] = "string-array" if each == "_index" else "array"
                group[each].attrs["encoding-version"] = "0.2.0"
        file["uns/colours"] = np.arange(3)
    return folder / name


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_a_sparse_file_is_its_dense_rows_and_stays_sparse(tmp_path, form):
    x = counts()
    data = load(saved(tmp_path, sparse.csr_matrix(x).asformat(form)))
    assert isinstance(data.train, SparseRows)
    assert sparse.issparse(data.train.matrix)
    assert data.train.matrix.nnz == (x > 0).sum()
    np.testing.assert_array_equal(data.train[:].numpy(), x)
    at = torch.tensor([5, 0, 5])
    np.testing.assert_array_equal(data.train.take(at)["x"].numpy(), x[at])
    np.testing.assert_array_equal(data.train.select(at, torch.tensor([7, 1]))[:].numpy(), x[at][:, [7, 1]])
    assert torch.cat(data.train.split()).tolist() == list(range(60))
    told = data.describe()
    assert (told["rows"], told["features"], told["missing"]) == (
        {"train": 60, "test": None},
        8,
        {"train": 0, "test": None},
    )
    same = load(saved(tmp_path, sparse.csr_matrix(x), "b.npz")).describe()["sha256"]
    assert told["sha256"] == same  # whatever form the file has


def test_labels_beside_a_sparse_matrix_and_positions_in_few_bits(tmp_path):
    matrix = sparse.csr_matrix(counts())
    parts = {"data": matrix.data.astype(np.uint16), "indices": matrix.indices.astype(np.uint16)}
    np.savez(tmp_path / "a.npz", **parts, indptr=matrix.indptr, shape=matrix.shape, y=np.arange(60) % 3)
    data = load(tmp_path / "a.npz")
    np.testing.assert_array_equal(data.train[:].numpy(), matrix.toarray())
    assert data.train_labels.tolist() == (np.arange(60) % 3).tolist()


def test_constant_columns_are_dropped_and_dropped_again_from_other_files(tmp_path):
    x = counts()
    x[:, 2] = 0
    path = saved(tmp_path, x)
    data = load(path, drop_constant=True)
    assert (data.features, data.dropped, data.kept) == (7, ("column 2",), (0, 1, 3, 4, 5, 6, 7))
    again = read_rows(path, kept=data.kept, features=7, dropped=data.dropped)
    np.testing.assert_array_equal(again[:].numpy(), np.delete(x, 2, 1))


BAD = {
    "missing": (lambda x: sparse.csr_matrix(np.where(x == x.max(), np.nan, x)), "is missing .NaN."),
    "infinite": (lambda x: sparse.csr_matrix(np.where(x == x.max(), np.inf, x)), "is infinite"),
    "no rows": (lambda x: sparse.csr_matrix((0, 8)), "at least one of each"),
    "one row": (lambda x: sparse.csr_matrix(x[:1]), "has one row"),
    "complex": (lambda x: sparse.csr_matrix(x * 1j), "real numbers are needed"),
    "blocks": (lambda x: sparse.bsr_matrix(x), "csr, csc or coo are read"),
    "nothing": (lambda x: sparse.csr_matrix(np.zeros_like(x)), "only constant columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_sparse_file_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, name):
    make, told = BAD[name]
    with pytest.raises(InputError, match=told):
        load(saved(tmp_path, make(counts().astype(float))))


def test_positions_beyond_the_matrix_are_refused(tmp_path):
    matrix = sparse.csr_matrix(counts())
    matrix.indices[3] = 1000
    np.savez(tmp_path / "a.npz", data=matrix.data, indices=matrix.indices, indptr=matrix.indptr, shape=matrix.shape)
    with pytest.raises(InputError, match="cannot be read as NumPy data"):
        load(tmp_path / "a.npz")


def test_sparse_rows_are_not_binarised(tmp_path):
    with pytest.raises(InputError, match="is a sparse matrix, which is not binarised"):
        load(saved(tmp_path, counts()), binarize="static")


def test_training_on_sparse_rows_is_training_on_dense_ones():
    x = torch.from_numpy(counts()).float()
    config = aevb.ModelConfig(features=8, likelihood="negative-binomial", library="observed", latents=2, hidden=(8,))
    histories = []
    for data in (x, SparseRows(sparse.csr_matrix(x.numpy()))):
        torch.manual_seed(0)
        vae = aevb.build_vae(config, data)
        run = aevb.fit(vae, {"x": x} if data is x else data, aevb.TrainConfig(steps=20, validate_every=10))
        histories.append([record.get("validation") for record in run.history])
    assert histories[0] == histories[1]


# ---- the library -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["negative-binomial", "zero-inflated"])
def test_the_density_given_the_library_is_that_of_its_negative_binomials(likelihood):
    """log p(x | z, l) against SciPy, with mu = l softmax(net(z)); the sum over x of one gene is one whatever l is."""
    torch.manual_seed(0)
    config = aevb.ModelConfig(features=3, likelihood=likelihood, library="observed", latents=2, hidden=(4,))
    vae = aevb.build_vae(config).double()
    z, x = torch.randn(5, 2).double(), torch.tensor([[0.0, 3, 1]] * 5).double()
    size = torch.tensor([[2.0]] * 5).double()
    with torch.no_grad():
        found = vae.p.distribution("x", {"z": z, "library": size}).log_prob(x)
        conditional = vae.p.conditional("x")
        out = conditional.net(z)
        mean = out[:, :3].softmax(-1).numpy() * np.exp(2.0)
        theta = conditional.log_theta.exp().numpy()
        mass = stats.nbinom.pmf(x.numpy(), theta, theta / (theta + mean))
        if likelihood == "zero-inflated":
            pi = out[:, 3:].sigmoid().numpy()
            mass = pi * (x.numpy() == 0) + (1 - pi) * mass
        np.testing.assert_allclose(found.numpy(), np.log(mass).sum(1), rtol=1e-10)
        np.testing.assert_allclose(out[:, :3].softmax(-1).sum(-1).numpy(), 1.0)


def computed_and_given() -> tuple[aevb.VAE, aevb.VAE, dict[str, torch.Tensor]]:
    """A model whose library q computes, the same one that is given it, and values for the latter."""
    torch.manual_seed(0)
    x = torch.from_numpy(counts(6)).float()
    config = aevb.ModelConfig(features=8, likelihood="negative-binomial", library="observed", latents=2, hidden=(4,))
    vae = aevb.build_vae(config, x)
    given = aevb.VAE(vae.p, aevb.BayesNet({"z | x": vae.q.conditional("z")}), given="library")
    return vae, given, {"x": x, "library": x.sum(1, keepdim=True).clamp(min=1).log()}


def test_an_observed_library_is_the_sum_of_the_row_everywhere():
    """The bound with library computed by q is the bound with the same library given as context."""
    vae, given, values = computed_and_given()
    x = values["x"]
    figures = []
    for model, seen in ((vae, {"x": x}), (given, values)):
        torch.manual_seed(1)
        figures.append(aevb.elbo(model, seen, samples=3))
    torch.testing.assert_close(figures[0], figures[1])
    assert vae.context == ("library",)
    assert given.context == ()
    with pytest.raises(InputError, match="`library`"):
        vae.p.sample(2)
    assert vae.p.sample(2, {"library": torch.zeros(2, 1)})["x"].shape == (2, 8)


def test_annealing_knows_what_q_computes_of_the_row():
    """log p(x, z | library) along the path is that with the same library given as context."""
    vae, given, values = computed_and_given()
    x = values["x"]
    u = torch.randn(3, 6, 2)
    with torch.no_grad():
        own, told = (Annealing(v, seen, {"z": u.shape[2:]}, "prior") for v, seen in ((vae, {"x": x}), (given, values)))
        torch.testing.assert_close(own.log_joint(u), told.log_joint(u))


def test_p_takes_no_computed_value_that_hangs_on_a_latent():
    p = {"z": aevb.StandardNormal(1), "x | z, h": aevb.Normal(aevb.MLP(2, [], 1), 1)}
    q = {"z | x": aevb.DiagonalNormal(aevb.MLP(1, [], 2)), "h | z": aevb.Deterministic(aevb.MLP(1, [], 1))}
    with pytest.raises(InputError, match="p conditions on `h`"):
        aevb.VAE(aevb.BayesNet(p), aevb.BayesNet(q))


def test_a_latent_library_has_a_log_p_that_quadrature_finds():
    """One gene and a fixed z-free decoder: log p(x) = log of the integral of NB(x; e^l) over the log-normal of l."""
    torch.manual_seed(0)
    x = torch.tensor([[0.0], [4.0], [30.0]])
    config = aevb.ModelConfig(features=1, likelihood="negative-binomial", library="latent", latents=1, hidden=(4,))
    vae = aevb.build_vae(config, x).double()
    with torch.no_grad():
        vae.q.conditional("library").net.net.net.last.bias[1] = 2.0  # wider than the posterior: light tails
        last = vae.q.conditional("z").net.net.last
        last.weight.zero_()  # z says nothing, so q(z | x) is to be the prior
        last.bias.copy_(torch.tensor([0.0, np.log(np.expm1(1.0))]))
    found = aevb.log_marginal(vae, {"x": x.double()}, samples=20_000)
    assert bool((found.pareto_k < 0.5).all())
    with torch.no_grad():
        prior = vae.p.distribution("library", {}).base_dist
        theta = float(vae.p.conditional("x").log_theta.exp())
    grid = np.linspace(-12, 14, 20_001)
    density = stats.norm.pdf(grid, float(prior.loc.detach()), float(prior.scale))
    for row, value in enumerate(x[:, 0].tolist()):
        mass = stats.nbinom.pmf(value, theta, theta / (theta + np.exp(grid)))
        exact = np.log(np.trapezoid(mass * density, grid))
        assert abs(float(found.log_prob[row]) - exact) < 4 * float(found.std_error[row])


def test_what_a_library_goes_with():
    with pytest.raises(InputError, match="`library` goes with the likelihoods negative-binomial and zero-inflated"):
        aevb.ModelConfig(features=3, likelihood="poisson", library="observed")
    with pytest.raises(InputError, match="rows with holes do not tell"):
        aevb.ModelConfig(features=3, likelihood="zero-inflated", library="latent", holes=True)
    with pytest.raises(InputError, match="as its last parent"):
        aevb.NegativeBinomial(aevb.MLP(2, [], 3), 3, library=True)(torch.zeros(4, 2))


# ---- the verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("counts")
    path = saved(folder, counts())
    told = succeed("train", path, "--out", folder / "run", *FAST)
    assert "likelihood negative-binomial" in told
    return folder / "run", path


def test_evaluation_says_what_is_given_and_scores_agree_with_it(trained, tmp_path):
    run, path = trained
    told = succeed("evaluate", run, "--samples", 50)
    assert "validation log p(x | library) = " in told
    assert "compare with models that are given it, too" in told
    succeed("score", run, path, "--samples", 50, "--out", tmp_path / "s.npy")
    dense = saved(tmp_path, counts(7), "few.npz")
    succeed("score", run, dense, "--samples", 50, "--out", tmp_path / "few.npy")
    vae = aevb.load(run).vae
    exact = aevb.log_marginal(vae, {"x": torch.from_numpy(counts(7)).float()}, 50).log_prob
    np.testing.assert_array_equal(np.load(tmp_path / "few.npy")[:, 0], exact)


def test_codes_samples_and_report_of_counts(trained, tmp_path):
    run, path = trained
    succeed("encode", run, path, "--out", tmp_path / "codes.npy")
    vae = aevb.load(run).vae
    means = vae.posterior({"x": torch.from_numpy(counts()).float()})["z"].mean
    np.testing.assert_allclose(np.load(tmp_path / "codes.npy")[:, :2], means, rtol=1e-5, atol=1e-6)
    succeed("sample", run, "-n", 500, "--out", tmp_path / "drawn.npy")
    drawn = np.load(tmp_path / "drawn.npy").sum(1)
    assert 0.5 < np.log(drawn.clip(1)).mean() / np.log(counts().sum(1).clip(1)).mean() < 2
    succeed("report", run, "--samples", 20)
    assert "simulates rows" in refuse("evaluate", run, "--samples", 20, "--also", "checks")
    assert "mutual information" in succeed("evaluate", run, "--samples", 20, "--also", "information")


def test_runs_given_other_things_are_not_compared(trained, tmp_path):
    run, path = trained
    succeed("train", path, "--out", tmp_path / "other", *FAST, "--library", "latent")
    assert "validation log p(x) = " in succeed("evaluate", tmp_path / "other", "--samples", 20)
    assert "is no log p(x)" in refuse("compare", run, tmp_path / "other", "--samples", 20)


@pytest.mark.parametrize(
    ("entry", "told"), [(-1.0, "is -1; counts are whole numbers from 0"), (0.5, "is 0.5; counts are whole numbers")]
)
def test_entries_that_are_no_counts_are_named_by_row_and_column(trained, tmp_path, entry, told):
    run, _ = trained
    x = counts().astype(float)
    x[3, 2] = entry
    path = saved(tmp_path, x)
    for words in (("train", path, "--out", tmp_path / "run"), ("score", run, path)):
        message = refuse(*words)
        assert told in message
        assert "row 3, column 2 (counting from 0)" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "empty.npz").touch()
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "empty.h5ad").touch()
    for name, told in (("empty.npz", "is empty"), ("empty.h5ad", "is empty"), ("folder.h5ad", "holds no images")):
        assert told in refuse("train", tmp_path / name, "--out", tmp_path / "run")


# ---- the density -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [(), (3,)])
def test_zeros_looked_at_apart_weigh_as_they_do_in_a_graph(draws, monkeypatch, double):
    """A compiled step takes every count alike: its formula, its value, and its gradients."""
    torch.manual_seed(0)
    log_mean, log_theta = torch.randn(*draws, 60, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    x = torch.from_numpy(counts()).double()

    def looked_at() -> list[torch.Tensor]:
        log_prob = aevb.distributions.NegativeBinomial(log_mean, log_theta).log_prob(x)
        return [log_prob, *torch.autograd.grad(log_prob.sum(), (log_mean, log_theta))]

    apart = looked_at()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, theirs in zip(apart, looked_at(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- AnnData ---------------------------------------------------------------------------------------------------------


def test_results_are_written_back_and_nothing_is_lost(tmp_path):
    path = annotated(tmp_path, counts(), layers={"counts": 2 * counts()})
    data = load(path)
    np.testing.assert_array_equal(data.train[:].numpy(), counts())
    np.testing.assert_array_equal(load(path, layer="counts").train[:].numpy(), 2 * counts())
    assert data.columns[:2] == ("gene0", "gene1")
    succeed("train", path, "--out", tmp_path / "run", *FAST)
    succeed("encode", tmp_path / "run", path, "--out", tmp_path / "codes.h5ad")
    succeed("score", tmp_path / "run", tmp_path / "codes.h5ad", "--samples", 20, "--out", tmp_path / "both.h5ad")
    with h5py.File(path) as before, h5py.File(tmp_path / "both.h5ad") as after:
        kept: list[str] = []
        before.visititems(lambda name, item: kept.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in kept:
            np.testing.assert_array_equal(before[name][()], after[name][()])
        assert after["obsm/X_aevb"].shape == after["obsm/X_aevb_std"].shape == (60, 2)
        assert list(after["obs"].attrs["column-order"])[:2] == ["depth", "aevb_log_prob"]
        written = after["obs/aevb_log_prob"][()]
    exact = aevb.log_marginal(aevb.load(tmp_path / "run").vae, {"x": torch.from_numpy(counts()).float()}, 20).log_prob
    np.testing.assert_array_equal(written, exact)
    assert "already; nothing is overwritten" in refuse(
        "encode", tmp_path / "run", tmp_path / "codes.h5ad", "--out", tmp_path / "again.h5ad"
    )
    assert not list(tmp_path.glob(".again*"))


def test_genes_are_matched_by_name(tmp_path):
    path = annotated(tmp_path, counts())
    names = tuple(f"gene{j}" for j in (3, 1))
    with pytest.raises(InputError, match="unknown to the model"):
        read_rows(path, columns=names)
    reordered = tuple(f"gene{j}" for j in range(7, -1, -1))
    np.testing.assert_array_equal(read_rows(path, columns=reordered)[:].numpy(), counts()[:, ::-1])


def test_other_files_and_layers_are_refused(tmp_path):
    path = annotated(tmp_path, counts(), layers={"counts": counts()})
    with pytest.raises(InputError, match="has no layer `raw`; its layers are: `counts`"):
        load(path, layer="raw")
    with pytest.raises(InputError, match="names a matrix of an AnnData file"):
        load(saved(tmp_path, counts()), layer="counts")
    (tmp_path / "b.h5ad").write_bytes(b"no such thing" * 100)
    with pytest.raises(InputError, match="cannot be read as an AnnData file"):
        load(tmp_path / "b.h5ad")


def test_what_is_expected_of_each_entry_is_a_layer(tmp_path):
    """Given the library the means of a row's negative binomials sum to it; a gene that was left out is not known."""
    x = counts()
    x[:, 3] = 2
    path = annotated(tmp_path, x)
    succeed("train", path, "--out", tmp_path / "run", *FAST, "--drop-constant")
    told = succeed("encode", tmp_path / "run", path, "--out", tmp_path / "codes.h5ad", "--expected")
    assert "layer aevb_expected" in told
    with h5py.File(tmp_path / "codes.h5ad") as file:
        layer = file["layers/aevb_expected"][()]
        assert file["layers/aevb_expected"].attrs["encoding-type"] == "array"
        assert file["obsm/X_aevb"].shape == (60, 2)
    assert np.isnan(layer[:, 3]).all()
    np.testing.assert_allclose(np.nansum(layer, 1), np.delete(x, 3, 1).sum(1).clip(1), rtol=1e-4)
    message = refuse("encode", tmp_path / "run", path, "--out", tmp_path / "codes.npy", "--expected")
    assert "`--expected` fills a layer of an .h5ad file" in message
    missing = refuse("encode", tmp_path / "run", tmp_path / "none.h5ad", "--out", tmp_path / "b.h5ad")
    assert "damaged" not in missing
    again = refuse("encode", tmp_path / "run", tmp_path / "codes.h5ad", "--out", tmp_path / "b.h5ad", "--expected")
    assert "already; nothing is overwritten" in again


def test_an_expectation_is_over_q_and_of_its_own_row_alone():
    """Of log-rates z ~ N(m, 1) the mean rate is exp(m + 1/2); at the mean of z it would be exp(m)."""
    wide = 400
    rate, code = torch.nn.Linear(wide, wide, bias=False), torch.nn.Linear(wide, 2 * wide)
    with torch.no_grad():
        rate.weight.copy_(torch.eye(wide))
        code.weight.copy_(torch.cat([0.1 * torch.eye(wide), torch.zeros(wide, wide)]))
        code.bias.copy_(torch.tensor([0.0, math.log(math.e - 1)]).repeat_interleave(wide))  # softplus makes 1 of it
    p = aevb.BayesNet({"z": aevb.StandardNormal(wide), "x | z": aevb.Poisson(rate)})
    vae = aevb.VAE(p, aevb.BayesNet({"z | x": aevb.DiagonalNormal(code)}))
    values = {"x": torch.from_numpy(np.random.default_rng(0).poisson(2.0, (5, wide))).float()}
    with torch.no_grad():
        found = _expectation(vae, values, vae.posterior(values))
        ratio = found / (0.1 * values["x"] + 0.5).exp()
        for row in range(5):
            alone = {"x": values["x"][row : row + 1]}
            torch.testing.assert_close(_expectation(vae, alone, vae.posterior(alone))[0], found[row])
    # exp(e - 1/2) has variance e - 1; noise is common to the rows, so that the columns are the independent draws.
    error = ((math.e - 1) / (25 * wide)) ** 0.5
    assert abs(ratio[0].mean() - 1) < 5 * error < 1 - math.exp(-0.5)


def test_holes_are_filled_in_a_layer(tmp_path):
    """X as it was but for its holes: in columns that the model lacks, too, and to the last digit."""
    path = annotated(tmp_path, counts())
    x = counts().astype(float)
    x[:, 3], x[2, 0] = 2, 2**24 + 1  # which float32 has not
    x[5, 2] = x[7, [0, 1, 2, 4, 5, 6, 7]] = np.nan
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = x
    succeed("train", path, "--out", tmp_path / "run", *FAST, "--drop-constant")
    for more, names in (((), ["aevb_filled"]), (("-m", 2), ["aevb_filled_1", "aevb_filled_2"])):
        out = tmp_path / f"{len(names)}"
        for suffix in (".h5ad", ".npy"):
            succeed("impute", tmp_path / "run", path, "--out", out.with_suffix(suffix), "--samples", 20, *more)
        with h5py.File(out.with_suffix(".h5ad")) as file:
            assert sorted(file["layers"]) == names
            made = np.concatenate([file["layers"][name][()] for name in names])
            np.testing.assert_array_equal(file["X"][()], x)
        assert np.isfinite(made).all()
        known = np.isfinite(np.tile(x, (len(names), 1)))
        np.testing.assert_array_equal(made[known], np.tile(x, (len(names), 1))[known])
        np.testing.assert_array_equal(np.delete(made, 3, 1), np.load(out.with_suffix(".npy"))[:, -7:])


def test_a_disk_that_refuses_a_layer_is_no_damaged_file(tmp_path, monkeypatch):
    path = annotated(tmp_path, counts())

    def refusing(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", refusing)
    with pytest.raises(InputError, match=r"b.h5ad` cannot be written: No space left on device. Free some space."):
        write_h5ad(path, tmp_path / "b.h5ad", layers={"new": [np.zeros((60, 8))]})
    assert not list(tmp_path.glob("*b.h5ad*"))


def test_layers_are_in_the_columns_of_the_file(tmp_path):
    path, values = annotated(tmp_path, counts()), np.arange(120.0).reshape(60, 2)
    for columns, kept, at in ((("gene5", "gene1"), None, [5, 1]), (None, (2, 6), [2, 6])):
        out = tmp_path / f"{at[0]}.h5ad"
        write_h5ad(path, out, layers={"new": [values[:50], values[50:]]}, columns=columns, kept=kept)
        with h5py.File(out) as file:
            made = file["layers/new"][()]
        np.testing.assert_array_equal(made[:, at], values)
        assert np.isnan(np.delete(made, at, 1)).all()
    with pytest.raises(InputError, match="has no `gene9` among the 8 columns of X, for which its layers are"):
        check_h5ad(path, layers=["new"], columns=("gene9", "gene1"), features=2)
