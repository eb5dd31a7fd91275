"""Training from a memory-mapped array and from Parquet shards against the same rows in memory: rate and memory.

    python benchmarks/larger_than_memory.py [--rows 1000000] [--rounds 5] [--batch 100] [--threads 2]

Net 784-200-200-z50, compiled. Bytes of 0 and 1 are written to a folder that is removed again, 784 MB a million rows in
the array. Each round times `--steps` steps of each source, in another order each time and in a process of its own,
after as many that are not counted; memory is the process's own (RssAnon, files that it maps left out) at its largest.
Training reads eight blocks at a time, some 160,000 rows here: `--steps` times `--batch` should be a multiple of that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results import conditions, write

SOURCES = ("memory", "array", "shards")
SHARD_ROWS, GROUP_ROWS = 100_000, 20_000


def write_data(folder: Path, rows: int) -> None:
    import polars as pl

    array = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.uint8, shape=(rows, 784))
    rng = np.random.default_rng(0)
    names = [f"pixel{j}" for j in range(784)]
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        part = (rng.integers(0, 5, (min(SHARD_ROWS, rows - start), 784), dtype=np.uint8) == 0).astype(np.uint8)
        array[start : start + len(part)] = part
        pl.DataFrame(part, schema=names).write_parquet(folder / f"{number:04}.parquet", row_group_size=GROUP_ROWS)
    array.flush()


def own_memory() -> float:
    """MiB that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def train(source: str, folder: Path, batch: int, steps: int) -> None:
    """Train for twice the steps; prints the rate over the later ones, and the memory, as JSON."""
    import torch

    import aevb
    from aevb.data import open_array, open_shards

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data = {
        "memory": lambda: {"x": torch.from_numpy(np.load(folder / "x.npy"))},
        "array": lambda: open_array(folder / "x.npy"),
        "shards": lambda: open_shards(sorted(folder.glob("*.parquet"))),
    }[source]()
    torch.manual_seed(0)
    shape = {"features": 784, "latents": 50, "hidden": (200, 200), "activation": "tanh"}
    vae = aevb.build_vae(aevb.ModelConfig(likelihood="bernoulli", **shape))
    marks, memory = [], []

    def note(record: dict[str, object]) -> None:
        marks.append(time.perf_counter())
        memory.append(own_memory())

    config = aevb.TrainConfig(
        steps=2 * steps, batch_size=batch, compile=True, validation=0.0, patience=0, log_every=steps // 20
    )
    aevb.fit(vae, data, config, progress=note)
    print(json.dumps({"rate": steps * batch / (marks[-1] - marks[-21]), "memory": max(memory)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=2, metavar=("SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(options.worker[0], Path(options.worker[1]), options.batch, options.steps)
        return
    told = conditions(options.threads)
    rates: dict[str, list[float]] = {source: [] for source in SOURCES}
    memory = dict.fromkeys(SOURCES, 0.0)
    threads = {"OMP_NUM_THREADS": str(options.threads), "POLARS_MAX_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), options.rows)
        for turn in range(options.rounds):
            shift = turn % len(SOURCES)
            for source in SOURCES[shift:] + SOURCES[:shift]:
                flags = [f"--{name}={getattr(options, name)}" for name in ("batch", "steps")]
                command = [sys.executable, __file__, *flags, "--worker", source, folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
                found = json.loads(done.stdout.splitlines()[-1])
                rates[source].append(found["rate"])
                memory[source] = max(memory[source], found["memory"])
    rows = []
    for source in SOURCES:
        ratios = [a / b for a, b in zip(rates[source], rates["memory"], strict=True)]
        row = {"source": source, "rows": options.rows, "batch": options.batch, "own_memory_MiB": memory[source]}
        row |= {"examples_s": statistics.median(rates[source]), "ratio": statistics.median(ratios)}
        row |= {"low": min(ratios), "high": max(ratios)}
        rows.append(row)
        print(
            f"{source:8s}{row['examples_s']:8.0f} examples/s   {row['ratio']:.2f} of memory's "
            f"({row['low']:.2f} to {row['high']:.2f})   own memory {row['own_memory_MiB']:5.0f} MiB"
        )
    write("larger_than_memory", rows, told)


if __name__ == "__main__":
    main()
