r"""Grey values as probabilities: each pixel is drawn from Bernoulli(grey), once, or anew each time it is used."""

from __future__ import annotations

from typing import Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from aevb.config import InputError

__all__ = ["Binarize", "Binarized", "check_binarize", "check_grey", "draw_once", "full_grey"]

Binarize = Literal["none", "static", "epoch"]

_BYTE = 255
_BLOCK_ROWS = 4096  # bounds the memory of a draw
_STREAM = {"train": 0, "test": 1}


@final
class Binarized:
    """Rows whose pixels are drawn anew from their grey values each time they are taken (Burda et al., 2016, section 5).

    Draws come from torch's current default generator: whoever seeds it decides them.

    Args:
        grey: `(N, P)`; uint8, of which 255 is white, or floats in [0, 1]: the probability of a one.
        node: The node's name in the model.

    Raises:
        InputError: If grey values lie outside, or are missing.

    Example:
        >>> rows = Binarized(torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8))
        >>> len(rows), rows.take(torch.tensor([1]))
        (2, {'x': tensor([[1., 0.]])})
    """

    def __init__(self, grey: Tensor, node: str = "x") -> None:
        check_grey(grey, "`grey`")
        if bool(grey.isnan().any()):
            raise InputError(
                "`grey` has missing values, which cannot be drawn anew. "
                "Use binarize='static', which keeps them missing."
            )
        self.grey = grey
        self.node = node

    def __len__(self) -> int:
        """Rows N."""
        return len(self.grey)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows `indices`, `(B,)`, as zeros and ones: `{node: (B, P) float32}`."""
        grey = self.grey.index_select(0, indices.to(self.grey.device))
        if grey.dtype == torch.uint8:
            # Of all int16 a share g / 255 lies below, to 2e-5: none for 0, all for 255. Without booleans, whose making
            # and reading take longer than the draws.
            above = grey.float().mul_(2**16 / _BYTE).sub_(2**15).sub_(_sixteen_bits(grey))
            return {self.node: above.ceil_().clamp_(0, 1).abs_()}
        ones = torch.rand(grey.shape, dtype=grey.dtype, device=grey.device) < grey
        return {self.node: ones.float()}


def _sixteen_bits(like: Tensor) -> Tensor:
    """Uniform int16 of the shape of `like`, four from each draw of 64 bits: less than half the time of floats."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    return words.random_(-(2**63), None).view(torch.int16)[: like.numel()].reshape(like.shape)


def full_grey(grey: Tensor) -> int:
    """The value that means probability one: 255 in bytes, 1 in floats."""
    return _BYTE if grey.dtype == torch.uint8 else 1


def check_binarize(binarize: str, seed: int) -> None:
    """Check the choice and its seed.

    Raises:
        InputError: If either cannot be used.
    """
    if binarize not in get_args(Binarize):
        raise InputError(
            f"`binarize` must be one of {', '.join(get_args(Binarize))}; got {binarize!r}. Choose one of these names."
        )
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"`seed` must be a whole number of at least 0; got {seed!r}. Use 0 if any will do.")


def check_grey(x: Tensor, where: str) -> None:
    """Grey values are `(N, P)` bytes, or floats in [0, 1] or NaN.

    Raises:
        InputError: If they are not.
    """
    if x.ndim != 2 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise InputError(
            f"{where} must be (rows, pixels) of uint8 or floats; got {x.dtype} of shape {tuple(x.shape)}. "
            "Flatten images with `x.flatten(1)`, and divide by the largest grey value."
        )
    if x.dtype != torch.uint8 and bool(((x < 0) | (x > 1)).any()):
        low, high = (float(v) for v in x[~x.isnan()].aminmax())
        raise InputError(
            f"{where} has values from {low:g} to {high:g}; to be binarised it must hold uint8 in 0..255, or floats in "
            "[0, 1]. Divide by the largest possible value, or store bytes."
        )


def draw_once(grey: Tensor, *, seed: int, part: Literal["train", "test"]) -> Tensor:
    """One draw of each pixel, a function of `grey`, `seed` and `part`, whatever else has been drawn in this process.

    Returns:
        Zeros and ones, uint8, `(N, P)`; float32 with NaN if values are missing.
    """
    # numpy's, not torch's: its streams for a seed are the same on every machine and in every version.
    generator = np.random.Generator(np.random.PCG64([seed, _STREAM[part]]))
    missing = bool(grey.isnan().any())
    drawn = torch.empty(grey.shape, dtype=torch.float32 if missing else torch.uint8)
    for start in range(0, len(grey), _BLOCK_ROWS):
        block = grey[start : start + _BLOCK_ROWS]
        uniform = torch.from_numpy(generator.random(tuple(block.shape), dtype=np.float32))
        ones = uniform < block.float() / full_grey(block)
        drawn[start : start + _BLOCK_ROWS] = torch.where(block.isnan(), block, ones) if missing else ones
    return drawn
