"""Training as the command line does it: from data to a saved run, or on from where a run was stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.choices import model_config
from aevb.apps.loggers import check_trackers, tracking
from aevb.apps.progress import steps_done
from aevb.apps.runs import data_of, load_data, open_run, rows_for_start
from aevb.config import InputError, TrainConfig

if TYPE_CHECKING:
    from aevb.checkpoint import Run
    from aevb.data import Data
    from aevb.training.processes import Processes

__all__ = ["Stopped", "go_on", "start"]


class Stopped(Exception):
    """A run was told to stop, and did: the status to end with, and how to go on."""


def start(
    source: dict[str, Any], out: Path, objective: str, model: dict[str, Any], config: TrainConfig,
    devices: int = 1, nodes: int = 1, trackers: Sequence[str] = (), told: str = "",
) -> None:  # fmt: skip
    """Train anew, on some processes, and save the run in `out`; says `told` of the data first."""
    import torch

    from aevb.build import build_vae
    from aevb.checkpoint import holds_nothing
    from aevb.training.processes import launch

    if not holds_nothing(out):
        raise InputError(f"`{out}` exists already; a run is never overwritten. Choose another --out.")
    if source.get("target") and objective != "elbo":
        raise InputError(
            f"`--objective {objective}` gives q(y | x) of a target no gradient, since y is summed over. Train by elbo."
        )
    check_trackers(trackers)
    _check_devices(devices, nodes, config)
    data = load_data(source)
    described = model_config(model, data, config)
    processes = launch(devices, nodes)
    before = torch.get_default_dtype()
    try:
        # Values that float32 cannot tell apart, such as times in seconds, are read as float64 and modelled so.
        torch.set_default_dtype(torch.float64 if data.train.dtype == torch.float64 else before)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            vae = build_vae(described, **rows_for_start(data))
    finally:
        torch.set_default_dtype(before)
    describe = data.describe() | {"command": source, "objective": objective} | _weight(data)
    if processes.is_writer:
        print(told, end="")
        rows = f"{data.name}: {len(data.train)} rows of {described.features}"
        net = ", net convolutional" if described.image else ""
        print(f"{rows}{_beside(data)}, likelihood {described.likelihood}{net}", flush=True)
    run = _fit(vae, data, config, out, None, trackers, describe, processes)
    if processes.is_writer:
        _tell_end(run)


def _weight(data: Data) -> dict[str, float]:
    """What a run records of the weight of log q(y | x), where it has a target."""
    from aevb.bounds import label_weight

    labelled = _labelled(data)
    return {"label_weight": label_weight(len(data.train), labelled)} if labelled else {}


def _labelled(data: Data) -> int:
    """Rows in which the target is known; 0 where there is no target."""
    from torch import Tensor

    if data.target is None or not isinstance(data.train, Tensor):
        return 0
    return int((~data.train[:, data.target.at].isnan()).sum())


def _beside(data: Data) -> str:
    """The batches, or the target, in words."""
    if data.batch is not None:
        return f", in {len(data.batch)} batches by {data.batch.column}"
    if data.target is None:
        return ""
    kind = data.target.kind if data.target.classes else f"{data.target.column.kind}, Gaussian"
    kind += " on the log scale" if data.target.kind == "positive" else ""
    return f" and the target {data.target.name} ({kind}), known in {_labelled(data)}"


def _check_devices(devices: int, nodes: int, config: TrainConfig) -> None:
    """Raise before any process is started if the parts of a batch could not be shared out among them."""
    from aevb.training.processes import Processes

    if devices < 1 or nodes < 1:
        raise InputError(f"`devices` and `nodes` must be at least 1; got {devices} and {nodes}.")
    Processes(size=devices * nodes).parts(config.shards, config.batch_size)


def go_on(folder: Path, devices: int = 1, nodes: int = 1, trackers: Sequence[str] = ()) -> None:
    """Go on with a run that was stopped, as it was begun, on as many processes as may be."""
    import torch

    from aevb.training.processes import launch

    run = open_run(folder)
    if not run.resume:
        raise InputError(f"`{folder}` holds weights but no state of training. Give a run, or train anew.")
    so_far = run.resume["numbers"]
    if so_far["finished"] or so_far["step"] >= run.config.steps:
        raise InputError(
            f"`{folder}` is finished, at step {so_far['step']}; there is nothing to go on with. Train anew."
        )
    check_trackers(trackers)
    _check_devices(devices, nodes, run.config)
    data = data_of(run, None)
    processes = launch(devices, nodes, so_far["device"])
    torch.set_num_threads(so_far["threads"])  # another number would round otherwise
    run.vae.to(so_far["device"])
    run = _fit(run.vae, data, run.config, folder, so_far["step"], trackers, run.data, processes)
    if processes.is_writer:
        _tell_end(run)


def _fit(
    vae: Any, data: Data, config: TrainConfig, out: Path, at: int | None, trackers: Sequence[str],
    describe: dict[str, Any], processes: Processes,
) -> Run:  # fmt: skip
    """Train, from step `at` of the run in `out` if it is not None; the process that writes shows how far it is.

    `describe` is what the run records; the objective is made of it, so that a run goes on as it was begun.
    """
    from aevb.bounds import with_classifier
    from aevb.checkpoint import holds_nothing
    from aevb.training import fit

    told = f"A checkpoint is in {out}; go on with: aevb train --resume {out}"
    objective: Any = describe["objective"]
    if "label_weight" in describe:
        objective = with_classifier("y", describe["label_weight"])
    shown = steps_done(config.steps, config.batch_size, at or 0, quiet=not processes.is_writer)
    try:
        with shown as bar, tracking(trackers if processes.is_writer else (), out) as track:
            return fit(
                vae.to(processes.device),
                data.training(),
                config,
                objective=objective,
                out=out,
                resume=at is not None,
                progress=lambda record: (bar(record), track(record))[0],
                describe=describe,
            )
    except (KeyboardInterrupt, SystemExit) as stop:
        if holds_nothing(out):
            raise
        status = stop.code if isinstance(stop, SystemExit) else 130
        raise Stopped(status, told if processes.is_writer else "") from None
    except ConnectionError as error:
        kept = processes.is_writer and not holds_nothing(out)
        raise Stopped(1, f"{error} {told if kept else ''}".rstrip()) from error


def _tell_end(run: Run) -> None:
    last = run.history[-1]
    kept = [record for record in run.history if "validation" in record]
    if kept:
        best = max(kept, key=lambda record: record["validation"])
        weight = run.data.get("label_weight")
        what = "bound" if weight is None else f"bound + {weight:.1f} log q(y | x):"
        print(f"kept the weights of step {best['step']} (validation {what} {best['validation']:.2f} nats)")
    early = ", stopped early," if last["step"] < run.config.steps else ""
    print(f"trained {last['step']} steps{early} in {last['seconds']:.0f} s; saved in {run.path}")
