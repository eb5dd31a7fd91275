"""AnnData files, `.h5ad`: counts read sparse, results put beside them with nothing of the file lost.

The layout is that of AnnData's file format: a matrix is a dataset, or a group of `data`, `indices` and `indptr` whose
attributes tell its form and shape; `obs` and `var` are groups of columns, whose attribute `_index` names the one that
holds the names. Results are appended to a copy of the file: what this module does not know stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aevb.config import InputError
from aevb.data.files import Part, Source, listed, opened, parsing, shown
from aevb.data.sparse import from_parts

__all__ = ["SUFFIX", "check_h5ad", "read_h5ad", "write_h5ad"]

SUFFIX = ".h5ad"
_MATRIX = "X"


def read_h5ad(path: Path, layer: str = "", batch: str = "") -> Source:
    """The matrix X of an AnnData file, or one of its layers, `raw` among them; columns have the names of `var`.

    Args:
        path: The file.
        layer: The matrix to read in place of X.
        batch: The column of `obs` that names each row's batch.

    Raises:
        InputError: If it is no such file, has no such matrix or column, or h5py is not installed.
    """
    h5py = _h5py()
    with opened(path):
        pass
    with parsing(f"`{path}`", "an AnnData file"), h5py.File(path, "r") as file:
        where = f"`{path}`" + (f", layer `{layer}`" if layer else "")
        home = file["raw"] if layer == "raw" and "raw" in file else file
        place = _MATRIX if layer in ("", "raw") else f"layers/{layer}"
        if "obs" not in file or "var" not in home or place not in home or (layer == "raw" and home is file):
            had = [*file.get("layers", {}), *(["raw"] if "raw" in file else [])]
            raise InputError(
                f"`{path}` has no {f'layer `{layer}`' if layer else 'matrix X with obs and var'}; its layers are: "
                f"{listed(had) if had else 'none'}. Name one of them with --layer, or write the file with AnnData."
            )
        names = _names(home["var"], where)
        values, batches = _matrix(home[place], where), _batches(file, batch, where) if batch else None
        if batches is not None and len(batches) != values.shape[0]:
            raise InputError(f"{where} has {values.shape[0]} rows and {len(batches)} in .obs. Write it with AnnData.")
        return Source(name=path.name, train=Part(where=where, values=values, columns=names,
                                                 named=names is not None, batches=batches))  # fmt: skip


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise InputError(
            "`.h5ad` files need h5py, which is not installed. Install it: pip install 'aevb[counts]'."
        ) from None
    return h5py


def _matrix(stored: Any, where: str) -> Any:
    if not hasattr(stored, "keys"):
        return np.asarray(stored)
    told = stored.attrs.get("encoding-type", stored.attrs.get("h5sparse_format", ""))
    form = str(told.decode() if isinstance(told, bytes) else told).removesuffix("_matrix")
    parts: dict[str, NDArray[Any]] = {name: stored[name][:] for name in ("data", "indices", "indptr")}
    return from_parts({**parts, "shape": _shape_of(stored)}, form, where)


def _shape_of(stored: Any) -> NDArray[Any]:
    """Of a sparse matrix."""
    return np.asarray(stored.attrs["shape"] if "shape" in stored.attrs else stored.attrs["h5sparse_shape"])


def _batches(file: Any, column: str, where: str) -> tuple[str | None, ...]:
    """A column of `obs` as text, None where it is missing: of categories, text, booleans or whole numbers."""
    table = file["obs"]
    if "column-order" not in getattr(table, "attrs", {}):
        raise InputError(
            f"{where} is of the time before AnnData 0.7, whose columns of .obs are not read. Read and write it with a "
            "newer AnnData first."
        )
    had = [name for name in map(_text, table.attrs["column-order"]) if name in table]
    if column not in had:  # any other path of HDF5 is no column: the names of rows, `donor/codes`
        raise InputError(
            f"{where} has no column `{shown(column)}` in .obs, which is to name each row's batch; it has "
            f"{listed(had) if had else 'none'}. Add it, adata.obs[{column!r}] = ..., or name another when training."
        )
    stored, missing, allowed = table[column], None, "biufOSU"
    if "categories" in stored.attrs:  # of AnnData 0.7, by reference
        values, codes = file[stored.attrs["categories"]][:], stored[:]
    elif hasattr(stored, "keys") and "categories" in stored:
        kept = stored["categories"]
        values, codes = (kept["values"] if hasattr(kept, "keys") else kept)[:], stored["codes"][:]
    else:
        values = (stored["values"] if hasattr(stored, "keys") else stored)[:]
        if not (values.dtype.kind == "f" and bool(np.all(np.isnan(values) | (values == np.floor(values))))):
            allowed = "biuOSU"
        codes, missing = np.arange(len(values)), stored["mask"][:] if hasattr(stored, "keys") else None
    if values.dtype.kind not in allowed:
        raise InputError(
            f"{where}: .obs[{column!r}] holds {values.dtype}, and a batch is a category, text, a boolean or a whole "
            f"number. Make it one: adata.obs[{column!r}] = adata.obs[{column!r}].astype('category')."
        )
    # Categories of whole numbers with a gap among them were floats: 1.0 is the 1 of another file.
    whole = values.dtype.kind == "f"
    names = [_text(int(value) if whole and float(value).is_integer() else value) for value in values]
    gone = codes < 0 if missing is None else missing
    return tuple(None if gap else names[code] for code, gap in zip(codes.tolist(), gone.tolist(), strict=True))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _names(var: Any, where: str) -> tuple[str, ...] | None:
    """Names of the columns; none where the file is of the time before AnnData 0.7."""
    if "_index" not in getattr(var, "attrs", {}) or not hasattr(var, "keys"):
        return None
    stored = var[var.attrs["_index"]]
    if hasattr(stored, "keys"):  # a nullable array of strings
        stored = stored["values"]
    names = tuple(map(_text, stored[:]))
    if len(set(names)) < len(names):
        double = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(names) < 10_000 else []
        raise InputError(
            f"{where} has names of var more than once{f' ({listed(double)})' if double else ''}; columns are matched "
            "by name. Make them unique: adata.var_names_make_unique()."
        )
    return names


def check_h5ad(
    source: Path, *, obsm: Sequence[str] = (), obs: Sequence[str] = (), layers: Sequence[str] = (),
    columns: Sequence[str] | None = None, kept: Sequence[int] | None = None, features: int = 0,
) -> None:  # fmt: skip
    """Raise what `write_h5ad` would of results with these names, before they are computed.

    Raises:
        InputError: So.
    """
    with opened(source):
        pass
    with parsing(f"`{source}`", "an AnnData file"), _h5py().File(source, "r") as file:
        _check_free(file, source, {"obsm": obsm, "obs": obs, "layers": layers})
        if layers:
            _places(file, source, columns, kept, features)


def write_h5ad(
    source: Path, out: Path, *, obsm: Mapping[str, NDArray[Any]] | None = None,
    obs: Mapping[str, NDArray[Any]] | None = None, layers: Mapping[str, Sequence[NDArray[Any]]] | None = None,
    columns: Sequence[str] | None = None, kept: Sequence[int] | None = None, over: str | None = None,
) -> None:  # fmt: skip
    """A copy of an AnnData file with results beside what it holds; whole, or not at all.

    Args:
        source: The file that was read.
        out: File to write.
        obsm: Arrays `(N, D)` by name, for `.obsm`.
        obs: Arrays `(N,)` by name, for `.obs`.
        layers: By name, for `.layers`, arrays `(n, P)` whose rows are those of the file one after another.
        columns: P names of theirs, each found in `.var`; by position where there are none.
        kept: P positions among the columns of X, unless it has P.
        over: Layer whose entries, in columns other than these P, a layer takes over, "" for X; NaN if None.

    Raises:
        InputError: If a name is taken, a column is not found, or the disk refuses; nothing is written then.
    """
    h5py, given = _h5py(), {"obsm": obsm or {}, "obs": obs or {}, "layers": layers or {}}
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        try:
            shutil.copyfile(source, partial)
            with contextlib.ExitStack() as open_files:
                with parsing(f"`{source}`", "an AnnData file"):
                    file = open_files.enter_context(h5py.File(partial, "r+"))
                    _check_free(file, source, given)
                    wide = next((parts[0].shape[1] for parts in (layers or {}).values()), 0)
                    at, width = _places(file, source, columns, kept, wide) if layers else ([], 0)
                for name, parts in (layers or {}).items():
                    _write_layer(_group(file, "layers"), name, parts, at, width, None if over is None else _home(over))
                for name, values in (obsm or {}).items():
                    _encoded(_group(file, "obsm").create_dataset(name, data=values), "array", "0.2.0")
                _write_obs(file["obs"], obs or {})
            with open(partial, "rb+") as written:
                os.fsync(written.fileno())
            os.rename(partial, out)
        except (OSError, RuntimeError) as error:  # HDF5 has the latter where the disk is full as a file is closed
            told = getattr(error, "strerror", None) or error
            raise InputError(f"`{out}` cannot be written: {told}. Free some space.") from error
    finally:
        partial.unlink(missing_ok=True)


def _home(layer: str) -> str:
    return f"layers/{layer}" if layer else _MATRIX


def _check_free(file: Any, source: Path, names: Mapping[str, Iterable[str]]) -> None:
    """Raise if results of these names cannot be added."""
    if "column-order" not in getattr(file["obs"], "attrs", {}):
        raise InputError(
            f"`{source}` is of the time before AnnData 0.7, to which nothing can be added. Read and write it with a "
            "newer AnnData first."
        )
    for kind, given in names.items():
        for name in given:
            if kind in file and name in file[kind]:
                raise InputError(
                    f"`{source}` has .{kind}['{name}'] already; nothing is overwritten unasked. Take it out first, or "
                    "start from the file without it."
                )


def _places(
    file: Any, source: Path, columns: Sequence[str] | None, kept: Sequence[int] | None, features: int
) -> tuple[list[int], int]:
    """Where the P columns of results stand among those of a layer, which has a column for each name of `var`."""
    names = _names(file["var"], f"`{source}`")
    assert names is not None  # files that have none are of an older form, to which nothing is added
    if columns is None:
        at = list(range(features)) if len(names) == features or kept is None else list(kept)
        lost = [f"column {j}" for j in at if j >= len(names)]
    else:
        place = {name: at for at, name in enumerate(names)}
        lost = [name for name in columns if name not in place]
        at = [place[name] for name in columns if name in place]
    if lost:
        raise InputError(
            f"`{source}` has no {listed(lost)} among the {len(names)} columns of X, for which its layers are, and the "
            "model was trained on more (as `raw` has). Write what it tells to another kind of file, or train on X."
        )
    return at, len(names)


_ROWS = 1024
"""Rows of a layer that are written together."""


def _write_layer(
    home: Any, name: str, parts: Sequence[NDArray[Any]], at: list[int], width: int, over: str | None
) -> None:
    """Rows `(n, P)` as rows of the full width, some at a time: all of them may be most of the memory."""
    made = home.create_dataset(name, (sum(map(len, parts)), width), parts[0].dtype)
    _encoded(made, "array", "0.2.0")
    done = 0
    for part in parts:
        for start in range(0, len(part), _ROWS):
            values = part[start : start + _ROWS]
            rows = slice(done, done + len(values))
            block = np.full((len(values), width), np.nan, made.dtype)
            if over is not None:
                block[:] = home.file[over][rows]
            block[:, at] = values
            made[rows] = block
            done += len(values)


def _write_obs(table: Any, obs: Mapping[str, NDArray[Any]]) -> None:
    for name, values in obs.items():
        _encoded(table.create_dataset(name, data=values), "array", "0.2.0")
    if obs:
        order = [*map(_text, table.attrs["column-order"])]
        table.attrs.create("column-order", np.array([*order, *obs], dtype=object), dtype=_h5py().string_dtype())


def _group(file: Any, kind: str) -> Any:
    if kind not in file:
        _encoded(file.create_group(kind), "dict", "0.1.0")
    return file[kind]


def _encoded(made: Any, form: str, version: str) -> None:
    made.attrs["encoding-type"], made.attrs["encoding-version"] = form, version
