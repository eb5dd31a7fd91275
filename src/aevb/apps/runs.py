"""A run and its data, as the verbs need them: opened, checked to belong together, judged on the rows to judge by.

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.apps.choices import COUNTS
from aevb.apps.progress import rows_done
from aevb.config import InputError, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from aevb.apps.summary import Finding, Summary
    from aevb.checkpoint import Run
    from aevb.data import Batch, Data, Schema, SparseRows, Target
    from aevb.evaluate import Marginal, Rounding

__all__ = [
    "EVALUATION",
    "batch_of",
    "column_names",
    "data_of",
    "diagnose_run",
    "evaluate_run",
    "in_parts",
    "judged",
    "load_data",
    "marginal_of",
    "open_run",
    "pixels",
    "predicted",
    "rows_for_start",
    "rows_of_file",
    "schema_of",
    "target_of",
    "test_rows",
    "values_of",
]

EVALUATION, _LOG_PROBS = "evaluation.json", "evaluation.npy"
_ROUNDING, _PREDICTION = "bfloat16", "prediction"
"""Findings that an evaluation makes by itself: of coarse matrix products, of a run with a target."""
_COMPARED = 1000
"""Rows, at most, on which coarse matrix products are compared with float32 ones."""


def evaluate_run(
    run: Run, data: Data, samples: int, seed: int, *, quiet: bool, compile: bool = False,
    precision: Precision = "float32",
) -> tuple[Summary, Tensor]:  # fmt: skip
    """The evaluation of a run, which keeps it, and log p(x) of each row; what was found of these weights stays.

    Of `precision` the matrix products are only where their rounding is lost in the errors on some rows, float32 else.
    """
    import numpy as np

    from aevb.apps.summary import given_to, of_rounding, quantity, summarize
    from aevb.checkpoint import write_atomically

    split, rows, _ = test_rows(run, data)
    settings: dict[str, Any] = {"samples": samples, "seed": seed, "compile": compile}
    fresh: dict[str, Finding] = {}
    marginal = None
    if precision != "float32":
        found, by_precision = _rounding(run, rows, precision, quiet, settings)
        coarse = found.allowed and found.row_change > 0
        fresh[_ROUNDING] = of_rounding(found, len(rows), kept=coarse)
        precision = precision if coarse else "float32"
        marginal = by_precision[precision]
    if marginal is None or len(marginal.log_prob) < len(rows):
        of = quantity(given_to(run.vae), data.target is not None)
        with rows_done(f"log {of}, {samples} samples a row", len(rows), quiet) as progress:
            marginal = marginal_of(run, rows, **settings, precision=precision, progress=progress)
    named = "" if data.target is None else data.target.name
    about: dict[str, Any] = {
        "seed": seed, "split": split, "data": pixels(run), "target": named, "precision": precision,
    }  # fmt: skip
    summary = summarize(run.vae, values_of(run, rows), marginal, **about)
    assert run.path is not None
    fresh |= _prediction(run, data, rows, split)
    kept = _kept_findings(run.path, summary.weights)
    kept.pop(_ROUNDING, None)  # of another evaluation
    summary = replace(summary, findings=fresh | kept | fresh)
    np.save(buffer := io.BytesIO(), marginal.log_prob.numpy(), allow_pickle=False)
    write_atomically(run.path / _LOG_PROBS, buffer.getvalue())
    summary.save(run.path / EVALUATION)
    return summary, marginal.log_prob


def _rounding(
    run: Run, rows: Tensor | SparseRows, precision: Precision, quiet: bool, settings: dict[str, Any]
) -> tuple[Rounding, dict[Precision, Marginal]]:
    """What coarse matrix products change of the estimates of some rows, and these estimates."""
    from torch import Tensor

    from aevb._shapes import evenly
    from aevb.evaluate import rounding

    few = evenly(len(rows), _COMPARED)
    some = rows[few] if isinstance(rows, Tensor) else rows.select(few)
    with rows_done(f"{precision} beside float32", 2 * len(few), quiet) as progress:
        both: tuple[Precision, Precision] = ("float32", precision)
        found = {each: marginal_of(run, some, **settings, precision=each, progress=progress) for each in both}
    return rounding(found["float32"], found[precision], len(rows)), found


def _prediction(run: Run, data: Data, rows: Tensor | SparseRows, split: str) -> dict[str, Finding]:
    """How well the target is told on rows where it is known, if there is a target and such a row."""
    from torch import Tensor

    from aevb.apps.summary import of_prediction
    from aevb.training import split_rows

    if data.target is None or not isinstance(rows, Tensor) or not isinstance(data.train, Tensor):
        return {}
    y, seen = rows[:, data.target.at], data.train[split_rows(len(data.train), run.config)[0], data.target.at]
    known = ~y.isnan()
    if not bool(known.any()) or bool(seen.isnan().all()):
        return {}
    d, chose = predicted(run, rows[known]), split == "validation"
    return {_PREDICTION: of_prediction(d, y[known], seen[~seen.isnan()], data.target, len(rows), chose=chose)}


def predicted(run: Run, rows: Tensor) -> Any:
    """q(y | x) of rows `(N, P)` of the table of a run with a target."""
    from aevb.bounds import evaluating, prepare

    with evaluating(run.vae):
        return run.vae.q.distribution("y", prepare(run.vae, {"x": values_of(run, rows)["x"]}))


def target_of(run: Run) -> Target | None:
    """The column that is y, where the run has one."""
    from aevb.data import Target

    return Target.told(run.data["command"])


def batch_of(run: Run) -> Batch | None:
    """The column that names each row's batch, where the run has one."""
    from aevb.data import Batch

    return Batch.told(run.data)


def values_of(run: Run, rows: Tensor | SparseRows) -> Any:
    """The nodes of a run's model in rows of its data."""
    from torch import Tensor

    from aevb.data.dataset import nodes_of

    return nodes_of(rows, target_of(run), batch_of(run)) if isinstance(rows, Tensor) else rows


def marginal_of(run: Run, rows: Tensor | SparseRows, samples: int, **settings: Any) -> Marginal:
    """`log_marginal` of rows; sparse ones are made dense a part at a time, which changes no figure."""
    from aevb.evaluate import Marginal, log_marginal

    found: Marginal = in_parts(
        rows, lambda part: log_marginal(run.vae, values_of(run, part), samples, **settings), Marginal
    )
    return found


def in_parts(
    rows: Tensor | SparseRows, look: Callable[[Tensor], Any], kind: Callable[..., Any] | None = None,
    together: int | None = None,
) -> Any:  # fmt: skip
    """What `look` finds of all rows: dense rows at once, or so many together, sparse ones part by part; joined.

    Results are tensors `(N, ...)`, such by key, or records of the given kind made of them and of what is the same for
    all rows.
    """
    import torch
    from torch import Tensor

    if isinstance(rows, Tensor):
        found = [look(part) for part in rows.split(together or len(rows))]
    else:
        found = [look(rows[part]) for part in rows.split()]
    if len(found) == 1:
        return found[0]

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], dict):
            return {name: joined([value[name] for value in values]) for name in values[0]}
        return values[0]

    if kind is None:
        return joined(found)
    return kind(**joined([vars(each) for each in found]))


def _kept_findings(folder: Path, weights: str) -> dict[str, Finding]:
    """What a run's evaluation holds of these weights; of others it would be stale."""
    from aevb.apps.summary import Summary

    try:
        before = Summary.load(folder / EVALUATION)
    except InputError:  # there is none, or none that can be read: it is made anew
        return {}
    return before.findings if before.weights == weights else {}


def diagnose_run(
    run: Run, data: Data, summary: Summary, log_prob: Tensor, names: Sequence[str], *, few: int, temperatures: int,
    quiet: bool,
) -> Summary:  # fmt: skip
    """The evaluation, which the run keeps, with what the named diagnoses find.

    Args:
        run: The run.
        data: What it was trained on.
        summary: Its evaluation.
        log_prob: That of each row.
        names: Of diagnoses, in `DIAGNOSES`.
        few: Rows that the dear ones take, at most.
        temperatures: Of annealing.
        quiet: No progress bars.
    """
    from aevb.apps.diagnoses import DIAGNOSES, Subject

    assert run.path is not None
    subject = Subject(
        vae=run.vae,
        rows=test_rows(run, data)[1],
        nodes=lambda rows: values_of(run, rows),
        log_prob=log_prob,
        samples=summary.samples,
        few=few,
        temperatures=temperatures,
        columns=data.columns,
        seed=summary.seed,
        quiet=quiet,
    )
    for name in names:
        found = summary.findings | {name: DIAGNOSES[name](subject)}
        order = (_ROUNDING, _PREDICTION, *DIAGNOSES)
        summary = replace(summary, findings={each: found[each] for each in order if each in found})
        summary.save(run.path / EVALUATION)
    return summary


def judged(
    run: Run, data: Data, samples: int, seed: int, *, quiet: bool, compile: bool = False,
    precision: Precision = "float32",
) -> tuple[Summary, Tensor]:  # fmt: skip
    """As `evaluate_run`; what the run holds already, if it is of these weights, samples and seed."""
    import numpy as np
    import torch

    from aevb.apps.summary import Summary, weights_of

    assert run.path is not None
    if (run.path / EVALUATION).exists() and (run.path / _LOG_PROBS).exists():
        summary = Summary.load(run.path / EVALUATION)
        rows = torch.from_numpy(np.load(run.path / _LOG_PROBS, allow_pickle=False))
        same = (summary.weights, summary.samples, summary.seed) == (weights_of(run.vae), samples, seed)
        # bfloat16 was kept to, or tried; where float32 is asked for, what is lost in the errors is as good.
        same &= precision == "float32" or _ROUNDING in summary.findings
        if same and float(rows.mean()) == summary.log_prob:
            return summary, rows
    return evaluate_run(run, data, samples, seed, quiet=quiet, compile=compile, precision=precision)


def pixels(run: Run) -> str:
    """How the grey values of images became black and white, if they did."""
    if run.data["binarize"] != "none":
        return f"binarised: {run.data['binarize']}"
    return "not binarised" if run.data.get("image_shape") else ""


def test_rows(run: Run, data: Data) -> tuple[str, Tensor | SparseRows, Tensor | None]:
    """The rows to judge by: the data's own test rows, else those held out for validation."""
    import torch

    from aevb.data.binary import Binarized
    from aevb.training import split_rows

    if data.test is not None:
        return "test", data.test, data.test_labels
    _, held_out = split_rows(len(data.train), run.config)
    if not len(held_out):
        raise InputError(
            f"{data.name} has no test rows and none were held out. Train with --validation 0.1, or score a file of "
            "new rows."
        )
    labels = None if data.train_labels is None else data.train_labels[held_out]
    training = data.training()
    if not isinstance(training, Binarized):
        kept = data.train[held_out] if isinstance(data.train, torch.Tensor) else data.train.select(held_out)
        return "validation", kept, labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)  # pixels that are drawn anew at each use are drawn once here
        return "validation", training.take(held_out)["x"], labels


def open_run(folder: Path) -> Run:
    """The run in a folder, if `aevb train` made it; or what was made of it for others, without history and data."""
    from aevb.checkpoint import load
    from aevb.pretrained import is_pretrained, read_pretrained

    run = read_pretrained(folder) if is_pretrained(folder) else load(folder)
    if "command" not in run.data:
        raise InputError(
            f"`{folder}` was not made by `aevb train`, so its data are not known here. Use the library on it."
        )
    return run


def load_data(source: dict[str, Any]) -> Data:
    """The data that a run's command names."""
    from aevb.data import Schema, load, load_table
    from aevb.data.sources import check_annotated

    name = source["source"]
    if source.get("schema"):
        check_annotated(name, source.get("layer", ""), source.get("batch", ""))
        return load_table(name, Schema.from_json(source["schema"]), source.get("target", ""))
    return load(
        name, binarize=source["binarize"], seed=source["seed"], drop_constant=source["drop_constant"],
        layer=source.get("layer", ""), batch=source.get("batch", ""),
    )  # fmt: skip


def data_of(run: Run, moved: str | None) -> Data:
    """The data a run was trained on, and nothing else."""
    if "sha256" not in run.data:
        raise InputError(
            f"`{run.path}` is a pretrained model, which does not hold its data's fingerprint. Give the run that it was "
            "made of, or use what takes a file: score, encode, impute, sample."
        )
    from aevb.data.files import shown

    data = load_data(run.data["command"] | ({"source": moved} if moved else {}))
    found = data.describe()
    if lost := [name for name in ("batch", "sha256") if found.get(name) != run.data.get(name)]:
        what = f"its column `{shown(data.batch.column)}` names other batches" if data.batch and "batch" in lost else ""
        raise InputError(
            f"{data.name} is not what the run was trained on: {what or 'its content is another'}. Restore the file, or "
            "name where it is now with --data."
        )
    return data


def rows_of_file(run: Run, path: str) -> Tensor | SparseRows:
    """Rows of a file in the columns of a run."""
    import torch

    from aevb.data import SparseRows, read_rows, table_rows

    if schema := schema_of(run):
        return table_rows(path, schema, run.data["command"].get("target", ""))
    told, command = run.data, run.data["command"]
    rows = read_rows(
        path, columns=told["columns"], kept=told["kept"], features=told["features"], dropped=told["dropped"],
        image_shape=told.get("image_shape"), binarize=command["binarize"], seed=command["seed"],
        layer=_layer(command, path), batch=batch_of(run),
    )  # fmt: skip
    if isinstance(rows, SparseRows) and run.vae.config and run.vae.config.likelihood in COUNTS:
        rows.check_counts(f"`{path}`")
    elif rows.dtype == torch.uint8:
        _check_bytes(run, path)
    return rows


def _check_bytes(run: Run, path: str) -> None:
    """Raise if images of bytes are given to a model of images in floats, whose white is another number."""
    told, config = run.data, run.vae.config
    levels = config is not None and config.likelihood == "discretized-logistic"
    if told.get("image_shape") and not levels and told["binarize"] == "none" and "float" in told["dtype"]:
        raise InputError(
            f"`{path}` has images of bytes, 0 to 255; the model was trained on floats. Scale them as those were: "
            "save x / 255 as .npy."
        )


def _layer(command: dict[str, Any], path: str) -> str:
    """That of the training file, in other files of its kind."""
    layer: str = command.get("layer", "")
    return layer if path.lower().endswith(".h5ad") else ""


def schema_of(run: Run) -> Schema | None:
    """What the columns of a run's table hold; None for a run on numbers of one kind."""
    from aevb.data import Schema

    told = run.data["command"].get("schema")
    return Schema.from_json(told) if told else None


def rows_for_start(data: Data) -> dict[str, Any]:
    """Train rows that `build_vae` starts from, batches behind; grey values have the mean of pixels drawn from them."""
    from aevb.data import SparseRows

    if isinstance(data.train, SparseRows):
        return {"x": data.train}
    if data.target is not None:
        return data.nodes(data.train)
    rows = data.train.float() if not data.train.is_floating_point() else data.train
    return {"x": rows / 255 if data.binarize == "epoch" and not data.train.is_floating_point() else rows}


def column_names(run: Run) -> list[str]:
    """Those of the data, or made up."""
    return list(run.data.get("columns") or [f"x{j + 1}" for j in range(run.data["features"])])
