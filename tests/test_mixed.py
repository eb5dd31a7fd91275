"""Rows whose columns are of different kinds: the parts by themselves, holes, what q sees, and what a fit makes of them.

Where a comparison is of Monte Carlo with a closed form, it allows four standard errors, told beside it.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import aevb
from aevb import MLP, BayesNet, Columns, InputError, Mixed, ModelConfig
from aevb.config import Kind
from aevb.distributions import log_prob

pytestmark = pytest.mark.usefixtures("double")

KINDS = ("count", "binary", "continuous", "categorical:3", "positive", "ordinal:2:5", "binary", "categorical:3")
ROW = torch.tensor([4.0, 1.0, -3.0, 2.0, 0.7, 5.0, 0.0, 0.0])


def likelihood(kinds: tuple[str, ...] = KINDS, inputs: int = 2) -> Mixed:
    torch.manual_seed(0)
    width, columns = Mixed.width(kinds), len(kinds)
    made = Mixed(
        MLP(inputs, [5], width), kinds, torch.randn(columns), 0.5 + torch.rand(columns), 0.2 * torch.rand(columns)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def alone(made: Mixed, j: int) -> Mixed:
    """The likelihood of one column, with what the net says of it."""
    heads = [Kind.parse(kind).heads for kind in made.kinds]
    start = sum(heads[:j])

    class Part(nn.Module):
        def forward(self, *parents: Tensor) -> Tensor:
            return made.net(*parents)[..., start : start + heads[j]]

    one = Mixed(Part(), made.kinds[j : j + 1], made.loc[j], made.scale[j], made.resolution[j])
    same = [i for i in range(j) if made.kinds[i] in ("continuous", "positive")]
    with torch.no_grad():
        if hasattr(one, "raw_noise"):
            one.raw_noise.copy_(made.raw_noise[len(same)])  # KINDS names each once, in the order of first mention
        if hasattr(one, "log_theta"):
            one.log_theta.copy_(made.log_theta)
        if hasattr(one, "heap_0"):  # the sixth kind in order of first mention
            one.heap_0.copy_(made.heap_5)
    return one


def test_a_row_is_its_columns():
    """Density, mean and variance of each column are what it has by itself, in the order of the columns."""
    made, z = likelihood(), torch.randn(7, 2)
    d = made(z)
    x = d.sample()
    parts = [alone(made, j)(z) for j in range(len(KINDS))]
    each = torch.stack([part.log_prob(x[:, j : j + 1]) for j, part in enumerate(parts)], -1)
    torch.testing.assert_close(d.base_dist.log_prob(x), each)
    torch.testing.assert_close(d.log_prob(x), each.sum(-1))
    torch.testing.assert_close(d.mean, torch.cat([part.mean for part in parts], -1))
    torch.testing.assert_close(d.variance, torch.cat([part.variance for part in parts], -1))


def test_a_row_of_all_kinds_is_normalised():
    """Sum over the finite columns, times the trapezoidal rule over a real one in its own units."""
    kinds = ("binary", "positive", "ordinal:-1:1", "categorical:3")
    made = likelihood(kinds)
    d = made(torch.randn(2))
    m, s = float(made.loc[1]), float(made.scale[1])
    u = torch.linspace(-25, 25, 4001)
    x, width = (m + s * u).exp(), s * (u[1] - u[0])
    finite = list(itertools.product((0.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 1.0, 2.0)))
    rows = torch.tensor([[b, float("nan"), o, c] for b, o, c in finite]).unsqueeze(1).repeat(1, len(x), 1)
    rows[:, :, 1] = x
    assert float((d.log_prob(rows).detach().exp() * x * width).sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("gone", [[], [0], [2, 4], [3, 5, 7], list(range(8))])
def test_holes_leave_their_factors_out(gone):
    made, z = likelihood(), torch.randn(2)
    known = torch.ones(8, dtype=torch.bool)
    known[gone] = False
    d = made(z)
    found = log_prob(d, torch.where(known, ROW, torch.nan), known)
    torch.testing.assert_close(found, d.base_dist.log_prob(ROW)[known].sum())
    gradients = torch.autograd.grad(found, list(made.parameters()), allow_unused=True)
    assert all(bool(each.isfinite().all()) for each in gradients if each is not None)


def test_a_density_cannot_narrow_below_the_step_of_its_values():
    """At the narrowest that a net can say, density times step stays below 0.4: no more than a mass."""
    step = 0.25
    d = Mixed(nn.Identity(), ["continuous"], resolution=step)
    with torch.no_grad():
        d.raw_noise.fill_(-1000.0)
    assert float(d(torch.zeros(1)).log_prob(torch.zeros(1)).detach()) + math.log(step) < math.log(0.4)


def test_an_ordinal_column_starts_between_its_shares_and_a_smooth_law():
    """Rows enough, and the spike at 40 is there from the first; a few rows keep near the rounded logistic."""
    torch.manual_seed(0)
    heaped = torch.where(torch.rand(20_000) < 0.4, 40.0, 1 + 98 * torch.rand(20_000)).round()
    for rows, share in ((20_000, 0.38), (20, 0.05)):
        x = torch.stack([heaped[:rows], torch.randn(rows)], 1)
        config = ModelConfig(features=2, likelihood="mixed", kinds=("ordinal:1:99", "continuous"), latents=1)
        vae = aevb.build_vae(config, x)
        with torch.no_grad():
            vae.p.conditional("x").net.last.weight.zero_()
            family = vae.p.distribution("x", {"z": torch.zeros(1, 1)}).base_dist.parts[0].family
        level = torch.bincount(x[:, 0].long(), minlength=100)[1:]
        smooth = (family.logits - vae.p.conditional("x").heap_0).softmax(-1).detach()
        exact = (level + 5 * 99 * smooth) / (rows + 5 * 99)
        torch.testing.assert_close(family.probs, exact.reshape(family.probs.shape))
        assert (float(family.probs[0, 0, 39]) > share) == (rows > 100)


def test_training_does_not_chase_ties():
    """A column of three values, each told exactly by another: its noise stays above their step."""
    torch.manual_seed(0)
    code = torch.randint(0, 3, (300,)).double()
    x = torch.stack([code, 0.5 * code], 1)
    config = ModelConfig(features=2, likelihood="mixed", kinds=("categorical:3", "continuous"), latents=1, hidden=(16,))
    run = aevb.fit(aevb.build_vae(config, x), {"x": x}, aevb.TrainConfig(steps=300, validation=0.0))
    step = run.vae.p.conditional("x").resolution[1]
    torch.testing.assert_close(step, torch.tensor(0.5))
    with torch.no_grad():
        d = run.vae.p.distribution("x", {"z": torch.randn(50, 1)})
        assert bool((d.base_dist.parts[1].family.scale >= step).all())


def test_counts_with_zeros_of_their_own_cost_little():
    """A tenth of the rows have counts around 2000, the others none: within 0.2 nats of the law they are drawn from.

    A negative binomial alone gives such a zero and such a count in one row thousands of nats less, and learns badly.
    """
    rng, n = np.random.default_rng(0), 800
    some, law = rng.random(n) < 0.1, stats.nbinom(40, 40 / (40 + 2000))
    count = np.where(some, law.rvs(n, random_state=rng), 0)
    other = rng.random(n) < np.where(some, 0.8, 0.3)
    share = np.where(some, 0.8, 0.3)
    exact = np.where(some, math.log(0.1) + law.logpmf(count), math.log(0.9)) + np.log(np.where(other, share, 1 - share))
    x = torch.as_tensor(np.stack([count, other], 1).astype(float))
    torch.manual_seed(0)
    config = ModelConfig(features=2, likelihood="mixed", kinds=("count", "binary"), latents=2, hidden=(32,))
    run = aevb.fit(aevb.build_vae(config, x), {"x": x}, aevb.TrainConfig(steps=300, learning_rate=5e-3, validation=0.0))
    lacking = exact - aevb.log_marginal(run.vae, {"x": x}, 300).log_prob.numpy()
    error = lacking.std() / math.sqrt(n)
    assert -4 * error < lacking.mean() < 0.2


def test_what_q_sees():
    """Logarithms of positive values, log(1 + x) of counts, categories one-hot, the mask last; NaN nowhere."""
    loc, scale = torch.arange(8.0), torch.arange(1.0, 9.0)
    seen = Columns(nn.Identity(), KINDS, loc, scale)(torch.stack([ROW, torch.full((8,), torch.nan)]))
    assert seen.shape == (2, Columns.width(KINDS))
    link = torch.tensor([math.log(5), 1, -3, math.nan, math.log(0.7), 5, 0, math.nan])
    link = (link - loc) / scale
    numbers = link[[0, 1, 2]], torch.tensor([0.0, 0, 1]), link[[4, 5, 6]], torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(seen[0], torch.cat([*numbers, torch.ones(8)]))
    torch.testing.assert_close(seen[1], torch.zeros(Columns.width(KINDS)))


def table(rows: int = 500) -> Tensor:
    torch.manual_seed(1)
    z = torch.randn(rows)
    columns = (
        torch.poisson((1 + 0.5 * z).exp()),
        (z + torch.randn(rows) > 0).double(),
        100 + 20 * z + 5 * torch.randn(rows),
        (z + 0.3 * torch.randn(rows)).clamp(-0.99, 1.99).floor() + 1,
        (3 * z).exp(),
        (3.5 + z).round().clamp(2, 5),
        (z > 1).double(),
        torch.randint(0, 3, (rows,)).double(),
    )
    return torch.stack(columns, 1)


def test_a_model_starts_at_the_marginals():
    """Before training, with the weights of the last layer at zero: each column's mean and shares."""
    x = table()
    x[::3, 3] = torch.nan
    config = ModelConfig(features=8, likelihood="mixed", kinds=KINDS, latents=2, hidden=(8,))
    vae = aevb.build_vae(config, x)
    with torch.no_grad():
        vae.p.conditional("x").net.last.weight.zero_()
    d = vae.p.distribution("x", {"z": torch.zeros(1, 2)})
    mean = x.nanmean(0)
    for j in (0, 1, 2, 6):
        assert float(d.mean[0, j].detach()) == pytest.approx(float(mean[j]), rel=1e-6, abs=1e-3)
    counts = torch.bincount(x[~x[:, 3].isnan(), 3].long(), minlength=3) + 0.5
    torch.testing.assert_close(d.base_dist.states[3][0].detach(), counts / counts.sum())
    torch.testing.assert_close(d.base_dist.parts[2].family.loc.detach()[0], mean[2:3])


def test_a_model_is_saved_and_loaded(tmp_path):
    x = table(60)
    config = ModelConfig(features=8, likelihood="mixed", kinds=KINDS, latents=2, hidden=(8,))
    run = aevb.fit(aevb.build_vae(config, x), {"x": x}, aevb.TrainConfig(steps=5), out=tmp_path / "run")
    again = aevb.load(tmp_path / "run")
    assert again.vae.config == config
    found, wanted = (aevb.log_marginal(each.vae, {"x": x[:5]}, 64).log_prob for each in (again, run))
    torch.testing.assert_close(found, wanted)


def test_nothing_observed_has_probability_one():
    x = table(40)
    config = ModelConfig(features=8, likelihood="mixed", kinds=KINDS, latents=2, hidden=(8,))
    vae = aevb.build_vae(config, x)
    x[3] = torch.nan
    found = aevb.log_marginal(vae, {"x": x[:5]}, 64)
    assert float(found.log_prob[3]) == 0.0
    assert float(found.std_error[3]) == 0.0
    assert bool((found.log_prob[[0, 1, 2, 4]] != 0).all())


def test_imputed_categories_are_the_most_probable():
    """Against the posterior by quadrature over the latent: code, chance of another, and shares of the draws."""
    kinds = ("categorical:3", "positive", "categorical:3")
    made = likelihood(kinds, 1)
    with torch.no_grad():
        made.net.last.weight.mul_(3)
    q = aevb.DiagonalNormal(Columns(MLP(Columns.width(kinds), [4], 2), kinds))
    vae = aevb.VAE(BayesNet({"z": aevb.StandardNormal(1), "x | z": made}), BayesNet({"z | x": q}))
    x = torch.tensor([[0.0, 2.0, math.nan], [math.nan, 0.5, math.nan]])
    found = aevb.impute(vae, {"x": x}, 20_000, draws=2000)
    z = torch.linspace(-8, 8, 2001).reshape(-1, 1, 1)
    with torch.no_grad():
        d = vae.p.distribution("x", {"z": z})
        joint = log_prob(d, x, ~x.isnan()) - 0.5 * z[..., 0].square()
        for row, column in ((0, 2), (1, 0), (1, 2)):
            probs = (joint.softmax(0)[:, row : row + 1] * d.base_dist.states[column][:, 0]).sum(0)
            assert int(found.mean["x"][row, column]) == int(probs.argmax())
            ess = float(found.ess[row])
            assert abs(float(found.std["x"][row, column]) - float(1 - probs.max())) < 4 * 0.5 / ess**0.5
            shares = F.one_hot(found.draws["x"][:, row, column].long(), 3).double().mean(0)
            allowed = 4 * ((probs * (1 - probs)) * (1 / 2000 + 1 / ess)).sqrt()
            assert bool(((shares - probs).abs() < allowed).all())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Kind.parse("number"), "binary, categorical:C"),
        (lambda: Kind.parse("categorical"), "'categorical'"),
        (lambda: Kind.parse("categorical:1"), "at least two values"),
        (lambda: Kind.parse("ordinal:5:5"), "at least two values"),
        (lambda: Kind.parse("ordinal:a:5"), "ordinal:a:5"),
        (lambda: Kind.parse("binary:2"), "binary:2"),
        (lambda: Mixed(MLP(2, [], 3), ["binary"]), "width 1"),
        (lambda: Mixed(nn.Identity(), ["binary"])(torch.zeros(2, 3)), "width 1"),
        (lambda: Mixed(MLP(2, [], 1), ["continuous"], scale=0.0), "`scale`"),
        (lambda: Columns(nn.Identity(), ["binary"])(torch.zeros(2, 3)), "1 columns"),
        (lambda: ModelConfig(features=2, likelihood="mixed", kinds=("binary",)), "one kind a column"),
        (lambda: ModelConfig(features=1, kinds=("binary",)), "`kinds` goes with"),
        (lambda: ModelConfig(features=1, likelihood="mixed", kinds=("binary",), prior="vamp"), "vamp"),
    ],
)
def test_what_does_not_fit_is_told(make, told):
    with pytest.raises(InputError, match=told):
        make()


@pytest.mark.parametrize(("column", "value"), [(0, -1.0), (0, 0.5), (1, 2.0), (3, 3.0), (4, 0.0), (5, 6.0)])
def test_a_value_that_its_kind_has_not_is_named(column, value):
    x = table(5)
    vae = aevb.build_vae(ModelConfig(features=8, likelihood="mixed", kinds=KINDS, latents=2, hidden=(8,)), x)
    x[2, column] = value
    with pytest.raises(InputError, match=rf"{value:g} in row 2, column {column} .* {KINDS[column]}"):
        aevb.elbo(vae, {"x": x})
