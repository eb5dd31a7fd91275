"""The command line `aevb`: one function a verb, its flags derived from the configurations; errors in one sentence.

What a verb needs is imported when the verb runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("aevb: the command line needs a few more packages. Install them: pip install 'aevb[apps]'")

from aevb.apps.flags import ModelFlags
from aevb.apps.loggers import Tracker
from aevb.apps.runs import (
    EVALUATION,
    data_of,
    diagnose_run,
    evaluate_run,
    judged,
    open_run,
    schema_of,
    test_rows,
    values_of,
)
from aevb.apps.train import Stopped, go_on, start
from aevb.config import InputError, Precision, TrainConfig

if TYPE_CHECKING:
    from aevb.apps.summary import Summary

__all__ = ["main"]

_REPORT = "report.html"
_Rows = Annotated[int, tyro.conf.arg(aliases=["-n"], metavar="ROWS")]
_Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="{ais,gaps,information,calibration,checks}")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
_Given = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CONDITION")]
_Columns = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=KIND")]


def main() -> None:
    """Run the command line; exits with 0, or non-zero after one clear message."""
    warnings.showwarning = lambda message, *_, **__: print(f"aevb: {message}", file=sys.stderr)
    verbs = (inspect, train, evaluate, compare, sample, encode, impute, score, report, export, check)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {verb.__name__: verb for verb in verbs},
            prog="aevb",
            description="Deep latent-variable models by auto-encoding variational Bayes, and what they are worth.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except InputError as error:
        sys.exit(f"aevb: {error}")
    except FloatingPointError as error:
        sys.exit(f"aevb: training stopped. {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"aevb: this needs the package {error.name}. Install it: pip install 'aevb[apps]'")
    except MemoryError:
        sys.exit("aevb: out of memory. Lower --batch-size or --samples.")
    except BrokenPipeError:  # the reader of a pipe has gone, as in `aevb --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Stopped as error:
        status, told = error.args
        if told:
            print(f"aevb: stopped. {told}", file=sys.stderr)
        sys.exit(status)
    except KeyboardInterrupt:
        print("aevb: stopped.", file=sys.stderr)
        sys.exit(130)


def inspect(
    file: Annotated[str, tyro.conf.Positional],
    column: _Columns = (),
    schema: _File = None,
    out: _File = None,
    json: bool = False,
) -> None:
    """Show what each column of a table holds, and why it is taken for that.

    Args:
        file: A .csv, .parquet or .arrow file with named columns.
        column: Kinds of one's own: binary, categorical, ordinal, ordinal:LOW:HIGH, count, continuous, positive, date,
            identifier, text or drop.
        schema: Kinds as a schema file tells them.
        out: Schema file to write, for `aevb train --schema`.
        json: Print the schema and nothing else.
    """
    from aevb.apps.tables import inspected, print_schema

    found = inspected(file, column, schema)
    if out is not None:
        found.save(out)
    if json:
        print(dumps(found.to_json()))
        return
    print_schema(found)
    if out is not None:
        print(f"schema written to {out}")


def train(
    data: Annotated[str, tyro.conf.Positional] = "",
    out: _Folder = None,
    resume: _Folder = None,
    target: str = "",
    objective: Literal["elbo", "iwae"] = "elbo",
    binarize: Literal["none", "static", "epoch"] = "none",
    drop_constant: bool = False,
    layer: str = "",
    batch: str = "",
    column: _Columns = (),
    schema: _File = None,
    devices: int = 1,
    nodes: int = 1,
    tracker: tuple[Tracker, ...] = (),
    model: ModelFlags = ModelFlags(),  # noqa: B008
    training: TrainConfig = TrainConfig(),  # noqa: B008
) -> None:
    """Train a model on DATA and save the run.

    The columns of a table (.csv with a header, .parquet, .arrow) may be of different kinds, which are found, told by
    `aevb inspect`, and given likelihoods of their own. With --likelihood or --binarize all entries are of one kind.

    Args:
        data: `digits`, a .npy, .npz, .csv, .parquet, .h5ad or IDX file, a folder of images, in sub-folders if they have
            classes, or one of the four MNIST files.
        out: Folder of the new run.
        resume: Folder of a run that was stopped: go on with it as it was begun. Needs neither DATA nor --out.
        target: Column to predict from the others, known in some rows: y of p(y) p(z) p(x | y, z), q(y | x) q(z | x, y).
        objective: Bound to maximise; iwae uses --samples draws.
        binarize: Draw black or white from grey values: once, or anew each time they are used.
        drop_constant: Leave out columns that hold one value only.
        layer: Of an AnnData file, the layer to read in place of X, or `raw`.
        batch: Of an AnnData file, the column of .obs that names each row's batch (donor, plate), which the model is
            then given: p(z) p(x | z, batch) with q(z | x, batch).
        column: Kinds of a table's columns, where those that are found will not do; see `aevb inspect --help`.
        schema: Kinds of a table's columns, from a file that `aevb inspect --out` wrote.
        devices: Processes to start on this machine, which share the --shards of every batch; each with a GPU where
            there are as many. Leave it out, and nodes, under torchrun or srun, whose processes are found.
        nodes: Machines, on each of which this command is started with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        tracker: Show the figures of the history in TensorBoard, MLflow or Weights & Biases, too, as they come; each
            keeps to its own environment variables, and writes into the run's folder where they say nothing.
        model: The model.
        training: The training.
    """
    from aevb.apps.tables import kinds_of, set_aside

    if resume is not None:
        told = (data, out, target, objective, binarize, drop_constant, layer, batch, column, schema, model, training)
        if told != ("", None, "", "elbo", "none", False, "", "", (), None, ModelFlags(), TrainConfig()):
            raise InputError("`--resume` goes on with a run as it was begun; other settings have no effect. Drop them.")
        go_on(resume, devices, nodes, tracker)
        return
    if not data or out is None:
        raise InputError(
            "`aevb train` needs DATA and --out FOLDER, or --resume FOLDER. Try: aevb train digits --out RUN"
        )
    kinds = kinds_of(data, column, schema, model.likelihood, binarize, target)
    source = {"source": data, "binarize": binarize, "seed": training.seed, "drop_constant": drop_constant}
    named = {"layer": layer, "batch": batch, "target": target, "schema": None if kinds is None else kinds.to_json()}
    source |= {name: value for name, value in named.items() if value}
    aside = "" if kinds is None else set_aside(kinds)
    start(source, out, objective, dataclasses.asdict(model), training, devices, nodes, tracker, aside)


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    samples: int = 5000,
    seed: int = 0,
    data: str | None = None,
    compile: bool = False,
    precision: Precision = "float32",
    also: _Names = (),
    also_rows: int = 100,
    temperatures: int = 1000,
    json: bool = False,
) -> None:
    """Estimate log p(x) on the test rows of a run's data, with its errors; keep it, and what --also finds, in the run.

    --also ais: annealing beside importance sampling, and how far it can be trusted. gaps: what of log p(x) - ELBO a
    better encoder, full covariance or a flow would win. information: what the latents carry. calibration: whether q is
    the posterior. checks: figures of the data beside those of data that the model draws.

    Args:
        run: Folder of the run.
        samples: Importance samples a row.
        seed: Key of the draws.
        data: Where the data are now, if they have moved since training.
        compile: Compile the pass over both networks first: a minute, worth it from some ten million draws on.
        precision: Of matrix products; bfloat16, kept to where its rounding is lost in the errors on 1000 rows, is a
            third faster where a processor has units for it, and pays from some ten thousand rows on.
        also: Deeper diagnoses by name, after RUN.
        also_rows: Rows, evenly spaced, that ais and gaps take at most; their time grows with it.
        temperatures: Of the annealing in ais and gaps; with more its bounds are tighter.
        json: Print one JSON object and nothing else.
    """
    from aevb.apps.diagnoses import check

    found = open_run(run)
    source = data_of(found, data)
    look = partial(values_of, found)
    check(found.vae, test_rows(found, source)[1], also, also_rows, temperatures, look)
    if also:  # beside an evaluation of these weights, draws and seed that the run holds already
        summary, rows = judged(found, source, samples, seed, quiet=json, compile=compile, precision=precision)
        summary = diagnose_run(found, source, summary, rows, also, few=also_rows, temperatures=temperatures, quiet=json)
    else:
        summary, _ = evaluate_run(found, source, samples, seed, quiet=json, compile=compile, precision=precision)
    _print_summary(summary, json)


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    samples: int = 5000,
    seed: int = 0,
    confidence: float = 0.95,
    json: bool = False,
) -> None:
    """Compare runs on the same test rows: paired differences of log p(x), ranks, and what may be said of them.

    Args:
        runs: Folders of two runs or more, trained on the same data.
        samples: Importance samples a row; an evaluation with as many that a run holds is used again.
        seed: Key of the draws.
        confidence: Of all intervals together.
        json: Print one JSON object and nothing else.
    """
    from aevb.apps.versus import Contestant, check_comparable, to_json, told
    from aevb.evaluate import compare as paired

    alike = len({run.name for run in runs}) < len(runs)
    found = {str(run) if alike else run.name: open_run(run) for run in runs}
    if len(found) < len(runs):
        raise InputError("`runs` names a folder twice. Give each run once.")
    data = {name: data_of(run, None) for name, run in found.items()}
    check_comparable(found, {name: test_rows(run, data[name])[1] for name, run in found.items()})
    each = {name: judged(run, data[name], samples, seed, quiet=json) for name, run in found.items()}
    comparison = paired({name: rows for name, (_, rows) in each.items()}, confidence)
    contestants = [Contestant(run=run, summary=each[name][0]) for name, run in found.items()]
    print(dumps(to_json(contestants, comparison)) if json else "\n".join(told(contestants, comparison)))


def _print_summary(summary: Summary, as_json: bool) -> None:
    if as_json:
        print(dumps(summary.to_json()))
    else:
        print("\n".join(summary.lines()))


def sample(
    run: Annotated[Path, tyro.conf.Positional],
    n: _Rows,
    out: Path,
    given: _Given = (),
    samples: int = 100_000,
    seed: int = 0,
    data: str | None = None,
) -> None:
    """Draw new rows from a run's model, p(z) p(x | z), or, with --given, from p(x | what is given).

    Conditions are met by importance resampling; the effective sample size tells how many draws the rows rest on. How
    near rows come to those trained on is told beside the same of rows held out.

    Args:
        run: Folder of the run.
        n: Rows to draw.
        out: File to write: .csv or .parquet; .npy where all columns are of one kind; of images also .png, side by side.
        given: A condition on a column, as sex=F or "age>60"; may be repeated. Where the
            model is given a batch, only its value, as donor=A.
        samples: Draws from which rows that meet the conditions are picked.
        seed: Key of the draws.
        data: Where the data are now, if they have moved since training.
    """
    from aevb.apps.tables import sample_file
    from aevb.data import check_destination

    if n < 1:
        raise InputError(f"`n` must be at least 1; got {n}. Give the number of rows to draw.")
    found = open_run(run)
    check_destination(out, tables=schema_of(found) is not None, images=bool(found.data.get("image_shape")))
    print("\n".join(sample_file(found, out, n, given, samples=samples, seed=seed, moved=data)))


def encode(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Path,
    expected: bool = False,
) -> None:
    """Write mean and standard deviation of q(z | x) for each row of DATA; of a flow, those of 1000 draws.

    From .h5ad to .h5ad the file is copied, with means in `.obsm["X_aevb"]` and standard deviations in
    `.obsm["X_aevb_std"]` (of further latent nodes with their names behind).

    Args:
        run: Folder of the run.
        data: File with the rows: .npy, .npz, .csv, .parquet, .h5ad or IDX; an image or a folder of them; or a folder of
            .parquet files, which the processes of torchrun or srun share out.
        out: File to write: .npy, .csv or .parquet, .h5ad for one; or a folder for as many files, of which only those
            are made that it lacks.
        expected: From .h5ad to .h5ad also the layer `aevb_expected`, what the model expects of each entry, at the row's
            own library size and batch: the mean of p(x | z) over 25 draws of q(z | x), the same for all rows; counts
            without their noise. As many numbers as X, none of them left out; NaN in genes that --drop-constant dropped.
    """
    from aevb.apps.shards import shared_out
    from aevb.apps.tables import encode_file
    from aevb.data import check_destination

    found = open_run(run)
    files = shared_out(found, data, out, {"verb": "encode"})
    if expected and (files is not None or out.suffix.lower() != ".h5ad"):
        raise InputError(f"`--expected` fills a layer of an .h5ad file; got `{out}`. Write to one, or drop it.")
    if files is None:
        check_destination(out, source=data)
    for source, target in files or [(data, out)]:
        print(encode_file(found, source, target, expected=expected), flush=True)


def impute(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Path,
    draws: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 0,
    samples: int = 1000,
    seed: int = 0,
) -> None:
    """Fill in the missing entries of DATA: by their mean given what is observed (categories: the most probable value).

    With -m each entry is drawn M times instead, multiple imputations: the tables stand one below another, numbered by
    the column `imputation`. From .h5ad to .h5ad the file is copied, and X filled in is the layer `aevb_filled`, or the
    layers `aevb_filled_1` and so on.

    Args:
        run: Folder of the run.
        data: File with the rows: .npy, .npz, .csv, .parquet, .arrow, .h5ad or IDX; or a folder of .parquet files, as
            for `aevb encode`.
        out: File to write: .csv or .parquet; .npy where all columns are of one kind; from .h5ad also .h5ad; or a
            folder.
        draws: Multiple imputations M; 0 for the mean.
        samples: Importance samples a row.
        seed: Key of the draws.
    """
    from aevb.apps.shards import shared_out
    from aevb.apps.tables import impute_file
    from aevb.data import check_destination

    found = open_run(run)
    files = shared_out(found, data, out, {"verb": "impute", "draws": draws, "samples": samples, "seed": seed})
    if files is None:
        check_destination(out, tables=schema_of(found) is not None, source=data)
    for source, target in files or [(data, out)]:
        print(impute_file(found, source, target, draws=draws, samples=samples, seed=seed, whole=files is not None))
        print(f"written to {target}", flush=True)


def score(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: _File = None,
    by_column: bool = False,
    top: int = 0,
    samples: int = 1000,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Estimate log p(x) of each row of DATA, of what is observed in it, with its standard error.

    Args:
        run: Folder of the run.
        data: File with the rows: .npy, .npz, .csv, .parquet, .arrow, .h5ad or IDX; an image or a folder of them; or a
            folder of .parquet files, as for `aevb encode`.
        out: File to write: .npy, .csv or .parquet, from .h5ad also a copy of it, with the figures in `.obs`; or a
            folder.
        by_column: Write -log p of each entry given the others of its row, too, with its standard error.
        top: Show so many rows that the model finds least likely, and what in them surprises it most.
        samples: Importance samples a row.
        seed: Key of the draws.
        json: Print one JSON object and nothing else.
    """
    from aevb.apps.shards import shared_out
    from aevb.apps.tables import score_file, score_quietly

    if top < 0:
        raise InputError(f"`top` must not be negative; got {top}. Give the number of rows to show.")
    found = open_run(run)
    settings = {"verb": "score", "by_column": by_column, "samples": samples, "seed": seed}
    files = shared_out(found, data, out, settings)
    if files is not None:
        if top or json:
            raise InputError("`--top` and `--json` tell of one file, and DATA is a folder of them. Leave them out.")
        for source, target in files:
            print(score_quietly(found, source, target, by_column=by_column, samples=samples, seed=seed), flush=True)
        return
    summary, told = score_file(found, data, out, by_column=by_column, top=top, samples=samples, seed=seed, quiet=json)
    for each in () if json else told:
        each()
    _print_summary(summary, json)
    if not json and out is not None:
        print(f"written to {out}")


def report(run: Annotated[Path, tyro.conf.Positional], samples: int | None = None, data: str | None = None) -> None:
    """Write report.html into a run: figures, curves, reconstructions, samples and the latent space.

    Args:
        run: Folder of the run.
        samples: Importance samples a row; those of the last `aevb evaluate` if it was of these weights, else 5000.
        data: Where the data are now, if they have moved since training.
    """
    from aevb.apps.report import write_report
    from aevb.apps.summary import Summary, weights_of

    found = open_run(run)
    source = data_of(found, data)
    summary = Summary.load(run / EVALUATION) if (run / EVALUATION).exists() else None
    if summary is None or summary.weights != weights_of(found.vae) or samples not in (None, summary.samples):
        summary, _ = evaluate_run(found, source, samples or 5000, 0, quiet=False)
    _, rows, labels = test_rows(found, source)
    write_report(
        found,
        summary,
        run / _REPORT,
        test=rows,
        labels=labels,
        classes=source.classes,
        image_shape=source.image_shape,
        columns=source.columns,
        maximum=source.total_count,
        target=source.target,
        batch=source.batch,
    )
    print(f"report written to {run / _REPORT}")


def export(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path,
    format: Literal["torch", "onnx", "pretrained"] = "torch",
    seed: int = 0,
    data: str | None = None,
    license: str | None = None,
) -> None:
    """Write a run's networks as files for other programs, or the whole model for a model hub.

    Encoder, decoder and scorer, which is fed its noise, are opened again and compared with the run on rows held out;
    `export.json` tells what they take and give.

    Args:
        run: Folder of the run.
        out: Folder to write, which must be new.
        format: `torch`, for `torch.export.load` without this library; `onnx`, which lacks some operators (a part that
            needs one is left out and named); or `pretrained`, for `aevb.from_pretrained`, with a card for readers.
        seed: Key of the noise that scorers are compared with.
        data: Where the data are now, if they have moved since training.
        license: Of a pretrained model, as the hub spells it, such as apache-2.0.
    """
    from aevb.apps.export import export_run

    export_run(run, out, format, seed, data, license, lambda line: print(line, flush=True))


def check(seed: int = 0, json: bool = False) -> None:
    """Compare this installation with closed forms: a linear VAE's ELBO, marginal likelihood, posterior and training.

    Args:
        seed: Of the simulated data and of training.
        json: Print one JSON object and nothing else.
    """
    from aevb.apps.check import compare, table

    results = compare(seed)
    if json:
        print(dumps([dataclasses.asdict(result) | {"ok": result.ok} for result in results]))
    else:
        print(table(results))
    if wrong := [result.quantity for result in results if not result.ok]:
        raise InputError(f"{len(wrong)} of {len(results)} known answers are off: {', '.join(wrong)}.")
