"""What a run tells while it runs, and how it is asked to stop."""

from __future__ import annotations

import csv
import io
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

from aevb.checkpoint import write_atomically
from aevb.config import InputError

__all__ = ["History", "Interrupt", "dead_dimensions", "log_to", "told_collapse", "told_dead"]

_DEAD = 0.01
"""Nats below which a latent dimension, or a node whose KL does not split, carries nothing."""
_ECHO_SECONDS = 1.0


class History:
    """Records by log interval, in memory and as `history.csv` in the run's folder; nats a datum."""

    columns = (
        "step", "epoch", "bound", "objective", "reconstruction", "kl", "validation", "learning_rate", "kl_weight",
        "gradient_norm", "dropped", "seconds",
    )  # fmt: skip

    def __init__(self, records: list[dict[str, Any]], out: Path | None) -> None:
        self.records = records
        self.path = None if out is None else out / "history.csv"
        self.started = False

    def take_up(self, records: list[dict[str, Any]]) -> None:
        """Go on from a checkpoint's records; what the file has past them is not the run's."""
        self.records[:] = records
        self._rewrite()

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, and append it to the file."""
        self.records.append(record)
        if self.path is None:
            return
        if not self.started:
            self._rewrite()
            return
        try:
            with open(self.path, "ab") as file:
                file.write(_lines([record], self.columns))
        except OSError as error:
            raise InputError(
                f"Could not write `{self.path}`: {error.strerror}. Free space; the run can be resumed from its last "
                "checkpoint, if it has one."
            ) from error

    def _rewrite(self) -> None:
        if self.path is not None:
            heading = dict(zip(self.columns, self.columns, strict=True))
            write_atomically(self.path, _lines([heading, *self.records], self.columns))
            self.started = True


def _lines(records: list[dict[str, Any]], columns: tuple[str, ...]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for record in records:
        writer.writerow([_cell(record, column) for column in columns])
    return text.getvalue().encode()


def _cell(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column, "")
    return f"{value:.7g}" if isinstance(value, float) else value


def log_to(logger: Any) -> Callable[[dict[str, Any]], None]:
    """A `progress` for `fit` that hands the figures of each record to a logger, such as those of lightning.

    Args:
        logger: Has `log_metrics(metrics, step)`, a mapping of names to numbers and the number of steps taken.

    Returns:
        A function of a record: bound, its terms and the KL of each node in nats a datum, rates, the count of dead
        dimensions, seconds.

    Example:
        >>> class Printer:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics["bound"], metrics["dead"])
        >>> log_to(Printer())({"step": 100, "bound": -3.5, "dead": {"z": [0, 4]}, "kl_dims": {"z": [0.0, 0.2]}})
        100 -3.5 2
    """

    def log(record: dict[str, Any]) -> None:
        figures = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        figures["dead"] = sum(map(len, record["dead"].values()))
        logger.log_metrics(figures, step=record["step"])

    return log


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a later one stops at once.

    What follows within a second is the first one's echo: torchrun passes on what SLURM has sent to its children, too.
    """

    def __init__(self) -> None:
        self.asked: BaseException | None = None  # what to raise once the step is done
        self.since = 0.0

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        stop = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if self.asked is None:
            self.asked, self.since = stop, time.monotonic()
        elif time.monotonic() > self.since + _ECHO_SECONDS:
            raise stop


def dead_dimensions(kl_dims: Mapping[str, list[float]]) -> dict[str, list[int]]:
    """By latent node, the dimensions whose mean KL over the log interval is below 0.01 nats."""
    return {node: [i for i, kl in enumerate(groups) if kl < _DEAD] for node, groups in kl_dims.items()}


def told_collapse(node: str, step: int, kl_weight: float) -> str:
    """What to say of a latent node that carries nothing."""
    return (
        f"Posterior collapse: at step {step} every dimension of `{node}` has a KL below {_DEAD} nats at KL weight "
        f"{kl_weight:g}, so x is modelled without it. Try kl_warmup_steps (a tenth of the steps), free_bits (0.1 to "
        "0.5), a smaller decoder, or a lower learning_rate."
    )


def told_dead(node: str, dims: list[int], groups: int) -> str:
    """What to say of dimensions that carry nothing."""
    return (
        f"{len(dims)} of {groups} dimensions of `{node}` are dead (KL below {_DEAD} nats): "
        f"{', '.join(map(str, dims))}. Fewer latents would do; to use them, try free_bits or kl_warmup_steps."
    )
