"""Laws that every conditional obeys, looped over one table; scipy is the independent oracle.

A new conditional joins by one line in `CASES`, a new closed-form KL by one line in `FAMILIES` if its family is new.
Monte Carlo comparisons allow four standard errors, told beside each; all others allow float64's rounding.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import special, stats
from torch import Tensor, nn

from aevb import (
    MLP,
    BayesNet,
    Bernoulli,
    Binomial,
    Categorical,
    DiagonalNormal,
    FullNormal,
    InputError,
    LadderNormal,
    LearnedNormal,
    MixtureOfNormals,
    Normal,
    ProductNormal,
    StandardNormal,
    VampPrior,
    distributions,
)
from aevb.conditionals import (
    AutoregressiveBernoulli,
    BetaBinomial,
    DiscretizedLogistic,
    Mixed,
    NegativeBinomial,
    Poisson,
    Scaled,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from aevb.distributions import (
    CLOSED_KL,
    LogNormal,
    OneHot,
    check_factorizes,
    closed_kl,
    count_states,
    draw,
    log_prob,
    relaxed,
    rsample_and_log_prob,
    states,
    support_violation,
)

pytestmark = pytest.mark.usefixtures("double")

D, ROWS, FACTORS = 2, 3, 4
ROUNDING = 1e-10
LOC, SCALE = (3.0, -40.0), (0.5, 20.0)  # units of data that are not standardised


class Entries:
    """Independent entries, a scipy distribution with parameters `(D,)`."""

    def __init__(self, frozen: Any) -> None:
        self.frozen = frozen
        self.mean, self.cov = frozen.mean(), np.diag(frozen.var())

    def entries(self, x: np.ndarray) -> np.ndarray:
        return self.frozen.logpdf(x) if hasattr(self.frozen, "logpdf") else self.frozen.logpmf(x)

    def log(self, x: np.ndarray) -> np.ndarray:
        return self.entries(x).sum(-1)


class HeavyTailed(Entries):
    """As `Entries`, with tails that a Gaussian's ten standard deviations do not hold."""


class Positive(Entries):
    """As `Entries`, above 0, with logarithms that are Gaussian."""


class Joint:
    """Gaussian with any covariance."""

    def __init__(self, mean: np.ndarray, cov: np.ndarray) -> None:
        self.mean, self.cov = mean, cov

    def log(self, x: np.ndarray) -> np.ndarray:
        return stats.multivariate_normal(self.mean, self.cov).logpdf(x)


class Chain:
    """Two binary entries, the second given the first."""

    def __init__(self, first: float, second: tuple[float, float]) -> None:
        self.masses = np.array([[(1 - first) * (1 - second[0]), (1 - first) * second[0]],
                                [first * (1 - second[1]), first * second[1]]])  # fmt: skip
        self.mean = np.array([self.masses[1].sum(), self.masses[:, 1].sum()])
        both = self.masses[1, 1] - self.mean.prod()
        self.cov = np.where(np.eye(2, dtype=bool), self.mean * (1 - self.mean), both)

    def log(self, x: np.ndarray) -> np.ndarray:
        return np.log(self.masses[x[..., 0].astype(int), x[..., 1].astype(int)])


class ZeroInflated:
    """What scipy lacks: zero with probability pi, else a draw of `counts`."""

    def __init__(self, pi: np.ndarray, counts: Any) -> None:
        self.pi, self.counts = pi, counts

    def logpmf(self, x: np.ndarray) -> np.ndarray:
        return np.log(self.pi * (x == 0) + (1 - self.pi) * self.counts.pmf(x))

    def mean(self) -> np.ndarray:
        return (1 - self.pi) * self.counts.mean()

    def var(self) -> np.ndarray:  # E X^2 - (E X)^2
        return (1 - self.pi) * (self.counts.var() + self.counts.mean() ** 2) - self.mean() ** 2

    def sf(self, x: float) -> np.ndarray:
        return (1 - self.pi) * self.counts.sf(x)


class Levels:
    """Masses `(L, D)` of levels 0, ..., L - 1."""

    def __init__(self, masses: np.ndarray) -> None:
        self.masses, self.levels = masses, np.arange(len(masses))

    def logpmf(self, x: np.ndarray) -> np.ndarray:
        return np.log(np.take_along_axis(self.masses, x.astype(int).reshape(-1, D), 0).reshape(x.shape))

    def mean(self) -> np.ndarray:
        return self.levels @ self.masses

    def var(self) -> np.ndarray:
        return self.levels**2 @ self.masses - self.mean() ** 2


class Mixture:
    """Weighted Gaussians with diagonal covariances."""

    def __init__(self, weights: np.ndarray, means: np.ndarray, scales: np.ndarray) -> None:
        self.weights, self.means, self.scales = weights, means, scales
        self.mean = weights @ means
        spread = np.einsum("c,ci,cj->ij", weights, means - self.mean, means - self.mean)
        self.cov = spread + np.diag(weights @ scales**2)

    def log(self, x: np.ndarray) -> np.ndarray:
        parts = stats.norm(self.means, self.scales).logpdf(x[..., None, :]).sum(-1)
        return special.logsumexp(parts, b=self.weights, axis=-1)


Oracle = Entries | Joint | Chain | Mixture


def softplus(raw: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, raw)


def standard(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.norm(np.zeros(D), np.ones(D)))


def learned(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.norm(module.loc.detach().numpy(), softplus(module.raw_scale.detach().numpy())))


def mixture(module: nn.Module, out: np.ndarray) -> Oracle:
    weights = special.softmax(module.logits.detach().numpy())
    return Mixture(weights, module.loc.detach().numpy(), softplus(module.raw_scale.detach().numpy()))


def vamp(module: nn.Module, out: np.ndarray) -> Oracle:
    with torch.no_grad():
        inputs = module.pseudo_inputs if module.bounds is None else module.pseudo_inputs.clip(*module.bounds)
        parts = module.posterior.net(inputs).numpy()
    return Mixture(np.full(len(parts), 1 / len(parts)), parts[:, :D], softplus(parts[:, D:]))


def ladder(module: nn.Module, out: np.ndarray) -> Oracle:
    """Two Gaussians multiplied: N(out) and the prior N(0, I)."""
    precision = softplus(out[D:]) ** -2.0
    return Entries(stats.norm(out[:D] * precision / (precision + 1), (precision + 1) ** -0.5))


def diagonal(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.norm(out[:D], softplus(out[D:])))


def full(module: nn.Module, out: np.ndarray) -> Oracle:
    factor = np.diag(softplus(out[D : 2 * D]))
    for i in range(D):
        for j in range(i):
            factor[i, j] = out[2 * D + i * D + j]
    return Joint(out[:D], factor @ factor.T)


def product(module: nn.Module, out: np.ndarray) -> Oracle:
    """Bayesian regression of t on w with unit noise; its square root by solving for the precision's columns."""
    w, t, shift, raw = np.split(out, np.cumsum([FACTORS * D, FACTORS, D]))
    w = w.reshape(FACTORS, D)
    cov = np.linalg.inv(np.eye(D) + w.T @ w)
    factor = np.linalg.cholesky(cov)
    scaled = factor * softplus(raw + np.log(np.e - 1))
    return Joint(cov @ w.T @ t + factor @ shift, scaled @ scaled.T)


def normal(module: nn.Module, out: np.ndarray) -> Oracle:
    raw = out[D:] if module.noise == "datum" else module.raw_noise.detach().numpy() * np.ones(D)
    sigma = softplus(raw) + (0.0 if module.floor is None else module.floor.numpy())
    return Entries(stats.norm(module.loc.numpy() + module.scale.numpy() * out[:D], module.scale.numpy() * sigma))


def bernoulli(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.bernoulli(1 / (1 + np.exp(-out))))


def binomial(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.binom(module.total_count, 1 / (1 + np.exp(-out))))


def betabinomial(module: nn.Module, out: np.ndarray) -> Oracle:
    a, b = np.exp(out[D:]) / (1 + np.exp(-out[:D])), np.exp(out[D:]) / (1 + np.exp(out[:D]))
    return Entries(stats.betabinom(module.total_count, a, b))


def student(module: nn.Module, out: np.ndarray) -> Oracle:
    gauss = normal(module, out).frozen
    df = 1 + softplus(module.raw_df.detach().numpy())
    return HeavyTailed(stats.t(df, gauss.mean(), gauss.std()))


def poisson(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.poisson(np.exp(out)))


def negative_binomial(module: nn.Module, out: np.ndarray) -> Oracle:
    mu = np.exp(out[:D])
    theta = np.exp(out[D : 2 * D] if module.dispersion == "datum" else module.log_theta.detach().numpy() * np.ones(D))
    return Entries(stats.nbinom(theta, theta / (theta + mu)))


def zero_inflated(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(ZeroInflated(1 / (1 + np.exp(-out[-D:])), negative_binomial(module, out).frozen))


def levels(module: nn.Module, out: np.ndarray) -> Oracle:
    parts = out.reshape(-1, D, module.components)
    half = 0.5 * (module.levels - 1)
    rounded = stats.logistic(half * (1 + parts[0]), half * softplus(parts[1]) + 0.005)
    ends = np.array([-np.inf, *(np.arange(module.levels - 1) + 0.5), np.inf])
    masses = np.diff(rounded.cdf(ends[:, None, None]), axis=0)  # (L, D, M)
    weights = np.exp(parts[2]) if module.components > 1 else np.ones((D, 1))
    return Entries(Levels((masses * weights).sum(-1) / weights.sum(-1)))


def chain(module: nn.Module, out: np.ndarray) -> Oracle:
    """D = 2: the first entry's logit is a bias, the hidden units see the first entry, the second entry sees them."""
    inner, outer = (layer.weight.detach().numpy() for layer in module.layers)
    h = out[:-D, None] + inner[:, :1] * np.array([[0.0, 1.0]])
    second = out[-1] + outer[1] @ (h / (1 + np.exp(-h)))
    return Chain(1 / (1 + np.exp(-out[-2])), tuple(1 / (1 + np.exp(-second))))


def scaled(module: nn.Module, out: np.ndarray) -> Oracle:
    loc, scale, floor = (each.numpy() for each in (module.loc, module.scale, module.resolution))
    mean, sigma = loc + scale * out[:D], floor + scale * softplus(out[D:])
    return Positive(stats.lognorm(sigma, scale=np.exp(mean))) if module.log else Entries(stats.norm(mean, sigma))


def mixed_real(module: nn.Module, out: np.ndarray) -> Oracle:
    """Continuous or positive columns: Gaussian, or Gaussian logarithms."""
    loc, scale, floor = (each.numpy() for each in (module.loc, module.scale, module.resolution))
    mean, sigma = loc + scale * out, floor + scale * softplus(module.raw_noise.detach().numpy())
    if module.kinds[0] == "continuous":
        return Entries(stats.norm(mean, sigma))
    return Positive(stats.lognorm(sigma, scale=np.exp(mean)))


def mixed_codes(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(Levels(special.softmax(out.reshape(D, -1), -1).T))


class Shifted(Levels):
    """Levels from another number than 0."""

    def __init__(self, masses: np.ndarray, low: int) -> None:
        super().__init__(masses)
        self.levels, self.low = self.levels + low, low

    def logpmf(self, x: np.ndarray) -> np.ndarray:
        return super().logpmf(x - self.low)


def mixed_ordinals(module: nn.Module, out: np.ndarray) -> Oracle:
    """From -2 to 5: location and scale of each column stand side by side."""
    loc, raw = out.reshape(D, 2).T
    rounded = stats.logistic(3.5 * (1 + loc), 3.5 * softplus(raw) + 0.005)
    mass = np.diff(rounded.cdf(np.array([-np.inf, *(np.arange(7) + 0.5), np.inf])[:, None]), axis=0)
    mass = mass * np.exp(module.heap_0.detach().numpy().T)
    return Entries(Shifted(mass / mass.sum(0), -2))


def mixed_counts(module: nn.Module, out: np.ndarray) -> Oracle:
    """Mean and chance of zero of each column stand side by side."""
    theta = np.exp(module.log_theta.detach().numpy())
    log_mean, zero = out.reshape(D, 2).T
    return Entries(ZeroInflated(1 / (1 + np.exp(-zero)), stats.nbinom(theta, theta / (theta + np.exp(log_mean)))))


def mixed(*kinds: str, **units: Any) -> Mixed:
    return Mixed(net(Mixed.width(kinds)), kinds, **units)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    parents: tuple[int, ...]  # widths
    oracle: Callable[[nn.Module, np.ndarray], Oracle]  # from the net's output in one row
    states: tuple[int, ...] = ()  # of an entry, where it is discrete: all, or all but 1e-12 of the mass
    bad: tuple[float, ...] = ()  # values outside the support


def net(outputs: int, inputs: int = 3) -> MLP:
    return MLP(inputs, [4], outputs, "tanh")


COUNTS = (-1.0, 2.5)  # no counts

CASES = {
    "StandardNormal": Case(lambda: StandardNormal(D), (), standard),
    "LearnedNormal": Case(lambda: LearnedNormal(D, 0.3), (), learned),
    "MixtureOfNormals": Case(lambda: MixtureOfNormals(D, 4), (), mixture),
    "VampPrior": Case(lambda: VampPrior(DiagonalNormal(net(2 * D)), torch.randn(5, 3)), (), vamp),
    "VampPrior, bounds": Case(lambda: VampPrior(DiagonalNormal(net(2 * D)), torch.randn(5, 3), (0, 1)), (), vamp),
    "LadderNormal": Case(lambda: LadderNormal(net(2 * D), StandardNormal(D)), (3,), ladder),
    "DiagonalNormal": Case(lambda: DiagonalNormal(net(2 * D)), (3,), diagonal),
    "DiagonalNormal, two parents": Case(lambda: DiagonalNormal(net(2 * D)), (2, 1), diagonal),
    "FullNormal": Case(lambda: FullNormal(net(2 * D + D * D), D), (3,), full),
    "ProductNormal": Case(lambda: ProductNormal(net(FACTORS * (D + 1) + 2 * D), D, FACTORS), (3,), product),
    "Normal, global": Case(lambda: Normal(net(D), D, "global"), (3,), normal),
    "Normal, dimension": Case(lambda: Normal(net(D), D, "dimension"), (3,), normal),
    "Normal, datum": Case(lambda: Normal(net(2 * D), D, "datum"), (3,), normal),
    "Normal, global, units": Case(lambda: Normal(net(D), D, "global", *units()), (3,), normal),
    "Normal, dimension, units": Case(lambda: Normal(net(D), D, "dimension", *units()), (3,), normal),
    "Normal, datum, units": Case(lambda: Normal(net(2 * D), D, "datum", *units()), (3,), normal),
    "Bernoulli": Case(lambda: Bernoulli(net(D)), (3,), bernoulli, (0, 1), (0.5, -1.0, 2.0)),
    "Binomial": Case(lambda: Binomial(net(D), 5), (3,), binomial, tuple(range(6)), (6.0, -1.0, 2.5)),
    "BetaBinomial": Case(lambda: BetaBinomial(net(2 * D), 5), (3,), betabinomial, tuple(range(6)), (6.0, -1.0, 2.5)),
    "Normal, floor": Case(lambda: Normal(net(D), D, "dimension", *units(), floor=0.3), (3,), normal),
    "StudentT, datum, floor": Case(lambda: StudentT(net(2 * D), D, "datum", floor=0.3), (3,), student),
    "StudentT, global, units": Case(lambda: StudentT(net(D), D, "global", *units()), (3,), student),
    "StudentT, dimension": Case(lambda: StudentT(net(D), D), (3,), student),
    "StudentT, datum, units": Case(lambda: StudentT(net(2 * D), D, "datum", *units()), (3,), student),
    "Poisson": Case(lambda: Poisson(net(D)), (3,), poisson, tuple(range(160)), COUNTS),
    "NegativeBinomial, global": Case(
        lambda: NegativeBinomial(net(D), D, "global"), (3,), negative_binomial, tuple(range(500)), COUNTS
    ),
    "NegativeBinomial, dimension": Case(
        lambda: NegativeBinomial(net(D), D), (3,), negative_binomial, tuple(range(500)), COUNTS
    ),
    "NegativeBinomial, datum": Case(
        lambda: NegativeBinomial(net(2 * D), D, "datum"), (3,), negative_binomial, tuple(range(500)), COUNTS
    ),
    "ZeroInflatedNegativeBinomial, dimension": Case(
        lambda: ZeroInflatedNegativeBinomial(net(2 * D), D), (3,), zero_inflated, tuple(range(500)), COUNTS
    ),
    "ZeroInflatedNegativeBinomial, datum": Case(
        lambda: ZeroInflatedNegativeBinomial(net(3 * D), D, "datum"), (3,), zero_inflated, tuple(range(500)), COUNTS
    ),
    "DiscretizedLogistic": Case(
        lambda: DiscretizedLogistic(net(2 * D), 8), (3,), levels, tuple(range(8)), (8.0, -1.0, 2.5)
    ),
    "DiscretizedLogistic, two levels": Case(
        lambda: DiscretizedLogistic(net(2 * D), 2), (3,), levels, (0, 1), (2.0, -1.0, 0.5)
    ),
    "DiscretizedLogistic, mixture": Case(
        lambda: DiscretizedLogistic(net(3 * 4 * D), 256, 4), (3,), levels, tuple(range(256)), (256.0, -1.0, 2.5)
    ),
    "Mixed, binary": Case(lambda: mixed("binary", "binary"), (3,), bernoulli, (0, 1), (0.5, -1.0, 2.0)),
    "Mixed, categories": Case(
        lambda: mixed("categorical:4", "categorical:4"), (3,), mixed_codes, tuple(range(4)), (0.5, -1.0, 4.0)
    ),
    "Mixed, ordinals": Case(
        lambda: mixed("ordinal:-2:5", "ordinal:-2:5", heaps={0: torch.randn(8), 1: torch.randn(8)}),
        (3,),
        mixed_ordinals,
        tuple(range(-2, 6)),
        (6.0, -3.0, 2.5),
    ),
    "Mixed, counts": Case(lambda: mixed("count", "count"), (3,), mixed_counts, tuple(range(500)), COUNTS),
    "Mixed, continuous, units": Case(
        lambda: mixed("continuous", "continuous", loc=units()[0], scale=units()[1], resolution=units()[1] / 9),
        (3,),
        mixed_real,
    ),
    "Mixed, positive, units": Case(
        lambda: mixed("positive", "positive", loc=units()[0] / 9, scale=units()[1] ** 0.25 / 4),
        (3,),
        mixed_real,
        bad=(0.0, -1.0),
    ),
    "Scaled": Case(lambda: Scaled(DiagonalNormal(net(2 * D)), *units(), units()[1] / 9), (3,), scaled),
    "Scaled, log": Case(
        lambda: Scaled(DiagonalNormal(net(2 * D)), units()[0] / 9, units()[1] ** 0.25 / 4, log=True),
        (3,),
        scaled,
        bad=(0.0, -1.0),
    ),
    "AutoregressiveBernoulli": Case(
        lambda: AutoregressiveBernoulli(net(3 + D), D, [3]), (3,), chain, (0, 1), (0.5, -1.0, 2.0)
    ),
}
CONTINUOUS = [name for name, case in CASES.items() if not case.states]
DRAWN = [
    name for name in CONTINUOUS if CASES[name].oracle not in (mixture, vamp, mixed_real)
]  # with a reparameterization
DISCRETE = [name for name, case in CASES.items() if case.states]
GAUSSIAN = [name for name in DRAWN if CASES[name].oracle is not student]  # drawn from standard normals
FACTORIZED = [name for name, case in CASES.items() if case.oracle not in (full, product, chain, mixture, vamp)]


def units() -> tuple[Tensor, Tensor]:
    return torch.tensor(LOC), torch.tensor(SCALE)


class Built(NamedTuple):
    module: nn.Module
    parents: list[Tensor]  # (ROWS, D_i) each
    d: td.Distribution
    oracles: list[Oracle]  # one a row


def build(name: str, seed: int = 0) -> Built:
    """The conditional with all its parameters away from where they start, at random parents."""
    torch.manual_seed(seed)
    case = CASES[name]
    module = case.make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.6 * torch.randn_like(parameter))
    parents = [torch.randn(ROWS, width) for width in case.parents]
    with torch.no_grad():
        told = getattr(module, "inner", module)
        out = told.net(*parents).numpy() if hasattr(told, "net") else np.empty((ROWS, 0))
    return Built(module, parents, module(*parents), [case.oracle(module, row) for row in out])


def values_of(built: Built, draws: int) -> Tensor:
    """Draws `(draws, ROWS, D)`, whether they can be differentiated or not."""
    return built.d.expand(torch.Size([draws, ROWS])).sample()


@pytest.mark.parametrize("name", CASES)
def test_log_density_is_that_of_scipy(name):
    built = build(name)
    assert built.d.event_shape == (D,)
    x = values_of(built, 50)
    ours = log_prob(built.d, x).detach().numpy()
    assert ours.shape == (50, ROWS)
    theirs = np.stack([oracle.log(x[:, n].numpy()) for n, oracle in enumerate(built.oracles)], 1)
    np.testing.assert_allclose(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", DRAWN)
def test_density_of_the_draw(name):
    """The pair (z, log q) that a draw returns is a point and the density there."""
    built = build(name)
    z, log_q = rsample_and_log_prob(built.d, torch.Size([7, ROWS]))
    assert z.shape == (7, ROWS, D)
    torch.testing.assert_close(log_q, built.d.log_prob(z), rtol=ROUNDING, atol=ROUNDING)
    theirs = np.stack([oracle.log(z[:, n].detach().numpy()) for n, oracle in enumerate(built.oracles)], 1)
    np.testing.assert_allclose(log_q.detach().numpy(), theirs, rtol=ROUNDING, atol=ROUNDING)


class Given:
    """Noise that was drawn beforehand."""

    def __init__(self, eps: Tensor) -> None:
        self.eps = eps

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        assert shape == self.eps.shape
        assert like.dtype == self.eps.dtype
        return self.eps

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        raise AssertionError("only Gaussians are asked for here")


@pytest.mark.parametrize("name", GAUSSIAN)
def test_change_of_variables(name):
    """Log q(z) = log p(eps) - log |det dz/deps|, with the Jacobian from autograd."""
    built = build(name)
    for n in range(ROWS):
        eps = torch.randn(1, D)
        d = built.module(*(parent[n : n + 1] for parent in built.parents))
        _, log_q = rsample_and_log_prob(d, torch.Size([1]), Given(eps))
        jacobian = torch.autograd.functional.jacobian(
            lambda e, d=d: draw(d, torch.Size([1]), Given(e.unsqueeze(0)))[0], eps[0]
        )
        log_p = stats.norm.logpdf(eps.numpy()).sum()
        expected = log_p - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_q[0], expected, rtol=ROUNDING, atol=ROUNDING)


def grid(oracle: Oracle, points: int = 400) -> tuple[Tensor, Tensor]:
    """Points `(points^2, 2)` and the area each stands for, `(points^2,)`.

    The trapezoidal rule converges faster than any power on what is smooth and vanishes at the ends. A Gaussian does at
    ten standard deviations. A power of x does after x = sinh(u), as a power of e^-|u|: with 4 degrees of freedom e^-40
    at u = 10.
    """
    sd = np.sqrt(np.diag(oracle.cov))
    if isinstance(oracle, Positive):  # x = exp(m + s u), of which dx = s x du
        s, m = oracle.frozen.args[0], np.log(oracle.frozen.kwds["scale"])
        u = np.linspace(-10.0, 10.0, points)
        spots = np.exp(np.stack(np.meshgrid(*(m[j] + s[j] * u for j in range(D)), indexing="ij"), -1).reshape(-1, D))
        return torch.as_tensor(spots), torch.as_tensor((spots * s * (u[1] - u[0])).prod(-1))
    u = np.linspace(-10.0, 10.0, points)
    x, dx = (np.sinh(u), np.cosh(u)) if isinstance(oracle, HeavyTailed) else (u, np.ones(points))
    axes = [m + s * x for m, s in zip(oracle.mean, sd, strict=True)]
    lengths = [s * dx * (u[1] - u[0]) for s in sd]
    spots, sides = (np.stack(np.meshgrid(*each, indexing="ij"), -1).reshape(-1, D) for each in (axes, lengths))
    return torch.as_tensor(spots), torch.as_tensor(sides.prod(-1))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name):
    built = build(name)
    for n in range(ROWS):
        points, area = grid(built.oracles[n])
        d = built.module(*(parent[n] for parent in built.parents))
        total = float((log_prob(d, points).detach().exp() * area).sum())
        assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", DISCRETE)
def test_masses_sum_to_one(name):
    built = build(name)
    states = torch.tensor(list(itertools.product(CASES[name].states, repeat=D)), dtype=torch.float64)
    for oracle in built.oracles:
        if isinstance(oracle, Entries) and hasattr(oracle.frozen, "sf"):
            assert oracle.frozen.sf(CASES[name].states[-1]).max() < 1e-12
    total = log_prob(built.d, states.unsqueeze(1)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(ROWS), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", FACTORIZED)
@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=D)))
def test_missing_entries_are_integrated_out(name, mask):
    """Log p(x, known) is the log-density of the entries that are known; NaN reaches neither value nor gradient."""
    built = build(name)
    x = values_of(built, 1)[0]
    known = torch.tensor(mask).expand(ROWS, D)
    holed = torch.where(known, x, torch.nan)
    found = log_prob(built.d, holed, known)
    expected = [oracle.entries(x[n].numpy())[list(mask)].sum() for n, oracle in enumerate(built.oracles)]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=ROUNDING, atol=ROUNDING)

    parameters = list(built.module.parameters())
    if parameters:
        grads = torch.autograd.grad(found.sum(), parameters, retain_graph=True)
        sub = (built.d.base_dist.log_prob(x) * known).sum()  # x has no hole here
        wanted = torch.autograd.grad(sub, parameters)
        for grad, want in zip(grads, wanted, strict=True):
            assert bool(grad.isfinite().all())
            torch.testing.assert_close(grad, want, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", [name for name in CASES if name not in FACTORIZED])
def test_what_does_not_factorize_takes_whole_rows_only(name):
    built = build(name)
    with pytest.raises(InputError, match="factorize"):
        check_factorizes(built.d, torch.tensor([[True, True], [True, False], [True, True]]))
    known = torch.tensor([[True, True], [False, False], [True, True]])
    x = values_of(built, 1)[0]
    found = log_prob(built.d, torch.where(known, x, torch.nan), known)
    torch.testing.assert_close(found, built.d.log_prob(x) * known[:, 0], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.parents])
def test_values_broadcast_under_leading_axes(name):
    """Values `(N, D)` under parameters `(E, K, N, D)` are measured under each."""
    built = build(name)
    x = values_of(built, 1)[0]
    parents = [torch.randn(2, 4, ROWS, width) for width in CASES[name].parents]
    found = log_prob(built.module(*parents), x)
    assert found.shape == (2, 4, ROWS)
    for e, k in itertools.product(range(2), range(4)):
        alone = log_prob(built.module(*(parent[e, k] for parent in parents)), x)
        torch.testing.assert_close(found[e, k], alone, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", FACTORIZED)
def test_mean_and_variance_are_those_of_scipy(name):
    built = build(name)
    mean, variance = (each.expand(ROWS, D).detach().numpy() for each in (built.d.mean, built.d.variance))
    np.testing.assert_allclose(mean, [oracle.mean for oracle in built.oracles], rtol=ROUNDING, atol=ROUNDING)
    expected = [np.diag(oracle.cov) for oracle in built.oracles]
    np.testing.assert_allclose(variance, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_at_large_logits(dtype):
    """To the rounding of the larger term, in value and gradient; also where torch's softplus is cut off."""
    size = torch.tensor([0.0, 1e-4, 1.0, 19.9, 20.1, 30.0, 39.9, 40.1, 90.0, 800.0, 1e5], dtype=dtype)
    logits = torch.cat([size, -size]).requires_grad_()
    for x in (0.0, 1.0):
        found = distributions.Bernoulli(logits=logits).log_prob(torch.full_like(logits, x))
        wide = logits.detach().numpy().astype(np.longdouble)
        expected = -np.logaddexp(0, (1 - 2 * np.longdouble(x)) * wide)
        eps = torch.finfo(dtype).eps
        assert (np.abs(found.detach().numpy() - expected) <= 2 * eps * np.maximum(np.abs(wide), 1)).all()
        (slope,) = torch.autograd.grad(found.sum(), logits)
        torch.testing.assert_close(slope, x - logits.detach().sigmoid(), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dims", [1, 7, 12, 784])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_by_rows_is_the_sum_over_entries(dims, dtype):
    """Also at logits whose exponentials overflow, with axes in front of either; a net's NaN stays one."""
    logits = torch.randn(3, 1, dims, dtype=dtype) * torch.tensor([0.1, 5.0, 1e3], dtype=dtype).reshape(3, 1, 1)
    x = (torch.rand(2, dims) < 0.5).to(dtype)
    d = td.Independent(distributions.Bernoulli(logits=logits, validate_args=False), 1)
    with torch.no_grad():
        found = log_prob(d, x)
        expected = td.Independent(distributions.Bernoulli(logits=logits.double()), 1).log_prob(x.double())
        # A rounding for each entry, of a factor in [1, 2] and of a sum of terms as large as the logits.
        bound = 4 * torch.finfo(dtype).eps * (dims + logits.double().abs().sum(-1))
        assert ((found - expected).abs() <= bound).all()
        broken = distributions.Bernoulli(logits=logits * torch.nan, validate_args=False)
        assert log_prob(td.Independent(broken, 1, validate_args=False), x).isnan().all()


def test_missing_entries_with_draws_in_front():
    """Values `(N, D)` with holes under parameters `(K, N, D)`."""
    built = build("Bernoulli")
    logits = torch.randn(5, ROWS, D)
    d = td.Independent(distributions.Bernoulli(logits=logits), 1)
    x = values_of(built, 1)[0]
    known = torch.tensor([[True, False], [False, False], [True, True]])
    found = log_prob(d, torch.where(known, x, torch.nan), known)
    expected = (-torch.nn.functional.softplus(torch.where(x > 0, -logits, logits)) * known).sum(-1)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", CASES)
def test_moments_of_the_draws(name):
    """Mean and covariance of ancestral draws lie within 4 standard errors, those of the averaged products."""
    draws = 100_000
    built = build(name)
    names = [f"a{i}" for i in range(len(built.parents))]
    given = {key: parent[:1].expand(draws, -1) for key, parent in zip(names, built.parents, strict=True)}
    network = BayesNet({f"x | {', '.join(names)}" if names else "x": built.module})
    x = network.sample(draws, given)["x"].numpy()
    oracle = built.oracles[0]
    centred = x - oracle.mean
    assert np.all(np.abs(centred.mean(0)) < 4 * np.sqrt(np.diag(oracle.cov) / draws))
    products = centred[:, :, None] * centred[:, None, :]
    standard_error = products.std(0) / np.sqrt(draws)
    assert np.all(np.abs(products.mean(0) - oracle.cov) < 4 * standard_error)


@pytest.mark.parametrize("name", DRAWN)
def test_every_draw_of_every_datum_is_its_own(name):
    """Also where the parameters have fewer axes than (K, N), as a root's have."""
    built = build(name)
    z = draw(built.d, torch.Size([11, ROWS])).detach()
    for entry in range(D):
        assert z[..., entry].unique().numel() == 11 * ROWS


@pytest.mark.parametrize("name", CASES)
def test_single_precision_agrees_with_double(name):
    """A few layers and a density are some 80 roundings; each costs half a unit in float32's last place, 6e-8.

    What a rounding of the location does to the log-density is scaled by the units of the data, in which x is measured
    here too, so that the bound holds for all of them.
    """
    built = build(name)
    x = values_of(built, 4)
    wide = log_prob(built.d, x)
    narrow = log_prob(built.module.float()(*(parent.float() for parent in built.parents)), x.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=80 * 6e-8, atol=80 * 6e-8)


@pytest.mark.parametrize("name", CASES)
def test_support_violation(name):
    built = build(name)
    x = values_of(built, 1)[0]
    first = built.module(*(parent[:1] for parent in built.parents))  # the support does not depend on the row
    assert support_violation(first, x) is None
    x[0, 1] = torch.nan
    assert support_violation(first, x) is None
    for bad in CASES[name].bad:
        spoilt = x.clone()
        spoilt[2, 1] = bad
        assert support_violation(first, spoilt) == (2, 1)
        spoilt[1, 0] = bad
        assert support_violation(first, spoilt) == (1, 0)


def test_a_family_of_ones_own_keeps_its_own_draws():
    """A subclass of a Gaussian that draws otherwise (here |z|) is not drawn as a Gaussian."""

    class HalfNormal(td.Normal):
        def rsample(self, sample_shape=torch.Size()):  # noqa: B008
            return super().rsample(sample_shape).abs()

        def log_prob(self, value):
            return super().log_prob(value) + np.log(2.0)

    torch.manual_seed(0)
    d = td.Independent(HalfNormal(torch.zeros(D), torch.ones(D)), 1)
    z, log_q = rsample_and_log_prob(d, torch.Size([20]))
    assert bool((z >= 0).all())
    torch.testing.assert_close(log_q, d.log_prob(z), rtol=ROUNDING, atol=ROUNDING)


def factorized_normal() -> td.Distribution:
    return td.Independent(td.Normal(torch.randn(ROWS, D), 0.3 + torch.rand(ROWS, D)), 1)


def full_normal() -> td.Distribution:
    factor = torch.randn(ROWS, D, D).tril(-1) + torch.diag_embed(0.3 + torch.rand(ROWS, D))
    return td.MultivariateNormal(torch.randn(ROWS, D), scale_tril=factor)


def binary(family: type[td.Bernoulli] = distributions.Bernoulli) -> td.Distribution:
    return td.Independent(family(logits=torch.randn(ROWS, D)), 1)


def log_normal() -> td.Distribution:
    return td.Independent(LogNormal(torch.randn(ROWS, D), 0.3 + torch.rand(ROWS, D)), 1)


FAMILIES: dict[type, Callable[[], td.Distribution]] = {
    td.Normal: factorized_normal,
    LogNormal: log_normal,
    td.MultivariateNormal: full_normal,
    OneHot: lambda: OneHot(torch.randn(ROWS, D)),
    distributions.Bernoulli: binary,
    td.Bernoulli: functools.partial(binary, td.Bernoulli),
}
PAIRS = [pytest.param(pair, id=f"{pair[0].__name__}, {pair[1].__name__}") for pair in CLOSED_KL]


def as_torch(d: td.Distribution) -> td.Distribution:
    """What torch has a KL for, whichever pair it is."""
    if isinstance(d, OneHot):
        return td.Categorical(logits=d.logits)
    if not isinstance(d, td.MultivariateNormal) and isinstance(d.base_dist, LogNormal):
        d = td.Independent(d.base_dist.log, 1)  # a KL does not change with the units
    if isinstance(d, td.MultivariateNormal) or not isinstance(d.base_dist, td.Normal):
        return d
    return td.MultivariateNormal(d.mean, scale_tril=torch.diag_embed(d.stddev))


@pytest.mark.parametrize("pair", PAIRS)
def test_closed_kl(pair):
    """Against Monte Carlo within 4 of its standard errors, torch's own form to rounding, and its own first law."""
    torch.manual_seed(1)
    draws = 100_000
    q, p = FAMILIES[pair[0]](), FAMILIES[pair[1]]()
    groups = closed_kl(q, p)
    assert groups.ndim == 2
    assert groups.shape[0] == ROWS
    kl = groups.sum(-1)

    z = q.expand(torch.Size([draws, ROWS])).sample()
    ratio = q.log_prob(z) - p.log_prob(z)
    assert bool(((ratio.mean(0) - kl).abs() < 4 * ratio.std(0) / draws**0.5).all())

    theirs = td.kl_divergence(as_torch(q), as_torch(p))
    torch.testing.assert_close(kl, theirs, rtol=ROUNDING, atol=ROUNDING)
    assert bool((groups >= 0).all())


@pytest.mark.parametrize("pair", PAIRS)
def test_closed_kl_of_equals_is_zero(pair):
    torch.manual_seed(2)
    p = FAMILIES[pair[1]]()
    q = p if pair[0] is pair[1] else as_torch(p)  # every other family here contains the factorized Gaussians
    groups = closed_kl(q, p)
    torch.testing.assert_close(groups, torch.zeros_like(groups), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pair", PAIRS)
def test_groups_of_the_kl_are_independent_dimensions(pair):
    """Where the KL comes by dimension, each group is the KL of that dimension given those before it.

    For a factorized q that is its own KL; for a full Gaussian the first k groups are the KL of the first k dimensions.
    """
    torch.manual_seed(3)
    q, p = FAMILIES[pair[0]](), FAMILIES[pair[1]]()
    groups = closed_kl(q, p)
    assert groups.shape[-1] == (1 if pair[0] is OneHot else D)
    if pair[0] is td.MultivariateNormal:
        for k in range(1, D + 1):
            head_q = td.MultivariateNormal(q.loc[:, :k], q.covariance_matrix[:, :k, :k])
            head_p = td.MultivariateNormal(p.mean[:, :k], torch.diag_embed(p.variance[:, :k]))
            torch.testing.assert_close(groups[:, :k].sum(-1), td.kl_divergence(head_q, head_p), rtol=1e-9, atol=1e-9)
    elif pair[0] is not OneHot:
        one, other = (getattr(d.base_dist, "log", d.base_dist) for d in (q, p))
        torch.testing.assert_close(groups, td.kl_divergence(one, other), rtol=ROUNDING, atol=ROUNDING)


def test_no_closed_kl_is_claimed_for_other_families():
    unit = td.Independent(td.Normal(torch.zeros(D), 1.0), 1)
    for other in (td.Laplace(torch.zeros(D), torch.ones(D)), td.StudentT(torch.full((D,), 4.0))):
        assert closed_kl(td.Independent(other, 1), unit) is None
        assert closed_kl(unit, td.Independent(other, 1)) is None
    correlated = td.MultivariateNormal(torch.zeros(D), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert closed_kl(unit, correlated) is None or torch.allclose(
        closed_kl(unit, correlated).sum(), td.kl_divergence(as_torch(unit), correlated)
    )


POSTERIORS = {
    "DiagonalNormal": (lambda: DiagonalNormal(nn.Identity()), 2 * D),
    "FullNormal": (lambda: FullNormal(nn.Identity(), D), 2 * D + D * D),
    "ProductNormal": (lambda: ProductNormal(nn.Identity(), D, FACTORS), FACTORS * (D + 1) + 2 * D),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_gradients_of_draws_match_the_score_function(name):
    """d/dphi E[f(z)]: reparameterized and score-function gradients of the same draws differ by noise of mean zero.

    Each draw has its own copy of phi, so that its gradient is seen by itself; the mean difference, paired by draw, is
    within 4 of its standard errors in every coordinate.
    """
    torch.manual_seed(4)
    make, width = POSTERIORS[name]
    draws = 200_000
    phi = (0.5 * torch.randn(width)).expand(draws, width).clone().requires_grad_()
    d = make()(phi)

    def f(z: Tensor) -> Tensor:
        return z[:, 0].sin() + 0.5 * (z[:, 0] - z[:, 1]).square() + z[:, 1]

    z = draw(d, torch.Size([draws]))
    (pathwise,) = torch.autograd.grad(f(z).sum(), phi, retain_graph=True)
    fixed = z.detach()
    baseline = float(f(fixed).mean())  # lowers the variance; moves the mean by 1/draws of itself at most
    (score,) = torch.autograd.grad(((f(fixed) - baseline) * d.log_prob(fixed)).sum(), phi)
    difference = pathwise - score
    assert bool((difference.mean(0).abs() <= 4 * difference.std(0) / draws**0.5).all())
    moved = pathwise.abs().amax(0) > 0
    assert int(moved.sum()) == width - (D * (D + 1) // 2 if name == "FullNormal" else 0)


def test_the_variance_of_the_score_function_is_the_larger():
    r"""f(z) = z^2 under N(0, 1), gradient in the mean: variances 4 and 15, from the Gaussian's even moments.

    Pathwise 2 (mu + eps): 4. Score z^2 (z - mu): E z^6 = 15. Each estimate lies within 4 standard errors of a variance.
    """
    torch.manual_seed(5)
    draws = 200_000
    loc = torch.zeros(draws, 1, requires_grad=True)
    d = td.Independent(td.Normal(loc, torch.ones(draws, 1)), 1)
    z = draw(d, torch.Size([draws]))
    (pathwise,) = torch.autograd.grad(z.square().sum(), loc, retain_graph=True)
    fixed = z.detach()
    (score,) = torch.autograd.grad((fixed.square().sum(-1) * d.log_prob(fixed)).sum(), loc)
    for gradient, variance in ((pathwise, 4.0), (score, 15.0)):
        squares = gradient.square()  # both means are zero
        assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / draws**0.5
    assert float(pathwise.var()) < float(score.var())


def test_the_printed_density_of_algorithm_2_is_none():
    r"""Erratum 4: with log sigma inside the half, log q = -sum (eps^2 + log 2 pi + log sigma) / 2, q integrates to
    prod sqrt(sigma); with log sigma outside, as here, to one.
    """
    built = build("FullNormal")
    for n in range(ROWS):
        points, area = grid(built.oracles[n])
        d = built.module(built.parents[0][n])
        tril = d.scale_tril.detach()
        eps = torch.linalg.solve_triangular(tril, (points - d.loc.detach()).T, upper=False).T
        sigma = tril.diagonal()
        printed = -0.5 * (eps.square() + np.log(2 * np.pi) + sigma.log()).sum(-1)
        right = -(0.5 * (eps.square() + np.log(2 * np.pi)) + sigma.log()).sum(-1)
        assert float((printed.exp() * area).sum()) == pytest.approx(float(sigma.sqrt().prod()), abs=1e-9)
        assert abs(float(sigma.sqrt().prod()) - 1) > 0.01
        assert float((right.exp() * area).sum()) == pytest.approx(1.0, abs=1e-9)
        torch.testing.assert_close(right, d.log_prob(points).detach(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("n", [1, 16, 255, 1000, 1001, 65_535, 1_000_000])
def test_binomial_keeps_its_digits_in_float32(n):
    """Against scipy, whose terms do not cancel; the logits themselves are rounded to 2^-24 of their size, times n."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=200).astype(np.float32))
    probs = 1 / (1 + np.exp(-logits.double().numpy()))
    counts = rng.binomial(n, probs)
    found = Binomial(lambda: logits, n)().log_prob(torch.from_numpy(counts.astype(np.float32)))
    exact = stats.binom(n, probs).logpmf(counts).sum()
    terms = (n * np.logaddexp(0, logits.numpy())).sum() if n <= 1000 else 0.0  # the float32 branch rounds these
    assert abs(float(found) - exact) < 2**-22 * (abs(exact) + terms) + 1e-9 * n


def test_binomial_where_success_is_nearly_certain():
    r"""All of n succeed with log-probability :math:`-n \log(1 + e^{-l})`, of which softplus past 20 keeps nothing."""
    n, logits = 1_000_000, torch.tensor([21.0, 25.0, 30.0])
    found = Binomial(lambda: logits.unsqueeze(-1), n)().log_prob(torch.full((3, 1), float(n)))
    np.testing.assert_allclose(found, -n * np.log1p(np.exp(-logits.numpy())), rtol=0, atol=1e-8)  # 2^-52 n l


# One rounding to float32, of the result. The rest is float64's, here and in scipy: a dozen roundings of terms as large
# as t leave 2^-48 t.
def within_float32(exact: np.ndarray, terms: np.ndarray | float) -> np.ndarray:
    return 2**-24 * np.abs(exact) + 2**-48 * terms


@pytest.mark.parametrize("n", [1, 255, 1000, 100_000])
@pytest.mark.parametrize("concentration", [1e-3, 1.0, 99.0, 101.0, 1e4, 1e6])
def test_betabinomial_keeps_its_digits_in_float32(n, concentration):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(200, 1)).astype(np.float32))
    log_s = torch.full((200, 1), np.log(concentration), dtype=torch.float32)
    s, pi = np.exp(log_s.double().numpy()), 1 / (1 + np.exp(-logits.double().numpy()))
    a, b = s * pi, s / (1 + np.exp(logits.double().numpy()))
    counts = rng.binomial(n, rng.beta(a, b))
    counts[:2] = [[0], [n]]
    found = BetaBinomial(lambda: torch.cat([logits, log_s], -1), n)().log_prob(torch.from_numpy(counts).float())
    exact = stats.betabinom(n, a, b).logpmf(counts)[:, 0]
    terms = (n + s[0, 0]) * np.log(n + s[0, 0] + 1)
    assert np.all(np.abs(found.double().numpy() - exact) < within_float32(exact, terms) + 2**-48)


@pytest.mark.parametrize("theta", [1e-3, 1.0, 99.0, 101.0, 1e4, 1e6, 1e15])
@pytest.mark.parametrize("mean", [0.01, 3.0, 1e4])
def test_negative_binomial_keeps_its_digits_in_float32(theta, mean):
    """At theta = 1e15 against the Poisson, from which it differs by less than x^2 / theta + mu^2 / theta."""
    rng = np.random.default_rng(0)
    out = torch.tensor([[np.log(mean), np.log(theta)]], dtype=torch.float32)
    mu, inverse = (float(each) for each in out[0].double().exp())
    oracle = stats.poisson(mu) if theta == 1e15 else stats.nbinom(inverse, inverse / (inverse + mu))
    counts = np.concatenate([[0, 1, 10_000], rng.poisson(mu * rng.gamma(inverse, 1 / inverse, 100))])
    found = NegativeBinomial(lambda: out, 1, "datum")().log_prob(torch.from_numpy(counts).float().unsqueeze(-1))
    exact = oracle.logpmf(counts)
    limit = (counts**2 + mu**2) / theta if theta == 1e15 else 0.0
    # scipy's own terms are as large as theta log theta; ours only as x log theta
    size = counts if theta == 1e15 else counts + inverse
    terms = size * np.log(counts + inverse + 2) + mu
    assert np.all(np.abs(found.double().numpy() - exact) < within_float32(exact, terms) + limit + 2**-48)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e4, 1e6])
def test_poisson_keeps_its_digits_in_float32(rate):
    log_rate = torch.tensor([[np.log(rate)]], dtype=torch.float32)
    oracle = stats.poisson(float(log_rate.double().exp()))
    counts = oracle.rvs(100, random_state=0)
    found = Poisson(lambda: log_rate)().log_prob(torch.from_numpy(counts).float().unsqueeze(-1))
    exact, terms = oracle.logpmf(counts), counts * np.log(counts + 2.0) + rate
    assert np.all(np.abs(found.double().numpy() - exact) < within_float32(exact, terms) + 2**-48)


@pytest.mark.parametrize("df", [1.01, 5.0, 199.0, 201.0, 1e4, 1e6])
def test_student_keeps_its_digits_in_float32(df):
    """Near the centre, where all of the log-density is the constant; torch's is off by 0.1 nats and more at 1e6."""
    likelihood = StudentT(lambda: torch.zeros(1, 1), 1).float()
    with torch.no_grad():
        likelihood.raw_df.copy_(torch.tensor(df - 1).expm1().log() if df < 10 else torch.tensor(df - 1))
    d = likelihood()
    x = torch.tensor([[-1.0], [0.0], [0.5]])
    base = d.base_dist
    exact = stats.t(base.df.double().detach(), scale=base.scale.double().detach()).logpdf(x)[:, 0]
    # the constant, log scale, and the product of five roundings, each of size 1
    np.testing.assert_allclose(d.log_prob(x.float()).double().detach().numpy(), exact, rtol=0, atol=8 * 2**-24)


def log_level(x: np.ndarray, loc: float, scale: float, levels: int) -> np.ndarray:
    """From the nearer tail, whose logarithm scipy has."""
    low, high = np.where(x == 0, -np.inf, x - 0.5), np.where(x == levels - 1, np.inf, x + 0.5)
    tail = stats.logistic(loc, scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = tail.logcdf(high) + np.log1p(-np.exp(tail.logcdf(low) - tail.logcdf(high)))
        right = tail.logsf(low) + np.log1p(-np.exp(tail.logsf(high) - tail.logsf(low)))
    return np.where(x < loc, left, right)


@pytest.mark.parametrize("scale", [0.005, 0.25, 5.0, 1e3, 1e6])
@pytest.mark.parametrize("loc", [-1e5, -3.0, 0.0, 100.25, 127.5, 255.0, 1e4])
def test_discretized_logistic_keeps_its_digits_in_float32(loc, scale):
    """The three terms have one sign and a few roundings each; one below 1 comes from an argument of size 1 or less."""
    x = torch.arange(256, dtype=torch.float32)
    at, spread = (torch.full((256, 1), each, dtype=torch.float32, requires_grad=True) for each in (loc, scale))
    found = distributions.DiscretizedLogistic(at, spread, torch.zeros(256, 1, dtype=torch.float32), 256).log_prob(x)
    exact = log_level(x.double().numpy(), at[0].item(), spread[0].item(), 256)
    assert np.all(np.abs(found.detach().double().numpy() - exact) < 8 * 2**-24 * (np.abs(exact) + 1))
    assert found.detach().double().exp().sum().item() == pytest.approx(1.0, abs=8 * 2**-24)
    for gradient in torch.autograd.grad(found.sum(), (at, spread)):
        assert bool(gradient.isfinite().all())


EXTREME = {
    "BetaBinomial": (lambda: BetaBinomial(nn.Identity(), 100), 2),
    "NegativeBinomial": (lambda: NegativeBinomial(nn.Identity(), 1, "datum"), 2),
    "ZeroInflatedNegativeBinomial": (lambda: ZeroInflatedNegativeBinomial(nn.Identity(), 1, "datum"), 3),
    "DiscretizedLogistic": (lambda: DiscretizedLogistic(nn.Identity()), 2),
    "DiscretizedLogistic, mixture": (lambda: DiscretizedLogistic(nn.Identity(), components=2), 6),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_net_may_say_at_its_worst_is_finite(name, dtype):
    """Values and gradients, at outputs from -1000 to 1000 in all combinations."""
    make, width = EXTREME[name]
    reach = (-1000.0, -90.0, 0.0, 90.0, 1000.0) if width < 6 else (-1000.0, 0.0, 1000.0)
    out = torch.tensor(list(itertools.product(reach, repeat=width)), dtype=dtype, requires_grad=True)
    for x in (0.0, 1.0, 100.0):
        log_p = make()(out).log_prob(torch.full((1,), x, dtype=dtype))
        (gradient,) = torch.autograd.grad(log_p.sum(), out)
        assert bool(log_p.isfinite().all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_concentration", [-7.0, -60.0])
def test_draws_where_gammas_underflow(log_concentration, dtype):
    """Nearly all of a beta-binomial is at 0 and n then; frequencies within 4 standard errors of the masses."""
    torch.manual_seed(0)
    draws, n = 20_000, 10
    d = BetaBinomial(nn.Identity(), n)(torch.tensor([-0.8, log_concentration], dtype=dtype))
    x = d.sample([draws])
    assert x.dtype == dtype
    for state in (0.0, float(n)):
        mass = float(d.log_prob(torch.tensor([state], dtype=dtype)).exp())
        assert abs(float((x == state).double().mean()) - mass) < 4 * (mass * (1 - mass) / draws) ** 0.5


@pytest.mark.parametrize("hidden", [[], [7], [9, 6]])
@pytest.mark.parametrize("dims", [1, 5])
def test_autoregression_sees_only_what_came_before(dims, hidden):
    """Masses over all vectors sum to one under every parent; entry j of the logits depends on all entries before j."""
    torch.manual_seed(0)
    likelihood = AutoregressiveBernoulli(net(sum(hidden) + dims), dims, hidden, "tanh")
    d = likelihood(torch.randn(4, ROWS, 3))
    vectors = torch.tensor(list(itertools.product([0.0, 1.0], repeat=dims)))
    masses = d.log_prob(vectors[:, None, None]).exp()
    torch.testing.assert_close(masses.sum(0), torch.ones(4, ROWS), rtol=ROUNDING, atol=ROUNDING)

    context = d.context[0, 0].detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: d.logits(x, context), torch.rand(dims))
    assert torch.equal(jacobian != 0, torch.ones(dims, dims).tril(-1).bool())

    by_entry = torch.zeros(len(vectors))
    for j in range(dims):
        seen = torch.where(torch.arange(dims) < j, vectors, torch.rand(len(vectors), dims))
        logit = d.logits(seen, context)[:, j]
        by_entry += td.Bernoulli(logits=logit).log_prob(vectors[:, j])
    torch.testing.assert_close(masses[:, 0, 0].log(), by_entry, rtol=ROUNDING, atol=ROUNDING)


def test_frequencies_of_autoregressive_draws():
    """Each of 32 vectors within 4 standard errors of its mass; the draws keep the leading axes of the parents."""
    torch.manual_seed(0)
    draws, likelihood = 50_000, AutoregressiveBernoulli(net(6 + 5), 5, [6])
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(torch.randn_like(parameter))
    d = likelihood(torch.randn(2, 3))
    x = d.sample([draws])
    assert x.shape == (draws, 2, 5)
    vectors = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)))
    masses = d.log_prob(vectors.unsqueeze(1)).exp().detach()
    frequencies = (x.unsqueeze(0) == vectors[:, None, None]).all(-1).double().mean(1)
    assert bool(((frequencies - masses).abs() < 4 * (masses * (1 - masses) / draws).sqrt()).all())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BetaBinomial(net(3), 5), "width 2 D"),
        (lambda: BetaBinomial(nn.Identity(), 5)(torch.zeros(1, 3)), "width 2"),
        (lambda: BetaBinomial(net(2), 0), "total_count"),
        (lambda: StudentT(net(3), 2), "width 2 for D = 2"),
        (lambda: StudentT(nn.Identity(), 2)(torch.zeros(1, 1)), "width 2"),
        (lambda: StudentT(net(2), 2, "row"), "noise"),
        (lambda: Normal(net(2), 2, floor=-0.1), "floor"),
        (lambda: StudentT(net(2), 2, floor=math.inf), "floor"),
        (lambda: ProductNormal(net(9), 2, 2), "width F D \\+ F \\+ 2 D = 10 for D = 2 and F = 2"),
        (lambda: ProductNormal(nn.Identity(), 2, 2)(torch.zeros(1, 9)), "width 10"),
        (lambda: NegativeBinomial(net(2), 2, "datum"), "width 4"),
        (lambda: NegativeBinomial(nn.Identity(), 2)(torch.zeros(1, 1)), "width 2"),
        (lambda: NegativeBinomial(net(2), 2, "row"), "dispersion"),
        (lambda: ZeroInflatedNegativeBinomial(net(2), 2), "width 4"),
        (lambda: DiscretizedLogistic(net(3)), "width 2 D"),
        (lambda: DiscretizedLogistic(net(4), components=2), "width 3 D times 2"),
        (lambda: DiscretizedLogistic(nn.Identity(), components=2)(torch.zeros(1, 7)), "width 6"),
        (lambda: DiscretizedLogistic(net(2), 1), "levels"),
        (lambda: DiscretizedLogistic(net(2), 4, 0), "components"),
        (lambda: AutoregressiveBernoulli(net(5), 5, [4]), "width sum"),
        (lambda: AutoregressiveBernoulli(nn.Identity(), 5, [4])(torch.zeros(1, 5)), "width 9"),
        (lambda: AutoregressiveBernoulli(net(5), 5, [0]), "hidden"),
        (lambda: AutoregressiveBernoulli(net(5), 5, [], "sine"), "activation"),
    ],
)
def test_what_does_not_fit_is_told(make, told):
    with pytest.raises(InputError, match=told):
        make()


@pytest.mark.parametrize("family", [Normal, StudentT])
def test_a_floor_bounds_the_density_and_is_part_of_the_state(family):
    """However sure the net, no density exceeds that at the floor; a model without one saves as ever."""
    likelihood = family(nn.Identity(), 2, "datum", scale=2.0, floor=torch.tensor([0.5, 0.0]))
    out = torch.tensor([0.0, 0.0, -1e4, 0.0])
    base = likelihood(out).base_dist
    assert base.scale[0] == 2.0 * 0.5
    assert base.scale[1] == pytest.approx(2 * math.log(2))
    assert "floor" in likelihood.state_dict()
    assert "floor" not in family(nn.Identity(), 2).state_dict()


def test_an_autoregressive_likelihood_has_no_mean():
    with pytest.raises(NotImplementedError, match="average draws"):
        _ = build("AutoregressiveBernoulli").d.mean


@pytest.mark.parametrize("learned_root", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_categorical(classes, learned_root):
    """Masses are the softmax of the logits and sum to one; draws have their frequencies, by 4 standard errors."""
    torch.manual_seed(6)
    if learned_root:
        module: nn.Module = Categorical(classes, learned=True)
        with torch.no_grad():
            module.logits.normal_()
        d, logits = module(), module.logits.detach()
    else:
        module = Categorical(classes, net(classes))
        parent = torch.randn(1, 3)
        d, logits = module(parent), module.net(parent).detach()[0]
    expected = special.log_softmax(logits.numpy())
    every = states(d)
    assert count_states(d) == len(every) == classes
    found = d.log_prob(every.reshape(classes, *(1,) * len(d.batch_shape), classes)).detach().reshape(classes)
    np.testing.assert_allclose(found.numpy(), expected, rtol=ROUNDING, atol=ROUNDING)
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=ROUNDING)
    draws = d.expand(torch.Size([100_000, *d.batch_shape])).sample().reshape(-1, classes)
    probs = found.exp()
    assert bool(((draws.mean(0) - probs).abs() <= 4 * (probs * (1 - probs) / 100_000).sqrt() + 1e-12).all())
    torch.testing.assert_close(d.mean.reshape(-1, classes)[0].detach(), probs, rtol=ROUNDING, atol=ROUNDING)


def test_a_class_that_cannot_be_keeps_value_and_gradient():
    """A logit of -inf: no NaN where the class is not asked for, -inf where it is."""
    logits = torch.tensor([0.5, -0.2, -math.inf], requires_grad=True)
    d = OneHot(logits)
    found = d.log_prob(torch.eye(3))
    assert float(found[2].detach()) == -math.inf
    (gradient,) = torch.autograd.grad(found[:2].sum(), logits)
    assert bool(gradient.isfinite().all())
    kl = closed_kl(OneHot(logits.unsqueeze(0)), OneHot(torch.zeros(1, 3)))
    assert bool(kl.isfinite().all())


@pytest.mark.parametrize("make", [lambda: OneHot(torch.tensor([0.3, -0.5, 1.0])), binary])
def test_relaxed_draws_approach_the_classes(make):
    """At temperature 0.01 draws are all but 0 or 1, and their means are the probabilities, by 4 standard errors."""
    torch.manual_seed(7)
    d = make()
    soft = relaxed(d, 0.01).rsample(torch.Size([20_000]))
    assert float(((soft > 0.99) | (soft < 0.01)).double().mean()) > 0.95
    mean = d.mean
    error = 4 * (mean * (1 - mean) / 20_000).sqrt()
    assert bool(((soft.mean(0) - mean).abs() < error + 0.002).all())  # 0.002: what the temperature leaves
