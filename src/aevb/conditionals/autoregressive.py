r"""Observed vectors whose entries depend on each other given the parents, one after the other.

.. math:: \log p(x | a) = \sum_j \log p(x_j | x_{<j}, a)

A masked net gives all the terms in one pass: output j sees no entry of x from j on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width
from aevb.config import InputError
from aevb.nets import ACTIVATIONS

__all__ = ["Autoregressive", "AutoregressiveBernoulli"]


@final
class AutoregressiveBernoulli(nn.Module):
    r"""Binary vectors without independence, :math:`\prod_j \operatorname{Bernoulli}(x_j;\, \pi_j(x_{<j}, a))`.

    A masked autoencoder (MADE; Germain et al., 2015) over x, whose biases come from the parents and so reach every
    unit unmasked:

    .. math:: h_0 = x, \quad h_l = \operatorname{act}\big((M_l \odot W_l) h_{l-1} + b_l(a)\big), \quad
        \operatorname{logit} \pi = (M_L \odot W_L) h_{L-1} + b_L(a)

    Entry j of x and of :math:`\pi` has degree j, hidden units take 1, ..., D - 1 in turn; the mask M passes from a
    degree to no smaller one, and on to :math:`\pi` only to larger ones. At W = 0 this is `Bernoulli`; without hidden
    layers, a logistic regression of each entry on those before it.

    Args:
        net: Returns the biases :math:`b_1, ..., b_L` side by side, `(*, sum(hidden) + D)`.
        dims: D.
        hidden: Widths of the masked hidden layers.
        activation: A name from `aevb.nets.ACTIVATIONS`.

    Example:
        >>> from aevb import MLP
        >>> likelihood = AutoregressiveBernoulli(MLP(2, [16], 32 + 784), 784, [32])
        >>> likelihood(torch.zeros(5, 2)).log_prob(torch.ones(5, 784)).shape
        torch.Size([5])
    """

    def __init__(self, net: nn.Module, dims: int, hidden: Sequence[int], activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"`activation` must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        if min([dims, *hidden]) < 1:
            raise InputError(
                f"`dims` and `hidden` must be at least 1; got {dims} and {list(hidden)}. Leave empty ones out."
            )
        self.widths = [*hidden, dims]
        wanted = sum(self.widths)
        check_width("AutoregressiveBernoulli", net, lambda width: width == wanted, f"sum(hidden) + D = {wanted}")
        self.net, self.activation = net, ACTIVATIONS[activation]()
        entries = torch.arange(dims)
        degrees = [entries, *(torch.arange(width) % max(1, dims - 1) for width in hidden)]
        self.layers = nn.ModuleList(_Masked(b.unsqueeze(-1) >= a) for a, b in itertools.pairwise(degrees))
        self.layers.append(_Masked(entries.unsqueeze(-1) > degrees[-1]))

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        biases = self.net(*parents)
        check_out("AutoregressiveBernoulli", biases, sum(self.widths))
        return Autoregressive(self._logits, biases, self.widths[-1])

    def _logits(self, x: Tensor, biases: Tensor) -> Tensor:
        h = x
        for i, (layer, bias) in enumerate(zip(self.layers, biases.split(self.widths, dim=-1), strict=True)):
            h = layer(self.activation(h) if i else h) + bias
        return h


@final
class Autoregressive(td.Distribution):
    r"""Binary vectors, :math:`\log p(x) = \sum_j \log \operatorname{Bernoulli}(x_j;\, l_j(x, c))`.

    Args:
        logits: (x, c) to l `(*, D)`, whose entry j depends on no :math:`x_i, i \ge j`.
        context: c, `(*batch, C)`.
        dims: D.

    Example:
        >>> d = Autoregressive(lambda x, c: c + x.cumsum(-1) - x, torch.zeros(1, 3), 3)
        >>> d.log_prob(torch.zeros(1, 3))
        tensor([-2.0794])
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.independent(td.constraints.boolean, 1)

    def __init__(self, logits: Callable[[Tensor, Tensor], Tensor], context: Tensor, dims: int) -> None:
        self.logits, self.context = logits, context
        super().__init__(context.shape[:-1], torch.Size([dims]), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Has no closed form."""
        raise NotImplementedError("An autoregressive likelihood has no mean in closed form; average draws of it.")

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> Autoregressive:
        """The same over more leading axes."""
        context = self.context.expand(torch.Size(batch_shape) + self.context.shape[-1:])
        return Autoregressive(self.logits, context, self.event_shape[0])

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008
        """Vectors `(*sample_shape, *batch, D)`, in D passes."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
            x = self.context.new_zeros(shape)
            u = torch.rand_like(x)
            for j in range(shape[-1]):
                x[..., j] = (u[..., j] < self.logits(x, self.context)[..., j].sigmoid()).to(x.dtype)
            return x

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, `(*batch,)`, in one pass."""
        return F.logsigmoid((2 * value - 1) * self.logits(value, self.context)).sum(-1)


@final
class _Masked(nn.Module):
    """A linear map of which the weights outside `mask` `(outputs, inputs)` are zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(mask.shape)))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(*, inputs)` to `(*, outputs)`."""
        return F.linear(x, self.weight * self.mask)
