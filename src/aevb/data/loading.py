"""From a source to a checked data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aevb.config import InputError
from aevb.data.batch import Batch
from aevb.data.binary import Binarize, check_binarize, draw_once, full_grey
from aevb.data.coding import encode
from aevb.data.dataset import Data
from aevb.data.files import Part
from aevb.data.frames import Frame, read_frame
from aevb.data.rows import Rows, column_name, grey_of, rows_from, with_batch
from aevb.data.schema import Schema
from aevb.data.sources import open_source
from aevb.data.sparse import SparseRows
from aevb.data.target import Target

__all__ = ["load", "load_table", "table_rows"]


def load(
    source: str | Path, *, binarize: Binarize = "none", seed: int = 0, drop_constant: bool = False, layer: str = "",
    batch: str = "",
) -> Data:  # fmt: skip
    """Reads a data set into memory and checks it.

    A file is one of these:

    - `.csv`: numbers, `true` and `false`; a cell that is empty, `NA`, `NaN`, `nan`, `null` or `?` is missing. The first
      line names the columns; if it is all numbers it is data, and the columns are called x1, x2 and so on.
    - `.parquet`: columns of numbers and booleans; null is missing.
    - `.npy`: an array `(N,)`, `(N, P)`, `(N, H, W)` of grey images, or `(N, H, W, 3)` of colour images: bytes, floats
      in [0, 1], or, with NaN for missing pixels, whole numbers from 0 to 255.
    - `.npz`: arrays `x_train` with `y_train`, `x_test`, `y_test`; or `train` with `test`; or `x`, `X` or `data` with
      `y` or `labels`; or a single array. Labels that are not whole numbers are left out: they are no classes.
    - `.npz` as `scipy.sparse.save_npz` writes it: the rows stay sparse until they are used, a batch at a time.
    - `.h5ad`, an AnnData file: its X or a layer, sparse if it is stored so; columns have the names of `var`.
    - IDX, the format of MNIST, whatever its name, also compressed by gzip.
    - an image: `.png`, `.jpg`, `.jpeg`, `.bmp`, `.tif`, `.tiff` or `.webp`, of 8 bits a channel.

    The images of a folder are read in the order of their names, and must have one size. Sub-folders are classes,
    numbered in the order of their names (`Data.classes`), unless there are two, called train and test. If one image is
    in colour, all are read so. Palettes become colours. Transparency is dropped where no pixel uses it, else refused.

    A row is an image flattened, one in colour as its red, green and blue planes, `(3, H, W)`: what `aevb.nets.ConvNet`
    takes.

    Bytes stay uint8; all else becomes float32, or float64 where float32 would overflow, underflow, or change entries
    beyond 2**24.

    Args:
        source: A file; a folder of images; a folder with the four IDX files of MNIST, or a file of it, also spelt
            `mnist:PATH`; or `digits`, the 1797 images of 8 x 8 counts 0..16 that come with scikit-learn, of which the
            first 1500 are for training.
        binarize: "none"; "static": each pixel is drawn once from Bernoulli(grey); "epoch": test pixels are, and train
            pixels are drawn anew each time they are used. Grey is a byte over 255, a count over its limit, or a
            float in [0, 1]. Missing pixels stay missing under "static".
        seed: Keys the draws that are made once.
        drop_constant: Remove the columns that are constant among the train rows, from both parts. Images with columns
            removed have no `image_shape`.
        layer: Of an AnnData file, the layer to read in place of X, or `raw`.
        batch: Of an AnnData file, the column of `.obs` (categories, text, booleans, whole numbers) that names each
            row's batch; none if empty. Its one-hot columns stand behind the others in `Data.train`.

    Returns:
        The data set; `constant` lists the columns that carry no information, `dropped` and `kept` what was removed.

    Raises:
        InputError: If the source cannot be read, breaks a rule above, has fewer than two train rows, only constant
            columns, or a batch that is missing in a row, the same in all, or one's own in most.

    Example:
        >>> data = load("digits")
        >>> data.train.shape, data.test.shape, data.image_shape, data.total_count
        (torch.Size([1500, 64]), torch.Size([297, 64]), (8, 8), 16)
        >>> data.constant
        ('column 0', 'column 32', 'column 39')
        >>> load("digits", drop_constant=True).features
        61
    """
    check_binarize(binarize, seed)
    if batch and binarize != "none":
        raise InputError("`binarize` is for pixels, `batch` for rows of an AnnData file. Drop one of the two.")
    stored = open_source(source, layer, batch)
    train = rows_from(stored.train)
    test = None if stored.test is None else rows_from(stored.test)
    if len(train.x) < 2:
        raise InputError(f"{train.where} has one row; a model of one row would only repeat it. Give at least two rows.")
    if test is not None:
        train, test = _alike(train, test)
    assert not isinstance(x_test := None if test is None else test.x, SparseRows)
    x, total_count = train.x, stored.total_count
    if binarize != "none":
        x, x_test = _binarized(train, test, binarize, seed, total_count)
        total_count = None
    data = Data(
        name=stored.name,
        train=x,
        test=x_test,
        train_labels=train.labels,
        test_labels=None if test is None else test.labels,
        classes=stored.train.classes,
        columns=train.columns,
        image_shape=train.image_shape,
        total_count=total_count,
        binarize=binarize,
        seed=seed,
    )
    data = _mark_constant(data, train.where, drop_constant)
    return data if train.batches is None else _batched(data, batch, train.batches, train.where)


def load_table(source: Any, schema: Schema, target: str = "") -> Data:
    """Reads the columns of a table that a model is made of, as numbers.

    Args:
        source: A CSV, Parquet or Arrow file, or a frame of polars, pyarrow or pandas.
        schema: What the columns hold, as `find_schema` tells.
        target: The column that is to be a node of its own; none if empty.

    Returns:
        The data set, with the `kinds` of its columns and its target.

    Raises:
        InputError: If the table does not fit the schema, has fewer than two rows, or a modelled column has no value in
            it.

    Example:
        >>> import polars as pl
        >>> from aevb.data import find_schema
        >>> frame = pl.DataFrame({"smokes": ["yes", "no", None], "height": [1.8, 1.65, 1.7]})
        >>> load_table(frame, find_schema(frame)).kinds
        ('binary', 'continuous')
    """
    frame = read_frame(source)
    if frame.table.height < 2:
        raise InputError(f"{frame.where} has one row; a model of one row would only repeat it. Give at least two rows.")
    if not schema.names:
        kinds = ", ".join(f"`{column.name}` {column.kind}" for column in schema.columns[:10])
        raise InputError(f"{frame.where} has no column to model ({kinds}). Give other columns, or other kinds.")
    train = table_rows(frame, schema)
    apart = Target.of(target, schema, frame.where) if target else None
    if apart is not None:
        apart.check(train, frame.where)
    if bool((empty := train.isnan().all(0)).any()):
        name = schema.names[int(empty.nonzero()[0])]
        raise InputError(
            f"{frame.where}, column `{name}` has no value at all, and nothing can be learned of it. Drop it: "
            f"--column {name}=drop."
        )
    for j, column in enumerate(schema.modelled):
        known = train[:, j][~train[:, j].isnan()]
        if column.kind in ("continuous", "positive", "date") and bool((known == known[0]).all()):
            raise InputError(
                f"{frame.where}, column `{column.name}` has one value, and the scale of a {column.kind} column would "
                f"go to zero. Drop it: --column {column.name}=drop."
            )
    name = Path(source).name if isinstance(source, str | Path) else "table"
    return Data(name=name, train=train, columns=schema.names, kinds=schema.kinds, target=apart)


def table_rows(source: Any, schema: Schema, may_lack: str = "") -> Tensor:
    """Rows of a table in the columns of a model, `(N, P)`, NaN for missing; arguments as for `load_table`.

    The table may be without the column `may_lack`, which is then missing in all rows.

    Raises:
        InputError: If the table does not fit the schema.
    """
    frame = source if isinstance(source, Frame) else read_frame(source, may_lack)
    rows = rows_from(Part(where=frame.where, values=encode(schema, frame), columns=schema.names, named=True)).x
    assert isinstance(rows, Tensor)
    return rows


def _alike(train: Rows, test: Rows) -> tuple[Rows, Rows]:
    """Both parts with one width, image shape and type."""
    if isinstance(train.x, SparseRows) or isinstance(test.x, SparseRows):
        raise InputError(f"{train.where} has parts that are sparse, which have no test part. Save them in two files.")
    shapes = {rows.image_shape for rows in (train, test)} - {None}
    if train.x.shape[1] != test.x.shape[1] or len(shapes) > 1:
        raise InputError(
            f"{test.where} has rows of {test.x.shape[1]} entries (image {test.image_shape}), {train.where} rows of "
            f"{train.x.shape[1]} (image {train.image_shape}); they must agree. Save both parts with the same columns."
        )
    dtype = torch.promote_types(train.x.dtype, test.x.dtype)
    shape = next(iter(shapes), None)
    return (
        replace(train, x=train.x.to(dtype), image_shape=shape),
        replace(test, x=test.x.to(dtype), image_shape=shape),
    )


def _binarized(
    train: Rows, test: Rows | None, binarize: Binarize, seed: int, total_count: int | None
) -> tuple[Tensor, Tensor | None]:
    x = grey_of(train, total_count)
    if bool(((x == 0) | (x == 1) | x.isnan()).all()):
        raise InputError(f"{train.where} is already binary: all its entries are 0 or 1. Leave `binarize` at 'none'.")
    if binarize == "epoch" and (missing := int(x.isnan().sum())):
        raise InputError(
            f"{train.where} has {missing} missing entries, which binarize='epoch' cannot keep. "
            "Use binarize='static', which keeps them missing."
        )
    x_test = None if test is None else draw_once(grey_of(test, total_count), seed=seed, part="test")
    return x if binarize == "epoch" else draw_once(x, seed=seed, part="train"), x_test


def _mark_constant(data: Data, where: str, drop: bool) -> Data:
    flags = _constant(data.train, drawn_anew=data.binarize == "epoch")
    if bool(flags.all()):
        raise InputError(
            f"{where} has only constant columns; a model needs at least one that varies between the train rows. "
            "Give the rows before they were averaged or standardised, or other columns."
        )
    names = tuple(column_name(data.columns, j) for j in flags.nonzero().flatten().tolist())
    if not drop or not names:
        return replace(data, constant=names)
    kept = (~flags).nonzero().flatten()
    return replace(
        data,
        train=data.train.select(columns=kept) if isinstance(data.train, SparseRows) else data.train[:, kept],
        test=None if data.test is None else data.test[:, kept],  # no sparse source has a test part
        columns=None if data.columns is None else tuple(data.columns[j] for j in kept.tolist()),
        image_shape=None,
        dropped=names,
        kept=tuple(kept.tolist()),
    )


def _batched(data: Data, column: str, names: tuple[str | None, ...], where: str) -> Data:
    """With the batch of each row behind it: last, so that all that looks at columns has seen those of x alone."""
    if column in (data.columns or ()):
        raise InputError(
            f"{where} has `{column}` among the names of both .obs and .var, and rows that are drawn could not tell the "
            f"batch from the gene. Rename it: adata.obs = adata.obs.rename(columns={{{column!r}: ...}})."
        )
    batch = Batch.of(column, names, where)
    return replace(data, train=with_batch(data.train, batch, names, where), batch=batch)


def _constant(x: Tensor | SparseRows, *, drawn_anew: bool) -> Tensor:
    """`(P,)` booleans. A column without any value counts; of grey values drawn anew, only black and white ones do."""
    if isinstance(x, SparseRows):
        low, high = x.bounds()
        return low >= high
    if x.is_floating_point():
        low, high = x.nan_to_num(torch.inf).amin(0), x.nan_to_num(-torch.inf).amax(0)
    else:
        low, high = x.aminmax(dim=0)
    same = low >= high
    return same & ((low == 0) | (low == full_grey(x))) if drawn_anew else same
