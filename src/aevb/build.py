"""ModelConfig to VAE: the tables of names that the command line, the estimators and checkpoints read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from aevb.bayesnet import VAE, BayesNet
from aevb.conditionals import (
    AutoregressiveBernoulli,
    Bernoulli,
    BetaBinomial,
    Binomial,
    Deterministic,
    DiagonalNormal,
    DiscretizedLogistic,
    FullNormal,
    LearnedNormal,
    Mixed,
    MixtureOfNormals,
    NegativeBinomial,
    Normal,
    Poisson,
    ProductNormal,
    StandardNormal,
    StudentT,
    VampPrior,
    ZeroInflatedNegativeBinomial,
)
from aevb.conditionals.mixed import log_levels
from aevb.config import InputError, Kind, ModelConfig
from aevb.flows import FlowPrior, InverseAutoregressiveFlow, PlanarFlow, SplineFlow, SylvesterFlow
from aevb.nets import MLP, Columns, ConvNet, Evidence, Holes, LogTotal, Standardize, TransposedConvNet

__all__ = ["LIKELIHOODS", "POSTERIORS", "PRIORS", "build_vae"]


class _Rows(Protocol):
    """Rows that are made dense a part at a time."""

    @property
    def shape(self) -> torch.Size: ...

    def split(self) -> list[Tensor]: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


def build_vae(config: ModelConfig, x: Tensor | _Rows | None = None) -> VAE:
    r"""The model p(z) p(x | z) with q(z | x) that `config` tells.

    Args:
        config: What to build.
        x: Training rows `(N, features)`, NaN for missing. Where given, the likelihood starts at their mean
            (Burda et al., 2016, start the output biases so), the encoder sees them standardised, and pseudo-inputs of
            a vamp prior start at some of them. `aevb.data.SparseRows` are looked at part by part.

    Returns:
        A model with nodes `z` and `x`, and `library` where the configuration has one; weights from torch's current
        generator.

    Example:
        >>> build_vae(ModelConfig(features=64, likelihood="binomial", total_count=16)).p.keys
        ('z', 'x | z')
    """
    if x is not None and x.shape[1:] != (config.features,):
        raise InputError(f"`x` must be (N, {config.features}) as `features` says; got shape {tuple(x.shape)}.")
    start = _start(config, x)
    likelihood = LIKELIHOODS[config.likelihood](config, start)
    posterior = POSTERIORS[config.posterior](config, start)
    prior = PRIORS[config.prior](config, start, posterior)
    p: dict[str, nn.Module] = {"z": prior, "x | z": likelihood}
    q: dict[str, nn.Module] = {"z | x": posterior}
    if config.library != "none":
        p = {"z": prior, "x | z, library": likelihood}
        size = LogTotal(loc=start.size[0], scale=start.size[1])
        q["library | x"] = Deterministic(size) if config.library == "observed" else _size_of(config, start)
    if config.library == "latent":
        sizes = LearnedNormal(1, start.size[1])
        torch.nn.init.constant_(sizes.loc, start.size[0])
        p["library"] = sizes
    vae = VAE(BayesNet(p), BayesNet(q))
    vae.config = config
    return vae


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What the training rows tell a model before it is trained."""

    mean: Tensor  # (features,); of counts and positive columns of a table that of the logarithms
    scale: Tensor  # (features,), above 0; likewise, and of models with a library, whose encoder sees log(1 + x)
    rows: Tensor | None  # (N, features), holes filled with the mean; in models with a library some of them
    centre: Tensor | None = None  # (features,), of log(1 + x)
    bias: Tensor | None = None  # what the decoder says first of a table's columns
    resolution: Tensor | None = None  # (features,) of a table, the step of its values, in the units of `mean`
    heaps: dict[int, Tensor] = field(default_factory=dict)  # of ordinal columns, log-weights of their levels
    size: tuple[float, float] = (0.0, 1.0)  # mean and spread of the log of a row's sum


def _bernoulli(config: ModelConfig, start: _Start) -> nn.Module:
    return Bernoulli(_decoder(config, config.features, _logits(start.mean)))


def _autoregressive(config: ModelConfig, start: _Start) -> nn.Module:
    hidden = config.hidden[-1:]
    # Biases of a masked net, which is none of convolutions, whatever the encoder is.
    net = _mlp(config, config.latents, config.hidden[::-1], sum(hidden) + config.features)
    with torch.no_grad():
        net.last.bias[-config.features :].copy_(_logits(start.mean))
    return AutoregressiveBernoulli(net, config.features, hidden, config.activation)


def _count(config: ModelConfig) -> int:
    assert config.total_count is not None  # ModelConfig checks it
    return config.total_count


def _binomial(config: ModelConfig, start: _Start) -> nn.Module:
    total = _count(config)
    return Binomial(_decoder(config, config.features, _logits(start.mean / total)), total)


def _beta_binomial(config: ModelConfig, start: _Start) -> nn.Module:
    total = _count(config)
    return BetaBinomial(_decoder(config, 2 * config.features, _logits(start.mean / total)), total)


def _normal(config: ModelConfig, start: _Start) -> nn.Module:
    net = _decoder(config, config.features * (2 if config.noise == "datum" else 1))
    return Normal(net, config.features, config.noise, loc=start.mean, scale=start.scale)


def _student(config: ModelConfig, start: _Start) -> nn.Module:
    net = _decoder(config, config.features * (2 if config.noise == "datum" else 1))
    return StudentT(net, config.features, config.noise, loc=start.mean, scale=start.scale)


def _poisson(config: ModelConfig, start: _Start) -> nn.Module:
    return Poisson(_decoder(config, config.features, _log(start.mean)))


def _negative_binomial(config: ModelConfig, start: _Start) -> nn.Module:
    net = _decoder(config, config.features * (2 if config.noise == "datum" else 1), _log(start.mean))
    return NegativeBinomial(net, config.features, config.noise, library=config.library != "none")


def _zero_inflated(config: ModelConfig, start: _Start) -> nn.Module:
    net = _decoder(config, config.features * (3 if config.noise == "datum" else 2), _log(start.mean))
    if config.library != "none" and config.noise != "datum":
        with torch.no_grad():
            net.last.bias[config.features :].fill_(_FEW)
    return ZeroInflatedNegativeBinomial(net, config.features, config.noise, library=config.library != "none")


def _discretized_logistic(config: ModelConfig, start: _Start) -> nn.Module:
    return DiscretizedLogistic(_decoder(config, 2 * config.features, start.mean / 127.5 - 1))


def _mixed(config: ModelConfig, start: _Start) -> nn.Module:
    net = _decoder(config, Mixed.width(config.kinds), start.bias)
    resolution = torch.zeros(config.features) if start.resolution is None else start.resolution
    return Mixed(net, config.kinds, start.mean, start.scale, resolution, start.heaps)


LIKELIHOODS: dict[str, Callable[[ModelConfig, _Start], nn.Module]] = {
    "bernoulli": _bernoulli,
    "autoregressive": _autoregressive,
    "binomial": _binomial,
    "beta-binomial": _beta_binomial,
    "normal": _normal,
    "student-t": _student,
    "poisson": _poisson,
    "negative-binomial": _negative_binomial,
    "zero-inflated": _zero_inflated,
    "discretized-logistic": _discretized_logistic,
    "mixed": _mixed,
}
"""Name of p(x | z) to its maker from the configuration and the training rows."""

_ROWS = 4096
"""Rows that are summed together."""

_CENTRE = {"mixed": 0.0, "bernoulli": 0.5, "autoregressive": 0.5, "discretized-logistic": 127.5, "normal": 0.0,
           "student-t": 0.0}  # fmt: skip
"""Mean of data that are not given; counts are taken to be around 1, or half of the largest."""


def _diagonal(config: ModelConfig, start: _Start) -> nn.Module:
    return DiagonalNormal(_encoder(config, 2 * config.latents, start))


def _full(config: ModelConfig, start: _Start) -> nn.Module:
    return FullNormal(_encoder(config, 2 * config.latents + config.latents**2, start), config.latents)


def _product(config: ModelConfig, start: _Start) -> nn.Module:
    inputs = [Kind.parse(kind).inputs for kind in config.kinds] or [1] * config.features
    net = _mlp(config, sum(inputs) + len(inputs), config.hidden, 2 * config.latents)
    shown = Evidence(net, inputs, config.latents)
    encoder = (
        Columns(shown, config.kinds, start.mean, start.scale)
        if config.kinds
        else Standardize(Holes(shown), start.mean, start.scale)
    )
    return ProductNormal(encoder, config.latents, sum(inputs))


def _planar(config: ModelConfig, start: _Start) -> nn.Module:
    width = PlanarFlow.width(config.latents, config.flow_layers)
    return PlanarFlow(_encoder(config, width, start), config.latents, config.flow_layers)


def _sylvester(config: ModelConfig, start: _Start) -> nn.Module:
    width = SylvesterFlow.width(config.latents, config.flow_layers)
    return SylvesterFlow(_encoder(config, width, start), config.latents, config.flow_layers)


def _iaf(config: ModelConfig, start: _Start) -> nn.Module:
    context = config.latents
    net = _encoder(config, InverseAutoregressiveFlow.width(config.latents, context), start)
    return InverseAutoregressiveFlow(net, config.latents, context, config.flow_layers)


def _spline(config: ModelConfig, start: _Start) -> nn.Module:
    context = config.latents
    net = _encoder(config, SplineFlow.width(config.latents, context), start)
    return SplineFlow(net, config.latents, context, config.flow_layers)


POSTERIORS: dict[str, Callable[[ModelConfig, _Start], nn.Module]] = {
    "diagonal": _diagonal,
    "full": _full,
    "product": _product,
    "planar": _planar,
    "sylvester": _sylvester,
    "iaf": _iaf,
    "spline": _spline,
}
"""Name of q(z | x) to its maker, as for `LIKELIHOODS`."""


def _vamp(config: ModelConfig, start: _Start, posterior: nn.Module) -> nn.Module:
    rows = start.rows
    if rows is None:
        rows = start.mean + start.scale * torch.randn(config.components, config.features)
    order = torch.randperm(len(rows))
    chosen = rows[order.repeat(-(-config.components // len(rows)))[: config.components]]
    if config.components > len(rows):  # twins would have one gradient, and stay twins
        chosen = chosen + 0.1 * start.scale * torch.randn_like(chosen)
    largest = {"bernoulli": 1.0, "autoregressive": 1.0, "discretized-logistic": 255.0}.get(config.likelihood)
    largest = float(config.total_count) if config.total_count is not None else largest
    if config.likelihood in ("poisson", "negative-binomial", "zero-inflated"):
        largest = math.inf
    return VampPrior(posterior, chosen, None if largest is None else (0.0, largest))


PRIORS: dict[str, Callable[[ModelConfig, _Start, nn.Module], nn.Module]] = {
    "standard": lambda config, start, posterior: StandardNormal(config.latents),
    "learned": lambda config, start, posterior: LearnedNormal(config.latents),
    "mixture": lambda config, start, posterior: MixtureOfNormals(config.latents, config.components),
    "vamp": _vamp,
    "flow": lambda config, start, posterior: FlowPrior(config.latents, config.flow_layers),
}
"""Name of p(z) to its maker from the configuration, the training rows and q(z | x)."""


def _mlp(config: ModelConfig, inputs: int, hidden: tuple[int, ...], outputs: int) -> MLP:
    return MLP(
        inputs, hidden, outputs, None if config.net == "gated" else config.activation, batch_norm=config.batch_norm,
        gated=config.net == "gated", residual=config.net == "residual",
    )  # fmt: skip


_FEW = -3.0
"""Logit of the share of inflated zeros, and raw scale of q(library), with which models of a library begin."""


def _size_of(config: ModelConfig, start: _Start) -> nn.Module:
    """q(library | x): the sum of the row, corrected by a net."""
    net = _mlp(config, config.features, config.hidden[-1:], 2)
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.copy_(torch.tensor([0.0, _FEW]))
    return DiagonalNormal(LogTotal(Standardize(net, _centre(start), start.scale, log1p=True)))


def _centre(start: _Start) -> Tensor:
    """What stands for 0 of log(1 + x) in front of a net."""
    return start.mean.log1p() if start.centre is None else start.centre


def _encoder(config: ModelConfig, outputs: int, start: _Start) -> nn.Module:
    if config.kinds:
        shown = _mlp(config, Columns.width(config.kinds), config.hidden, outputs)
        return Columns(shown, config.kinds, start.mean, start.scale)
    net = _seeing(config, outputs)
    if config.library != "none":
        return Standardize(net, _centre(start), start.scale, log1p=True)
    return Standardize(Holes(net) if config.holes else net, start.mean, start.scale)


def _seeing(config: ModelConfig, outputs: int) -> MLP | ConvNet:
    """A net from x, beside which stands its mask where there may be holes."""
    sides = 2 if config.holes else 1
    if config.net != "convolutional":
        return _mlp(config, sides * config.features, config.hidden, outputs)
    channels, height, width = config.image
    image = (sides * channels, height, width)
    return ConvNet(image, config.channels, outputs, config.activation, batch_norm=config.batch_norm)


def _decoder(config: ModelConfig, outputs: int, bias: Tensor | None = None) -> MLP | TransposedConvNet:
    """A net from z, whose first output biases are `bias`."""
    net: MLP | TransposedConvNet
    if config.net == "convolutional":
        channels, height, width = config.image
        image = (outputs // config.features * channels, height, width)
        reverse = config.channels[::-1]
        net = TransposedConvNet(config.latents, reverse, image, config.activation, batch_norm=config.batch_norm)
    else:
        net = _mlp(config, config.latents, config.hidden[::-1], outputs)
    if bias is not None:
        with torch.no_grad():
            net.last.bias[: len(bias)].copy_(bias)
    return net


def _logits(probs: Tensor) -> Tensor:
    # A pixel that is never on in training may be on in test: its probability starts 1e-4 off the bounds.
    return torch.logit(probs, eps=1e-4)


def _log(mean: Tensor) -> Tensor:
    return mean.clamp(min=1e-4).log()


def _start(config: ModelConfig, x: Tensor | _Rows | None) -> _Start:
    if x is None:
        counts = 0.5 * config.total_count if config.total_count is not None else 1.0
        centre = _CENTRE.get(config.likelihood, counts)
        return _Start(mean=torch.full((config.features,), centre), scale=torch.ones(config.features), rows=None)
    if not isinstance(x, Tensor) or config.library != "none":
        return _start_in_parts(config, x)
    if config.kinds:
        return _table_start(config, x)
    values = x.to(torch.float64)
    known = (~values.isnan()).sum(0).clamp(min=1)
    mean = values.nansum(0) / known
    spread = _moving(((values - mean).square().nansum(0) / known).sqrt(), mean)
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
    return _Start(mean=mean.to(kind), scale=spread.to(kind), rows=rows.to(kind))


def _start_in_parts(config: ModelConfig, x: Tensor | _Rows) -> _Start:
    """As `_start`, in one pass over rows that are not held dense; none has holes."""
    parts = torch.arange(x.shape[0]).split(_ROWS) if isinstance(x, Tensor) else x.split()
    sums, totals = torch.zeros(3, config.features, dtype=torch.float64), []
    for part in parts:
        values = x[part].to(torch.float64)
        shown = values.log1p() if config.library != "none" else values
        sums += torch.stack([values.sum(0), shown.sum(0), shown.square().sum(0)])
        totals.append(values.sum(1))
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
    some = torch.randperm(x.shape[0])[: max(1, config.components if config.prior == "vamp" else 1)]
    dtype = torch.get_default_dtype()
    return _Start(
        mean=mean.to(dtype),
        scale=torch.where(scale == 0, 1.0, scale).to(dtype),
        rows=x[some].to(dtype),
        centre=centre.to(dtype),
        size=(float(sizes.mean()), max(float(sizes.std(correction=0)), 1e-2)),
    )


def _table_start(config: ModelConfig, x: Tensor) -> _Start:
    """Column by column: the marginal distribution, as the decoder is to tell it first."""
    mean, scale, step = (torch.zeros(config.features, dtype=torch.float64) for _ in range(3))
    bias, heaps = [], {}
    for j, text in enumerate(config.kinds):
        kind, values = Kind.parse(text), x[:, j].to(torch.float64)
        values = values[~values.isnan()]
        if not len(values):
            raise InputError(f"Column {j} of the data has no values at all, and nothing can be learned of it. Drop it.")
        link = {"count": values.log1p(), "positive": values.log()}.get(kind.name, values)
        mean[j] = link.mean()
        scale[j] = _moving(link.std(correction=0), mean[j])
        if kind.name in ("continuous", "positive"):
            if scale[j] == 0:
                raise InputError(
                    f"Column {j} of the data is constant, and the scale of its {kind.name} likelihood would go to "
                    "zero. Drop it."
                )
            step[j] = _step(link)
        scale[j] = torch.where(scale[j] > 0, scale[j], 1.0)
        bias.append(_first_bias(kind, values))
        if kind.name == "ordinal":
            heaps[j] = _heap(kind, values, bias[-1])
    dtype = torch.get_default_dtype()
    return _Start(
        mean=mean.to(dtype), scale=scale.to(dtype), rows=None, bias=torch.cat(bias).to(dtype),
        resolution=step.to(dtype), heaps=heaps,
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
        return _logits(values.mean()).reshape(1)
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
        return torch.stack([_log(mean / (1 - excess)), torch.logit(excess)])
    return values.new_zeros(1)


def _moving(spread: Tensor, mean: Tensor) -> Tensor:
    """The spread of a column; 0 where it is what rounding leaves of a constant."""
    return torch.where(spread <= 1e-13 * mean.abs(), 0.0, spread)


def _step(values: Tensor) -> Tensor:
    """Smallest distance of two values; what is below a millionth of their range is rounding, not a distance."""
    gaps = values.sort().values.diff()
    least = 1e-6 * gaps.sum()
    return gaps[gaps > least].amin() if bool((gaps > least).any()) else least
