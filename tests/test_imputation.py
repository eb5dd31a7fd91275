"""Missing entries filled in: A4 and A9 of the closed forms, draws as well as means, and what is refused.

Where a comparison is of Monte Carlo with a closed form, it allows four standard errors, told beside it.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import aevb
from aevb import (
    MLP,
    VAE,
    BayesNet,
    Bernoulli,
    Categorical,
    Columns,
    DiagonalNormal,
    Evidence,
    Holes,
    InputError,
    Normal,
    ProductNormal,
    StandardNormal,
)
from gaussians import factorized, likelihood

pytestmark = pytest.mark.usefixtures("double")


def conditional_law(mean: Tensor, cov: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the NaN entries of a Gaussian vector given the others."""
    gone = row.isnan()
    seen = ~gone
    gain = torch.linalg.solve(cov[seen][:, seen], cov[seen][:, gone]).T
    return mean[gone] + gain @ (row - mean)[seen], cov[gone][:, gone] - gain @ cov[seen][:, gone]


class Distant(nn.Module):
    """A q that looks at the observed entries, and is far from the posterior: half its gain, a spread of its own."""

    def __init__(self, gain: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.gain, self.mean = gain, mean

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        loc = 0.5 * (x - self.mean) * seen @ self.gain.T
        return torch.cat([loc, torch.full_like(loc, 1.0)], -1)


def linear(d: int = 5, k: int = 2, s: float = 0.7) -> tuple[VAE, Tensor, Tensor]:
    """A linear-Gaussian model, and the mean and covariance of its x."""
    torch.manual_seed(0)
    w, b = torch.randn(d, k), torch.randn(d)
    cov = w @ w.T + s**2 * torch.eye(d)
    q = DiagonalNormal(Holes(Distant(w.T @ torch.linalg.inv(cov), b)))
    return VAE(BayesNet({"z": StandardNormal(k), "x | z": likelihood(w, b, s)}), BayesNet({"z | x": q})), b, cov


def holed(mean: Tensor, cov: Tensor) -> Tensor:
    """Six rows; the first has every entry, the last none."""
    x = torch.as_tensor(stats.multivariate_normal(mean.numpy(), cov.numpy()).rvs(6, random_state=0))
    for row, gone in enumerate([[], [0], [1, 3], [0, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]):
        x[row, gone] = math.nan
    return x


def test_imputation_converges_to_the_gaussian_conditional():
    """A4: the scatter over 40 seeds is its standard error; spread and mean, every missing entry, any holes.

    30 figures by Student's t with 39 degrees, a false alarm in a thousand runs for all of them together; the scatter is
    told in the figures' own units, and limited so that nothing passes for want of draws. A ratio of means is biased by
    the order of 1 / ESS, at 16,000 draws a small part of the scatter.
    """
    vae, mean, cov = linear()
    x = holed(mean, cov)
    runs = [aevb.impute(vae, {"x": x}, 16_000, seed=seed) for seed in range(40)]
    means, stds = (torch.stack([getattr(run, name)["x"] for run in runs]) for name in ("mean", "std"))
    allowed = stats.t.ppf(1 - 1e-3 / 2 / 30, 39)
    for row, value in enumerate(x):
        gone = value.isnan()
        assert torch.equal(means[0, row, ~gone], value[~gone])
        assert not stds[:, row, ~gone].any()
        if gone.any():
            exact, spread = conditional_law(mean, cov, value)
            width = spread.diagonal()
            for found, wanted, unit in ((means, exact, width.sqrt()), (stds.square(), width, width)):
                scatter = found[:, row, gone].std(0) / math.sqrt(len(runs))
                assert bool((scatter < 0.02 * unit).all())
                assert bool(((found[:, row, gone].mean(0) - wanted).abs() < allowed * scatter).all())


def test_draws_have_the_conditionals_mean_and_covariance():
    """500 draws: a chi-square for the mean, and each covariance within 4.5 of its standard errors.

    The draws pick from the same weighted latents, as many as the ESS in effect: their errors are added.
    """
    vae, mean, cov = linear()
    x = holed(mean, cov)[4:5]
    found = aevb.impute(vae, {"x": x}, 40_000, draws=500)
    gone, drawn = x[0].isnan(), found.draws["x"][:, 0]
    assert torch.equal(drawn[:, ~gone], x[0, ~gone].expand(500, -1))
    exact, spread = conditional_law(mean, cov, x[0])
    drawn, share = drawn[:, gone], 1 / 500 + 1 / float(found.ess)
    off = drawn.mean(0) - exact
    assert float(off @ torch.linalg.solve(spread, off)) / share < stats.chi2.ppf(1 - 1e-4, len(exact))
    width = spread.diagonal()
    error = ((width[:, None] * width + spread.square()) * share).sqrt()
    assert bool(((torch.cov(drawn.T) - spread).abs() < 4.5 * error).all())


def test_trained_on_holes_meets_the_oracle():
    """A9: covariance [[2, 1], [1, 2]], the first coordinate missing in half of 1000 rows; compared on the sample.

    The best of five parameters gains chi2(5) / 2n nats on the truth, at 1e-4 no more than 0.013; training may stop
    0.002 short of it. The regression of one coordinate on the other has an error of its own, paired with the oracle's.
    """
    cov = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    rng = np.random.default_rng(0)
    truth = torch.as_tensor(rng.multivariate_normal([0, 0], cov.numpy(), 1000))
    gone = torch.as_tensor(rng.permutation(1000) < 500)
    x = truth.clone()
    x[gone, 0] = math.nan
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"z": StandardNormal(1), "x | z": Normal(MLP(1, [], 2), 2, "dimension")}),
        BayesNet({"z | x": DiagonalNormal(Holes(MLP(4, [20], 2)))}),
    )
    config = aevb.TrainConfig(
        steps=1000, batch_size=500, learning_rate=0.02, schedule="cosine", validation=0.0, log_every=1000
    )
    aevb.fit(vae, {"x": x}, config)

    whole, second = (stats.multivariate_normal(cov=c).logpdf for c in (cov.numpy(), 2.0))
    exact = torch.where(gone, torch.as_tensor(second(x[:, 1])), torch.as_tensor(whole(truth)))
    assert float(exact.mean()) == pytest.approx(-2.576, abs=4 * 0.03)
    found = aevb.log_marginal(vae, {"x": x}, 2000)
    gain = float((found.log_prob - exact).mean())
    assert float(found.std_error.mean()) < 1e-3
    assert -0.002 < gain < stats.chi2.ppf(1 - 1e-4, 5) / 2000

    filled = aevb.impute(vae, {"x": x}, 2000).mean["x"][gone, 0]
    oracle = (x[gone, 1] / 2 - truth[gone, 0]).square()
    assert float(oracle.mean()) == pytest.approx(1.5, abs=4 * 0.09)
    excess = (filled - truth[gone, 0]).square() - oracle
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / math.sqrt(500) + 0.006
    # q sees which coordinate is missing: its variances are the posterior's, 1 / (1 + the precisions of what is seen).
    decoder = vae.p.conditional("x")
    each = (decoder.net.last.weight[:, 0] / nn.functional.softplus(decoder.raw_noise)).square().detach()
    spread = vae.posterior({"x": x})["z"].variance[:, 0]
    assert float(spread[gone].mean() * (1 + each[1])) == pytest.approx(1, abs=0.05)
    assert float(spread[~gone].mean() * (1 + each.sum())) == pytest.approx(1, abs=0.05)
    assert float(each[0]) > 0.5


def test_classes_and_entries_are_imputed_together():
    """Bayes' rule by hand: y of three classes, two binary entries, one of them and y missing in some rows."""
    logits = torch.tensor([[2.0, -1.0], [-0.5, 1.5], [0.3, 0.2]])
    net = MLP(3, [], 2)
    with torch.no_grad():
        net.last.weight.copy_(logits.T)
        net.last.bias.zero_()
    vae = VAE(
        BayesNet({"y": Categorical(3), "x | y": Bernoulli(net)}),
        BayesNet({"y | x": Categorical(3, Holes(MLP(4, [5], 3)))}),
    )
    nan = math.nan
    found = aevb.impute(
        vae,
        {"x": torch.tensor([[1.0, nan], [nan, nan], [1.0, 0.0]]), "y": torch.tensor([nan, 2.0, nan])},
        64,
        draws=5000,
    )
    on = logits.sigmoid()
    posterior = on[:, 0] / on[:, 0].sum()
    wanted_y = torch.stack([posterior, torch.tensor([0.0, 0.0, 1.0]), on[:, 0] * (1 - on[:, 1])])
    wanted_y = wanted_y / wanted_y.sum(1, keepdim=True)
    wanted_x = torch.tensor([[1.0, float(posterior @ on[:, 1])], on[2].tolist(), [1.0, 0.0]])
    torch.testing.assert_close(found.mean["y"], wanted_y)
    torch.testing.assert_close(found.mean["x"], wanted_x)
    torch.testing.assert_close(found.std["x"], (wanted_x * (1 - wanted_x)).sqrt())
    error = 4.5 * 0.5 / math.sqrt(5000)
    torch.testing.assert_close(found.draws["y"].mean(0), wanted_y, atol=error, rtol=0)
    torch.testing.assert_close(found.draws["x"].mean(0), wanted_x, atol=error, rtol=0)


@pytest.mark.parametrize("pack", [256, 1024, 10_000])
def test_figures_depend_on_neither_company_nor_packs(pack):
    vae, mean, cov = linear()
    x = holed(mean, cov)
    whole = aevb.impute(vae, {"x": x}, 700)
    for rows in ([3], [4, 1]):
        part = aevb.impute(vae, {"x": x[rows]}, 700, pack=pack)
        torch.testing.assert_close(part.mean["x"], whole.mean["x"][rows])
        torch.testing.assert_close(part.std["x"], whole.std["x"][rows])
        torch.testing.assert_close(part.ess, whole.ess[rows])


def test_an_exact_q_wastes_no_draw():
    """Where q is the posterior of what is seen, every weight is the same."""
    torch.manual_seed(0)
    w, b, s = torch.randn(3, 1), torch.randn(3), 0.5
    seen = torch.tensor([1.0, 0.0, 1.0])
    precision = (w[:, 0].square() * seen).sum() / s**2 + 1
    gain = torch.zeros(1, 6)
    gain[0, :3] = w[:, 0] * seen / s**2 / precision
    q = factorized(gain, -gain[:, :3] @ b, precision.rsqrt().reshape(1))
    vae = VAE(BayesNet({"z": StandardNormal(1), "x | z": likelihood(w, b, s)}), BayesNet({"z | x": q}))
    vae.q.conditional("z").net = Holes(vae.q.conditional("z").net)
    found = aevb.impute(vae, {"x": torch.tensor([[1.0, math.nan, -0.5]])}, 500)
    assert float(found.ess) == pytest.approx(500)


def silent(net: MLP) -> MLP:
    """A net that says 0."""
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.zero_()
    return net


def test_a_product_is_the_posterior_for_every_pattern_of_holes():
    """A factor for each known entry, w_j / s and (x_j - b_j) / s: 16 patterns of a factor analysis with unequal noise.

    q is N(m, C) with C^-1 = I + sum of w_j w_j^T / s_j^2 over what is known, and no draw is worth more than another:
    every log-weight is log p of the known entries, to rounding.
    """
    torch.manual_seed(0)
    d, k = 4, 3
    w, b, s = torch.randn(d, k), torch.randn(d), torch.tensor([0.5, 1.0, 0.05, 2.0])
    evidence = Evidence(silent(MLP(2 * d, [5], 2 * k)), [1] * d, k)
    with torch.no_grad():
        evidence.weight.copy_(w / s.unsqueeze(1))
        evidence.slope.copy_(1 / s)
        evidence.offset.copy_(b / s)
    decoder = likelihood(w, b, 1.0)
    decoder = Normal(decoder.net, d, "dimension")
    with torch.no_grad():
        decoder.raw_noise.copy_(s.expm1().log())
    q = ProductNormal(Holes(evidence), k, d)
    vae = VAE(BayesNet({"z": StandardNormal(k), "x | z": decoder}), BayesNet({"z | x": q}))
    known = torch.tensor(list(itertools.product([True, False], repeat=d)))
    x = torch.where(known, torch.randn(len(known), d), torch.nan)
    found = vae.posterior({"x": x})["z"]
    cov = w @ w.T + s.square().diag()
    log_weights = aevb.log_weights(vae, {"x": x}, 7)
    for row, seen in enumerate(known):
        joint = torch.cat([torch.cat([torch.eye(k), w.T], 1), torch.cat([w, cov], 1)])
        whole = torch.cat([torch.full((k,), torch.nan), x[row]])
        value = torch.where(torch.cat([torch.zeros(k).bool(), ~seen]), 0.0, whole)
        keep = torch.cat([torch.ones(k).bool(), seen])
        mean, spread = conditional_law(torch.cat([torch.zeros(k), b])[keep], joint[keep][:, keep], value[keep])
        torch.testing.assert_close(found.mean[row], mean)
        torch.testing.assert_close(found.covariance_matrix[row], spread)
        exact = stats.multivariate_normal(b[seen], cov[seen][:, seen]).logpdf(x[row, seen]) if seen.any() else 0.0
        torch.testing.assert_close(log_weights[:, row], torch.full((7,), float(exact)))


def test_a_missing_category_says_nothing():
    """Under `Columns` a column's inputs, one for each category, come and go together."""
    torch.manual_seed(0)
    kinds = ("continuous", "categorical:3")
    q = ProductNormal(Columns(Evidence(silent(MLP(6, [5], 4)), [1, 3], 2), kinds), 2, 4)
    x = torch.tensor([[0.5, math.nan], [math.nan, 2.0], [math.nan, math.nan]])
    found = q(x)
    evidence = q.net.net
    for row, (at, shown) in enumerate([([0], [0.5]), ([1, 2, 3], [0.0, 0.0, 1.0]), ([], [])]):
        w, t = evidence.weight[at], evidence.slope[at] * torch.tensor(shown) - evidence.offset[at]
        cov = torch.linalg.inv(torch.eye(2) + w.T @ w)
        torch.testing.assert_close(found.covariance_matrix[row], cov)
        torch.testing.assert_close(found.mean[row], cov @ w.T @ t)


def test_to_evidence_of_complete_rows_a_hole_is_average():
    """What the net is told of holes has no weight before one was seen; the factors of holes are gone all the same."""
    torch.manual_seed(0)
    evidence = Evidence(MLP(6, [5], 4), [1, 1, 1], 2)
    shown, known = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    holed, whole = evidence(shown, known), evidence(shown, torch.ones(1, 3))
    torch.testing.assert_close(holed[:, -4:], whole[:, -4:])
    assert not holed[0, 2:4].any()
    assert whole[0, 2:4].all()
    assert holed[0, 7] == 0
    with pytest.raises(InputError, match="Evidence takes 3 inputs and 3 numbers"):
        evidence(shown)


def test_what_is_refused():
    vae, mean, cov = linear()
    x = holed(mean, cov)
    with pytest.raises(InputError, match="`draws` must not be negative; got -1"):
        aevb.impute(vae, {"x": x}, draws=-1)
    with pytest.raises(InputError, match="`samples` and `pack`"):
        aevb.impute(vae, {"x": x}, 0)
    assert not aevb.impute(vae, {"x": x[:1]}, 10).mean
