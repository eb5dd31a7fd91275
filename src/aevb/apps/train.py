"""Training as the command line does it: from data to a saved run, or on from where a run was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.progress import steps_done
from aevb.apps.runs import data_of, load_data, model_config, open_run, rows_for_start
from aevb.config import InputError, TrainConfig

if TYPE_CHECKING:
    from aevb.checkpoint import Run
    from aevb.data import Data

__all__ = ["Stopped", "go_on", "start"]


class Stopped(Exception):
    """A run was told to stop, and did: the status to end with, and how to go on."""


def start(source: dict[str, Any], out: Path, objective: str, model: dict[str, Any], config: TrainConfig) -> None:
    """Train anew and save the run in `out`."""
    import torch

    from aevb.build import build_vae
    from aevb.checkpoint import holds_nothing

    if not holds_nothing(out):
        raise InputError(f"`{out}` exists already; a run is never overwritten. Choose another --out.")
    data = load_data(source)
    described = model_config(model, data)
    before = torch.get_default_dtype()
    try:
        # Values that float32 cannot tell apart, such as times in seconds, are read as float64 and modelled so.
        torch.set_default_dtype(torch.float64 if data.train.dtype == torch.float64 else before)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            vae = build_vae(described, rows_for_start(data))
    finally:
        torch.set_default_dtype(before)
    describe = data.describe() | {"command": source, "objective": objective}
    print(f"{data.name}: {len(data.train)} rows of {data.features}, likelihood {described.likelihood}", flush=True)
    with steps_done(config.steps) as progress:
        run = _fit(vae, data, config, objective, out, False, progress, describe)
    _tell_end(run)


def go_on(folder: Path) -> None:
    """Go on with a run that was stopped, as it was begun."""
    import torch

    run = open_run(folder)
    so_far = run.resume["numbers"]
    if so_far["finished"] or so_far["step"] >= run.config.steps:
        raise InputError(
            f"`{folder}` is finished, at step {so_far['step']}; there is nothing to go on with. Train anew."
        )
    torch.set_num_threads(so_far["threads"])  # another number would round otherwise
    data = data_of(run, None)
    with steps_done(run.config.steps, so_far["step"]) as progress:
        run = _fit(run.vae, data, run.config, run.data["objective"], folder, True, progress, run.data)
    _tell_end(run)


def _fit(
    vae: Any, data: Data, config: TrainConfig, objective: str, out: Path, resume: bool,
    progress: Callable[[dict[str, Any]], None], describe: dict[str, Any],
) -> Run:  # fmt: skip
    from aevb.checkpoint import holds_nothing
    from aevb.training import fit

    try:
        return fit(
            vae,
            data.training(),
            config,
            objective=objective,
            out=out,
            resume=resume,
            progress=progress,
            describe=describe,
        )
    except (KeyboardInterrupt, SystemExit) as stop:
        if holds_nothing(out):
            raise
        told = f"A checkpoint is in {out}; go on with: aevb train --resume {out}"
        raise Stopped(stop.code if isinstance(stop, SystemExit) else 130, told) from None


def _tell_end(run: Run) -> None:
    last = run.history[-1]
    kept = [record for record in run.history if "validation" in record]
    if kept:
        best = max(kept, key=lambda record: record["validation"])
        print(f"kept the weights of step {best['step']} (validation bound {best['validation']:.2f} nats)")
    early = ", stopped early," if last["step"] < run.config.steps else ""
    print(f"trained {last['step']} steps{early} in {last['seconds']:.0f} s; saved in {run.path}")
