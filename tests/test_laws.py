"""Laws that every conditional obeys, looped over one table; scipy is the independent oracle.

A new conditional joins by one line in `CASES`, a new closed-form KL by one line in `FAMILIES` if its family is new.
Monte Carlo comparisons allow four standard errors, told beside each; all others allow float64's rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import stats
from torch import Tensor, nn

from aevb import MLP, BayesNet, Bernoulli, Binomial, DiagonalNormal, FullNormal, InputError, Normal, StandardNormal
from aevb.distributions import (
    CLOSED_KL,
    closed_kl,
    draw,
    log_prob,
    rsample_and_log_prob,
    support_violation,
)

pytestmark = pytest.mark.usefixtures("double")

D, ROWS = 2, 3
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


class Joint:
    """Gaussian with any covariance."""

    def __init__(self, mean: np.ndarray, cov: np.ndarray) -> None:
        self.mean, self.cov = mean, cov

    def log(self, x: np.ndarray) -> np.ndarray:
        return stats.multivariate_normal(self.mean, self.cov).logpdf(x)


Oracle = Entries | Joint


def softplus(raw: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, raw)


def standard(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.norm(np.zeros(D), np.ones(D)))


def diagonal(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.norm(out[:D], softplus(out[D:])))


def full(module: nn.Module, out: np.ndarray) -> Oracle:
    factor = np.diag(softplus(out[D : 2 * D]))
    for i in range(D):
        for j in range(i):
            factor[i, j] = out[2 * D + i * D + j]
    return Joint(out[:D], factor @ factor.T)


def normal(module: nn.Module, out: np.ndarray) -> Oracle:
    raw = out[D:] if module.noise == "datum" else module.raw_noise.detach().numpy() * np.ones(D)
    return Entries(
        stats.norm(module.loc.numpy() + module.scale.numpy() * out[:D], module.scale.numpy() * softplus(raw))
    )


def bernoulli(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.bernoulli(1 / (1 + np.exp(-out))))


def binomial(module: nn.Module, out: np.ndarray) -> Oracle:
    return Entries(stats.binom(module.total_count, 1 / (1 + np.exp(-out))))


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    parents: tuple[int, ...]  # widths
    oracle: Callable[[nn.Module, np.ndarray], Oracle]  # from the net's output in one row
    states: tuple[int, ...] = ()  # of an entry, where it is discrete
    bad: tuple[float, ...] = ()  # values outside the support


def net(outputs: int, inputs: int = 3) -> MLP:
    return MLP(inputs, [4], outputs, "tanh")


CASES = {
    "StandardNormal": Case(lambda: StandardNormal(D), (), standard),
    "DiagonalNormal": Case(lambda: DiagonalNormal(net(2 * D)), (3,), diagonal),
    "DiagonalNormal, two parents": Case(lambda: DiagonalNormal(net(2 * D)), (2, 1), diagonal),
    "FullNormal": Case(lambda: FullNormal(net(2 * D + D * D), D), (3,), full),
    "Normal, global": Case(lambda: Normal(net(D), D, "global"), (3,), normal),
    "Normal, dimension": Case(lambda: Normal(net(D), D, "dimension"), (3,), normal),
    "Normal, datum": Case(lambda: Normal(net(2 * D), D, "datum"), (3,), normal),
    "Normal, global, units": Case(lambda: Normal(net(D), D, "global", *units()), (3,), normal),
    "Normal, dimension, units": Case(lambda: Normal(net(D), D, "dimension", *units()), (3,), normal),
    "Normal, datum, units": Case(lambda: Normal(net(2 * D), D, "datum", *units()), (3,), normal),
    "Bernoulli": Case(lambda: Bernoulli(net(D)), (3,), bernoulli, (0, 1), (0.5, -1.0, 2.0)),
    "Binomial": Case(lambda: Binomial(net(D), 5), (3,), binomial, tuple(range(6)), (6.0, -1.0, 2.5)),
}
CONTINUOUS = [name for name, case in CASES.items() if not case.states]
DISCRETE = [name for name, case in CASES.items() if case.states]
FACTORIZED = [name for name, case in CASES.items() if case.oracle is not full]


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
            parameter.copy_(0.6 * torch.randn_like(parameter))
    parents = [torch.randn(ROWS, width) for width in case.parents]
    with torch.no_grad():
        out = module.net(*parents).numpy() if hasattr(module, "net") else np.empty((ROWS, 0))
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


@pytest.mark.parametrize("name", CONTINUOUS)
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


@pytest.mark.parametrize("name", CONTINUOUS)
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


def grid(oracle: Oracle, sds: float = 10.0, points: int = 400) -> tuple[Tensor, float]:
    """Points `(points^2, 2)` over ten standard deviations either side, and the area each stands for.

    The trapezoidal rule converges faster than any power on what is smooth and vanishes at the ends.
    """
    sd = np.sqrt(np.diag(oracle.cov))
    axes = [np.linspace(m - sds * s, m + sds * s, points) for m, s in zip(oracle.mean, sd, strict=True)]
    area = float(np.prod([axis[1] - axis[0] for axis in axes]))
    return torch.as_tensor(np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, D)), area


@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name):
    built = build(name)
    for n in range(ROWS):
        points, area = grid(built.oracles[n])
        d = built.module(*(parent[n] for parent in built.parents))
        total = float(log_prob(d, points).detach().exp().sum()) * area
        assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", DISCRETE)
def test_masses_sum_to_one(name):
    built = build(name)
    states = torch.tensor(list(itertools.product(CASES[name].states, repeat=D)), dtype=torch.float64)
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
def test_what_does_not_factorize_refuses_missing_entries(name):
    built = build(name)
    with pytest.raises(InputError, match="factorize"):
        log_prob(built.d, torch.full((ROWS, D), torch.nan), torch.zeros(ROWS, D, dtype=torch.bool))


def test_missing_entries_with_draws_in_front():
    """Values `(N, D)` with holes under parameters `(K, N, D)`."""
    built = build("Bernoulli")
    logits = torch.randn(5, ROWS, D)
    d = td.Independent(td.Bernoulli(logits=logits), 1)
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


@pytest.mark.parametrize("name", CONTINUOUS)
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


FAMILIES: dict[type, Callable[[], td.Distribution]] = {td.Normal: factorized_normal, td.MultivariateNormal: full_normal}
PAIRS = [pytest.param(pair, id=f"{pair[0].__name__}, {pair[1].__name__}") for pair in CLOSED_KL]


def as_joint(d: td.Distribution) -> td.MultivariateNormal:
    if isinstance(d, td.MultivariateNormal):
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

    z, log_q = rsample_and_log_prob(q, torch.Size([draws, ROWS]))
    ratio = log_q - p.log_prob(z)
    assert bool(((ratio.mean(0) - kl).abs() < 4 * ratio.std(0) / draws**0.5).all())

    torch.testing.assert_close(kl, td.kl_divergence(as_joint(q), as_joint(p)), rtol=ROUNDING, atol=ROUNDING)
    assert bool((groups >= 0).all())


@pytest.mark.parametrize("pair", PAIRS)
def test_closed_kl_of_equals_is_zero(pair):
    torch.manual_seed(2)
    p = FAMILIES[pair[1]]()
    q = p if pair[0] is pair[1] else as_joint(p)  # every family here contains the factorized Gaussians
    groups = closed_kl(q, p)
    torch.testing.assert_close(groups, torch.zeros_like(groups), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pair", PAIRS)
def test_groups_of_the_kl_are_independent_dimensions(pair):
    """Where the KL comes by dimension, each group is the KL of that dimension alone."""
    torch.manual_seed(3)
    q, p = FAMILIES[pair[0]](), FAMILIES[pair[1]]()
    groups = closed_kl(q, p)
    assert groups.shape[-1] in (1, D)
    if groups.shape[-1] == D:
        torch.testing.assert_close(groups, td.kl_divergence(q.base_dist, p.base_dist), rtol=ROUNDING, atol=ROUNDING)


def test_no_closed_kl_is_claimed_for_other_families():
    unit = td.Independent(td.Normal(torch.zeros(D), 1.0), 1)
    for other in (td.Laplace(torch.zeros(D), torch.ones(D)), td.StudentT(torch.full((D,), 4.0))):
        assert closed_kl(td.Independent(other, 1), unit) is None
        assert closed_kl(unit, td.Independent(other, 1)) is None
    correlated = td.MultivariateNormal(torch.zeros(D), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert closed_kl(unit, correlated) is None or torch.allclose(
        closed_kl(unit, correlated).sum(), td.kl_divergence(as_joint(unit), correlated)
    )


POSTERIORS = {
    "DiagonalNormal": (lambda: DiagonalNormal(nn.Identity()), 2 * D),
    "FullNormal": (lambda: FullNormal(nn.Identity(), D), 2 * D + D * D),
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
    assert int(moved.sum()) == (2 * D if name == "DiagonalNormal" else 2 * D + D * (D - 1) // 2)


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
        assert float(printed.exp().sum()) * area == pytest.approx(float(sigma.sqrt().prod()), abs=1e-9)
        assert abs(float(sigma.sqrt().prod()) - 1) > 0.01
        assert float(right.exp().sum()) * area == pytest.approx(1.0, abs=1e-9)
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
