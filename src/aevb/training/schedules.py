"""What changes from step to step by the settings alone."""

from __future__ import annotations

import math

from aevb.config import TrainConfig

__all__ = ["kl_weight", "learning_rate"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update after `step` updates."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * rise
    through = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * through))


def kl_weight(config: TrainConfig, step: int) -> float:
    """Weight of the KL in the update after `step` updates."""
    if not config.kl_warmup_steps:
        return config.beta
    length = config.steps // config.kl_cycles
    since = step - min(step // length, config.kl_cycles - 1) * length
    return config.beta * min(1.0, since / config.kl_warmup_steps)
