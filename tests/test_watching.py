"""What a long command shows while it runs: lines off a terminal, a bar on one, and trackers of experiments."""

from __future__ import annotations

import io
import json
import re
import sys
import types

import numpy as np
import pytest

from aevb.apps import progress
from aevb.apps.cli import main
from aevb.apps.progress import rows_done, steps_done

RECORD = {"bound": -101.234, "reconstruction": -88.1, "kl": 13.134}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_off_a_terminal_are_seldom_and_end_with_the_last_step(capsys, clock) -> None:
    with steps_done(1000, 50) as tell:
        for step in range(100, 1001, 100):
            clock[0] += 4.0
            tell(RECORD | {"step": step} | ({"validation": -103.0} if step == 500 else {}))
    told = "bound -101.23 nats (reconstruction -88.10, KL 13.13)"
    assert capsys.readouterr().err.splitlines() == [
        f"training: 300 of 1000 steps, 1,250 rows/s, 0:28 left; {told}",
        f"training: 600 of 1000 steps, 1,250 rows/s, 0:16 left; {told}, held out -103.00",
        f"training: 900 of 1000 steps, 1,250 rows/s, 0:04 left; {told}, held out -103.00",
        f"training: 1000 of 1000 steps, 1,250 rows/s, 0:00 left; {told}, held out -103.00",
    ]


def test_a_resumed_run_counts_its_own_steps_only(capsys, clock) -> None:
    with steps_done(1000, 10, start=900) as tell:
        clock[0] += 20.0
        tell(RECORD | {"step": 950})
    assert "training: 950 of 1000 steps" in (line := capsys.readouterr().err)
    assert "25 rows/s, 0:20 left" in line


def test_rows_are_told_likewise_and_quiet_is_quiet(capsys, clock) -> None:
    for quiet in (False, True):
        with rows_done("scoring", 30_000, quiet) as done:
            clock[0] += 7200.0
            done(15_000)
        told = "" if quiet else "scoring: 15000 of 30000 rows, 2 rows/s, 2:00:00 left\n"
        assert capsys.readouterr().err == told


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with steps_done(1000, 50, start=500) as tell:
        tell(RECORD | {"step": 750})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    assert "750/1000" in shown
    assert "bound -101.23 nats (reconstruction -88.10, KL 13.13)" in shown


def test_tensorboard_is_told_every_record_of_a_run(tmp_path, monkeypatch) -> None:
    from tensorboardX.proto.event_pb2 import Event

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 3)))
    flags = ["--steps", "40", "--log-every", "10", "--batch-size", "20", "--hidden", "4", "--latents", "2"]
    out = tmp_path / "run"
    monkeypatch.setattr(
        sys, "argv", ["aevb", "train", str(tmp_path / "x.npy"), "--out", str(out), "--tracker", "tensorboard", *flags]
    )
    main()
    (path,) = (out / "tensorboard").glob("events.out.tfevents.*")
    # TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4).
    content, at, seen = path.read_bytes(), 0, {}
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        seen |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += size + 16
    newest = max(out.glob("checkpoint-*"))
    history = json.loads((newest / "run.json").read_text())["history"]
    records = [record for record in history if "bound" in record]
    assert len(records) == 4
    for record in records:
        for name in ("bound", "kl_z", "learning_rate", "gradient_norm"):
            assert seen[record["step"], name] == pytest.approx(record[name], rel=1e-6)


def test_a_tracker_that_is_not_there_is_told_before_training(tmp_path, monkeypatch) -> None:
    def without(name: str) -> object:
        if name.startswith("wandb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return object()

    monkeypatch.setattr("aevb.apps.loggers.importlib", types.SimpleNamespace(import_module=without))
    monkeypatch.setattr(
        sys, "argv", ["aevb", "train", "digits", "--out", str(tmp_path / "run"), "--tracker", "tensorboard", "wandb"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    wanted = "`--tracker wandb` needs wandb, which is not installed. Install it: pip install 'aevb[wandb]'."
    assert stop.value.code == f"aevb: {wanted}"  # which the interpreter prints, and ends with status 1
    assert not (tmp_path / "run").exists()
