"""Simulation-based calibration where the posterior is known: what passes, what is caught, and how often.

False alarms and catches over repetitions lie in binomial bands at 1e-4; statistics of an exact q are compared with
their laws by Kolmogorov and Smirnov at 1e-4. Where one run must pass, or tell what passes from what does not, it is at
the level `STRICT`, so that the test itself raises a false alarm no oftener.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, Bernoulli, Categorical, Deterministic, DiagonalNormal, InputError, StandardNormal
from aevb.evaluate.calibration import Calibration, simulation_based_calibration
from gaussians import affine, correlated, factorized, likelihood

pytestmark = pytest.mark.usefixtures("double")

STRICT = 1e-4
ALL = 100_000
"""A pack that holds every simulation here."""


def linear(width: float = 1.0, shift: float = 0.0, k: int = 2) -> VAE:
    """A linear-Gaussian model with its exact q, its spread multiplied and its mean moved by so many posterior sds."""
    torch.manual_seed(0)
    w, b, s = torch.randn(4, k), torch.randn(4), 0.8
    m = w.T @ w + s**2 * torch.eye(k)
    gain, cov = torch.linalg.solve(m, w.T), s**2 * torch.linalg.inv(m)
    p = BayesNet({"z": StandardNormal(k), "x | z": likelihood(w, b, s)})
    offset = shift * cov.diagonal().sqrt() - gain @ b
    return VAE(p, BayesNet({"z | x": correlated(gain, offset, width**2 * cov)}))


def repeat(vae: VAE, times: int, simulations: int, draws: int, **options: object) -> list[Calibration]:
    return [
        simulation_based_calibration(vae, simulations, draws, seed=seed, pack=ALL, **options) for seed in range(times)
    ]


def test_an_exact_q_is_called_uncalibrated_no_oftener_than_stated():
    """200 times at level 0.05, over two dimensions and the joint density; Bonferroni keeps it below, not at, 0.05."""
    alarms = sum(not found.calibrated for found in repeat(linear(), 200, 200, 19, level=0.05))
    assert alarms <= stats.binom.ppf(1 - 1e-4, 200, 0.05)
    assert alarms >= 1  # a test that never errs sees nothing


@pytest.mark.parametrize(("width", "word"), [(1 / 1.5, "too narrow"), (1.5, "too wide")])
def test_a_width_wrong_by_half_is_caught(width, word):
    """500 simulations, 99 draws, level 0.01: in at least 99 % of 100 repetitions, by each dimension, with its word."""
    runs = repeat(linear(width), 100, 500, 99, statistics={})
    least = stats.binom.ppf(1e-4, 100, 0.99)
    assert sum(not found.calibrated for found in runs) >= least
    assert sum(found.direction["z"] == (word, word) for found in runs) >= least


@pytest.mark.parametrize(("shift", "word"), [(-0.5, "too low"), (0.5, "too high")])
def test_half_a_width_of_shift_is_caught(shift, word):
    runs = repeat(linear(shift=shift), 50, 500, 19, statistics={})
    least = stats.binom.ppf(1e-4, 50, 0.99)
    assert sum(found.direction["z"] == (word, word) for found in runs) >= least


def test_statistics_of_an_exact_q_have_their_laws():
    """Ranks are uniform, z-scores standard normal, p-values of the chi-square uniform: 300 repetitions of 200."""
    runs = repeat(linear(k=1), 300, 200, 39)
    for name in ("z", "log_joint"):
        location, spread = (torch.cat([getattr(run, field)[name] for run in runs]) for field in ("location", "spread"))
        assert stats.kstest(location, "norm").pvalue > 1e-4, name
        assert stats.kstest(spread, "norm").pvalue > 1e-4, name
        assert stats.kstest(torch.cat([run.chi_square[name] for run in runs]), "uniform").pvalue > 1e-4, name
        counts = torch.bincount(torch.cat([run.ranks[name][:, 0] for run in runs]), minlength=40)
        assert len(counts) == 40
        assert stats.chisquare(counts).pvalue > 1e-4, name


def test_a_q_that_learned_nothing_is_caught_by_the_joint_density_alone():
    vae = linear()
    q = factorized(torch.zeros(2, 4), torch.zeros(2), torch.ones(2))
    collapsed = VAE(vae.p, BayesNet({"z | x": q}))
    assert simulation_based_calibration(collapsed, 500, statistics={}, level=STRICT).calibrated
    found = simulation_based_calibration(collapsed, 500, level=STRICT)
    assert not found.calibrated
    assert found.direction == {"z": ("no departure",) * 2, "log_joint": ("too low",)}
    assert found.rejected["log_joint"].tolist() == [True]


def test_a_statistic_of_ones_own():
    """Spread right in each dimension, correlation left out: only the sum of both tells."""
    torch.manual_seed(0)
    w, s = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), 0.5
    m = w.T @ w + s**2 * torch.eye(2)
    gain, cov = torch.linalg.solve(m, w.T), s**2 * torch.linalg.inv(m)
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(w, torch.zeros(2), s)})
    vae = VAE(p, BayesNet({"z | x": factorized(gain, torch.zeros(2), cov.diagonal().sqrt())}))
    assert float(cov[0, 1]) < -0.5 * float(cov[0, 0])
    seen = []

    def total(nodes: dict[str, Tensor]) -> Tensor:
        seen.append({name: value.shape for name, value in nodes.items()})
        return nodes["z"].sum(-1)

    found = simulation_based_calibration(vae, 400, 19, statistics={"total": total}, level=STRICT, pack=ALL)
    assert found.direction == {"z": ("no departure",) * 2, "total": ("too wide",)}
    assert seen == [{"z": (rows, 2), "x": (rows, 2)} for rows in (400, 400 * 19)]


def test_tables_by_hand():
    """Histogram, chi-square, band and verdict from the ranks, by scipy; 31 ranks in 20 bins of one or two."""
    found = simulation_based_calibration(linear(1 / 1.1), 300, 30)
    width = torch.bincount(torch.arange(31) * 20 // 31).double()
    assert set(width.tolist()) == {1.0, 2.0}
    expected = (300 * width / 31).numpy()
    for d in range(2):
        ranks = found.ranks["z"][:, d]
        assert ranks.min() >= 0
        assert ranks.max() <= 30
        counts = torch.bincount(ranks * 20 // 31, minlength=20)
        assert torch.equal(found.histogram["z"][d], counts)
        assert float(found.chi_square["z"][d]) == pytest.approx(stats.chisquare(counts, expected).pvalue)
        smallest = min(
            float(found.chi_square["z"][d]),
            2 * stats.norm.sf(abs(float(found.location["z"][d]))),
            2 * stats.norm.sf(abs(float(found.spread["z"][d]))),
        )
        assert float(found.p_value["z"][d]) == pytest.approx(min(1, 3 * smallest))
    for tail, row in zip((0.01 / 40, 1 - 0.01 / 40), found.band, strict=True):
        assert row.tolist() == stats.binom.ppf(tail, 300, (width / 31).numpy()).tolist()


def test_holm_goes_on_from_the_smallest():
    """Of many dimensions some of which are wrong, each is judged at its own place in the order."""
    k = 8
    scale = torch.full((k,), math.sqrt(0.5))
    scale[:3] /= torch.tensor([1.15, 1.3, 2.0])
    p = BayesNet({"z": StandardNormal(k), "x | z": likelihood(torch.eye(k), torch.zeros(k), 1.0)})
    vae = VAE(p, BayesNet({"z | x": factorized(0.5 * torch.eye(k), torch.zeros(k), scale)}))
    found = simulation_based_calibration(vae, 1000, 19, statistics={}, level=STRICT, pack=ALL)
    p_value, left = found.p_value["z"], list(range(k))
    for place, d in enumerate(p_value.argsort().tolist()):
        if float(p_value[d]) > STRICT / (k - place):
            break
        left.remove(d)
    assert found.rejected["z"].tolist() == [d not in left for d in range(k)]
    assert found.rejected["z"][1:].tolist() == [True, True] + 5 * [False]


def classes(table: Tensor) -> VAE:
    """y of three classes, two binary entries; q(y | x) is Bayes' rule for `table`, the logits of x given y `(3, 2)`."""
    torch.manual_seed(0)
    generator = torch.tensor([[2.0, -1.0], [-0.5, 1.5], [0.3, 0.2]])
    prior = torch.tensor([0.5, 0.0, -0.5])
    root = Categorical(3, learned=True)
    with torch.no_grad():
        root.logits.copy_(prior)
    p = BayesNet({"y": root, "x | y": Bernoulli(affine(generator.T, torch.zeros(2)))})
    offset = prior - nn.functional.softplus(table).sum(1)
    return VAE(p, BayesNet({"y | x": Categorical(3, affine(table, offset))}))


def test_latent_classes():
    """Four distinct rows: ties are broken at random, and simulations with the same x have draws of their own."""
    exact = torch.tensor([[2.0, -1.0], [-0.5, 1.5], [0.3, 0.2]])
    runs = repeat(classes(exact), 100, 200, 19, level=0.05)
    assert sum(not found.calibrated for found in runs) <= stats.binom.ppf(1 - 1e-4, 100, 0.05)
    assert runs[0].ranks["y"].shape == (200, 1)
    ranks = torch.cat([found.ranks["y"][:, 0] for found in runs])
    assert stats.chisquare(torch.bincount(ranks, minlength=20)).pvalue > 1e-4
    assert not simulation_based_calibration(classes(exact.flip(0)), 4000, 19).calibrated


def conditional(gain: float) -> VAE:
    """x = z + c + noise with c given; q is exact at `gain` 1."""
    weight = torch.tensor([[0.5, -0.5 * gain]])
    p = BayesNet({
        "y": Categorical(2),
        "z": StandardNormal(1),
        "h | y": Deterministic(affine(torch.tensor([[0.0, 3.0]]), torch.zeros(1))),
        "x | z, c, h": likelihood(torch.ones(1, 3), torch.zeros(1), 1.0),
    })  # fmt: skip
    net = torch.cat([weight, torch.tensor([[0.0, -1.5]])], 1)
    q = BayesNet(
        {
            "y | x, c": Categorical(2, MLP(2, [], 2)),
            "z | x, c, y": factorized(net, torch.zeros(1), torch.tensor([0.5**0.5])),
        }
    )
    return VAE(p, q, given="c")


def test_what_is_given_stays():
    """The context's rows take turns; y, held fixed, is no latent, and its rows come with those of the context."""
    given = {"c": torch.tensor([[4.0], [-2.0], [1.0]]), "y": torch.tensor([1, 0, 1])}
    seen = {}

    def keep(nodes: dict[str, Tensor]) -> Tensor:
        seen.setdefault("c", nodes["c"])
        seen.setdefault("y", nodes["y"])
        return nodes["z"][:, 0]

    options = {"given": given, "level": STRICT, "pack": ALL}
    found = simulation_based_calibration(conditional(1.0), 500, statistics={"z again": keep}, **options)
    assert found.calibrated
    assert set(found.ranks) == {"z", "z again"}
    assert torch.equal(found.ranks["z"], found.ranks["z again"])
    assert seen["c"][:4, 0].tolist() == [4.0, -2.0, 1.0, 4.0]
    assert seen["y"][:4].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert not simulation_based_calibration(conditional(0.5), 500, **options).calibrated
    both = simulation_based_calibration(conditional(1.0), 20, given={"c": given["c"]}, pack=3 * 100)
    assert set(both.ranks) == {"y", "z", "log_joint"}


def test_neither_the_generator_nor_the_model_is_moved():
    vae = linear()
    vae.q.conditional("z").net = nn.Sequential(vae.q.conditional("z").net, nn.Dropout(0.5))
    vae.p.eval()
    before = torch.get_rng_state()
    first = simulation_based_calibration(vae, 400, 19, level=STRICT)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.calibrated  # with dropout at work it is not
    torch.manual_seed(3)
    again, other = (simulation_based_calibration(vae, 400, 19, seed=seed) for seed in (0, 1))
    assert torch.equal(again.ranks["z"], first.ranks["z"])
    assert not torch.equal(other.ranks["z"], first.ranks["z"])
    assert vae.q.training
    assert not vae.p.training
    assert all(weight.grad is None and weight.requires_grad for weight in vae.parameters())


def test_packs_hold_whole_simulations():
    for pack in (1, 70, ALL):
        found = simulation_based_calibration(linear(), 40, 19, level=STRICT, pack=pack)
        assert found.ranks["z"].shape == (40, 2)
        assert found.calibrated
        assert (found.simulations, found.draws, found.level) == (40, 19, STRICT)
    assert found.histogram["z"].shape == (2, 4)
    assert found.histogram["z"].sum(1).tolist() == [40, 40]


def test_a_float32_model_with_a_default_of_float64():
    found = simulation_based_calibration(linear().float(), 400, 19, level=STRICT)
    assert found.calibrated
    assert not simulation_based_calibration(linear(1.5).float(), 400, 19, level=STRICT).calibrated
    assert found.location["z"].dtype == torch.float64


def test_what_is_refused():
    vae = linear()
    for counts in ({"simulations": 19}, {"draws": 1}, {"pack": 0}):
        with pytest.raises(InputError, match="`simulations` must be at least 20, `draws` at least 2"):
            simulation_based_calibration(vae, **counts)
    for level in (0.0, 1.0):
        with pytest.raises(InputError, match=f"`level` must be between 0 and 1; got {level}"):
            simulation_based_calibration(vae, level=level)
    with pytest.raises(InputError, match="`given` names `w`, which is neither"):
        simulation_based_calibration(vae, given={"w": torch.zeros(1, 2)})
    with pytest.raises(InputError, match="`given` fixes `x`, but not its parent `z`"):
        simulation_based_calibration(vae, given={"x": torch.zeros(1, 4)})
    with pytest.raises(InputError, match="q infers no node that is not given"):
        simulation_based_calibration(vae, given={"z": torch.zeros(1, 2)})
    with pytest.raises(InputError, match="The context `c` has no value"):
        simulation_based_calibration(conditional(1.0))
    with pytest.raises(InputError, match="`given` has no rows"):
        simulation_based_calibration(conditional(1.0), given={"c": torch.zeros(0, 1)})
    for function, came in (
        (lambda nodes: nodes["z"], r"must return a tensor \(20,\), one number a row; got shape \(20, 2\)"),
        (lambda nodes: 1.0, "got float"),
        (lambda nodes: nodes["z"][:, 0] * math.nan, "got NaN"),
    ):
        with pytest.raises(InputError, match=came):
            simulation_based_calibration(vae, 20, statistics={"f": function})
    with pytest.raises(InputError, match="`statistics` names `z`, which is a latent node"):
        simulation_based_calibration(vae, statistics={"z": lambda nodes: nodes["z"][:, 0]})
    with torch.no_grad():
        vae.p.conditional("x").net.last.bias.fill_(math.nan)
    with pytest.raises(InputError, match="p drew values of `x` that are not numbers"):
        simulation_based_calibration(vae)


def test_a_trained_q_with_correlations_it_cannot_have_is_too_narrow():
    """The best factorized q of a correlated posterior: variances 1 / (inverse covariance)_ii, too small."""
    torch.manual_seed(0)
    w, s = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), 0.5
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(w, torch.zeros(2), s)})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(2, [], 4))}))
    x = p.sample(2000)["x"]
    p.requires_grad_(False)
    config = aevb.TrainConfig(steps=400, batch_size=500, learning_rate=0.03, schedule="cosine", validation=0.0)
    aevb.fit(vae, {"x": x}, config)
    assert simulation_based_calibration(vae, 500).direction["z"] == ("too narrow", "too narrow")
