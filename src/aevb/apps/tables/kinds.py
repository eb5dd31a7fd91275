"""What a table's columns hold: found, told, shown.

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aevb.config import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from aevb.data import Schema

__all__ = ["grid", "inspected", "kinds_of", "print_schema", "print_table", "set_aside"]


def inspected(path: str, wishes: Sequence[str], schema: Path | None) -> Schema:
    """The schema of a file: kinds as found, as a schema file tells, or, before both, as wished (`NAME=KIND`)."""
    from aevb.data import Schema as Columns
    from aevb.data import find_schema, read_frame
    from aevb.data.frames import SUFFIXES

    overrides = {}
    for wish in wishes:
        name, equals, kind = wish.rpartition("=")
        if not equals:
            raise InputError(f"`--column` takes NAME=KIND; got {wish!r}. Write e.g. --column age=count.")
        overrides[name] = kind
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(
            f"`{path}` is no table with named columns: it must end in {', '.join(SUFFIXES)}. Save it as one of them."
        )
    frame = read_frame(path)
    found = find_schema(frame, overrides) if schema is None or overrides else None
    if schema is None:
        assert found is not None
        return found
    told = Columns.load(schema)
    if absent := [column.name for column in told.columns if column.name not in frame.table.columns]:
        raise InputError(f"`{schema}` has the column `{absent[0]}`, which {frame.where} has not. Take it out.")
    wished = {column.name: column for column in found.columns if column.name in overrides} if found else {}
    return Columns(columns=tuple(wished.get(column.name, column) for column in told.columns))


def kinds_of(
    data: str, column: Sequence[str], schema: Path | None, likelihood: str, binarize: str, target: str = ""
) -> Schema | None:
    """What a table's columns hold, where they are not all taken for one kind."""
    wanted = bool(column) or schema is not None or likelihood == "mixed" or bool(target)
    if likelihood not in ("auto", "mixed") or binarize != "none":
        if wanted:
            raise InputError(
                "`--column`, `--schema` and `--target` are for columns that have a kind each, `--likelihood` and "
                "`--binarize` give one to all entries. Drop one of the two."
            )
        return None
    return inspected(data, column, schema) if wanted or _is_table(data) else None


def _is_table(path: str) -> bool:
    """Whether a file's columns have names of their own, and so may have kinds of their own."""
    from aevb.data import read_frame
    from aevb.data.frames import SUFFIXES

    return Path(path).suffix.lower() in SUFFIXES and read_frame(path).named


def print_schema(schema: Schema) -> None:
    """Kinds with their reasons."""
    columns = []
    for column in schema.columns:
        kind = column.kind
        if kind == "ordinal":
            kind = f"ordinal:{column.low}:{column.high}"
        columns.append((column.name, kind if column.model_kind else f"{kind} (set aside)", column.dtype, column.reason))
    print_table(grid(("column", "kind", "type", "reason"), columns))
    print(f"{len(schema.columns)} columns, {len(schema.names)} to model\n{set_aside(schema)}", end="")


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal; what a file holds is shown as it is, never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(*titles, box=box.SIMPLE_HEAD)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def set_aside(schema: Schema) -> str:
    """The columns that no model is made of, as a line of its own; empty where there are none."""
    named = [f"{column.name} ({column.kind})" for column in schema.columns if column.model_kind is None]
    return f"set aside: {', '.join(named)}\n" if named else ""


def print_table(table: Table) -> None:
    """Print it as it is."""
    from rich.console import Console

    Console(highlight=False).print(table)
