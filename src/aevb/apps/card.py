"""A run as a folder for others, with a card: what it was trained on, how, and what it is worth, in its own figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from aevb.apps.runs import EVALUATION
from aevb.apps.summary import DENSITIES, UNTRUSTED_ABOVE, Summary, weights_of
from aevb.bayesnet import VAE
from aevb.checkpoint import Run, load
from aevb.config import InputError, Kind, ModelConfig, TrainConfig
from aevb.data import Batch, Column, Schema, described
from aevb.nets import LogTotal
from aevb.pretrained import write_pretrained

__all__ = ["save_pretrained"]

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_COLUMNS = 40
"""Most columns that the card lists."""

_TOLD = (
    "name", "rows", "features", "dtype", "missing", "binarize", "columns", "image_shape", "total_count", "constant",
    "dropped", "kept",
)  # fmt: skip
"""What a run records of its data that others may know: neither rows nor their fingerprint, nor where they stood."""


def save_pretrained(run: Run | str | Path, folder: str | Path, *, license: str | None = None) -> Path:
    """Write a run as a folder that can be put on a model hub, and that `aevb.from_pretrained` loads.

    It holds `config.json` (model, training, columns and categories), `model.safetensors` (weights, to the bit) and
    `README.md`, a card in the run's own figures: data, model, training, and the evaluation that `aevb evaluate` left in
    the run, if it is of these weights; a run that was not evaluated says so. Neither paths nor rows are in it; weights
    are learned from rows, and the card says which of them start as rows. What a run of `aevb.fit` was trained on is
    told if it was given as `describe=data.describe()`, `data` being an `aevb.data.Data`.

    Args:
        run: The run, or its folder.
        folder: Where to; absent or empty.
        license: As the hub spells it, `apache-2.0` or `cc-by-4.0` say; without, the card says that none was given.

    Returns:
        The folder.

    Raises:
        InputError: If the run cannot be loaded, `folder` holds anything, or `license` is no identifier.

    Example:
        >>> import aevb, tempfile
        >>> run = aevb.Run(vae=aevb.build_vae(aevb.ModelConfig(features=5)), config=aevb.TrainConfig(), history=[])
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = save_pretrained(run, f"{parent}/model", license="apache-2.0")
        ...     sorted(path.name for path in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(
            f"`license` must be an identifier as the hub spells them; got {license!r}. Write e.g. apache-2.0, mit, "
            "cc-by-4.0 or other."
        )
    folder = Path(folder)
    if not isinstance(run, Run):
        run = load(run)
    data = _shareable(run)
    write_pretrained(run, folder, data, _card(run, data, folder.absolute().name or "model", license))
    return folder


def _shareable(run: Run) -> dict[str, Any]:
    """What others may know of the data, and need to code a file as the run did."""
    if not set(_TOLD) <= set(run.data):  # not by `Data.describe`: words of the user's own, which may hold anything
        return {}
    told = {name: run.data[name] for name in _TOLD}
    told |= {name: run.data[name] for name in ("objective", "label_weight", "batch") if name in run.data}
    told["name"] = re.split(r"[\\/]", str(told["name"]))[-1]
    if "command" in run.data:
        command = run.data["command"]
        known = ("binarize", "seed", "drop_constant", "layer", "batch", "schema", "target")
        told["command"] = {name: command[name] for name in known if name in command}
        told["command"]["source"] = told["name"]
        if schema := told["command"].get("schema"):
            # The reason for a kind tells of values: of their number, lowest and highest.
            told["command"]["schema"] = schema | {"columns": [column | {"reason": ""} for column in schema["columns"]]}
    return told


def _evaluation(run: Run) -> tuple[Summary | None, str]:
    """What the run's evaluation found, if it is of these weights; else why there is none."""
    if run.path is None or not (run.path / EVALUATION).is_file():
        return None, "This model was not evaluated when this card was written, and no figure is given."
    summary = Summary.load(run.path / EVALUATION)
    if summary.weights != weights_of(run.vae):
        return None, "The run's evaluation is of other weights than these, and no figure is given."
    return summary, ""


def _card(run: Run, data: dict[str, Any], title: str, license: str | None) -> str:
    """The whole text of `README.md`."""
    summary, why_none = _evaluation(run)
    parts = [
        _front_matter(run, data, title, license, summary),
        f"# {_plain(title)}",
        _what_it_is(run.vae, data),
        "## Use",
        *_use(run.vae, data),
        "## Data",
        *_data(data, run),
        "## Model",
        *_model(run.vae),
        "## Training",
        *_training(run, data),
        "## Evaluation",
        *(_figures(summary) if summary else [why_none]),
        "## Limits",
        _bullets(_limits(run.vae, data)),
        "## License",
        f"`{license}`" if license else "None was given when this card was written: ask who publishes the model.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(run: Run, data: dict[str, Any], title: str, license: str | None, summary: Summary | None) -> str:
    """What the hub reads: YAML."""
    likelihood = [run.vae.config.likelihood] if run.vae.config else []
    told: dict[str, Any] = {"library_name": "aevb"}
    told |= {"license": license} if license else {}
    told["tags"] = ["aevb", "variational-autoencoder", "density-estimation", *likelihood]
    if summary is not None:
        name = data.get("name", "unknown")
        metrics = [
            {"type": kind, "name": words, "value": value, "args": {"samples": summary.samples, "seed": summary.seed}}
            for kind, words, value in (
                ("log-likelihood", summary.headline, summary.log_prob),
                ("elbo", "ELBO, nats a row", summary.elbo),
            )
            if math.isfinite(value)
        ]
        result = {
            "task": {"type": "density-estimation", "name": "Density estimation"},
            "dataset": {"type": name, "name": name, "split": summary.split},
            "metrics": metrics,
        }
        told["model-index"] = [{"name": title, "results": [result]}]
    return "\n".join(["---", *_yaml(told), "---"])


def _yaml(value: Any) -> list[str]:
    """Lines of YAML for mappings, lists, text and numbers; all text is quoted, so that none is taken for else."""
    if isinstance(value, dict):
        lines = []
        for key, each in value.items():
            if isinstance(each, dict | list):
                lines += [f"{key}:", *(f"  {line}" for line in _yaml(each))]
            else:
                lines.append(f"{key}: {_scalar(each)}")
        return lines
    lines = []
    for each in value:
        first, *others = _yaml(each) if isinstance(each, dict | list) else [_scalar(each)]
        lines += [f"- {first}", *(f"  {line}" for line in others)]
    return lines


def _scalar(value: str | float) -> str:
    if isinstance(value, str):
        return json.dumps(_plain(value), ensure_ascii=False)
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text  # YAML 1.1 takes 1e-05 for text


def _what_it_is(vae: VAE, data: dict[str, Any]) -> str:
    of = f" of {_code(data['name'])}" if data else ""
    holes = " Missing entries are integrated out." if vae.config and vae.config.holes else ""
    return (
        f"A deep latent-variable model{of}, trained by auto-encoding variational Bayes with the library aevb: networks "
        "p(x, z) and q(z | x), which give log p of a row with its error, codes of rows, and new rows." + holes
    )


def _use(vae: VAE, data: dict[str, Any]) -> Iterable[str]:
    """Lines that run in the folder as they stand."""
    if vae.config is None:
        yield _block(
            ["import aevb", "", 'vae = aevb.from_pretrained(".", vae)  # this folder; or its name on the hub'], "python"
        )
        yield (
            "The `vae` that is given was composed by hand: build it with the factors below and with nets of the same "
            "shapes, which are compared."
        )
        return
    config, given, size, first = vae.config, [], "", []
    if config.batches:
        which = f"{batch.column} {batch.values[0]}" if (batch := Batch.told(data)) else "the first"
        first = [f"batch = torch.eye({config.batches})[[0, 0, 0]]  # one-hot, of three rows: {_plain(which)}"]
        given.append('"batch": batch')
    if vae.context == ("library",):
        net = vae.q.conditional("library").net
        assert isinstance(net, LogTotal)
        typical = f"{float(net.loc[0]):.2f}"  # in the first batch, where there are some
        given.append(f'"library": torch.full((3, 1), {typical})')
        size = f" of library size exp({typical})"
    imports = ["import aevb", "import torch"] if given else ["import aevb"]
    context = f", {{{', '.join(given)}}}" if given else ""
    values = "rows" if config.target else '{"x": x, "batch": batch}' if config.batches else '{"x": x}'
    rows = f'x = vae.p.sample(3{context})["x"]  # new rows{size}, (3, {config.features}); or your own'
    if config.target:
        rows = f"drawn = vae.p.sample(3)  # new rows x, (3, {config.features}), and targets y; or your own"
        rows += '\nrows = {"x": drawn["x"], "y": drawn["y"]}  # or x alone'
    told = "log_prob: log p of each row, nats; std_error; pareto_k"
    code = "q(z | x, batch)" if config.batches else "q(z | x)"
    lines = [
        *imports,
        "",
        'vae = aevb.from_pretrained(".")  # this folder; once it is on the hub, its name there: "owner/name"',
        *first,
        rows,
        f"aevb.log_marginal(vae, {values}, samples=1000)  # {told}",
        'vae.q.distribution("y", rows).mean  # what q(y | x) expects of the target'
        if config.target
        else f'vae.posterior({values})["z"].sample()  # codes of rows, (3, {config.latents}), drawn from {code}',
    ]
    yield _block(lines, "python")
    if data.get("command", {}).get("schema"):
        yield (
            f"A row is the columns below that are not set aside{_but(data)}, in their order: categories as 0, 1, ... "
            "in the order in which `config.json` lists them, NaN for missing."
        )
    if "command" in data:
        yield (
            "On the command line `aevb score`, `encode`, `impute` and `sample` take this folder in place of a run, and "
            "files with the same columns:"
        )
        yield _block(["aevb score FOLDER new.csv --out scores.csv"])


def _but(data: dict[str, Any]) -> str:
    target = data["command"].get("target")
    return f", without the target {_code(target)}" if target else ""


def _data(data: dict[str, Any], run: Run) -> Iterable[str]:
    seen = run.resume.get("numbers", {})
    held = f", {seen['held_out']} of them held out to choose the weights" if seen.get("held_out") else ""
    if not data:
        yield "The run does not tell, in a form to publish, what it was trained on." + (
            f" There were {seen['rows']} rows{held}." if seen else ""
        )
        return
    rows, missing, shape = data["rows"], data["missing"], data["image_shape"]
    target = data.get("command", {}).get("target")
    tested = f"; {rows['test']} to test on" if rows["test"] is not None else "; none to test on"
    yield _table(
        [
            ("name", _code(data["name"])),
            ("rows", f"{rows['train']} to train on{held}{tested}"),
            ("columns", f"{data['features']}" + (f", images of {described(shape)}" if shape else "")),
            *(
                [("target", f"{_code(target)}, the node y")]
                if (target := data.get("command", {}).get("target"))
                else []
            ),
            ("missing entries", ", ".join(f"{n} in {part} rows" for part, n in missing.items() if n is not None)),
            ("binarisation", data["binarize"]),
            *([("batches", _batches(batch))] if (batch := Batch.told(data)) else []),
            *([("counts", f"0 to {data['total_count']}")] if data["total_count"] is not None else []),
            *([("left out, constant", _listed(data["dropped"]))] if data["dropped"] else []),
        ]
    )
    if schema := data.get("command", {}).get("schema"):
        columns = Schema.from_json(schema).columns
        yield _table([(_code(each.name), _kind(each)) for each in columns[:_COLUMNS]], ("column", "kind"))
        if len(columns) > _COLUMNS:
            yield f"{len(columns) - _COLUMNS} more columns stand in `config.json`."
    elif data["columns"]:
        yield f"Columns: {_listed(data['columns'])}."


def _batches(batch: Batch) -> str:
    each = [f"{_code(value)} ({count} rows)" for value, count in zip(batch.values, batch.counts, strict=True)]
    more = f" and {len(each) - _COLUMNS} more" if len(each) > _COLUMNS else ""
    return f"{_code(batch.column)}, given to the model: {', '.join(each[:_COLUMNS])}{more}"


def _kind(column: Column) -> str:
    if column.model_kind is None:
        return f"{column.kind}, set aside"
    return "date, as days or seconds since 1970" if column.kind == "date" else column.model_kind


def _model(vae: VAE) -> Iterable[str]:
    nets = (("p", vae.p), ("q", vae.q))
    factors = [
        f"{name}: " + ", ".join(f'"{key}": {type(net.conditional(node)).__name__}' for key, node in _nodes(net.keys))
        for name, net in nets
    ]
    beside = [f"{name}: {', '.join(getattr(vae, name))}" for name in ("given", "shared") if getattr(vae, name)]
    yield _block([*factors, *beside])
    weights = list(vae.parameters())
    kinds = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in weights}))
    yield f"{sum(each.numel() for each in weights)} weights, {kinds}." + (
        " Its configuration, without what is left at its default:" if vae.config else " It was composed by hand."
    )
    if vae.config:
        yield _block([_call(vae.config)], "python")


def _nodes(keys: Iterable[str]) -> list[tuple[str, str]]:
    return [(key, key.split("|")[0].strip()) for key in keys]


def _training(run: Run, data: dict[str, Any]) -> Iterable[str]:
    config, numbers = run.config, run.resume.get("numbers", {})
    objective = data.get("objective") or numbers.get("objective")
    if "label_weight" in data:
        objective = f"{objective} + {data['label_weight']:g} log q(y | x)"
    validated = [record for record in run.history if "validation" in record]
    kept = f"average over the last ones, decay {config.average:g}" if config.average else "the last"
    if validated:
        best = max(validated, key=lambda record: float(record["validation"]))
        kept = f"those of step {best['step']}, the best on the rows held out"
    facts = [
        *([("objective", str(objective))] if objective else []),
        ("batch", f"{config.batch_size} rows"),
        ("draws of the latents a row", f"{config.samples}"),
        ("rate", f"{config.learning_rate:g}, {config.schedule}, {config.optimizer}"),
        ("seed", f"{config.seed}"),
        *([("versions", ", ".join(f"{name} {run.made[name]}" for name in ("aevb", "torch", "python")))]
          if run.made else []),
    ]  # fmt: skip
    if run.history:
        last = run.history[-1]
        where = f" on {numbers['device']}" if numbers.get("device") else ""
        where += f", {run.made['processor']}" if run.made.get("processor") else ""
        facts[1:1] = [
            ("steps", f"{last['step']} of at most {config.steps}"),
            ("weights kept", kept),
            ("time", f"{_minutes(last['seconds'])}{where}"),
        ]
    yield _table(facts)
    if not run.history:
        yield "The run keeps no history: how many steps were taken is not known."
    yield "The configuration, without what is left at its default:"
    yield _block([_call(config)], "python")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def _figures(summary: Summary) -> Iterable[str]:
    yield f"**{summary.headline}**"
    if math.isfinite(summary.std_error):
        yield "The error is the standard error over rows: how far another test set of this size would scatter."
    yield f"{summary.caveat[0].upper()}{summary.caveat[1:]}."
    yield _table(summary.facts())
    for finding in summary.findings.values():
        yield f"### {finding.title}"
        yield _table(finding.facts)
        yield " ".join(finding.meaning)


def _limits(vae: VAE, data: dict[str, Any]) -> Iterable[str]:
    likelihood = vae.config.likelihood if vae.config else ""
    what = {
        "": "",
        "mixed": " It is the log of a density in continuous and positive columns, in their units, of a probability in "
        "the others.",
        **dict.fromkeys(DENSITIES, " It is the log of a density in the data's units, and may be above 0."),
    }.get(likelihood, " It is the log of a probability.")
    if vae.config and vae.config.target and not Kind.parse(vae.config.target).classes:
        what += " Of the target it is that of a density in its units, whatever its kind."
    given = f", given {', '.join(vae.given)}, which each row brings" if vae.given else ""
    given += f", given {', '.join(vae.context)}, which is computed of the row itself" if vae.context else ""
    yield (
        f"log p is that of a whole row, in nats{given}.{what} It can be compared with that of other models only on the "
        "same rows and columns, in the same units and with the same binarisation."
    )
    yield (
        "It is estimated by importance sampling, which gives a lower bound in expectation. Where a row's Pareto k-hat "
        f"is above {UNTRUSTED_ABOVE} its estimate is not to be trusted, and may be far too low."
    )
    yield (
        "The model tells of rows like those it was trained on. Of others its codes, imputations and samples mean "
        "little, and a high log p is no proof that a row is like them."
    )
    if data.get("command", {}).get("schema"):
        yield (
            "`config.json` holds the names of the columns and of all categories, the levels of ordinal columns and the "
            "value of constant ones: no file could be coded without them. It holds no rows."
        )
    if Batch.told(data):
        yield "`config.json` holds the names of all batches, and how many rows each had."
    starts = ""
    if vae.config and vae.config.prior == "vamp":
        starts = (
            " The pseudo-inputs of the vamp prior start as rows of the training data, and may still be close to them."
        )
    yield (
        "The weights are learned from rows, and may hold means and scales of columns. It was not proved that no row "
        "can be told from them, nor that no new row repeats one." + starts
    )


def _call(config: ModelConfig | TrainConfig) -> str:
    """A configuration as it would be written, without what is as by default."""
    named = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if getattr(config, field.name) != field.default
    ]
    return f"aevb.{type(config).__name__}({', '.join(named)})"


def _block(lines: Sequence[str], language: str = "") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _table(rows: Iterable[tuple[str, str]], titles: tuple[str, str] = ("", "")) -> str:
    """A table in Markdown; a bar would end the cell."""
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (titles, *rows)]
    return "\n".join(f"| {line} |" for line in [cells[0], "--- | ---", *cells[1:]])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _COLUMNS} more" if len(names) > _COLUMNS else ""
    return ", ".join(map(_code, names[:_COLUMNS])) + more


def _code(name: str) -> str:
    """A name of the user's as it is, not as markup."""
    return f"`{_plain(name).replace('`', chr(39))}`"


def _plain(text: str) -> str:
    """On one line, without what no page shows."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
