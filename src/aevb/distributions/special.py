"""Functions of gamma and softplus in float64, right to the last digits where parameters are tiny or huge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOG_RANGE", "count_term", "log_gamma_draw", "log_rising", "mean_term", "positive", "softplus"]

# A log-parameter is kept where float64 has digits for its exponential and for what is made of it. At e^40 the limit
# (binomial, Poisson) is reached to the last digit, so that the gradient there, 0, is right, too.
LOG_RANGE = (-300.0, 40.0)


def count_term(log_theta: Tensor, value: Tensor) -> Tensor:
    """What a count brings to a negative binomial whatever its mean, in float64."""
    x = value.double()
    return log_rising(log_theta.double().exp(), x) - torch.lgamma(x + 1)


def mean_term(log_mean: Tensor, log_theta: Tensor, value: Tensor) -> Tensor:
    """The rest of it, in float64."""
    x, theta, ratio = value.double(), log_theta.double().exp(), log_mean.double() - log_theta.double()
    return x * ratio - (x + theta) * softplus(ratio)


def positive(log: Tensor) -> Tensor:
    """exp(log) in float64, above 0 and finite."""
    return log.double().clamp(*LOG_RANGE).exp()


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own is x past 20, 2e-9 too little, which counts multiply."""
    return -F.logsigmoid(-x)


def log_rising(a: Tensor, x: Tensor | float) -> Tensor:
    r""":math:`\log \Gamma(a + x) - \log \Gamma(a)` for a > 0, x >= 0 in float64.

    Where a is large both terms are, too, and Stirling's series is subtracted term by term instead; at a >= 100 its
    first term left out, 1 / (1680 a^7), is below 1e-17.
    """
    b = a.clamp(min=100.0)
    direct = torch.lgamma(a + x) - torch.lgamma(a)
    series = (b + x - 0.5) * torch.log1p(x / b) + x * b.log() - x + _stirling(b + x) - _stirling(b)
    return torch.where(a < 100.0, direct, series)


def _stirling(a: Tensor) -> Tensor:
    """The three terms of log Gamma(a) - (a - 1/2) log a + a - log(2 pi) / 2 in 1/a."""
    square = a.square()
    return (1 / 12 - (1 / 360 - 1 / (1260 * square)) / square) / a


def log_gamma_draw(shape: Tensor) -> Tensor:
    """Log of a draw of Gamma(shape, 1), which itself underflows at small shapes: Gamma(a + 1) U^(1/a) is Gamma(a)."""
    gamma = torch._standard_gamma(shape + 1)
    return gamma.log() - torch.empty_like(shape).exponential_() / shape
