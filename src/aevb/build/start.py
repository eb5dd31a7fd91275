"""What the training rows tell a model before it is trained: centres and spreads, and what its decoder says first."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from aevb.conditionals.mixed import log_levels
from aevb.config import InputError, Kind, ModelConfig

if TYPE_CHECKING:
    from aevb.build.target import TargetStart

__all__ = ["Rows", "Start", "log", "logits", "moving", "start_of", "step"]


class Rows(Protocol):
    """Rows that are made dense a part at a time."""

    @property
    def shape(self) -> torch.Size:
        """(N, features), or wider."""
        ...

    def split(self) -> list[Tensor]:
        """Indices of the rows, part by part."""
        ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Some rows, dense."""
        ...


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the training rows tell a model before it is trained."""

    mean: Tensor  # (features,); of counts and positive columns of a table that of the logarithms
    scale: Tensor  # (features,), above 0; likewise, and of models with a library, whose encoder sees log(1 + x)
    rows: Tensor | None  # (N, features), holes filled with the mean; in models with a library some of them
    centre: Tensor | None = None  # (features,), of log(1 + x)
    bias: Tensor | None = None  # what the decoder says first of a table's columns
    resolution: Tensor | None = None  # (features,) of a table, the step of its values, in the units of `mean`
    heaps: dict[int, Tensor] = field(default_factory=dict)  # of ordinal columns, log-weights of their levels
    sizes: tuple[Tensor, Tensor] | None = None  # float64 mean and spread of a row's log sum, (1,), or (batches,) each
    target: TargetStart | None = None


def start_of(config: ModelConfig, x: Tensor | Rows | None) -> Start:
    """What rows `(N, features)`, NaN for missing, tell; without any, what is usual. Columns behind tell batches."""
    if x is None:
        counts = 0.5 * config.total_count if config.total_count is not None else 1.0
        centre = _CENTRE.get(config.likelihood, counts)
        return Start(mean=torch.full((config.features,), centre), scale=torch.ones(config.features), rows=None)
    if not isinstance(x, Tensor) or config.library != "none":
        return _start_in_parts(config, x)
    x = x[:, : config.features]
    if config.kinds:
        return _table_start(config, x)
    values = x.to(torch.float64)
    known = (~values.isnan()).sum(0).clamp(min=1)
    mean = values.nansum(0) / known
    spread = moving(((values - mean).square().nansum(0) / known).sqrt(), mean)
    if config.likelihood not in ("normal", "student-t"):
        # Pixels that hardly move would be blown up by their own spread: one for all.
        spread = spread.square().mean().sqrt().expand_as(mean)
        spread = torch.where(spread == 0, 1.0, spread)
    if bool((spread == 0).any()):
        constant = [int(j) for j in (spread == 0).nonzero()[:, 0]]
        raise InputError(
            f"Column {', '.join(map(str, constant))} of the data is constant, and the scale of its {config.likelihood} "
            "likelihood would go to zero. Drop it (`--drop-constant`), or choose another likelihood."
        )
    rows = torch.where(values.isnan(), mean, values)
    kind = torch.get_default_dtype()
    return Start(mean=mean.to(kind), scale=spread.to(kind), rows=rows.to(kind))


def logits(probs: Tensor) -> Tensor:
    """Of probabilities, those of 0 and 1 included."""
    # A pixel that is never on in training may be on in test: its probability starts 1e-4 off the bounds.
    return torch.logit(probs, eps=1e-4)


def log(mean: Tensor) -> Tensor:
    """Of means of counts, 0 included."""
    return mean.clamp(min=1e-4).log()


_ROWS = 4096
"""Rows that are summed together."""

_CENTRE = {"mixed": 0.0, "bernoulli": 0.5, "autoregressive": 0.5, "discretized-logistic": 127.5, "normal": 0.0,
           "student-t": 0.0}  # fmt: skip
"""Mean of data that are not given; counts are taken to be around 1, or half of the largest."""


def _start_in_parts(config: ModelConfig, x: Tensor | Rows) -> Start:
    """As `start_of`, in one pass over rows that are not held dense; none has holes."""
    parts = torch.arange(x.shape[0]).split(_ROWS) if isinstance(x, Tensor) else x.split()
    sums, totals, codes = torch.zeros(3, config.features, dtype=torch.float64), [], []
    for part in parts:
        values, behind = x[part].to(torch.float64).split([config.features, x.shape[1] - config.features], 1)
        shown = values.log1p() if config.library != "none" else values
        sums += torch.stack([values.sum(0), shown.sum(0), shown.square().sum(0)])
        totals.append(values.sum(1))
        codes += [behind.argmax(1)] if behind.shape[1] else []
    mean, centre, square = sums / x.shape[0]
    spread = (square - centre.square()).clamp(min=0.0)
    own = config.likelihood in ("normal", "student-t")
    if own and bool((spread == 0).any()):
        raise InputError(
            "`x` has constant columns, and the scale of a normal or student-t likelihood would go to zero there. Drop "
            "them (`--drop-constant`), or choose another likelihood."
        )
    scale = spread.sqrt() if own else spread.mean().sqrt().expand_as(mean)
    sizes = torch.cat(totals).clamp(min=1.0).log()
    loc, spreads = _sizes(sizes, torch.cat(codes) if codes else None, max(1, config.batches))
    some = torch.randperm(x.shape[0])[: max(1, config.components if config.prior == "vamp" else 1)]
    dtype = torch.get_default_dtype()
    return Start(
        mean=mean.to(dtype),
        scale=torch.where(scale == 0, 1.0, scale).to(dtype),
        rows=x[some][:, : config.features].to(dtype),
        centre=centre.to(dtype),
        sizes=(loc, spreads),
    )


_LEAST_SPREAD = 1e-2
"""Of the logs of library sizes: with none at all, q(library | x) would have no chance under p."""


def _sizes(sizes: Tensor, codes: Tensor | None, batches: int) -> tuple[Tensor, Tensor]:
    """Mean and spread of log library sizes `(N,)`, `(batches,)` each, by the code of each row's batch.

    A batch that has one row, none, or no spread has that of all rows, as have all where no codes are told.
    """
    loc, spread = (each.expand(batches) for each in (sizes.mean(), sizes.std(correction=0)))
    if codes is not None:
        count = torch.bincount(codes, minlength=batches)
        total, square = torch.zeros(2, batches, dtype=sizes.dtype)
        mean = total.index_add(0, codes, sizes) / count.clamp(min=1)
        own = (square.index_add(0, codes, (sizes - mean[codes]).square()) / count.clamp(min=1)).sqrt()
        loc, spread = torch.where(count > 0, mean, loc), torch.where(moving(own, mean) > 0, own, spread)
    return loc.clone(), spread.clamp(min=_LEAST_SPREAD)


def _table_start(config: ModelConfig, x: Tensor) -> Start:
    """Column by column: the marginal distribution, as the decoder is to tell it first."""
    mean, scale, steps = (torch.zeros(config.features, dtype=torch.float64) for _ in range(3))
    bias, heaps = [], {}
    for j, text in enumerate(config.kinds):
        kind, values = Kind.parse(text), x[:, j].to(torch.float64)
        values = values[~values.isnan()]
        if not len(values):
            raise InputError(f"Column {j} of the data has no values at all, and nothing can be learned of it. Drop it.")
        link = {"count": values.log1p(), "positive": values.log()}.get(kind.name, values)
        mean[j] = link.mean()
        scale[j] = moving(link.std(correction=0), mean[j])
        if kind.name in ("continuous", "positive"):
            if scale[j] == 0:
                raise InputError(
                    f"Column {j} of the data is constant, and the scale of its {kind.name} likelihood would go to "
                    "zero. Drop it."
                )
            steps[j] = step(link)
        scale[j] = torch.where(scale[j] > 0, scale[j], 1.0)
        bias.append(_first_bias(kind, values))
        if kind.name == "ordinal":
            heaps[j] = _heap(kind, values, bias[-1])
    dtype = torch.get_default_dtype()
    return Start(
        mean=mean.to(dtype), scale=scale.to(dtype), rows=None, bias=torch.cat(bias).to(dtype),
        resolution=steps.to(dtype), heaps=heaps,
    )  # fmt: skip


_PSEUDO = 5.0
"""Rows a level that the smooth law of an ordinal column is worth at first: a short table keeps near it."""


def _heap(kind: Kind, values: Tensor, heads: Tensor) -> Tensor:
    """Log-weights of levels: the marginal distribution over the rounded logistic at `heads`, shrunk to equal ones."""
    counts = torch.bincount((values - kind.low).long(), minlength=kind.values)
    smooth = log_levels(kind, heads.double()).exp()
    prior = _PSEUDO * kind.values
    share = (counts + prior * smooth) / (len(values) + prior)
    return (share.log() - smooth.log()).clamp(-10, 10)


def _first_bias(kind: Kind, values: Tensor) -> Tensor:
    """What a net without a parent would say of a column, `(heads,)`."""
    if kind.name == "binary":
        return logits(values.mean()).reshape(1)
    if kind.name == "categorical":  # a category that no row has starts at half a row
        counts = torch.bincount(values.long(), minlength=kind.values)[: kind.values]
        return ((counts + 0.5) / (len(values) + 0.5 * kind.values)).log()
    if kind.name == "ordinal":  # a logistic's standard deviation is pi / sqrt(3) times its scale
        half = 0.5 * (kind.values - 1)
        scale = (values.std(correction=0) * 3**0.5 / math.pi).clamp(min=0.3) / half
        return torch.stack([(values.mean() - kind.low) / half - 1, scale.expm1().log()])
    if kind.name == "count":  # zeros beyond what a Poisson of this mean would have
        mean, zeros = values.mean(), (values == 0).double().mean()
        excess = ((zeros - (-mean).exp()) / (1 - (-mean).exp()).clamp(min=1e-3)).clamp(1e-3, 0.999)
        return torch.stack([log(mean / (1 - excess)), torch.logit(excess)])
    return values.new_zeros(1)


def moving(spread: Tensor, mean: Tensor) -> Tensor:
    """The spread of a column; 0 where it is what rounding leaves of a constant."""
    return torch.where(spread <= 1e-13 * mean.abs(), 0.0, spread)


def step(values: Tensor) -> Tensor:
    """Smallest distance of two values; what is below a millionth of their range is rounding, not a distance."""
    gaps = values.sort().values.diff()
    least = 1e-6 * gaps.sum()
    return gaps[gaps > least].amin() if bool((gaps > least).any()) else least
