"""Annealing against closed forms and quadrature: bounds from both sides, any continuous latents, what is refused.

Monte Carlo comparisons of means allow four standard errors unless told otherwise beside them; single rows, of which
there are hundreds, allow what all of them together exceed once in a thousand runs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import stats
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, Bernoulli, Categorical, DiagonalNormal, Holes, InputError, StandardNormal
from aevb.build import LIKELIHOODS, POSTERIORS, PRIORS
from aevb.conditionals import Deterministic, LearnedNormal, MixtureOfNormals
from aevb.evaluate import annealing
from aevb.evaluate import path as path_module
from aevb.evaluate.annealing import Annealed, ais, bidirectional, reverse_ais
from aevb.evaluate.path import Path
from gaussians import affine, factorized, likelihood, raw
from test_known_answers import chain, exact_pair, linear

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-9
ROWS = 200
ONE_OF_MANY = stats.norm.isf(1e-3 / 2 / 400)
"""Standard errors, 4.7, that one of 400 rows exceeds with a probability of 1e-3."""


def repeated() -> tuple[VAE, dict[str, Tensor], float]:
    """One datum 200 times, each with an exact posterior draw of its own; log p of the datum."""
    model = linear(d=4, k=2)
    x = model.sample(1)
    z = model.posterior(x).sample(torch.Size([ROWS]))[:, 0]
    return exact_pair(model), {"x": x.expand(ROWS, -1), "z": z}, float(model.log_prob(x))


def mean_and_error(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std()) / math.sqrt(len(x))


def held(lower: Annealed, upper: Annealed, truth: Tensor | float) -> int:
    """Rows whose interval, two standard errors wider than the bounds, holds the truth."""
    low = lower.log_prob - 2 * lower.std_error <= truth
    return int((low & (upper.log_prob + 2 * upper.std_error >= truth)).sum())


LEAST_HELD = stats.binom.ppf(1e-4, ROWS, 0.95)
"""Of 200 intervals that each hold the truth with 95 %, fewer do so once in ten thousand times."""


def test_few_temperatures_bound_from_both_sides():
    """10 temperatures: both bounds hold, the gap is visible, and the weights are unbiased all the same.

    The bias of a bound falls with the chains, its scatter with their root: two chains show the gap best.
    """
    vae, values, truth = repeated()
    lower = ais(vae, {"x": values["x"]}, chains=2, temperatures=10, leapfrogs=5)
    upper = reverse_ais(vae, values, chains=2, temperatures=10, leapfrogs=5)
    below, error = mean_and_error(lower.log_prob - truth)
    assert below < -4 * error
    above, error = mean_and_error(upper.log_prob - truth)
    assert above > 4 * error
    lower = ais(vae, {"x": values["x"]}, temperatures=10, leapfrogs=5)
    upper = reverse_ais(vae, values, temperatures=10, leapfrogs=5)
    assert held(lower, upper, truth) >= LEAST_HELD
    weight, error = mean_and_error((lower.log_prob - truth).exp())
    assert error < 0.1
    assert abs(weight - 1) < 4 * error
    assert bool(((lower.ess >= 1) & (lower.ess <= 16)).all())
    assert bool(((lower.acceptance > 0.4) & (lower.acceptance < 0.9)).all())


def test_reverse_weights_are_unbiased():
    """50 temperatures, where 1 / p(x) has a standard error worth the name."""
    vae, values, truth = repeated()
    found = reverse_ais(vae, values, temperatures=50, leapfrogs=3, seed=1)
    weight, error = mean_and_error((truth - found.log_prob).exp())
    assert error < 0.05
    assert abs(weight - 1) < 4 * error


def test_many_temperatures_close_the_gap():
    """1000 temperatures: below 0.05 nats, with both bounds within two standard errors of where they must be."""
    vae, values, truth = repeated()
    settings = {"chains": 16, "temperatures": 1000, "leapfrogs": 1}
    lower = ais(vae, {"x": values["x"]}, **settings)
    upper = reverse_ais(vae, values, **settings)
    below, error = mean_and_error(lower.log_prob - truth)
    assert below <= 2 * error
    above, error = mean_and_error(upper.log_prob - truth)
    assert above >= -2 * error
    gap, error = mean_and_error(upper.log_prob - lower.log_prob)
    assert gap + 4 * error < 0.05
    assert held(lower, upper, truth) >= LEAST_HELD


@pytest.mark.parametrize("temperatures", [1, 7])
def test_an_exact_q_needs_no_annealing(temperatures):
    """Every weight is p(x), forwards and backwards: rounding only."""
    model = linear()
    vae, x = exact_pair(model), model.sample(5)
    truth = model.log_prob(x)
    values = {"x": x, "z": model.posterior(x).sample()}
    settings = {"start": "posterior", "temperatures": temperatures, "leapfrogs": 3, "chains": 5}
    for found in (ais(vae, {"x": x}, **settings), reverse_ais(vae, values, **settings)):
        torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=ROUNDING)
        assert bool((found.std_error < 1e-6).all())
        assert bool(found.acceptance.isnan().all()) == (temperatures == 1)


def test_one_temperature_is_importance_sampling():
    model = linear(d=3, k=1)
    x = model.sample(4)
    q = factorized(0.5 * model.gain, torch.zeros(1), torch.ones(1))
    vae = VAE(model.p(), BayesNet({"z | x": q}))
    found = ais(vae, {"x": x}, chains=4000, temperatures=1, start="posterior")
    assert bool((found.std_error < 0.05).all())
    assert bool(((found.log_prob - model.log_prob(x)).abs() < 4 * found.std_error).all())


def test_figures_are_those_of_the_weights(monkeypatch):
    """The mean weight, its standard error by the delta method and the ESS, by hand."""
    vae, values, _ = repeated()
    values = {name: value[:3] for name, value in values.items()}
    log_w = torch.tensor([[0.0, 700.0, -900.0], [1.0, 701.0, -900.0], [-2.0, 690.0, -900.0]])
    monkeypatch.setattr(annealing, "_travel", lambda *_: (log_w, torch.full((3,), 0.5)))
    w = (log_w - log_w.max(0).values).exp()
    mean, error = w.mean(0).log() + log_w.max(0).values, w.std(0) / math.sqrt(3) / w.mean(0)
    for found, sign in ((ais(vae, {"x": values["x"]}, chains=3), 1), (reverse_ais(vae, values, chains=3), -1)):
        torch.testing.assert_close(found.log_prob, sign * mean)
        torch.testing.assert_close(found.std_error, error)
        torch.testing.assert_close(found.ess, w.sum(0).square() / w.square().sum(0))
    monkeypatch.setattr(annealing, "_travel", lambda *_: (log_w[:1], torch.full((3,), 0.5)))
    assert bool(ais(vae, {"x": values["x"]}, chains=1).std_error.isnan().all())


def scaled(name: str, latents: int) -> VAE:
    """A model of this likelihood whose decoder bends much, with a q that is wider than the prior.

    Its weights are numpy's, the same on any machine: how far apart prior and posterior are does not hang on luck.
    """
    torch.manual_seed(latents)
    count: dict[str, object] = {"total_count": 6} if "binomial" in name and "negative" not in name else {}
    if name == "mixed":
        count = {"kinds": ("categorical:3", "positive", "ordinal:-2:3")}
    config = aevb.ModelConfig(features=3, likelihood=name, latents=latents, hidden=(6,), activation="tanh", **count)
    vae = aevb.build_vae(config)
    with torch.no_grad():
        rng = np.random.default_rng(40 + latents)
        for parameter in vae.p.parameters():
            if parameter.ndim == 2:
                width = 2.5 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.as_tensor(rng.uniform(-width, width, parameter.shape)))
        encoder = vae.q.conditional("z").net.net.last
        encoder.weight.zero_()
        encoder.bias.copy_(torch.cat([torch.zeros(latents), raw(torch.full((latents,), 1.3))]))
    return vae


def by_grid(vae: VAE, x: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Log of the integral over eight standard deviations of the prior, and E log p(x | z) under the posterior."""
    dims = vae.p.distribution("z", {}).event_shape[0]
    axis = torch.linspace(-8, 8, points)
    z = torch.cartesian_prod(*[axis] * dims).reshape(-1, 1, dims)
    with torch.no_grad():
        found = vae.p.log_prob({"z": z, "x": x})
    joint = found["z"] + found["x"]
    log_p = joint.logsumexp(0) + dims * math.log(float(axis[1] - axis[0]))
    return log_p, (joint.softmax(0) * found["x"]).sum(0)


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_quadrature_agrees_for_every_likelihood(name, latents):
    """Each row by its standard error, importance sampling's and annealing's; the grid's error by halving it."""
    vae = scaled(name, latents)
    x = vae.p.sample(40)["x"]
    truth, fit = by_grid(vae, x, 201)
    x = x[(fit - truth).argsort()[-4:]]  # the rows that tell most of their latents
    points = 801 if latents == 1 else 401
    truth, fit = by_grid(vae, x, points)
    assert bool(((truth - by_grid(vae, x, points // 2 + 1)[0]).abs() < 1e-3).all())
    assert float((fit - truth).max()) > 0.3  # nats from the prior to the posterior
    sampled = aevb.log_marginal(vae, {"x": x}, 10_000)
    annealed = ais(vae, {"x": x}, chains=200, temperatures=40, leapfrogs=5)
    for found in (sampled, annealed):
        assert bool((found.std_error < 0.2).all())
        assert bool(((found.log_prob - truth).abs() < ONE_OF_MANY * found.std_error + 1e-3).all())
    assert not pulled(annealed.log_prob - truth, annealed.std_error)  # equal rows have noise of their own here alone


def pulled(error: Tensor, std_error: Tensor) -> bool:
    """Whether errors are larger than four standard errors in the mean, or than 4.7 one by one."""
    one = bool((error.abs() >= ONE_OF_MANY * std_error).any())
    return one or abs(float(error.mean())) >= 4 * float(std_error.square().sum().sqrt()) / len(error)


def test_two_layers_meet_their_closed_form():
    """z2 -> z1 -> x, inferred bottom-up: from the prior, from a q that is off, and from the exact one."""
    model = chain()
    x = model.p.sample(6)["x"]
    truth = model.log_prob(x)
    exact = VAE(model.p, BayesNet({"z1 | x": model.given("z1", ("x",)), "z2 | z1": model.given("z2", ("z1",))}))
    found = ais(exact, {"x": x}, chains=3, temperatures=4, leapfrogs=2, start="posterior")
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=ROUNDING)
    gain = 0.6 * model.given("z1", ("x",)).gains[0]
    off = {
        "z1 | x": factorized(gain, torch.zeros(3), torch.full((3,), 0.8)),
        "z2 | z1": factorized(torch.zeros(2, 3), torch.zeros(2), torch.ones(2)),
    }
    for vae, start in ((exact, "prior"), (VAE(model.p, BayesNet(off)), "posterior")):
        found = ais(vae, {"x": x}, chains=250, temperatures=100, leapfrogs=5, start=start)
        assert bool((found.std_error < 0.3).all())
        assert not pulled(found.log_prob - truth, found.std_error)


def test_context_computed_nodes_and_missing_entries():
    """p: z | c, then h = A z computed, then x | h, c with holes; q: h' = B x computed, then z | h', c."""
    torch.manual_seed(0)
    b, a, w, v = torch.randn(2, 1), torch.randn(3, 2), torch.randn(4, 3), torch.randn(4, 1)
    t, s = 0.8, 0.6
    p = BayesNet({
        "z | c": factorized(b, torch.zeros(2), torch.full((2,), t)),
        "h | z": Deterministic(affine(a, torch.zeros(3))),
        "x | h, c": likelihood(torch.cat([w, v], 1), torch.zeros(4), s),
    })  # fmt: skip
    q = BayesNet({
        "g | x": Deterministic(Holes(MLP(8, [], 3))),
        "z | g, c": factorized(torch.cat([0.1 * torch.randn(2, 3), b], 1), torch.zeros(2), torch.ones(2)),
    })  # fmt: skip
    vae, c = VAE(p, q, given=["c"]), torch.randn(6, 1)
    x = p.sample(6, {"c": c})["x"]
    for row, gone in enumerate([[], [0], [1, 2], [0, 1, 3], [3], [0, 1, 2, 3]]):
        x[row, gone] = math.nan
    mean, cov = c @ (w @ a @ b + v).T, t**2 * (w @ a) @ (w @ a).T + s**2 * torch.eye(4)
    seen = ~x.isnan()
    truth = torch.tensor([
        stats.multivariate_normal(mean[i, k], cov[k][:, k]).logpdf(x[i, k]) if k.any() else 0.0
        for i, k in enumerate(seen)
    ])  # fmt: skip
    for start in ("prior", "posterior"):
        found = ais(vae, {"x": x, "c": c}, chains=200, temperatures=80, leapfrogs=5, start=start)
        assert bool((found.std_error < 0.3).all())
        assert not pulled((found.log_prob - truth)[:5], found.std_error[:5])
        assert float(found.log_prob[5]) == pytest.approx(0, abs=4 * float(found.std_error[5]) + ROUNDING)
    both = bidirectional(vae, 6, given={"c": c}, temperatures=60, leapfrogs=3)
    assert set(both.values) == {"c", "z", "x"}
    assert torch.equal(both.values["c"], c)
    assert math.isfinite(both.gap)


def test_bidirectional_brackets_the_truth():
    """400 data: the mean error of either bound on its side by four standard errors, and the gap is their difference."""
    model = linear(d=4, k=2)
    found = bidirectional(VAE(model.p(), exact_pair(model).q), 400, chains=2, temperatures=10, leapfrogs=3)
    truth = model.log_prob(found.values["x"])
    below, error = mean_and_error(found.lower.log_prob - truth)
    assert below < -4 * error
    above, error = mean_and_error(found.upper.log_prob - truth)
    assert above > 4 * error
    gap, error = mean_and_error(found.upper.log_prob - found.lower.log_prob)
    assert (found.gap, found.std_error) == pytest.approx((gap, error))
    assert 0 < found.gap < 5
    spread = torch.cov(found.values["x"].T) - (model.w @ model.w.T + model.s**2 * torch.eye(4))
    assert float(spread.abs().max()) < 4 * 2**0.5 * float(torch.cov(found.values["x"].T).diagonal().max()) / 20
    assert math.isnan(bidirectional(exact_pair(model), 1, temperatures=2, leapfrogs=1).std_error)


class Of(nn.Module):
    """A conditional from a function."""

    def __init__(self, law) -> None:
        super().__init__()
        self.law = law

    def forward(self, *parents: Tensor) -> td.Distribution:
        return self.law(*parents)


def gamma_poisson() -> tuple[VAE, dict[str, Tensor], Tensor]:
    """A rate above zero, two counts of it: the marginal is a negative multinomial, the posterior a Gamma."""
    a, r = 1.5, 0.5

    def law(shape: Tensor, rate: Tensor) -> td.Distribution:
        return td.Independent(td.Gamma(shape, rate), 1)

    p = BayesNet({
        "z": Of(lambda: law(torch.tensor([a]), torch.tensor([r]))),
        "x | z": Of(lambda z: td.Independent(td.Poisson(z.expand(*z.shape[:-1], 2), validate_args=False), 1)),
    })  # fmt: skip
    q = BayesNet({"z | x": Of(lambda x: law(a + x.sum(-1, keepdim=True), torch.full((len(x), 1), r + 2)))})
    x = torch.tensor([[0.0, 0.0], [1.0, 4.0], [12.0, 9.0]])
    total = x.sum(-1)
    log_p = torch.lgamma(a + total) - math.lgamma(a) + a * math.log(r) - (a + total) * math.log(r + 2)
    return VAE(p, q), {"x": x}, log_p - torch.lgamma(x + 1).sum(-1)


def dirichlet_classes() -> tuple[VAE, dict[str, Tensor], Tensor]:
    """Shares of three classes, one class drawn of them: its probability is its share of the concentration."""
    alpha = torch.tensor([2.0, 0.7, 3.0])
    p = BayesNet({"z": Of(lambda: td.Dirichlet(alpha)), "x | z": Categorical(3, Of(lambda z: z.log()))})
    q = BayesNet({"z | x": Of(lambda x: td.Dirichlet(alpha + x))})
    return VAE(p, q), {"x": torch.tensor([0, 1, 2])}, (alpha / alpha.sum()).log()


@pytest.mark.parametrize("model", [gamma_poisson, dirichlet_classes], ids=lambda model: model.__name__)
def test_constrained_latents_move_on_the_reals(model):
    """From the prior, and exactly from the posterior; a family whose noise is not normal is drawn row by row."""
    vae, values, truth = model()
    found = ais(vae, values, chains=400, temperatures=20, leapfrogs=5)
    assert bool((found.std_error < 0.1).all())
    assert not pulled(found.log_prob - truth, found.std_error)
    found = ais(vae, values, chains=3, temperatures=5, leapfrogs=3, start="posterior")
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=ROUNDING)
    assert bool((found.acceptance > 0.1).all())
    drawn = values | {"z": vae.posterior(values)["z"].sample()}
    found = reverse_ais(vae, drawn, chains=3, temperatures=5, leapfrogs=3, start="posterior")
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=ROUNDING)


class Cut(td.Distribution):
    """N(z, 1), where z is above zero; else no density at all."""

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.real_vector

    def __init__(self, z: Tensor) -> None:
        self.z = z
        super().__init__(z.shape[:-1], z.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        inside = td.Normal(self.z, 1.0, validate_args=False).log_prob(value)
        return torch.where(self.z > 0, inside, -math.inf).sum(-1)


def test_where_there_is_no_density_moves_are_rejected_and_weights_zero():
    """Half of the prior's draws weigh nothing: p(x) = N(x; 0, 2) Phi(x / sqrt 2), as the mean weight must be."""
    vae = VAE(
        BayesNet({"z": StandardNormal(1), "x | z": Of(Cut)}),
        BayesNet({"z": LearnedNormal(1)}),
    )
    x = torch.tensor([[-1.0], [0.0], [2.0]])
    found = ais(vae, {"x": x}, chains=1000, temperatures=10, leapfrogs=3)
    truth = torch.as_tensor(stats.norm.logpdf(x[:, 0], scale=2**0.5) + stats.norm.logcdf(x[:, 0] / 2**0.5))
    assert bool((found.ess < 600).all())
    assert not pulled(found.log_prob - truth, found.std_error)
    with pytest.raises(InputError, match="rows 1 are not finite"):
        reverse_ais(vae, {"x": x, "z": torch.tensor([[1.0], [-1.0], [1.0]])}, temperatures=3, leapfrogs=1)


def test_a_trajectory_that_diverged_leaves_the_others_alone():
    """torch's Gamma refuses a NaN: that chain is NaN throughout, and the others are what they are without it."""
    vae, values, _ = gamma_poisson()
    path = Path(vae, values, {"z": torch.Size([1])}, "prior")
    u = torch.linspace(-1, 1, 6).reshape(2, 3, 1)
    whole = path.at(u)
    u[0, 1] = math.nan
    for found, wanted in zip(path.at(u), whole, strict=True):
        assert bool(found[0, 1].isnan().all())
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(found[0, [0, 2]], wanted[0, [0, 2]])


class Exponential(nn.Module):
    """A Gaussian whose scale, exp of its parent, is 0 or infinite far out, where torch refuses it."""

    def forward(self, z: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(z, (3 * z).exp()), 1)


def test_parameters_out_of_range_are_a_rejected_move():
    vae = VAE(BayesNet({"z": StandardNormal(1), "x | z": Exponential()}), BayesNet({"z": LearnedNormal(1)}))
    x, checks = torch.tensor([[0.5], [-1.0]]), td.Distribution._validate_args
    with pytest.raises(ValueError, match="Expected parameter scale"):
        vae.p.distribution("x", {"z": torch.tensor([[-1000.0]])})
    path = Path(vae, {"x": x}, {"z": torch.Size([1])}, "prior")
    assert not bool((path.height(path.at(torch.tensor([[[-1000.0], [1000.0]]])), 1.0) > -math.inf).any())
    found = ais(vae, {"x": x}, chains=200, temperatures=30, leapfrogs=3)
    truth = by_grid(vae, x, 20_001)[0]
    assert bool((found.std_error < 0.2).all())
    assert bool(((found.log_prob - truth).abs() < 4.7 * found.std_error).all())
    assert td.Distribution._validate_args is checks


class Broken(nn.Module):
    """Returns NaN for the rows of which the first entry is above 5."""

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return torch.where(c[..., :1] > 5, math.nan, z)


def test_weights_that_are_no_numbers_are_an_error():
    vae = VAE(
        BayesNet({"z": StandardNormal(1), "x | z, c": Bernoulli(Broken())}),
        BayesNet({"z": LearnedNormal(1)}),
        given="c",
    )
    values = {"x": torch.ones(5, 1), "c": torch.tensor([[0.0], [9.0], [0.0], [7.0], [0.0]])}
    for pack in (1, 2048):
        with pytest.raises(InputError, match="rows 1" + (", 3" if pack > 1 else "") + " are not finite numbers"):
            ais(vae, values, temperatures=3, leapfrogs=1, pack=pack)


def recorded(monkeypatch, run) -> tuple[list[Tensor], list[Tensor], Annealed]:
    """Step lengths of the pilot (four chains) and of the counted path (five), in order."""
    steps: dict[int, list[Tensor]] = {4: [], 5: []}
    original = annealing._transition

    def spy(path, point, b, step, leapfrogs, move):
        steps[len(point.u)].append(step)
        return original(path, point, b, step, leapfrogs, move)

    with monkeypatch.context() as patch:
        patch.setattr(annealing, "_transition", spy)
        found = run()
    return steps[4], steps[5], found


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_steps_are_frozen_before_the_counted_path(monkeypatch, direction):
    """They change with the pilot's noise, and with neither the counted path's nor the exact draws."""
    model = linear(d=4, k=2)
    vae, x = exact_pair(model), model.sample(3)
    z = model.posterior(x).sample()
    settings = {"chains": 5, "temperatures": 6, "leapfrogs": 2}

    def run(shift: str, z: Tensor = z):
        original = path_module.seed_of
        with monkeypatch.context() as patch:
            stage = {"pilot": ("pilot", "pilot start"), "counted": ("counted", "start", "reverse")}.get(shift, ())
            patch.setattr(path_module, "seed_of", lambda name, key: original(name, key) + (name in stage))
            if direction == "forwards":
                return recorded(monkeypatch, lambda: ais(vae, {"x": x}, **settings))
            return recorded(monkeypatch, lambda: reverse_ais(vae, {"x": x, "z": z}, **settings))

    pilot, counted, found = run("nothing")
    assert len(counted) == 5 + 10 * (direction == "backwards")
    others = [run("counted")] + ([run("nothing", z + 1)] if direction == "backwards" else [])
    for again in others:
        assert all(torch.equal(*pair) for pair in zip(pilot, again[0], strict=True))
        assert all(torch.equal(*pair) for pair in zip(counted, again[1], strict=True))
        assert not torch.equal(found.log_prob, again[2].log_prob)
    assert not any(torch.equal(*pair) for pair in zip(counted, run("pilot")[1], strict=True))


def test_figures_depend_on_seed_and_row_only():
    """Not on company, order or packs but by rounding; equal rows have noise of their own; torch's generator rests."""
    model = linear(d=4, k=2)
    vae, x = exact_pair(model), model.sample(4)
    x[3] = x[0]
    settings = {"chains": 3, "temperatures": 5, "leapfrogs": 1}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = ais(vae, {"x": x}, **settings)
    values = {"x": x, "z": model.posterior(x).mean}
    upper = reverse_ais(vae, values, **settings)
    bidirectional(vae, 3, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.log_prob[0] != whole.log_prob[3]
    assert torch.equal(ais(vae, {"x": x}, **settings).log_prob, whole.log_prob)
    assert not torch.equal(ais(vae, {"x": x}, seed=1, **settings).log_prob, whole.log_prob)
    for pack in (1, 6):
        for field in ("log_prob", "std_error", "ess", "acceptance"):
            packed = getattr(ais(vae, {"x": x}, pack=pack, **settings), field)
            torch.testing.assert_close(packed, getattr(whole, field), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(reverse_ais(vae, values, pack=6, **settings).log_prob, upper.log_prob)
    some = ais(vae, {"x": x[[2, 1]]}, **settings)
    torch.testing.assert_close(some.log_prob, whole.log_prob[[2, 1]], rtol=0, atol=ROUNDING)


def test_the_model_is_left_as_it_was():
    """Modes, buffers, parameters, what they require and their gradients; progress adds up; figures are float64."""
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"z": MixtureOfNormals(2, 3), "x | z": Bernoulli(MLP(2, [5], 3, batch_norm=True))}),
        BayesNet({"z | x": DiagonalNormal(MLP(3, [5], 4, batch_norm=True))}),
    ).float()
    vae.p.eval()
    frozen = next(vae.p.parameters()).requires_grad_(False)
    next(vae.q.parameters()).grad = torch.ones_like(next(vae.q.parameters()))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    seen: list[int] = []
    x = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]])
    for start in ("prior", "posterior"):
        found = ais(vae, {"x": x}, chains=2, temperatures=4, leapfrogs=2, start=start, pack=4, progress=seen.append)
        assert all(getattr(found, field.name).dtype == torch.float64 for field in dataclasses.fields(found)[:4])
    assert seen == [2, 1, 2, 1]
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert [vae.p.training, vae.q.training, vae.training] == [False, True, True]
    assert [p is not frozen for p in vae.parameters()] == [p.requires_grad for p in vae.parameters()]
    assert [p.grad is None for p in vae.p.parameters()] == [True] * len(list(vae.p.parameters()))
    assert torch.equal(next(vae.q.parameters()).grad, torch.ones_like(next(vae.q.parameters())))


def test_single_precision_agrees_with_double():
    """The same noise in float32 is other noise: both within four standard errors of each other."""
    vae = scaled("bernoulli", 2)
    x = vae.p.sample(4)["x"]
    settings = {"chains": 100, "temperatures": 20, "leapfrogs": 3}
    double, single = ais(vae, {"x": x}, **settings), ais(vae.float(), {"x": x}, **settings)
    assert not pulled(double.log_prob - single.log_prob, torch.hypot(double.std_error, single.std_error))


def classes(**given: Tensor) -> tuple[VAE, dict[str, Tensor]]:
    p = BayesNet({"y": Categorical(3), "z": StandardNormal(2), "x | y, z": Bernoulli(MLP(5, [], 4))})
    q = BayesNet({"y | x": Categorical(3, MLP(4, [], 3)), "z | x": DiagonalNormal(MLP(4, [], 4))})
    return VAE(p, q), {"x": torch.ones(2, 4), **given}


def test_classes_that_are_observed_are_data():
    """log p(x, y) sums to log p(x) over y."""
    torch.manual_seed(0)
    vae, values = classes()
    settings = {"chains": 200, "temperatures": 20, "leapfrogs": 3}
    parts = [ais(vae, values | {"y": torch.full((2,), y)}, **settings) for y in range(3)]
    joint = torch.stack([part.log_prob for part in parts])
    error = (joint.softmax(0) * torch.stack([part.std_error for part in parts])).square().sum(0).sqrt()
    z = torch.cartesian_prod(*[torch.linspace(-8, 8, 161)] * 2).unsqueeze(1)
    with torch.no_grad():
        grid = torch.stack(
            [sum(vae.p.log_prob({"z": z, "x": X["x"], "y": torch.full((2,), y)}).values()) for y in range(3)]
        )
    exact = grid.logsumexp((0, 1)) + 2 * math.log(0.1)
    assert bool((error < 0.1).all())
    assert not pulled(joint.logsumexp(0) - exact, error)
    both = bidirectional(vae, 4, latents=["z"], temperatures=20, leapfrogs=3)
    assert set(both.values) == {"x", "y", "z"}
    assert abs(both.gap) < 0.5


def wrong_dims() -> VAE:
    """A decoder that takes any number of latents does not tell that q has one and p two."""
    decoder = Bernoulli(Of(lambda z: z.sum(-1, keepdim=True).repeat_interleave(4, -1)))
    p = BayesNet({"z": StandardNormal(2), "x | z": decoder})
    return VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(4, [], 2))}))


def shared_weights() -> VAE:
    p = BayesNet({"w": StandardNormal(2), "z": StandardNormal(2), "x | z, w": Bernoulli(MLP(4, [], 4))})
    q = BayesNet({"w": LearnedNormal(2), "z | x": DiagonalNormal(MLP(4, [], 4))})
    return VAE(p, q, shared=["w"])


def on_circle() -> VAE:
    p = BayesNet({
        "z": Of(lambda: td.Independent(td.VonMises(torch.zeros(2), torch.ones(2)), 1)),
        "x | z": Bernoulli(MLP(2, [], 4)),
    })  # fmt: skip
    return VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(4, [], 4))}))


X = {"x": torch.ones(2, 4)}
NAN = math.nan


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda: ais(wrong_dims(), X, chains=0), "`chains` must be at least 1; got 0"),
        (lambda: ais(wrong_dims(), X, temperatures=0), "`temperatures` must be at least 1; got 0"),
        (lambda: ais(wrong_dims(), X, leapfrogs=-1), "`leapfrogs` must be at least 1; got -1"),
        (lambda: ais(wrong_dims(), X, pack=0), "`pack` must be at least 1"),
        (lambda: ais(wrong_dims(), X, start="q"), "`start` must be one of prior, posterior; got 'q'"),
        (lambda: ais(wrong_dims(), X, start="posterior"), r"`z` has event shape \(1,\) in q and \(2,\) in p"),
        (lambda: ais(*classes()), r"`y` is latent and discrete \(OneHot\).*log_marginal"),
        (lambda: ais(*classes(y=torch.tensor([1.0, NAN]))), "`y` is missing .* in some rows"),
        (lambda: ais(wrong_dims(), X | {"z": torch.zeros(2, 2)}), "nothing is latent.*log_marginal"),
        (lambda: ais(shared_weights(), X), "`w` has one value for the whole data set"),
        (lambda: ais(on_circle(), X), "`z` is latent with a VonMises prior.*log_marginal"),
        (lambda: reverse_ais(shared_weights(), X), "`w` has one value for the whole data set"),
        (lambda: reverse_ais(wrong_dims(), X), "`values` lacks `z`: .*vae.p.sample"),
        (lambda: reverse_ais(wrong_dims(), X | {"z": torch.full((2, 2), NAN)}), "`z` is latent and has missing"),
        (lambda: reverse_ais(*classes(y=torch.tensor([1, 2]), z=torch.zeros(2, 2))), "`y` is latent and discrete"),
        (lambda: bidirectional(wrong_dims(), 0), "`rows` must be at least 1; got 0"),
        (lambda: bidirectional(wrong_dims(), 2, given=X), "`given` must give the model's context, none; got `x`"),
    ],
)
def test_what_is_refused(run, match):
    with pytest.raises(InputError, match=match):
        run()


WITHOUT_INVERSE = {"planar", "sylvester"}


@pytest.mark.parametrize(
    ("prior", "posterior"), [*((name, "diagonal") for name in PRIORS), *(("standard", name) for name in POSTERIORS)]
)
def test_quadrature_agrees_for_every_prior_and_posterior(prior, posterior):
    """From the prior, and from q where its density is known at any point; standard errors far below their limit."""
    torch.manual_seed(0)
    config = aevb.ModelConfig(
        features=4, likelihood="normal", latents=2, hidden=(5,), prior=prior, posterior=posterior, components=3
    )
    vae, x = aevb.build_vae(config), 0.7 * torch.randn(3, 4)
    truth = by_grid(vae, x, 161)[0]
    assert bool(((truth - by_grid(vae, x, 81)[0]).abs() < 1e-3).all())
    # From the prior no path knows of q: one posterior is enough for it.
    for start in ["prior"] * (posterior == "diagonal") + ["posterior"] * (prior == "standard"):
        if start == "posterior" and posterior in WITHOUT_INVERSE:
            with pytest.raises(InputError, match=r'needs the density of q at any `z`.*Or use start="prior"'):
                ais(vae, {"x": x}, temperatures=2, leapfrogs=1, start=start)
            continue
        found = ais(vae, {"x": x}, chains=400, temperatures=10, leapfrogs=2, start=start)
        assert bool((found.std_error < 0.1).all())
        assert not pulled(found.log_prob - truth, found.std_error)
