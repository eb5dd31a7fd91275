"""Predictive checks: tails of a true and of a wrong model, holes, classes and context, each figure against numpy."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from aevb import MLP, VAE, BayesNet, Bernoulli, Categorical, DiagonalNormal, Holes, InputError, Poisson, StandardNormal
from aevb.evaluate.predictive import DEFAULT_STATISTICS, _defaults, predictive_check
from gaussians import affine, correlated, factorized, likelihood

pytestmark = pytest.mark.usefixtures("double")

W = torch.tensor([[1.0], [-0.5], [0.8]], dtype=torch.float64)
B = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
S = 0.6
NAN = math.nan


def linear(noise: float = S, holes: bool = False) -> VAE:
    """x = W z + b + noise eps, with the exact posterior as q where x is whole."""
    precision = W.T @ W + noise**2
    gain = W.T / precision
    q = correlated(gain, -gain @ B, noise**2 / precision)
    if holes:
        q = DiagonalNormal(Holes(MLP(6, [], 2)))
    return VAE(BayesNet({"z": StandardNormal(1), "x | z": likelihood(W, B, noise)}), BayesNet({"z | x": q}))


def draws(rows: int, seed: int, noise: float = S) -> torch.Tensor:
    """Rows of the true model, from numpy's generator."""
    rng = np.random.default_rng(seed)
    z, eps = rng.normal(size=(rows, 1)), rng.normal(size=(rows, 3))
    return torch.as_tensor(z @ W.T.numpy() + B.numpy() + noise * eps)


def test_tails_of_the_truth_are_uniform_and_of_a_wrong_model_small():
    """200 data sets, 39 replicates each: the tail's 20 values by chi-square, z-scores by Kolmogorov and Smirnov, 1e-4.

    Noise half as large as the data's: x_1 + 2 x_2 holds nothing but noise, whatever the latents are.
    """
    figures = {"mean": lambda x: x.mean(), "std": lambda x: x.std(0), "noise": lambda x: (x[:, 0] + 2 * x[:, 1]).std()}
    vae, tails, z = linear(), [], []
    for seed in range(200):
        found = predictive_check(vae, {"x": draws(20, seed)}, figures, replicates=39, seed=seed)
        tails.append(torch.cat([each.reshape(-1) for each in found.tail.values()]))
        z.append(found.z_score["mean"])
    for column in torch.stack(tails).T:
        counts = torch.bincount((column * 20).round().long() - 1, minlength=20)
        assert len(counts) == 20  # tails are multiples of 2 / 40
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    # The replicates' mean and standard deviation are estimates: Student's t with 38 degrees, but for a factor.
    scale = math.sqrt(40 / 39 * 39 / 38)
    assert stats.kstest(torch.stack(z).numpy() / scale, stats.t(38).cdf).pvalue > 1e-4
    for conditional in ("population", "rows"):
        wrong = predictive_check(linear(0.3), {"x": draws(400, 1)}, figures, replicates=199, conditional=conditional)
        assert float(wrong.tail["noise"]) == pytest.approx(2 * wrong.resolution)
        assert float(wrong.z_score["noise"]) > 5


def test_tied_figures_are_above_uniform():
    """A constant figure ties with every replicate: tail 1, z-score 0. One that takes two values is superuniform."""
    x = draws(5, 0)
    found = predictive_check(linear(), {"x": x}, {"one": lambda x: 1.0, "rows": lambda x: len(x)}, replicates=9)
    assert [float(found.tail[name]) for name in ("one", "rows")] == [1.0, 1.0]
    assert [float(found.z_score[name]) for name in ("one", "rows")] == [0.0, 0.0]
    coarse = {"sign": lambda x: (x.mean(0) > B).double()[:1]}
    tails = torch.cat([
        predictive_check(linear(), {"x": draws(20, seed)}, coarse, replicates=19, seed=seed).tail["sign"]
        for seed in range(100)
    ])  # fmt: skip
    for share in (0.1, 0.2, 0.5):
        assert int((tails <= share + 1e-9).sum()) <= stats.binom.ppf(1 - 1e-4, 100, share)


def test_rows_know_their_latents_and_the_population_does_not():
    """Row by row, E[x_r | x] = W E[z | x] + b; of the population, b. Means over 4000 replicates, 4 standard errors.

    The spread is s^2 + W cov(z | x) W^T, and s^2 + W W^T.
    """
    x, count, posterior = draws(4, 3), 4000, S**2 / (float(W.T @ W) + S**2)
    for conditional, mean, spread in (
        ("rows", (x - B) @ W / (float(W.T @ W) + S**2) @ W.T + B, S**2 + posterior * W[:, 0].square()),
        ("population", B.expand(4, 3), S**2 + W[:, 0].square()),
    ):
        options = {"replicates": count, "conditional": conditional}
        found = predictive_check(linear(), {"x": x}, {"all": lambda x: x.flatten()}, **options)
        drawn = found.replicated["all"].reshape(count, 4, 3)
        assert bool(((drawn.mean(0) - mean).abs() < 4 * (spread / count).sqrt()).all())
        assert bool(((drawn.var(0) / spread - 1).abs() < 4 * math.sqrt(2 / count)).all())


@pytest.mark.parametrize("conditional", ["population", "rows"])
def test_holes_of_the_data_are_holes_of_each_replicate(conditional):
    """A column without data has NaN figures, tail and z-score; the others are numbers."""
    x = draws(6, 2)
    x[0, 0], x[:, 1] = NAN, NAN
    seen = []

    def keep(x):
        seen.append(x)
        return x.nanmean(0)

    found = predictive_check(linear(holes=True), {"x": x}, {"f": keep}, replicates=5, conditional=conditional, pack=12)
    assert len(seen) == 6
    assert all(torch.equal(one.isnan(), x.isnan()) for one in seen)
    assert all(one.dtype == torch.float64 for one in seen)
    assert not torch.equal(seen[1].nan_to_num(), seen[2].nan_to_num())
    for figure in (found.observed["f"], found.replicated["f"][0], found.tail["f"], found.z_score["f"]):
        assert figure.isnan().tolist() == [False, True, False]
    default = predictive_check(linear(holes=True), {"x": x}, replicates=5, conditional=conditional)
    assert set(default.tail) == set(DEFAULT_STATISTICS["real"])


def test_classes_and_the_node_that_is_checked():
    """y, of three classes, has the share of each of them; codes reach a statistic, holes as NaN. x is binary."""
    p = BayesNet({"y": Categorical(3), "z": StandardNormal(1), "x | y, z": Bernoulli(MLP(4, [], 2))})
    q = BayesNet({"y | x": Categorical(3, Holes(MLP(4, [], 3))), "z | x": DiagonalNormal(Holes(MLP(4, [], 2)))})
    vae, y = VAE(p, q), torch.tensor([0.0, 2.0, 2.0, NAN])
    values = {"x": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, NAN], [0.0, 0.0]]), "y": y}
    for conditional in ("population", "rows"):
        found = predictive_check(vae, values, node="y", replicates=400, conditional=conditional)
        assert found.observed["share"].tolist() == pytest.approx([1 / 3, 0, 2 / 3])
        assert found.replicated["share"].sum(1).tolist() == pytest.approx([1.0] * 400)
        # Three known rows each: the mean share of 400 replicates is a third, by four standard errors.
        off = found.replicated["share"].mean(0) - 1 / 3
        assert bool((off.abs() < 4 * math.sqrt(2 / 9 / 1200)).all())
        seen = predictive_check(vae, values, {"f": lambda codes: codes}, node="y", replicates=2).observed["f"]
        assert torch.equal(seen.nan_to_num(-1), y.nan_to_num(-1))
        other = predictive_check(vae, values, node="x", replicates=3, conditional=conditional)
        assert (set(other.tail), other.node) == (set(DEFAULT_STATISTICS["binary"]), "x")
        assert other.conditional == conditional


@pytest.mark.parametrize("conditional", ["population", "rows"])
def test_replicates_have_the_rows_own_context(conditional):
    """x = 100 c + noise: each replicate's row is near its own context, in packs that cut the data as well."""
    p = BayesNet({"z": StandardNormal(1), "x | z, c": likelihood(torch.tensor([[1.0, 100.0]]), torch.zeros(1), 0.5)})
    net = affine(torch.zeros(2, 2), torch.zeros(2))
    vae = VAE(p, BayesNet({"z | x, c": DiagonalNormal(net)}), given="c")
    c = torch.arange(7.0).unsqueeze(1)
    for pack in (2, 21, 2048):
        options = {"replicates": 10, "conditional": conditional, "pack": pack}
        found = predictive_check(vae, {"x": 100 * c, "c": c}, {"x": lambda x: x.flatten()}, **options)
        assert bool(((found.replicated["x"] - 100 * c[:, 0]).abs() < 20).all())
        assert len(found.replicated["x"].unique()) == 70


def by_numpy(x: np.ndarray) -> dict[str, np.ndarray]:
    """The default statistics, NaN left out, in numpy and scipy's words."""
    columns = [column[~np.isnan(column)] for column in x.T]
    z = (x - np.nanmean(x, 0)) / np.nanstd(x, 0)
    pairs = [
        np.nanmean(z[:, i] * z[:, j]) for i in range(x.shape[1]) for j in range(x.shape[1]) if i != j
    ]  # one column's moments are of all its rows, the pair's product of those that know both
    return {
        "mean": np.nanmean(x, 0),
        "std": np.nanstd(x, 0),
        "skewness": np.array([stats.skew(column) for column in columns]),
        "beyond_3_std": (np.abs(z[~np.isnan(z)]) > 3).mean(),
        "zeros": np.array([(column == 0).mean() for column in columns]),
        "maximum": np.nanmax(x, 0),
        "row_sum_std": np.nansum(x, 1).std(),
        "correlation": np.sqrt(np.mean(np.square(pairs))),
    }


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, each in DEFAULT_STATISTICS.items() for name in each])
def test_each_default_statistic_is_numpys(kind, name):
    rng = np.random.default_rng(0)
    x = {
        "real": rng.standard_t(2, size=(200, 4)),
        "count": rng.poisson(0.7, size=(200, 4)) * 1.0,
        "binary": rng.integers(0, 2, size=(200, 4)) * 1.0,
    }[kind]
    x[:, 1] += x[:, 0]
    x[rng.random(x.shape) < 0.1] = np.nan
    function = DEFAULT_STATISTICS[kind][name]
    np.testing.assert_allclose(function(torch.as_tensor(x)), by_numpy(x)[name], rtol=1e-10, atol=1e-12)
    if name != "beyond_3_std":
        assert float(np.min(np.abs(by_numpy(x)["correlation"]))) > 0.1


def test_default_statistics_are_those_of_the_kind():
    """Counts; one column alone has no row sums and no correlation; a constant column has no shape; 64 columns."""

    def counts(columns: int) -> VAE:
        p = BayesNet({"z": StandardNormal(1), "x | z": Poisson(MLP(1, [], columns))})
        return VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(columns, [], 2))}))

    found = predictive_check(counts(2), {"x": torch.tensor([[0.0, 3.0], [2.0, 1.0]])}, replicates=4)
    assert set(found.tail) == set(DEFAULT_STATISTICS["count"])
    assert found.observed["zeros"].tolist() == [0.5, 0.0]
    one = torch.tensor([[0.0], [4.0]])
    assert set(_defaults(counts(1), {"x": one}, "x")) == {"mean", "std", "zeros", "maximum"}
    flat = torch.tensor([[2.0, 1.0], [2.0, 5.0], [2.0, NAN]])
    assert DEFAULT_STATISTICS["real"]["skewness"](flat).tolist() == [0.0, 0.0]
    assert float(DEFAULT_STATISTICS["real"]["correlation"](flat)) == 0.0
    for value in (0.1, 1 / 3, 1e6 + 0.1):  # whose mean is off by rounding
        flat = torch.stack([torch.full((7,), value), torch.arange(7.0)], 1)
        assert float(DEFAULT_STATISTICS["real"]["skewness"](flat)[0]) == 0.0
        assert float(DEFAULT_STATISTICS["real"]["correlation"](flat)) == 0.0
    wide = torch.as_tensor(np.random.default_rng(0).normal(size=(50, 200)))
    some = np.linspace(0, 199, 64).astype(int)
    expected = by_numpy(wide[:, some].numpy())["correlation"]
    assert float(DEFAULT_STATISTICS["real"]["correlation"](wide)) == pytest.approx(float(expected))


def test_tail_and_z_score_by_hand():
    """Three replicates against one figure, through the formulas of the docstring."""
    found = predictive_check(linear(), {"x": draws(8, 5)}, {"mean": lambda x: x.mean(0)}, replicates=7)
    observed, drawn = found.observed["mean"].numpy(), found.replicated["mean"].numpy()
    low, high = ((1 + (drawn <= observed).sum(0)) / 8, (1 + (drawn >= observed).sum(0)) / 8)
    np.testing.assert_allclose(found.tail["mean"], np.minimum(1, 2 * np.minimum(low, high)))
    np.testing.assert_allclose(found.z_score["mean"], (observed - drawn.mean(0)) / drawn.std(0))
    assert (found.resolution, found.replicates, found.conditional, found.node) == (1 / 8, 7, "population", "x")
    np.testing.assert_allclose(observed, draws(8, 5).mean(0))


@pytest.mark.parametrize("conditional", ["population", "rows"])
def test_neither_the_generator_nor_the_model_is_moved(conditional):
    vae, x = linear(), {"x": draws(9, 0)}
    vae.q.conditional("z").net = torch.nn.Sequential(vae.q.conditional("z").net, torch.nn.Dropout(0.5))
    vae.p.eval()
    check = functools.partial(predictive_check, vae, x, replicates=5, conditional=conditional)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = check()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(check().replicated["mean"], first.replicated["mean"])
    assert not torch.equal(check(seed=1).replicated["mean"], first.replicated["mean"])
    assert [vae.p.training, vae.q.training] == [False, True]


@pytest.mark.parametrize("conditional", ["population", "rows"])
def test_a_float32_model_has_float64_figures(conditional):
    found = predictive_check(linear().float(), {"x": draws(9, 0).float()}, replicates=5, conditional=conditional)
    for table in (found.observed, found.replicated, found.tail, found.z_score):
        assert {figure.dtype for figure in table.values()} == {torch.float64}
    np.testing.assert_allclose(found.observed["mean"], draws(9, 0).mean(0), rtol=1e-6)


def two_nodes() -> VAE:
    p = BayesNet({"z": StandardNormal(1), "x | z": Bernoulli(MLP(1, [], 2)), "t | z": Bernoulli(MLP(1, [], 1))})
    return VAE(p, BayesNet({"z | x, t": DiagonalNormal(MLP(3, [], 2))}))


def shared_weight() -> VAE:
    p = BayesNet({"w": StandardNormal(1), "z": StandardNormal(1), "x | z, w": Bernoulli(MLP(2, [], 2))})
    q = BayesNet({"w": StandardNormal(1), "z | x": factorized(torch.zeros(1, 2), torch.zeros(1), torch.ones(1))})
    return VAE(p, q, shared=["w"])


PAIR = {"x": torch.ones(3, 2), "t": torch.ones(3, 1)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"replicates": 0}, "`replicates` and `pack` must be at least 1; got 0 and 2048"),
        ({"pack": 0}, "`replicates` and `pack` must be at least 1; got 200 and 0"),
        ({"conditional": "row"}, "`conditional` must be one of population, rows; got 'row'"),
        ({}, "`values` gives x, t: say by `node` which of them is checked"),
        ({"node": "z"}, "`node` must be an observed node of p, one of x, t; got 'z'"),
        ({"node": "x", "statistics": {"f": lambda x: x}}, r"`f` must return a number or a vector .*shape \(3, 2\)"),
        ({"node": "x", "statistics": {"f": lambda x: "no"}}, "`f` must return a number or a vector .*got str"),
        (
            {"node": "x", "statistics": {"f": lambda x: x.unique()}},
            r"returned \(1,\) for the data and \(2,\) for a rep",
        ),
        ({"node": "x", "statistics": {"f": lambda x: 1 / (1 - x.mean())}}, "`f` is infinite, or NaN"),
    ],
)
def test_what_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        predictive_check(two_nodes(), PAIR, **{"replicates": 200} | options)


def test_shared_nodes_and_figures_that_are_nan_of_replicates_alone_are_refused():
    with pytest.raises(InputError, match="`w` has one value for the whole data set"):
        predictive_check(shared_weight(), {"x": torch.ones(3, 2)})
    figure = {"f": lambda x: torch.where(x.mean() == 1, 0.0, NAN)}
    with pytest.raises(InputError, match="NaN for the data and not for a replicate, or the reverse"):
        predictive_check(two_nodes(), PAIR, figure, node="x")
