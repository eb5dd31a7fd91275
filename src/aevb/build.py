"""ModelConfig to VAE: the tables of names that the command line, the estimators and checkpoints read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aevb.bayesnet import VAE, BayesNet
from aevb.conditionals import Bernoulli, Binomial, DiagonalNormal, FullNormal, Normal, StandardNormal
from aevb.config import InputError, ModelConfig
from aevb.nets import MLP, Holes, Standardize

__all__ = ["LIKELIHOODS", "POSTERIORS", "build_vae"]


def build_vae(config: ModelConfig, x: Tensor | None = None) -> VAE:
    r"""The model p(z) p(x | z) with q(z | x) that `config` tells.

    Args:
        config: What to build.
        x: Training rows `(N, features)`, NaN for missing. Where given, the likelihood starts at their mean
            (Burda et al., 2016, start the output biases so) and the encoder sees them standardised.

    Returns:
        A model with nodes `z` and `x`; weights from torch's current generator.

    Example:
        >>> build_vae(ModelConfig(features=64, likelihood="binomial", total_count=16)).p.keys
        ('z', 'x | z')
    """
    if x is not None and x.shape[1:] != (config.features,):
        raise InputError(f"`x` must be (N, {config.features}) as `features` says; got shape {tuple(x.shape)}.")
    mean, scale = _moments(config, x)
    p = BayesNet({"z": StandardNormal(config.latents), "x | z": LIKELIHOODS[config.likelihood](config, mean, scale)})
    vae = VAE(p, BayesNet({"z | x": POSTERIORS[config.posterior](config, mean, scale)}))
    vae.config = config
    return vae


def _bernoulli(config: ModelConfig, mean: Tensor, scale: Tensor) -> nn.Module:
    return Bernoulli(_decoder(config, config.features, _logits(mean)))


def _binomial(config: ModelConfig, mean: Tensor, scale: Tensor) -> nn.Module:
    assert config.total_count is not None  # ModelConfig checks it
    return Binomial(_decoder(config, config.features, _logits(mean / config.total_count)), config.total_count)


def _normal(config: ModelConfig, mean: Tensor, scale: Tensor) -> nn.Module:
    width = 2 * config.features if config.noise == "datum" else config.features
    return Normal(_decoder(config, width), config.features, config.noise, loc=mean, scale=scale)


LIKELIHOODS: dict[str, Callable[[ModelConfig, Tensor, Tensor], nn.Module]] = {
    "bernoulli": _bernoulli,
    "binomial": _binomial,
    "normal": _normal,
}
"""Name of p(x | z) to its maker from the configuration and the training data's mean and scale, `(features,)` each."""


def _diagonal(config: ModelConfig, mean: Tensor, scale: Tensor) -> nn.Module:
    return DiagonalNormal(_encoder(config, 2 * config.latents, mean, scale))


def _full(config: ModelConfig, mean: Tensor, scale: Tensor) -> nn.Module:
    return FullNormal(_encoder(config, 2 * config.latents + config.latents**2, mean, scale), config.latents)


POSTERIORS: dict[str, Callable[[ModelConfig, Tensor, Tensor], nn.Module]] = {"diagonal": _diagonal, "full": _full}
"""Name of q(z | x) to its maker, as for `LIKELIHOODS`."""


def _encoder(config: ModelConfig, outputs: int, mean: Tensor, scale: Tensor) -> nn.Module:
    inputs = 2 * config.features if config.holes else config.features
    net = MLP(inputs, config.hidden, outputs, config.activation)
    return Standardize(Holes(net) if config.holes else net, mean, scale)


def _decoder(config: ModelConfig, outputs: int, bias: Tensor | None = None) -> MLP:
    net = MLP(config.latents, config.hidden[::-1], outputs, config.activation)
    if bias is not None:
        with torch.no_grad():
            net.last.bias.copy_(bias)
    return net


def _logits(probs: Tensor) -> Tensor:
    # A pixel that is never on in training may be on in test: its probability starts 1e-4 off the bounds.
    return torch.logit(probs, eps=1e-4)


def _moments(config: ModelConfig, x: Tensor | None) -> tuple[Tensor, Tensor]:
    if x is None:
        centre = {"bernoulli": 0.5, "binomial": 0.5 * (config.total_count or 0), "normal": 0.0}[config.likelihood]
        return torch.full((config.features,), centre), torch.ones(config.features)
    values = x.to(torch.float64)
    known = (~values.isnan()).sum(0).clamp(min=1)
    mean = values.nansum(0) / known
    spread = ((values - mean).square().nansum(0) / known).sqrt()
    if config.likelihood != "normal":
        # Pixels that hardly move would be blown up by their own spread: one for all.
        spread = spread.square().mean().sqrt().expand_as(mean)
        spread = torch.where(spread == 0, 1.0, spread)
    if bool((spread == 0).any()):
        constant = [int(j) for j in (spread == 0).nonzero()[:, 0]]
        raise InputError(
            f"Column {', '.join(map(str, constant))} of the data is constant, and the scale of its normal likelihood "
            "would go to zero. Drop it (`--drop-constant`), or choose another likelihood."
        )
    return mean.to(torch.get_default_dtype()), spread.to(torch.get_default_dtype())
