"""Rows of a file scored, and what is odd in them.

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.progress import rows_done
from aevb.apps.runs import (
    column_names,
    in_parts,
    marginal_of,
    pixels,
    rows_of_file,
    schema_of,
    target_of,
    values_of,
)  # fmt: skip
from aevb.apps.tables.kinds import grid, print_table

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from aevb.apps.summary import Summary
    from aevb.checkpoint import Run
    from aevb.data import SparseRows
    from aevb.evaluate import Marginal, Surprisal

__all__ = ["score_file", "score_quietly"]


_COLUMNS = 3
"""Most columns that are named for an odd row."""


def score_file(
    run: Run, path: str, out: Path | None, *, by_column: bool, top: int, samples: int, seed: int, quiet: bool
) -> tuple[Summary, list[Callable[[], None]]]:
    """Score the rows of a file and write their figures; the summary, and what else is to be printed before it."""
    import torch

    from aevb.apps.summary import summarize

    rows, marginal, found = _scored(
        run, path, out, by_column=by_column, by_entry=by_column or top > 0, samples=samples, seed=seed, quiet=quiet
    )
    told: list[Callable[[], None]] = []
    if top and found is not None:
        told.append(partial(print_table, _oddities(run, rows, marginal, found, top)))
    target, values = target_of(run), values_of(run, rows)
    x = values["x"] if isinstance(rows, torch.Tensor) and target is None else rows
    if isinstance(x, torch.Tensor) and x.is_floating_point() and (blank := int(x.isnan().all(1).sum())):
        told.append(partial(print, f"rows that hold nothing, whose log p is 0: {blank}"))
    about: dict[str, Any] = {"seed": seed, "split": Path(path).name, "data": pixels(run)}
    about["target"] = "" if target is None else target.name
    summary = summarize(run.vae, values, marginal, **about)
    return summary, told


def score_quietly(run: Run, path: str, out: Path, *, by_column: bool, samples: int, seed: int) -> str:
    """Score the rows of one file of many and write their figures; tells of it in one line."""
    from aevb.apps.summary import given_to, quantity

    rows, marginal, _ = _scored(
        run, path, out, by_column=by_column, by_entry=by_column, samples=samples, seed=seed, quiet=True
    )
    of = quantity(given_to(run.vae), target_of(run) is not None)
    return f"{len(rows)} rows, mean log {of} {float(marginal.log_prob.mean()):.2f} nats, written to {out}"


def _scored(
    run: Run, path: str, out: Path | None, *, by_column: bool, by_entry: bool, samples: int, seed: int, quiet: bool
) -> tuple[Tensor | SparseRows, Marginal, Surprisal | None]:
    """Score the rows of a file, or their entries too, and write the figures; the rows with what was found."""
    import torch

    from aevb.data import check_destination, write_h5ad, write_rows
    from aevb.evaluate import Surprisal, surprisal

    if out is not None:
        check_destination(out, source=path)
    rows, found = rows_of_file(run, path), None
    with rows_done("scoring", len(rows), quiet=quiet) as progress:
        marginal = marginal_of(run, rows, samples, seed=seed, progress=progress)
    if by_entry:
        with rows_done("scoring columns", len(rows), quiet=quiet) as progress:
            settings: dict[str, Any] = {"seed": seed, "progress": progress}
            found = in_parts(
                rows, lambda part: surprisal(run.vae, values_of(run, part), samples, **settings), Surprisal
            )
        if found is not None and isinstance(rows, torch.Tensor):
            found = _with_target(run, rows, marginal, found, seed)
    if out is not None:
        figures = [(name, getattr(marginal, name)) for name in ("log_prob", "std_error", "ess", "pareto_k")]
        if by_column and found is not None:
            for j, name in enumerate(column_names(run)):
                figures += [(f"{name}_nll", found.nll[:, j]), (f"{name}_nll_std_error", found.std_error[:, j])]
        if out.suffix.lower() == ".h5ad":
            write_h5ad(Path(path), out, obs={f"aevb_{name}": each.numpy() for name, each in figures})
        else:
            write_rows(out, torch.stack([each for _, each in figures], 1), [name for name, _ in figures])
    return rows, marginal, found


def _with_target(run: Run, rows: Tensor, marginal: Marginal, found: Surprisal, seed: int) -> Surprisal:
    """With -log p(y | x) = log p(x) - log p(x, y) in the place of the target's column, if there is a target."""
    import torch

    from aevb.evaluate import Surprisal

    if (target := target_of(run)) is None:
        return found
    known, bare = ~rows[:, target.at].isnan(), rows.clone()
    bare[:, target.at] = math.nan
    own = {name: torch.full_like(marginal.log_prob, math.nan) for name in ("nll", "std_error", "ess")}
    if bool(known.any()):
        x = marginal_of(run, bare[known], marginal.samples, seed=seed)
        own["nll"][known] = x.log_prob - marginal.log_prob[known]
        own["std_error"][known] = torch.hypot(x.std_error, marginal.std_error[known])
        own["ess"][known] = torch.minimum(x.ess, marginal.ess[known])
    parts = {name: target.join({"x": getattr(found, name), "y": value.unsqueeze(1)}) for name, value in own.items()}
    return Surprisal(**parts, samples=found.samples)


def _oddities(run: Run, rows: Tensor | SparseRows, marginal: Marginal, found: Surprisal, top: int) -> Table:
    """The rows that the model finds least likely, and the columns that are odder there than they mostly are."""
    from aevb.data import decode

    schema, names, lines = schema_of(run), column_names(run), []
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
    return grid(("row, from 0", "log p", "odd given the others: nats above the column's median"), lines)
