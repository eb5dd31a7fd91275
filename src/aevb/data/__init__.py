"""Data: arrays, tables and images in, checked tensors out; tables of results back to files."""

from __future__ import annotations

from aevb.data.binary import Binarize, Binarized
from aevb.data.dataset import Data
from aevb.data.loading import load
from aevb.data.rows import read_rows
from aevb.data.writing import check_destination, write_rows

__all__ = ["Binarize", "Binarized", "Data", "check_destination", "load", "read_rows", "write_rows"]
