"""Progress bars on standard error; standard output is for figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["rows_done", "steps_done"]


@contextmanager
def steps_done(steps: int, start: int = 0, *, quiet: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar over training's steps that shows the bound, in nats a datum; takes the records of the history."""
    fields = "bound {task.fields[bound]} nats, held out {task.fields[validation]}"
    with _bar("training", steps, fields, quiet) as (bar, task):
        bar.update(task, completed=start)

        def tell(record: dict[str, Any]) -> None:
            told = {"validation": f"{record['validation']:.2f}"} if "validation" in record else {}
            bar.update(task, completed=record["step"], bound=f"{record['bound']:.2f}", **told)

        yield tell


@contextmanager
def rows_done(text: str, rows: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over rows; takes the number finished since the last call."""
    with _bar(text, rows, "", quiet) as (bar, task):
        yield lambda advance: bar.advance(task, advance)


@contextmanager
def _bar(text: str, total: int, fields: str, quiet: bool = False) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(fields),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        yield bar, bar.add_task(text, total=total, bound="...", validation="...")
