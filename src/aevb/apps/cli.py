"""The command line `aevb`: one function a verb, its flags derived from the configurations; errors in one sentence.

What a verb needs is imported when the verb runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("aevb: the command line needs a few more packages. Install them: pip install 'aevb[apps]'")

from aevb.apps.progress import rows_done, steps_done
from aevb.config import InputError, Likelihood, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from aevb.apps.summary import Summary
    from aevb.checkpoint import Run
    from aevb.data import Data

__all__ = ["main"]

_REPORT, _EVALUATION = "report.html", "evaluation.json"
_Rows = Annotated[int, tyro.conf.arg(aliases=["-n"], metavar="ROWS")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]


def main() -> None:
    """Run the command line; exits with 0, or non-zero after one clear message."""
    warnings.showwarning = lambda message, *_, **__: print(f"aevb: {message}", file=sys.stderr)
    verbs = (train, evaluate, sample, encode, score, report, check)
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
    except KeyboardInterrupt as error:
        print(f"aevb: stopped. {error}" if str(error) else "aevb: stopped.", file=sys.stderr)
        sys.exit(130)


def _model_flags() -> type:
    """The fields of `ModelConfig` that the data do not decide, with their docstrings as help."""
    body = ast.parse(inspect.getsource(ModelConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    told = {}
    for line, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, ast.Expr):
            told[line.target.id] = str(ast.literal_eval(text.value))
    hints = get_type_hints(ModelConfig)
    made: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(ModelConfig):
        if field.name == "features":
            continue
        kind, default, metavar = hints[field.name], field.default, None
        if field.name == "likelihood":
            kind, default = Literal["auto", *get_args(kind)], "auto"
            told[field.name] += " auto: counts with a known limit, zeros and ones, or real values, as the data are."
        if field.name == "total_count":
            metavar = "INT"
        about = tyro.conf.arg(help=told[field.name], metavar=metavar)
        made.append((field.name, Annotated[kind, about], dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Model", made, frozen=True, kw_only=True)


if TYPE_CHECKING:
    _ModelFlags = Any
else:
    _ModelFlags = _model_flags()


def train(
    data: Annotated[str, tyro.conf.Positional] = "",
    out: _Folder = None,
    resume: _Folder = None,
    objective: Literal["elbo", "iwae"] = "elbo",
    binarize: Literal["none", "static", "epoch"] = "none",
    drop_constant: bool = False,
    model: _ModelFlags = _ModelFlags(),  # noqa: B008
    training: TrainConfig = TrainConfig(),  # noqa: B008
) -> None:
    """Train a model on DATA and save the run.

    Args:
        data: `digits`, a .npy, .npz, .csv, .parquet or IDX file, or a folder of the four MNIST files.
        out: Folder of the new run.
        resume: Folder of a run that was stopped: go on with it as it was begun. Needs neither DATA nor --out.
        objective: Bound to maximise; iwae uses --samples draws.
        binarize: Draw black or white from grey values: once, or anew each time they are used.
        drop_constant: Leave out columns that hold one value only.
        model: The model.
        training: The training.
    """
    if resume is not None:
        told = (data, out, objective, binarize, drop_constant, model, training)
        if told != ("", None, "elbo", "none", False, _ModelFlags(), TrainConfig()):
            raise InputError("`--resume` goes on with a run as it was begun; other settings have no effect. Drop them.")
        _go_on(resume)
        return
    if not data or out is None:
        raise InputError(
            "`aevb train` needs DATA and --out FOLDER, or --resume FOLDER. Try: aevb train digits --out RUN"
        )
    source = {"source": data, "binarize": binarize, "seed": training.seed, "drop_constant": drop_constant}
    _start(source, out, objective, dataclasses.asdict(model), training)


def _start(source: dict[str, Any], out: Path, objective: str, model: dict[str, Any], config: TrainConfig) -> None:
    import torch

    from aevb.build import build_vae

    if out.exists():
        raise InputError(f"`{out}` exists already; a run is never overwritten. Choose another --out.")
    data = _load(source)
    model_config = _model_config(model, data)
    before = torch.get_default_dtype()
    try:
        # Values that float32 cannot tell apart, such as times in seconds, are read as float64 and modelled so.
        torch.set_default_dtype(torch.float64 if data.train.dtype == torch.float64 else before)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            vae = build_vae(model_config, _rows_for_start(data))
    finally:
        torch.set_default_dtype(before)
    describe = data.describe() | {"command": source, "objective": objective}
    print(f"{data.name}: {len(data.train)} rows of {data.features}, likelihood {model_config.likelihood}", flush=True)
    with steps_done(config.steps) as progress:
        run = _fit(vae, data, config, objective, out, False, progress, describe)
    _tell_end(run)


def _go_on(folder: Path) -> None:
    import torch

    run = _open(folder)
    so_far = run.resume["numbers"]
    if so_far["finished"] or so_far["step"] >= run.config.steps:
        raise InputError(
            f"`{folder}` is finished, at step {so_far['step']}; there is nothing to go on with. Train anew."
        )
    torch.set_num_threads(so_far["threads"])  # another number would round otherwise
    data = _load_again(run, None)
    with steps_done(run.config.steps, so_far["step"]) as progress:
        run = _fit(run.vae, data, run.config, run.data["objective"], folder, True, progress, run.data)
    _tell_end(run)


def _fit(
    vae: Any, data: Data, config: TrainConfig, objective: str, out: Path, resume: bool,
    progress: Callable[[dict[str, Any]], None], describe: dict[str, Any],
) -> Run:  # fmt: skip
    from aevb.training import fit

    try:
        return fit(
            vae,
            data.training(),
            config,
            objective=objective,
            out=out,
            resume=resume,
            progress=progress,
            describe=describe,
        )
    except KeyboardInterrupt:
        if out.exists():
            raise KeyboardInterrupt(f"A checkpoint is in {out}; go on with: aevb train --resume {out}") from None
        raise


def _tell_end(run: Run) -> None:
    last = run.history[-1]
    kept = [record for record in run.history if "validation" in record]
    if kept:
        best = max(kept, key=lambda record: record["validation"])
        print(f"kept the weights of step {best['step']} (validation ELBO {best['validation']:.2f} nats)")
    early = ", stopped early," if last["step"] < run.config.steps else ""
    print(f"trained {last['step']} steps{early} in {last['seconds']:.0f} s; saved in {run.path}")


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    samples: int = 5000,
    seed: int = 0,
    data: str | None = None,
    json: bool = False,
) -> None:
    """Estimate log p(x) on the test rows of a run's data, with its errors.

    Args:
        run: Folder of the run.
        samples: Importance samples a row.
        seed: Key of the draws.
        data: Where the data are now, if they have moved since training.
        json: Print one JSON object and nothing else.
    """
    found = _open(run)
    summary = _evaluate(found, _load_again(found, data), samples, seed, quiet=json)
    summary.save(run / _EVALUATION)
    _print_summary(summary, json)


def _print_summary(summary: Summary, as_json: bool) -> None:
    if as_json:
        print(dumps(summary.to_json()))
    else:
        print("\n".join(summary.lines()))


def sample(run: Annotated[Path, tyro.conf.Positional], n: _Rows, out: Path, seed: int = 0) -> None:
    """Draw new rows from a run's model, p(z) p(x | z).

    Args:
        run: Folder of the run.
        n: Rows to draw.
        out: File to write: .npy, .csv or .parquet.
        seed: Key of the draws.
    """
    import torch

    from aevb.data import check_destination, write_rows

    if n < 1:
        raise InputError(f"`n` must be at least 1; got {n}. Give the number of rows to draw.")
    check_destination(out)
    found = _open(run)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = found.vae.p.sample(n)["x"]
    columns = found.data.get("columns") or [f"x{j + 1}" for j in range(x.shape[1])]
    write_rows(out, x.numpy(), columns)
    print(f"{n} rows written to {out}")


def encode(run: Annotated[Path, tyro.conf.Positional], data: Annotated[str, tyro.conf.Positional], out: Path) -> None:
    """Write mean and standard deviation of q(z | x) for each row of DATA.

    Args:
        run: Folder of the run.
        data: File with the rows: .npy, .npz, .csv, .parquet or IDX.
        out: File to write: .npy, .csv or .parquet.
    """
    import torch

    from aevb.bounds import evaluating, prepare
    from aevb.data import check_destination, write_rows

    check_destination(out)
    found = _open(run)
    with evaluating(found.vae):
        posterior = found.vae.posterior(prepare(found.vae, {"x": _read(found, data)}))
    parts, columns = [], []
    for node, d in posterior.items():
        for name, value in (("mean", d.mean), ("std", d.stddev)):
            parts.append(value)
            columns += [f"{node}{j + 1}_{name}" for j in range(value.shape[1])]
    write_rows(out, torch.cat(parts, 1).numpy(), columns)
    print(f"{len(parts[0])} rows, {len(columns)} columns written to {out}")


def score(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Path,
    samples: int = 1000,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Write log p(x) of each row of DATA with its standard error.

    Args:
        run: Folder of the run.
        data: File with the rows: .npy, .npz, .csv, .parquet or IDX.
        out: File to write: .npy, .csv or .parquet.
        samples: Importance samples a row.
        seed: Key of the draws.
        json: Print one JSON object and nothing else.
    """
    import torch

    from aevb.apps.summary import summarize
    from aevb.data import check_destination, write_rows
    from aevb.evaluate import log_marginal

    check_destination(out)
    found = _open(run)
    values = {"x": _read(found, data)}
    with rows_done("scoring", len(values["x"]), quiet=json) as progress:
        marginal = log_marginal(found.vae, values, samples, seed=seed, progress=progress)
    names = ("log_prob", "std_error", "ess", "pareto_k")
    write_rows(out, torch.stack([getattr(marginal, name) for name in names], 1).numpy(), names)
    summary = summarize(found.vae, values, marginal, seed=seed, split=Path(data).name)
    _print_summary(summary, json)
    if not json:
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

    found = _open(run)
    source = _load_again(found, data)
    summary = Summary.load(run / _EVALUATION) if (run / _EVALUATION).exists() else None
    if summary is None or summary.weights != weights_of(found.vae) or samples not in (None, summary.samples):
        summary = _evaluate(found, source, samples or 5000, 0, quiet=False)
        summary.save(run / _EVALUATION)
    _, rows, labels = _test_rows(found, source)
    write_report(
        found,
        summary,
        run / _REPORT,
        test=rows,
        labels=labels,
        image_shape=source.image_shape,
        columns=source.columns,
        maximum=source.total_count,
    )
    print(f"report written to {run / _REPORT}")


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


def _evaluate(run: Run, data: Data, samples: int, seed: int, *, quiet: bool) -> Summary:
    from aevb.apps.summary import summarize
    from aevb.evaluate import log_marginal

    split, rows, _ = _test_rows(run, data)
    values = {"x": rows}
    with rows_done(f"log p(x), {samples} samples a row", len(rows), quiet) as progress:
        marginal = log_marginal(run.vae, values, samples, seed=seed, progress=progress)
    return summarize(run.vae, values, marginal, seed=seed, split=split, data=_pixels(run))


def _pixels(run: Run) -> str:
    """How grey values became black and white, where they did."""
    return "" if run.data["binarize"] == "none" else f"binarised: {run.data['binarize']}"


def _test_rows(run: Run, data: Data) -> tuple[str, Tensor, Tensor | None]:
    """The rows to judge by: the data's own test rows, else those held out for validation."""
    import torch

    from aevb.training import split_rows

    if data.test is not None:
        return "test", data.test, data.test_labels
    _, held_out = split_rows(len(data.train), run.config)
    if not len(held_out):
        raise InputError(
            f"{data.name} has no test rows and none were held out. Train with --validation 0.1, or score a file of "
            "new rows."
        )
    training = data.training()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)  # pixels that are drawn anew at each use are drawn once here
        values = training["x"][held_out] if isinstance(training, dict) else training.take(held_out)["x"]
    labels = None if data.train_labels is None else data.train_labels[held_out]
    return "validation", values, labels


def _open(folder: Path) -> Run:
    from aevb.checkpoint import load

    run = load(folder)
    if "command" not in run.data:
        raise InputError(
            f"`{folder}` was not made by `aevb train`, so its data are not known here. Use the library on it."
        )
    return run


def _load(source: dict[str, Any]) -> Data:
    from aevb.data import load

    name = source["source"]
    return load(name, binarize=source["binarize"], seed=source["seed"], drop_constant=source["drop_constant"])


def _load_again(run: Run, moved: str | None) -> Data:
    """The data a run was trained on, and nothing else."""
    data = _load(run.data["command"] | ({"source": moved} if moved else {}))
    if data.describe()["sha256"] != run.data["sha256"]:
        raise InputError(
            f"{data.name} is not what the run was trained on: its content is another. Restore the file, or name "
            "where it is now with --data."
        )
    return data


def _read(run: Run, path: str) -> Tensor:
    from aevb.data import read_rows

    told, command = run.data, run.data["command"]
    return read_rows(
        path, columns=told["columns"], kept=told["kept"], features=told["features"], dropped=told["dropped"],
        binarize=command["binarize"], seed=command["seed"],
    )  # fmt: skip


def _model_config(model: dict[str, Any], data: Data) -> ModelConfig:
    """The flags, completed by what the data tell."""
    given = dict(model)
    if given["likelihood"] == "auto":
        given["likelihood"] = _likelihood(data)
    if given["likelihood"] in ("binomial", "beta-binomial") and given["total_count"] is None:
        given["total_count"] = data.total_count
    if given["likelihood"] in ("normal", "student-t") and data.constant:
        raise InputError(
            f"{data.name}: {', '.join(map(repr, data.constant[:10]))} constant in the train rows, and the scale of a "
            "normal or student-t likelihood would go to zero there. Leave them out with --drop-constant."
        )
    given["holes"] |= any(x is not None and bool(x.isnan().any()) for x in (data.train, data.test))
    return ModelConfig(features=data.features, **given)


def _likelihood(data: Data) -> Likelihood:
    """What fits the values: counts with a known limit, zeros and ones, or anything."""
    if data.binarize != "none":
        return "bernoulli"
    if data.total_count is not None:
        return "binomial"
    known = data.train[~data.train.isnan()]
    return "bernoulli" if bool(((known == 0) | (known == 1)).all()) else "normal"


def _rows_for_start(data: Data) -> Tensor:
    """Train rows whose mean the likelihood starts from; grey values have the mean of the pixels drawn from them."""
    rows = data.train.float() if not data.train.is_floating_point() else data.train
    return rows / 255 if data.binarize == "epoch" and not data.train.is_floating_point() else rows
