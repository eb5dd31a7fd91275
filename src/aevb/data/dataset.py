"""A data set in memory: what is trained on, what is tested on, and where each came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aevb.config import InputError
from aevb.data.batch import Batch
from aevb.data.binary import Binarize, Binarized, check_binarize
from aevb.data.sparse import SparseRows
from aevb.data.target import Target

__all__ = ["Data", "nodes_of"]

_IN_WORDS: dict[str, str] = {
    "none": "none",
    "static": "each pixel drawn once from Bernoulli(grey), seed {seed}",
    "epoch": "train pixels drawn anew from Bernoulli(grey) at each use; test pixels drawn once, seed {seed}",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Rows to train on and rows to test on, checked, with what is known of them.

    Example:
        >>> import torch
        >>> data = Data(name="noise", train=torch.tensor([[0.5, 2.0], [1.5, float("nan")]]))
        >>> data.features, data.describe()["missing"]
        (2, {'train': 1, 'test': None})
    """

    name: str
    """The source's name, without its folder."""
    train: Tensor | SparseRows
    """`(N, P)`: uint8 where the file has bytes, else float; NaN is missing. With binarize "epoch", the grey values.
    With a batch `(N, P + B)`, its one-hot columns behind the others."""
    test: Tensor | None = None
    """`(M, P)`, of the same type, or None; with binarize "epoch", zeros and ones in uint8."""
    train_labels: Tensor | None = None
    """`(N,)` int64; -1 is missing."""
    test_labels: Tensor | None = None
    """`(M,)` int64; -1 is missing."""
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ..., where the source has them: the sub-folders of images."""
    columns: tuple[str, ...] | None = None
    """P names, where the source has them."""
    image_shape: tuple[int, ...] | None = None
    """(H, W) of grey images; (3, H, W) of colour ones, whose rows hold red, then green, then blue. The product is P;
    None where rows are not (whole) images."""
    total_count: int | None = None
    """The largest possible entry, where entries are counts with a known limit."""
    binarize: Binarize = "none"
    """Whether entries were or are drawn from Bernoulli(grey)."""
    seed: int = 0
    """Keys the draws that are made once."""
    constant: tuple[str, ...] = ()
    """Columns with one value, or none, among the train rows; a position counts from 0."""
    dropped: tuple[str, ...] = ()
    """Constant columns that were removed."""
    kept: tuple[int, ...] | None = None
    """Positions in the source of the P columns, counting from 0; None if none was dropped."""
    kinds: tuple[str, ...] = ()
    """What each column of a table holds, as `aevb.Mixed` takes it; empty where all are of one kind."""
    target: Target | None = None
    """The column that is a node `y` of its own, if one is."""
    batch: Batch | None = None
    """The column that names each row's batch, which a model is given, if one does."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        check_binarize(self.binarize, self.seed)
        if self.batch is not None and self.binarize == "epoch":
            raise InputError("`batch` is one-hot behind the entries, which `binarize` epoch draws anew. Drop one.")
        for name, x in (("train", self.train), ("test", self.test)):
            if x is not None and (x.ndim != 2 or x.shape[1] != self.train.shape[1]):
                raise InputError(
                    f"`{name}` must be (rows, columns) with as many columns as `train`; got shape {tuple(x.shape)}. "
                    "Flatten images with `x.flatten(1)`, and give both parts the same columns."
                )
        if self.batch is not None and self.features < 1:
            raise InputError(
                "`train` must be (rows, columns) with the one-hot columns of `batch` behind; got shape "
                f"{tuple(self.train.shape)} with {len(self.batch)} batches. Give rows that have entries, too."
            )
        if self.columns is not None and len(self.columns) != self.features:
            raise InputError(
                f"`columns` must have {self.features} names, one a column; got {len(self.columns)}. Name every column."
            )

    @property
    def features(self) -> int:
        """Entries of one row, P."""
        return int(self.train.shape[1]) - (0 if self.batch is None else len(self.batch))

    def training(self) -> dict[str, Tensor] | Binarized | SparseRows:
        """The train rows in the form that `aevb.fit` takes: the node `x`, beside a target `y`, or a `batch`.

        Example:
            >>> import torch
            >>> list(Data(name="a", train=torch.eye(2)).training())
            ['x']
        """
        if isinstance(self.train, SparseRows):
            return self.train
        return Binarized(self.train) if self.binarize == "epoch" else self.nodes(self.train)

    def nodes(self, rows: Tensor) -> dict[str, Tensor]:
        """The nodes of a model in dense rows as `train` has them: `x`, beside a target `y`, or a `batch`.

        Example:
            >>> import torch
            >>> data = Data(name="a", train=torch.eye(4), batch=Batch.of("donor", ["A", "B", "A", "B"]))
            >>> {name: tuple(value.shape) for name, value in data.nodes(data.train[:3]).items()}
            {'x': (3, 2), 'batch': (3, 2)}
        """
        return nodes_of(rows, self.target, self.batch)

    def describe(self) -> dict[str, Any]:
        """What a run records of its data, JSON-able.

        Returns:
            Names, sizes, the number of missing entries, how pixels were drawn, which columns are constant or were
            dropped, the batches, and the SHA-256 of each part's type, shape and bytes, which covers each row's batch.

        Example:
            >>> import torch
            >>> Data(name="a", train=torch.eye(2)).describe()["rows"]
            {'train': 2, 'test': None}
        """
        parts: dict[str, Tensor | SparseRows | None] = {"train": self.train, "test": self.test}
        named: dict[str, Any] = {} if self.target is None else {"target": self.target.name}
        named |= {} if self.batch is None else {"batch": self.batch.to_json()}
        return {
            "name": self.name,
            "rows": {part: None if x is None else len(x) for part, x in parts.items()},
            "features": self.features,
            "dtype": str(self.train.dtype).removeprefix("torch."),
            "missing": {part: None if x is None else _missing(x) for part, x in parts.items()},
            "binarize": _IN_WORDS[self.binarize].format(seed=self.seed),
            "sha256": {part: None if x is None else _fingerprint(x) for part, x in parts.items()},
            "columns": None if self.columns is None else list(self.columns),
            "image_shape": None if self.image_shape is None else list(self.image_shape),
            "total_count": self.total_count,
            "constant": list(self.constant),
            "dropped": list(self.dropped),
            "kept": None if self.kept is None else list(self.kept),
        } | named


def nodes_of(rows: Tensor, target: Target | None = None, batch: Batch | None = None) -> dict[str, Tensor]:
    """The nodes of a model in rows `(*, P)`: `x` alone, beside the column that is `y`, or beside their `batch`."""
    if target is not None:
        return target.split(rows)
    return {"x": rows} if batch is None else batch.split(rows)


def _missing(x: Tensor | SparseRows) -> int:
    return 0 if isinstance(x, SparseRows) else int(x.isnan().sum())


def _fingerprint(x: Tensor | SparseRows) -> str:
    if isinstance(x, SparseRows):
        return x.sha256()
    digest = hashlib.sha256(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} ".encode())
    digest.update(x.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
