"""Rows that carry their batch: what a file's column of .obs may hold, what stands behind the genes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from scipy import sparse

import aevb
from aevb import InputError
from aevb.apps.tables.drawing import _codes
from aevb.data import Batch, Data, SparseRows, load, read_rows
from test_batch import DONORS, cells, named
from test_cli import refuse
from test_counts import counts, saved


@pytest.mark.parametrize("dense", [False, True])
def test_rows_carry_their_batch_and_genes_stay_what_they_are(tmp_path: Path, dense: bool) -> None:
    x = counts()
    x[:, 2] = 0
    path = cells(tmp_path, x.astype(np.float32), dense=dense)
    data, bare = load(path, batch="donor", drop_constant=True), load(path, drop_constant=True)
    assert data.batch == Batch(column="donor", values=("A", "B", "C"), counts=tuple(map(DONORS.count, "ABC")))
    for name in ("features", "columns", "constant", "dropped", "kept"):
        assert getattr(data, name) == getattr(bare, name)
    one_hot = torch.eye(3)[[("A", "B", "C").index(donor) for donor in DONORS]]
    training, at = data.training(), torch.tensor([5, 0])
    assert isinstance(training, SparseRows) is not dense
    taken = training.take(at) if isinstance(training, SparseRows) else {k: v[at] for k, v in training.items()}
    torch.testing.assert_close(taken, {"x": bare.train[at], "batch": one_hot[at]})
    told = data.describe()
    assert told["batch"] == {"column": "donor", "values": ["A", "B", "C"], "counts": list(data.batch.counts)}
    assert told["sha256"] != bare.describe()["sha256"]
    swapped = load(cells(tmp_path, x.astype(np.float32), DONORS[::-1], "b.h5ad", dense=dense), batch="donor")
    assert swapped.describe()["sha256"] != load(path, batch="donor").describe()["sha256"]
    again = read_rows(path, columns=data.columns, kept=data.kept, dropped=data.dropped, batch=data.batch)
    np.testing.assert_array_equal(again[:].numpy(), data.train[:].numpy())
    config = aevb.ModelConfig(features=7, likelihood="negative-binomial", library="observed", batches=3, hidden=(4,))
    starts = []
    for rows in (data.train, bare.train):
        torch.manual_seed(0)
        starts.append(aevb.build_vae(config, rows).state_dict())
    sizes = [each.pop(f"q.node_library.net.{name}") for name in ("loc", "scale") for each in starts]
    assert [len(each) for each in sizes] == [3] * 4  # which are those of each batch where it is told
    torch.testing.assert_close(*starts)


WRITTEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "text": (np.array(DONORS), ("A", "B", "C")),
    "whole numbers": (np.array([10 if donor == "A" else 9 for donor in DONORS]), ("9", "10")),
    "whole floats": (np.array([10.0 if donor == "A" else 9.0 for donor in DONORS]), ("9", "10")),
    "booleans": (np.array([donor == "A" for donor in DONORS]), ("False", "True")),
    "nullable": ((np.arange(60) % 2, np.zeros(60, dtype=bool)), ("0", "1")),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_column_of_batches_may_be_of_several_types(tmp_path: Path, kind: str) -> None:
    column, values = WRITTEN[kind]
    data = load(cells(tmp_path, counts(), column), batch="donor")
    assert data.batch is not None
    assert data.batch.values == values
    assert sum(data.batch.counts) == 60


def test_categories_that_stand_elsewhere_are_found(tmp_path: Path) -> None:
    """As AnnData 0.7 wrote them: codes in the column, and in its attribute a reference to their names."""
    path = cells(tmp_path, counts(), None)
    with h5py.File(path, "r+") as file:
        names = file.create_dataset("obs/__categories/donor", data=["u", "v", "w"], dtype=h5py.string_dtype())
        file["obs/donor"] = np.arange(60) % 2 * 2
        file["obs/donor"].attrs["categories"] = names.ref
        named(file["obs"], "donor")
    batch = load(path, batch="donor").batch
    assert batch == Batch(column="donor", values=("u", "w"), counts=(30, 30))
    with h5py.File(path, "r+") as file:
        del file["obs"].attrs["column-order"]
    with pytest.raises(InputError, match=r"before AnnData 0.7, whose columns of .obs are not read"):
        load(path, batch="donor")


BAD: dict[str, tuple[Any, str, str]] = {
    "no such column": (DONORS, "plate", "has no column `plate` in .obs, .* it has `depth`, `donor`"),
    "a part of a column": (DONORS, "donor/codes", "has no column `donor/codes` in .obs, .* it has `depth`, `donor`"),
    "names of rows": (DONORS, "_index", "has no column `_index` in .obs"),
    "missing": ([*DONORS[:3], None, *DONORS[4:]], "donor", "row 3 .counting from 0. has no value of `donor`"),
    "missing in a mask": ((np.arange(60) % 2, np.arange(60) == 7), "donor", "row 7 .* has no value of `donor`"),
    **{
        f"text {text!r}": (np.array([*DONORS[:2], text, *DONORS[3:]]), "donor", "row 2 .* has no value of `donor`")
        for text in ("", "nan", "None", "<NA>")
    },
    "a gap in whole floats": (np.array([1.0, np.nan] * 30), "donor", "row 1 .* has no value of `donor`"),
    "one batch": (["A"] * 60, "donor", "one batch only, `donor` being 'A' in every row"),
    "names of cells": ([str(i) for i in range(60)], "donor", "60 values of `donor` in 60 rows, which look like names"),
    "fractions": (np.linspace(0, 1, 60), "donor", "holds float64, and a batch is a category, text"),
    "a gene": (DONORS, "gene1", "names of both .obs and .var"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_column_that_tells_no_batches_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    donors, column, told = BAD[name]
    path = cells(tmp_path, counts(), donors)
    if name == "a gene":
        with h5py.File(path, "r+") as file:
            file["obs"].move("donor", "gene1")
            named(file["obs"], "gene1")
    with pytest.raises(InputError, match=told):
        load(path, batch=column)


def test_categories_of_whole_floats_are_those_of_whole_numbers(tmp_path: Path) -> None:
    path = cells(tmp_path, counts(), [("1", "2")[i % 2] for i in range(60)])
    wanted = load(path, batch="donor").batch
    with h5py.File(path, "r+") as file:
        del file["obs/donor/categories"]
        file["obs/donor/categories"] = np.array([1.0, 2.0])
    assert load(path, batch="donor").batch == wanted


def test_values_that_begin_with_a_blank_or_a_sign_can_be_asked_for() -> None:
    batch = Batch.of("donor", [" A", "A", "=A", "B"] * 2)
    asked = {"donor= A": " A", "donor=A": "A", "donor==A": "=A", "donor = B": "B"}
    assert batch.values == (" A", "=A", "A", "B")
    for words, value in asked.items():
        assert _codes(batch, [words], 1).tolist() == [batch.values.index(value)]


def test_what_has_no_obs_has_no_batches(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1.5, 2.0, 3.5], "b": [0.5, 1.0, 2.5]}).write_csv(tmp_path / "a.csv")
    for path in (saved(tmp_path, counts()), tmp_path / "a.csv"):
        told = refuse("train", path, "--out", tmp_path / "run", "--batch", "donor")
        assert "stands in .obs of an AnnData file (.h5ad), in the column `donor`" in told
    path = cells(tmp_path, counts())
    assert "`prior` vamp has no place" in refuse("train", path, "--out", tmp_path / "run", "--batch", "donor",
                                                 "--prior", "vamp")  # fmt: skip
    with pytest.raises(InputError, match="`batch` is one-hot behind the entries, which `binarize` epoch draws"):
        Data(name="a", train=torch.eye(4), batch=Batch.of("donor", ["A", "B"] * 2), binarize="epoch")
    with pytest.raises(InputError, match=r"with the one-hot columns of `batch` behind; got shape \(4, 2\)"):
        Data(name="a", train=torch.eye(4)[:, :2], batch=Batch.of("donor", ["A", "B"] * 2))
    with pytest.raises(InputError, match="`binarize` is for pixels"):
        load(path, batch="donor", binarize="static")
    rows = SparseRows(sparse.csr_array(counts()))
    batch = Batch.of("donor", DONORS)
    with pytest.raises(InputError, match="one batch a row, 60; got 2"):
        rows.beside(batch, ["A", "B"])
    seen = rows.beside(batch, DONORS)
    for wrong, told in (
        (lambda: seen.beside(batch, DONORS), r"`donor`, and a model takes one column. Join the two into one"),
        (lambda: SparseRows(rows.matrix, "batch").beside(batch, DONORS), "another `node`"),
        (lambda: seen.select(columns=torch.tensor([1])), "Choose columns first"),
    ):
        with pytest.raises(InputError, match=told):
            wrong()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_positions_keep_their_size(kind: type) -> None:
    x = sparse.csr_array(counts())
    x.indices, x.indptr = x.indices.astype(kind), x.indptr.astype(kind)
    rows = SparseRows(x)
    assert rows.beside(Batch.of("donor", DONORS), DONORS).matrix.indices.dtype == rows.matrix.indptr.dtype == kind


def test_a_model_takes_rows_of_its_width_and_a_batch_that_is_known() -> None:
    seen, x = SparseRows(sparse.csr_array(counts())).beside(Batch.of("donor", DONORS), DONORS), torch.zeros(2, 8)
    config = aevb.ModelConfig(features=8, likelihood="poisson", batches=3, hidden=(4,), holes=True)
    with pytest.raises(InputError, match=r"must be \(N, 8\) .* or \(N, 11\) with the 3 one-hot columns"):
        aevb.build_vae(config, torch.zeros(2, 9))
    with pytest.raises(InputError, match=r"columns of 3 batches behind; `batches` says 0. .* features=8, batches=3"):
        aevb.build_vae(aevb.ModelConfig(features=11, likelihood="poisson"), seen)
    vae = aevb.build_vae(config, seen)
    for batch, told in (
        (torch.eye(3)[:2].log() * 0, "`batch` is missing .NaN. in row 0.* context must be known in every row"),
        (torch.eye(2), r"`batch` must be \(N, 3\), one-hot; got shape \(2, 2\)"),
        (torch.tensor([0, 1]), r"`batch` must be \(N, 3\), one-hot; got shape \(2,\)"),
    ):
        with pytest.raises(InputError, match=told):
            aevb.elbo(vae, {"x": x, "batch": batch})
