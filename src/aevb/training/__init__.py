"""Training: Algorithm 1 of the notes (AEVB), with what a long run needs around it."""

from __future__ import annotations

from aevb.config import TrainConfig
from aevb.training.batches import Dataset, split_rows
from aevb.training.log import log_to
from aevb.training.loop import OBJECTIVES, fit

__all__ = ["OBJECTIVES", "Dataset", "TrainConfig", "fit", "log_to", "split_rows"]
