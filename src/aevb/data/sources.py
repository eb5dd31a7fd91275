"""Which reader a source goes to: a name, a folder, or a file by its suffix and content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from aevb.config import InputError
from aevb.data.annotated import SUFFIX, read_h5ad
from aevb.data.arrays import holds_mnist, read_idx, read_mnist_folder, read_numpy
from aevb.data.files import Part, Source
from aevb.data.images import SUFFIXES, read_image, read_image_folder
from aevb.data.tables import read_csv, read_parquet

__all__ = ["check_annotated", "open_source"]

_DIGITS_TRAIN = 1500


def open_source(source: str | Path, layer: str = "", batch: str = "") -> Source:
    """The parts of a data set as they are stored; `aevb.data.load` says what may be given.

    Raises:
        InputError: If the source cannot be read.
    """
    check_annotated(source, layer, batch)
    if source == "digits":
        return _digits()
    path = Path(source.removeprefix("mnist:") if isinstance(source, str) else source)
    if os.path.isdir(path):
        mnist = path != Path(source) or holds_mnist(path)
        return read_mnist_folder(path) if mnist else read_image_folder(path)
    if path.suffix.lower() == SUFFIX:
        return read_h5ad(path, layer, batch)
    return _READERS.get(path.suffix.lower(), _idx)(path)


def check_annotated(source: str | Path, layer: str, batch: str) -> None:
    """Raise if a layer or a column of batches is named, and the source is no AnnData file.

    Raises:
        InputError: So.
    """
    if str(source).lower().endswith(SUFFIX):
        return
    if layer:
        raise InputError(
            f"`layer` names a matrix of an AnnData file ({SUFFIX}); got {layer!r} with `{source}`. Drop it."
        )
    if batch:
        raise InputError(
            f"The batch of each row stands in .obs of an AnnData file ({SUFFIX}), in the column `{batch}`; `{source}` "
            "has no such place. Save the rows as such a file, with that column, or use a model without a batch."
        )


def _digits() -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "`digits` needs scikit-learn, which is not installed. Install it: pip install 'aevb[apps]'."
        ) from None
    bunch = load_digits()
    images, labels, cut = bunch.images, bunch.target, _DIGITS_TRAIN
    return Source(
        name="digits",
        train=Part(where="`digits`", values=images[:cut], labels=labels[:cut]),
        test=Part(where="`digits`", values=images[cut:], labels=labels[cut:]),
        total_count=16,
    )


def _idx(path: Path) -> Source:
    return Source(name=path.name, train=Part(where=f"`{path}`", values=read_idx(path)))


def _csv(path: Path) -> Source:
    return Source(name=path.name, train=read_csv(path))


def _parquet(path: Path) -> Source:
    return Source(name=path.name, train=read_parquet(path))


_READERS: dict[str, Callable[[Path], Source]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".csv": _csv,
    ".parquet": _parquet,
    **dict.fromkeys(SUFFIXES, read_image),
}
