"""One evaluation of a run: log p(x) with its errors, and what deeper diagnoses found beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from aevb._shapes import Values
from aevb.apps.summary.finding import Finding
from aevb.bayesnet import VAE
from aevb.bounds import evaluating, prepare
from aevb.checkpoint import write_atomically
from aevb.config import InputError
from aevb.data import SparseRows
from aevb.evaluate import Marginal, active_units
from aevb.evaluate.latents import ACTIVE_ABOVE
from aevb.evaluate.stream import digest_of
from aevb.nets import LogTotal

__all__ = [
    "ACTIVE_ABOVE",
    "DENSITIES",
    "UNTRUSTED_ABOVE",
    "Summary",
    "given_to",
    "quantity",
    "sizes",
    "summarize",
    "weights_of",
]

UNTRUSTED_ABOVE = 0.7
"""Pareto k-hat above which an importance-sampling estimate is not to be trusted (Vehtari et al., 2024)."""
_BYTES = "discretized-logistic"
"""The likelihood of bytes, whose log p is told in bits per dimension, too."""
DENSITIES = ("normal", "student-t")
"""Likelihoods that are densities in the data's units; the others are probabilities."""
_DERIVED = ("gap", "bits_per_dim")
_GIVEN = "{}: compare with models that are given {}, too, and with no other log p(x)"
_LEAST_FOR_K = 25  # a fifth of the draws is the tail, and five points are the least a fit is made to


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What an evaluation found; nats a datum, higher is better."""

    split: str  # which rows: "test", "validation", a file's name
    rows: int
    samples: int
    seed: int
    log_prob: float
    std_error: float  # over rows: how far another test set of this size would scatter
    monte_carlo_error: float  # of the mean: how far other draws would scatter
    elbo: float
    untrusted: int  # rows whose k-hat is above 0.7, or unknown for want of samples
    active: dict[str, list[int]]  # latent node to [active dimensions, dimensions]
    latent_spread: dict[str, list[float]]  # latent node to Var_x E_q[z | x] by dimension
    features: int
    curve: list[list[float]]  # [K, bound with K draws], K rising to `samples`
    known: int = 0  # entries of all rows that are not missing; 0 where they were not counted, in older evaluations
    data: str = ""  # what the rows are, their binarisation included
    weights: str = ""  # fingerprint of the weights that were evaluated
    likelihood: str = ""  # family of p(x | z); "" where it is not known by name
    given: tuple[str, ...] = ()  # all that p takes as given, in the order of `given_to`
    computed: tuple[str, ...] = ()  # of that, what is computed of x itself; the rest stands beside x in the data
    target: str = ""  # the column that is y, where the model has one
    precision: str = "float32"  # of matrix products
    findings: dict[str, Finding] = field(default_factory=dict)  # by the name of the diagnosis

    @property
    def gap(self) -> float:
        """How much the bound loses, nats."""
        return self.log_prob - self.elbo

    @property
    def bits_per_dim(self) -> float | None:
        r"""Bits that code a byte, :math:`-\log p / (P \log 2)`, of what is known of P bytes; None for other data."""
        return -self.log_prob / self._bit if self.likelihood == _BYTES else None

    @property
    def _bit(self) -> float:
        """Nats a row that are one bit in each of its known entries."""
        return (self.known / self.rows or self.features) * math.log(2)

    @property
    def headline(self) -> str:
        """The line that ends an evaluation."""
        error = f" ± {self.std_error:.2f}" if math.isfinite(self.std_error) else ""  # one row tells no spread
        return f"{self.split} log {self.quantity} = {self.log_prob:.2f}{error} nats ({self.samples} samples)"

    @property
    def quantity(self) -> str:
        """What is estimated: p(x), p(x | batch, library), or p(x, y)."""
        return quantity(self.given, bool(self.target))

    def facts(self) -> list[tuple[str, str]]:
        """Name and figure of each line, in the order in which they are printed."""
        active = ", ".join(f"{count} of {total}" for count, total in self.active.values()) or "no latents"
        kind = "density in the data's units" if self.likelihood in DENSITIES else "probability"
        kind = "product of both, by column, in the data's units" if self.likelihood == "mixed" else kind
        return [
            ("rows", f"{self.rows}, {self.split}" + (f" ({self.data})" if self.data else "")),
            *([("likelihood", f"{self.likelihood}: {self.quantity} is a {kind}")] if self.likelihood else []),
            *([("given", self._what_is_given())] if self.given else []),
            *([("target", f"{self.target} is y; where it is missing, log p(x) counts")] if self.target else []),
            ("importance samples", f"{self.samples} a row, seed {self.seed}{self._rounded}"),
            ("ELBO", f"{self.elbo:.2f} nats"),
            (f"gap log {self.quantity} - ELBO", f"{self.gap:.2f} nats"),
            *([("bound by draws", self._rise())] if len(self.curve) > 1 else []),
            *([("bits per dimension", self._coded())] if self.bits_per_dim is not None else []),
            ("active dimensions", f"{active} (Var E[z|x] > {ACTIVE_ABOVE})"),
        ]

    def _what_is_given(self) -> str:
        brought = [name for name in self.given if name not in self.computed]
        parts = [", ".join(brought) + ", told of each row"] if brought else []
        parts += [", ".join(self.computed) + ", computed of x itself"] if self.computed else []
        return _GIVEN.format(", and ".join(parts), "it" if len(self.given) == 1 else "them")

    @property
    def _rounded(self) -> str:
        return "" if self.precision == "float32" else f", matrix products in {self.precision}"

    def _coded(self) -> str:
        error = f" ± {self.std_error / self._bit:.3f}" if math.isfinite(self.std_error) else ""
        holes = ", of the entries that are known" if 0 < self.known < self.rows * self.features else ""
        return f"{self.bits_per_dim:.3f}{error} (-log {self.quantity} / ({self.features} log 2){holes})"

    def _rise(self) -> str:
        """The bound at 1, 16, 256, ... draws, and at all of them."""
        shown = [point for point in self.curve[:-1] if math.log2(point[0]) % 4 == 0] + self.curve[-1:]
        return ", ".join(f"{bound:.2f} ({int(count)})" for count, bound in shown) + " nats"

    @property
    def caveat(self) -> str:
        """How far to trust the headline."""
        tail = f"k-hat > {UNTRUSTED_ABOVE} in {self.untrusted} of {self.rows} rows"
        if self.samples < _LEAST_FOR_K:
            tail = f"k-hat needs {_LEAST_FOR_K} samples or more"
        error = f"{self.monte_carlo_error:.3f} nats" if math.isfinite(self.monte_carlo_error) else "needs two samples"
        return f"importance sampling is a lower bound: Monte-Carlo error {error}, {tail}"

    def lines(self) -> list[str]:
        """The whole evaluation as the terminal shows it; the headline is last."""
        facts = self.facts()
        width = max(len(name) for name, _ in facts)
        told = [line for finding in self.findings.values() for line in ("", *finding.lines())]
        gap = [""] if told else []
        return [*(f"{name:<{width}}  {figure}" for name, figure in facts), *told, *gap, self.caveat, self.headline]

    def to_json(self) -> dict[str, Any]:
        """Fields, and what follows from them, in full precision; what is not a number is None: JSON has no NaN."""
        fields = dataclasses.asdict(self) | {name: getattr(self, name) for name in _DERIVED}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        known: dict[str, Any] = {n: math.nan if v is None else v for n, v in fields.items() if n not in _DERIVED}
        if "computed" not in known:  # of a time when `given` was that alone
            known["computed"] = known.get("given", ())
            known["given"] = (*known.pop("beside", ()), *known["computed"])
        known |= {name: tuple(known[name]) for name in ("given", "computed")}
        known["findings"] = {name: Finding.from_json(each) for name, each in known.get("findings", {}).items()}
        return cls(**known)

    def save(self, path: Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_atomically(path, json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: If it is not there or not readable.
        """
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"`{path}` holds no evaluation ({error}). Make one with `aevb evaluate RUN`.") from None


def summarize(
    vae: VAE, values: Values | SparseRows, marginal: Marginal, *, seed: int = 0, split: str = "test", data: str = "",
    target: str = "", precision: str = "float32",
) -> Summary:  # fmt: skip
    """Put `marginal`, the estimates of `values` under `vae`, into figures for all rows; finds the active dimensions."""
    rows = marginal.log_prob.shape[0]
    if bool((lost := marginal.log_prob.isinf()).any()):
        named = ", ".join(str(int(i)) for i in lost.nonzero()[:10, 0])
        raise InputError(
            f"log {quantity(given_to(vae), bool(target))} is -inf for {int(lost.sum())} of {rows} rows, the first of "
            f"them {named}: at every draw the model gives them no chance at all, and no mean can be told. Look at "
            "those rows and at the likelihood's support, or draw more samples."
        )
    if isinstance(values, SparseRows):
        units, features = _active_in_parts(vae, values), values.features
        known = rows * features
    else:
        own = [value for name, value in values.items() if name not in vae.given]
        units, features = active_units(vae, values), sum(value[0].numel() for value in own)
        known = sum(int((~value.isnan()).sum()) for value in own)
        units = {node: spread for node, spread in units.items() if node not in values}  # a target is no code
    spread = {node: variance.flatten().tolist() for node, variance in units.items()}
    return Summary(
        split=split,
        rows=rows,
        samples=marginal.samples,
        seed=seed,
        log_prob=float(marginal.log_prob.mean()),
        std_error=float(marginal.log_prob.std()) / math.sqrt(rows) if rows > 1 else math.nan,
        monte_carlo_error=_error_of_mean(values, marginal.std_error),
        elbo=float(marginal.elbo.mean()),
        untrusted=int((~(marginal.pareto_k <= UNTRUSTED_ABOVE)).sum()),
        active={node: [sum(v > ACTIVE_ABOVE for v in dims), len(dims)] for node, dims in spread.items()},
        latent_spread=spread,
        features=features,
        known=known,
        curve=[[count, float(bound.mean())] for count, bound in marginal.curve.items()],
        data=data,
        weights=weights_of(vae),
        likelihood=vae.config.likelihood if vae.config else "",
        given=given_to(vae),
        computed=vae.context,
        target=target,
        precision=precision,
    )


def quantity(given: Sequence[str], target: bool) -> str:
    """What the log p of a row is of: p(x), p(x | batch, library), or p(x, y)."""
    if target:
        return "p(x, y)"
    return f"p(x | {', '.join(given)})" if given else "p(x)"


def given_to(vae: VAE) -> tuple[str, ...]:
    """What p takes as given: context that the rows bring, then what is computed of x itself."""
    return (*vae.given, *vae.context)


def sizes(vae: VAE, rows: int, batch: Tensor | None = None) -> dict[str, Tensor]:
    """Library sizes to draw rows with, where the model takes them as given: log-normal as those trained on.

    With the one-hot `batch` of each row, `(rows, B)`, as those of that batch.
    """
    if vae.context != ("library",):
        return {}
    net = vae.q.conditional("library").net
    assert isinstance(net, LogTotal)
    return {"library": net.draw(rows, batch)}


def weights_of(vae: VAE) -> str:
    """Fingerprint of a model's weights: an evaluation of other weights is no evaluation of it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in vae.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _active_in_parts(vae: VAE, rows: SparseRows) -> dict[str, Tensor]:
    """As `active_units`, with one part of the rows dense at a time."""
    with evaluating(vae):
        parts = [vae.posterior(prepare(vae, rows.take(part))) for part in rows.split()]
    return {node: torch.cat([each[node].mean for each in parts]).var(0, correction=0) for node in parts[0]}


def _error_of_mean(values: Values | SparseRows, std_error: Tensor) -> float:
    """Monte-Carlo error of the mean over rows: equal rows share their draws, so that their errors add up whole."""
    if isinstance(values, SparseRows):
        digests = [digest_of(values.take(row), 0) for row in torch.arange(len(values)).split(1)]
        known = {digest: i for i, digest in enumerate(dict.fromkeys(digests))}
        group = torch.tensor([known[digest] for digest in digests])
    else:
        flat = [value.reshape(len(value), -1).double().nan_to_num(math.pi) for value in values.values()]
        content = torch.cat(flat, 1)
        group = content.unique(dim=0, return_inverse=True)[1]
    sums = torch.zeros(int(group.max()) + 1, dtype=std_error.dtype).index_add(0, group, std_error)
    return float(sums.square().sum().sqrt()) / len(std_error)
