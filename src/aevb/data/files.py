"""What a file holds, and the errors of opening and parsing it, each as one line that ends in a remedy."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aevb.config import InputError

__all__ = ["FORMATS", "MISSING", "Part", "Source", "as_float", "listed", "opened", "parsing", "reason", "shown"]

FORMATS = (
    ".npy, .npz, .csv, .parquet, .h5ad, an IDX file (such as train-images-idx3-ubyte, also .gz), an image (.png, .jpg "
    "and others) or a folder of them"
)

MISSING = ("", "NA", "NaN", "nan", "null", "?")
"""Cells of a CSV file that mean: not observed."""


_LONGEST = 120
_FLOAT32_WHOLE = 2**24  # up to here float32 tells every whole number from the next
_FLOAT64_WHOLE = 2**53
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows as their file has them."""

    where: str  # how an error names them
    values: Any  # an array (N,), (N, P), (N, H, W) or (N, H, W, 3), or a sparse matrix (N, P)
    labels: NDArray[Any] | None = None  # (N,)
    classes: tuple[str, ...] = ()  # names of the labels 0, 1, ..., where they have any
    columns: tuple[str, ...] | None = None  # P names
    named: bool = False  # the names stand in the file; else they were made up
    batches: tuple[str | None, ...] | None = None  # (N,) the batch of each row, where it was asked for; None is missing


@dataclass(frozen=True, kw_only=True)
class Source:
    """One or two parts under one name."""

    name: str
    train: Part  # all there is, unless there is a test part
    test: Part | None = None
    total_count: int | None = None  # the largest possible count, where entries are counts


def shown(name: str) -> str:
    """A name out of a file, safe to stand in a sentence: one line, not endless."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name[:_LONGEST])


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(f"`{shown(name)}`" for name in names[:10])
    return text if len(names) <= 10 else f"{text} and {len(names) - 10} more"


def reason(error: BaseException) -> str:
    """The first line of an error's text, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(" .:") if lines else ""
    return shown(text) or type(error).__name__


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes.

    Raises:
        InputError: If there is none, or it may not be read.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        file = open(path, "rb") if regular else None
    except FileNotFoundError:
        raise InputError(f"`{path}` does not exist. Check the spelling, and the folder it is relative to.") from None
    except PermissionError:
        raise InputError(
            f"`{path}` may not be read. Change its permissions, or copy it to a folder of yours."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"`{path}` cannot be opened: {reason(error)}. Give the path of a data file.") from error
    if file is None:
        raise InputError(f"`{path}` is not a regular file. Give the path of a data file: {FORMATS}.")
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            raise InputError(f"`{path}` is empty. Write it again; a data file has at least one row.")
        yield file


@contextmanager
def parsing(where: str, form: str) -> Iterator[None]:
    """Turns whatever a parser raises into an `InputError` about a file that should have the given form."""
    try:
        yield
    except InputError:
        raise
    # Bytes from anywhere make parsers raise nearly anything: BadZipFile, zlib.error, LZMAError, EOFError, OSError
    # (gzip), struct.error, RuntimeError (encrypted), NotImplementedError, MemoryError (absurd sizes), polars' own.
    except Exception as error:
        raise InputError(
            f"{where} cannot be read as {form}: {reason(error)}. "
            "The file is damaged, cut short, or of another format: write or download it again."
        ) from error


def as_float(values: NDArray[Any], where: str) -> NDArray[Any]:
    """Numbers in float32, or in float64 where that would overflow, underflow, or tell fewer whole numbers apart.

    Raises:
        InputError: For whole numbers that no float tells apart.
    """
    if values.dtype.kind in "iu" and max(abs(int(values.min())), abs(int(values.max()))) > _FLOAT64_WHOLE:
        raise InputError(
            f"{where} has whole numbers beyond 2**53, which no float tells apart. "
            "Remove the column if it holds identifiers; else divide it."
        )
    with np.errstate(all="ignore"):
        wide = values.astype(np.float64, copy=False)
        narrow = values.astype(np.float32)
        if values.dtype.itemsize <= 2 or values.dtype == np.float32:
            return narrow
        # What may not be lost: size (inf, zero), and the differences among large numbers such as times or identifiers.
        size = np.abs(wide)
        lost = (narrow != wide) & ((size > _FLOAT32_WHOLE) | (size < _FLOAT32_TINY))
    return wide if lost.any() else narrow
