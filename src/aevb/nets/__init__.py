"""Nets: tensors to tensors, no probability in them.

Any `nn.Module` that maps the parents' values to one tensor will do; these are the ones most models are made of. A net
that tells the width of its result, as `outputs`, has it checked when a conditional is made of it.
"""

from aevb.nets.convolutions import ConvNet, TransposedConvNet
from aevb.nets.form import ACTIVATIONS
from aevb.nets.mlp import MLP
from aevb.nets.parametric import Fixed, ParametricMLP
from aevb.nets.wrappers import Columns, Evidence, Holes, LogTotal, Rows, Standardize

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Columns",
    "ConvNet",
    "Evidence",
    "Fixed",
    "Holes",
    "LogTotal",
    "ParametricMLP",
    "Rows",
    "Standardize",
    "TransposedConvNet",
]
