"""What can be decided without torch: the two configurations, kinds of columns, and the error that bad input raises.

Both configurations are flat, frozen and JSON-able. `ModelConfig` is read by `aevb.build_vae`, `TrainConfig` by
`aevb.fit`; the command line derives its flags from these same fields, and answers `--help` without loading torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

__all__ = [
    "Activation",
    "Discrete",
    "Gradient",
    "InputError",
    "Kind",
    "Library",
    "Likelihood",
    "ModelConfig",
    "Net",
    "Noise",
    "Optimizer",
    "Posterior",
    "Precision",
    "Prior",
    "TrainConfig",
]

Likelihood = Literal[
    "bernoulli", "autoregressive", "binomial", "beta-binomial", "normal", "student-t", "poisson", "negative-binomial",
    "zero-inflated", "discretized-logistic", "mixed",
]  # fmt: skip
Prior = Literal["standard", "learned", "mixture", "vamp", "flow"]
Posterior = Literal["diagonal", "full", "product", "planar", "sylvester", "iaf", "spline"]
Net = Literal["plain", "gated", "residual", "convolutional"]
Activation = Literal["tanh", "relu", "softplus", "silu", "gelu"]
Noise = Literal["global", "dimension", "datum"]
Library = Literal["none", "observed", "latent"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
Gradient = Literal["plain", "stl", "dreg"]
Discrete = Literal["sum", "sample", "relax"]
Precision = Literal["float32", "bfloat16"]

MAX_LATENTS = 10_000


class InputError(ValueError):
    """What the caller gave cannot be used; the message names it, the rule and the remedy."""


@dataclass(frozen=True)
class Kind:
    """What one column of a table holds, written `binary`, `categorical:C`, `ordinal:LOW:HIGH`, `count` and so on.

    Binary values are 0 and 1, categories codes 0, ..., C - 1, ordinals whole numbers from LOW to HIGH, counts whole
    numbers from 0, positive values above 0.

    Example:
        >>> Kind.parse("ordinal:1:5"), str(Kind.parse("categorical:3"))
        (Kind(name='ordinal', low=1, high=5), 'categorical:3')
    """

    name: str
    low: int = 0
    high: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The kind that `text` names.

        Raises:
            InputError: If it names none.
        """
        name, *bounds = text.split(":")
        try:
            numbers = [int(bound) for bound in bounds]
        except ValueError:
            numbers = []
        if len(numbers) == len(bounds) == _BOUNDS.get(name, -1):
            low, high = (0, numbers[0] - 1) if name == "categorical" else numbers or (0, 1 if name == "binary" else 0)
            if name not in ("categorical", "ordinal") or low < high:
                return cls(name, low, high)
        raise InputError(
            f"A column's kind must be {', '.join(_SPELT.values())}, with at least two values where they are bounded; "
            f"got {text!r}. Write e.g. ordinal:1:5."
        )

    @property
    def values(self) -> int:
        """How many values there are; 0 where they have no bounds."""
        return self.high - self.low + 1 if self.high > self.low else 0

    @property
    def classes(self) -> int:
        """How many classes a node of this kind has; 0 where its values are numbers."""
        return self.values if self.name in ("binary", "categorical") else 0

    @property
    def heads(self) -> int:
        """Numbers from a net that tell the distribution of one entry."""
        return self.values if self.name == "categorical" else 2 if self.name in ("ordinal", "count") else 1

    @property
    def inputs(self) -> int:
        """Numbers that show one entry to a net: one a category, else one."""
        return self.values if self.name == "categorical" else 1

    def __str__(self) -> str:
        """As `parse` reads it."""
        told = {"categorical": f":{self.values}", "ordinal": f":{self.low}:{self.high}"}
        return self.name + told.get(self.name, "")


_SPELT = {
    "binary": "binary", "categorical": "categorical:C", "ordinal": "ordinal:LOW:HIGH", "count": "count",
    "continuous": "continuous", "positive": "positive",
}  # fmt: skip
_BOUNDS = {name: text.count(":") for name, text in _SPELT.items()}


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
    """Family of p(x | z); mixed: one for each column of a table."""
    kinds: tuple[str, ...] = ()
    """Mixed only: what each column holds, as `Kind` writes it."""
    target: str = ""
    """Mixed only: what y holds, a column beside x, as `Kind` writes it; the model is then p(y) p(z) p(x | y, z) with
    q(y | x) q(z | x, y), y a class if it is binary or categorical, else Gaussian (if it is positive, on the log
    scale)."""
    total_count: int | None = None
    """Binomial and beta-binomial only: the largest count."""
    noise: Noise = "dimension"
    """Normal and student-t: one scale for all, one per dimension, or one per datum and dimension; the same for the
    dispersion of negative-binomial and zero-inflated."""
    library: Library = "none"
    """Negative-binomial and zero-inflated: whether z decides the composition of a row alone, and its library size, the
    sum of its counts, comes from elsewhere: observed (p is then that of x given its own sum) or latent (log-normal)."""
    prior: Prior = "standard"
    """Family of p(z)."""
    components: int = 50
    """Gaussians of the mixture prior, or pseudo-inputs of the vamp prior."""
    latents: int = 32
    """Dimensions of z."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the encoder; the decoder has them in reverse."""
    activation: Activation = "silu"
    """Nonlinearity between layers."""
    net: Net = "plain"
    """Layers of encoder and decoder: plain ones, gated ones (which take no activation), or with skip connections; of
    images also convolutional ones."""
    image: tuple[int, ...] = ()
    """Convolutional only: (C, H, W) of the images that the features are, channel by channel."""
    channels: tuple[int, ...] = (32, 64)
    """Convolutional only: channels after each convolution of the encoder, which halves both sides; the decoder has them
    in reverse. Takes the place of hidden."""
    batch_norm: bool = False
    """Normalise every hidden layer over the batch."""
    posterior: Posterior = "diagonal"
    """Family of q(z | x): a Gaussian, factorized, with full covariance, or the product of what each known column says;
    or one bent by a normalizing flow."""
    flow_layers: int = 4
    """Layers of the flow, in posterior and prior."""
    batches: int = 0
    """Batches that the rows are of, one-hot (donors, plates); the model is then p(z) p(x | z, batch) with q(z | x,
    batch), and its figures are log p(x | batch). 0 for none."""
    holes: bool = False
    """Let the encoder see which entries are missing (NaN); on by itself where the data have any."""

    def __post_init__(self) -> None:
        """Check every field."""
        self._check_types()
        self._check("features", "at least 1", self.features >= 1, "Give data with at least one column.")
        self._check_choice("likelihood", Likelihood)
        self._check_choice("noise", Noise)
        self._check_choice("library", Library)
        self._check_choice("activation", Activation)
        self._check_choice("posterior", Posterior)
        self._check_choice("prior", Prior)
        self._check_choice("net", Net)
        for name in ("components", "flow_layers"):
            self._check(name, "at least 1", getattr(self, name) >= 1, "Give a positive whole number.")
        self._check(
            "latents",
            f"between 1 and {MAX_LATENTS}",
            1 <= self.latents <= MAX_LATENTS,
            "A model rarely uses more than a hundred; `aevb evaluate` says how many are active.",
        )
        self._check("hidden", "widths of at least 1", all(w >= 1 for w in self.hidden), "Write e.g. --hidden 200 200.")
        counted = self.likelihood in ("binomial", "beta-binomial")
        if counted != (self.total_count is not None):
            raise InputError(
                f"`total_count` goes with likelihood binomial or beta-binomial and only there; got total_count="
                f"{self.total_count} with likelihood {self.likelihood}. Give the largest possible count, e.g. "
                "--total-count 16."
            )
        self._check_kinds()
        self._check_image()
        self._check_batches()
        spread = ("normal", "student-t", "negative-binomial", "zero-inflated")
        if self.noise != "dimension" and self.likelihood not in spread:
            raise InputError(
                f"`noise` goes with the likelihoods {', '.join(spread)} only; got {self.noise} with {self.likelihood}. "
                "Drop it."
            )
        if self.library != "none" and self.likelihood not in ("negative-binomial", "zero-inflated"):
            raise InputError(
                f"`library` goes with the likelihoods negative-binomial and zero-inflated only; got {self.library} "
                f"with {self.likelihood}. Drop it, or choose one of these."
            )
        if self.library != "none" and self.holes:
            raise InputError("`library` is the sum of a row's counts, which rows with holes do not tell. Drop one.")
        if self.prior == "vamp" and self.posterior not in ("diagonal", "full", "product"):
            raise InputError(
                f"`prior` vamp is a mixture of Gaussian posteriors; got {self.posterior}. Use diagonal, full or "
                "product."
            )
        if self.net == "gated" and self.activation != "silu":
            raise InputError("`activation` has no effect on gated layers, which bring their own. Drop it.")
        if self.total_count is not None:
            self._check("total_count", "at least 1", self.total_count >= 1, "Give the largest possible count.")

    def _check_kinds(self) -> None:
        if len(self.kinds) != (self.features if self.likelihood == "mixed" else 0):
            raise InputError(
                f"`kinds` goes with likelihood mixed, one kind a column; got {len(self.kinds)} with {self.features} "
                f"columns and likelihood {self.likelihood}. Give as many kinds as columns, or none."
            )
        for kind in self.kinds:
            Kind.parse(kind)
        if self.target:
            Kind.parse(self.target)
            if not self.kinds:
                raise InputError(
                    f"`target` goes with likelihood mixed only; got {self.target!r} with {self.likelihood}. Drop it, "
                    "or give the kinds of the other columns."
                )
        if self.kinds and self.prior == "vamp":
            raise InputError(
                "`prior` vamp learns inputs that look like data, which codes of categories cannot; with likelihood "
                "mixed use mixture or flow."
            )

    def _check_batches(self) -> None:
        self._check("batches", "0, or at least 2", self.batches == 0 or self.batches >= 2, "One tells nothing apart.")
        lost = {
            "likelihood": ("mixed",), "posterior": ("product",), "prior": ("vamp",), "net": ("convolutional",),
        }  # fmt: skip
        for name, choices in lost.items():
            if self.batches and (got := getattr(self, name)) in choices:
                raise InputError(
                    f"`batches` stand beside x in the networks, which `{name}` {got} has no place for. Choose another "
                    f"{name}, or leave the batch out (--batch)."
                )

    def _check_image(self) -> None:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        if self.net != "convolutional":
            for name in ("image", "channels"):
                if (got := getattr(self, name)) != default[name]:
                    raise InputError(f"`{name}` goes with net convolutional only; got {got} with {self.net}. Drop it.")
            return
        sized = len(self.image) == 3 and min(self.image) >= 1 and math.prod(self.image) == self.features
        self._check("image", f"(C, H, W) with {self.features} = C H W", sized, "A grey image is (1, H, W).")
        wide = len(self.channels) > 0 and min(self.channels) >= 1
        self._check("channels", "one number of at least 1 for each convolution", wide, "Write e.g. --channels 32 64.")
        if self.likelihood == "mixed" or self.posterior == "product":
            raise InputError(
                "`net` convolutional sees an image as a whole, where likelihood mixed and posterior product take one "
                "column at a time. Drop one of the two."
            )
        if self.hidden != default["hidden"] and self.likelihood != "autoregressive":
            raise InputError(
                f"`hidden` has no effect on convolutional layers; got {self.hidden}. Give --channels, or drop it."
            )


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
    shards: int = 1
    """Equal parts that each batch is cut into, each with noise of its own; processes share them out among themselves,
    and one process takes them one after another, to the same weights."""
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
    gradient: Gradient = "plain"
    """Estimator of q's gradient, the bound's value being the same: stl (sticking the landing) for elbo, dreg (doubly
    reparameterized) for iwae."""
    discrete: Discrete = "sum"
    """Latent classes and binary vectors: sum over their states exactly, sample them (score-function gradient), or relax
    them (Gumbel-softmax; the objective is then no bound)."""
    temperature: float = 0.5
    """Of the relaxation."""
    kl_warmup_steps: int = 0
    """Updates over which the weight of the KL rises linearly from 0 to 1."""
    kl_cycles: int = 1
    """Times that the weight of the KL rises, at equal intervals over all steps (Fu et al., 2019)."""
    beta: float = 1.0
    """Weight of the KL after its rise (Higgins et al., 2017); above 1 the objective is a looser bound, below 1 none."""
    tc_weight: float = 1.0
    """Weight of the total correlation of the aggregated posterior inside the KL (Chen et al., 2018)."""
    free_bits: float = 0.0
    """Nats that a group of latent dimensions may use at no cost, as a mean over the minibatch (Kingma et al., 2016)."""
    free_bits_groups: int = 0
    """Groups into which the dimensions of each latent node fall in order; 0: every dimension is one."""
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
    """Updates between two checkpoints, where there is a folder to write to; there is one before the first, too."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; each holds the best weights so far."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the update (bound, gradient, clipping, optimizer, averaging) into one program, or, where a net does not
    allow it, the loss alone. auto: where the steps and the size of the model promise more than two minutes. A net or an
    objective of one's own must draw by torch's generator: what Python's `random` draws is not recorded, and torch 2.13
    compiles `random.uniform` to wrong numbers."""
    precision: Precision = "float32"
    """Of the factors of matrix products and, in a step compiled for a processor, of their results; bfloat16 has effect
    where the processor or GPU has units for it. Weights, log-densities and KLs are float32 either way."""

    def __post_init__(self) -> None:
        """Check every field."""
        self._check_types()
        self._check_choice("optimizer", Optimizer)
        self._check_choice("schedule", Schedule)
        self._check_choice("gradient", Gradient)
        self._check_choice("discrete", Discrete)
        self._check_choice("precision", Precision)
        self._check(
            "compile", "true, false or auto", self.compile in (True, False, "auto"), "auto decides by the size."
        )
        for name in (
            "steps",
            "batch_size",
            "shards",
            "samples",
            "kl_cycles",
            "validate_every",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            self._check(name, "at least 1", getattr(self, name) >= 1, "Give a positive whole number.")
        for name in ("warmup_steps", "kl_warmup_steps", "free_bits_groups", "patience", "seed"):
            self._check(name, "at least 0", getattr(self, name) >= 0, "Give zero to switch it off.")
        for name in ("weight_decay", "clip_norm", "beta", "tc_weight", "free_bits"):
            value = getattr(self, name)
            self._check(name, "finite and at least 0", 0 <= value < math.inf, "Give zero to switch it off.")
        self._check("temperature", "finite and above 0", 0 < self.temperature < math.inf, "0.5 is a common choice.")
        if self.kl_cycles > 1 and not 0 < self.kl_warmup_steps <= self.steps // self.kl_cycles:
            raise InputError(
                f"`kl_cycles` {self.kl_cycles} splits {self.steps} steps into {self.steps // self.kl_cycles} each, "
                f"which holds one rise of `kl_warmup_steps`; got {self.kl_warmup_steps}. Give a rise above 0 "
                "that fits."
            )
        if self.tc_weight != 1 and (self.free_bits or self.beta != 1):
            raise InputError("`tc_weight` goes without `beta` and `free_bits`: each changes the KL its own way.")
        if self.free_bits_groups and not self.free_bits:
            raise InputError("`free_bits_groups` has no effect without `free_bits`. Give it nats, or drop it.")
        self._check_shards()
        rate = self.learning_rate
        self._check("learning_rate", "finite and above 0", 0 < rate < math.inf, "1e-3 is a common choice.")
        for name in ("average", "validation"):
            self._check(name, "in [0, 1)", 0 <= getattr(self, name) < 1, "Give zero to switch it off.")

    def _check_shards(self) -> None:
        if self.batch_size % self.shards:
            raise InputError(
                f"`shards` must divide `batch_size`, for every part of a batch counts alike; got {self.shards} for "
                f"{self.batch_size}. Give a batch_size of {math.ceil(self.batch_size / self.shards) * self.shards}."
            )
        for name, plain in (("free_bits", 0), ("tc_weight", 1)):
            if self.shards > 1 and getattr(self, name) != plain:
                raise InputError(
                    f"`{name}` looks at all rows of a batch, and with `shards` {self.shards} no part sees them. "
                    "Use shards 1."
                )
