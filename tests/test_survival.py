"""A run that is killed, refused disk or told to stop, and what is left of it; each cause is a real one."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, DiagonalNormal, Normal, StandardNormal

ROOT = Path(__file__).parents[1]
SURVIVAL = [sys.executable, str(ROOT / "benchmarks" / "survival.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
AEVB = [sys.executable, "-c", "import sys; sys.argv[0] = 'aevb'; from aevb.apps.cli import main; main()"]


def test_forty_kills_change_no_bit() -> None:
    done = subprocess.run(
        [*SURVIVAL, "--kills", "20", "--compiled-kills", "0"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "43 kills, each survived to the bit" in done.stdout


COMMAND = [*AEVB, "train", "digits", "--steps", "800", "--hidden", "16", "--latents", "4", "--log-every", "5"]


def _started(run: Path, *more: str, **how: object) -> subprocess.Popen[str]:
    """`aevb train`, some steps after its start."""
    process = subprocess.Popen(
        [*COMMAND, "--out", str(run), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT, **how,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "history.csv").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _goes_on(run: Path) -> None:
    done = subprocess.run([*AEVB, "train", "--resume", str(run)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "trained 800 steps" in done.stdout
    steps = [line.split(",")[0] for line in (run / "history.csv").read_text().splitlines()[1:]]
    assert steps == sorted(set(steps), key=int)


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on(tmp_path) -> None:
    """As SLURM and Kubernetes end a job."""
    process = _started(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.strip().splitlines()[-1] == (
        f"aevb: stopped. A checkpoint is in {tmp_path / 'run'}; go on with: aevb train --resume {tmp_path / 'run'}"
    )
    assert "Traceback" not in errors
    _goes_on(tmp_path / "run")


def test_a_disk_that_fills_up_stops_the_run_with_one_sentence(tmp_path) -> None:
    """A limit on the size of files that the record of its history outgrows, since a disk cannot be filled here."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))

    process = _started(tmp_path / "run", "--checkpoint-every", "50", preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [each for each in errors.splitlines() if each.startswith("aevb:")]
    assert "Could not write" in line
    assert "File too large" in line
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").glob(".checkpoint-*")), "half a checkpoint was left"
    _goes_on(tmp_path / "run")


def test_a_folder_that_may_not_be_written_is_named_before_training(tmp_path) -> None:
    """To root, who may write everywhere, as somebody else."""
    np.save(tmp_path / "x.npy", np.eye(8))
    if os.getuid() == 0:
        for parent in tmp_path.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o555)
    code = (  # modules first, which nobody else may be allowed to read
        "import os, sys, aevb, aevb.training, aevb.data, aevb.apps.runs, torch, tyro, rich.progress\n"
        "from aevb.apps.cli import main\n"
        "aevb.fit(aevb.build_vae(aevb.ModelConfig(features=2)), {'x': torch.randn(9, 2)}, aevb.TrainConfig(steps=1))\n"
        "os.getuid() or os.setuid(65534); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run")],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"aevb: Could not write `{tmp_path / 'run'}`: Permission")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_checkpoint_leaves_no_obstacle(tmp_path) -> None:
    run = tmp_path / "run"
    (run / ".checkpoint-000001.partial").mkdir(parents=True)
    with pytest.raises(aevb.InputError, match="stopped before its first; train anew into it"):
        aevb.load(run)
    vae = aevb.build_vae(aevb.ModelConfig(features=3, latents=1, hidden=(4,)))
    aevb.fit(vae, {"x": torch.randn(20, 3)}, aevb.TrainConfig(steps=2), out=run)
    assert aevb.load(run).history[-1]["step"] == 2
    assert not list(run.glob(".checkpoint-*"))


def test_data_that_changed_under_a_run_are_refused(tmp_path) -> None:
    x, config = torch.randn(40, 3), aevb.TrainConfig(steps=4)
    vae = aevb.build_vae(aevb.ModelConfig(features=3, latents=1, hidden=(4,)))
    aevb.fit(vae, {"x": x}, config, out=tmp_path / "run")
    x[7, 1] += 1e-6
    with pytest.raises(aevb.InputError, match="their content is another"):
        aevb.fit(vae, {"x": x}, config, out=tmp_path / "run", resume=True)


def test_a_run_tells_what_made_it(tmp_path, caplog) -> None:
    x, config = torch.randn(40, 3), aevb.TrainConfig(steps=4)
    vae = aevb.build_vae(aevb.ModelConfig(features=3, latents=1, hidden=(4,)))
    aevb.fit(vae, {"x": x}, config, out=tmp_path / "run")
    made = aevb.load(tmp_path / "run").made
    assert (made["aevb"], made["torch"]) == (aevb.__version__, torch.__version__)
    assert made.keys() >= {"python", "system", "processor"}
    assert "elsewhere" not in caplog.text
    newest = max((tmp_path / "run").glob("checkpoint-*"))
    record = json.loads((newest / "run.json").read_text())
    record["made"]["processor"] = "abacus"
    (newest / "run.json").write_text(json.dumps(record))
    sums = json.loads((newest / "checksums.json").read_text())
    sums["run.json"] = hashlib.sha256((newest / "run.json").read_bytes()).hexdigest()
    (newest / "checksums.json").write_text(json.dumps(sums))
    aevb.fit(vae, {"x": x}, config, out=tmp_path / "run", resume=True)
    assert "processor was abacus" in caplog.text


# -- steps that are not finite, each from a planted cause --------------------------------------------------------------


class _Exploding(nn.Module):
    """A scale that grows past what float32 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * torch.where(x[..., :1] > 2.5, 1e38, 1.0) * 10


class _LogOfZero(nn.Module):
    """A user's net that takes a logarithm of what a ReLU made zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.where(x > 2.5, x.clamp(max=0).log(), x))


@pytest.mark.parametrize(("net", "compile"), [(_Exploding, False), (_Exploding, True), (_LogOfZero, False)])
def test_planted_causes_are_left_out_counted_and_named(net, compile, caplog) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 3).clamp(-2, 2)
    x[17, 0] = 3.0
    q = BayesNet({"z | x": DiagonalNormal(net())})
    p = BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [4], 3), 3)})
    config = aevb.TrainConfig(steps=30, batch_size=20, validation=0.0, log_every=10, compile=compile, average=0.0)
    run = aevb.fit(VAE(p, q), {"x": x}, config)
    # 30 batches of 20 rows are ten epochs of 60, and row 17 comes once in each.
    assert sum(record["dropped"] for record in run.history) == 10
    assert all(bool(p.isfinite().all()) for p in run.vae.parameters())
    assert "log q(z)" in caplog.text or "log p" in caplog.text
    assert "of the batch" in caplog.text
    assert "the gradient of" in caplog.text
