"""ModelConfig to VAE: the tables of names that the command line, the estimators and checkpoints read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from aevb.bayesnet import VAE, BayesNet
from aevb.build.start import Rows, Start, log, logits, start_of
from aevb.build.target import TargetStart, semi_supervised
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
from aevb.config import InputError, Kind, ModelConfig
from aevb.flows import FlowPrior, InverseAutoregressiveFlow, PlanarFlow, SplineFlow, SylvesterFlow
from aevb.nets import MLP, Columns, ConvNet, Evidence, Holes, LogTotal, Standardize, TransposedConvNet

__all__ = ["LIKELIHOODS", "POSTERIORS", "PRIORS", "build_vae"]


def build_vae(config: ModelConfig, x: Tensor | Rows | None = None, y: Tensor | None = None) -> VAE:
    r"""The model p(z) p(x | z) with q(z | x) that `config` tells, or p(y) p(z) p(x | y, z) with q(y | x) q(z | x, y).

    With `batches`, p(z) p(x | z, batch) with q(z | x, batch), the batch a one-hot vector that is given; a library size
    is drawn, or is latent with a prior of its own, per batch.

    Args:
        config: What to build.
        x: Training rows `(N, features)`, NaN for missing; one-hot columns of their batches may stand behind, without
            which all batches have one library size. Where given, the likelihood starts at their mean (Burda et al.,
            2016, start the output biases so), the encoder sees them standardised, and pseudo-inputs of a vamp prior
            start at some of them. `aevb.data.SparseRows` are looked at part by part.
        y: The target in these rows, codes of classes or numbers, `(N,)`, NaN for missing. Where given, p(y) and
            q(y | x) start at its shares, or at its mean and spread.

    Returns:
        A model with nodes `z` and `x`, `library` where the configuration has one, and `y` where it has a target; with
        the context `batch`, `(N, batches)`, where it has batches. Weights from torch's current generator.

    Example:
        >>> build_vae(ModelConfig(features=64, likelihood="binomial", total_count=16)).p.keys
        ('z', 'x | z')
        >>> build_vae(ModelConfig(features=9, likelihood="negative-binomial", library="observed", batches=3)).p.keys
        ('z', 'x | z, batch, library')
    """
    if x is not None:
        _check_rows(config, x)
    target = TargetStart.of(config, y) if config.target else None
    start = replace(start_of(config, x), target=target)
    likelihood = LIKELIHOODS[config.likelihood](config, start)
    posterior = POSTERIORS[config.posterior](config, start)
    prior = PRIORS[config.prior](config, start, posterior)
    if target is not None:
        judge = target.judge(_columns(config, target.heads, start))
        vae = semi_supervised(y=target.prior(), z=prior, x=likelihood, judge=judge, encoder=posterior)
        vae.config = config
        return vae
    batch = ", batch" if config.batches else ""
    library = ", library" if config.library != "none" else ""
    p: dict[str, nn.Module] = {"z": prior, f"x | z{batch}{library}": likelihood}
    q: dict[str, nn.Module] = {f"z | x{batch}": posterior}
    loc, scale = start.sizes or (torch.zeros(max(1, config.batches)), torch.ones(max(1, config.batches)))
    if config.library == "observed":
        q["library | x"] = Deterministic(LogTotal(loc=loc, scale=scale))
    if config.library == "latent":
        q[f"library | x{batch}"] = _size_of(config, start)
        p["library | batch" if batch else "library"] = _sizes_by_batch(loc, scale) if batch else _sizes(loc, scale)
    vae = VAE(BayesNet(p), BayesNet(q), given=("batch",) if config.batches else ())
    vae.config = config
    return vae


def _check_rows(config: ModelConfig, x: Tensor | Rows) -> None:
    if x.shape[1:] not in ((config.features,), (config.features + config.batches,)):
        wider = f", or (N, {config.features + config.batches}) with the {config.batches} one-hot columns of `batches` "
        raise InputError(
            f"`x` must be (N, {config.features}) as `features` says{wider + 'behind' if config.batches else ''}; got "
            f"shape {tuple(x.shape)}. Give such rows, or another configuration."
        )
    behind = getattr(x, "batch", None)  # of aevb.data.SparseRows, which this module does not know
    if behind is not None and len(behind) != config.batches:
        raise InputError(
            f"`x` has the one-hot columns of {len(behind)} batches behind; `batches` says {config.batches}. Build the "
            f"model with features={x.shape[1] - len(behind)}, batches={len(behind)}."
        )


def _bernoulli(config: ModelConfig, start: Start) -> nn.Module:
    return Bernoulli(_decoder(config, config.features, logits(start.mean)))


def _autoregressive(config: ModelConfig, start: Start) -> nn.Module:
    hidden = config.hidden[-1:]
    # Biases of a masked net, which is none of convolutions, whatever the encoder is.
    net = _mlp(config, config.latents + config.batches, config.hidden[::-1], sum(hidden) + config.features)
    with torch.no_grad():
        net.last.bias[-config.features :].copy_(logits(start.mean))
    return AutoregressiveBernoulli(net, config.features, hidden, config.activation)


def _count(config: ModelConfig) -> int:
    assert config.total_count is not None  # ModelConfig checks it
    return config.total_count


def _binomial(config: ModelConfig, start: Start) -> nn.Module:
    total = _count(config)
    return Binomial(_decoder(config, config.features, logits(start.mean / total)), total)


def _beta_binomial(config: ModelConfig, start: Start) -> nn.Module:
    total = _count(config)
    return BetaBinomial(_decoder(config, 2 * config.features, logits(start.mean / total)), total)


def _normal(config: ModelConfig, start: Start) -> nn.Module:
    net = _decoder(config, config.features * (2 if config.noise == "datum" else 1))
    return Normal(net, config.features, config.noise, loc=start.mean, scale=start.scale)


def _student(config: ModelConfig, start: Start) -> nn.Module:
    net = _decoder(config, config.features * (2 if config.noise == "datum" else 1))
    return StudentT(net, config.features, config.noise, loc=start.mean, scale=start.scale)


def _poisson(config: ModelConfig, start: Start) -> nn.Module:
    return Poisson(_decoder(config, config.features, log(start.mean)))


def _negative_binomial(config: ModelConfig, start: Start) -> nn.Module:
    net = _decoder(config, config.features * (2 if config.noise == "datum" else 1), log(start.mean))
    return NegativeBinomial(net, config.features, config.noise, library=config.library != "none")


def _zero_inflated(config: ModelConfig, start: Start) -> nn.Module:
    net = _decoder(config, config.features * (3 if config.noise == "datum" else 2), log(start.mean))
    if config.library != "none" and config.noise != "datum":
        with torch.no_grad():
            net.last.bias[config.features :].fill_(_FEW)
    return ZeroInflatedNegativeBinomial(net, config.features, config.noise, library=config.library != "none")


def _discretized_logistic(config: ModelConfig, start: Start) -> nn.Module:
    return DiscretizedLogistic(_decoder(config, 2 * config.features, start.mean / 127.5 - 1))


def _mixed(config: ModelConfig, start: Start) -> nn.Module:
    net: nn.Module = _decoder(config, Mixed.width(config.kinds), start.bias, beside=_width(start))
    net = net if start.target is None else start.target.shown(net, at=0)
    resolution = torch.zeros(config.features) if start.resolution is None else start.resolution
    return Mixed(net, config.kinds, start.mean, start.scale, resolution, start.heaps)


LIKELIHOODS: dict[str, Callable[[ModelConfig, Start], nn.Module]] = {
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


def _diagonal(config: ModelConfig, start: Start) -> nn.Module:
    return DiagonalNormal(_encoder(config, 2 * config.latents, start))


def _full(config: ModelConfig, start: Start) -> nn.Module:
    return FullNormal(_encoder(config, 2 * config.latents + config.latents**2, start), config.latents)


def _product(config: ModelConfig, start: Start) -> nn.Module:
    inputs = [Kind.parse(kind).inputs for kind in config.kinds] or [1] * config.features
    net = _mlp(config, sum(inputs) + len(inputs) + _width(start), config.hidden, 2 * config.latents)
    shown = Evidence(net, inputs, config.latents)
    encoder: nn.Module = Standardize(Holes(shown), start.mean, start.scale)
    if config.kinds:
        encoder = _with_y(Columns(shown, config.kinds, start.mean, start.scale), start)
    return ProductNormal(encoder, config.latents, sum(inputs))


def _planar(config: ModelConfig, start: Start) -> nn.Module:
    width = PlanarFlow.width(config.latents, config.flow_layers)
    return PlanarFlow(_encoder(config, width, start), config.latents, config.flow_layers)


def _sylvester(config: ModelConfig, start: Start) -> nn.Module:
    width = SylvesterFlow.width(config.latents, config.flow_layers)
    return SylvesterFlow(_encoder(config, width, start), config.latents, config.flow_layers)


def _iaf(config: ModelConfig, start: Start) -> nn.Module:
    context = config.latents
    net = _encoder(config, InverseAutoregressiveFlow.width(config.latents, context), start)
    return InverseAutoregressiveFlow(net, config.latents, context, config.flow_layers)


def _spline(config: ModelConfig, start: Start) -> nn.Module:
    context = config.latents
    net = _encoder(config, SplineFlow.width(config.latents, context), start)
    return SplineFlow(net, config.latents, context, config.flow_layers)


POSTERIORS: dict[str, Callable[[ModelConfig, Start], nn.Module]] = {
    "diagonal": _diagonal,
    "full": _full,
    "product": _product,
    "planar": _planar,
    "sylvester": _sylvester,
    "iaf": _iaf,
    "spline": _spline,
}
"""Name of q(z | x) to its maker, as for `LIKELIHOODS`."""


def _vamp(config: ModelConfig, start: Start, posterior: nn.Module) -> nn.Module:
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


PRIORS: dict[str, Callable[[ModelConfig, Start, nn.Module], nn.Module]] = {
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


def _size_of(config: ModelConfig, start: Start) -> nn.Module:
    """q(library | x): the sum of the row, corrected by a net."""
    net = _mlp(config, config.features + config.batches, config.hidden[-1:], 2)
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.copy_(torch.tensor([0.0, _FEW]))
    return DiagonalNormal(LogTotal(Standardize(net, _centre(start), start.scale, log1p=True)))


def _sizes(loc: Tensor, scale: Tensor) -> nn.Module:
    """p(library), started at the mean and spread of all rows."""
    sizes = LearnedNormal(1, float(scale))
    torch.nn.init.constant_(sizes.loc, float(loc))
    return sizes


def _sizes_by_batch(loc: Tensor, scale: Tensor) -> nn.Module:
    """p(library | batch), Gaussian (Lopez et al., 2018), linear in the one-hot batch, started at each one's figures."""
    net = MLP(len(loc), [], 2)
    told = torch.stack([loc, scale.expm1().log()])  # softplus makes it the scale
    with torch.no_grad():  # what batches share stands in the biases, so that decay of weights draws them together
        net.last.bias.copy_(told.mean(1))
        net.last.weight.copy_(told - told.mean(1, keepdim=True))
    return DiagonalNormal(net)


def _centre(start: Start) -> Tensor:
    """What stands for 0 of log(1 + x) in front of a net."""
    return start.mean.log1p() if start.centre is None else start.centre


def _encoder(config: ModelConfig, outputs: int, start: Start) -> nn.Module:
    if config.kinds:
        return _with_y(_columns(config, outputs, start, beside=_width(start)), start)
    net = _seeing(config, outputs)
    if config.library != "none":
        return Standardize(net, _centre(start), start.scale, log1p=True)
    return Standardize(Holes(net, first=1) if config.holes else net, start.mean, start.scale)


def _seeing(config: ModelConfig, outputs: int) -> MLP | ConvNet:
    """A net from x, and its batch, behind which stands the mask of x where there may be holes."""
    sides = 2 if config.holes else 1
    if config.net != "convolutional":
        return _mlp(config, sides * config.features + config.batches, config.hidden, outputs)
    channels, height, width = config.image
    image = (sides * channels, height, width)
    return ConvNet(image, config.channels, outputs, config.activation, batch_norm=config.batch_norm)


def _columns(config: ModelConfig, outputs: int, start: Start, beside: int = 0) -> nn.Module:
    """A net that is shown a table's row, and further parents of width `beside`."""
    net = _mlp(config, Columns.width(config.kinds) + beside, config.hidden, outputs)
    return Columns(net, config.kinds, start.mean, start.scale)


def _width(start: Start) -> int:
    """Of y inside the networks."""
    return 0 if start.target is None else start.target.width


def _with_y(net: nn.Module, start: Start) -> nn.Module:
    """A net from x alone, or from x and y."""
    return net if start.target is None else start.target.shown(net, at=1)


def _decoder(config: ModelConfig, outputs: int, bias: Tensor | None = None, beside: int = 0) -> MLP | TransposedConvNet:
    """A net from z, after parents of width `beside` and before its batch, whose first output biases are `bias`."""
    net: MLP | TransposedConvNet
    if config.net == "convolutional":
        channels, height, width = config.image
        image = (outputs // config.features * channels, height, width)
        reverse = config.channels[::-1]
        net = TransposedConvNet(config.latents, reverse, image, config.activation, batch_norm=config.batch_norm)
    else:
        net = _mlp(config, beside + config.latents + config.batches, config.hidden[::-1], outputs)
    if bias is not None:
        with torch.no_grad():
            net.last.bias[: len(bias)].copy_(bias)
    return net
