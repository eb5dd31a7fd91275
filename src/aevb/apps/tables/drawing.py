"""Rows that a model draws, under conditions if there are any.

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.runs import batch_of, column_names, data_of, schema_of, target_of
from aevb.config import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from aevb.checkpoint import Run
    from aevb.data import Batch, Column

__all__ = ["sample_file"]


def sample_file(
    run: Run, out: Path, rows: int, given: Sequence[str], *, samples: int, seed: int, moved: str | None
) -> list[str]:
    """Draw rows, under conditions if there are any, and write them; what was found, a line each."""
    import torch

    from aevb.data import encode, widened
    from aevb.data.dataset import nodes_of
    from aevb.evaluate import sample_given

    batch, codes = batch_of(run), None
    if given and run.vae.context and batch is None:
        raise InputError("`--given` is not for models whose rows come with a library size. Leave it out.")
    schema, target, bounds, lines = schema_of(run), target_of(run), None, []
    if given and batch is None:
        told, bounds = _bounds(run, given)
        nodes = {node: pair for node, pair in nodes_of(bounds, target).items() if not bool(pair.isinf().all())}
        found = sample_given(run.vae, rows, nodes, samples, seed=seed)
        if found.ess < _LEAST_ESS:
            raise InputError(
                f"`--given`: {found.samples} draws are worth {found.ess:.1f} under these conditions (the effective "
                f"sample size), and below {_LEAST_ESS} rows repeat a few. Give fewer or wider conditions, or more "
                "--samples."
            )
        x = found.values["x"] if target is None else target.join(found.values)
        assert run.vae.config is not None  # a run of the command line's
        kinds: list[str] = list(schema.kinds) if schema else [run.vae.config.likelihood] * x.shape[1]
        if target is not None and not target.classes:
            kinds[target.at] = "continuous"
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
            x, codes = _drawn(run, rows, given)
    frame = _written(out, run, x, codes)
    lines.append(f"{rows} rows written to {out}" + ("" if batch is None else f"; last column: {_legend(batch, out)}"))
    if not run.data.get("image_shape"):
        numbers = torch.from_numpy(encode(schema, frame)) if schema else torch.from_numpy(widened(x.numpy()))
        lines.append(_nearness(run, numbers, bounds, moved))
    return lines


def _drawn(run: Run, rows: int, given: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Rows from torch's current generator, and the batch of each, `(rows,)`, where the model is given one."""
    from aevb.apps.summary import sizes

    batch, target = batch_of(run), target_of(run)
    codes = None if batch is None else _codes(batch, given, rows)
    held = {}
    if batch is not None and codes is not None:
        held["batch"] = batch.one_hot(codes).to(next(run.vae.parameters()))
    drawn = run.vae.p.sample(rows, held | sizes(run.vae, rows, held.get("batch")))
    return drawn["x"] if target is None else target.join(drawn), codes


def _codes(batch: Batch, given: Sequence[str], rows: int) -> Tensor:
    """The batch of each row, `(rows,)`: the one that is given, else as frequent as among the rows trained on."""
    import torch

    from aevb.data.files import listed

    if not given:
        return batch.drawn(rows)
    exact = given[0].removeprefix(f"{batch.column}=")
    if len(given) == 1 and exact != given[0] and exact in batch.values:  # blanks or signs may begin a value
        return torch.full((rows,), batch.values.index(exact))
    name, value = given[0].strip()[: len(batch.column)], given[0].strip()[len(batch.column) :].strip()
    value = value.removeprefix("=").removeprefix("=").strip() if value.startswith("=") else ""
    if len(given) > 1 or name != batch.column or value not in batch.values:
        raise InputError(
            f"`--given` takes one condition on this model, {batch.column}=VALUE, with one of {listed(batch.values)}; "
            f"got {' '.join(map(repr, given))}. Write e.g. --given {batch.column}={batch.values[0]}."
        )
    return torch.full((rows,), batch.values.index(value))


def _legend(batch: Batch, out: Path) -> str:
    """The column that tells each row's batch: by name, or in files of numbers by code."""
    if out.suffix.lower() != ".npy":
        return batch.column
    return f"{batch.column}, as " + ", ".join(f"{code} for {value}" for code, value in enumerate(batch.values))


def _written(path: Path, run: Run, x: Tensor, codes: Tensor | None) -> Any:
    """Rows that a model made, with the types and names of a table's columns; the table, where there is one.

    Their batches stand in the last column.
    """
    import torch

    from aevb.data import decode, write_frame, write_images, write_rows
    from aevb.data.tables import polars

    pl = polars()
    if schema := schema_of(run):
        frame = decode(schema, x.numpy())
        write_frame(path, frame)
        return frame
    shape = run.data.get("image_shape")
    if shape and path.suffix.lower() in (".npy", ".png"):
        levels = run.vae.config is not None and run.vae.config.likelihood == "discretized-logistic"
        write_images(path, (x.to(torch.uint8) if levels else x).numpy(), shape, _tones(run, x))
        return None
    if (batch := batch_of(run)) is None or codes is None:
        write_rows(path, x.numpy(), column_names(run))
    elif path.suffix.lower() == ".npy":
        write_rows(path, torch.cat([x, codes.unsqueeze(1).to(x)], 1).numpy())
    else:
        names = pl.Series(batch.column, [batch.values[code] for code in codes.tolist()])
        write_frame(path, pl.from_numpy(x.numpy(), schema=column_names(run)).with_columns(names))
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

    schema, target = schema_of(run), target_of(run)
    names = list(schema.names) if schema else column_names(run)
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
        apart = target is not None and j == target.at  # Gaussian, whatever its kind
        if column is not None and (
            (target is not None and target.whole)
            if apart
            else column.model_kind in ("continuous", "positive") and (column.dtype == "Date" or "Int" in column.dtype)
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
    seen = data.train if data.target is not None else data.nodes(data.train)["x"]  # a target's column included
    others = data.test if data.test is not None else seen[kept]
    if bounds is not None:  # those that meet the conditions, too
        others = others[((others >= bounds[0]) & (others <= bounds[1]) | bounds.isinf().all(0)).all(1)]
    schema = schema_of(run)
    codes = [j for j, column in enumerate(schema.modelled) if column.values] if schema else []
    parts = []
    for x, name in ((rows, "rows made"), (others, "rows held out")):
        if len(x):
            some = x[torch.linspace(0, len(x) - 1, min(_COMPARED, len(x))).long()]
            gap = distance_to_closest(some, seen[trained], codes)
            low, middle = gap.nanquantile(gap.new_tensor([0.05, 0.5])).tolist()
            parts.append(f"{middle:.4f} (5 %: {low:.4f}; copies: {int((gap == 0).sum())}) of {len(some)} {name}")
    return "median distance to the closest row trained on: " + ", ".join(parts)


_COMPARED = 1000
"""Rows whose closest record is looked for."""
