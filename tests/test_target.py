"""Models with a target: one column of a table as y of p(y) p(z) p(x | y, z) with q(y | x) q(z | x, y)."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import aevb
from aevb import VAE, InputError, ModelConfig, TrainConfig
from aevb.bounds import label_weight, prepare, terms
from aevb.build import POSTERIORS

KINDS = ("continuous", "binary", "categorical:3", "positive")
TARGETS = ("binary", "categorical:3", "continuous", "positive", "count", "ordinal:1:5")


def table(rows: int = 24) -> Tensor:
    """Columns of `KINDS`, with holes."""
    x = torch.stack(
        [
            5 + 2 * torch.randn(rows),
            (torch.rand(rows) < 0.4).double(),
            torch.randint(0, 3, (rows,)).double(),
            torch.randn(rows).exp(),
        ],
        1,
    )
    return x.masked_fill(torch.rand(rows, 4) < 0.2, math.nan)


def target(kind: str, rows: int = 24) -> Tensor:
    """Values of a target, missing in every third row."""
    drawn = {"continuous": torch.randn(rows), "positive": 100 * torch.randn(rows).exp()}
    drawn |= {"count": torch.randint(0, 9, (rows,)).double(), "ordinal:1:5": torch.randint(1, 6, (rows,)).double()}
    drawn |= {"binary": torch.randint(0, 2, (rows,)).double(), "categorical:3": torch.randint(0, 3, (rows,)).double()}
    y = drawn[kind]
    y[::3] = math.nan
    return y if kind in ("binary", "categorical:3") else y.unsqueeze(1)


def build(kind: str, x: Tensor, y: Tensor, **settings: object) -> VAE:
    config = ModelConfig(
        features=4, likelihood="mixed", kinds=KINDS, target=kind, latents=2, hidden=(6,), holes=True, **settings
    )
    vae = aevb.build_vae(config, x, y)
    with torch.no_grad():
        for parameter in vae.parameters():  # away from where it starts
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae


class ByRow:
    """The same noise for a row whatever its company."""

    def __init__(self, noise: Tensor, rows: Tensor) -> None:
        self.noise = noise[:, rows]

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        return self.noise[..., : shape[-1]].expand(shape)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", TARGETS)
def test_a_mixed_batch_is_the_two_pure_ones(kind):
    """Bound and weights of rows with and without y, side by side and apart."""
    torch.manual_seed(0)
    x, y = table(), target(kind)
    vae, eps = build(kind, x, y), torch.randn(5, 24, 2)
    rows = torch.arange(24)
    bare = y.reshape(24, -1).isnan().all(1)

    def both(values: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        inside = prepare(vae, values)
        made = [terms(vae, inside, 5, kl=kl, noise=lambda _: ByRow(eps, rows)) for kl in ("auto", "sampled")]
        return made[0].weighted().mean(0).detach(), made[1].log_weights().detach()

    bound, weights = both({"x": x, "y": y}, rows)
    known, unknown = both({"x": x[~bare], "y": y[~bare]}, rows[~bare]), both({"x": x[bare]}, rows[bare])
    for part, (own, log_w) in ((~bare, known), (bare, unknown)):
        torch.testing.assert_close(bound[part], own, rtol=0, atol=1e-10)
        torch.testing.assert_close(weights[:, part], log_w, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double")
def test_classes_are_summed_over_exactly():
    """p(x) is the sum of p(x, y) over the classes, draw by draw."""
    torch.manual_seed(1)
    x, y = table(), target("categorical:3")
    vae, eps, rows = build("categorical:3", x, y), torch.randn(4, 24, 2), torch.arange(24)

    def log_w(values: dict[str, Tensor]) -> Tensor:
        return terms(vae, prepare(vae, values), 4, kl="sampled", noise=lambda _: ByRow(eps, rows)).log_weights()

    each = [log_w({"x": x, "y": torch.full((24,), float(c))}) for c in range(3)]
    torch.testing.assert_close(log_w({"x": x}), torch.stack(each).logsumexp(0), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["continuous", "positive"])
def test_densities_are_in_the_units_of_the_target(kind):
    """In thousandths of a unit log p(x, y) is lower by log 1000 where y is known, and log p(x) what it was."""
    x, y, found = table(), target(kind), []
    for factor in (1.0, 1000.0):
        torch.manual_seed(3)
        vae = build(kind, x, factor * y)
        found.append((vae, aevb.elbo(vae, {"x": x, "y": factor * y}, kl="sampled")))
    (vae, one), (_, other) = found
    vae.requires_grad_(False)
    known = (~y[:, 0].isnan()).double()
    torch.testing.assert_close(one - other, math.log(1000) * known, rtol=0, atol=1e-8)
    d, (loc, scale) = vae.p.distribution("y", {}), (vae.p.conditional("y").loc, vae.p.conditional("y").scale)
    inner = vae.p.conditional("y").inner().base_dist
    at, sigma = float(loc + scale * inner.loc), float(scale * inner.scale)
    law = stats.lognorm(sigma, scale=math.exp(at)) if kind == "positive" else stats.norm(at, sigma)
    assert float(d.log_prob(torch.tensor([7.0]))) == pytest.approx(law.logpdf(7.0), abs=1e-10)


def test_a_model_starts_at_the_rows_and_knows_every_posterior():
    torch.manual_seed(4)
    x, y = table(), target("categorical:3")
    share = torch.bincount(y[~y.isnan()].long(), minlength=3) + 0.5
    for posterior in POSTERIORS:
        config = ModelConfig(
            features=4, likelihood="mixed", kinds=KINDS, target="categorical:3", latents=2, hidden=(6,), holes=True,
            posterior=posterior,
        )  # fmt: skip
        vae = aevb.build_vae(config, x, y)
        assert (vae.p.keys, vae.q.keys) == (("y", "z", "x | y, z"), ("y | x", "z | x, y"))
        torch.testing.assert_close(vae.p.distribution("y", {}).mean.detach(), (share / share.sum()).float())
        assert aevb.elbo(vae, {"x": x, "y": y}).isfinite().all()
    made = aevb.build_vae(ModelConfig(features=4, likelihood="mixed", kinds=KINDS, target="positive", latents=2))
    assert made.p.sample(50)["y"].min() > 0


@pytest.mark.parametrize("kind", ["binary", "positive"])
def test_training_learns_and_a_saved_run_predicts_the_same(kind, tmp_path):
    """y follows the first column; q(y | x) finds it, held-out rows judge it, and a loaded run says the same."""
    torch.manual_seed(5)
    x, y = table(200), target(kind, 200)
    x[:, 0] = x[:, 0].nan_to_num(5.0)
    signal = (x[:, 0] - 5) / 2
    made = (signal > 0).double() if kind == "binary" else (signal.unsqueeze(1) + 3).exp()
    y = torch.where(y.isnan(), y, made)
    values = {"x": x.float(), "y": y.float()}
    config = ModelConfig(features=4, likelihood="mixed", kinds=KINDS, target=kind, latents=2, hidden=(16,), holes=True)
    vae = aevb.build_vae(config, values["x"], values["y"])
    known = ~y.reshape(200, -1).isnan().all(1)
    objective = aevb.with_classifier("y", label_weight(200, int(known.sum())))
    before = float(aevb.log_q(vae, values, "y").detach().sum())
    settings = TrainConfig(steps=70, learning_rate=3e-2, validate_every=35, log_every=70, checkpoint_every=200)
    run = aevb.fit(vae, values, settings, objective=objective, out=tmp_path / "run")
    assert float(aevb.log_q(vae, values, "y").detach().sum()) > before + 40
    again = aevb.load(tmp_path / "run").vae
    for one, other in zip(vae.q.distribution("y", values).mean, again.q.distribution("y", values).mean, strict=True):
        assert torch.equal(one, other)
    # What chose the weights is the objective of the held-out rows, not their bound.
    held = {name: value[aevb.training.split_rows(200, settings)[1]] for name, value in values.items()}
    bound = torch.stack([aevb.elbo(vae, held).detach().mean() for _ in range(20)])
    beside = objective.weight * aevb.log_q(vae, held, "y").detach().mean()
    best = max(record["validation"] for record in run.history if "validation" in record)
    assert abs(best - float(bound.mean() + beside)) < 5 * float(bound.std())


def test_targets_that_make_no_model_are_told():
    x = table()
    with pytest.raises(InputError, match="`target` goes with likelihood mixed"):
        ModelConfig(features=4, target="binary")
    with pytest.raises(InputError, match="column's kind"):
        ModelConfig(features=4, likelihood="mixed", kinds=KINDS, target="colour")
    config = ModelConfig(features=4, likelihood="mixed", kinds=KINDS, target="continuous", latents=2)
    with pytest.raises(InputError, match="`y` has no known value"):
        aevb.build_vae(config, x, torch.full((24,), math.nan))
    with pytest.raises(InputError, match="`y` is constant"):
        aevb.build_vae(config, x, torch.full((24,), 3.0))
    many = ModelConfig(features=4, likelihood="mixed", kinds=KINDS, target="categorical:5000", latents=2, holes=True)
    with pytest.raises(InputError, match=r"5000 evaluations a draw.*at most 4096.*MAX_STATES"):
        aevb.elbo(aevb.build_vae(many, x), {"x": x})
