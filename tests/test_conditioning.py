"""Rows under conditions against exact conditional laws; bounds of every family; distances to records.

Monte Carlo is compared with its exact value to 4.5 standard errors, told beside it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import stats
from torch import Tensor

import aevb
from aevb import VAE, BayesNet, Categorical, InputError, Mixed, StandardNormal
from aevb import distributions as ours
from aevb.distributions import base_of, between
from gaussians import affine, likelihood

pytestmark = pytest.mark.usefixtures("double")

INF = math.inf


def pair(low: list[float], high: list[float]) -> Tensor:
    return torch.tensor([low, high])


def gaussian() -> tuple[VAE, np.ndarray, np.ndarray]:
    """z of one dimension, x of two: x ~ N(b, w w^T + s^2 I)."""
    w, b, s = torch.tensor([[1.5], [-1.0]]), torch.tensor([1.0, 2.0]), 0.6
    p = BayesNet({"z": StandardNormal(1), "x | z": likelihood(w, b, s)})
    return VAE(p, BayesNet({})), b.numpy(), (w @ w.T + s**2 * torch.eye(2)).numpy()


def near(found: Tensor, exact: float, spread: float, ess: float) -> bool:
    """Whether the mean of rows is the exact one: N rows picked from draws worth `ess`."""
    return abs(float(found.mean()) - exact) < 4.5 * spread * math.sqrt(1 / len(found) + 1 / ess)


def test_a_fixed_entry_gives_the_gaussian_conditional():
    vae, mean, cov = gaussian()
    found = aevb.sample_given(vae, 20_000, {"x": pair([2.5, -INF], [2.5, INF])}, 50_000)
    first, second = found.values["x"].unbind(1)
    assert bool((first == 2.5).all())
    loc = mean[1] + cov[1, 0] / cov[0, 0] * (2.5 - mean[0])
    var = cov[1, 1] - cov[1, 0] ** 2 / cov[0, 0]
    assert near(second, loc, math.sqrt(var), found.ess)
    assert near((second - loc).square(), var, math.sqrt(2) * var, found.ess)
    exact = stats.norm(mean[0], math.sqrt(cov[0, 0])).logpdf(2.5)
    assert found.std_error < 0.01
    assert abs(found.log_prob - exact) < 4.5 * found.std_error
    assert found.samples == 50_000
    assert found.ess < 50_000
    assert found.pareto_k < 0.5  # the weights are bounded


def test_bounds_give_the_truncated_gaussian():
    """x_1 > 2 and x_2 < 1: the law of both by quadrature of scipy's density over the corner."""
    vae, mean, cov = gaussian()
    found = aevb.sample_given(vae, 20_000, {"x": pair([2.0, -INF], [INF, 1.0])}, 50_000)
    x = found.values["x"]
    assert bool((x[:, 0] >= 2).all() and (x[:, 1] <= 1).all())
    a, b = np.meshgrid(np.linspace(2, 12, 1001), np.linspace(-9, 1, 1001), indexing="ij")
    rule = np.outer(*2 * [np.r_[0.5, np.ones(999), 0.5]]) * 1e-4
    mass = rule * stats.multivariate_normal(mean, cov).pdf(np.stack([a, b], -1))
    flipped = stats.multivariate_normal([-mean[0], mean[1]], cov * np.array([[1, -1], [-1, 1]]))  # of -x_1 and x_2
    chance = flipped.cdf([-2.0, 1.0])
    assert mass.sum() == pytest.approx(chance, rel=1e-4)
    assert abs(found.log_prob - math.log(chance)) < 4.5 * found.std_error
    for j, grid in enumerate((a, b)):
        loc = (mass * grid).sum() / mass.sum()
        spread = math.sqrt((mass * (grid - loc) ** 2).sum() / mass.sum())
        assert near(x[:, j], loc, spread, found.ess)


KINDS = ("binary", "categorical:3", "ordinal:1:5", "count", "positive")


@torch.no_grad()
def table() -> VAE:
    """Three classes y, and five columns given y."""
    torch.manual_seed(0)
    width = Mixed.width(KINDS)
    p = BayesNet(
        {"y": Categorical(3, learned=True), "x | y": Mixed(affine(torch.randn(width, 3), torch.zeros(width)), KINDS)}
    )
    next(iter(p.conditional("y").parameters())).copy_(torch.tensor([0.2, -0.5, 0.9]))
    return VAE(p, BayesNet({}))


def by_enumeration(vae: VAE, family: td.Distribution) -> tuple[Tensor, Tensor]:
    """p(y) and, by class, P(C_j | y) of: x_1 = 1, x_2 in any, 2 <= x_3 <= 4, x_4 = 0, x_5 > 1."""
    prior = vae.p.distribution("y", {}).mean
    ordinal = torch.arange(1.0, 6.0)
    rows = torch.zeros(5, 3, len(KINDS))
    rows[..., 0], rows[..., 2], rows[..., 4] = 1.0, ordinal.unsqueeze(-1), 1.0
    mass = family.log_prob(rows).exp()  # (level, class, column)
    positive = family.parts[KINDS.index("positive")].family.log
    tail = 1 - torch.as_tensor(stats.norm.cdf((0.0 - positive.loc[:, 0]) / positive.scale[0, 0]))
    return prior, mass[0, :, 0] * mass[1:4, :, 2].sum(0) * mass[0, :, 3] * tail


@torch.no_grad()
def test_columns_of_every_kind_meet_enumeration_over_classes():
    vae = table()
    family = base_of(vae.p.distribution("x", {"y": torch.eye(3)}))
    prior, chance = by_enumeration(vae, family)
    conditions = pair([1, -INF, 1.5, 0, 1.0], [1, INF, 4, 0, INF])
    rows = 6000
    found = aevb.sample_given(vae, rows, {"x": conditions}, 40_000)
    posterior = prior * chance / (prior * chance).sum()
    assert abs(found.log_prob - math.log(float((prior * chance).sum()))) < 4.5 * found.std_error
    x, y = found.values["x"], found.values["y"]
    assert bool((x[:, 0] == 1).all() and (x[:, 3] == 0).all() and (x[:, 4] >= 1).all())
    assert set(x[:, 2].tolist()) == {2.0, 3.0, 4.0}
    worth = 1 / (1 / rows + 1 / found.ess)
    for drawn, law in (
        (y, posterior),
        (x[:, 1], posterior @ family.states[1]),
        (x[:, 2] - 2, _normalized(posterior, family)),
    ):
        share = torch.bincount(drawn.long(), minlength=3) / rows
        assert float(worth * ((share - law).square() / law).sum()) < stats.chi2.ppf(1 - 1e-5, 2)


def _normalized(posterior: Tensor, family: td.Distribution) -> Tensor:
    rows = torch.zeros(3, 3, len(KINDS))
    rows[..., 2], rows[..., 4] = torch.arange(2.0, 5.0).unsqueeze(-1), 1.0
    mass = family.log_prob(rows)[..., 2].exp()
    return (mass / mass.sum(0)) @ posterior


def test_a_class_and_its_children_are_conditioned_together():
    """y in {1, 2} and x_1 = 1: y's law by Bayes' rule, and x_1 fixed; y stands above x, and is kept as drawn."""
    vae = table()
    with torch.no_grad():
        prior, logits = vae.p.distribution("y", {}).mean, vae.p.distribution("x", {"y": torch.eye(3)})
        one = base_of(logits).log_prob(torch.ones(3, len(KINDS)))[:, 0].exp()
    bounds = pair([1] + 4 * [-INF], [1] + 4 * [INF])
    found = aevb.sample_given(vae, 5000, {"x": bounds, "y": torch.tensor([1.0, 2.0])}, 20_000)
    joint = (prior * one)[1:]
    assert abs(found.log_prob - math.log(float(joint.sum()))) < 4.5 * found.std_error
    share = float(joint[0] / joint.sum())
    assert near((found.values["y"] == 1).double(), share, math.sqrt(share * (1 - share)), found.ess)
    assert 0 not in found.values["y"]


def test_conditions_that_none_meets_or_that_make_no_sense():
    vae, _, _ = gaussian()
    for bounds, told in (
        (pair([3, -INF], [2, INF]), "contradict each other: entry [0] would be above 3 and below 2"),
        (torch.zeros(2, 3), "must be (2, 2)"),
        (pair([math.nan, 0], [1, 1]), "without NaN"),
    ):
        with pytest.raises(InputError, match="conditions") as error:
            aevb.sample_given(vae, 2, {"x": bounds}, 10)
        assert told in str(error.value)
    with pytest.raises(InputError, match="`conditions` gives `y`, but p draws `z`, `x`"):
        aevb.sample_given(vae, 2, {"y": pair([0], [1])})
    outside = pair([-INF, -INF, 6, -INF, -INF], [INF, INF, 7, INF, INF])
    with pytest.raises(InputError, match="None of 500 draws of the model meets the conditions"):
        aevb.sample_given(table(), 2, {"x": outside}, 500)
    with pytest.raises(InputError, match="`rows` must be at least 1"):
        aevb.sample_given(vae, 0, {})


def test_the_seed_decides_and_nothing_else_moves():
    vae, _, _ = gaussian()
    before = torch.get_rng_state()
    first, second, other = (
        aevb.sample_given(vae, 50, {"x": pair([1, -INF], [INF, INF])}, 1000, seed=seed).values["x"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


N = 40_000
of = functools.partial(torch.tensor, dtype=torch.float64)
FAMILIES = {
    "normal": (td.Normal(of([1.0]), of([2.0])), 1.5, 4.0),
    "normal, far": (td.Normal(of([0.0]), of([1.0])), 9.0, INF),
    "log-normal": (ours.LogNormal(of([0.5]), of([0.7])), 1.0, 3.0),
    "student-t": (ours.StudentT(of([4.0]), of([0.5]), of([1.2])), -INF, 0.0),
    "bernoulli": (ours.Bernoulli(logits=of([0.4])), 0.5, INF),
    "codes": (ours.Codes(of([[0.1, 0.7, -0.5, 0.3]])), 1.0, 2.0),
    "binomial": (ours.Binomial(9, of([0.2])), 5.0, INF),
    "poisson": (ours.Poisson(of([1.2])), 2.0, 5.0),
    "poisson, open": (ours.Poisson(of([1.2])), 3.5, INF),
    "negative binomial": (ours.NegativeBinomial(of([1.0]), of([0.5])), -INF, 3.0),
    "logistic": (
        ours.DiscretizedLogistic(of([[3.0, 7.0]]), of([[1.0, 0.8]]), of([[0.0, 0.0]]), 12), 4, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_and_value_stand_for_the_restricted_law(name):
    """Mean weight and weighted moments against the sum, or the integral, of the density over the bounds."""
    torch.manual_seed(0)
    d, low, high = FAMILIES[name]
    log_weight, value = between(d.expand([N, 1]), torch.tensor([low]), torch.tensor([high]))
    w = log_weight.exp().flatten()
    inside = value.flatten()[w > 0]
    assert bool(((inside >= low) & (inside <= high)).all())
    if d.support.is_discrete:
        grid, step = torch.arange(math.ceil(max(low, 0)), min(high, 80) + 1.0), 1.0
        grid = grid[d.support.check(grid)]
        mass = d.log_prob(grid.unsqueeze(1)).exp().flatten()
    else:
        grid = torch.linspace(max(low, -200.0 if d.support is td.constraints.real else 1e-9), min(high, 60), 400_001)
        step = float(grid[1] - grid[0])
        mass = d.log_prob(grid.unsqueeze(1)).exp().flatten() * step
        mass[[0, -1]] *= 0.5
    total = float(mass.sum())
    closed = bool((log_weight == log_weight[0]).all())  # else the entry was drawn, and weighs 1 or 0
    error = 0.0 if closed else float(w.std()) / math.sqrt(N)
    assert closed or set(w.tolist()) == {0.0, 1.0}
    assert abs(float(w.mean()) - total) < 4.5 * error + 3e-5 * total
    loc = float((grid * mass).sum()) / total
    spread = math.sqrt(float(((grid - loc).square() * mass).sum()) / total)
    assert abs(float(inside.mean()) - loc) < 4.5 * spread / math.sqrt(len(inside)) + 1e-4 * abs(loc)
    assert float(inside.std()) == pytest.approx(spread, rel=0.06)


def test_equal_bounds_weigh_as_the_density_and_values_out_of_reach_as_nothing():
    for name, (d, _, _) in FAMILIES.items():
        at = torch.tensor([2.0 if name != "bernoulli" else 1.0])
        log_weight, value = between(d.expand([3, 1]), at, at)
        assert torch.allclose(log_weight, d.log_prob(at).expand(3, 1), atol=1e-12), name
        assert bool((value == at).all())
        if d.support.is_discrete:
            half = torch.tensor([1.5])
            assert bool((between(d.expand([3, 1]), half, half)[0] == -INF).all())
            assert bool((between(d.expand([3, 1]), torch.tensor([1.2]), torch.tensor([1.8]))[0] == -INF).all())
        else:
            free = between(d.expand([3, 1]), torch.tensor([-INF]), torch.tensor([INF]))
            assert not free[0].any()
            assert len(set(free[1].flatten().tolist())) == 3
    single, tenth = td.Normal(torch.zeros(1, dtype=torch.float32), 1.0), of([0.1])
    assert float(between(single, tenth, tenth)[0]) == pytest.approx(stats.norm.logpdf(0.1), rel=1e-6)
    positive = FAMILIES["log-normal"][0].expand([3, 1])
    assert bool((between(positive, torch.tensor([-2.0]), torch.tensor([0.0]))[0] == -INF).all())


def test_distance_to_the_closest_record_is_gowers():
    """Every pair by hand, holes and all."""
    rng = np.random.default_rng(0)
    rows, records = (np.c_[rng.normal(size=(n, 3)) * [1, 10, 0.1], rng.integers(0, 3, (n, 2))] for n in (40, 60))
    for x, share in ((rows, 0.3), (records, 0.2)):
        x[rng.random(x.shape) < share] = math.nan
    rows[7], rows[8] = records[5], math.nan
    spread = np.nanmax(records, 0) - np.nanmin(records, 0)
    wanted = np.full(len(rows), INF)
    for i, row in enumerate(rows):
        for record in records:
            terms = [
                abs(a - b) / spread[j] if j < 3 else float(a != b)
                for j, (a, b) in enumerate(zip(row, record, strict=True))
                if not math.isnan(a - b)
            ]
            if terms:
                wanted[i] = min(wanted[i], np.mean(terms))
    found = aevb.distance_to_closest(torch.as_tensor(rows), torch.as_tensor(records), [3, 4]).numpy()
    assert math.isnan(found[8])
    assert found[7] == 0
    kept = np.delete(np.arange(len(rows)), 8)
    # Of records that float32 finds equally near, either may be taken.
    assert np.allclose(found[kept], wanted[kept], atol=1e-6)
    whole = rows[:, :3][~np.isnan(rows[:, :3]).any(1)]
    alone = aevb.distance_to_closest(torch.as_tensor(whole[:-1]), torch.as_tensor(whole)).numpy()
    assert not alone.any()
    with pytest.raises(InputError, match="must be"):
        aevb.distance_to_closest(torch.zeros(2, 3), torch.zeros(2, 2))
