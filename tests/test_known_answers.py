"""Numbers that have a closed form: linear-Gaussian models, chains of them, and quadrature in one or two dimensions.

Where every conditional is Gaussian with an affine mean, a bound's integrand is quadratic in the noise, and its mean is
exact over the 2 D points +-sqrt(D) e_i, which have the noise's mean and covariance (`sigma_points`): such comparisons
allow rounding only. Monte Carlo comparisons allow four standard errors, told beside each.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import integrate, special, stats
from torch import Tensor, nn

import aevb
from aevb import (
    MLP,
    VAE,
    BayesNet,
    Bernoulli,
    Binomial,
    DiagonalNormal,
    FullNormal,
    Normal,
    StandardNormal,
    TrainConfig,
)
from aevb.bounds import Kl, terms
from gaussians import correlated, factorized, likelihood, raw, sigma_points

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-9


def exact_elbo(vae: VAE, values: dict[str, Tensor], dims: dict[str, int], kl: Kl = "auto") -> Tensor:
    """The ELBO's mean over q without Monte Carlo, `(N,)`, for Gaussians with affine means."""
    samples, noise = sigma_points(dims)
    found = terms(vae, values, samples, kl=kl, noise=noise)
    return found.weighted().expand(samples, len(next(iter(values.values())))).mean(0)


class Linear(NamedTuple):
    """x = W z + b + s eps; A1 to A5 of the closed forms."""

    w: Tensor
    b: Tensor
    s: float

    @property
    def k(self) -> int:
        return self.w.shape[1]

    @property
    def m(self) -> Tensor:
        return self.w.T @ self.w + self.s**2 * torch.eye(self.k)

    @property
    def gain(self) -> Tensor:
        """Posterior mean gain (x - b)."""
        return torch.linalg.solve(self.m, self.w.T)

    @property
    def cov(self) -> Tensor:
        """Of the posterior."""
        return self.s**2 * torch.linalg.inv(self.m)

    def log_prob(self, x: Tensor) -> Tensor:
        cov = self.w @ self.w.T + self.s**2 * torch.eye(len(self.b))
        return torch.as_tensor(stats.multivariate_normal(self.b.numpy(), cov.numpy()).logpdf(x.numpy()))

    def posterior(self, x: Tensor) -> td.MultivariateNormal:
        return td.MultivariateNormal((x - self.b) @ self.gain.T, self.cov)

    def p(self) -> BayesNet:
        return BayesNet({"z": StandardNormal(self.k), "x | z": likelihood(self.w, self.b, self.s)})

    def sample(self, rows: int) -> Tensor:
        return torch.randn(rows, self.k) @ self.w.T + self.b + self.s * torch.randn(rows, len(self.b))


def linear(d: int = 5, k: int = 3, s: float = 0.7, *, orthogonal: bool = False, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    w = torch.randn(d, k)
    if orthogonal:
        w = torch.linalg.qr(w).Q * (0.5 + torch.rand(k))
    return Linear(w, torch.randn(d), s)


def exact_pair(model: Linear) -> VAE:
    """With q(z | x) the posterior."""
    q = BayesNet({"z | x": correlated(model.gain, -model.gain @ model.b, model.cov)})
    return VAE(model.p(), q)


def test_posterior_as_q_makes_every_draw_exact():
    """A1: each log-weight is log p(x), so that elbo, iwae and log_marginal are, with no variance, for every K."""
    model = linear()
    vae, x = exact_pair(model), model.sample(20)
    log_p = model.log_prob(x)
    for samples in (1, 2, 7, 50):
        weights = aevb.log_weights(vae, {"x": x}, samples)
        assert weights.shape == (samples, 20)
        torch.testing.assert_close(weights, log_p.expand(samples, -1), rtol=0, atol=ROUNDING)
        torch.testing.assert_close(aevb.elbo(vae, {"x": x}, samples, kl="sampled"), log_p, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(aevb.iwae(vae, {"x": x}, samples), log_p, rtol=0, atol=ROUNDING)
        marginal = aevb.log_marginal(vae, {"x": x}, samples)
        torch.testing.assert_close(marginal.log_prob, log_p, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(marginal.elbo, log_p, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(marginal.ess, torch.full_like(log_p, samples), rtol=ROUNDING, atol=0)
        if samples > 1:  # one draw tells nothing of its spread; the square root of float64's rounding is 1e-8
            assert bool((marginal.std_error < 1e-6).all())


def test_closed_kl_leaves_the_mean_and_not_the_draws():
    """A1: the closed-form-KL elbo at the posterior has mean log p(x), 4 standard errors allowed, but scatters."""
    model = linear()
    vae, x = exact_pair(model), model.sample(20)
    draws = 20_000
    found = terms(vae, {"x": x}, draws, kl="auto")
    assert set(found.kl) == {"z"}
    integrand = found.weighted().detach()
    standard_error = integrand.std(0) / draws**0.5
    assert bool((standard_error > 1e-3).all())
    assert bool(((integrand.mean(0) - model.log_prob(x)).abs() < 4 * standard_error).all())
    by_call = torch.stack([aevb.elbo(vae, {"x": x}).detach() for _ in range(400)])
    pooled = by_call.mean() - model.log_prob(x).mean()
    assert abs(float(pooled)) < 4 * float(by_call.mean(1).std()) / 400**0.5
    torch.testing.assert_close(exact_elbo(vae, {"x": x}, {"z": model.k}), model.log_prob(x), rtol=0, atol=ROUNDING)


def best_diagonal(model: Linear) -> VAE:
    """A2: gain M^-1 W^T, variances s^2 / M_ii."""
    scale = model.s / model.m.diagonal().sqrt()
    return VAE(model.p(), BayesNet({"z | x": factorized(model.gain, -model.gain @ model.b, scale)}))


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_best_diagonal_encoder(kl, orthogonal):
    """A2: loses (sum log M_ii - log det M) / 2 a datum, nothing iff W's columns are orthogonal."""
    model = linear(orthogonal=orthogonal)
    vae, x = best_diagonal(model), model.sample(20)
    lost = float(0.5 * (model.m.diagonal().log().sum() - torch.logdet(model.m)))
    assert (lost < 1e-12) if orthogonal else (lost > 0.1)
    expected = model.log_prob(x) - lost
    torch.testing.assert_close(exact_elbo(vae, {"x": x}, {"z": model.k}, kl), expected, rtol=0, atol=ROUNDING)
    if not (orthogonal and kl == "sampled"):  # there q is the posterior, and nothing scatters
        integrand = terms(vae, {"x": x}, 20_000, kl=kl).weighted().detach()
        error = integrand.mean(0) - expected
        assert bool((error.abs() < 4 * integrand.std(0) / 20_000**0.5).all())


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_best_diagonal_encoder_is_the_best(kl):
    """A2: the ELBO's exact gradient in q's parameters is zero there."""
    model = linear()
    vae, x = best_diagonal(model), model.sample(20)
    parameters = list(vae.q.parameters())
    gradients = torch.autograd.grad(exact_elbo(vae, {"x": x}, {"z": model.k}, kl).mean(), parameters)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=ROUNDING)


def random_pair(model: Linear, seed: int = 1) -> VAE:
    """With a q that is far from the posterior, though wide enough for importance sampling."""
    torch.manual_seed(seed)
    shift = 0.1 * torch.randn(model.k, len(model.b))
    scale = 1.5 * model.cov.diagonal().sqrt()
    return VAE(model.p(), BayesNet({"z | x": factorized(model.gain + shift, -model.gain @ model.b + 0.2, scale)}))


def test_identity_of_the_elbo():
    """N11: log p(x) = ELBO + KL(q || posterior); and at each draw log w = log p(x) - log q(z | x) + log p(z | x)."""
    model = linear()
    vae, x = random_pair(model), model.sample(20)
    with torch.no_grad():
        found = terms(vae, {"x": x}, 50, kl="sampled")
        z, q = found.values["z"], vae.q.distribution("z", {"x": x})
        gap = q.log_prob(z) - model.posterior(x).log_prob(z)
        torch.testing.assert_close(found.weighted(), model.log_prob(x) - gap, rtol=0, atol=ROUNDING)
        divergence = td.kl_divergence(
            td.MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev)), model.posterior(x)
        )
        assert bool((divergence > 0.05).all())
        for kl in ("auto", "sampled"):
            bound = exact_elbo(vae, {"x": x}, {"z": model.k}, kl)
            torch.testing.assert_close(bound + divergence, model.log_prob(x), rtol=0, atol=ROUNDING)


def test_iwae_rises_to_the_marginal():
    """A5: the means over 4000 repetitions rise with K and stay below log p(x); both by their standard errors."""
    model, repetitions = linear(), 4000
    vae, x = random_pair(model), model.sample(1)
    log_p = float(model.log_prob(x))
    many = {"x": x.expand(repetitions, -1)}
    means, errors = [], []
    for samples in (1, 2, 4, 16, 64):
        bound = aevb.iwae(vae, many, samples).detach()
        means.append(float(bound.mean()))
        errors.append(float(bound.std()) / repetitions**0.5)
    for (low, a), (high, b) in itertools.pairwise(zip(means, errors, strict=True)):
        assert high - low > 4 * math.hypot(a, b)
    assert all(mean < log_p + 4 * error for mean, error in zip(means, errors, strict=True))
    assert means[0] < log_p - 4 * errors[0]
    torch.testing.assert_close(
        torch.tensor(means[0]), exact_elbo(vae, {"x": x}, {"z": model.k})[0].detach(), rtol=0, atol=4 * errors[0]
    )


class Maximum(NamedTuple):
    """Data with a stated eigengap, and the closed form of their best linear-Gaussian model (Tipping and Bishop)."""

    x: Tensor
    eigenvalues: Tensor  # of the covariance, falling
    vectors: Tensor  # (d, d), columns

    def log_prob(self, s2: float, active: int) -> float:
        """Mean log-likelihood of the best W with `active` columns, at noise s2."""
        kept, rest = self.eigenvalues[:active], self.eigenvalues[active:]
        d = len(self.eigenvalues)
        log_det = kept.log().sum() + len(rest) * math.log(s2)
        return float(-0.5 * (d * math.log(2 * math.pi) + log_det + active + rest.sum() / s2))


def spread(eigenvalues: tuple[float, ...], rows: int = 1000) -> Maximum:
    torch.manual_seed(0)
    d = len(eigenvalues)
    turn = torch.linalg.qr(torch.randn(d, d)).Q
    x = (torch.randn(rows, d) * torch.tensor(eigenvalues).sqrt()) @ turn.T + torch.randn(d)
    centred = x - x.mean(0)
    found, vectors = torch.linalg.eigh(centred.T @ centred / rows)
    return Maximum(x, found.flip(0), vectors.flip(1))


def train(data: Maximum, k: int, steps: int, s2: float | None = None) -> tuple[Linear, float]:
    """The trained model's parameters, and the mean log-likelihood that they have in closed form."""
    d = data.x.shape[1]
    conditional = Normal(MLP(k, [], d), d, "global")
    if s2 is not None:
        with torch.no_grad():
            conditional.raw_noise.fill_(raw(math.sqrt(s2)))
        conditional.raw_noise.requires_grad_(False)
    vae = VAE(
        BayesNet({"z": StandardNormal(k), "x | z": conditional}),
        BayesNet({"z | x": DiagonalNormal(MLP(d, [], 2 * k))}),
    )
    config = TrainConfig(
        steps=steps, batch_size=len(data.x), learning_rate=0.02, schedule="cosine", validation=0.0, log_every=steps
    )
    aevb.fit(vae, {"x": data.x}, config)
    net = conditional.net.last
    scale = float(nn.functional.softplus(conditional.raw_noise.detach()))
    model = Linear(net.weight.detach(), net.bias.detach(), scale)
    return model, float(model.log_prob(data.x).mean())


def test_trained_linear_model_reaches_maximum_likelihood():
    """A3: within 1e-3 nats a datum of the closed form, the principal angles below 1e-2, on an eigengap of 3 to 0.5."""
    data, k = spread((6.0, 3.0, 0.5, 0.4, 0.3, 0.2)), 2
    assert float(data.eigenvalues[k - 1] / data.eigenvalues[k]) > 4
    model, log_p = train(data, k, steps=2400)
    s2 = float(data.eigenvalues[k:].mean())
    best = data.log_prob(s2, k)
    assert best - 1e-3 < log_p <= best + ROUNDING
    cosines = torch.linalg.svdvals(torch.linalg.qr(model.w).Q.T @ data.vectors[:, :k])
    assert float(cosines.clamp(max=1).acos().max()) < 1e-2
    # Its best diagonal encoder loses nothing only where the columns are orthogonal.
    assert float(0.5 * (model.m.diagonal().log().sum() - torch.logdet(model.m))) < 1e-3


def test_dimensions_below_a_fixed_noise_collapse():
    """A3: at s^2 = 1, of 4 dimensions the two with l > s^2 stay, |w_i|^2 = l_i - s^2, and the others go.

    -(log c + l / c) / 2 falls by r^2 / 4 where c = |w|^2 + s^2 misses l by a share r: the 1e-3 nats allow r = 6 %.
    """
    data, k, s2 = spread((6.0, 3.0, 0.5, 0.4, 0.3, 0.2)), 4, 1.0
    stay = int((data.eigenvalues > s2).sum())
    assert stay == 2
    model, log_p = train(data, k, steps=1000, s2=s2)
    assert model.s == pytest.approx(1.0, abs=1e-12)
    best = data.log_prob(s2, stay)
    assert best - 1e-3 < log_p <= best + ROUNDING
    norms = model.w.square().sum(0).sort(descending=True).values
    torch.testing.assert_close(norms[:stay], data.eigenvalues[:stay] - s2, rtol=0.06, atol=0)
    assert bool((norms[stay:] < 0.06 * s2).all())


def decoder_log_prob(net: MLP, total: int, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Log p(x | z) of a binomial (or, total 1, a Bernoulli) with a tanh decoder, in numpy, at points `(*, dims)`."""
    hidden, last = net.layers[0], net.layers[2]
    inner = np.tanh(z @ hidden.weight.detach().numpy().T + hidden.bias.detach().numpy())
    logits = inner @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    mass = x * logits - total * np.logaddexp(0.0, logits) + np.log(special.comb(total, x))
    result: np.ndarray = mass.sum(-1)
    return result


def by_quadrature(net: MLP, total: int, x: np.ndarray, dims: int) -> float:
    """Log of the integral over z of p(z) p(x | z), over eight standard deviations of the prior."""

    def integrand(z: np.ndarray) -> np.ndarray:
        log_prior = -0.5 * np.square(z).sum(-1) - dims / 2 * math.log(2 * math.pi)
        result: np.ndarray = np.exp(decoder_log_prob(net, total, x, z) + log_prior)
        return result

    found = integrate.cubature(integrand, [-8.0] * dims, [8.0] * dims, rtol=1e-7)
    assert found.status == "converged"
    return math.log(found.estimate)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("total", [1, 6])
def test_log_marginal_meets_quadrature(total, dims):
    """A7: a nonlinear decoder; each row within 4 of its standard errors, as is their mean.

    Importance sampling of log p is biased by about -SE^2 / 2: it is far below the standard errors here. q has heavier
    tails than the posterior, so that the weights are bounded.
    """
    torch.manual_seed(10 * total + dims)
    d, rows = 4, (12 if dims == 1 else 3)
    net = MLP(dims, [5], d, "tanh")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    conditional = Bernoulli(net) if total == 1 else Binomial(net, total)
    p = BayesNet({"z": StandardNormal(dims), "x | z": conditional})
    q = factorized(0.1 * torch.randn(dims, d), 0.1 * torch.randn(dims), torch.full((dims,), 1.2))
    x = p.sample(rows)["x"]
    found = aevb.log_marginal(VAE(p, BayesNet({"z | x": q})), {"x": x}, samples=20_000)
    expected = torch.tensor([by_quadrature(net, total, row.numpy(), dims) for row in x])
    error = found.log_prob - expected
    assert bool((found.std_error < 0.05).all())
    assert bool((error.abs() < 4 * found.std_error + 1e-4).all())
    assert abs(float(error.mean())) < 4 * float(found.std_error.square().sum().sqrt()) / rows + 1e-4


class Gaussian(nn.Module):
    """Any conditional of a joint Gaussian: N(offset + sum gain_i parent_i, cov)."""

    def __init__(self, offset: Tensor, gains: list[Tensor], cov: Tensor) -> None:
        super().__init__()
        self.offset, self.gains, self.tril = offset, gains, torch.linalg.cholesky(cov)

    def forward(self, *parents: Tensor) -> td.Distribution:
        loc = self.offset
        for gain, parent in zip(self.gains, parents, strict=True):
            loc = loc + parent @ gain.T
        return td.MultivariateNormal(loc, scale_tril=self.tril.expand(*loc.shape, -1), validate_args=False)


class Chain(NamedTuple):
    """z2 -> z1 -> x, all Gaussian, with the joint's mean and covariance in blocks."""

    p: BayesNet
    mean: dict[str, Tensor]
    cov: dict[tuple[str, str], Tensor]

    def joined(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        mean = torch.cat([self.mean[name] for name in names])
        return mean, torch.cat([torch.cat([self.cov[a, b] for b in names], 1) for a in names])

    def given(self, node: str, parents: tuple[str, ...]) -> Gaussian:
        """The exact p(node | parents)."""
        mean, cov = self.joined(parents)
        across = torch.cat([self.cov[node, parent] for parent in parents], 1)
        gain = torch.linalg.solve(cov, across.T).T
        gains = list(gain.split([len(self.mean[parent]) for parent in parents], 1))
        return Gaussian(self.mean[node] - gain @ mean, gains, self.cov[node, node] - gain @ across.T)

    def log_prob(self, x: Tensor) -> Tensor:
        mean, cov = self.joined(("x",))
        return torch.as_tensor(stats.multivariate_normal(mean.numpy(), cov.numpy()).logpdf(x.numpy()))


DIMS = {"z2": 2, "z1": 3}


def chain() -> Chain:
    torch.manual_seed(0)
    k2, k1, d, t, s = DIMS["z2"], DIMS["z1"], 4, 0.6, 0.5
    a, b, c, e = torch.randn(k1, k2), torch.randn(d, k1), torch.randn(k1), torch.randn(d)
    p = BayesNet({"z2": StandardNormal(k2), "z1 | z2": likelihood(a, c, t), "x | z1": likelihood(b, e, s)})
    mean = {"z2": torch.zeros(k2), "z1": c, "x": b @ c + e}
    cov1 = a @ a.T + t**2 * torch.eye(k1)
    cov = {
        ("z2", "z2"): torch.eye(k2), ("z1", "z1"): cov1, ("x", "x"): b @ cov1 @ b.T + s**2 * torch.eye(d),
        ("z1", "z2"): a, ("x", "z1"): b @ cov1, ("x", "z2"): b @ a,
    }  # fmt: skip
    cov |= {(j, i): block.T for (i, j), block in cov.items() if i != j}
    return Chain(p, mean, cov)


WIRINGS = {"top-down": {"z2": ("x",), "z1": ("z2", "x")}, "bottom-up": {"z1": ("x",), "z2": ("z1",)}}
"""Parents in q. Bottom-up, the KL of z1 may not be closed: z2, its parent in p, is drawn from it in q."""
CLOSED = {"top-down": {"z2", "z1"}, "bottom-up": {"z2"}}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_exact_two_layer_q(wiring):
    """A10: sampled, every draw is log p(x); with KLs closed, their mean is; neither allows more than rounding."""
    model = chain()
    parents = WIRINGS[wiring]
    vae = VAE(model.p, BayesNet({f"{n} | {', '.join(pa)}": model.given(n, pa) for n, pa in parents.items()}))
    x = model.p.sample(20)["x"]
    log_p = model.log_prob(x)
    weights = aevb.log_weights(vae, {"x": x}, 30)
    torch.testing.assert_close(weights, log_p.expand(30, -1), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(aevb.log_marginal(vae, {"x": x}, 300).log_prob, log_p, rtol=0, atol=ROUNDING)
    assert set(terms(vae, {"x": x}).kl) == CLOSED[wiring]
    for kl in ("auto", "sampled"):
        torch.testing.assert_close(exact_elbo(vae, {"x": x}, DIMS, kl), log_p, rtol=0, atol=ROUNDING)
    # And by the public function: the mean over rows, 4 standard errors from repeated calls.
    calls = torch.stack([aevb.elbo(vae, {"x": x}, 20).detach().mean() for _ in range(200)])
    assert abs(float(calls.mean() - log_p.mean())) < 4 * float(calls.std()) / 200**0.5


@pytest.mark.parametrize("wiring", WIRINGS)
def test_both_forms_of_the_kl_have_one_mean_on_a_chain(wiring):
    """A q that is not exact: the paired difference of the two forms at the same draws, 4 of its standard errors."""
    model = chain()
    torch.manual_seed(1)
    sizes = DIMS | {"x": 4}
    factors = {}
    for node, parents in WIRINGS[wiring].items():
        width = sum(sizes[parent] for parent in parents)
        scale = 0.3 + torch.rand(DIMS[node])
        factors[f"{node} | {', '.join(parents)}"] = factorized(0.4 * torch.randn(len(scale), width), scale, scale)
    vae = VAE(model.p, BayesNet(factors))
    x = model.p.sample(5)["x"]
    draws = 40_000
    found = {}
    for kl in ("auto", "sampled"):
        torch.manual_seed(2)
        found[kl] = terms(vae, {"x": x}, draws, kl=kl).weighted().detach().expand(draws, 5)
    difference = found["auto"] - found["sampled"]
    assert bool((difference.std(0) > 1e-3).all())
    assert bool((difference.mean(0).abs() < 4 * difference.std(0) / draws**0.5).all())
    exact = [exact_elbo(vae, {"x": x}, DIMS, kl) for kl in ("auto", "sampled")]
    torch.testing.assert_close(*exact, rtol=1e-11, atol=ROUNDING)


NODES = {"a": 1, "b": 2, "c": 1}


def wired(order: tuple[str, ...], edges: dict[str, tuple[str, ...]], always: tuple[str, ...]) -> BayesNet:
    """Affine Gaussians over `order`, each node with the parents that `edges` names and those in `always`."""
    factors: dict[str, nn.Module] = {}
    for node in order:
        parents = (*edges[node], *always)
        dims, width = NODES[node], sum((NODES | {"x": 3})[parent] for parent in parents)
        scale = 0.4 + torch.rand(dims)
        made = factorized(0.5 * torch.randn(dims, width), torch.randn(dims), scale) if width else StandardNormal(dims)
        factors[f"{node} | {', '.join(parents)}" if parents else node] = made
    return BayesNet(factors)


def earlier(order: tuple[str, ...], picks: list[bool]) -> dict[str, tuple[str, ...]]:
    """Three nodes have three possible edges; each node's parents are among those before it."""
    first, second, third = order
    possible = [(first, second), (first, third), (second, third)]
    taken = [edge for edge, pick in zip(possible, picks, strict=True) if pick]
    return {node: tuple(parent for parent, child in taken if child == node) for node in order}


@pytest.mark.parametrize("q_order", list(itertools.permutations(NODES)), ids="".join)
def test_both_forms_of_the_kl_have_one_mean_on_any_wiring(q_order):
    """Every acyclic wiring of three latents in p against every one in q: trees, chains, colliders, either way up."""
    torch.manual_seed(3)
    x = torch.randn(2, 3)
    closed_somewhere = sampled_somewhere = False
    p_order = tuple(NODES)
    for p_picks, q_picks in itertools.product(itertools.product([False, True], repeat=3), repeat=2):
        p = wired(p_order, earlier(p_order, list(p_picks)), ())
        every = {f"{n} | {', '.join(p.parents[n])}" if p.parents[n] else n: p.conditional(n) for n in p.nodes}
        p = BayesNet(every | {"x | a, b, c": likelihood(torch.randn(3, 4), torch.randn(3), 0.8)})
        vae = VAE(p, wired(q_order, earlier(q_order, list(q_picks)), ("x",)))
        auto, sampled = (exact_elbo(vae, {"x": x}, NODES, kl) for kl in ("auto", "sampled"))
        # 1e-11 of values that reach hundreds of nats is rounding.
        torch.testing.assert_close(auto, sampled, rtol=1e-11, atol=ROUNDING)
        closed = terms(vae, {"x": x}).kl
        closed_somewhere |= bool(closed)
        sampled_somewhere |= len(closed) < len(NODES)
    assert closed_somewhere
    assert sampled_somewhere == (q_order != p_order)


class ByRow:
    """Noise that belongs to rows, and goes with them into any minibatch."""

    def __init__(self, eps: Tensor, rows: Tensor) -> None:
        self.eps, self.rows = eps, rows

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        return self.eps[:, self.rows]

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        raise AssertionError("only Gaussians are asked for here")


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("size", [1, 5, 12, 30])
def test_minibatch_gradients_are_unbiased(size, kl):
    """N6, N12: the mean over the minibatches of a partition, of value and of gradient, is the full data set's."""
    torch.manual_seed(4)
    rows, d, k, samples = 60, 4, 2, 3
    vae = VAE(
        BayesNet({"z": StandardNormal(k), "x | z": Bernoulli(MLP(k, [6], d))}),
        BayesNet({"z | x": FullNormal(MLP(d, [6], 2 * k + k * k), k)}),
    )
    x = (torch.rand(rows, d) < 0.4).to(torch.float64)
    eps = torch.randn(samples, rows, k)
    parameters = list(vae.parameters())

    def mean_bound(indices: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = terms(vae, {"x": x[indices]}, samples, kl=kl, noise=lambda node: ByRow(eps, indices))
        bound = found.weighted().mean()
        return bound.detach(), list(torch.autograd.grad(bound, parameters))

    value, full = mean_bound(torch.arange(rows))
    parts = [mean_bound(indices) for indices in torch.randperm(rows).split(size)]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), value, rtol=0, atol=1e-10)
    for i, gradient in enumerate(full):
        mean = torch.stack([part[1][i] for part in parts]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-10)
