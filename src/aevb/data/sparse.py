"""Rows of a sparse matrix: most entries are zero, and stay unsaid until a batch is made."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aevb.config import InputError
from aevb.data.batch import Batch
from aevb.data.files import as_float, shown

__all__ = ["SparseRows", "compressed", "from_parts"]

_ENTRIES = 2**22
"""Numbers in a batch that is made dense to be looked at: 16 MiB of float32."""


@final
class SparseRows:
    """Rows of a SciPy sparse matrix, made dense a batch at a time; what `aevb.fit` takes as data.

    Args:
        matrix: A SciPy sparse matrix or array `(N, P)` of real numbers, none of them missing or infinite.
        node: The node's name in the model.
        columns: P names, for errors.

    Raises:
        InputError: If it is no such matrix, is empty, or stores entries that are not finite.

    Example:
        >>> from scipy.sparse import csr_array
        >>> rows = SparseRows(csr_array([[0, 2, 0], [1, 0, 0]]))
        >>> len(rows), rows.take(torch.tensor([0]))
        (2, {'x': tensor([[0., 2., 0.]])})
    """

    def __init__(self, matrix: Any, node: str = "x", columns: Sequence[str] | None = None) -> None:
        self.matrix = compressed(matrix, "`matrix`", columns)
        self.node, self.columns = node, columns
        self.batch: Batch | None = None
        """Whose one-hot columns stand behind the P others, where `beside` put them there."""

    def __len__(self) -> int:
        """Rows N."""
        return int(self.matrix.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some rows, dense `(B, P)`, or `(B, P + batches)`."""
        return torch.from_numpy(self.matrix[rows if isinstance(rows, slice) else rows.cpu().numpy()].toarray())

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The rows `indices`, `(B,)`, dense: `{node: (B, P)}`, and the node `batch` where the rows have one."""
        if self.batch is None:
            return {self.node: self[indices]}
        found = self.batch.split(self[indices])
        return {self.node: found["x"], "batch": found["batch"]}

    def beside(self, batch: Batch, names: Sequence[str | None], where: str = "The data") -> SparseRows:
        """The same rows with the one-hot columns of their batches behind, so that `take` has the node `batch`, too.

        Args:
            batch: The batches.
            names: That of each row, N.
            where: How an error names the rows.

        Raises:
            InputError: If a row has none, or one that is none of `batch`; if the rows have batches already.

        Example:
            >>> from scipy.sparse import csr_array
            >>> donors = ["A", "B", "A", "B"]
            >>> rows = SparseRows(csr_array([[0, 2], [1, 0], [3, 0], [0, 1]])).beside(Batch.of("donor", donors), donors)
            >>> rows.take(torch.tensor([1]))
            {'x': tensor([[1., 0.]]), 'batch': tensor([[0., 1.]])}
        """
        from scipy import sparse

        if len(names) != len(self):
            raise InputError(f"`names` must have one batch a row, {len(self)}; got {len(names)}. Give them all.")
        if self.batch is not None:
            raise InputError(
                f"The rows have their batch beside them already, `{shown(self.batch.column)}`, and a model takes one "
                "column. Join the two into one before (donor_plate)."
            )
        if self.node == "batch":
            raise InputError("The rows are the node `batch` themselves. Give them another `node`.")
        made = copy.copy(self)
        # Of the matrix's own kind, else positions would double in size; SciPy widens them where there are too many.
        kind = self.matrix.indptr.dtype
        ones, starts = np.ones(len(self), dtype=self.matrix.dtype), np.arange(len(self) + 1, dtype=kind)
        codes = batch.codes(names, where).numpy().astype(kind)
        behind = sparse.csr_array((ones, codes, starts), shape=(len(self), len(batch)))
        made.matrix = sparse.hstack([self.matrix, behind], format="csr")
        made.batch = batch
        return made

    def split(self) -> list[Tensor]:
        """Positions of the rows in order, in parts that may be made dense one after another."""
        return list(torch.arange(len(self)).split(max(1, _ENTRIES // self.shape[1])))

    def select(self, rows: Tensor | None = None, columns: Tensor | None = None) -> SparseRows:
        """Some rows, some columns, or both; still sparse.

        Raises:
            InputError: If columns are chosen of rows that have a batch beside them.
        """
        if columns is not None and self.batch is not None:
            raise InputError("The rows have their batch beside them. Choose columns first, then put it `beside` them.")
        chosen = self.matrix if rows is None else self.matrix[rows.cpu().numpy()]
        chosen = chosen if columns is None else chosen[:, columns.cpu().numpy()]
        names = self.columns
        if names is not None and columns is not None:
            names = tuple(names[j] for j in columns.tolist())
        made = SparseRows(chosen, self.node, names)
        made.batch = self.batch
        return made

    @property
    def shape(self) -> torch.Size:
        """(N, P), or (N, P + batches)."""
        return torch.Size(self.matrix.shape)

    @property
    def features(self) -> int:
        """Entries of one row, P."""
        return self.shape[1] - (0 if self.batch is None else len(self.batch))

    @property
    def ndim(self) -> int:
        """Axes, 2."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense rows: float32, or float64 where that would lose something."""
        return torch.float64 if self.matrix.dtype == np.float64 else torch.float32

    @property
    def stored(self) -> NDArray[Any]:
        """The entries that are not zero, in the order of the rows."""
        values: NDArray[Any] = self.matrix.data
        return values

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest entry of each column, `(P,)` each, those of a batch included."""
        low, high = (each(axis=0).toarray().reshape(-1) for each in (self.matrix.min, self.matrix.max))
        return torch.from_numpy(low), torch.from_numpy(high)

    def check_counts(self, where: str) -> None:
        """Raise unless all entries are whole numbers from 0.

        Raises:
            InputError: Naming the first that is not, by row and column.
        """
        odd = (self.stored < 0) | (self.stored != np.floor(self.stored))
        if odd.any():
            at = int(np.flatnonzero(odd)[0])
            raise InputError(
                f"{where}: the entry in {_place(self.matrix, at, self.columns)} is {self.stored[at]:g}; counts are "
                "whole numbers from 0. Give the counts as they were, before they were normalised or logarithms were "
                "taken, or choose another --likelihood."
            )

    def sha256(self) -> str:
        """Fingerprint of the content, whatever order the entries were stored in."""
        digest = hashlib.sha256(f"sparse {tuple(self.shape)} ".encode())
        for part in (self.matrix.data, self.matrix.indices, self.matrix.indptr):
            digest.update(np.ascontiguousarray(part.astype(np.float64 if part is self.matrix.data else np.int64)).data)
        return digest.hexdigest()


def compressed(matrix: Any, where: str, columns: Sequence[str] | None = None) -> Any:
    """The matrix by rows, checked, zeros left out, in float32 unless that loses something.

    Raises:
        InputError: If it cannot be rows of numbers.
    """
    from scipy import sparse

    if not sparse.issparse(matrix) or len(matrix.shape) != 2 or 0 in matrix.shape:
        came = f"shape {matrix.shape}" if sparse.issparse(matrix) else type(matrix).__name__
        raise InputError(
            f"{where} must be a SciPy sparse matrix (rows, columns) with at least one of each; got {came}. "
            "Give rows that hold data."
        )
    if matrix.dtype.kind not in "buif":
        raise InputError(f"{where} holds entries of type {matrix.dtype}; real numbers are needed. Convert it to float.")
    made = sparse.csr_array(matrix, copy=True)
    made.sum_duplicates()
    if made.nnz and not np.isfinite(made.data).all():
        at = int(np.flatnonzero(~np.isfinite(made.data))[0])
        came = "missing (NaN)" if np.isnan(made.data[at]) else "infinite"
        raise InputError(
            f"{where}: the entry in {_place(made, at, columns)} is {came}; what a sparse matrix stores must be "
            "finite. Put the count there, or leave that row out."
        )
    made.eliminate_zeros()
    made.data = as_float(made.data, where) if made.nnz else made.data.astype(np.float32)
    return made


def _place(matrix: Any, at: int, columns: Sequence[str] | None) -> str:
    row, column = int(np.searchsorted(matrix.indptr, at, side="right")) - 1, int(matrix.indices[at])
    return f"row {row}, {f'column `{shown(columns[column])}`' if columns else f'column {column}'} (counting from 0)"


def from_parts(parts: Mapping[Any, NDArray[Any]], form: str, where: str) -> Any:
    """A sparse matrix from the arrays that a file holds: data, indices, indptr, shape; or data, row, col, shape.

    Raises:
        InputError: For another form, or arrays that do not make a matrix.
    """
    from scipy import sparse

    if form not in ("csr", "csc", "coo"):
        raise InputError(f"{where} is a sparse matrix in the form {form!r}; csr, csc or coo are read. Save x.tocsr().")
    rows, columns = (int(size) for size in parts["shape"])
    if form == "coo":
        made = sparse.coo_array((parts["data"], (parts["row"], parts["col"])), shape=(rows, columns))
    else:
        # Positions in 16 bits, as compact files have them, are no index of SciPy's.
        index = [parts[name].astype(np.int64) for name in ("indices", "indptr")]
        kind = sparse.csr_array if form == "csr" else sparse.csc_array
        made = kind((parts["data"], *index), shape=(rows, columns))
        made.check_format(full_check=True)  # else positions beyond the end are read by the next operation
    return made
