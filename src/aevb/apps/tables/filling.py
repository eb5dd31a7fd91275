"""Rows of a file as codes, and their holes filled in.

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.runs import in_parts, rows_of_file, schema_of, target_of, values_of
from aevb.apps.tables.predicting import filled, moments_of_codes, told
from aevb.config import InputError

if TYPE_CHECKING:
    import torch.distributions as td
    from torch import Tensor

    from aevb.bayesnet import VAE
    from aevb.checkpoint import Run

__all__ = ["encode_file", "impute_file"]


_SET = "imputation"
_EXPECTED, _FILLED = "aevb_expected", "aevb_filled"
"""Layers of an AnnData file."""
_DRAWS, _AVERAGED = 1000, 25
"""Draws of z behind the moments of a posterior that has none in closed form, and behind what is expected of a row."""
_TOGETHER = 256
"""Rows that are encoded together: of each there may be so many draws."""


def encode_file(run: Run, path: str, out: Path, *, expected: bool = False) -> str:
    """Write mean and standard deviation of q(z | x) for the rows of a file; tells what was done in one line.

    With `expected` an AnnData file gets a layer, too: of each entry the mean of p(x | z), averaged over draws of z.
    """
    import torch

    from aevb.bounds import evaluating, prepare
    from aevb.data import check_h5ad, write_h5ad, write_rows

    target, means = target_of(run), list[Any]()
    where = {name: run.data[name] for name in ("columns", "kept")}
    if expected and run.vae.config is not None and run.vae.config.likelihood == "autoregressive":
        raise InputError("`--expected` takes the mean of p(x | z), which an autoregressive one lacks. Drop it.")
    if out.suffix.lower() == ".h5ad":
        layers = [_EXPECTED] if expected else []
        check_h5ad(Path(path), obsm=["X_aevb"], layers=layers, **where, features=run.data["features"])

    def look(rows: Tensor) -> dict[str, dict[str, Tensor]]:
        inside = prepare(run.vae, values_of(run, rows))
        if target is not None:
            return {"z": moments_of_codes(run, inside, _moments)}
        found = run.vae.posterior(inside)
        if expected:
            means.append(_expectation(run.vae, inside, found).numpy())
        return {node: _moments(d) for node, d in found.items()}

    with evaluating(run.vae):
        values = rows_of_file(run, path)
        if isinstance(values, torch.Tensor):  # as a whole: what is wrong is told by its place in the file
            values = values.to(prepare(run.vae, values_of(run, values))["x"])
        codes = in_parts(values, look, together=_TOGETHER)
    parts = {(node, name): value for node, found in codes.items() for name, value in found.items()}
    rows = len(next(iter(parts.values())))
    if out.suffix.lower() == ".h5ad":
        obsm = {
            "X_aevb" + ("" if node == "z" else f"_{node}") + ("_std" if name == "std" else ""): value.numpy()
            for (node, name), value in parts.items()
        }
        write_h5ad(Path(path), out, obsm=obsm, layers=dict.fromkeys(layers, means), **where)
        return f"{rows} rows, {', '.join([*obsm, *(f'layer {name}' for name in layers)])} written to {out}"
    columns = [f"{node}{j + 1}_{name}" for (node, name), value in parts.items() for j in range(value.shape[1])]
    write_rows(out, torch.cat(list(parts.values()), 1).numpy(), columns)
    return f"{rows} rows, {len(columns)} columns written to {out}"


def _expectation(vae: VAE, inside: Mapping[str, Tensor], found: Mapping[str, td.Distribution]) -> Tensor:
    """E[x] of new rows with the codes of these, `(N, P)`: the mean of p(x | z), averaged over draws of q(z | x)."""
    import torch

    from aevb.distributions import Given, draw

    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(inside["x"])
    for _ in range(_AVERAGED):
        known = dict(inside)
        for node, q in found.items():  # noise common to all rows, so that a row's figures depend on no other
            noise = torch.randn(1, *q.event_shape, generator=generator).to(total)
            known[node] = draw(q, q.batch_shape, Given([noise]))
        total += vae.p.distribution("x", known | vae.computed(known, tuple(found))).mean
    return total / _AVERAGED


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

    from aevb.data import check_h5ad
    from aevb.evaluate import impute

    if out.suffix.lower() == ".h5ad":
        names, where = _layers(bool(draws), max(1, draws)), {name: run.data[name] for name in ("columns", "kept")}
        check_h5ad(Path(path), layers=names, **where, features=run.data["features"])
    rows = rows_of_file(run, path)
    holes = int(rows.isnan().sum()) if isinstance(rows, torch.Tensor) and rows.is_floating_point() else 0
    if not isinstance(rows, torch.Tensor) or not (holes or whole):
        raise InputError(f"`{path}` has no missing entry in the model's columns. There is nothing to fill in.")
    target, sure = target_of(run), {}
    values = values_of(run, rows)
    rows = rows if target is not None else values["x"]
    if target is not None and not draws:  # in files of a folder also where it is known throughout: all have one form
        name, figures = told(run, rows, target)
        sure = {name: torch.where(rows[:, target.at].isnan(), figures.to(rows), math.nan)}
    if not holes:
        _write_imputed(run, path, out, [rows] * max(1, draws), bool(draws), sure)
        return f"no missing entry in {len(rows)} rows"
    if target is not None:
        sets, ess = filled(run, rows, target, draws, samples, seed)
    else:
        found = impute(run.vae, values, samples, draws=draws, seed=seed)
        each = list(found.draws["x"]) if draws else [found.mean["x"]]
        sets, ess = [torch.where(rows.isnan(), one.to(rows), rows) for one in each], found.ess
    _write_imputed(run, path, out, sets, bool(draws), sure)
    blank = int(rows.isnan().all(1).sum())
    notes = [f"{holes} missing entries of {len(rows)} rows filled in"]
    notes += [f"each {draws} times, a draw a time"] if draws else ["by their mean, categories by the most probable"]
    notes += [f"rows that hold nothing, filled in from the prior: {blank}"] if blank else []
    if target is not None and bool((gone := rows[:, target.at].isnan()).any()):
        beside = f", with {', '.join(f'`{name}`' for name in sure)}" if sure else ""
        notes += [f"`{target.name}` by q(y | x) in {int(gone.sum())} rows{beside}"]
    few = int((ess[rows.isnan().any(1)] < 20).sum())
    notes += [f"rows whose figures rest on fewer than 20 draws: {few}, give more --samples"] if few else []
    return "; ".join(notes)


def _layers(several: bool, sets: int) -> list[str]:
    return [f"{_FILLED}_{i + 1}" for i in range(sets)] if several else [_FILLED]


def _write_imputed(
    run: Run, path: str, out: Path, sets: list[Tensor], several: bool, sure: Mapping[str, Tensor] | None = None
) -> None:
    """One table, or several one below another, numbered by a first column; `sure` are further columns of one."""
    import numpy as np
    import torch

    from aevb.data import decode, encode, read_frame, widened, write_frame, write_h5ad, write_images, write_rows
    from aevb.data.frames import formed
    from aevb.data.tables import polars

    schema = schema_of(run)
    if out.suffix.lower() == ".h5ad":
        layers = {name: [each.numpy()] for name, each in zip(_layers(several, len(sets)), sets, strict=True)}
        layer = run.data["command"].get("layer", "")
        write_h5ad(Path(path), out, layers=layers, columns=run.data["columns"], kept=run.data["kept"], over=layer)
        return
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
    target = target_of(run)
    pl, frame = polars(), read_frame(path, "" if target is None else target.name)
    aside = [c.name for c in schema.columns if c.model_kind is None and c.name in frame.table.columns]
    beside = pl.DataFrame([formed(frame, name, as_text=True) for name in aside])
    given = encode(schema, frame)  # what is observed stays to its last digit
    tables = [decode(schema, np.where(np.isnan(given), widened(each.numpy()), given), beside) for each in sets]
    for name in ([_SET] if several else []) + list(sure or ()):
        if name in tables[0].columns:
            raise InputError(f"`{path}` has a column `{name}`, which is the name of one of the results. Rename it.")
    for name, figures in (sure or {}).items():
        assert target is not None
        column = pl.Series(name, widened(figures.numpy())).fill_nan(None)
        tables[0].insert_column(tables[0].get_column_index(target.name) + 1, column)
    if several:
        tables = [
            table.insert_column(0, pl.Series(_SET, [i + 1]).new_from_index(0, table.height))
            for i, table in enumerate(tables)
        ]
    write_frame(out, pl.concat(tables))
