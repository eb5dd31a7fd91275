"""Verbs on tables whose columns are of different kinds: what they hold, what is odd in them, what their holes hold.

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.progress import rows_done
from aevb.apps.runs import in_parts, marginal_of, pixels, rows_of_file, schema_of
from aevb.config import InputError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from aevb.apps.summary import Summary
    from aevb.checkpoint import Run
    from aevb.data import Schema, SparseRows
    from aevb.evaluate import Marginal, Surprisal

__all__ = ["impute_file", "inspected", "kinds_of", "print_schema", "score_file", "set_aside", "written"]

_SET = "imputation"
_COLUMNS = 3
"""Most columns that are named for an odd row."""


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


def kinds_of(data: str, column: Sequence[str], schema: Path | None, likelihood: str, binarize: str) -> Schema | None:
    """What a table's columns hold, where they are not all taken for one kind."""
    wanted = bool(column) or schema is not None or likelihood == "mixed"
    if likelihood not in ("auto", "mixed") or binarize != "none":
        if wanted:
            raise InputError(
                "`--column` and `--schema` give each column its kind, `--likelihood` and `--binarize` one to all "
                "entries. Drop one of the two."
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
    _print(_grid(("column", "kind", "type", "reason"), columns))
    print(f"{len(schema.columns)} columns, {len(schema.names)} to model\n{set_aside(schema)}", end="")


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
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


def written(path: Path, run: Run, x: Any) -> None:
    """Rows that a model made, with the types and names of a table's columns."""
    from aevb.data import decode, write_frame, write_rows

    if schema := schema_of(run):
        write_frame(path, decode(schema, x.numpy()))
    else:
        write_rows(path, x.numpy(), run.data.get("columns") or [f"x{j + 1}" for j in range(x.shape[1])])


def impute_file(run: Run, path: str, out: Path, *, draws: int, samples: int, seed: int) -> str:
    """Fill in the holes of a file; tells what was done in one line."""
    import torch

    from aevb.evaluate import impute

    rows = rows_of_file(run, path)
    holes = int(rows.isnan().sum()) if isinstance(rows, torch.Tensor) and rows.is_floating_point() else 0
    if not isinstance(rows, torch.Tensor) or not holes:
        raise InputError(f"`{path}` has no missing entry in the model's columns. There is nothing to fill in.")
    found = impute(run.vae, {"x": rows}, samples, draws=draws, seed=seed)
    sets = list(found.draws["x"]) if draws else [found.mean["x"]]
    _write_imputed(run, path, out, [torch.where(rows.isnan(), each.to(rows), rows) for each in sets], bool(draws))
    blank = int(rows.isnan().all(1).sum())
    notes = [f"{holes} missing entries of {len(rows)} rows filled in"]
    notes += [f"each {draws} times, a draw a time"] if draws else ["by their mean, categories by the most probable"]
    notes += [f"rows that hold nothing, filled in from the prior: {blank}"] if blank else []
    few = int((found.ess[rows.isnan().any(1)] < 20).sum())
    notes += [f"rows whose figures rest on fewer than 20 draws: {few}, give more --samples"] if few else []
    return "; ".join(notes)


def _write_imputed(run: Run, path: str, out: Path, sets: list[Tensor], several: bool) -> None:
    """One table, or several one below another, numbered by a first column."""
    import numpy as np
    import torch

    from aevb.data import decode, encode, read_frame, widened, write_frame, write_rows
    from aevb.data.frames import formed
    from aevb.data.tables import polars

    schema = schema_of(run)
    if schema is None:
        columns = list(run.data.get("columns") or [f"x{j + 1}" for j in range(sets[0].shape[1])])
        if several:
            numbers = torch.arange(1, len(sets) + 1).repeat_interleave(len(sets[0])).unsqueeze(1)
            write_rows(out, torch.cat([numbers.to(sets[0]), torch.cat(sets)], 1), [_SET, *columns])
        else:
            write_rows(out, sets[0], columns)
        return
    pl, frame = polars(), read_frame(path)
    aside = [c.name for c in schema.columns if c.model_kind is None and c.name in frame.table.columns]
    beside = pl.DataFrame([formed(frame, name, as_text=True) for name in aside])
    given = encode(schema, frame)  # what is observed stays to its last digit
    tables = [decode(schema, np.where(np.isnan(given), widened(each.numpy()), given), beside) for each in sets]
    if several:
        if _SET in tables[0].columns:
            raise InputError(
                f"`{path}` has a column `{_SET}`, the name of the column that numbers imputations. Rename it."
            )
        tables = [
            table.insert_column(0, pl.Series(_SET, [i + 1]).new_from_index(0, table.height))
            for i, table in enumerate(tables)
        ]
    write_frame(out, pl.concat(tables))


def score_file(
    run: Run, path: str, out: Path | None, *, by_column: bool, top: int, samples: int, seed: int, quiet: bool
) -> tuple[Summary, list[Callable[[], None]]]:
    """Score the rows of a file and write their figures; the summary, and what else is to be printed before it."""
    import torch

    from aevb.apps.summary import summarize
    from aevb.data import check_destination, write_h5ad, write_rows
    from aevb.evaluate import Surprisal, surprisal

    if out is not None:
        check_destination(out, source=path)
    rows, found = rows_of_file(run, path), None
    with rows_done("scoring", len(rows), quiet=quiet) as progress:
        marginal = marginal_of(run.vae, rows, samples, seed=seed, progress=progress)
    if by_column or top:
        with rows_done("scoring columns", len(rows), quiet=quiet) as progress:
            settings: dict[str, Any] = {"seed": seed, "progress": progress}
            found = in_parts(rows, lambda part: surprisal(run.vae, {"x": part}, samples, **settings), Surprisal)
    if out is not None:
        figures = [(name, getattr(marginal, name)) for name in ("log_prob", "std_error", "ess", "pareto_k")]
        if by_column and found is not None:
            for j, name in enumerate(_names(run, rows)):
                figures += [(f"{name}_nll", found.nll[:, j]), (f"{name}_nll_std_error", found.std_error[:, j])]
        if out.suffix.lower() == ".h5ad":
            write_h5ad(Path(path), out, obs={f"aevb_{name}": each.numpy() for name, each in figures})
        else:
            write_rows(out, torch.stack([each for _, each in figures], 1), [name for name, _ in figures])
    told: list[Callable[[], None]] = []
    if top and found is not None:
        told.append(partial(_print, _oddities(run, rows, marginal, found, top)))
    if isinstance(rows, torch.Tensor) and rows.is_floating_point() and (blank := int(rows.isnan().all(1).sum())):
        told.append(partial(print, f"rows that hold nothing, whose log p is 0: {blank}"))
    summary = summarize(
        run.vae,
        {"x": rows} if isinstance(rows, torch.Tensor) else rows,
        marginal,
        seed=seed,
        split=Path(path).name,
        data=pixels(run),
    )
    return summary, told


def _print(table: Table) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)


def _names(run: Run, rows: Tensor | SparseRows) -> list[str]:
    return list(run.data.get("columns") or [f"x{j + 1}" for j in range(rows.shape[1])])


def _oddities(run: Run, rows: Tensor | SparseRows, marginal: Marginal, found: Surprisal, top: int) -> Table:
    """The rows that the model finds least likely, and the columns that are odder there than they mostly are."""
    from aevb.data import decode

    schema, names, lines = schema_of(run), _names(run, rows), []
    # A density has the units of its column: what is odd is told by comparison with the column's other rows.
    excess = found.nll - found.nll.nanmedian(0).values
    for row in marginal.log_prob.argsort()[:top].tolist():
        named = []
        for j in excess[row].nan_to_num(-math.inf).argsort(descending=True)[:_COLUMNS].tolist():
            if excess[row, j] > 0:
                value: Any = f"{float(rows[row : row + 1][0, j]):g}"
                if schema:
                    value = decode(schema, rows[row : row + 1].numpy())[names[j]][0]
                named.append(f"{names[j]} = {value} (+{excess[row, j]:.1f} ± {found.std_error[row, j]:.1f})")
        figure = f"{marginal.log_prob[row]:.2f} ± {marginal.std_error[row]:.2f}"
        lines.append((str(row), figure, ", ".join(named)))
    return _grid(("row, from 0", "log p", "odd given the others: nats above the column's median"), lines)
