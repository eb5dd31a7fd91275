"""Trackers of experiments that show a run's figures while it trains, through lightning's loggers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from aevb.config import InputError

__all__ = ["Tracker", "check_trackers", "tracking"]

Tracker = Literal["tensorboard", "mlflow", "wandb"]


def _tensorboard(module: Any, out: Path) -> Any:
    return module.TensorBoardLogger(root_dir=out, name="tensorboard", version="")


def _mlflow(module: Any, out: Path) -> Any:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve() / 'mlflow.db'}"
    return module.MLFlowLogger(experiment_name="aevb", run_name=out.name, tracking_uri=uri)


def _wandb(module: Any, out: Path) -> Any:
    return module.WandbLogger(project=os.environ.get("WANDB_PROJECT", "aevb"), name=out.name, save_dir=out)


_MAKERS: dict[str, tuple[str, str, Callable[[Any, Path], Any]]] = {
    "tensorboard": ("lightning_fabric.loggers", "tensorboardX", _tensorboard),
    "mlflow": ("pytorch_lightning.loggers", "mlflow", _mlflow),
    "wandb": ("pytorch_lightning.loggers", "wandb", _wandb),
}
"""Name to the module of its logger, the module of the tracker itself, and how one is made for a run's folder."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise if one is not installed, before a run is begun."""
    for name in names:
        for module in _MAKERS[name][:2]:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise InputError(
                    f"`--tracker {name}` needs {error.name or module}, which is not installed. "
                    f"Install it: pip install 'aevb[{name}]'."
                ) from None


@contextmanager
def tracking(names: Sequence[str], out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes the records of the history; trackers begin at the first, when the run has its folder."""
    from aevb.training import log_to

    made: list[Any] = []

    def tell(record: dict[str, Any]) -> None:
        if not made:
            made.extend(
                make(importlib.import_module(module), out) for module, _, make in map(_MAKERS.__getitem__, names)
            )
        for logger in made:
            log_to(logger)(record)

    status = "failed"
    try:
        yield tell
        status = "success"
    finally:
        for logger in made:
            logger.finalize(status)
