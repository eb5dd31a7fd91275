"""Data: arrays, tables and images in, checked tensors out; tables of results back to files."""

from __future__ import annotations

from aevb.data.binary import Binarize, Binarized
from aevb.data.coding import decode, encode
from aevb.data.dataset import Data
from aevb.data.kinds import find_schema
from aevb.data.loading import load
from aevb.data.rows import read_rows
from aevb.data.schema import Column, Schema
from aevb.data.writing import check_destination, write_rows

__all__ = [
    "Binarize",
    "Binarized",
    "Column",
    "Data",
    "Schema",
    "check_destination",
    "decode",
    "encode",
    "find_schema",
    "load",
    "read_rows",
    "write_rows",
]
