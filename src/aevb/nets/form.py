"""What our nets have in common: names of nonlinearities, the check of their inputs, initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aevb.config import InputError

__all__ = ["ACTIVATIONS", "activation_named", "check_inputs", "start"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def activation_named(name: str) -> nn.Module:
    """The nonlinearity of this name in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise InputError(f"`activation` must be one of {', '.join(ACTIVATIONS)}; got {name!r}.")
    return ACTIVATIONS[name]()


def check_inputs(owner: str, inputs: int, parents: tuple[Tensor, ...], remedy: str) -> None:
    """Raise unless the last axes of `parents` add up to `inputs`; `remedy` may name `{width}`, what they add up to."""
    width = sum(parent.shape[-1] for parent in parents)
    if width != inputs:
        came = ", ".join(str(tuple(parent.shape)) for parent in parents)
        raise InputError(
            f"{owner} takes {inputs} inputs; its parents have shapes {came}, {width} together. "
            + remedy.format(width=width)
        )


@torch.no_grad()
def start(layer: nn.Module, *, gated: bool = False) -> None:
    """Weights as in Glorot and Bengio (2010), those behind a gate as in He et al. (2015); biases zero.

    A gate halves what it lets through, as a rectifier does: He's variance 2 / inputs makes up for it.
    """
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        if gated:
            nn.init.kaiming_normal_(layer.weight)
        else:
            nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
