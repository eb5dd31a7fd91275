"""What the estimators share: a model of standardised columns, its training, and its state as safetensors bytes."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final, get_args

import numpy as np
import safetensors.torch
import torch
import torch.distributions as td
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from aevb.apps.estimator.columns import Columns, Floats, refuse_infinite
from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import label_weight, with_classifier
from aevb.build import build_vae, semi_supervised
from aevb.conditionals import Categorical, DiagonalNormal, Normal, ProductNormal, StandardNormal, StudentT
from aevb.config import InputError, Likelihood, ModelConfig, Noise, TrainConfig
from aevb.nets import MLP, Evidence, Holes, Standardize
from aevb.training import fit

__all__ = ["LIKELIHOODS", "ONE_AT_A_TIME", "Fitted", "Form", "Settings", "build", "restored", "whole"]

LIKELIHOODS: dict[str, bool] = {
    "normal": True, "student-t": True, "bernoulli": False, "poisson": False, "negative-binomial": False,
    "zero-inflated": False,
}  # fmt: skip
"""Families of p(x | z) that take single holes and need no more than their name; whether x is standardised for them."""

ONE_AT_A_TIME = threading.RLock()
"""Held while torch's one generator is in use: fits in threads of one process stay functions of their seeds."""

_BATCH = 100

_DRAWS = 10
"""Draws of z behind the importance-weighted bound of rows with holes (Mattei and Frellsen, 2019, take 20)."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """All that decides a model's shape, in plain values."""

    features: int
    latents: int
    hidden: tuple[int, ...]
    likelihood: Likelihood
    target: int = 0  # classes of y; -1 for a number, 0 for no y


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The parameters that the estimators have in common, checked."""

    latents: int
    hidden: tuple[int, ...]
    likelihood: Likelihood
    steps: int

    @classmethod
    def of(cls, params: Mapping[str, Any], rows: int, features: int, *, holes: bool = False) -> Settings:
        """Read from an estimator's parameters; what is None follows the data.

        Raises:
            InputError: For a parameter of the wrong kind or out of range.
        """
        likelihood = params["likelihood"]
        if likelihood not in LIKELIHOODS:
            assert set(LIKELIHOODS) <= set(get_args(Likelihood))
            raise InputError(f"`likelihood` must be one of {', '.join(LIKELIHOODS)}; got {likelihood!r}. Choose one.")
        latents = params["latents"]
        # Sixteen are as many as tables of this kind were seen to use.
        latents = min(16, max(2, (features + 1) // 2)) if latents is None else whole("latents", latents, 1)
        steps = params["steps"]
        # A few rows are soon learned by heart; of many, each needs to be seen less often, and with holes more often.
        usual = (2 if holes else 1) * min(40 + 3 * rows // 4, math.ceil(34 * math.sqrt(rows)))
        steps = usual if steps is None else whole("steps", steps, 1)
        hidden = params["hidden"]
        if isinstance(hidden, str) or not isinstance(hidden, tuple | list | np.ndarray):
            raise InputError(
                f"`hidden` must list the widths of the hidden layers; got {hidden!r}. Write e.g. (64, 64)."
            )
        widths = tuple(whole("hidden", width, 1) for width in hidden)
        return cls(latents=latents, hidden=widths, likelihood=likelihood, steps=steps)


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"`{name}` must be a whole number of at least {least}; got {value!r}. Give another.")
    return int(value)


@final
class Shown(nn.Module):
    """Hands `net` the standardised first parent with zeros in its holes, then where they are, then the other parents.

    The weights of the holes start at zero and have no gradient before one is seen: to a net trained on complete rows a
    missing entry is an average one, not noise.

    Args:
        net: Takes `2 D` inputs and those of the other parents.
        loc: Centre of the first parent, `(D,)`.
        scale: Spread of the first parent, `(D,)`, above 0.
    """

    sees_holes = True
    loc: Tensor
    scale: Tensor

    def __init__(self, net: MLP, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())
        first = next(module for module in net.modules() if isinstance(module, nn.Linear))
        with torch.no_grad():
            first.weight[:, len(loc) : 2 * len(loc)].zero_()

    @property
    def outputs(self) -> int | None:
        """Width of the result."""
        return self.net.outputs

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Parents `(*, D_i)` to what `net` returns."""
        hole = x.isnan()
        filled = ((x - self.loc) / self.scale).masked_fill(hole, 0.0)
        result: Tensor = self.net(filled, hole.to(x), *others)
        return result


def build(form: Form, loc: Tensor, scale: Tensor, floor: Tensor) -> VAE:
    """The model of a form, float64: p(z) p(x | z), or with a target p(y) p(z) p(x | y, z) and q(y | x) q(z | x, y).

    Args:
        form: Its shape.
        loc: Centre of what the encoder sees, `(D,)`.
        scale: Its spread, `(D,)`.
        floor: Least noise of normal and student-t likelihoods, `(D,)`.
    """
    features, latents, hidden = form.features, form.latents, form.hidden
    width = abs(form.target)  # of y inside the networks
    noise: Noise = "datum" if LIKELIHOODS[form.likelihood] else "dimension"
    told = ModelConfig(
        features=features, likelihood=form.likelihood, latents=latents + width, hidden=hidden,
        noise=noise,
    )  # fmt: skip
    likelihood = build_vae(told).p.conditional("x")
    if isinstance(likelihood, Normal | StudentT):
        likelihood = type(likelihood)(likelihood.net, features, likelihood.noise, floor=floor)
    net = MLP(2 * features + width, hidden, 2 * latents)
    if not form.target:
        p: dict[str, nn.Module] = {"z": StandardNormal(latents), "x | z": likelihood}
        evidence = Standardize(Holes(Evidence(net, [1] * features, latents)), loc, scale)
        return VAE(BayesNet(p), BayesNet({"z | x": ProductNormal(evidence, latents, features)})).double()
    encoder = Shown(net, loc, scale)
    number = form.target < 0
    judge = Shown(MLP(2 * features, hidden, 2 if number else width), loc, scale)
    y = StandardNormal(1) if number else Categorical(width, learned=True)
    return semi_supervised(
        y=y, z=StandardNormal(latents), x=likelihood, encoder=DiagonalNormal(encoder),
        judge=DiagonalNormal(judge) if number else Categorical(width, judge),
    ).double()  # fmt: skip


def train(vae: VAE, values: Mapping[str, Tensor], *, steps: int, seed: int, labels: float = 0.0) -> dict[str, Any]:
    """Train in place; the last record of the history.

    Args:
        vae: The model.
        values: Its nodes, `(N, *event)`.
        steps: Updates.
        seed: Decides the order of the rows and every draw.
        labels: Weight of log q(y | x) in labelled rows; 0 where there is no y.

    Where rows have holes and there is no y, by the importance-weighted bound: the less is known of a row, the less of
    its posterior is Gaussian.
    """
    holes = not labels and bool(values["x"].isnan().any())
    # q(y | x) plays no part in the bound of a labelled row: held-out rows could not judge it, and decay must hold it.
    config = TrainConfig(
        steps=steps, samples=_DRAWS if holes else 1, batch_size=_BATCH, learning_rate=1e-2, average=0.99,
        clip_norm=100.0, seed=seed, log_every=steps, validation=0.0 if labels else 0.1,
        validate_every=max(1, steps // 10), patience=0, weight_decay=0.1 if labels else 0.0,
        optimizer="adamw" if labels else "adam",
    )  # fmt: skip
    objective = with_classifier("y", labels) if labels else "iwae" if holes else "elbo"
    with _collapse_untold():
        return fit(vae, values, config, objective=objective).history[-1]


@contextlib.contextmanager
def _collapse_untold() -> Iterator[None]:
    """Latents that stay unused are told by `kl_`: the log's remedies are settings that an estimator does not have."""
    here = threading.get_ident()

    def other(record: logging.LogRecord) -> bool:
        return record.thread != here or not record.getMessage().startswith("Posterior collapse")

    log = logging.getLogger("aevb")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def restored(form: Form, weights: bytes) -> VAE:
    """A model of a form with its weights in safetensors; torch's generator is left where it was."""
    one = torch.ones(form.features)
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        vae = build(form, 0 * one, one, one)
    vae.load_state_dict(safetensors.torch.load(weights))
    return vae.eval()


class Fitted(BaseEstimator):
    """An estimator that holds a trained model, and is pickled with its weights as safetensors."""

    weights_: bytes
    kl_: Floats
    _vae: VAE
    _form: Form
    _columns: Columns
    _seed: int

    def _rows(self, rows: Any, *, reset: bool) -> Floats:
        """Rows as float64 `(N, D)`, NaN for missing; columns are counted and named, or compared."""
        least = 2 if reset else 1
        x: Floats = validate_data(
            self, X=rows, reset=reset, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=least
        )
        refuse_infinite(x, "X")
        return x

    def _known(self, rows: Any) -> Floats:
        """Rows for a fitted estimator."""
        check_is_fitted(self)
        return self._rows(rows, reset=False)

    def _seeded(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _train(self, x: Floats, settings: Settings, seed: int, y: Tensor | None = None, target: int = 0) -> None:
        """Fit the model of settings to rows `(N, D)` and, with a target, y."""
        form = Form(
            features=x.shape[1], latents=settings.latents, hidden=settings.hidden, likelihood=settings.likelihood,
            target=target,
        )  # fmt: skip
        columns = Columns.of(x)
        seen, inner = columns, columns
        if LIKELIHOODS[form.likelihood]:  # the model is of u, which the encoder takes as it is
            seen = Columns.plain(form.features)
        else:
            inner = Columns.plain(form.features)
        u = inner.standardized(x)
        values = {"x": u} if y is None else {"x": u, "y": y}
        labels = 0.0
        if y is not None:
            known = y >= 0 if target > 0 else ~y.isnan()
            labels = label_weight(len(x), int(known.sum()))
        with ONE_AT_A_TIME:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                vae = build(form, *(torch.from_numpy(part) for part in (seen.loc, seen.scale, columns.floor)))
            record = train(vae, values, steps=settings.steps, seed=seed, labels=labels)
        self._form, self._columns, self._seed, self._vae = form, inner, seed, vae
        self.weights_ = safetensors.torch.save({name: value.contiguous() for name, value in vae.state_dict().items()})
        self.kl_ = np.array(record["kl_dims"]["z"])

    def _encoded(self, x: Floats, node: str) -> td.Distribution:
        """Q of a node that depends on x alone."""
        with torch.no_grad():
            d: td.Distribution = self._vae.q.distribution(node, {"x": self._columns.standardized(x)})
        return d

    @property
    def _pack(self) -> int:
        """Draws in memory at once: as many as take some 64 MiB in the widest layer."""
        return max(256, min(16_384, 2**23 // max(self._form.features, *self._form.hidden, 1)))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_vae", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "weights_" in state:
            self._vae = restored(self._form, self.weights_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags
