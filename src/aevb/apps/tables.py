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
from aevb.apps.runs import data_of, in_parts, marginal_of, pixels, rows_of_file, schema_of
from aevb.config import InputError

if TYPE_CHECKING:
    import torch.distributions as td
    from rich.table import Table
    from torch import Tensor

    from aevb.apps.summary import Summary
    from aevb.checkpoint import Run
    from aevb.data import Column, Schema, SparseRows
    from aevb.evaluate import Marginal, Surprisal

__all__ = [
    "encode_file",
    "impute_file",
    "inspected",
    "kinds_of",
    "print_schema",
    "sample_file",
    "score_file",
    "score_rows",
    "set_aside",
]

_SET = "imputation"
_DRAWS = 1000
"""Draws behind the moments of a posterior that has none in closed form."""
_TOGETHER = 256
"""Rows that are encoded together: of each there may be so many draws."""
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


def sample_file(
    run: Run, out: Path, rows: int, given: Sequence[str], *, samples: int, seed: int, moved: str | None
) -> list[str]:
    """Draw rows, under conditions if there are any, and write them; what was found, a line each."""
    import torch

    from aevb.apps.summary import sizes
    from aevb.data import encode, widened
    from aevb.evaluate import sample_given

    if given and run.vae.context:
        raise InputError("`--given` is not for models whose rows come with a library size. Leave it out.")
    schema, bounds, lines = schema_of(run), None, []
    if given:
        told, bounds = _bounds(run, given)
        found = sample_given(run.vae, rows, {"x": bounds}, samples, seed=seed)
        if found.ess < _LEAST_ESS:
            raise InputError(
                f"`--given`: {found.samples} draws are worth {found.ess:.1f} under these conditions (the effective "
                f"sample size), and below {_LEAST_ESS} rows repeat a few. Give fewer or wider conditions, or more "
                "--samples."
            )
        x = found.values["x"]
        assert run.vae.config is not None  # a run of the command line's
        kinds = schema.kinds if schema else [run.vae.config.likelihood] * x.shape[1]
        fixed = [kind for kind, point in zip(kinds, bounds[0] == bounds[1], strict=True) if point]
        kind = "log-density" if {"continuous", "positive", "normal", "student-t"} & set(fixed) else "log p"
        lines.append(
            f"{kind} of the conditions {found.log_prob:.2f} ± {found.std_error:.2f} nats; {found.samples} draws are "
            f"worth {found.ess:.0f} under them, Pareto k {found.pareto_k:.2f}"
        )
        if found.ess < rows:
            lines.append(f"fewer than the {rows} rows, some of which share their latents: give more --samples")
        # A column of whole numbers is rounded when it is written; so are its conditions.
        whole = (bounds != told).any(0)
        x = torch.where(whole, x.double().round().clamp(*told).to(x), x)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            x = run.vae.p.sample(rows, sizes(run.vae, rows))["x"]
    frame = _written(out, run, x)
    lines.append(f"{rows} rows written to {out}")
    if not run.data.get("image_shape"):
        numbers = torch.from_numpy(encode(schema, frame)) if schema else torch.from_numpy(widened(x.numpy()))
        lines.append(_nearness(run, numbers, bounds, moved))
    return lines


def _written(path: Path, run: Run, x: Tensor) -> Any:
    """Rows that a model made, with the types and names of a table's columns; the table, where there is one."""
    import torch

    from aevb.data import decode, write_frame, write_images, write_rows

    if schema := schema_of(run):
        frame = decode(schema, x.numpy())
        write_frame(path, frame)
        return frame
    shape = run.data.get("image_shape")
    if shape and path.suffix.lower() in (".npy", ".png"):
        levels = run.vae.config is not None and run.vae.config.likelihood == "discretized-logistic"
        write_images(path, (x.to(torch.uint8) if levels else x).numpy(), shape, _tones(run, x))
        return None
    write_rows(path, x.numpy(), _names(run, x))
    return None


def _tones(run: Run, x: Tensor) -> tuple[float, float]:
    """The values that are black and white: the ends of the likelihood's support, else of what was drawn."""
    config = run.vae.config
    assert config is not None  # a run of the command line's
    ends = {"discretized-logistic": 255.0, "bernoulli": 1.0, "autoregressive": 1.0}
    if (high := ends.get(config.likelihood, config.total_count)) is not None:
        return 0.0, float(high)
    return float(x.min()), float(x.max())


_OPERATORS = (">=", "<=", "==", "=", ">", "<")
_LEAST_ESS = 100


def _bounds(run: Run, given: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each column, `(2, P)`: as told, and as the model has them before it rounds."""
    import torch

    schema = schema_of(run)
    names = list(schema.names) if schema else _names(run, run.vae.p.sample(1)["x"])
    told = torch.tensor([[-math.inf], [math.inf]], dtype=torch.float64).repeat(1, len(names))
    margin = torch.zeros(len(names), dtype=torch.float64)
    for text in given:
        parts = [
            (name, operator, text.strip()[len(name) :].strip()[len(operator) :].strip())
            for name in sorted(names, key=len, reverse=True)
            for operator in _OPERATORS
            if text.strip().startswith(name) and text.strip()[len(name) :].strip().startswith(operator)
        ]
        if not parts or not parts[0][2]:
            raise InputError(
                f"`--given` takes a column of the model with =, >, >=, < or <= and a value; got {text!r}. The columns "
                f"are {', '.join(names[:20])}. Write e.g. --given {names[0]}=..., in quotation marks for > and <."
            )
        name, operator, value = parts[0]
        j, column = names.index(name), schema.modelled[names.index(name)] if schema else None
        number = _number(column, value, text)
        if column is not None and column.values and operator not in ("=", "=="):
            raise InputError(
                f"`--given {text}`: `{name}` holds categories, which have no order. Use = with one of them."
            )
        if (
            column is not None
            and column.model_kind in ("continuous", "positive")
            and (column.dtype == "Date" or "Int" in column.dtype)
        ):  # written in whole numbers
            margin[j] = 0.5
            number = {">": math.floor(number) + 1.0, "<": math.ceil(number) - 1.0}.get(operator, number)
        elif operator in (">", "<"):
            number = math.nextafter(number, math.inf if operator == ">" else -math.inf)
        if operator[0] != "<":
            told[0, j] = max(float(told[0, j]), number)
        if operator[0] != ">":
            told[1, j] = min(float(told[1, j]), number)
        if told[0, j] > told[1, j]:
            raise InputError(
                f"`--given`: no value of `{name}` meets all that is given of it. Drop {text!r}, or another."
            )
    return told, told + torch.stack([-margin, margin])


def _number(column: Column | None, value: str, text: str) -> float:
    """A condition's value as the number that stands for it in the model."""
    from aevb.data.frames import Frame, form_of, formed, numbers_of
    from aevb.data.tables import polars

    if column is not None and column.values:
        spelt = [str(each).lower() if isinstance(each, bool) else str(each) for each in column.values]
        if value not in spelt:
            raise InputError(
                f"`--given {text}`: `{column.name}` is one of {', '.join(spelt[:20])}; got {value!r}. Choose one."
            )
        return float(spelt.index(value))
    frame = Frame(where=f"`--given {text}`", table=polars().DataFrame({"value": [value]}), cells=True)
    series = formed(frame, "value")
    dated = {"Date": "date", "Datetime": "a time or date"}.get(column.dtype if column is not None else "", "number")
    if form_of(series) not in {"number": ("number",), "date": ("date",)}.get(dated, ("datetime", "date")):
        raise InputError(f"`--given {text}`: {value!r} is no {dated}. Give one, dates as 2020-12-31.")
    number = float(numbers_of(frame.where, series)[0])
    return number * 86_400 if dated == "a time or date" and form_of(series) == "date" else number


def _nearness(run: Run, rows: Tensor, bounds: Tensor | None, moved: str | None) -> str:
    """How near rows come to those trained on, beside rows that were held out."""
    import torch

    from aevb.evaluate import distance_to_closest
    from aevb.training import split_rows

    try:
        data = data_of(run, moved)
    except InputError as error:
        return f"not compared with the rows trained on: {error}"
    if not isinstance(data.train, torch.Tensor):
        return "not compared with the rows trained on, which are sparse"
    trained, kept = split_rows(len(data.train), run.config)
    others = data.test if data.test is not None else data.train[kept]
    if bounds is not None:  # those that meet the conditions, too
        others = others[((others >= bounds[0]) & (others <= bounds[1]) | bounds.isinf().all(0)).all(1)]
    schema = schema_of(run)
    codes = [j for j, column in enumerate(schema.modelled) if column.values] if schema else []
    parts = []
    for x, name in ((rows, "rows made"), (others, "rows held out")):
        if len(x):
            some = x[torch.linspace(0, len(x) - 1, min(_COMPARED, len(x))).long()]
            gap = distance_to_closest(some, data.train[trained], codes)
            low, middle = gap.nanquantile(gap.new_tensor([0.05, 0.5])).tolist()
            parts.append(f"{middle:.4f} (5 %: {low:.4f}; copies: {int((gap == 0).sum())}) of {len(some)} {name}")
    return "median distance to the closest row trained on: " + ", ".join(parts)


_COMPARED = 1000
"""Rows whose closest record is looked for."""


def encode_file(run: Run, path: str, out: Path) -> str:
    """Write mean and standard deviation of q(z | x) for the rows of a file; tells what was done in one line."""
    import torch

    from aevb.bounds import evaluating, prepare
    from aevb.data import write_h5ad, write_rows

    def look(rows: Tensor) -> dict[str, dict[str, Tensor]]:
        posterior = run.vae.posterior(prepare(run.vae, {"x": rows}))
        return {node: _moments(d) for node, d in posterior.items()}

    with evaluating(run.vae):
        values = rows_of_file(run, path)
        if isinstance(values, torch.Tensor):  # as a whole: what is wrong is told by its place in the file
            values = prepare(run.vae, {"x": values})["x"]
        codes = in_parts(values, look, together=_TOGETHER)
    parts = {(node, name): value for node, found in codes.items() for name, value in found.items()}
    rows = len(next(iter(parts.values())))
    if out.suffix.lower() == ".h5ad":
        obsm = {
            "X_aevb" + ("" if node == "z" else f"_{node}") + ("_std" if name == "std" else ""): value.numpy()
            for (node, name), value in parts.items()
        }
        write_h5ad(Path(path), out, obsm=obsm)
        return f"{rows} rows, {', '.join(obsm)} written to {out}"
    columns = [f"{node}{j + 1}_{name}" for (node, name), value in parts.items() for j in range(value.shape[1])]
    write_rows(out, torch.cat(list(parts.values()), 1).numpy(), columns)
    return f"{rows} rows, {len(columns)} columns written to {out}"


def _moments(d: td.Distribution) -> dict[str, Tensor]:
    """Mean and standard deviation; of a flow, which has none in closed form, those of draws."""
    import torch

    from aevb.distributions import Given, draw

    try:
        return {"mean": d.mean, "std": d.stddev}
    except NotImplementedError:
        # Common to all rows, so that a row's figures depend on no other.
        noise = torch.randn(_DRAWS, 1, *d.event_shape, generator=torch.Generator().manual_seed(0))
        draws = draw(d, torch.Size([_DRAWS, *d.batch_shape]), Given([noise]))
        return {"mean": draws.mean(0), "std": draws.std(0)}


def impute_file(run: Run, path: str, out: Path, *, draws: int, samples: int, seed: int, whole: bool = False) -> str:
    """Fill in the holes of a file, which has some unless it may be `whole`; tells what was done in one line."""
    import torch

    from aevb.evaluate import impute

    rows = rows_of_file(run, path)
    holes = int(rows.isnan().sum()) if isinstance(rows, torch.Tensor) and rows.is_floating_point() else 0
    if not isinstance(rows, torch.Tensor) or not (holes or whole):
        raise InputError(f"`{path}` has no missing entry in the model's columns. There is nothing to fill in.")
    if not holes:
        _write_imputed(run, path, out, [rows] * max(1, draws), bool(draws))
        return f"no missing entry in {len(rows)} rows"
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

    from aevb.data import decode, encode, read_frame, widened, write_frame, write_images, write_rows
    from aevb.data.frames import formed
    from aevb.data.tables import polars

    schema = schema_of(run)
    if schema is None:
        columns = list(run.data.get("columns") or [f"x{j + 1}" for j in range(sets[0].shape[1])])
        if several:
            numbers = torch.arange(1, len(sets) + 1).repeat_interleave(len(sets[0])).unsqueeze(1)
            write_rows(out, torch.cat([numbers.to(sets[0]), torch.cat(sets)], 1), [_SET, *columns])
        elif (shape := run.data.get("image_shape")) and out.suffix.lower() == ".npy":
            write_images(out, sets[0].numpy(), shape)
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

    rows, marginal, found = score_rows(
        run, path, out, by_column=by_column, by_entry=by_column or top > 0, samples=samples, seed=seed, quiet=quiet
    )
    told: list[Callable[[], None]] = []
    if top and found is not None:
        told.append(partial(_print, _oddities(run, rows, marginal, found, top)))
    if isinstance(rows, torch.Tensor) and rows.is_floating_point() and (blank := int(rows.isnan().all(1).sum())):
        told.append(partial(print, f"rows that hold nothing, whose log p is 0: {blank}"))
    values: Any = {"x": rows} if isinstance(rows, torch.Tensor) else rows
    summary = summarize(run.vae, values, marginal, seed=seed, split=Path(path).name, data=pixels(run))
    return summary, told


def score_rows(
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
        marginal = marginal_of(run.vae, rows, samples, seed=seed, progress=progress)
    if by_entry:
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
    return rows, marginal, found


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
