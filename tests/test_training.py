"""`fit`: update rules against torch.optim, unbiased minibatches, tiers, schedules, resuming, dropped steps."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, DiagonalNormal, ModelConfig, Normal, StandardNormal, TrainConfig
from aevb._compiler import can_compile, round_products, softplus_patterns
from aevb.training import OBJECTIVES, tiers
from aevb.training.loop import _Trainer
from aevb.training.schedules import kl_weight, learning_rate
from aevb.training.step import Step
from aevb.training.tiers import Tiers, wanted_tier
from aevb.training.updates import OptimizerState, update_eagerly, update_traced


def _model(features: int = 5, seed: int = 0, **more: object) -> VAE:
    torch.manual_seed(seed)
    return aevb.build_vae(ModelConfig(features=features, latents=2, hidden=(8,), **more))


def _rows(count: int = 64, features: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(count, features, generator=generator) @ mixing


def _weights(vae: VAE) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in vae.parameters()])


# -- update rules ------------------------------------------------------------------------------------------------------


def _reference(optimizer: str, params: list[torch.Tensor], decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return kinds[optimizer](groups, lr=1e-2)


@pytest.mark.parametrize("update", [update_eagerly, update_traced])
@pytest.mark.parametrize(
    ("optimizer", "decay", "clip"), list(itertools.product(["adam", "adamw", "sgd"], [0.0, 0.1], [0.0, 0.5]))
)
def test_updates_are_those_of_torch_optim(update, optimizer, decay, clip, double) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(4, 3).requires_grad_(), torch.randn(3).requires_grad_()]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    config = TrainConfig(optimizer=optimizer, weight_decay=decay, clip_norm=clip, average=0.9)
    state, reference = OptimizerState.start(ours, config), _reference(optimizer, theirs, decay)
    average = [p.detach().clone() for p in theirs]
    for step in range(1, 6):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        reference.step()
        mixing = 1 - min(0.9, (1 + step) / (10 + step))
        average = [a.lerp(p.detach(), mixing) for a, p in zip(average, theirs, strict=True)]
        found, ok = update(state, [g.clone() for g in grads], torch.zeros(()), torch.tensor(1e-2), config)
        assert ok
        torch.testing.assert_close(found, norm)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.average, average, rtol=1e-10, atol=1e-12)


def test_what_is_left_of_gradients_long_gone_is_dropped_before_it_is_denormal(monkeypatch) -> None:
    """Denormal numbers make a step several times slower; what is dropped moves no weight."""
    config = TrainConfig(learning_rate=1e-3, average=0.0, clip_norm=0.0)
    weights = [nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float32)) for _ in range(2)]
    states = [OptimizerState.start([weight], config) for weight in weights]
    for step in range(1500):
        gradient = torch.tensor([1.0 if step == 0 else 0.0, 1.0])
        for state in states:
            update_eagerly(state, [gradient.clone()], torch.zeros(()), config.learning_rate, config)
        if step % 100 == 99:
            states[1].drop_tiny_()
    least = torch.finfo(torch.float32).tiny
    assert 0 < float(states[0].first[0][0]) < least  # left alone, it stays there
    assert states[1].first[0].tolist() == [0.0, pytest.approx(1.0)]
    assert torch.equal(*weights)
    assert torch.equal(states[0].second[0], states[1].second[0])

    dropped: list[int] = []
    monkeypatch.setattr(OptimizerState, "drop_tiny_", lambda self: dropped.append(1))
    aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=7, log_every=3, validation=0.0))
    assert len(dropped) == 3  # records after steps 3, 6 and 7


@pytest.mark.parametrize("update", [update_eagerly, update_traced])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_step_changes_nothing(update, optimizer, where) -> None:
    params = [torch.ones(3, 2).requires_grad_(), torch.ones(2).requires_grad_()]
    config = TrainConfig(optimizer=optimizer, weight_decay=0.1)
    state = OptimizerState.start(params, config)
    grads = [torch.ones(3, 2), torch.ones(2)]
    update(state, grads, torch.zeros(()), torch.tensor(1e-2), config)
    before = {name: value.clone() for name, value in state.tensors().items()}
    kept = [p.detach().clone() for p in params]
    bad = math.nan if where == "gradient" else 1.0
    update(
        state, [torch.full((3, 2), bad), torch.ones(2)], torch.tensor(math.inf if where == "loss" else 0.0),
        torch.tensor(1e-2), config,
    )  # fmt: skip
    torch.testing.assert_close([p.detach() for p in params], kept, rtol=0, atol=0)
    for name in ("first/0", "second/0", "average/0", "count"):
        if name in before:
            torch.testing.assert_close(state.tensors()[name], before[name], rtol=0, atol=0)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_every_row_is_visited_equally_often_in_full_batches() -> None:
    x = torch.arange(7.0).unsqueeze(1).expand(7, 5) + _rows(7) * 1e-3
    trainer = _Trainer(_model(), {"x": x}, TrainConfig(batch_size=3, validation=0.0), "elbo", None, {})
    seen = torch.cat([trainer.batch(step)["x"][:, 0].round() for step in range(7)])
    assert all(len(trainer.batch(step)["x"]) == 3 for step in range(7))
    assert torch.bincount(seen.long(), minlength=7).tolist() == [3] * 7
    assert seen[:7].sort().values.tolist() == list(range(7))


def test_held_out_rows_are_not_trained_on() -> None:
    trainer = _Trainer(_model(), {"x": _rows(50)}, TrainConfig(validation=0.2), "elbo", None, {})
    assert len(trainer.held_out) == 10
    assert set(trainer.held_out.tolist()) | set(trainer.order.rows.tolist()) == set(range(50))


def test_batches_keep_their_dtype_until_they_are_used() -> None:
    x = torch.randint(0, 2, (20, 5), dtype=torch.uint8)
    vae = _model(likelihood="bernoulli")
    run = aevb.fit(vae, {"x": x}, TrainConfig(steps=3))
    assert math.isfinite(run.history[-1]["bound"])


# -- fit ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_objectives_rise_and_history_tells_the_parts(objective) -> None:
    vae = _model()
    run = aevb.fit(vae, {"x": _rows()}, TrainConfig(steps=300, samples=2, log_every=50), objective=objective)
    first, last = run.history[0], run.history[-1]
    assert last["bound"] > first["bound"]
    assert last["kl"] == pytest.approx(last["kl_z"])
    assert sum(last["kl_dims"]["z"]) == pytest.approx(last["kl_z"])
    if objective == "elbo":
        assert last["bound"] == pytest.approx(last["reconstruction"] - last["kl"], rel=1e-5)


def test_objective_of_ones_own_with_parameters_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, vae: VAE, values: aevb.Values, **tensors: torch.Tensor) -> torch.Tensor:
            return aevb.elbo(vae, values) - self.weight**2

    objective = Scaled()
    run = aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=50, log_every=50), objective=objective)
    assert objective.weight.item() < 2.0
    assert run.history[-1]["objective"] < run.history[-1]["bound"]


def test_fit_leaves_torchs_generator_and_data_alone() -> None:
    x = _rows()
    kept, state = x.clone(), torch.get_rng_state()
    vae = _model()
    torch.set_rng_state(state)
    aevb.fit(vae, {"x": x}, TrainConfig(steps=20))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)


def test_same_seed_same_weights_other_seed_others() -> None:
    runs = [aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=30, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (_weights(run.vae) for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_kl_warmup_and_learning_rate_schedule() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, kl_warmup_steps=20, learning_rate=1.0)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 55) == pytest.approx(0.5)
    assert learning_rate(config, 99) < 1e-3
    assert [kl_weight(config, step) for step in (0, 10, 20, 99)] == [0.0, 0.5, 1.0, 1.0]


def test_history_reports_the_bound_whatever_the_kl_weight() -> None:
    config = TrainConfig(steps=1, kl_warmup_steps=10, log_every=1)
    record = aevb.fit(_model(), {"x": _rows()}, config).history[0]
    assert record["objective"] == pytest.approx(record["reconstruction"], rel=1e-6)
    assert record["bound"] == pytest.approx(record["reconstruction"] - record["kl"], rel=1e-5)


def test_early_stop_keeps_the_best_validated_weights() -> None:
    x = _rows(40)
    config = TrainConfig(
        steps=4000,
        batch_size=16,
        validation=0.3,
        validate_every=50,
        patience=3,
        learning_rate=1e-2,
        schedule="constant",
    )
    run = aevb.fit(_model(), {"x": x}, config)
    validated = [record["validation"] for record in run.history if "validation" in record]
    assert run.history[-1]["step"] < 4000
    best = int(torch.tensor(validated).argmax())
    assert len(validated) == best + 1 + 3
    trainer = _Trainer(run.vae, {"x": x}, config, "elbo", None, {})
    trainer.state.average.clear()  # validate the weights as they were kept
    assert trainer._validate() == pytest.approx(max(validated), abs=1e-4)


def test_missing_values_are_marginalised_in_training() -> None:
    x = _rows(200)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = math.nan
    run = aevb.fit(_model(holes=True), {"x": x}, TrainConfig(steps=200, log_every=50))
    assert run.history[-1]["bound"] > run.history[0]["bound"]
    with pytest.raises(aevb.InputError, match="Holes"):
        aevb.fit(_model(holes=False), {"x": x}, TrainConfig(steps=2))


def test_a_dropped_step_names_term_rows_and_parameter(caplog) -> None:
    class Trap(nn.Module):
        """A net that breaks on the rows above a threshold."""

        def __init__(self) -> None:
            super().__init__()
            self.outputs, self.inner = 4, nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) / (x[..., :1] < 50).to(x.dtype)

    x = _rows(40)
    x[7] = 100.0
    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 5), 5)}),
        BayesNet({"z | x": DiagonalNormal(Trap())}),
    )
    config = TrainConfig(steps=12, batch_size=10, validation=0.0, log_every=12)
    with pytest.raises(
        aevb.InputError, match="not a number for 1 of 40 rows, the first of them 7"
    ):  # evaluated honestly, too
        aevb.log_marginal(vae, {"x": x}, samples=10)
    run = aevb.fit(vae, {"x": x}, config)
    assert run.history[-1]["dropped"] == 3
    assert "log q(z) in rows" in caplog.text
    assert "node_z.net.inner" in caplog.text
    assert _weights(vae).isfinite().all()


def test_too_many_dropped_steps_stop_the_run(tmp_path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outputs, self.weight = 4, nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight / torch.zeros(()) + x[..., :1] * 0

    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 5), 5)}),
        BayesNet({"z | x": DiagonalNormal(Broken())}),
    )
    before = _weights(vae)
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        aevb.fit(vae, {"x": _rows()}, TrainConfig(steps=100, validation=0.0), out=tmp_path / "run")
    assert torch.equal(_weights(vae), before)
    assert list((tmp_path / "run").glob("checkpoint-*"))


# -- resuming ----------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


@pytest.mark.parametrize("average", [0.99, 0.0])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, average) -> None:
    config = TrainConfig(
        steps=120, batch_size=20, checkpoint_every=45, log_every=10, validate_every=20, average=average, clip_norm=5.0
    )
    whole = aevb.fit(_model(), {"x": _rows()}, config, out=tmp_path / "whole")

    def stop(record: dict) -> None:
        if record["step"] >= 70:
            raise _Stop

    with pytest.raises(_Stop):
        aevb.fit(_model(), {"x": _rows()}, config, out=tmp_path / "cut", progress=stop)
    resumed = aevb.fit(_model(seed=9), {"x": _rows()}, config, out=tmp_path / "cut", resume=True)
    assert torch.equal(_weights(resumed.vae), _weights(whole.vae))
    for tensor, value in whole.resume["tensors"].items():
        assert torch.equal(resumed.resume["tensors"][tensor], value), tensor
    timeless = [[{**record, "seconds": 0} for record in run.history] for run in (whole, resumed)]
    assert timeless[0] == timeless[1]
    table = (tmp_path / "cut" / "history.csv").read_text().splitlines()
    assert len(table) == 1 + len(whole.history)


def test_resuming_otherwise_is_refused(tmp_path) -> None:
    config = TrainConfig(steps=20)
    aevb.fit(_model(), {"x": _rows()}, config, out=tmp_path / "run")
    with pytest.raises(aevb.InputError, match=r"learning_rate was 0\.001, is 0\.01"):
        aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=20, learning_rate=0.01), out=tmp_path / "run", resume=True)
    with pytest.raises(aevb.InputError, match="rows 64, now 60"):
        aevb.fit(_model(), {"x": _rows(60)}, config, out=tmp_path / "run", resume=True)
    with pytest.raises(aevb.InputError, match="exists already"):
        aevb.fit(_model(), {"x": _rows()}, config, out=tmp_path / "run")


_INTERRUPTED = """
import os, signal, sys, torch, aevb
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(200, 5)
vae = aevb.build_vae(aevb.ModelConfig(features=5, latents=2, hidden=(8,)))
stop = lambda record: os.kill(os.getpid(), signal.SIGINT) if record["step"] == 100 else None
aevb.fit(vae, {"x": x}, aevb.TrainConfig(steps=100_000, log_every=10), out=sys.argv[1], progress=stop)
"""


def test_ctrl_c_saves_a_checkpoint_first(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(aevb.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "run")], capture_output=True, text=True, env=environment
    )
    assert done.returncode in (1, -signal.SIGINT)
    assert "KeyboardInterrupt" in done.stderr
    run = aevb.load(tmp_path / "run")
    assert run.resume["numbers"]["step"] == 100


# -- the compiled tier -------------------------------------------------------------------------------------------------

PLAIN = {"optimizer": "sgd", "learning_rate": 1e-3, "average": 0.0, "clip_norm": 0.0}

MODELS = {
    "bernoulli": ({"likelihood": "bernoulli"}, {}),
    "full covariance, holes, iwae": ({"posterior": "full", "holes": True}, {"objective": "iwae"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_take_the_path_of_eager_ones(name, monkeypatch, caplog) -> None:
    model, more = MODELS[name]
    x = _rows()
    x = (x > 0).float() if name == "bernoulli" else x.masked_fill(torch.rand(x.shape) < 0.2, math.nan)
    config = {"steps": 25, "batch_size": 20, "kl_warmup_steps": 10, "clip_norm": 10.0, "log_every": 5, "samples": 2}
    config["warmup_steps"] = 3
    torch._dynamo.reset()  # or a graph of an earlier test may serve
    torch._dynamo.utils.counters.clear()
    runs = [
        aevb.fit(_model(**model), {"x": x}, TrainConfig(**config, compile=compile), **more) for compile in (False, True)
    ]
    reason = can_compile()  # None where there is a compiler
    # One graph serves a run: rate and KL weight change each step, and the rows are no multiple of 20.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if reason is None else 0)
    assert ("eagerly" in caplog.text) == (reason is not None)
    assert reason is None or f"not compiled: {reason}" in caplog.text
    torch.testing.assert_close(_weights(runs[0].vae), _weights(runs[1].vae), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(*(run.history for run in runs), strict=True):
        assert ours["bound"] == pytest.approx(theirs["bound"], rel=1e-3)


def test_compiled_steps_in_bfloat16_are_off_by_rounding_alone(monkeypatch) -> None:
    """Results of products are rounded, too, as on processors with units for it: there the bound, of 20 draws of 50 rows
    a step and 50 steps a record, moves by far less than the 2^-9 by which each number may. Softplus and its gradient
    are found twice: of the logits, and of q's scales.
    """
    torch._dynamo.reset()
    rounded: list[int] = []
    softplus: list[int] = []
    patterns = softplus_patterns()
    apply = patterns.apply
    monkeypatch.setattr(patterns, "apply", lambda graph: softplus.append(apply(graph)))
    monkeypatch.setattr("aevb._compiler._has_bfloat16", lambda: True)
    monkeypatch.setattr("aevb._compiler.round_products", lambda graph: (rounded.append(1), round_products(graph)))
    config = TrainConfig(steps=200, batch_size=50, learning_rate=1e-2, samples=20, log_every=50, seed=1)
    bounds = []
    for compile, precision in ((False, "float32"), (True, "bfloat16")):
        told = dataclasses.replace(config, compile=compile, precision=precision)
        with torch._inductor.utils.fresh_cache():
            run = aevb.fit(_model(likelihood="bernoulli"), {"x": (_rows() > 0).float()}, told)
        bounds.append([record["bound"] for record in run.history if "bound" in record])
        assert {p.dtype for p in run.vae.parameters()} == {torch.float32}
    assert (len(rounded), softplus) == ((1, [4]) if can_compile() is None else (0, []))
    assert bounds[1] == pytest.approx(bounds[0], rel=2**-12)


def test_compiled_steps_of_classes_shared_factors_and_other_gradients(caplog) -> None:
    """One model with all of it: labels in some rows, a ladder's level with batch-norm, sticking the landing.

    By the plainest optimizer: Adam and averages are compiled elsewhere, and large graphs take a minute.
    """

    def model() -> VAE:
        torch.manual_seed(0)
        prior = DiagonalNormal(MLP(3, [], 2 * 2))
        p = BayesNet({
            "y": aevb.Categorical(3, learned=True), "z | y": prior, "x | z": Normal(MLP(2, [], 5), 5),
        })  # fmt: skip
        q = BayesNet({
            "h | x": aevb.Deterministic(MLP(5, [6], 6, batch_norm=True)), "y | h": aevb.Categorical(3, MLP(6, [], 3)),
            "z | h, y": aevb.LadderNormal(MLP(6, [], 4), prior),
        })  # fmt: skip
        return VAE(p, q)

    torch.manual_seed(1)
    x, y = torch.randn(60, 5), torch.randint(-1, 3, (60,))
    config = {"steps": 15, "batch_size": 20, "validation": 0.0, "gradient": "stl", "log_every": 5} | PLAIN
    runs = [
        aevb.fit(
            model(), {"x": x, "y": y}, TrainConfig(**config, compile=compile),
            objective=aevb.with_classifier("y", 2.0),
        )
        for compile in (False, True)
    ]  # fmt: skip
    reason = can_compile()
    assert ("eagerly" in caplog.text) == (reason is not None), caplog.text
    torch.testing.assert_close(_weights(runs[0].vae), _weights(runs[1].vae), rtol=1e-4, atol=1e-5)


class _Trading(nn.Module):
    """Its buffers trade places at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Buffer(torch.zeros(())), nn.Buffer(torch.zeros(()))
        self.net = MLP(5, [6], 4)

    def forward(self, x: Tensor) -> Tensor:
        self.a.add_(1.0)
        self.a, self.b = self.b, self.a
        out: Tensor = self.net(x + 0.1 * self.a)
        return out


class _Counting(nn.Module):
    """Counts in place before a break, so that a graph of its own returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(5))
        self.net = MLP(5, [6], 4)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        torch._dynamo.graph_break()
        out: Tensor = self.net(x - self.mean)
        return out


class _Turning(nn.Module):
    """Does one thing and another in turn, by a flag of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.turn = MLP(5, [6], 4), False

    def forward(self, x: Tensor) -> Tensor:
        self.turn = not self.turn
        out: Tensor = self.net(x if self.turn else -x)
        return out


@pytest.mark.parametrize(("net", "tier"), [(_Trading, "whole"), (_Counting, "loss"), (_Turning, "eager")])
def test_what_a_net_changes_of_itself_is_as_in_eager_steps(net, tier, caplog) -> None:
    """Where Python changes it at each step no compiled version is that of the next one, and soon no more are made."""
    weights = []
    for compile in (False, True):
        torch.manual_seed(1)
        p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [6], 5), 5)})
        vae = VAE(p, BayesNet({"z | x": DiagonalNormal(net())}))
        config = TrainConfig(steps=12, batch_size=20, log_every=12, validation=0.0, compile=compile, **PLAIN)
        run = aevb.fit(vae, {"x": _rows()}, config)
        weights.append(_weights(vae))
    assert run.resume["numbers"]["tier"] == (tier if can_compile() is None else "eager")
    given_up = can_compile() is None and tier == "eager"
    assert ("changes by Python at each step" in caplog.text) == given_up
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_models_of_a_kind_share_a_compiled_step_and_leave_nothing_behind(monkeypatch) -> None:
    """Each finds the program of its steps once for its first five and once after the record."""
    found: list[bool] = []
    search = tiers.program
    monkeypatch.setattr(tiers, "program", lambda *given: (found.append((made := search(*given)) is not None), made)[1])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kept = []
    for _ in range(2):
        model = _model()
        kept.append(weakref.ref(model))
        aevb.fit(model, {"x": _rows()}, TrainConfig(steps=6, log_every=5, validation=0.0, compile=True))
        del model
    gc.collect()
    assert [model() for model in kept] == [None, None]
    compiles = can_compile() is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if compiles else 0)
    assert found == ([True] * 4 if compiles else [])


def test_the_search_for_a_program_is_left_out_only_where_nothing_can_have_changed(monkeypatch) -> None:
    """It is made at the first step, after a validation or a record, and for a batch of another form."""
    monkeypatch.setattr(tiers, "can_compile", lambda: None)
    monkeypatch.setattr(tiers, "program", lambda *_: lambda *_: taken.append("again"))
    model, taken = _model(), []
    config = TrainConfig(compile=True)
    inner = Step(model, "elbo", OptimizerState.start(list(model.parameters()), config, []), config, (), 64)
    runner = Tiers(inner, config, "whole", torch.device("cpu"))
    runner.run = lambda *_: taken.append("searched")

    def searches(*batches: torch.Tensor) -> list[int]:
        taken.clear()
        for batch in batches:
            runner._take({"x": batch}, 1e-3, 1.0)
        return [at for at, how in enumerate(taken) if how == "searched"]

    x = torch.zeros(20, 5)
    assert searches(x, x, x) == [0]
    runner.look_again()
    assert searches(x, x) == [0]
    assert searches(x[:10], x[:10].to(torch.uint8), x.T.contiguous().T, x, x) == [0, 1, 2, 3]
    runner._fall("loss", "of a test")
    assert searches(x, x) == [0, 1]
    monkeypatch.undo()

    calls: list[int] = []
    monkeypatch.setattr(Tiers, "look_again", lambda self: calls.append(1))
    aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=6, log_every=3, validate_every=2, validation=0.2))
    assert len(calls) == 5  # records after steps 3 and 6, validations after 2, 4 and 6


def test_models_of_one_process_do_not_share_a_limit(caplog) -> None:
    """torch allows a function eight compiled versions, and models of other sizes are others."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for features in (5, 6):
            vae = aevb.build_vae(ModelConfig(features=features, latents=1, hidden=(), likelihood="bernoulli"))
            rows = {"x": (_rows(features=features) > 0).float()}
            aevb.fit(vae, rows, TrainConfig(steps=3, compile=True, validation=0.0, **PLAIN))
    assert ("eagerly" in caplog.text) == (can_compile() is not None)


def test_without_a_compiler_training_is_eager_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr("aevb.training.tiers.can_compile", lambda: "no C++ compiler was found")
    run = aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=5, compile=True))
    assert "Training runs eagerly, not compiled: no C++ compiler was found." in caplog.text
    assert run.history[-1]["step"] == 5


class _Broken(nn.Module):
    """A net that no single graph can hold: it reads a number back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not math.isnan(x.sum().item())
        return self.inner(x)


def test_a_net_that_breaks_the_graph_has_its_loss_compiled(caplog) -> None:
    def model() -> VAE:
        torch.manual_seed(0)
        p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 5), 5)})
        return VAE(p, BayesNet({"z | x": DiagonalNormal(_Broken())}))

    config = {"steps": 12, "batch_size": 20, "log_every": 4, "kl_warmup_steps": 6}
    runs = [aevb.fit(model(), {"x": _rows()}, TrainConfig(**config, compile=compile)) for compile in (False, True)]
    reason = can_compile()
    assert runs[1].resume["numbers"]["tier"] == ("loss" if reason is None else "eager"), caplog.text
    assert ("with its loss compiled, not whole" in caplog.text) == (reason is None)
    torch.testing.assert_close(_weights(runs[0].vae), _weights(runs[1].vae), rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(*(run.history for run in runs), strict=True):
        assert ours["bound"] == pytest.approx(theirs["bound"], rel=1e-3)


def test_auto_compiles_what_would_take_minutes_and_says_so_in_the_run(monkeypatch) -> None:
    vae = _model()
    assert wanted_tier(TrainConfig(steps=1000), vae, 100) == "eager"
    assert wanted_tier(TrainConfig(steps=1_000_000), vae, 100) == "whole"
    large = aevb.build_vae(aevb.ModelConfig(features=784, hidden=(1000, 1000)))
    assert wanted_tier(TrainConfig(steps=5000), large, 500) == "whole"
    assert wanted_tier(TrainConfig(steps=1_000_000, compile=False), vae, 100) == "eager"
    assert wanted_tier(TrainConfig(steps=1, compile=True), vae, 100) == "whole"
    run = aevb.fit(vae, {"x": _rows()}, TrainConfig(steps=5))
    assert run.resume["numbers"]["tier"] == "eager"


def test_a_compiled_run_does_not_go_on_without_a_compiler(tmp_path, monkeypatch) -> None:
    config = TrainConfig(steps=4)
    aevb.fit(_model(), {"x": _rows()}, config, out=tmp_path / "run")
    newest = max((tmp_path / "run").glob("checkpoint-*"))
    record = json.loads((newest / "run.json").read_text())
    record["resume"]["tier"] = "whole"
    (newest / "run.json").write_text(json.dumps(record))
    sums = json.loads((newest / "checksums.json").read_text())
    sums["run.json"] = hashlib.sha256((newest / "run.json").read_bytes()).hexdigest()
    (newest / "checksums.json").write_text(json.dumps(sums))
    monkeypatch.setattr("aevb.training.tiers.can_compile", lambda: "no C++ compiler was found")
    with pytest.raises(aevb.InputError, match="trained compiled, in the tier `whole`, and here no C"):
        aevb.fit(_model(), {"x": _rows()}, config, out=tmp_path / "run", resume=True)


def test_bfloat16_products_leave_weights_and_setting_as_they_were() -> None:
    before = torch.get_float32_matmul_precision()
    seen = []
    config = TrainConfig(steps=4, log_every=2, precision="bfloat16")
    run = aevb.fit(
        _model(), {"x": _rows()}, config, progress=lambda _: seen.append(torch.get_float32_matmul_precision())
    )
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == before
    assert {p.dtype for p in run.vae.parameters()} == {torch.float32}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", -1), ("learning_rate", 0.0), ("learning_rate", math.nan), ("average", 1.0),
        ("validation", 1.0), ("optimizer", "rmsprop"), ("clip_norm", math.inf), ("seed", -1), ("schedule", "step"),
        ("compile", "yes"), ("precision", "float16"), ("keep_checkpoints", 0),
    ],
)  # fmt: skip
def test_train_config_names_the_field_and_the_rule(field, value) -> None:
    with pytest.raises(aevb.InputError, match=f"`{field}` must be"):
        TrainConfig(**{field: value})


def test_a_batch_that_cannot_fit_memory_is_refused() -> None:
    with pytest.raises(aevb.InputError, match=r"GiB are\s+free. Lower `batch_size` or `samples`"):
        aevb.fit(_model(), {"x": _rows()}, TrainConfig(samples=10**10))


def test_an_objective_that_does_not_fit_is_told() -> None:
    config, data = TrainConfig(steps=1), {"x": _rows()}
    with pytest.raises(aevb.InputError, match="must take"):
        aevb.fit(_model(), data, config, objective=aevb.elbo)
    with pytest.raises(aevb.InputError, match="one number a datum"):
        aevb.fit(_model(), data, config, objective=lambda vae, values, **_: aevb.elbo(vae, values).mean())
    with pytest.raises(aevb.InputError, match="`objective` must be one of"):
        aevb.fit(_model(), data, config, objective=None)
    with pytest.raises(aevb.InputError, match="got Tensor"):
        aevb.fit(_model(), _rows(), config)


def test_dropped_steps_leave_no_figure() -> None:
    x = _rows(20)
    vae = _model()
    with torch.no_grad():
        next(vae.q.parameters())[0, 0] = math.inf
    history = []
    with pytest.raises(FloatingPointError):
        aevb.fit(vae, {"x": x}, TrainConfig(steps=50, log_every=5, validation=0.0), progress=history.append)
    assert all(math.isnan(record["bound"]) and record["dropped"] == 5 for record in history)


def test_unknown_objective_and_untrainable_models_are_refused() -> None:
    with pytest.raises(aevb.InputError, match="`objective` must be one of elbo, iwae"):
        aevb.fit(_model(), {"x": _rows()}, TrainConfig(steps=1), objective="vi")
    frozen = VAE(BayesNet({"x": StandardNormal(5)}), BayesNet({}))
    with pytest.raises(aevb.InputError, match="no parameters to train"):
        aevb.fit(frozen, {"x": _rows()}, TrainConfig(steps=1))


def test_fully_observed_model_is_fitted_by_maximum_likelihood(double) -> None:
    """An empty q: p = N(loc, scale) over x has its maximum at the sample mean and standard deviation."""
    x = 3.0 + 2.0 * torch.randn(400, 1, generator=torch.Generator().manual_seed(0))

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(1))

        def forward(self) -> torch.Tensor:
            return self.mean

    vae = VAE(BayesNet({"x": Normal(Constant(), 1)}), BayesNet({}))
    config = TrainConfig(
        steps=1500, batch_size=400, learning_rate=0.05, validation=0.0, average=0.0, optimizer="adam", weight_decay=0.0
    )
    aevb.fit(vae, {"x": x}, config)
    d = vae.p.distribution("x", {})
    torch.testing.assert_close(d.mean, x.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(d.stddev, x.std(0, correction=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("objective", "draws"), [("elbo", 1), ("iwae", 8)])
def test_validation_rows_of_ones_own_choose_the_weights(objective, draws):
    """All of the data are trained on; the bound that is reported is that of the rows given, under the kept weights."""
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    other = 3 * torch.randn(40, 3)
    vae = aevb.build_vae(ModelConfig(features=3, latents=1, hidden=(4,)), x)
    seen = set()

    class Watched:
        def __len__(self) -> int:
            return len(x)

        def take(self, indices: Tensor) -> dict[str, Tensor]:
            seen.update(indices.tolist())
            return {"x": x[indices]}

    config = TrainConfig(steps=20, batch_size=20, validate_every=10, log_every=10, average=0.0, samples=draws)
    run = aevb.fit(vae, Watched(), config, objective=objective, validation={"x": other})
    assert seen == set(range(60))
    best = max(record["validation"] for record in run.history)
    bound = aevb.elbo if objective == "elbo" else aevb.iwae
    with torch.no_grad():
        again = torch.stack([bound(vae, {"x": other}, draws).mean() for _ in range(200)])
    # So many draws a row made the figure: 4 of its standard errors.
    assert abs(best - float(again.mean())) < 4 * float(again.std())


def test_averaged_weights_come_with_averaged_statistics() -> None:
    """Batch-norm's running statistics in the kept model are their moving average, as the weights are theirs."""
    torch.manual_seed(0)
    x = torch.randn(80, 4)
    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [6], 4, batch_norm=True), 4)}),
        BayesNet({"z | x": DiagonalNormal(MLP(4, [6], 4, batch_norm=True))}),
    )
    config = TrainConfig(steps=40, batch_size=20, average=0.9, validation=0.0, log_every=1)
    norm = next(module for module in vae.modules() if isinstance(module, nn.BatchNorm1d))
    seen = [norm.running_mean.clone()]
    run = aevb.fit(vae, {"x": x}, config, progress=lambda _: seen.append(norm.running_mean.clone()))
    expected = seen[0]
    for count, now in enumerate(seen[1:], 1):
        expected = torch.lerp(expected, now, 1 - min((1 + count) / (10 + count), 0.9))
    torch.testing.assert_close(norm.running_mean, expected)
    assert run.vae is vae
    assert int(norm.num_batches_tracked) == 40  # looking at the data before training does not count


def test_a_resumed_run_keeps_its_objective(tmp_path) -> None:
    vae = _model()
    config = TrainConfig(steps=4, samples=3, validation=0.0, schedule="constant")
    aevb.fit(vae, {"x": _rows()}, config, out=tmp_path / "run")
    with pytest.raises(aevb.InputError, match=r"objective elbo, now iwae"):
        aevb.fit(
            vae, {"x": _rows()}, dataclasses.replace(config, steps=8), out=tmp_path / "run", resume=True,
            objective="iwae",
        )  # fmt: skip


@pytest.mark.parametrize(("settings", "objective"), [
    ({}, "elbo"), ({"gradient": "stl"}, "elbo"), ({"gradient": "dreg", "samples": 2}, "iwae"),
    ({"discrete": "relax"}, "elbo"),
])  # fmt: skip
def test_batch_norm_sees_each_batch_once(settings, objective) -> None:
    """Passes that only look (before training, weights of dreg, the bound beside a relaxed objective) do not count."""
    torch.manual_seed(0)
    p = {"z": StandardNormal(2), "x | z": Normal(MLP(2, [6], 4, batch_norm=True), 4)}
    q = {"h | x": aevb.Deterministic(MLP(4, [5], 3, batch_norm=True)), "z | h": DiagonalNormal(MLP(3, [], 4))}
    if "discrete" in settings:
        p = {"y": aevb.Categorical(2), "z": StandardNormal(2), "x | y, z": Normal(MLP(4, [6], 4, batch_norm=True), 4)}
        q = q | {"y | h": aevb.Categorical(2, MLP(3, [], 2))}
    vae = VAE(BayesNet(p), BayesNet(q))
    config = TrainConfig(steps=10, batch_size=20, validation=0.0, **settings)
    aevb.fit(vae, {"x": torch.randn(60, 4)}, config, objective=objective)
    for module in vae.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert int(module.num_batches_tracked) == 10
