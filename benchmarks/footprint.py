"""Peak memory of training on data of growing size, bytes in memory: `aevb.fit` and Pythae's trainer.

    python benchmarks/footprint.py [--rows 10000 50000 200000 1000000] [--steps 20]

Each run has a process of its own. The figure is how far the peak of the resident set rises above what the process holds
once it has imported its libraries, taken a few steps on a hundred rows, and made the data, which are the caller's; MB
are 10^6 bytes. Linux only: the peak is `VmHWM`, reset through `/proc/self/clear_refs`.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path

from contestants import CONTESTANTS, Setting
from results import conditions, write

NAMES = ("aevb eager", "aevb compiled", "Pythae")


class _EnoughError(Exception):
    pass


def train(setting: Setting, steps: int) -> None:
    left = [steps]

    def turn(done: int) -> None:
        left[0] -= done
        if left[0] <= 0:
            raise _EnoughError

    try:
        CONTESTANTS[setting.contestant](setting, turn)
    except _EnoughError:
        pass


def peak() -> int:
    """The largest resident set since it was reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def swell(setting: Setting, steps: int, pipe) -> None:
    """MB by which training rises above the process and the data."""
    import torch

    sys.stdout = sys.stderr = open(os.devnull, "w")  # Pythae's progress
    torch.set_num_threads(setting.threads)
    train(dataclasses.replace(setting, rows=10 * setting.batch), steps)
    x = setting.data()
    object.__setattr__(setting, "data", lambda: x)  # so that the caller's are there before
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    train(setting, steps)
    pipe.send((peak() - before) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    told, rows = conditions(options.threads), []
    print(told, flush=True)
    context = multiprocessing.get_context("spawn")
    for name in NAMES:
        for count in options.rows:
            setting = Setting(contestant=name, rows=count, dtype="uint8", threads=options.threads)
            ours, theirs = context.Pipe()
            process = context.Process(target=swell, args=(setting, options.steps, theirs))
            process.start()
            theirs.close()
            try:
                rise = ours.recv()
            except EOFError:
                print(f"{name:14s}{count:9d} rows: left out, its process ended")
                continue
            process.join()
            megabytes = count * setting.features / 1e6
            print(f"{name:14s}{count:9d} rows, {megabytes:5.0f} MB of data: peak {rise:+6.0f} MB", flush=True)
            rows.append({"contestant": name, "rows": count, "data_mb": megabytes, "peak_mb": rise})
    write("footprint", rows, told)


if __name__ == "__main__":
    main()
