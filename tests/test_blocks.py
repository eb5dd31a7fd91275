"""Data larger than memory: blocks read from files train as arrays do, a few in memory at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import aevb
from aevb.data import Blocks, find_schema, open_array, open_shards, table_rows
from aevb.training.batches import WINDOW, Order, split_blocks

ROWS = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
CONFIG = aevb.TrainConfig(steps=30, batch_size=16, log_every=10, validate_every=10, validation=0.2)


def _files(folder: Path) -> tuple[Path, list[Path]]:
    np.save(folder / "rows.npy", ROWS)
    paths = [folder / f"{name}.parquet" for name in "abc"]
    for path, part in zip(paths, np.split(ROWS, 3), strict=True):
        pl.DataFrame(part, schema=["u", "v", "w", "x"]).write_parquet(path)
    return folder / "rows.npy", paths


def _fitted(data: object, **more: object) -> tuple[torch.Tensor, aevb.Run]:
    torch.manual_seed(0)
    vae = aevb.build_vae(aevb.ModelConfig(features=4, latents=2, hidden=(8,)), torch.from_numpy(ROWS))
    run = aevb.fit(vae, data, CONFIG, **more)
    return torch.cat([p.detach().flatten() for p in vae.parameters()]), run


def test_files_and_memory_train_to_the_same_bits(tmp_path) -> None:
    array, shards = _files(tmp_path)
    memory = Blocks([10] * 9, lambda number: torch.from_numpy(ROWS[10 * number : 10 * number + 10]))
    found = [
        _fitted(data)[0]
        for data in (memory, open_array(array, block_rows=10), open_shards(shards, block_rows=10))
    ]  # fmt: skip
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_run_on_blocks_resumes_to_the_same_bits(tmp_path) -> None:
    array, _ = _files(tmp_path)
    whole, _ = _fitted(open_array(array, block_rows=7), out=tmp_path / "whole")

    def stop(record: dict[str, object]) -> None:
        if record["step"] == 20:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        _fitted(open_array(array, block_rows=7), out=tmp_path / "run", progress=stop)
    resumed, _ = _fitted(open_array(array, block_rows=7), out=tmp_path / "run", resume=True)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("lengths", [[5], [3, 1, 4], [2] * 40, [7, 1] * 20], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_every_row_comes_once_an_epoch_from_the_blocks_of_a_window_or_two(lengths, batch_size) -> None:
    ends = np.cumsum(lengths)
    blocks = [range(int(end) - length, int(end)) for end, length in zip(ends, lengths, strict=True)]
    order = Order(blocks, batch_size, seed=3)
    count = sum(lengths)
    assert order.count == count
    steps = 3 * count // order.batch_size  # whole epochs, but for a part of the last
    batches = [order.batch(step) for step in range(steps)]
    assert {len(batch) for batch in batches} == {min(batch_size, count)}
    stream = torch.cat(batches)
    epochs = [stream[e * count : (e + 1) * count] for e in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(count)) for epoch in epochs)
    assert count < 10 or not torch.equal(*epochs)
    window = max(1, WINDOW * min(lengths))  # rows that a window has at least
    if order.batch_size <= window:
        for batch in batches:
            assert len(np.unique(np.searchsorted(ends, batch.numpy(), side="right"))) <= 2 * WINDOW
    again = Order(blocks, batch_size, seed=3)
    for step in (steps - 1, 0, steps // 2):  # a step's rows do not depend on the steps taken before it
        assert torch.equal(again.batch(step), batches[step])


def test_whole_blocks_are_held_out() -> None:
    lengths = [10, 20, 30, 40]
    seen = set()
    for seed in range(20):
        training, held_out = split_blocks(lengths, aevb.TrainConfig(validation=0.25, seed=seed))
        rows = [row for block in training for row in block]
        assert sorted([*rows, *held_out.tolist()]) == list(range(100))
        assert 25 <= len(held_out) < 25 + 40  # the share, and at most the last block beyond it
        seen.add(tuple(held_out.tolist()))
    assert len(seen) > 3
    assert len(split_blocks(lengths, aevb.TrainConfig(validation=0.0))[1]) == 0


def test_takes_are_rows_whatever_has_to_make_way() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (40,)).tolist()
    rows = torch.randn(sum(lengths), 3)
    parts, read = rows.split(lengths), []
    blocks = Blocks(lengths, lambda number: (read.append(number), parts[number])[1])
    for _ in range(200):
        near = torch.randint(len(rows), ()) + torch.randint(-15, 15, (6,))
        for indices in (near.clamp(0, len(rows) - 1), torch.randint(len(rows), (50,))):
            assert torch.equal(blocks.take(indices)["x"], rows[indices])
    assert blocks._memory.shape == (2 * WINDOW * max(lengths), 3)
    before = len(read)
    blocks.take(indices[:5])
    blocks.take(indices[:5])
    assert len(read) <= before + 5  # what is there is not read again


def test_bytes_stay_bytes_and_missing_entries_missing(tmp_path) -> None:
    np.save(tmp_path / "bytes.npy", np.arange(12, dtype=np.uint8).reshape(4, 3))
    pl.DataFrame({"u": [1, 2], "v": [3, 4]}, schema={"u": pl.UInt8, "v": pl.UInt8}).write_parquet(
        tmp_path / "b.parquet"
    )
    pl.DataFrame({"u": [1.0, None], "v": [3, 4]}).write_parquet(tmp_path / "f.parquet")
    every = torch.arange(2)
    assert open_array(tmp_path / "bytes.npy").take(every)["x"].dtype == torch.uint8
    assert open_shards([tmp_path / "b.parquet"]).take(every)["x"].tolist() == [[1, 3], [2, 4]]
    mixed = open_shards([tmp_path / "f.parquet"]).take(every)["x"]
    assert mixed.dtype == torch.float32
    assert torch.isnan(mixed).tolist() == [[False, False], [True, False]]


def test_shards_of_a_table_are_its_rows(tmp_path) -> None:
    table = pl.DataFrame({"smokes": ["yes", "no", None, "no"], "age": [30.5, 41.0, 22.5, None]})
    schema = find_schema(table)
    for i in range(2):
        table[2 * i : 2 * i + 2].write_parquet(tmp_path / f"{i}.parquet")
    blocks = open_shards(sorted(tmp_path.glob("*.parquet")), schema, block_rows=1)
    assert blocks.blocks == (1, 1, 1, 1)
    torch.testing.assert_close(blocks.take(torch.arange(4))["x"], table_rows(table, schema), equal_nan=True)


def test_a_read_only_memory_map_is_an_array_like_others(tmp_path) -> None:
    array, _ = _files(tmp_path)
    assert torch.equal(_fitted({"x": np.load(array, mmap_mode="r")})[0], _fitted({"x": ROWS})[0])


def test_what_cannot_be_read_is_told(tmp_path) -> None:
    array, shards = _files(tmp_path)
    with pytest.raises(aevb.InputError, match="does not exist"):
        open_array(tmp_path / "none.npy")
    with pytest.raises(aevb.InputError, match="cannot be read as a NumPy array"):
        open_array(shards[0])
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(aevb.InputError, match="cannot be read as a NumPy array"):
        open_array(tmp_path / "objects.npy")
    np.save(tmp_path / "none.npy", np.empty((0, 3)))
    with pytest.raises(aevb.InputError, match="at least one row"):
        open_array(tmp_path / "none.npy")
    with pytest.raises(aevb.InputError, match="`block_rows` must be at least 1; got 0"):
        open_array(array, block_rows=0)
    with pytest.raises(aevb.InputError, match="`paths` names no file"):
        open_shards([])
    with pytest.raises(aevb.InputError, match=r"`.*rows.npy` cannot be read as Parquet"):
        open_shards([array])
    pl.DataFrame({"u": [1.0], "v": ["a"], "w": [1.0], "x": [1.0]}).write_parquet(tmp_path / "d.parquet")
    with pytest.raises(aevb.InputError, match=r"differ in the columns .*`v String`"):
        open_shards([*shards, tmp_path / "d.parquet"])
    with pytest.raises(aevb.InputError, match=r"'a' in row 0 .* is not a number"):
        open_shards([tmp_path / "d.parquet"]).take(torch.tensor([0]))
    pl.DataFrame({"u": []}, schema={"u": pl.Float64}).write_parquet(tmp_path / "e.parquet")
    with pytest.raises(aevb.InputError, match="have no rows"):
        open_shards([tmp_path / "e.parquet"])
    for bad, told in ((np.inf, "is infinite"), (1.7e9 + 0.1, "float32 cannot hold")):
        np.save(tmp_path / "bad.npy", np.array([[0.0], [1.7e9], [bad]]))
        with pytest.raises(aevb.InputError, match=f"from row 2 on.*{told}"):
            open_array(tmp_path / "bad.npy", block_rows=1).take(torch.tensor([0, 1, 2]))
    with pytest.raises(aevb.InputError, match=r"1 block.*none is left to train on"):
        _fitted(open_array(array))
    with pytest.raises(aevb.InputError, match="has no block, or one without rows"):
        _fitted(Blocks([3, 0], lambda number: torch.zeros(3, 4)))
    with pytest.raises(aevb.InputError, match=r"Block 1 has shape \(2, 4\)"):
        Blocks([3, 3], lambda number: torch.zeros(3 - number, 4)).take(torch.tensor([0, 5]))
