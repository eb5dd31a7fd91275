"""Rate, distortion, mutual information and the aggregated posterior, where each has a closed form or a quadrature.

Comparisons with a population allow four standard errors over rows, those of Monte Carlo alone four standard errors from
the scatter over seeds, told beside each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import integrate, stats
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
    InverseAutoregressiveFlow,
    MixtureOfNormals,
    Normal,
    PlanarFlow,
    SplineFlow,
    StandardNormal,
)
from aevb.evaluate.latents import Information, aggregated, information
from gaussians import affine, correlated, factorized, likelihood

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-9


class Linear(NamedTuple):
    """x = W z + b + s eps with the exact posterior as q."""

    w: Tensor
    b: Tensor
    s: float

    @property
    def gain(self) -> Tensor:
        k = self.w.shape[1]
        return torch.linalg.solve(self.w.T @ self.w + self.s**2 * torch.eye(k), self.w.T)

    @property
    def cov(self) -> Tensor:
        return self.s**2 * torch.linalg.inv(self.w.T @ self.w + self.s**2 * torch.eye(self.w.shape[1]))

    @property
    def mutual_information(self) -> float:
        return float(0.5 * torch.logdet(torch.eye(self.w.shape[1]) + self.w.T @ self.w / self.s**2))

    def vae(self) -> VAE:
        p = BayesNet({"z": StandardNormal(self.w.shape[1]), "x | z": likelihood(self.w, self.b, self.s)})
        return VAE(p, BayesNet({"z | x": correlated(self.gain, -self.gain @ self.b, self.cov)}))

    def sample(self, rows: int) -> Tensor:
        return torch.randn(rows, self.w.shape[1]) @ self.w.T + self.b + self.s * torch.randn(rows, len(self.b))


def linear(d: int = 4, k: int = 2, s: float = 1.0) -> Linear:
    torch.manual_seed(0)
    return Linear(torch.randn(d, k), torch.randn(d), s)


def over_seeds(run: Callable[[int], Information], field: str, seeds: int = 30) -> tuple[float, float]:
    """Mean of a figure over seeds, and the standard error of that mean."""
    found = torch.tensor([getattr(run(seed), field) for seed in range(seeds)])
    return float(found.mean()), float(found.std()) / math.sqrt(seeds)


def test_exact_posterior_of_a_linear_gaussian_model():
    """I(x; z) = log det(I + W^T W / s^2) / 2, which is the mean rate, too: q(z) is the prior in the limit."""
    model = linear()
    vae, x = model.vae(), model.sample(3000)
    exact = model.mutual_information
    assert 0.5 < exact < 3
    found = information(vae, {"x": x}, samples=2)
    posterior = td.MultivariateNormal((x - model.b) @ model.gain.T, model.cov)
    prior = td.MultivariateNormal(torch.zeros(2), torch.eye(2))
    by_row = td.kl_divergence(posterior, prior)
    assert found.rate == pytest.approx(float(by_row.mean()), abs=ROUNDING)
    assert found.rate_std_error == pytest.approx(float(by_row.std()) / math.sqrt(3000), abs=ROUNDING)
    assert abs(found.rate - exact) < 4 * found.rate_std_error
    # Bias of the two estimates: down and up, a few thousandths of a nat here, told by their distance.
    between = found.mutual_information_upper - found.mutual_information
    assert 0 < between < 0.02
    assert found.mutual_information_std_error < 0.03
    assert abs(found.mutual_information - exact) < 4 * found.mutual_information_std_error + between
    assert abs(found.marginal_kl) < 4 * found.marginal_kl_std_error + between
    assert not found.saturated
    assert found.reason is None
    assert (found.rows, found.samples) == (3000, 2)


def test_standard_errors_are_the_scatter_over_data_sets():
    """150 data sets of 150 rows: a chi-square band for each variance, and the biases' signs by their standard errors.

    A standard error is itself an estimate, with a relative error of 1 / sqrt(2 * 150) or 6 %, averaged out here.
    """
    model, repetitions = linear(s=0.8), 150
    vae, exact = model.vae(), model.mutual_information
    torch.manual_seed(1)
    runs = [information(vae, {"x": model.sample(150)}, 3, seed=seed) for seed in range(repetitions)]
    low, high = (stats.chi2.ppf(tail, repetitions - 1) / (repetitions - 1) for tail in (1e-4, 1 - 1e-4))
    for field in ("rate", "distortion", "mutual_information", "marginal_kl"):
        values, errors = (torch.tensor([getattr(run, name) for run in runs]) for name in (field, f"{field}_std_error"))
        assert low < float(values.var() / errors.square().mean()) < high, field
    for field, sign, limit in (
        ("mutual_information", -1, exact),
        ("mutual_information_upper", 1, exact),
        ("marginal_kl", 1, 0.0),
    ):
        off = sign * (torch.tensor([getattr(run, field) for run in runs]) - limit)
        assert float(off.mean()) > 4 * float(off.std()) / math.sqrt(repetitions), field


def test_of_these_rows_the_estimates_are_unbiased():
    """Three rows, one latent: mutual information and KL(q(z) || p(z)) by quadrature; the scatter is over 30 seeds."""
    loc, scale = torch.tensor([-1.0, 0.2, 1.5]), 0.4
    q = BayesNet({"z | x": factorized(torch.ones(1, 1), torch.zeros(1), torch.tensor([scale]))})
    vae = VAE(BayesNet({"z": StandardNormal(1), "x | z": likelihood(torch.ones(1, 1), torch.zeros(1), 1.0)}), q)
    densities = [stats.norm(m, scale).pdf for m in loc.tolist()]

    def mixture(z: float) -> float:
        return sum(density(z) for density in densities) / 3

    def over(integrand: Callable[[float], float]) -> float:
        return integrate.quad(integrand, -4, 5, epsabs=1e-10, limit=200)[0]

    told = sum(over(lambda z, d=d: d(z) * math.log(d(z) / mixture(z))) for d in densities) / 3
    gap = over(lambda z: mixture(z) * (math.log(mixture(z)) - stats.norm.logpdf(z)))

    def run(seed: int) -> Information:
        return information(vae, {"x": loc.unsqueeze(1)}, 1000, seed=seed)

    for field, exact in (("mutual_information", told), ("marginal_kl", gap)):
        mean, error = over_seeds(run, field)
        assert error < 0.005
        assert abs(mean - exact) < 4 * error, field
    assert run(0).rate == pytest.approx(told + gap, abs=1e-7)


def test_rate_is_the_sum_of_its_parts():
    """Up to Monte Carlo error, 4 of it; and rate + distortion = -ELBO = -log p(x) for an exact q."""
    model = linear()
    vae, x = model.vae(), model.sample(60)
    runs = [information(vae, {"x": x}, 50, seed=seed) for seed in range(30)]
    log_p = td.MultivariateNormal(model.b, model.w @ model.w.T + torch.eye(4)).log_prob(x).mean()
    sums = torch.tensor([run.rate - run.mutual_information - run.marginal_kl for run in runs])
    bounds = torch.tensor([run.rate + run.distortion for run in runs]) + log_p
    for off in (sums, bounds):
        error = float(off.std()) / math.sqrt(len(off))
        assert 0 < error < 0.01
        assert abs(float(off.mean())) < 4 * error


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_no_more_than_log_n(rows):
    """An encoder that tells all rows apart: the estimate is log N, whatever the truth; the other bound is above it."""
    model = linear(s=1e-4)
    found = information(model.vae(), {"x": model.sample(rows)}, 4)
    assert model.mutual_information > 10
    assert found.mutual_information <= math.log(rows)
    assert found.mutual_information == pytest.approx(math.log(rows), abs=1e-6)
    assert found.saturated
    assert found.mutual_information_upper > model.mutual_information
    assert math.isnan(found.rate_std_error) == (rows == 1)


def scales(*values: float) -> Tensor:
    return torch.tensor(values)


def test_kl_and_active_dimensions_by_hand():
    """The third dimension is N(0, 1), the second's mean is still and its spread is not: the two rules differ there."""
    gain = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    q = factorized(gain, torch.tensor([0.3, 0.0, 0.0]), scales(0.5, 0.2, 1.0))
    p = BayesNet({"z": StandardNormal(3), "x | z": likelihood(torch.ones(2, 3), torch.zeros(2), 1.0)})
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    found = information(VAE(p, BayesNet({"z | x": q})), {"x": x}, 1)
    means, sigma = torch.stack([x[:, 0] + 0.3, 0 * x[:, 0], 0 * x[:, 0]], 1), scales(0.5, 0.2, 1.0)
    by_row = 0.5 * (sigma.square() + means.square() - 1) - sigma.log()
    torch.testing.assert_close(found.kl["z"], by_row.mean(0), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(found.kl_std_error["z"], by_row.std(0) / math.sqrt(40), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(found.mean_variance["z"], means.var(0, correction=0), atol=ROUNDING, rtol=0)
    assert found.active_by_kl["z"].tolist() == [True, True, False]
    assert found.active_by_mean["z"].tolist() == [True, False, False]
    assert found.rate == pytest.approx(float(by_row.sum(1).mean()), abs=ROUNDING)


class LaplacePosterior(nn.Module):
    """A factorized family without a closed form in the table."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        loc, raw = self.net(*parents).chunk(2, dim=-1)
        return td.Independent(td.Laplace(loc, nn.functional.softplus(raw)), 1)


def test_kl_by_dimension_without_a_closed_form():
    """KL(Laplace(m, b) || N(0, 1)) = log(2 pi) / 2 + m^2 / 2 + b^2 - 1 - log 2b; 4 errors of the scatter over seeds."""
    loc, width = torch.tensor([0.7, -0.2]), torch.tensor([0.3, 1.1])
    net = affine(torch.zeros(4, 3), torch.cat([loc, width.expm1().log()]))
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(torch.ones(3, 2), torch.zeros(3), 1.0)})
    vae = VAE(p, BayesNet({"z | x": LaplacePosterior(net)}))
    runs = torch.stack([information(vae, {"x": torch.zeros(5, 3)}, 400, seed=seed).kl["z"] for seed in range(30)])
    exact = 0.5 * math.log(2 * math.pi) + 0.5 * loc.square() + width.square() - 1 - (2 * width).log()
    error = runs.std(0) / math.sqrt(30)
    assert bool((error < 0.01).all())
    assert bool(((runs.mean(0) - exact).abs() < 4 * error).all())
    # The density of other rows is taken at the same law: x tells nothing.
    assert information(vae, {"x": torch.zeros(5, 3)}).mutual_information == pytest.approx(0, abs=ROUNDING)


def test_a_node_that_does_not_factorize_has_one_figure():
    torch.manual_seed(0)
    p = BayesNet({"z": MixtureOfNormals(2, 3), "x | z": likelihood(torch.ones(3, 2), torch.zeros(3), 1.0)})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(3, [], 4))}))
    x = torch.randn(20, 3)
    found = information(vae, {"x": x}, 500)
    assert found.kl["z"].shape == found.active_by_kl["z"].shape == (1,)
    assert found.active_by_mean["z"].shape == (2,)
    assert float(found.kl["z"]) == pytest.approx(found.rate, abs=ROUNDING)
    bound = torch.stack([aevb.elbo(vae, {"x": x}, 500).detach().mean() for _ in range(10)])
    error = 4 * float(bound.std()) * math.sqrt(1.1)  # of one run, and of the mean of ten
    assert found.rate + found.distortion == pytest.approx(-float(bound.mean()), abs=error)


def two_layers() -> tuple[VAE, Tensor, float]:
    """b -> a -> x, and the exact q drawn from the top: b from features of x, then a from b and those features."""
    torch.manual_seed(0)
    down, w, t, s = torch.randn(2, 1), torch.randn(3, 2), 0.6, 0.8
    prior = torch.zeros(6, 6)  # of (b, a, x)
    cov_a = down @ down.T + t**2 * torch.eye(2)
    cov_x = w @ cov_a @ w.T + s**2 * torch.eye(3)
    prior[0, 0] = 1
    prior[:1, 1:3], prior[1:3, :1] = down.T, down
    prior[1:3, 1:3] = cov_a
    prior[:1, 3:], prior[3:, :1] = (w @ down).T, w @ down
    prior[1:3, 3:], prior[3:, 1:3] = cov_a @ w.T, w @ cov_a
    prior[3:, 3:] = cov_x
    to_b = prior[:1, 3:] @ torch.linalg.inv(cov_x)
    seen = [3, 4, 5, 0]
    to_a = prior[1:3][:, seen] @ torch.linalg.inv(prior[seen][:, seen])
    p = BayesNet({
        "b": StandardNormal(1),
        "a | b": factorized(down, torch.zeros(2), torch.full((2,), t)),
        "x | a": likelihood(w, torch.zeros(3), s),
    })  # fmt: skip
    q = BayesNet({
        "h | x": Deterministic(affine(torch.eye(3), torch.ones(3))),
        "b | h": correlated(to_b, -to_b.sum(1), prior[:1, :1] - to_b @ prior[3:, :1]),
        "a | h, b": correlated(to_a, -to_a[:, :3].sum(1), cov_a - to_a @ prior[seen][:, 1:3]),
    })  # fmt: skip
    exact = 0.5 * float(torch.logdet(cov_x) - 3 * math.log(s**2))
    return VAE(p, q), cov_x, exact


def test_layers_are_one_latent():
    """I(x; a, b) = I(x; a), log det(cov x) / 2 less the noise's; q's densities are products, through computed nodes."""
    vae, cov, exact = two_layers()
    torch.manual_seed(2)
    x = td.MultivariateNormal(torch.zeros(3), cov).sample(torch.Size([1200]))
    found = information(vae, {"x": x}, 2)
    between = found.mutual_information_upper - found.mutual_information
    assert 0 < between < 0.06
    assert abs(found.mutual_information - exact) < 4 * found.mutual_information_std_error + between
    assert abs(found.marginal_kl) < 4 * found.marginal_kl_std_error + between
    assert abs(found.rate - exact) < 4 * found.rate_std_error
    assert found.kl["a"].shape == (2,)
    few = x[:50]
    log_p = float(td.MultivariateNormal(torch.zeros(3), cov).log_prob(few).mean())
    runs = [information(vae, {"x": few}, 20, seed=seed) for seed in range(20)]
    bounds = torch.tensor([run.rate + run.distortion for run in runs])
    assert abs(float(bounds.mean()) + log_p) < 4 * float(bounds.std()) / math.sqrt(20) < 0.1


def test_latent_classes():
    """y of three classes, eight rows: rate by hand, exactly; mutual information by hand, the scatter over 30 seeds."""
    torch.manual_seed(0)
    classifier, generator = torch.randn(3, 3), torch.randn(3, 3)
    p = BayesNet({"y": Categorical(3), "x | y": Bernoulli(affine(generator, torch.zeros(3)))})
    vae = VAE(p, BayesNet({"y | x": Categorical(3, affine(classifier, torch.zeros(3)))}))
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    probs = (x @ classifier.T).softmax(-1)
    rate = (probs * (3 * probs).log()).sum(-1).mean()
    told = (probs * (probs / probs.mean(0)).log()).sum(-1).mean()

    def run(seed: int) -> Information:
        return information(vae, {"x": x}, 100, seed=seed)

    found = run(0)
    assert found.rate == pytest.approx(float(rate), abs=ROUNDING)
    assert found.kl["y"].shape == (1,)
    assert found.mean_variance["y"].shape == (3,)
    mean, error = over_seeds(run, "mutual_information")
    assert error < 0.01
    assert abs(mean - float(told)) < 4 * error
    drawn = aggregated(vae, {"x": x.repeat(500, 1)})["y"]
    assert drawn.shape == (4000,)
    counts = torch.bincount(drawn, minlength=3).double()
    # Each row has its own law, so that counts scatter less than a multinomial's: the band is wider than it need be.
    assert stats.chisquare(counts.numpy(), 4000 * probs.mean(0).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("flow", [InverseAutoregressiveFlow, SplineFlow])
def test_flows_with_an_inverse(flow):
    """Against the definition, all pairs at once; 4 standard errors of the difference of two such means."""
    torch.manual_seed(0)
    x, rows, samples = 2 * torch.randn(10, 3), 10, 100
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(torch.ones(3, 2), torch.zeros(3), 1.0)})
    q = flow(affine(torch.randn(4, 3), torch.zeros(4)), dims=2, context=0, transforms=2, hidden=[4])
    found = information(VAE(p, BayesNet({"z | x": q})), {"x": x}, samples)
    with torch.no_grad():
        z = q(x).rsample(torch.Size([samples]))
        pairs = q(x).log_prob(z.unsqueeze(2))  # (K, n, j): the draws of row n under row j
        told = pairs.diagonal(dim1=1, dim2=2) - pairs.logsumexp(-1) + math.log(rows)
    error = 4 * float(told.std()) * math.sqrt(2 / (rows * samples))
    assert 0.3 < found.mutual_information < math.log(rows)
    assert found.mutual_information == pytest.approx(float(told.mean()), abs=error)


def test_a_flow_that_knows_its_own_draws_only():
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(torch.ones(3, 2), torch.zeros(3), 1.0)})
    vae = VAE(p, BayesNet({"z | x": PlanarFlow(MLP(3, [], PlanarFlow.width(2, 2)), dims=2, layers=2)}))
    found = information(vae, {"x": torch.randn(20, 3)})
    assert "no inverse in closed form" in found.reason
    assert found.mutual_information is found.mutual_information_upper is found.marginal_kl is found.saturated is None
    assert found.rate > 0
    assert found.distortion > 0


def test_rows_that_share_no_prior():
    torch.manual_seed(0)
    p = BayesNet({
        "y": Categorical(2),
        "h | y": Deterministic(MLP(2, [], 2)),
        "z | h": DiagonalNormal(MLP(2, [], 4)),
        "x | z": likelihood(torch.ones(3, 2), torch.zeros(3), 1.0),
    })  # fmt: skip
    vae = VAE(p, BayesNet({"z | x, y": DiagonalNormal(MLP(5, [], 4))}))
    found = information(vae, {"x": torch.randn(6, 3), "y": torch.tensor([0, 1, 0, 1, 0, 1])})
    assert "`z` depends on `y`" in found.reason
    assert found.marginal_kl is None
    assert found.kl["z"].shape == (2,)


def test_aggregated_posterior_of_an_exact_q_is_the_prior():
    """3000 draws of N(0, I): a chi-square for the mean, 4.5 standard errors for each covariance."""
    model = linear()
    z = aggregated(model.vae(), {"x": model.sample(3000)})["z"]
    assert z.shape == (3000, 2)
    assert float(z.mean(0).square().sum()) * 3000 < stats.chi2.ppf(1 - 1e-4, 2)
    error = ((1 + torch.eye(2)) / 3000).sqrt()
    assert bool(((torch.cov(z.T) - torch.eye(2)).abs() < 4.5 * error).all())


def test_a_row_that_observes_the_node_keeps_its_value():
    torch.manual_seed(0)
    p = BayesNet({"y": Categorical(3), "z": StandardNormal(1), "x | y, z": Normal(MLP(4, [], 2), 2)})
    q = BayesNet({"y | x": Categorical(3, MLP(2, [], 3)), "z | x, y": DiagonalNormal(MLP(5, [], 2))})
    y = torch.tensor([2.0, math.nan, 0.0, math.nan])
    drawn = aggregated(VAE(p, q), {"x": torch.randn(4, 2), "y": y}, pack=3)
    assert drawn["y"][[0, 2]].tolist() == [2, 0]
    assert drawn["z"].shape == (4, 1)
    with pytest.raises(InputError, match="`y` is latent in 2 of 4 rows"):
        information(VAE(p, q), {"x": torch.randn(4, 2), "y": y})


def test_packs_of_pairs_do_not_change_the_figures():
    """The same draws, their pairs with the rows in one piece and in many, uneven ones."""
    for vae, x in ((linear().vae(), linear().sample(101)), (two_layers()[0], torch.randn(101, 3))):
        whole, parts = (information(vae, {"x": x}, 1, pack=pack) for pack in (10_000, 101))
        assert parts.mutual_information == pytest.approx(whole.mutual_information, abs=ROUNDING)
        assert parts.mutual_information_upper == pytest.approx(whole.mutual_information_upper, abs=ROUNDING)
        assert parts.marginal_kl == pytest.approx(whole.marginal_kl, abs=ROUNDING)
    few = information(vae, {"x": x}, 3, pack=1)
    assert abs(few.marginal_kl - whole.marginal_kl) < 4 * math.hypot(
        few.marginal_kl_std_error, whole.marginal_kl_std_error
    )


def test_the_matrix_products_keep_their_digits():
    """Far from the origin and narrow, the expanded quadratic form cancels; the same q as a `FullNormal` does not."""
    gain, far = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([300.0, -200.0])
    scale = torch.tensor([1e-3, 0.1])
    x = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [0.0, 0.1], [2.0, 1.0]])
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(torch.eye(2), torch.zeros(2), 1.0)})
    narrow = [factorized(gain, far, scale), correlated(gain, far, scale.square().diag())]
    fast, slow = (information(VAE(p, BayesNet({"z | x": q})), {"x": x}, 50) for q in narrow)
    assert fast.mutual_information == pytest.approx(slow.mutual_information, abs=1e-5)
    assert 0.2 < fast.mutual_information < math.log(4)


def test_holes_are_seen():
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(1), "x | z": likelihood(torch.ones(2, 1), torch.zeros(2), 1.0)})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(Holes(MLP(4, [], 2)))}))
    x = torch.tensor([[1.0, math.nan], [0.0, 2.0], [math.nan, math.nan]])
    found = information(vae, {"x": x})
    d = vae.posterior({"x": x})["z"]
    exact = (0.5 * (d.variance + d.mean.square() - 1) - d.stddev.log()).mean()
    assert found.rate == pytest.approx(float(exact), abs=ROUNDING)
    assert np.isfinite([found.distortion, found.mutual_information, found.marginal_kl]).all()


def test_neither_the_generator_nor_the_model_is_moved():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    p = BayesNet({"z": StandardNormal(2), "x | z": likelihood(torch.ones(3, 2), torch.zeros(3), 1.0)})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(aevb.Rows(net))}))
    net[1].eval()
    x = torch.randn(9, 3)
    kept = {name: value.clone() for name, value in vae.state_dict().items()}
    before = torch.get_rng_state()
    first, drawn = information(vae, {"x": x}), aggregated(vae, {"x": x})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert information(vae, {"x": x}).mutual_information == first.mutual_information
    assert information(vae, {"x": x}, seed=1).mutual_information != first.mutual_information
    assert torch.equal(aggregated(vae, {"x": x})["z"], drawn["z"])
    assert net.training
    assert not net[1].training
    assert all(torch.equal(value, kept[name]) for name, value in vae.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in vae.parameters())
    assert not drawn["z"].requires_grad


def test_figures_are_float64_of_a_float32_model():
    torch.manual_seed(0)
    model = linear()
    vae, x = model.vae(), model.sample(200)
    exact = information(vae, {"x": x}, 50)
    found = information(vae.float(), {"x": x}, 50)
    assert found.kl["z"].dtype == torch.float64
    error = 4 * exact.mutual_information_std_error * math.sqrt(2)
    assert found.mutual_information == pytest.approx(exact.mutual_information, abs=error)
    assert found.rate == pytest.approx(exact.rate, abs=1e-5)


def test_what_is_refused():
    model = linear()
    vae, x = model.vae(), model.sample(3)
    for samples, pack in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match=f"`samples` and `pack` must be at least 1; got {samples} and {pack}"):
            information(vae, {"x": x}, samples, pack=pack)
    with pytest.raises(InputError, match="`pack` must be at least 1; got 0"):
        aggregated(vae, {"x": x}, pack=0)
    for function in (information, aggregated):
        with pytest.raises(InputError, match="nothing is latent"):
            function(vae, {"x": x, "z": torch.zeros(3, 2)})
    with torch.no_grad():
        vae.p.conditional("x").net.last.bias.fill_(math.nan)
    with pytest.raises(InputError, match="not a number for 3 of 3 rows, the first of them 0, 1, 2"):
        information(vae, {"x": x})
