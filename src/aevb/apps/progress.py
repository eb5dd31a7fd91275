"""How far a long command has come, on standard error; standard output is for figures.

A bar on a terminal; elsewhere, as in a job's log, lines, seldom.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["rows_done", "steps_done"]

_LINE_SECONDS = 10.0
"""Least time between two lines."""


@contextmanager
def steps_done(
    steps: int, batch_size: int, start: int = 0, *, quiet: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Training's steps with the bound and its terms, in nats a datum; takes the records of the history."""
    validation, latest = "", start
    with _told("training", "steps", steps, quiet, batch_size) as advance:

        def tell(record: dict[str, Any]) -> None:
            nonlocal validation, latest
            if "validation" in record:
                validation = f", held out {record['validation']:.2f}"
            terms = f"reconstruction {record['reconstruction']:.2f}, KL {record['kl']:.2f}"
            by, latest = record["step"] - latest, record["step"]
            advance(by, f"bound {record['bound']:.2f} nats ({terms}){validation}")

        advance(start, "", already=True)
        yield tell


@contextmanager
def rows_done(text: str, rows: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Rows; takes the number finished since the last call."""
    with _told(text, "rows", rows, quiet) as advance:
        yield advance


@contextmanager
def _told(text: str, unit: str, total: int, quiet: bool, rows_each: int = 1) -> Iterator[Callable[..., None]]:
    """A function that takes how many more are done, and what to say of them."""
    if quiet:
        yield lambda by, said="", already=False: None
    elif sys.stderr.isatty():
        with _bar(text, total, rows_each) as advance:
            yield advance
    else:
        yield _Lines(text, unit, total, rows_each)


class _Lines:
    def __init__(self, text: str, unit: str, total: int, rows_each: int) -> None:
        self.text, self.unit, self.total, self.rows_each = text, unit, total, rows_each
        self.done = self.before = 0
        self.began = self.told = time.monotonic()

    def __call__(self, by: int, said: str = "", already: bool = False) -> None:
        self.done += by
        self.before += by if already else 0
        now = time.monotonic()
        if already or (now - self.told < _LINE_SECONDS and self.done < self.total):
            return
        self.told, spent, here = now, max(now - self.began, 1e-9), self.done - self.before
        left = _clock(spent * (self.total - self.done) / max(here, 1))
        rate = here * self.rows_each / spent
        said = f"; {said}" if said else ""
        line = f"{self.text}: {self.done} of {self.total} {self.unit}, {rate:,.0f} rows/s, {left} left{said}"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _bar(text: str, total: int, rows_each: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed * rows_each:,.0f} rows/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), Rate(), Left())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total, said="")

        def advance(by: int, said: str = "", already: bool = False) -> None:
            if already:
                bar.update(task, completed=by)
            else:
                bar.update(task, advance=by, said=said)

        yield advance
