"""Kill a training run over and over, resume it each time, and compare it bit by bit with one that was never stopped.

    python benchmarks/survival.py [--kills 40] [--compiled-kills 4] [--seed 0]

Each attempt is a process of its own. First it is killed (SIGKILL) at places chosen by hand, one after another: in the
middle of a file, before a flush (the file cut short, as a loss of power leaves it), before and after each renaming,
while old checkpoints are removed, in the middle of a line of the history, during validation and during compilation;
then at random moments. Compared are the weights, the averaged and the best ones, the optimizer's state, the state of
early stopping, and the history in both its forms, all but the seconds in it. The status is 0 if every run agrees.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes that would outlive a kill

import torch

import aevb
import aevb.checkpoint
import aevb.training.log
import aevb.training.loop
from aevb.checkpoint import holds_nothing

CONFIG = aevb.TrainConfig(
    steps=60, batch_size=20, learning_rate=0.01, kl_warmup_steps=20, clip_norm=50.0, average=0.95, validation=0.2,
    validate_every=10, patience=6, log_every=4, checkpoint_every=7, compile=False,
)  # fmt: skip


def train(folder: Path, compile: bool) -> None:
    """Begin the run in `folder`, or go on with it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(150, 3) @ torch.randn(3, 6)
    x[torch.rand(x.shape) < 0.1] = torch.nan
    vae = aevb.build_vae(aevb.ModelConfig(features=6, latents=2, hidden=(16,), batch_norm=True, holes=True), x)
    config = aevb.TrainConfig(**CONFIG.to_json() | {"compile": compile})
    aevb.fit(vae, {"x": x}, config, out=folder, resume=not holds_nothing(folder))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(module: object, name: str, nth: int, last_act: Callable[..., object] = lambda *_: None) -> None:
    """Die at the nth call of a function, before it does anything."""
    real, calls = getattr(module, name), iter(range(1, sys.maxsize))

    def faulty(*args: object, **named: object) -> object:
        if next(calls) == nth:
            last_act(*args)
            die()
        return real(*args, **named)

    setattr(module, name, faulty)


def _after(module: object, name: str, nth: int) -> None:
    """Die after the nth call of a function."""
    real, calls = getattr(module, name), iter(range(1, sys.maxsize))

    def faulty(*args: object, **named: object) -> object:
        found = real(*args, **named)
        if next(calls) == nth:
            die()
        return found

    setattr(module, name, faulty)


def _half_a_file(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def _cut_short(handle: int) -> None:
    with contextlib.suppress(OSError):  # a folder cannot be
        os.ftruncate(handle, os.fstat(handle).st_size // 3)


def _half_a_line(history: aevb.training.log.History, record: dict[str, object]) -> None:
    with open(history.path, "a") as file:
        file.write(f"{record['step']},0.1")


def _one_file_gone(folder: Path, **_: object) -> None:
    next(iter(folder.iterdir())).unlink()


PLACES: dict[str, Callable[[int], None]] = {
    "in the middle of a file": lambda n: _before(aevb.checkpoint, "_write_file", n, _half_a_file),
    "before a flush, the file cut short": lambda n: _before(os, "fsync", n, _cut_short),
    "before a checkpoint is renamed": lambda n: _before(os, "rename", n),
    "after a checkpoint is renamed": lambda n: _after(os, "rename", n),
    "before a file is renamed": lambda n: _before(os, "replace", n),
    "after a file is renamed": lambda n: _after(os, "replace", n),
    "while an old checkpoint is removed": lambda n: _before(shutil, "rmtree", n, _one_file_gone_if_old),
    "in the middle of a line of the history": lambda n: _before(aevb.training.log.History, "add", n, _half_a_line),
    "during validation": lambda n: _before(aevb.training.loop, "terms", n),
}
TIMES = {"before a file is renamed": (1,), "after a file is renamed": (1,)}  # the history is rewritten once a process


def _one_file_gone_if_old(folder: Path, *_: object) -> None:
    if Path(folder).exists():
        _one_file_gone(Path(folder))


def _during_compilation(nth: int) -> None:
    import torch._inductor.compile_fx

    _before(torch._inductor.compile_fx, "compile_fx", nth)


def attempt(folder: Path, compile: bool, trouble: Callable[[], None] | None = None, after: float | None = None) -> bool:
    """Whether a process that trains in `folder` came to the end; it may be killed `after` some seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if trouble is not None:
                trouble()
            train(folder, compile)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"An attempt in {folder} ended with status {os.waitstatus_to_exitcode(status)}.")
    return True


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was stopped."""
    newest = max(folder.glob("checkpoint-*"))
    record = json.loads((newest / "run.json").read_text())
    for each in record["history"]:
        each.pop("seconds")
    record["resume"].pop("seconds")
    with open(folder / "history.csv", newline="") as file:
        rows = [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    tensors = {name: (newest / name).read_bytes() for name in ("model.safetensors", "training.safetensors")}
    return {"run.json": record, "history.csv": rows} | tensors


def compare(name: str, found: dict[str, object], wanted: dict[str, object]) -> None:
    odd = [part for part, value in wanted.items() if found[part] != value]
    if odd:
        sys.exit(f"{name}: {', '.join(odd)} differ from those of the run that was never stopped.")


def finished(folder: Path, compile: bool, wanted: dict[str, object], name: str) -> None:
    attempt(folder, compile)
    compare(name, outcome(folder), wanted)
    shutil.rmtree(folder)


def at_places(work: Path, wanted: dict[str, object], places: dict[str, Callable[[int], None]], compile: bool) -> int:
    """One run for each place and each of some calls there; returns the kills."""
    kills = 0
    for name, plant in places.items():
        for nth in TIMES.get(name, (1, 2, 5)) if not compile else (1,):
            folder = work / "run"
            if attempt(folder, compile, lambda plant=plant, nth=nth: plant(nth)):
                sys.exit(f"{name}, call {nth}: the process was not killed, so nothing was shown.")
            finished(folder, compile, wanted, f"{name}, call {nth}")
            kills += 1
        print(f"killed {name}: the same bits", flush=True)
    return kills


def at_random(work: Path, wanted: dict[str, object], compile: bool, kills: int, seconds: float) -> Iterator[int]:
    """Yields the kills that each run needed, until there were enough."""
    done = 0
    while done < kills:
        folder, here = work / "run", 0
        while done + here < kills and not attempt(folder, compile, after=random.uniform(0.0, seconds)):
            here += 1
        finished(folder, compile, wanted, f"a run killed {here} times at random")
        done += here
        yield here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="at random moments of eager runs")
    parser.add_argument("--compiled-kills", type=int, default=4, help="at random moments of compiled runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    total = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        train(work / "warm", compile=False)  # what is imported on the way, each attempt would import anew
        for compile, kills in ((False, options.kills), (True, options.compiled_kills)):
            if not kills:
                continue
            began = time.monotonic()
            attempt(work / "whole", compile)
            took, wanted = time.monotonic() - began, outcome(work / "whole")
            shutil.rmtree(work / "whole")
            places = {"during compilation": _during_compilation} if compile else PLACES
            total += at_places(work, wanted, places, compile)
            each = list(at_random(work, wanted, compile, kills, took))
            total += sum(each)
            tier = "compiled" if compile else "eager"
            print(f"{tier}: {sum(each)} kills at random moments of {len(each)} runs of {took:.1f} s: the same bits")
    print(f"{total} kills, each survived to the bit")


if __name__ == "__main__":
    main()
