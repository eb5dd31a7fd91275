"""Nets whose weights are values: of a node of the model, or of a datum of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aevb._shapes import join
from aevb.config import InputError
from aevb.nets.form import activation_named, check_inputs

__all__ = ["Fixed", "ParametricMLP"]


@final
class ParametricMLP(nn.Module):
    r"""A multilayer perceptron whose weights are its last parent: :math:`\text{net}(a, w) = W h_L(a) + c`.

    It has no parameters of its own. With a node w of `weight_count` dimensions, a prior over it and a q, it makes a net
    with a posterior over its weights (notes, the remark on SGVB: "also for the posterior of the parameters").

    The vector w holds, layer by layer, the matrix row by row and then the bias: the order of
    `torch.nn.utils.parameters_to_vector(MLP(inputs, hidden, outputs).parameters())`. `split` takes it apart.

    Args:
        inputs: Sum of the dimensions of the parents but the last.
        hidden: Widths of the hidden layers.
        outputs: Width of the result.
        activation: A name from `ACTIVATIONS`.

    Example:
        >>> import torch
        >>> net = ParametricMLP(3, [8], 2)
        >>> net.weight_count, net(torch.zeros(5, 3), torch.zeros(4, 1, 50)).shape
        (50, torch.Size([4, 5, 2]))
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, activation: str = "silu") -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.activation = activation_named(activation)
        self._shapes = [(fan_out, fan_in) for fan_in, fan_out in itertools.pairwise([inputs, *hidden, outputs])]

    @property
    def weight_count(self) -> int:
        """Dimensions P of the vector of weights."""
        return sum(fan_out * fan_in + fan_out for fan_out, fan_in in self._shapes)

    def split(self, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights `(*, P)` to one matrix `(*, out, in)` and one bias `(*, out)` a layer, views of them."""
        if weights.shape[-1] != self.weight_count:
            raise InputError(
                f"The weights of this ParametricMLP must end in {self.weight_count} entries; got shape "
                f"{tuple(weights.shape)}. Give the node that is its last parent `net.weight_count` dimensions."
            )
        parts = weights.split([count for out, fan_in in self._shapes for count in (out * fan_in, out)], dim=-1)
        matrices = (part.unflatten(-1, shape) for part, shape in zip(parts[::2], self._shapes, strict=True))
        return list(zip(matrices, parts[1::2], strict=True))

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)`, then weights `(*, P)`, to `(*, outputs)`; weights `(K, 1, P)` are shared by the rows."""
        *others, weights = parents
        check_inputs("ParametricMLP", self.inputs, tuple(others), "Build it as ParametricMLP({width}, ...).")
        x = join(tuple(others))
        batch = torch.broadcast_shapes(x.shape[:-1], weights.shape[:-1])
        x, weights = torch.atleast_2d(x), torch.atleast_2d(weights)
        shared = weights.shape[-2] == 1
        for depth, (matrix, bias) in enumerate(self.split(weights)):
            if depth:
                x = self.activation(x)
            # Rows that share their weights are one product of matrices; else every row has its own.
            product = x @ matrix.squeeze(-3).mT if shared else (matrix @ x.unsqueeze(-1)).squeeze(-1)
            x = product + bias
        result: Tensor = x.reshape(*batch, self.outputs)
        return result


@final
class Fixed(nn.Module):
    r"""A learned row for each datum: index i to the i-th row of a table, whatever the datum is.

    `DiagonalNormal(Fixed(start))` with the index as its parent is a q without amortisation, :math:`q_i(z_i)` with
    variational parameters of its own for every datum. An optimizer with momentum also moves rows outside the batch.

    Args:
        start: Where the table starts, `(rows, outputs)`; copied.

    Raises:
        InputError: If `start` is not a table.

    Example:
        >>> import torch
        >>> Fixed(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))(torch.tensor([1.0, 0.0])).tolist()
        [[2.0, 3.0], [0.0, 1.0]]
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        if start.ndim != 2 or start.shape[0] == 0:
            raise InputError(
                f"`start` must be (rows, outputs) with a row for each datum; got shape {tuple(start.shape)}."
            )
        table = start.detach().clone()
        self.table = nn.Parameter(table if table.is_floating_point() else table.to(torch.get_default_dtype()))

    @property
    def outputs(self) -> int:
        """Width of a row."""
        return self.table.shape[1]

    def forward(self, index: Tensor) -> Tensor:
        """Row numbers `(*,)`, whole numbers of any type, to `(*, outputs)`.

        Raises:
            InputError: For a number that is no row. Not seen inside `torch.compile`, which may not read values.
        """
        rows = self.table.shape[0]
        if index.is_floating_point() and rows > 2 / torch.finfo(index.dtype).eps:
            raise InputError(f"{index.dtype} cannot tell {rows} rows apart. Give the index as float64 or int64.")
        if not torch.compiler.is_compiling():
            good = (index >= 0) & (index < rows) & (index == index.floor())  # NaN is none of these
            if not bool(good.all()):
                raise InputError(
                    f"The index of Fixed must be whole numbers from 0 to {rows - 1}; got {index[~good][0].item()}. "
                    "A datum it was not made for has no row: widen the table, or use an amortised net."
                )
        return F.embedding(index.long(), self.table)
