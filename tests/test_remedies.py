"""Remedies (N19): weights of the KL, free bits, total correlation, collapse; and what is refused, by name."""

from __future__ import annotations

import itertools
import logging
import math
import re

import pytest
import torch
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
    FullNormal,
    InputError,
    Normal,
    PlanarFlow,
    StandardNormal,
    SylvesterFlow,
    TrainConfig,
)
from aevb.bounds import estimate, free_bits_kl, terms, total_correlation
from aevb.training.loop import _Trainer
from aevb.training.schedules import kl_weight

pytestmark = pytest.mark.usefixtures("double")


class Told(nn.Module):
    """q(z | x) whose parameters are given by hand, a row each."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc, self.raw = nn.Parameter(loc), nn.Parameter(scale.expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.loc, self.raw], -1)


def pair(loc: Tensor, scale: Tensor, d: int = 2) -> VAE:
    dims = loc.shape[-1]
    return VAE(
        BayesNet({"z": StandardNormal(dims), "x | z": Normal(MLP(dims, [], d), d)}),
        BayesNet({"z | x": DiagonalNormal(Told(loc, scale))}),
    )


def with_kl(*kl: float) -> VAE:
    """Rows whose one-dimensional q has these KLs: mean sqrt(2 KL), scale 1."""
    loc = torch.tensor(kl).mul(2).sqrt().unsqueeze(-1)
    return pair(loc, torch.ones_like(loc))


def test_free_bits_look_at_the_mean_of_the_minibatch():
    """KLs 0.1 and 5, threshold 1: their mean 2.55 is above it, so that value and gradient are whole."""
    vae = with_kl(0.1, 5.0)
    found = terms(vae, {"x": torch.zeros(2, 2)})
    plain = found.node_kl("z").sum(-1)
    freed = free_bits_kl(found, 1.0, 0)
    torch.testing.assert_close(plain.flatten(), torch.tensor([0.1, 5.0]))
    torch.testing.assert_close(freed.flatten(), plain.flatten())
    loc = vae.q.conditional("z").net.loc
    whole, free = (torch.autograd.grad(kl.mean(), loc, retain_graph=True)[0] for kl in (plain, freed))
    torch.testing.assert_close(free, whole)
    assert bool((whole != 0).all())


def test_free_bits_below_the_threshold_cost_the_threshold_and_have_no_gradient():
    vae = with_kl(0.1, 0.3)
    found = terms(vae, {"x": torch.zeros(2, 2)})
    freed = free_bits_kl(found, 1.0, 0)
    torch.testing.assert_close(freed.mean(), torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(freed.mean() + 0 * found.node_kl("z").sum(), vae.q.conditional("z").net.loc)
    assert not bool(gradient.any())


def test_free_bits_by_groups():
    """Four dimensions of KL 0.1, 0.5, 2, 3 in every row: sum over groups of max(threshold, sum in the group)."""
    kl = torch.tensor([0.1, 0.5, 2.0, 3.0])
    loc = (2 * kl).sqrt().expand(6, 4).clone()
    found = terms(pair(loc, torch.ones(6, 4)), {"x": torch.zeros(6, 2)})
    for groups, expected in ((0, 1 + 1 + 2 + 3), (4, 1 + 1 + 2 + 3), (2, 1 + 5), (1, 5.6)):
        freed = free_bits_kl(found, 1.0, groups)
        torch.testing.assert_close(freed.mean(), torch.tensor(float(expected)))
    with pytest.raises(InputError, match=r"free_bits_groups.*`z`.*4.*3"):
        free_bits_kl(found, 1.0, 3)


def test_free_bits_of_a_full_covariance_split_by_dimension_and_of_a_flow_do_not():
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(4), "x | z": Normal(MLP(4, [], 2), 2)})
    full = VAE(p, BayesNet({"z | x": FullNormal(MLP(2, [4], 24), 4)}))
    assert terms(full, {"x": torch.randn(5, 2)}).node_kl("z").shape[-1] == 4
    flow = VAE(p, BayesNet({"z | x": PlanarFlow(MLP(2, [4], PlanarFlow.width(4, 2)), 4, 2)}))
    found = terms(flow, {"x": torch.randn(5, 2)})
    assert found.node_kl("z").shape[-1] == 1
    with pytest.raises(InputError, match=r"does not split by dimension"):
        free_bits_kl(found, 1.0, 2)


def trainer(config: TrainConfig, objective: str = "elbo", rows: int = 40) -> _Trainer:
    torch.manual_seed(0)
    x = torch.randn(rows, 3) @ torch.randn(3, 4)
    vae = aevb.build_vae(aevb.ModelConfig(features=4, latents=2, hidden=(8,)), x)
    return _Trainer(vae, {"x": x}, config, objective, None, {})


@pytest.mark.parametrize(("settings", "shaped"), [
    ({}, lambda f: f.weighted()),
    ({"beta": 4.0}, lambda f: f.reconstruction - 4 * f.node_kl("z").sum(-1)),
    ({"free_bits": 0.7}, lambda f: f.reconstruction - free_bits_kl(f, 0.7, 0)),
    ({"free_bits": 0.7, "free_bits_groups": 1}, lambda f: f.reconstruction - free_bits_kl(f, 0.7, 1)),
    ({"tc_weight": 3.0}, lambda f: f.weighted() - 2 * total_correlation(f)),
    ({"beta": 2.0, "free_bits": 0.7}, lambda f: f.reconstruction - 2 * free_bits_kl(f, 0.7, 0)),
])  # fmt: skip
def test_the_objective_is_shaped_and_the_bound_is_not(settings, shaped):
    """What is differentiated is the formula; the bound beside it is the ELBO of the same draws."""
    made = trainer(TrainConfig(steps=10, batch_size=20, validation=0.0, **settings))
    values = made.batch(0)
    torch.manual_seed(1)
    loss, bound, _ = made.inner._loss(values, kl_weight(made.config, 5))
    torch.manual_seed(1)
    found = estimate(made.vae, values)
    torch.testing.assert_close(-loss, shaped(found).mean())
    torch.testing.assert_close(bound, found.weighted().mean())


def test_total_correlation_of_independent_and_dependent_codes():
    """Codes a thousand scales apart: log q(z) and its marginals count the rows that share a value.

    On a grid of 8 by 8 each coordinate has 8 values, so that TC = log 8 + log 8 - log 64 = 0. On a diagonal of 64
    values TC = 2 log 64 - log 64. Exact but for rounding.
    """
    grid = torch.tensor(list(itertools.product(range(8), repeat=2))).double()
    diagonal = torch.arange(64).double().unsqueeze(-1).expand(64, 2).clone()
    for loc, expected in ((grid, 0.0), (diagonal, math.log(64))):
        found = terms(pair(loc, torch.full_like(loc, 1e-3)), {"x": torch.zeros(64, 2)})
        torch.testing.assert_close(total_correlation(found).mean(), torch.tensor(expected), rtol=0, atol=1e-9)


def test_tc_needs_a_factorized_gaussian():
    p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 2), 2)})
    vae = VAE(p, BayesNet({"z | x": FullNormal(MLP(2, [4], 8), 2)}))
    with pytest.raises(InputError, match=r"tc_weight.*`z`.*factorized"):
        aevb.fit(vae, {"x": torch.randn(20, 2)}, TrainConfig(steps=1, tc_weight=2.0, validation=0.0))


def test_cyclical_annealing():
    """Four cycles of 100 steps, each with a rise over 50: Fu et al. (2019) with R = 0.5; and its end stays at beta."""
    config = TrainConfig(steps=400, kl_warmup_steps=50, kl_cycles=4, beta=2.0, validation=0.0)
    weights = [kl_weight(config, step) for step in range(401)]
    for cycle in range(4):
        for since in (0, 10, 25, 49, 50, 80, 99):
            assert weights[100 * cycle + since] == pytest.approx(2 * min(1.0, since / 50))
    assert weights[400] == 2.0
    with pytest.raises(InputError, match=r"`kl_cycles`.*`kl_warmup_steps`"):
        TrainConfig(steps=400, kl_warmup_steps=101, kl_cycles=4)


@pytest.mark.parametrize(("settings", "objective", "pattern"), [
    ({"gradient": "stl", "samples": 5}, "iwae", "stl"),
    ({"gradient": "dreg"}, "elbo", "dreg"),
    ({"free_bits": 1.0, "samples": 5}, "iwae", "free_bits"),
    ({"tc_weight": 2.0, "samples": 5}, "iwae", "tc_weight"),
    ({"discrete": "relax", "samples": 5}, "iwae", "relax"),
    ({"gradient": "stl"}, lambda vae, values, kl_weight: aevb.elbo(vae, values), r"gradient.*bound"),
])  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(settings, objective, pattern):
    with pytest.raises(InputError, match=pattern):
        trainer(TrainConfig(steps=1, validation=0.0, **settings), objective)


@pytest.mark.parametrize("bad", [
    {"free_bits_groups": 2}, {"tc_weight": 2.0, "beta": 3.0}, {"beta": -1.0}, {"gradient": "best"}, {"kl_cycles": 0},
    {"temperature": 0.0}, {"discrete": "guess"},
])  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        TrainConfig(**bad)


@pytest.mark.parametrize("flow", [PlanarFlow, SylvesterFlow])
def test_gradient_estimators_need_the_density_at_a_point(flow):
    """Planar and Sylvester flows know their own draws only: refused with the reason, plain gradients work."""
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 3), 3)})
    vae = VAE(p, BayesNet({"z | x": flow(MLP(3, [4], flow.width(2, 2)), 2, 2)}))
    x = torch.randn(4, 3)
    assert aevb.elbo(vae, {"x": x}).shape == (4,)
    with pytest.raises(InputError, match="no inverse"):
        aevb.elbo(vae, {"x": x}, gradient="stl")
    with pytest.raises(InputError, match="no inverse"):
        aevb.iwae(vae, {"x": x}, 3, gradient="dreg")


def test_gradient_estimators_refuse_sampled_classes():
    torch.manual_seed(0)
    p = BayesNet({"y": Categorical(3), "x | y": Normal(MLP(3, [], 3), 3)})
    vae = VAE(p, BayesNet({"y | x": Categorical(3, MLP(3, [], 3))}))
    with pytest.raises(InputError, match=r"stl.*sum"):
        aevb.elbo(vae, {"x": torch.randn(4, 3)}, gradient="stl", discrete="sample")


def test_collapse_is_named(caplog):
    """A decoder that ignores z: every dimension dies, and the warning names the node, the step and what to try."""
    torch.manual_seed(0)
    x = torch.randn(200, 3)

    class Deaf(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0 * z[..., :1].expand(*z.shape[:-1], 3)

    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Normal(Deaf(), 3)}),
        BayesNet({"z | x": DiagonalNormal(MLP(3, [8], 4))}),
    )
    config = TrainConfig(steps=600, learning_rate=2e-2, validation=0.0, log_every=100)
    with caplog.at_level(logging.WARNING, logger="aevb"):
        run = aevb.fit(vae, {"x": x}, config)
    told = [record.message for record in caplog.records if "collapse" in record.message]
    assert len(told) == 1
    assert re.search(r"`z`.*kl_warmup_steps.*free_bits", told[0])
    assert run.history[-1]["dead"] == {"z": [0, 1]}


def test_single_dead_dimensions_are_named_at_the_end(caplog):
    """One factor under three latents, A3: two dimensions die, and are told, without a warning."""
    torch.manual_seed(0)
    x = torch.randn(500, 1) @ torch.tensor([[2.0, -1.0, 1.0]]) + 0.5 * torch.randn(500, 3)
    likelihood = Normal(MLP(3, [], 3), 3, "global")
    likelihood.raw_noise.requires_grad_(False)  # softplus(0)^2 = 0.48, above the variance 0.25 of all but one direction
    vae = VAE(
        BayesNet({"z": StandardNormal(3), "x | z": likelihood}),
        BayesNet({"z | x": DiagonalNormal(MLP(3, [], 6))}),
    )
    config = TrainConfig(steps=1000, learning_rate=2e-2, validation=0.0, log_every=100)
    with caplog.at_level(logging.INFO, logger="aevb"):
        run = aevb.fit(vae, {"x": x}, config)
    dead = run.history[-1]["dead"]["z"]
    assert len(dead) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    told = f"2 of 3 dimensions of `z` are dead (KL below 0.01 nats): {dead[0]}, {dead[1]}"
    assert any(told in record.message for record in caplog.records)


def computed() -> Deterministic:
    return Deterministic(nn.Identity())


@pytest.mark.parametrize(("p", "q", "named", "pattern"), [
    ({"z": StandardNormal(2), "x | z, c": Bernoulli(MLP(3, [], 2))}, {}, {}, r"`c`.*given"),
    ({"z": StandardNormal(2)}, {"h | z": computed(), "z | h": DiagonalNormal(MLP(2, [], 4))}, {}, "cycle"),
    ({"h": computed(), "x | h": Bernoulli(nn.Identity())}, {"h | x": computed()}, {}, "both p and q"),
    ({"z": StandardNormal(2)}, {}, {"given": "c"}, "`c`"),
    ({"z": StandardNormal(2)}, {"z": DiagonalNormal(MLP(2, [], 4))}, {"shared": "w"}, "`w`"),
])  # fmt: skip
def test_bad_wiring(p, q, named, pattern):
    with pytest.raises(InputError, match=pattern):
        VAE(BayesNet(p), BayesNet(q), **named)


@pytest.mark.parametrize(("make", "pattern"), [
    (lambda: Categorical(3, MLP(2, [], 4)), "3"),
    (lambda: Categorical(0), "classes"),
    (lambda: Categorical(3, MLP(2, [], 3), learned=True), "learned"),
])  # fmt: skip
def test_bad_models(make, pattern):
    with pytest.raises(InputError, match=pattern):
        make()


def labelled() -> VAE:
    torch.manual_seed(0)
    p = BayesNet({"y": Categorical(3), "x | y": Normal(MLP(3, [], 2), 2)})
    return VAE(p, BayesNet({"y | x": Categorical(3, MLP(2, [], 3))}))


@pytest.mark.parametrize(("y", "pattern"), [
    (torch.tensor([0, 1, 3]), r"`y`.*0 to 2.*row 2 is 3"),
    (torch.tensor([0.0, 1.5, 2.0]), r"row 1 is 1.5"),
    (torch.tensor([0.0, -1.0, 2.0]), r"row 1 is -1"),
    (torch.tensor([0, -2, 2]), r"row 1 is -2"),
    (torch.eye(4)[:3], r"one-hot \(N, 3\)"),
    (torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]), r"row 1 is \[0.5"),
    (torch.tensor([[1.0, 0, 0], [math.nan, 0, 1], [0, 0, 1]]), r"row 1"),
])  # fmt: skip
def test_bad_codes(y, pattern):
    with pytest.raises(InputError, match=pattern):
        aevb.elbo(labelled(), {"x": torch.zeros(3, 2), "y": y})


def test_samples_of_classes_are_codes_and_go_back_in():
    vae = labelled()
    drawn = vae.p.sample(50)
    assert drawn["y"].shape == (50,)
    assert set(drawn["y"].tolist()) <= {0, 1, 2}
    densities = vae.p.log_prob(drawn)
    assert densities["y"].shape == (50,)
    again = vae.p.sample(50, {"y": drawn["y"]})
    assert torch.equal(again["y"], drawn["y"])
    assert bool(aevb.elbo(vae, drawn).isfinite().all())


def test_a_latent_vector_known_in_part_of_a_row_is_refused():
    p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 2), 2)})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(2, [], 4))}))
    z = torch.tensor([[0.0, 1.0], [math.nan, math.nan], [math.nan, 0.0]])
    with pytest.raises(InputError, match=r"`z`.*row 2"):
        aevb.elbo(vae, {"x": torch.zeros(3, 2), "z": z})


def test_rows_may_leave_a_continuous_node_latent():
    """Observed in some rows, latent in the others: each row's bound is that of the two pure calls."""
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [4], 3), 3)})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(3, [4], 4))}))
    x, z = torch.randn(6, 3), torch.randn(6, 2)
    seen = torch.tensor([True, False, True, True, False, False])
    mixed = torch.where(seen.unsqueeze(-1), z, math.nan)
    log_p = sum(vae.p.log_prob({"x": x, "z": z}).values())
    for kl in ("auto", "sampled"):
        torch.manual_seed(1)
        bound = aevb.elbo(vae, {"x": x, "z": mixed}, 3, kl=kl)
        torch.manual_seed(1)
        latent = aevb.elbo(vae, {"x": x}, 3, kl=kl)
        torch.testing.assert_close(bound[seen], log_p[seen])
        torch.testing.assert_close(bound[~seen], latent[~seen])
        (gradient,) = torch.autograd.grad(bound.sum(), vae.q.conditional("z").net.last.weight)
        assert bool(gradient.isfinite().all())
    torch.manual_seed(1)
    weights = aevb.iwae(vae, {"x": x, "z": mixed}, 3)
    torch.testing.assert_close(weights[seen], log_p[seen])
