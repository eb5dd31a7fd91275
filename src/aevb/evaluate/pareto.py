"""How heavy the tail of importance weights is: the diagnostic that says whether their mean can be trusted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pareto_k"]


def pareto_k(tail: Tensor, cutoff: Tensor) -> Tensor:
    r"""Shape :math:`\hat k` of the generalised Pareto law of the largest importance weights (Vehtari et al., 2024).

    The fit is the quasi-Bayesian one of Zhang and Stephens (2009) with Vehtari et al.'s weak prior, worth ten draws at
    k = 0.5. A finite variance of the weights needs k < 0.5; above 0.7 the estimate is not to be trusted.

    Args:
        tail: Log-weights above the cutoff, `(M, N)`.
        cutoff: The largest log-weight not in the tail, `(N,)`.

    Returns:
        `(N,)`; -inf where all of the tail ties with the cutoff, NaN where M < 5 tells nothing.
    """
    count = tail.shape[0]
    if count < 5:
        return torch.full_like(cutoff, math.nan)
    top = tail.max(0).values
    x = ((tail - top).exp() - (cutoff - top).exp()).clamp(min=0).sort(0).values  # (M, N)
    quartile, largest = x[int(count / 4 + 0.5) - 1], x[-1]
    flat = quartile <= 0
    quartile, largest = torch.where(flat, 1.0, quartile), torch.where(flat, 1.0, largest)
    grid = 30 + int(math.sqrt(count))
    j = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    theta = 1 / largest + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)  # (grid, N)
    shape = torch.log1p(-theta.unsqueeze(1) * x).mean(1)
    log_lik = count * ((-theta / shape).log() - shape - 1)
    theta = (theta * log_lik.softmax(0)).sum(0)
    shape = torch.log1p(-theta * x).mean(0)
    return torch.where(flat, -math.inf, (count * shape + 10 * 0.5) / (count + 10))
