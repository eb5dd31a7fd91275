"""Distributions over finitely many values: classes as one-hot vectors, a single point; their states and relaxation."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.distributions as td
from torch import Tensor

from aevb.config import InputError
from aevb.distributions.density import base_of

__all__ = ["Delta", "OneHot", "count_states", "relaxed", "states"]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()


@final
class OneHot(td.Distribution):
    r"""One of C classes as a one-hot vector, :math:`\log p(y) = \sum_c y_c \log \pi_c`.

    torch's own looks up the largest entry of a value; this sum is also right in the gradient where a relaxed value,
    a point of the simplex, is put in.

    Args:
        logits: Of :math:`\pi`, `(*batch, C)`, normalised here.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.one_hot

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The probabilities, `(*batch, C)`."""
        return self.logits.exp()

    @property
    def variance(self) -> Tensor:
        """Of each entry, `(*batch, C)`."""
        return self.mean * (1 - self.mean)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> OneHot:
        """The same over more leading axes."""
        made = OneHot.__new__(OneHot)
        made.logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        td.Distribution.__init__(made, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return made

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """One-hot vectors `(*sample_shape, *batch, C)`: the largest of the logits with Gumbel noise."""
        with torch.no_grad():
            logits = self.logits.expand(torch.Size(sample_shape) + self.logits.shape)
            noisy = logits - torch.empty_like(logits).exponential_().log()
            codes = torch.arange(logits.shape[-1], device=logits.device)
            return (noisy.argmax(-1, keepdim=True) == codes).to(logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, `(*batch,)`."""
        # A class that cannot be has logit -inf, and 0 * -inf is no number.
        return torch.where(value == 0, 0.0, value * self.logits).sum(-1)


@final
class Delta(td.Distribution):
    """All mass on one point `value` `(*batch, D)`: a node that is computed, with no density."""

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.real_vector
    has_rsample = True

    def __init__(self, value: Tensor) -> None:
        self.value = value
        super().__init__(value.shape[:-1], value.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.value

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Delta:
        """The same over more leading axes."""
        return Delta(self.value.expand(torch.Size(batch_shape) + self.event_shape))

    def rsample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """The point, `(*sample_shape, *batch, D)`."""
        return self.value.expand(torch.Size(sample_shape) + self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises: a point has no density."""
        raise InputError(
            "A Deterministic node has no density, so it can be neither observed nor latent. "
            "Leave its value out, or give the node a distribution."
        )


def count_states(d: td.Distribution) -> int | None:
    """Values that `d` can take, where they are finitely many classes or binary vectors; None for other families."""
    if isinstance(d, OneHot):
        return d.event_shape[0]
    if isinstance(base_of(d), td.Bernoulli):
        return int(2 ** d.event_shape.numel())
    return None


def states(d: td.Distribution) -> Tensor:
    """All values of `d`, `(S, *event)`, in its dtype.

    Example:
        >>> states(OneHot(torch.zeros(2)))
        tensor([[1., 0.],
                [0., 1.]])
    """
    base, count = base_of(d), count_states(d)
    assert count is not None
    if isinstance(d, OneHot):
        return torch.eye(count, dtype=d.logits.dtype, device=d.logits.device)
    assert isinstance(base, td.Bernoulli)
    entries = d.event_shape.numel()
    numbers = torch.arange(count, device=base.logits.device).unsqueeze(-1)
    bits = (numbers >> torch.arange(entries, device=base.logits.device)) & 1
    return bits.to(base.logits.dtype).reshape(count, *d.event_shape)


def relaxed(d: td.Distribution, temperature: float) -> td.Distribution:
    """The continuous relaxation of `d` whose draws have a gradient (Jang et al., 2017; Maddison et al., 2017)."""
    base = base_of(d)
    if isinstance(d, OneHot):
        return td.RelaxedOneHotCategorical(d.logits.new_tensor(temperature), logits=d.logits, validate_args=False)
    assert isinstance(base, td.Bernoulli)
    soft = td.RelaxedBernoulli(base.logits.new_tensor(temperature), logits=base.logits, validate_args=False)
    return td.Independent(soft, len(d.event_shape), validate_args=False)
