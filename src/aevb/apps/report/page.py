r"""One page of HTML that shows a run: figures of its `Summary`, training curves, latents, reconstructions, samples.

The page is one file that fetches nothing. A reconstruction is the mean of :math:`p(x | z)` at :math:`z = E_q[z | x]`; a
sample starts from :math:`z \sim p(z)`. What is said of the pictures stands in `report.html`.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aevb.apps.report import findings, pictures
from aevb.apps.report.drawing import STYLE
from aevb.apps.report.seen import SAMPLES, TABLE_DRAWS, look
from aevb.apps.summary import ACTIVE_ABOVE, UNTRUSTED_ABOVE, Summary
from aevb.checkpoint import Run, write_atomically
from aevb.config import InputError
from aevb.data import Batch, SparseRows, Target

__all__ = ["write_report"]


def write_report(
    run: Run, summary: Summary, path: Path, *, test: Tensor | SparseRows, labels: Tensor | None = None,
    image_shape: tuple[int, ...] | None = None, columns: Sequence[str] | None = None, maximum: float | None = None,
    target: Target | None = None, batch: Batch | None = None, seed: int = 0, classes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the report of a run to one HTML file, whole or not at all.

    Args:
        run: Trained model with its history.
        summary: Its evaluation; every figure is printed as it stands there.
        path: File to write; one that exists is replaced.
        test: Rows of the node `x` that were evaluated, `(N, P)`, NaN for missing; at most 5000 are drawn.
        labels: Classes `(N,)` to colour the latent space by; negative or NaN where unknown.
        image_shape: (H, W) if rows are grey images, (3, H, W) if they are in colour; else they are shown as a table's
            columns.
        columns: Names of the P columns.
        maximum: Largest pixel value; if None 255 for bytes, else that of the largest test pixel. It is shown as full
            ink, in images of bytes and of colours as full light.
        target: The column that is a node of its own; the others are drawn, and its classes colour the latent space.
        batch: The batches that the model is given, whose one-hot columns stand behind the P others in `test`; they
            colour the latent space where there are no labels.
        seed: Key of the samples; torch's own generator is not moved.
        classes: Names of the labels 0, 1, ...; those of a target are known.

    Raises:
        InputError: For arguments that do not fit each other, rows the model cannot take, a missing package, or a file
            that cannot be written; what was there before is then untouched.

    Example:
        >>> import aevb, tempfile, torch
        >>> from aevb.apps.summary import summarize
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 3)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=3, latents=2), x)
        >>> run = aevb.fit(vae, {"x": x}, aevb.TrainConfig(steps=9))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder) / "report.html"
        ...     write_report(run, summarize(vae, {"x": x}, aevb.log_marginal(vae, {"x": x}, 50)), page, test=x)
        ...     page.read_text().splitlines()[0]
        '<!doctype html>'
    """
    try:
        import jinja2
        from matplotlib import style
    except ImportError as error:
        raise InputError(
            f"A report needs {error.name}, which is not installed. Install it: pip install 'aevb[apps]'."
        ) from None
    _check(test, labels, image_shape, columns, classes, 0 if batch is None else len(batch))
    if target is not None:
        assert isinstance(test, Tensor)  # a table
        columns = None if columns is None else target.others(tuple(columns))
        if target.classes:
            labels, classes = test[:, target.at].nan_to_num(-1.0), [str(label) for label in target.labels]
    seen = look(run.vae, test, labels, TABLE_DRAWS if image_shape is None else SAMPLES, seed, target, batch)
    if batch is not None and labels is None:
        classes = batch.values
    with style.context(["default", STYLE]):
        shown = pictures.curves(run) | pictures.rise(summary) | pictures.usage(summary, seen)
        shown |= pictures.latent_map(seen, classes, "" if batch is None or labels is not None else batch.column)
        shown |= {"diagnoses": findings.drawn(summary)}
        if image_shape is None:
            shown |= pictures.columns(seen, columns)
        else:
            levels = run.vae.config is not None and run.vae.config.likelihood == "discretized-logistic"
            maximum = 255.0 if maximum is None and levels else maximum
            shown |= pictures.images(seen, image_shape, maximum, light=levels or len(image_shape) == 3)
    source = importlib.resources.files("aevb.apps.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(source).render(
        summary=summary,
        seen=seen,
        untrusted_above=UNTRUSTED_ABOVE,
        active_above=ACTIVE_ABOVE,
        **_story(run),
        **shown,
    )
    write_atomically(path, page.encode(errors="replace"))  # a file name may hold what UTF-8 does not


def _check(
    test: Tensor | SparseRows, labels: Tensor | None, image_shape: tuple[int, ...] | None,
    columns: Sequence[str] | None, classes: Sequence[str], behind: int,
) -> None:  # fmt: skip
    if test.ndim < 2 or not len(test):
        raise InputError(f"`test` must be (N, P) with at least one row; got shape {tuple(test.shape)}. Give the rows.")
    width = test[:1].numel() - behind
    if labels is not None and labels.shape != test.shape[:1]:
        raise InputError(
            f"`labels` must be ({len(test)},), one a row; got shape {tuple(labels.shape)}. Match the rows."
        )
    if labels is not None and classes and int(labels.nan_to_num(-1.0).max()) >= len(classes):
        raise InputError(
            f"`classes` must name every label, 0 to {int(labels.nan_to_num(-1.0).max())}; got {len(classes)} names. "
            "Give one for each."
        )
    if image_shape is not None and math.prod(image_shape) != width:
        raise InputError(
            f"`image_shape` {tuple(image_shape)} needs rows of {math.prod(image_shape)} pixels; `test` has {width}. "
            "Give the images' height and width, behind a 3 for colours, or None for a table."
        )
    if columns is not None and len(columns) != width:
        raise InputError(f"`columns` must have {width} names, one a column; got {len(columns)}. Name every column.")


def _story(run: Run) -> dict[str, Any]:
    """What was trained, on what and how, as tables."""
    factors = [
        (f"{side}({key})", type(net.conditional(node)).__name__)
        for side, net in (("p", run.vae.p), ("q", run.vae.q))
        for node, key in zip(net.nodes, net.keys, strict=True)
    ]
    last = run.history[-1] if run.history else {}
    story = [
        ("parameters", f"{sum(p.numel() for p in run.vae.parameters()):,}"),
        ("training steps", f"{last['step']:,}" if "step" in last else "unknown"),
        ("training time", f"{last['seconds']:.1f} s" if "seconds" in last else "unknown"),
        *([("saved in", run.path.name)] if run.path else []),
    ]
    return {
        "model": factors + story,
        "tables": {
            "Data": list(_flat({name: value for name, value in run.data.items() if name != "command"})),
            "Model configuration": list(_flat(run.vae.config.to_json())) if run.vae.config else [],
            "Training configuration": list(_flat(run.config.to_json())),
        },
        "modules": str(run.vae),
    }


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        elif value is not None and value != []:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
