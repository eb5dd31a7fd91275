"""Where the bound loses: closed forms of linear-Gaussian models, any q and latents, what is refused.

Monte Carlo comparisons allow four standard errors, told beside each.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import aevb
from aevb import (
    MLP,
    VAE,
    BayesNet,
    Bernoulli,
    Categorical,
    Deterministic,
    DiagonalNormal,
    Holes,
    InputError,
    LearnedNormal,
    StandardNormal,
)
from aevb.build import POSTERIORS, PRIORS
from aevb.evaluate import gaps
from aevb.evaluate.gaps import Gaps, inference_gaps
from aevb.evaluate.path import Path, RowNoise
from gaussians import factorized
from test_annealing import by_grid
from test_known_answers import Linear, chain, linear

pytestmark = pytest.mark.usefixtures("double")


def crude(model: Linear) -> VAE:
    """A diagonal encoder with 0.7 of the gain and 1.3 times the scales that are best."""
    scale = 1.3 * model.s / model.m.diagonal().sqrt()
    return VAE(model.p(), BayesNet({"z | x": factorized(0.7 * model.gain, -model.gain @ model.b, scale)}))


def exact_elbo(model: Linear, x: Tensor, q: td.MultivariateNormal) -> Tensor:
    return model.log_prob(x) - td.kl_divergence(q, model.posterior(x))


def test_gaps_are_those_of_the_closed_form():
    """A2 for q's own family; a full covariance leaves no gap, for its draws then all weigh p(x)."""
    model = linear()
    vae, x = crude(model), model.sample(5)
    found = inference_gaps(vae, {"x": x}, temperatures=0, samples=2000, steps=250)
    log_p = model.log_prob(x)
    best = log_p - 0.5 * (model.m.diagonal().log().sum() - model.m.logdet())
    d = vae.posterior({"x": x})["z"]
    start = exact_elbo(model, x, td.MultivariateNormal(d.mean, torch.diag_embed(d.variance)))
    for bound, error, exact in (
        (found.elbo, found.elbo_error, start),
        (found.refined["own"], found.refined_error["own"], best),
    ):
        assert bool((error < 0.1).all())
        assert bool(((bound - exact).abs() < 4 * error).all())
    assert bool((found.refined_error["own"] < 0.03).all())
    assert bool(((found.refined["full"] - log_p).abs() < 1e-6).all())
    assert bool(((found.log_prob - log_p).abs() < 4 * found.log_prob_error + 1e-6).all())
    assert bool((found.log_prob_error < 0.01).all())
    assert found.source.startswith("importance sampling from q refined")
    # Sylvester layers never vanish wholly; they start from what is exact.
    assert bool(((found.refined["flow"] - log_p).abs() < 0.02).all())
    torch.testing.assert_close(found.gain("full"), found.refined["full"] - found.refined["own"])
    torch.testing.assert_close(found.amortization + found.approximation, found.log_prob - found.elbo)


def test_errors_are_those_of_the_draws():
    """Over 100 seeds the ELBO's scatter is its error, and its mean the closed form (four standard errors)."""
    model = linear(d=3, k=2)
    vae, x = crude(model), model.sample(2)
    runs = [
        inference_gaps(vae, {"x": x}, families=(), temperatures=0, samples=100, steps=1, draws=1, seed=seed)
        for seed in range(100)
    ]
    bound = torch.stack([run.elbo for run in runs])
    d = vae.posterior({"x": x})["z"]
    exact = exact_elbo(model, x, td.MultivariateNormal(d.mean, torch.diag_embed(d.variance)))
    assert bool(((bound.mean(0) - exact).abs() < 4 * bound.std(0) / 10).all())
    # A standard deviation of 100 is known to 1 / sqrt(200); the integrand's tails are not heavier than a square's.
    ratio = bound.std(0) / torch.stack([run.elbo_error for run in runs]).mean(0)
    assert bool(((ratio - 1).abs() < 4 * 2 / math.sqrt(200)).all())


def test_independent_draws_agree_and_gaps_are_not_negative():
    """A decoder that is not linear: two seeds, four standard errors; log p is the better of the two estimates."""
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(nn.Sequential(MLP(2, [8], 30), Scaled(5.0)))})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(30, [8], 4))}))
    x = {"x": p.sample(4)["x"]}
    runs = [inference_gaps(vae, x, samples=500, temperatures=50, leapfrogs=4, steps=150, seed=seed) for seed in (0, 1)]
    one, two = runs
    for name in ("own", "full", "flow"):
        error = torch.hypot(one.refined_error[name], two.refined_error[name])
        assert bool((error < 0.3).all())
        # A climb by other draws ends elsewhere: by less than 0.05 nats.
        assert bool(((one.refined[name] - two.refined[name]).abs() < 4 * error + 0.05).all())
    for run in runs:
        assert bool((run.amortization > 0.3).all())  # the encoder is not trained
        for name, bound in run.refined.items():
            error = torch.hypot(run.log_prob_error, run.refined_error[name])
            assert bool((run.log_prob - bound > -4 * error).all())
        for better, worse in (("full", "own"), ("flow", "full")):
            error = torch.hypot(run.refined_error[better], run.refined_error[worse])
            assert bool((run.refined[better] - run.refined[worse] > -4 * error - 0.05).all())
        assert run.source != "importance sampling"  # from so poor a q it is the worst


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_two_layers_and_their_joint_gaussian():
    """A chain's posterior is one Gaussian of both layers: "full" reaches it, shifts of a poor q do not."""
    model = chain()
    x = {"x": model.p.sample(3)["x"]}
    poor = {}
    for node, parent in (("z1", "x"), ("z2", "z1")):
        exact = model.given(node, (parent,))
        poor[f"{node} | {parent}"] = factorized(0.9 * exact.gains[0], exact.offset, exact.tril.diagonal())
    found = inference_gaps(VAE(model.p, BayesNet(poor)), x, families=("full",), temperatures=0, samples=500, steps=250)
    log_p = model.log_prob(x["x"])
    assert bool(((found.refined["full"] - log_p).abs() < 1e-3).all())
    assert bool((found.amortization > 0).all())
    assert bool((found.refined["own"] < log_p - 4 * found.refined_error["own"]).all())
    assert set(found.refined) == {"own", "full"}


@pytest.mark.parametrize(
    ("prior", "posterior"), [*((name, "diagonal") for name in PRIORS), *(("standard", name) for name in POSTERIORS)]
)
def test_any_prior_and_posterior(prior, posterior):
    """None is above log p by quadrature and each climb leads up (four standard errors); the model stays as it was."""
    torch.manual_seed(0)
    config = aevb.ModelConfig(
        features=4, likelihood="normal", latents=2, hidden=(5,), prior=prior, posterior=posterior, components=3
    )
    vae, x = aevb.build_vae(config), torch.randn(2, 4)
    before, state = {n: v.clone() for n, v in vae.state_dict().items()}, torch.random.get_rng_state()
    found = inference_gaps(vae, {"x": x}, families=("full",), temperatures=0, samples=500, steps=100)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(each.grad is None for each in vae.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    truth = by_grid(vae, x, 161)[0]
    assert bool((found.log_prob < truth + 4 * found.log_prob_error).all())
    for bound, error in zip(found.refined.values(), found.refined_error.values(), strict=True):
        assert bool((bound - found.elbo > -4 * torch.hypot(error, found.elbo_error)).all())
        assert bool((error < 0.2).all())
        assert bool((bound < truth + 4 * error).all())
        assert bool((bound > truth - 1.5).all())  # the encoders begin 1 to 8 nats below


def test_context_computed_nodes_and_holes():
    torch.manual_seed(0)
    p = BayesNet({"z | c": DiagonalNormal(MLP(1, [], 4)), "x | z, c": Bernoulli(MLP(3, [], 5))})
    net = Holes(MLP(10, [4], 3))
    q = BayesNet({"h | x": Deterministic(net), "z | h, c": DiagonalNormal(MLP(4, [], 4))})
    vae = VAE(p, q, given=("c",))
    x = torch.bernoulli(torch.full((4, 5), 0.5))
    x[0, 1] = x[3, :] = math.nan
    found = inference_gaps(vae, {"x": x, "c": torch.randn(4, 1)}, temperatures=0, samples=500, steps=150)
    assert bool((found.amortization[:3] > 0).all())
    # A row of holes: log p(x) = 0, and the prior is the posterior.
    assert abs(float(found.refined["own"][3])) < 1e-2
    assert abs(float(found.refined["full"][3])) < 1e-2


def test_a_row_does_not_see_its_company():
    model = linear(d=3, k=2)
    vae, x = crude(model), model.sample(3)
    plan = {"temperatures": 0, "samples": 70, "steps": 20}
    together, alone = inference_gaps(vae, {"x": x}, **plan), inference_gaps(vae, {"x": x[1:2]}, **plan)
    packed = inference_gaps(vae, {"x": x}, pack=64, **plan)
    for name in ("own", "full", "flow"):
        torch.testing.assert_close(together.refined[name][1:2], alone.refined[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.refined[name], packed.refined[name], rtol=0, atol=1e-6)


def test_positive_latents_draw_alone_and_are_mapped_to_the_reals():
    torch.manual_seed(0)
    vae = VAE(BayesNet({"z": Rate(None), "x | z": Bernoulli(MLP(1, [4], 5))}), BayesNet({"z | x": Rate(MLP(5, [], 2))}))
    x = {"x": torch.bernoulli(torch.full((2, 5), 0.5))}
    found = inference_gaps(vae, x, families=("full",), temperatures=0, samples=300, steps=150)
    z = torch.linspace(0, 30, 30_001)[1:].reshape(-1, 1, 1)
    with torch.no_grad():
        log_p = vae.p.log_prob({"z": z, **x})
    truth = (log_p["z"] + log_p["x"]).logsumexp(0) + math.log(1e-3)
    assert bool((found.amortization > 1).all())
    for name, bound in found.refined.items():
        error = found.refined_error[name]
        assert bool((error < 0.1).all())
        assert bool((truth - bound > -4 * error).all())
        assert bool((truth - bound < 0.3).all())  # one latent: little is lost


class Rate(nn.Module):
    """Gamma, from a net or with shape 2 and rate 1."""

    def __init__(self, net: nn.Module | None) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        if self.net is None:
            return td.Independent(td.Gamma(torch.full((1,), 2.0), torch.ones(1), validate_args=False), 1)
        shape, rate = nn.functional.softplus(self.net(*parents) + 1).chunk(2, -1)
        return td.Independent(td.Gamma(shape, rate, validate_args=False), 1)


class Affine(nn.Module):
    """A Gaussian as torch's transformed distribution, whose mean torch does not know."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> td.Distribution:
        loc, raw_scale = self.net(x).chunk(2, -1)
        base = td.Normal(torch.zeros_like(loc), 1.0)
        moved = td.AffineTransform(loc, nn.functional.softplus(raw_scale))
        return td.Independent(td.TransformedDistribution(base, [moved]), 1)


def test_a_posterior_without_a_mean():
    torch.manual_seed(0)
    found = inference_gaps(simple(Affine(MLP(5, [], 4))), X, families=(), temperatures=0, samples=100, steps=50)
    assert bool((found.amortization > 0).all())


def test_draws_at_the_edge_of_a_support_do_not_spoil_the_start():
    """A log-normal's draws underflow to 0, which is infinitely far on the reals."""
    torch.manual_seed(0)
    observed = {"x": torch.ones(1, 5)}
    p = BayesNet({"z": Rate(None), "x | z": Bernoulli(MLP(1, [4], 5))})
    own = gaps._Own(VAE(p, BayesNet({"z | x": Far(MLP(5, [], 1))})), observed)
    path = Path(own.vae, observed, {"z": torch.Size([1])}, "prior")
    noise = RowNoise([b"row"], "edge")
    assert bool(path.to_reals(own.draw(64, noise)).isinf().any())
    mean, spread = gaps._moments(own, path, noise)
    assert bool(mean.isfinite().all() & spread.isfinite().all() & (spread > 0).all())


class Far(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> td.Distribution:
        return td.Independent(td.LogNormal(self.net(x) - 500.0, 200.0, validate_args=False), 1)


def classes() -> VAE:
    torch.manual_seed(0)
    p = BayesNet({"y": Categorical(3), "z": StandardNormal(1), "x | y, z": Bernoulli(MLP(4, [], 5))})
    return VAE(p, BayesNet({"y | x": Categorical(3, MLP(5, [], 3)), "z | x, y": DiagonalNormal(MLP(8, [], 2))}))


def test_latent_classes_are_shifted_too():
    x = {"x": torch.bernoulli(torch.full((3, 5), 0.5))}
    found = inference_gaps(classes(), x, families=(), temperatures=0, samples=400, steps=150)
    assert bool((found.amortization > 0).all())
    error = torch.hypot(found.refined_error["own"], found.log_prob_error)
    assert bool((found.approximation > -4 * error).all())
    assert set(found.refined) == {"own"}


X = {"x": torch.ones(2, 5)}


def simple(q: nn.Module | None = None) -> VAE:
    p = BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(MLP(2, [], 5))})
    return VAE(p, BayesNet({"z | x": q or DiagonalNormal(MLP(5, [], 4))}))


class Pair(nn.Module):
    """A factor whose net returns two tensors, or is not called at all."""

    def __init__(self, net: nn.Module, called: bool = True) -> None:
        super().__init__()
        self.net, self.called = net, called

    def forward(self, x: Tensor) -> td.Distribution:
        loc, scale = self.net(x) if self.called else (x[..., :2], 1.0)
        return td.Independent(td.Normal(loc, scale), 1)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :2], 1 + x[..., 2:4]


class Bare(nn.Module):
    def forward(self, x: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(x[..., :2], 1.0), 1)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda: inference_gaps(simple(), X, steps=0), "`steps` must be at least 1; got 0"),
        (lambda: inference_gaps(simple(), X, draws=0), "`draws` must be at least 1"),
        (lambda: inference_gaps(simple(), X, samples=0), "`samples` must be at least 1"),
        (
            lambda: inference_gaps(simple(), X, temperatures=-1),
            "`temperatures` must be at least 1, or 0 for no annealing; got -1",
        ),
        (lambda: inference_gaps(simple(), X, families=("ful",)), "`families` holds 'ful'; it takes full, flow"),
        (lambda: inference_gaps(simple(), X | {"z": torch.ones(2, 2)}), "nothing is latent, and there is no gap"),
        (lambda: inference_gaps(simple(Bare()), X), "`z`, a Bare, has no attribute `net`"),
        (lambda: inference_gaps(simple(Pair(Halves())), X), "`net` of q's factor of `z` must return one.*got tuple"),
        (lambda: inference_gaps(simple(Pair(Halves(), False)), X), "must return one.*got no call of it"),
        (lambda: inference_gaps(classes(), X), r"`y` is latent and discrete, and `families`.*families=\(\)"),
        (lambda: inference_gaps(classes(), X, families=()), "`y` is latent .* `temperatures`.*temperatures=0"),
        (lambda: inference_gaps(VAE(simple().p, BayesNet({"z": LearnedNormal(2)})), X), "`z`, a LearnedNormal, has no"),
    ],
)
def test_what_is_refused(run, match):
    with pytest.raises(InputError, match=match):
        run()


def test_the_record_is_frozen():
    empty = torch.zeros(1)
    gaps = Gaps(
        log_prob=empty, log_prob_error=empty, source="annealing", elbo=empty - 3, elbo_error=empty,
        refined={"own": empty - 1}, refined_error={"own": empty}, samples=1, steps=1,
    )  # fmt: skip
    assert float(gaps.amortization) == 2
    assert float(gaps.approximation) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        gaps.steps = 2
