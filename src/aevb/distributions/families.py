"""Families of distributions that torch lacks, or whose digits it loses."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Binomial"]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()


@final
class Binomial(td.Distribution):
    r"""Counts out of n, elementwise; torch's own loses 25 nats over 64 entries at n = 1e6 in float32.

    The terms of :math:`\log \binom{n}{x} + x\, l - n \log(1 + e^l)` are as large as n and cancel. The coefficient has
    no gradient and is taken in float64, on the values' own axes; above n = 1000 the rest is, too.

    Args:
        total_count: n.
        logits: l, `(*batch,)`.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, total_count: int, logits: Tensor) -> None:
        self.total_count, self.logits = total_count, logits
        super().__init__(logits.shape, validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """0, 1, ..., n."""
        return td.constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """Expected count, n pi."""
        return self.total_count * self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        """Spread of the count, n pi (1 - pi)."""
        return self.total_count * self.logits.sigmoid() * (-self.logits).sigmoid()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Binomial:
        """The same over more leading axes."""
        return Binomial(self.total_count, self.logits.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            probs = self.logits.sigmoid().expand(torch.Size(sample_shape) + self.batch_shape)
            return torch.binomial(torch.full_like(probs, self.total_count), probs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        n, x = self.total_count, value.double()
        coefficient = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        if n > 1000:
            logits = self.logits.double()
            return (coefficient + x * logits - n * F.softplus(logits)).to(self.logits.dtype)
        return coefficient.to(self.logits.dtype) + (value * self.logits - n * F.softplus(self.logits))
