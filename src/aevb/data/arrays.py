"""Array files: NumPy's .npy and .npz, never unpickled, and IDX, the format of MNIST.

An IDX file is two zero bytes, a byte for the type, a byte for the number of axes, each axis's length as a big-endian
32-bit integer, then the entries, big-endian, last axis fastest; it may be compressed by gzip.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aevb.config import InputError
from aevb.data.files import FORMATS, Part, Source, listed, opened, parsing, shown
from aevb.data.sparse import from_parts

__all__ = ["holds_mnist", "read_idx", "read_mnist_folder", "read_numpy"]

_ROWS = ("x_train", "train", "x", "X", "data")
_TEST = {"x_train": "x_test", "train": "test"}
_LABELS = {"x_train": ("y_train",), "x_test": ("y_test",), "x": ("y", "labels"), "X": ("y", "labels")}
_LABELS["data"] = _LABELS["x"]
_ACCEPTED = "x_train (with y_train, x_test, y_test), train (with test), or x, X or data (with y or labels)"

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_DEFLATE_LIMIT = 1032  # deflate shrinks nothing by more than this factor (zlib's technical notes)


def read_numpy(path: Path) -> Source:
    """One array, an archive with the usual names, or a sparse matrix, recognised by content.

    Raises:
        InputError: If it is neither, holds objects, or names its arrays in an unknown way.
    """
    with opened(path) as file, parsing(f"`{path}`", "NumPy data"):
        magic = file.read(2)
        file.seek(0)
        if magic == b"PK":
            with zipfile.ZipFile(file) as archive:
                return _archive(archive, path)
        values = _npy(file, os.fstat(file.fileno()).st_size, f"`{path}`")
        return Source(name=path.name, train=Part(where=f"`{path}`", values=values))


def _npy(file: BinaryIO, size: int, where: str) -> NDArray[Any]:
    # NumPy warns of headers written by Python 2 and of odd literals; either they parse or they do not.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = np.lib.format.read_magic(file)
        if version > (2, 0):
            raise InputError(
                f"{where} holds records with named fields; rows of numbers are needed. Save one 2-D array."
            )
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise InputError(
                f"{where} holds pickled Python objects, which can run code when opened and are never read. "
                "Save a numeric array: np.save(path, x.astype(float))."
            )
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"its header promises shape {shape} of {dtype}, more than its {size} bytes")
        file.seek(0)
        values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return values


def _archive(archive: zipfile.ZipFile, path: Path) -> Source:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def read(name: str) -> NDArray[Any]:
        with archive.open(members[name]) as file:
            return _npy(file, members[name].file_size, f"`{shown(name)}` in `{path}`")  # type: ignore[arg-type]

    def part(name: str) -> Part:
        labels = next((read(label) for label in _LABELS.get(name, ()) if label in members), None)
        return Part(where=f"`{shown(name)}` in `{path}`", values=read(name), labels=labels)

    if {"data", "shape"} <= set(members) and ("indptr" in members or {"row", "col"} <= set(members)):
        return _sparse(read, set(members), path)
    rows = _rows_name(list(members), path)
    test = _TEST.get(rows)
    return Source(name=path.name, train=part(rows), test=part(test) if test in members else None)


def _sparse(read: Callable[[str], NDArray[Any]], names: set[str], path: Path) -> Source:
    """A matrix as `scipy.sparse.save_npz` writes it; labels may lie beside it."""
    form = "csr"
    if "format" in names:
        stored = read("format").item()
        form = stored.decode() if isinstance(stored, bytes) else str(stored)
    parts = {name: read(name) for name in ("data", "indices", "indptr", "row", "col", "shape") if name in names}
    labels = next((read(name) for name in _LABELS["x"] if name in names), None)
    where = f"`{path}`"
    return Source(name=path.name, train=Part(where=where, values=from_parts(parts, form, where), labels=labels))


def _rows_name(names: list[str], path: Path) -> str:
    found = [name for name in _ROWS if name in names]
    if len(found) != 1 and len(names) != 1:
        raise InputError(
            f"`{path}` holds {f'the arrays {listed(names)}' if names else 'no array'}; its rows must be called "
            f"{_ACCEPTED}, by one of these names only, or be the only array. Rename them: np.savez(path, x=rows)."
        )
    return (found or names)[0]


def read_idx(path: Path) -> NDArray[Any]:
    """The array of an IDX file, `(n_1, ..., n_d)`, in the machine's byte order.

    Raises:
        InputError: If the content is not exactly one array in that format.
    """
    with opened(path) as file, parsing(f"`{path}`", "an IDX file"):
        compressed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        if compressed:
            with gzip.GzipFile(fileobj=file) as content:
                return _idx(content, size * _DEFLATE_LIMIT, path)  # type: ignore[arg-type]
        return _idx(file, size, path)


def _idx(file: BinaryIO, limit: int, path: Path) -> NDArray[Any]:
    magic = file.read(4)
    dtype = _IDX_TYPES.get(magic[2]) if len(magic) == 4 and magic[:2] == b"\0\0" else None
    if dtype is None:
        raise InputError(f"`{path}` is in no known format. Convert it to one of these: {FORMATS}.")
    shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    content = file.read(expected + 1) if expected <= limit else b""
    if len(content) != expected:
        came = "more follow" if len(content) > expected else "fewer follow"
        raise InputError(
            f"`{path}` promises {expected} bytes of entries for shape {shape}, and {came}. Download it again."
        )
    # A bytearray, because torch wants memory that may be written to.
    values = np.frombuffer(bytearray(content), dtype).reshape(shape)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def holds_mnist(folder: Path) -> bool:
    """Whether one of the four files of MNIST lies in a folder."""
    return any(_mnist_file(folder, split, kind) for split in ("train", "t10k") for kind in ("images", "labels"))


def read_mnist_folder(folder: Path) -> Source:
    """The four files of MNIST, or of a data set published in its form, from one folder.

    Raises:
        InputError: If one of the four is missing.
    """
    files = {
        (split, kind): _mnist_file(folder, split, kind) for split in ("train", "t10k") for kind in ("images", "labels")
    }
    missing = [f"{split}-{kind}" for (split, kind), path in files.items() if path is None]
    if missing:
        raise InputError(
            f"`{folder}` lacks {', '.join(missing)}; a folder must hold the four IDX files of MNIST "
            "(train-images-idx3-ubyte and so on, also .gz). Download them, or give the path of one data file."
        )
    parts = [
        Part(where=f"`{files[split, 'images']}`", values=read_idx(images), labels=read_idx(labels))
        for split in ("train", "t10k")
        if (images := files[split, "images"]) and (labels := files[split, "labels"])
    ]
    return Source(name=folder.resolve().name, train=parts[0], test=parts[1])


def _mnist_file(folder: Path, split: str, kind: str) -> Path | None:
    axes = 3 if kind == "images" else 1
    names = [f"{split}-{kind}{dot}idx{axes}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)
