"""Data: arrays, tables and images in, checked tensors out; tables of results back to files."""

from __future__ import annotations

from aevb.data.annotated import check_h5ad, write_h5ad
from aevb.data.batch import Batch
from aevb.data.binary import Binarize, Binarized
from aevb.data.blocks import Blocks, open_array, open_shards
from aevb.data.coding import decode, encode, widened
from aevb.data.dataset import Data
from aevb.data.frames import read_frame
from aevb.data.images import as_images, described, write_images
from aevb.data.kinds import find_schema
from aevb.data.loading import load, load_table, table_rows
from aevb.data.rows import read_rows
from aevb.data.schema import Column, Schema
from aevb.data.sparse import SparseRows
from aevb.data.target import Target
from aevb.data.writing import check_destination, write_frame, write_rows

__all__ = [
    "Batch",
    "Binarize",
    "Binarized",
    "Blocks",
    "Column",
    "Data",
    "Schema",
    "SparseRows",
    "Target",
    "as_images",
    "check_destination",
    "check_h5ad",
    "decode",
    "described",
    "encode",
    "find_schema",
    "load",
    "load_table",
    "open_array",
    "open_shards",
    "read_frame",
    "read_rows",
    "table_rows",
    "widened",
    "write_frame",
    "write_h5ad",
    "write_images",
    "write_rows",
]
