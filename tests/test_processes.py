"""Training on several processes is the training of one: the same draws, the same weights, the same decisions.

Run by torchrun, this file is the script that trains (`_script`); by pytest, it starts that and compares.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aevb
from aevb import InputError, ModelConfig, TrainConfig
from aevb.apps.cli import main
from aevb.training.batches import Order, split_rows
from aevb.training.log import Interrupt
from aevb.training.processes import Processes, join, launch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# In float64 the order of additions, all that differs, is worth 1e-16 a step, and 1e-12 after some dozen.
CLOSE = {"rtol": 0.0, "atol": 1e-11}

# Stops early, with a rate so high that validation soon gets worse.
CONFIG = TrainConfig(
    steps=60, batch_size=24, shards=4, learning_rate=0.05, schedule="constant", clip_norm=5.0, average=0.5,
    validation=0.2, validate_every=5, patience=3, log_every=5, compile=False,
)  # fmt: skip


def _rows(count: int = 150) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return x.where(torch.rand(x.shape, generator=generator) > 0.1, torch.nan)


def _model(seed: int = 0, **more: object) -> aevb.VAE:
    torch.manual_seed(seed)
    return aevb.build_vae(ModelConfig(features=5, latents=2, hidden=(8,), holes=True, **more))


def _changed(**fields: object) -> TrainConfig:
    return TrainConfig(**CONFIG.to_json() | fields)


def _weights(vae: aevb.VAE) -> list[float]:
    return torch.cat([p.detach().flatten() for p in vae.parameters()]).tolist()


def _told(run: aevb.Run) -> dict[str, object]:
    """A run in numbers, all but how long it took."""
    records = [{k: v for k, v in record.items() if k not in ("seconds", "kl_dims", "dead")} for record in run.history]
    return {"weights": _weights(run.vae), "history": records}


class _Noisy:
    """Rows in blocks, with noise that is drawn when they are taken; one of them overflows."""

    blocks = (50, 60, 40)

    def __init__(self) -> None:
        self.x = _rows().nan_to_num()
        self.x[17] = 1e200
        self.seen: list[list[float]] = []

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        noise = torch.randn(len(indices), 5)
        self.seen.append(noise[0].tolist())
        return {"x": self.x[indices] + noise}


def _script(folder: Path) -> None:
    """All that two processes do, in one start of them; each begins with weights of its own, but for the first's."""
    torch.set_default_dtype(torch.float64)
    rank = int(os.environ["RANK"])
    found: dict[str, object] = {}
    found["stopped"] = _told(aevb.fit(_model(rank), {"x": _rows()}, CONFIG))
    aevb.fit(_model(rank), {"x": _rows()}, _changed(steps=10, patience=0), out=folder / "two")
    resumed = aevb.fit(
        _model(9), {"x": _rows()}, _changed(steps=30, patience=0), out=folder / "one", resume=True, progress=print
    )
    found["resumed"] = _told(resumed)
    data = _Noisy()
    with _listening() as warned:
        found["noisy"] = _told(aevb.fit(_model(rank), data, _changed(steps=12, validation=0.0)))
    found["noise"], found["warned"] = data.seen, warned
    for name, rows, fields in (("shards", _rows(), {"shards": 3}), ("data", _rows(150 + rank), {})):
        try:
            aevb.fit(_model(), {"x": rows}, _changed(**fields))
        except InputError as error:
            found[name] = str(error)
    try:  # the first is told to stop, and the other stops with it

        def tell(record: dict[str, object]) -> None:
            for _ in range(2):  # from SLURM, and from torchrun that had it from SLURM
                os.kill(os.getpid(), signal.SIGTERM)

        aevb.fit(_model(), {"x": _rows()}, _changed(log_every=20), out=folder / "told", progress=tell)
    except SystemExit as stop:
        found["status"] = stop.code
    found["launchers"] = _launchers(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def _launchers(rank: int) -> dict[str, object]:
    """The same two processes once more as torchrun started them, then as srun and as one a node would have."""
    found: dict[str, object] = {}
    try:
        launch(3)
    except InputError as error:
        found["torchrun"] = str(error)
    port = int(os.environ["MASTER_PORT"])
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "MASTER", "LOCAL", "GROUP", "ROLE"))]:
        del os.environ[name]
    srun = {
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "1", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
    }  # fmt: skip
    for name, fields, joined in (
        # A job of two tasks whose script does without srun, on each of two machines.
        ("nodes", {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": str(rank)}, lambda: launch(1, 2)),
        ("srun", srun, join),
    ):
        torch.distributed.destroy_process_group()
        os.environ |= fields
        if name == "nodes":
            try:
                joined()
            except InputError as error:
                found["lacking"] = str(error)
        port += 1
        os.environ["MASTER_PORT"] = str(port)
        processes = joined()
        found[name] = [processes.rank, processes.size, *processes.gather(10 + rank)]
    return found


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """What is warned of."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aevb").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("aevb").removeHandler(handler)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What two processes told, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("processes")
    torch.set_default_dtype(torch.float64)
    try:
        aevb.fit(_model(), {"x": _rows()}, _changed(steps=10, patience=0), out=folder / "one")
    finally:
        torch.set_default_dtype(torch.float32)
    done = subprocess.run([*TORCHRUN, __file__, str(folder)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _agree(ours: dict, theirs: dict) -> None:
    torch.testing.assert_close(torch.tensor(ours["weights"]), torch.tensor(theirs["weights"]), **CLOSE)
    assert len(ours["history"]) == len(theirs["history"])
    for a, b in zip(ours["history"], theirs["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


def test_two_processes_take_the_steps_of_one_and_stop_where_it_stops(both, double) -> None:
    run = aevb.fit(_model(), {"x": _rows()}, CONFIG)
    assert 20 < run.history[-1]["step"] < CONFIG.steps, "it should stop early"
    for found in both[1]:
        _agree(found["stopped"], _told(run))
    assert both[1][0]["stopped"] == both[1][1]["stopped"], "the processes should agree to the bit"


def test_a_run_of_one_process_goes_on_as_two_and_back(both, double) -> None:
    config = _changed(steps=30, patience=0)
    whole = _told(aevb.fit(_model(), {"x": _rows()}, config))
    _agree(both[1][0]["resumed"], whole)
    _agree(both[1][1]["resumed"], whole)
    back = aevb.fit(_model(9), {"x": _rows()}, config, out=both[0] / "two", resume=True)
    _agree(_told(back), whole)
    with pytest.raises(InputError, match="shards was 4, is 2"):
        aevb.fit(_model(), {"x": _rows()}, _changed(steps=30, shards=2), out=both[0] / "two", resume=True)


def test_noise_belongs_to_step_and_part_and_a_bad_part_drops_the_step_for_all(both, double) -> None:
    data = _Noisy()
    with _listening() as warned:
        run = aevb.fit(_model(), data, _changed(steps=12, validation=0.0))
    assert both[1][0]["warned"] == warned, "the writer tells what it learns from the other"
    assert "is not finite and was left out: in part" in warned[0]
    assert both[1][1]["warned"] == []
    _agree(both[1][0]["noisy"], _told(run))
    assert sum(record["dropped"] for record in run.history) > 0
    # Beside the steps there are looks at all rows and, for those dropped, replays, in one process or in the other.
    ours, theirs = ({tuple(noise) for noise in seen} for seen in (data.seen, both[1][0]["noise"] + both[1][1]["noise"]))
    assert ours == theirs
    assert len(ours) > 4 * 12


def test_what_cannot_be_shared_out_is_refused_in_every_process(both, double) -> None:
    for found in both[1]:
        assert "`shards` must be a multiple of the 2 processes" in found["shards"]
        assert "`data` are not the same in all processes" in found["data"]


def test_processes_stop_together(both, double) -> None:
    """As SLURM and Kubernetes end a job; the signal comes after step 20 and is exchanged with the sums of the next."""
    assert [found["status"] for found in both[1]] == [128 + signal.SIGTERM] * 2
    assert aevb.load(both[0] / "told").resume["numbers"]["step"] == 21
    written = (both[0] / "told" / "history.csv").read_text().splitlines()
    steps = [record["step"] for record in aevb.load(both[0] / "told").history]
    assert [line.split(",")[0] for line in written] == ["step", *map(str, steps)], "one process should write it"


# -- one process -------------------------------------------------------------------------------------------------------


def test_a_gradient_in_parts_is_that_of_the_whole_batch(double) -> None:
    """With an objective that draws nothing, parts change nothing but the order of additions."""

    def objective(vae: aevb.VAE, values: dict[str, Tensor], **_: object) -> Tensor:
        d = vae.q.conditional("z")(values["x"])
        return -(d.mean - 1).square().sum(-1) - d.stddev.sum(-1)

    x = {"x": _rows().nan_to_num()}
    runs = [aevb.fit(_model(), x, _changed(steps=10, shards=shards), objective=objective) for shards in (1, 2, 6)]
    for run in runs[1:]:
        torch.testing.assert_close(torch.tensor(_weights(run.vae)), torch.tensor(_weights(runs[0].vae)), **CLOSE)


def test_parts_are_compiled_to_the_same_steps() -> None:
    config = {"steps": 12, "patience": 0, "optimizer": "sgd", "learning_rate": 1e-3, "shards": 2, "average": 0.0}
    runs = [aevb.fit(_model(), {"x": _rows()}, _changed(compile=compile, **config)) for compile in (False, True)]
    torch.testing.assert_close(torch.tensor(_weights(runs[1].vae)), torch.tensor(_weights(runs[0].vae)))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"shards": 5}, "`shards` must divide `batch_size`.* Give a batch_size of 25"),
        ({"shards": 0}, "`shards` must be at least 1"),
        ({"free_bits": 0.1}, "`free_bits` looks at all rows"),
        ({"tc_weight": 2.0}, "`tc_weight` looks at all rows"),
    ],
)
def test_settings_that_do_not_go_with_parts_are_refused(fields, told) -> None:
    with pytest.raises(InputError, match=told):
        _changed(**fields)


class _Counting(nn.Module):
    """A net that keeps a statistic of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.inner(x)


class _Unlike(nn.Linear):
    """A net that tells a row by how it differs from the others."""

    def __init__(self) -> None:
        super().__init__(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def _centred(vae: aevb.VAE, values: dict[str, Tensor], *, bound: Tensor, **_: object) -> Tensor:
    return bound - bound.mean()


def _with(net: nn.Module) -> aevb.VAE:
    p = aevb.BayesNet({"z": aevb.StandardNormal(2), "x | z": aevb.Normal(aevb.MLP(2, [4], 5), 5)})
    return aevb.VAE(p, aevb.BayesNet({"z | x": aevb.DiagonalNormal(net)}))


@pytest.mark.parametrize(
    ("model", "objective", "told"),
    [
        (lambda: _with(_Counting()), "elbo", "keeps statistics .*seen"),
        (lambda: _with(_Unlike()), "elbo", "mixes"),
        (lambda: _model(batch_norm=True), "elbo", "mixes|keeps statistics"),
        (_model, _centred, "mixes"),
    ],
)
def test_what_looks_at_the_minibatch_is_refused(model: Callable[[], aevb.VAE], objective: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        aevb.fit(model(), {"x": _rows().nan_to_num()}, CONFIG, objective=objective)


def test_mixing_is_seen_where_each_part_is_one_row() -> None:
    with pytest.raises(InputError, match="mixes"):
        aevb.fit(_with(_Unlike()), {"x": _rows().nan_to_num()}, _changed(shards=24))


@pytest.mark.parametrize("first", [0.0, torch.nan])
def test_rows_with_and_without_a_label_do_not_mix(first: float) -> None:
    """Whether the first row has its label or not: its neighbours' are looked for, and change nothing of its own."""
    decoder = aevb.Normal(aevb.MLP(5, [4], 5), 5)
    p = aevb.BayesNet({"y": aevb.Categorical(3), "z": aevb.StandardNormal(2), "x | y, z": decoder})
    classifier = aevb.Categorical(3, aevb.MLP(5, [4], 3))
    q = aevb.BayesNet({"y | x": classifier, "z | x, y": aevb.DiagonalNormal(aevb.MLP(8, [4], 4))})
    y = torch.full((150,), torch.nan)
    y[::3] = 1.0
    y[Order(split_rows(150, CONFIG)[0], 24, CONFIG.seed).batch(0)[0]] = first
    run = aevb.fit(aevb.VAE(p, q), {"x": _rows().nan_to_num(), "y": y}, _changed(steps=5))
    assert run.history[-1]["dropped"] == 0


def test_batches_smaller_than_asked_must_divide_too() -> None:
    with pytest.raises(InputError, match="all 21 rows there are; got 4"):
        aevb.fit(_model(), {"x": _rows(27)}, CONFIG)
    assert [list(Processes(rank=rank, size=2).parts(6, 24)) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_a_second_signal_stops_at_once_unless_it_is_an_echo(monkeypatch) -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked.code == 128 + signal.SIGTERM


# -- starting and stopping ---------------------------------------------------------------------------------------------


def test_the_processes_of_each_launcher_are_found(both) -> None:
    for rank, found in enumerate(each["launchers"] for each in both[1]):
        assert found["srun"] == found["nodes"] == [rank, 2, 10, 11]
        assert "torchrun started 2 processes, and `devices` 3 times `nodes` 1 are 3" in found["torchrun"]
        assert "`nodes` 2 needs MASTER_PORT in the environment" in found["lacking"]


def _alone(*words: object) -> str:
    """The command in this process; the message it ends with, if it fails."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["aevb", "train", *map(str, words)])
            patched.setattr(warnings, "showwarning", warnings.showwarning)
            try:
                main()
            except SystemExit as error:
                return str(error.code)
    return ""


def test_a_killed_process_ends_the_job_and_the_run_goes_on(tmp_path) -> None:
    """To the bits of one process: with two parts all that differs is a + b from b + a."""
    script, run, rows = tmp_path / "aevb.py", tmp_path / "run", tmp_path / "rows.npy"
    np.save(rows, _rows().nan_to_num().numpy())
    script.write_text("import sys; sys.path.pop(0)\nfrom aevb.apps.cli import main\nmain()\n")
    begin = [rows, "--steps", "300", "--shards", "2", "--hidden", "16", "--latents", "4", "--log-every", "10"]
    begin += ["--batch-size", "20", "--checkpoint-every", "20", "--compile", "False"]
    command = [sys.executable, script, "train", *begin, "--devices", "2", "--out", run]
    job = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 600  # a guard against waiting forever, not a measure
    while max((found.name for found in run.glob("checkpoint-0*")), default="") < "checkpoint-000002":
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    out, errors = job.communicate(timeout=600)
    assert job.returncode != 0
    assert f"has lost the others: one has ended, and told why if it could. A checkpoint is in {run}" in errors
    assert "Traceback" not in errors
    assert out.count("150 rows") == 1
    assert aevb.load(run).resume["numbers"]["step"] < 300

    assert _alone("--resume", run) == ""
    assert _alone(*begin, "--out", tmp_path / "alone") == ""
    assert _weights(aevb.load(run).vae) == _weights(aevb.load(tmp_path / "alone").vae)


def test_devices_that_cannot_share_a_batch_are_refused_before_they_are_started(tmp_path) -> None:
    told = _alone("digits", "--devices", "2", "--out", tmp_path / "run")
    assert told.startswith("aevb: `shards` must be a multiple of the 2 processes")
    assert "at least 1" in _alone("digits", "--devices", "0", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    _script(Path(sys.argv[1]))
