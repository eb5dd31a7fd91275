"""Contestants take turns: each in a process of its own, one at work at a time, every round in another order.

`race` starts this file once a contestant, with the interpreter that has its libraries, on the same cores and with the
same number of threads. They speak in lines of JSON: the process says when it is warm, and after what set-up (its data,
checks, compilation and a first turn); at each line it gets it works for one turn and says how many steps it took.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from contestants import CONTESTANTS, Setting

__all__ = ["JAX", "Lane", "race", "ratio", "spread"]

JAX = ("NumPyro, fori_loop", "JAX, scan")


class Lane:
    """One contestant's process, and what it was timed at."""

    def __init__(self, setting: Setting, python: str, steps: int, clock: str) -> None:
        self.setting = setting
        self.rates: list[float] = []  # examples a second, one a round
        self.setup = 0.0  # seconds
        self._errors = tempfile.TemporaryFile("w+")
        threads = {"OMP_NUM_THREADS": str(setting.threads)}
        self._process = subprocess.Popen(
            [python, __file__, json.dumps(dataclasses.asdict(setting)), str(steps), clock], env=os.environ | threads,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.missing = ""  # why it does not take part
        if said := self._listen():
            self.setup = said["seconds"]

    def go(self) -> None:
        if self.missing:
            return
        print(file=self._process.stdin, flush=True)
        if said := self._listen():
            self.rates.append(said["steps"] * self.setting.batch / said["seconds"])

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _listen(self) -> dict[str, float] | None:
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._errors.seek(0)
        self.missing = (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]
        return None


def race(
    entries: Mapping[str, Setting], rounds: int, steps: int, jax: str = "", cpu_time: bool = False
) -> dict[str, Lane]:
    """Let the entries take turns of at least `steps` steps; `jax` is the interpreter that has JAX."""
    clock = "process_time" if cpu_time else "perf_counter"
    lanes = {}
    try:
        for name, setting in entries.items():
            python = jax if setting.contestant in JAX else sys.executable
            if python:
                lanes[name] = Lane(setting, python, steps, clock)
        names = list(lanes)
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                lanes[name].go()
    finally:
        for lane in lanes.values():
            lane.end()
    return lanes


def ratio(lane: Lane, other: Lane) -> tuple[float, float, float]:
    """Median, least and largest over rounds of the ratio of rates within a round."""
    return spread([a / b for a, b in zip(lane.rates, other.rates, strict=True)])


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


class _Turns:
    """What a contestant calls after some steps; it is held here between its turns."""

    def __init__(self, steps: int, clock: str) -> None:
        self.clock = getattr(time, clock)
        self.wanted, self.done, self.began = steps, 0, self.clock()
        # what the contestants print goes elsewhere
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, steps: int) -> None:
        self.done += steps
        if self.done < self.wanted:
            return
        said = {"steps": self.done, "seconds": self.clock() - self.began}
        print(json.dumps(said), file=self.out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # nothing of an endless training is worth saving
        self.done, self.began = 0, self.clock()


def main() -> None:
    setting = Setting(**json.loads(sys.argv[1]))
    turns = _Turns(int(sys.argv[2]), sys.argv[3])
    if hasattr(os, "sched_setaffinity"):  # the cores are all that XLA's threads can be told
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    if setting.contestant not in JAX:
        import torch

        torch.set_num_threads(setting.threads)
    CONTESTANTS[setting.contestant](setting, turns)


if __name__ == "__main__":
    main()
