"""What can be decided without torch: the two configurations and the error that bad input raises.

Both configurations are flat, frozen and JSON-able. `ModelConfig` is read by `aevb.build_vae`, `TrainConfig` by
`aevb.fit`; the command line derives its flags from these same fields, and answers `--help` without loading torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

__all__ = ["Activation", "InputError", "Likelihood", "ModelConfig", "Noise", "Optimizer", "Posterior", "TrainConfig"]

Likelihood = Literal["bernoulli", "binomial", "normal"]
Posterior = Literal["diagonal", "full"]
Activation = Literal["tanh", "relu", "softplus", "silu", "gelu"]
Noise = Literal["global", "dimension", "datum"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["cosine", "constant"]

MAX_LATENTS = 10_000


class InputError(ValueError):
    """What the caller gave cannot be used; the message names it, the rule and the remedy."""


class _Checked:
    """JSON in and out, for the frozen dataclasses below."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a field this version does not know is an error, not a silent loss."""
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(fields) - known):
            raise InputError(
                f"{cls.__name__} has no field {', '.join(unknown)}; it knows {', '.join(sorted(known))}. "
                "The file was written by another version of aevb: load it with that one."
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    def _check(self, name: str, rule: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise InputError(f"`{name}` must be {rule}; got {getattr(self, name)!r}. {remedy}")

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError(f"`{field.name}` must be a whole number; got {value!r}. Write it without a point.")
            if field.type == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InputError(f"`{field.name}` must be a number; got {value!r}.")

    def _check_choice(self, name: str, choices: object) -> None:
        allowed = get_args(choices)
        self._check(name, f"one of {', '.join(allowed)}", getattr(self, name) in allowed, "Choose one of these names.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """A latent-variable model p(z) p(x | z) with its encoder q(z | x), told by names.

    Example:
        >>> ModelConfig(features=64, likelihood="binomial", total_count=16).latents
        32
    """

    features: int
    """Entries of one datum x."""
    likelihood: Likelihood = "normal"
    """Family of p(x | z)."""
    total_count: int | None = None
    """Binomial only: the largest count."""
    noise: Noise = "dimension"
    """Normal only: one scale for all, one per dimension, or one per datum and dimension."""
    latents: int = 32
    """Dimensions of z."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the encoder; the decoder has them in reverse."""
    activation: Activation = "silu"
    """Nonlinearity between layers."""
    posterior: Posterior = "diagonal"
    """Covariance of q(z | x)."""
    holes: bool = False
    """Let the encoder see which entries are missing (NaN); on by itself where the data have any."""

    def __post_init__(self) -> None:
        """Check every field."""
        self._check_types()
        self._check("features", "at least 1", self.features >= 1, "Give data with at least one column.")
        self._check_choice("likelihood", Likelihood)
        self._check_choice("noise", Noise)
        self._check_choice("activation", Activation)
        self._check_choice("posterior", Posterior)
        self._check(
            "latents",
            f"between 1 and {MAX_LATENTS}",
            1 <= self.latents <= MAX_LATENTS,
            "A model rarely uses more than a hundred; `aevb evaluate` says how many are active.",
        )
        self._check("hidden", "widths of at least 1", all(w >= 1 for w in self.hidden), "Write e.g. --hidden 200 200.")
        if (self.likelihood == "binomial") != (self.total_count is not None):
            raise InputError(
                f"`total_count` goes with likelihood binomial and only there; got total_count={self.total_count} "
                f"with likelihood {self.likelihood}. Give the largest possible count, e.g. --total-count 16."
            )
        if self.noise != "dimension" and self.likelihood != "normal":
            raise InputError(
                f"`noise` goes with likelihood normal only; got {self.noise} with {self.likelihood}. Drop it."
            )
        if self.total_count is not None:
            self._check("total_count", "at least 1", self.total_count >= 1, "Give the largest possible count.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """How `aevb.fit` trains: Algorithm 1 of the notes (AEVB) with its schedule, checks and stopping rule.

    Example:
        >>> TrainConfig(steps=1000, batch_size=50).optimizer
        'adam'
    """

    steps: int = 20_000
    """Most minibatch updates."""
    batch_size: int = 100
    """Rows per update."""
    samples: int = 1
    """Draws of the latents per datum."""
    optimizer: Optimizer = "adam"
    """Update rule, with torch.optim's formulas."""
    learning_rate: float = 1e-3
    """Peak step size."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up: decays to zero along a half cosine, or stays."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.0
    """Of weight matrices, not biases: decoupled for adamw, an L2 penalty's gradient for the others."""
    clip_norm: float = 0.0
    """Largest Euclidean norm of the gradient; 0 leaves it as it is."""
    kl_warmup_steps: int = 0
    """Updates over which the weight of the KL rises linearly from 0 to 1."""
    average: float = 0.999
    """Decay of the exponential moving average of the weights that is validated and kept; 0 turns it off."""
    validation: float = 0.1
    """Share of the rows held out to choose the kept weights and to stop early; 0 keeps the last weights."""
    validate_every: int = 500
    """Updates between two validations."""
    patience: int = 10
    """Validations without improvement before stopping early; 0 never stops early."""
    seed: int = 0
    """Decides the held-out rows, the order of the minibatches and every draw; initial weights are their maker's."""
    log_every: int = 100
    """Updates between two rows of the history."""
    checkpoint_every: int = 5_000
    """Updates between two checkpoints, where there is a folder to write to."""
    compile: bool = False
    """Compile the whole update (bound, gradient, clipping, optimizer, averaging) into one program."""

    def __post_init__(self) -> None:
        """Check every field."""
        self._check_types()
        self._check_choice("optimizer", Optimizer)
        self._check_choice("schedule", Schedule)
        for name in ("steps", "batch_size", "samples", "validate_every", "log_every", "checkpoint_every"):
            self._check(name, "at least 1", getattr(self, name) >= 1, "Give a positive whole number.")
        for name in ("warmup_steps", "kl_warmup_steps", "patience", "seed"):
            self._check(name, "at least 0", getattr(self, name) >= 0, "Give zero to switch it off.")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            self._check(name, "finite and at least 0", 0 <= value < math.inf, "Give zero to switch it off.")
        rate = self.learning_rate
        self._check("learning_rate", "finite and above 0", 0 < rate < math.inf, "1e-3 is a common choice.")
        for name in ("average", "validation"):
            self._check(name, "in [0, 1)", 0 <= getattr(self, name) < 1, "Give zero to switch it off.")
