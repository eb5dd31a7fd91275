"""Saving and loading: round trips, shared modules, damage recognised, nothing lost when writing fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import aevb
from aevb import MLP, VAE, BayesNet, DiagonalNormal, ModelConfig, Normal, Run, StandardNormal, TrainConfig
from aevb.checkpoint import write_atomically

CONFIGS = [
    ModelConfig(features=5),
    ModelConfig(features=5, noise="datum", hidden=(), activation="tanh"),
    ModelConfig(features=5, likelihood="bernoulli", posterior="full", latents=2),
    ModelConfig(features=5, likelihood="binomial", total_count=7, holes=True),
]


def _run(config: ModelConfig | None = None, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    return Run(
        vae=aevb.build_vae(config or CONFIGS[0], 1 + torch.rand(20, 5)),
        config=TrainConfig(steps=3),
        history=[{"step": 3}],
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.likelihood + "-" + config.posterior)
def test_round_trip_is_exact(tmp_path, config) -> None:
    run = _run(config)
    aevb.save(run, tmp_path / "run")
    again = aevb.load(tmp_path / "run")
    assert again.vae.config == config
    assert (again.config, again.history) == (run.config, run.history)
    ours, theirs = run.vae.state_dict(), again.vae.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _composed(width: int = 4) -> VAE:
    shared = MLP(2, [width], 2)  # one net held by p and by q
    p = BayesNet({"z": StandardNormal(2), "y | z": Normal(shared, 2), "x | z": Normal(MLP(2, [], 5), 5)})
    return VAE(p, BayesNet({"z | x": DiagonalNormal(nn.Sequential(MLP(5, [], 2), shared, MLP(2, [], 4)))}))


def test_shared_modules_are_saved_once_and_stay_shared(tmp_path) -> None:
    vae = _composed()
    aevb.save(Run(vae=vae, config=TrainConfig(), history=[]), tmp_path / "run")
    again = aevb.load(tmp_path / "run", _composed())
    for name, value in vae.state_dict().items():
        assert torch.equal(value, again.vae.state_dict()[name]), name
    record = json.loads((tmp_path / "run" / "checkpoint-000001" / "run.json").read_text())
    assert record["aliases"]


def test_a_composed_model_is_compared(tmp_path) -> None:
    aevb.save(Run(vae=_composed(), config=TrainConfig(), history=[]), tmp_path / "run")
    with pytest.raises(aevb.InputError, match="composed by hand"):
        aevb.load(tmp_path / "run")
    with pytest.raises(aevb.InputError, match=r"layers.0.weight: \(9, 2\) float32 here, \(4, 2\) float32 there"):
        aevb.load(tmp_path / "run", _composed(width=9))
    with pytest.raises(aevb.InputError, match="factors"):
        aevb.load(tmp_path / "run", aevb.build_vae(CONFIGS[0]))


def test_dtype_and_mode_come_back(tmp_path) -> None:
    run = _run()
    run.vae.double()
    aevb.save(run, tmp_path)
    again = aevb.load(tmp_path).vae
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert not again.training
    vae = _composed()
    aevb.save(Run(vae=vae, config=TrainConfig(), history=[]), tmp_path / "composed")
    with pytest.raises(aevb.InputError, match="float64 here"):
        aevb.load(tmp_path / "composed", _composed().double())


def test_two_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path) -> None:
    for step in range(4):
        run = _run()
        run.history.append({"step": step})
        aevb.save(run, tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-000003", "checkpoint-000004"]
    assert aevb.load(tmp_path).history[-1] == {"step": 3}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": _truncate,
    "bit-flipped": _flip,
    "lost": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
}
FILES = ["model.safetensors", "run.json", "checksums.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_recognised_and_the_older_checkpoint_used(tmp_path, damage, name) -> None:
    first, second = _run(seed=1), _run(seed=2)
    aevb.save(first, tmp_path)
    newest = aevb.save(second, tmp_path)
    DAMAGES[damage](newest / name)
    with pytest.warns(UserWarning, match="checkpoint-000002.*using checkpoint-000001"):
        again = aevb.load(tmp_path)
    for tensor, value in first.vae.state_dict().items():
        assert torch.equal(value, again.vae.state_dict()[tensor])
    DAMAGES[damage](tmp_path / "checkpoint-000001" / name)
    with pytest.raises(aevb.InputError, match=r"No checkpoint of .* can be used"):
        aevb.load(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(aevb.InputError, match="is not a run"):
            aevb.load(folder)


def test_another_format_is_named_and_passed_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("aevb.checkpoint._FORMAT", 99)
    aevb.save(_run(), tmp_path / "other")
    monkeypatch.undo()
    with pytest.raises(aevb.InputError, match="format 99, and this version reads format 1"):
        aevb.load(tmp_path / "other")
    aevb.save(_run(), tmp_path / "both")
    (tmp_path / "other" / "checkpoint-000001").rename(tmp_path / "both" / "checkpoint-000002")
    with pytest.warns(UserWarning, match="checkpoint-000002: it is of format 99.*using checkpoint-000001"):
        aevb.load(tmp_path / "both")


def test_a_foreign_or_half_copied_checkpoint_is_passed_over(tmp_path) -> None:
    run = _run()
    newest = aevb.save(run, tmp_path)
    foreign, half = tmp_path / "checkpoint-000008", tmp_path / "checkpoint-000009"
    foreign.mkdir()
    (foreign / "checksums.json").write_text('{"../../elsewhere": "0"}')
    half.mkdir()
    (half / "run.json").write_bytes((newest / "run.json").read_bytes())
    told = "checkpoint-000009: checksums.json is missing; checkpoint-000008: it is not one of aevb's"
    with pytest.warns(UserWarning, match=told):
        again = aevb.load(tmp_path)
    for tensor, value in run.vae.state_dict().items():
        assert torch.equal(value, again.vae.state_dict()[tensor])


def test_as_many_checkpoints_are_kept_as_are_asked_for(tmp_path) -> None:
    for _ in range(5):
        aevb.save(_run(), tmp_path, keep=3)
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"checkpoint-00000{number}" for number in (3, 4, 5)]


class _Fault:
    """Lets `allowed` calls of a system function through and fails the next as a full disk does."""

    def __init__(self, real, allowed: int) -> None:
        self.real, self.left, self.hit = real, allowed, False

    def __call__(self, *args, **kwargs):
        if self.left == 0:
            self.hit = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        return self.real(*args, **kwargs)


class _Half:
    """A file whose failing write leaves half of the content behind."""

    def __init__(self, file, fault: _Fault) -> None:
        self.file, self.fault = file, fault

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, content: bytes) -> None:
        if self.fault.left == 0:
            self.file.write(content[: len(content) // 2])
        self.fault(self.file, content)


def _break(monkeypatch, operation: str, allowed: int) -> _Fault:
    if operation == "write":
        fault = _Fault(lambda file, content: file.write(content), allowed)
        monkeypatch.setattr("aevb.checkpoint.open", lambda *args: _Half(open(*args), fault), raising=False)
        return fault
    fault = _Fault(getattr(os, operation), allowed)
    monkeypatch.setattr(os, operation, fault)
    return fault


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_each_failing_write_fsync_and_rename_loses_nothing(tmp_path, monkeypatch, operation, existing) -> None:
    target = tmp_path / "run"
    before, after = _run(seed=1), _run(seed=2)
    failures = 0
    for allowed in range(50):
        if existing:
            if not target.exists():
                aevb.save(before, target)
            kept = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        with monkeypatch.context() as patched:
            fault = _break(patched, operation, allowed)
            with contextlib.suppress(aevb.InputError):
                aevb.save(after, target)
        if not fault.hit:
            break
        failures += 1
        assert not list(tmp_path.rglob(".*")), "a partial checkpoint was left behind"
        if existing:
            assert all(path.read_bytes() == content for path, content in kept.items()), "what was there has changed"
            assert aevb.load(target) is not None
        elif target.exists():  # only the flush of the folder, after the rename, may fail with the checkpoint in place
            assert operation == "fsync"
            assert aevb.load(target) is not None
            break
    # Three files, the new folder and the run's: each was made to fail once.
    assert failures == {"write": 3, "fsync": 5, "rename": 1}[operation]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aevb.save(after, target)
        assert torch.equal(next(aevb.load(target).vae.parameters()), next(after.vae.parameters()))


def test_a_write_that_stops_half_way_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "history.csv"
    write_atomically(path, b"old")
    for operation in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            _break(patched, operation, 0)
            with pytest.raises(aevb.InputError, match="untouched"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["history.csv"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_run_without_a_folder_says_so() -> None:
    with pytest.raises(aevb.InputError, match="no folder yet"):
        aevb.save(_run())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": 10_001}, "`latents` must be between 1 and 10000; got 10001"),
        ({"likelihood": "binomial"}, "`total_count` goes with likelihood binomial"),
        ({"total_count": 3}, "`total_count` goes with likelihood binomial"),
        ({"activation": "sine"}, "`activation` must be one of"),
        ({"hidden": (0,)}, "`hidden` must be"),
    ],
)
def test_model_config_names_the_field_and_the_rule(fields, message) -> None:
    with pytest.raises(aevb.InputError, match=message):
        ModelConfig(**{"features": 5, **fields})


def test_configs_survive_json_and_refuse_strange_fields() -> None:
    config = ModelConfig(features=5, hidden=(3, 2))
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(aevb.InputError, match="no field depth"):
        ModelConfig.from_json({"features": 5, "depth": 2})
