r"""Nets between images and vectors.

Nodes are vectors, so an image `(C, H, W)` enters and leaves flattened, `(C * H * W,)`, channel by channel. Every
convolution is 3 x 3 with stride 2 and padding 1: a side of :math:`n` pixels becomes :math:`\lceil n / 2 \rceil`, and on
the way back :math:`2m - 1` or :math:`2m`, as is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from aevb._shapes import by_rows, join
from aevb.config import InputError
from aevb.nets.form import activation_named, check_inputs, start

__all__ = ["ConvNet", "TransposedConvNet"]

_REMEDY = "Name the image's size as (C, H, W), and flatten images with `x.flatten(1)`."


@final
class ConvNet(nn.Module):
    r"""Image to vector: strided convolutions, each with its nonlinearity, then one affine map.

    Several parents are images of one size, and their channels are joined: `Holes(ConvNet((2 * C, H, W), ...))` sees the
    filled image and its mask. Weights start as in Glorot and Bengio (2010), biases at zero.

    Args:
        image: (C, H, W); the parents' dimensions add up to `C * H * W`.
        channels: Channels after each convolution; the last leaves :math:`H / 2^L \times W / 2^L` pixels, rounded up.
        outputs: Width of the result.
        activation: A name from `ACTIVATIONS`.
        batch_norm: Normalise each channel over all leading axes and pixels before the nonlinearity (Ioffe and Szegedy,
            2015); the convolution's bias, made redundant, is left out.

    Raises:
        InputError: For an image that is not three sizes, no channels, or an unknown name.

    Example:
        >>> import torch
        >>> ConvNet((1, 28, 28), [32, 64], 100)(torch.zeros(3, 784)).shape
        torch.Size([3, 100])
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        channels: Sequence[int],
        outputs: int,
        activation: str = "silu",
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = _sizes(image, channels)
        self.inputs, self.outputs = math.prod(image), outputs
        layers: list[nn.Module] = [nn.Unflatten(1, tuple(image))]
        for fan_in, fan_out in itertools.pairwise([image[0], *channels]):
            layers.append(nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(fan_out)] if batch_norm else []
            layers.append(activation_named(activation))
        layers += [nn.Flatten(), nn.Linear(channels[-1] * math.prod(sizes[-1]), outputs)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            start(layer)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, C_i * H * W)` to `(*, outputs)`."""
        check_inputs("ConvNet", self.inputs, parents, _REMEDY)
        return by_rows(self.layers, join(parents))

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer


@final
class TransposedConvNet(nn.Module):
    r"""Vector to image: an affine map to a small image, then transposed convolutions, the reverse of `ConvNet`.

    The result has a bias of its own for every channel and pixel, `last.bias`, so that it can start at the data's mean
    as that of an `MLP` can (Burda et al., 2016). Weights start as in Glorot and Bengio (2010), biases at zero.

    Args:
        inputs: Sum of the parents' dimensions.
        channels: Channels before each transposed convolution; `ConvNet`'s in reverse.
        image: (C, H, W) of the result; twice the channels where a likelihood asks for two numbers a pixel.
        activation: A name from `ACTIVATIONS`.
        batch_norm: Normalise each channel over all leading axes and pixels before the nonlinearity.

    Raises:
        InputError: For an image that is not three sizes, no channels, or an unknown name.

    Example:
        >>> import torch
        >>> net = TransposedConvNet(50, [64, 32], (1, 28, 28))
        >>> net(torch.zeros(3, 50)).shape, net.last.bias.shape
        (torch.Size([3, 784]), torch.Size([784]))
    """

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int],
        image: tuple[int, int, int],
        activation: str = "silu",
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = _sizes(image, channels)[::-1]
        self.inputs, self.outputs = inputs, math.prod(image)
        layers: list[nn.Module] = [
            nn.Linear(inputs, channels[0] * math.prod(sizes[0])),
            nn.Unflatten(1, (channels[0], *sizes[0])),
        ]
        for depth, ((h, w), (height, width)) in enumerate(itertools.pairwise(sizes), 1):
            fan_in, fan_out = [*channels, image[0]][depth - 1 : depth + 1]
            layers += [nn.BatchNorm2d(fan_in)] if batch_norm else []
            layers.append(activation_named(activation))
            # m pixels become 2m - 1; an even side needs one more.
            more = (height - (2 * h - 1), width - (2 * w - 1))
            # The next normalisation would take a channel's bias away, and `last` has one for each pixel.
            bias = not batch_norm and depth < len(channels)
            layers.append(nn.ConvTranspose2d(fan_in, fan_out, 3, stride=2, padding=1, output_padding=more, bias=bias))
        self.layers = nn.Sequential(*layers, nn.Flatten(), _Bias(self.outputs))
        for layer in self.layers:
            start(layer)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)` to `(*, C * H * W)`."""
        check_inputs("TransposedConvNet", self.inputs, parents, "Build it as TransposedConvNet({width}, ...).")
        return by_rows(self.layers, join(parents))

    @property
    def last(self) -> _Bias:
        """What adds the output bias, `last.bias` of `(C * H * W,)`."""
        layer = self.layers[-1]
        assert isinstance(layer, _Bias)
        return layer


@final
class _Bias(nn.Module):
    """`x + bias`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _sizes(image: Sequence[int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width before the first and after each convolution."""
    if len(image) != 3 or min(image) < 1:
        raise InputError(f"`image` must be (C, H, W), each at least 1; got {tuple(image)}. A grey one is (1, H, W).")
    if not channels:
        raise InputError("`channels` is empty; give one number for each convolution, or use an MLP.")
    sizes = [(image[1], image[2])]
    for _ in channels:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes
