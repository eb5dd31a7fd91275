"""Multilayer perceptrons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from aevb._shapes import join
from aevb.config import InputError
from aevb.nets.form import activation_named, check_inputs, start
from aevb.nets.wrappers import Rows

__all__ = ["MLP"]


@final
class MLP(nn.Module):
    r"""Multilayer perceptron: affine maps with a nonlinearity between them; without hidden layers, one affine map.

    .. math:: h_0 = a, \quad h_l = f(A_l h_{l-1} + b_l), \quad \text{net}(a) = W h_L + c

    Several parents are joined along their last axis: :math:`A_1 a = \sum_i A_{1i} a_i`, each product on its parent's
    own leading axes where they differ, so that data `(N, 784)` next to classes `(E, 1, 1, 10)` are multiplied once, not
    E times. Weights start as in Glorot and Bengio (2010), those of gated layers as in He et al. (2015), biases at zero.

    Args:
        inputs: Sum of the parents' dimensions.
        hidden: Widths of the hidden layers.
        outputs: Width of the result.
        activation: f, a name from `ACTIVATIONS`; `"silu"` if None. None where `gated`.
        batch_norm: Normalise every hidden layer's affine map over all leading axes before f, as Sønderby et al. (2016)
            do (Ioffe and Szegedy, 2015); the bias :math:`b_l`, made redundant, is left out.
        gated: Hidden layers :math:`h_l = (A_l h_{l-1} + b_l) \odot \operatorname{sigmoid}(C_l h_{l-1} + d_l)` (Tomczak
            and Welling, 2018) in place of f.
        residual: Hidden layers as wide as the one before add to it, :math:`h_l = h_{l-1} + f(A_l h_{l-1} + b_l)` (He et
            al., 2016); the others are as ever.

    Raises:
        InputError: For an unknown name, an option that has no hidden layer to act on, or both `gated` and `activation`.

    Example:
        >>> import torch
        >>> MLP(784, [200, 200], 100)(torch.zeros(3, 784)).shape
        torch.Size([3, 100])
        >>> MLP(794, [300, 300], 100, gated=True)(torch.zeros(3, 784), torch.eye(10).view(10, 1, 1, 10)).shape
        torch.Size([10, 1, 3, 100])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        activation: str | None = None,
        *,
        batch_norm: bool = False,
        gated: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        _check_options(hidden, activation, batch_norm=batch_norm, gated=gated, residual=residual)
        self.inputs, self.outputs = inputs, outputs
        layers: list[nn.Module] = []
        for depth, (fan_in, fan_out) in enumerate(itertools.pairwise([inputs, *hidden])):
            width = 2 * fan_out if gated else fan_out
            block: list[nn.Module] = [nn.Linear(fan_in, width, bias=not batch_norm)]
            if batch_norm:
                block.append(Rows(nn.BatchNorm1d(width)))
            block.append(nn.GLU() if gated else activation_named(activation or "silu"))
            # Not around the first: that would depend on whether the data happen to be as wide as the net.
            layers += [_Skip(*block)] if residual and depth > 0 and fan_in == fan_out else block
        self.layers = nn.Sequential(*layers, nn.Linear([inputs, *hidden][-1], outputs))
        for module in self.layers.modules():
            start(module, gated=gated and module is not self.last)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)` to `(*, outputs)`."""
        check_inputs(
            "MLP", self.inputs, parents, "Build it as MLP({width}, ...), or flatten images with `x.flatten(1)`."
        )
        first, *others = self.layers
        assert isinstance(first, nn.Linear)
        result = _affine(first, parents)
        for layer in others:
            result = layer(result)
        return result

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer


@final
class _Skip(nn.Module):
    """`x + layers(x)`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


def _affine(layer: nn.Linear, parents: tuple[Tensor, ...]) -> Tensor:
    """`layer` at the joined parents; one product for each where joining would repeat some of them."""
    if all(parent.shape[:-1] == parents[0].shape[:-1] for parent in parents[1:]):
        result: Tensor = layer(join(parents))
        return result
    weights = layer.weight.split([parent.shape[-1] for parent in parents], dim=1)
    total = F.linear(parents[0], weights[0], layer.bias)
    for parent, weight in zip(parents[1:], weights[1:], strict=True):
        total = total + F.linear(parent, weight)
    return total


def _check_options(
    hidden: Sequence[int], activation: str | None, *, batch_norm: bool, gated: bool, residual: bool
) -> None:
    widths = list(hidden)
    if activation is not None:
        activation_named(activation)
        if gated:
            raise InputError(
                f"`gated` takes the place of `activation`; got gated=True with activation={activation!r}. Drop one."
            )
    if (batch_norm or gated) and not widths:
        option = "batch_norm" if batch_norm else "gated"
        raise InputError(f"`{option}` acts on hidden layers; got hidden={widths}. Give their widths, or drop it.")
    if residual and all(one != other for one, other in itertools.pairwise(widths)):
        raise InputError(
            f"`residual` adds a hidden layer to the one before where both are as wide; got hidden={widths}. "
            "Give two neighbours the same width, e.g. [200, 200], or drop it."
        )
