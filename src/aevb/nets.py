"""Nets: tensors to tensors, no probability in them.

Any `nn.Module` that maps the parents' values to one tensor will do; these are the ones most models are made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from aevb._shapes import join
from aevb.config import InputError

__all__ = ["ACTIVATIONS", "MLP", "Holes", "Standardize"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


@final
class MLP(nn.Module):
    """Multilayer perceptron: affine maps with a nonlinearity between them; without hidden layers, one affine map.

    Several parents are joined along their last axis. Weights start as in Glorot and Bengio (2010), biases at zero.

    Args:
        inputs: Sum of the parents' dimensions.
        hidden: Widths of the hidden layers.
        outputs: Width of the result.
        activation: A name from `ACTIVATIONS`.

    Example:
        >>> import torch
        >>> MLP(784, [200, 200], 100)(torch.zeros(3, 784)).shape
        torch.Size([3, 100])
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"`activation` must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        self.inputs, self.outputs = inputs, outputs
        widths = [inputs, *hidden, outputs]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)` to `(*, outputs)`."""
        width = sum(parent.shape[-1] for parent in parents)
        if width != self.inputs:
            came = ", ".join(str(tuple(parent.shape)) for parent in parents)
            raise InputError(
                f"MLP takes {self.inputs} inputs; its parents have shapes {came}, {width} together. "
                f"Build it as MLP({width}, ...), or flatten images with `x.flatten(1)`."
            )
        result: Tensor = self.layers(join(parents))
        return result

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer


@final
class Holes(nn.Module):
    """Shows `net` which entries are missing: `net(filled..., mask...)`, NaN becoming 0 in `filled` and in `mask`.

    A net that handles NaN in another way says so by an attribute `sees_holes = True`.

    Args:
        net: Takes the filled parents, then their masks (1 where known, 0 where missing), each `(*, D_i)`: twice the
            width.

    Example:
        >>> import torch
        >>> net = Holes(MLP(2 * 3, [8], 4))
        >>> net(torch.tensor([[1.0, float("nan"), 0.0]])).isfinite().all().item()
        True
    """

    sees_holes = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)`, with NaN for missing, to what `net` returns."""
        missing = [parent.isnan() for parent in parents]
        filled = [parent.masked_fill(gap, 0.0) for parent, gap in zip(parents, missing, strict=True)]
        result: Tensor = self.net(
            *filled, *((~gap).to(parent.dtype) for parent, gap in zip(parents, missing, strict=True))
        )
        return result


@final
class Standardize(nn.Module):
    """Hands `net` its one parent centred and scaled, `net((x - loc) / scale)`; NaN stays NaN.

    Args:
        net: Takes `(*, D)`.
        loc: Centre of the data, `(D,)`.
        scale: Spread of the data, `(D,)`, above 0.

    Example:
        >>> import torch
        >>> Standardize(nn.Identity(), torch.tensor([1.0]), torch.tensor([2.0]))(torch.tensor([[5.0]]))
        tensor([[2.]])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, parent: Tensor) -> Tensor:
        """Parent `(*, D)` to what `net` returns."""
        if parent.shape[-1] != self.loc.shape[0]:
            raise InputError(
                f"The net's parent must end in {self.loc.shape[0]} entries; got shape {tuple(parent.shape)}. "
                "Flatten images with `x.flatten(1)`, or build the model for these columns."
            )
        result: Tensor = self.net((parent - self.loc) / self.scale)
        return result
