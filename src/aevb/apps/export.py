"""A run for others: encoder, decoder and scorer as files that other programs run, compared with the run on its rows.

Or the model whole, which `aevb.apps.card` writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch._dynamo.exc
import torch.fx.experimental._config
from torch import Tensor, nn

from aevb.apps.card import save_pretrained
from aevb.apps.runs import batch_of, data_of, open_run, test_rows, values_of
from aevb.apps.summary import given_to, quantity
from aevb.bayesnet import VAE
from aevb.bounds import evaluating, prepare, terms
from aevb.checkpoint import write_atomically
from aevb.config import InputError
from aevb.data.files import shown
from aevb.distributions import Given

__all__ = ["Format", "export_run"]

Format = Literal["torch", "onnx", "pretrained"]
"""`torch.export`'s programs, which `torch.export.load` opens without this library; ONNX models; the model whole."""

_SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}
_ROWS, _DRAWS = 20, 8
"""Rows that the networks are traced with, and draws a row: files take any number of both."""

_COMPARED = 1000
"""Most rows that files are compared with the run on."""

_ROUNDING = 1e-3
"""Largest difference from the run's figures that is taken for rounding, of one plus the largest of them."""

_MOMENTS = ("mean", "std")

_tracer_options: Any = torch.fx.experimental._config.patch  # type: ignore[attr-defined]
"""Torch's own, without a public name."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One network, what it takes and what it gives."""

    net: nn.Module
    inputs: dict[str, str]  # name to what it is
    outputs: dict[str, str]
    given: tuple[Tensor, ...]  # an example of each input
    axes: tuple[dict[int, str], ...]  # of each input those that may have any length


def export_run(
    folder: Path, out: Path, format: Format, seed: int, moved: str | None, license: str | None,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the parts of a run, or the model whole, into a new folder, and tell of each in a line.

    Each file is opened again and compared with the run's own model on `rows`; a part that the format cannot hold, or
    that is further off than rounding, is left out and named. `export.json` tells what each takes and gives, which
    columns of the data they are, and how far it was off.

    Args:
        folder: Of the run, whose rows held out are compared.
        out: Folder, which must not be there; nothing is left of it if nothing could be written.
        format: Of the files.
        seed: Of the noise that the scorers are compared with.
        moved: Where the data are now.
        license: Of a pretrained model.
        tell: Takes a line on each part when it is done.

    Raises:
        InputError: If `out` exists, ONNX's packages are missing, no part could be written, or an argument is not one of
            this format's.
    """
    if format == "pretrained":
        if seed or moved is not None:
            raise InputError("`--seed` and `--data` are for parts that are compared with the run. Leave them out.")
        tell(f"{save_pretrained(folder, out, license=license)}: model, configuration and card (README.md)")
        if batch := batch_of(open_run(folder)):
            tell(
                f"config.json and the card hold the names of all {len(batch)} batches ({shown(batch.column)}) and "
                "their numbers of rows"
            )
        return
    if license is not None:
        raise InputError(f"`--license` stands in the card of a pretrained model; {format} has none. Leave it out.")
    run = open_run(folder)
    if run.vae.config is not None and run.vae.config.target:
        raise InputError(
            "`aevb export` writes networks from x alone, and this run has a target beside it. Use --format pretrained, "
            "or use the library."
        )
    _, rows, _ = test_rows(run, data_of(run, moved))
    if out.exists():
        raise InputError(f"`{out}` exists already, and is not overwritten. Choose another --out.")
    _check_packages(format)
    record: dict[str, Any] = {"format": format, "made": run.made, "parts": {}, "left_out": {}}
    record |= {name: run.data.get(name) for name in ("columns", "kept", "dropped", "image_shape", "binarize")}
    record |= {name: run.data[name] for name in ("batch",) if name in run.data}
    record["schema"] = run.data["command"].get("schema")
    out.mkdir(parents=True)
    try:
        with evaluating(run.vae):
            values = prepare(run.vae, values_of(run, rows[:_COMPARED]))
            for name, part in _parts(run.vae, values, seed).items():
                _write(name, part, out, record, tell)
        if not record["parts"]:
            raise InputError(f"Nothing of this model can be written as {format}. Try --format torch.")
        write_atomically(out / "export.json", (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    except BaseException:
        shutil.rmtree(out)
        raise


def _write(name: str, part: _Part, out: Path, record: dict[str, Any], tell: Callable[[str], None]) -> None:
    """One part as a file, with its entry in the record; or why it is left out."""
    format: Format = record["format"]
    path = out / f"{name}{_SUFFIX[format]}"
    try:
        program, least = _traced(part)
        write_atomically(path, _content(program, part, format))
        away = _furthest(part, path, format)
    except OSError:
        raise
    except Exception as error:  # tracers and runtimes raise their own
        path.unlink(missing_ok=True)
        record["left_out"][name] = reason = _reason(error, format)
        tell(f"{name}: left out, {reason}")
        return
    rows = part.given[0].shape[0]
    record["parts"][name] = {
        "file": path.name, "inputs": part.inputs, "outputs": part.outputs, "least_rows_and_draws": least,
        "compared_rows": rows, "largest_difference": away,
    }  # fmt: skip
    shown = ", ".join(f"{value:.1e} in {output}" for output, value in away.items())
    tell(f"{path}: {', '.join(part.inputs)} to {', '.join(part.outputs)}; on {rows} rows at most {shown} off")


def _check_packages(format: Format) -> None:
    if format == "onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as missing:
            raise InputError(f"`--format onnx` needs {missing.name}. Install it: pip install 'aevb[onnx]'.") from None


def _parts(vae: VAE, values: dict[str, Tensor], seed: int) -> dict[str, _Part]:
    """The networks of a model that `aevb.build_vae` made, at the nodes of some rows: x, and what stands beside it."""
    holes, x = _sees_holes(vae), values["x"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = terms(vae, values, 1, kl="sampled", holes=holes).values
    parents = {node: known[node].reshape(len(x), -1) for node in vae.p.parents["x"]}
    latent = {node: known[node].shape[-1] for node in vae.latents(values)}
    beside = {node: part.shape[-1] for node, part in parents.items()}
    seen = {"x": f"(N, {x.shape[1]})" + (", NaN for missing" if holes else "")}
    context = {name: f"(N, {values[name].shape[1]}), one-hot" for name in vae.given}
    brought = tuple(values[name] for name in vae.given)
    on = ", ".join(seen | context)
    moments = {
        f"{kind}_{node}": f"(N, {width}), of q({node} | {on})" for node, width in latent.items() for kind in _MOMENTS
    }
    total = sum(latent.values())
    noise = torch.randn(_DRAWS, len(x), total, generator=torch.Generator().manual_seed(seed)).to(x)
    rows, of = {0: "rows"}, quantity(given_to(vae), False)
    computed = {node: width for node, width in beside.items() if node not in latent | context}
    moments |= {node: f"(N, {width}), computed from x" for node, width in computed.items()}
    return {
        "encoder": _Part(
            net=_Encoder(vae, tuple(latent), tuple(computed)),
            inputs=seen | context,
            outputs=moments,
            given=(x, *brought),
            axes=(rows, *(rows for _ in brought)),
        ),
        "decoder": _Part(
            net=_Decoder(vae, beside),
            inputs={"z": f"(N, {sum(beside.values())}): {_side_by_side(beside)}"},
            outputs={"mean_x": f"(N, {x.shape[1]}), E[x | {', '.join(beside)}]"},
            given=(torch.cat(list(parents.values()), 1),),
            axes=(rows,),
        ),
        "scorer": _Part(
            net=_Scorer(vae, latent, holes),
            inputs=seen | {"noise": f"(K, N, {total}), standard normal: {_side_by_side(latent)}"} | context,
            outputs={"log_prob": f"(N,), log {of} in nats by importance sampling with K draws"},
            given=(x, noise, *brought),
            axes=(rows, {0: "draws", 1: "rows"}, *(rows for _ in brought)),
        ),
    }


def _nodes(x: Tensor, batch: Tensor | None) -> dict[str, Tensor]:
    return {"x": x} if batch is None else {"x": x, "batch": batch}


def _side_by_side(widths: dict[str, int]) -> str:
    return ", ".join(f"{node} ({width})" for node, width in widths.items())


def _sees_holes(vae: VAE) -> tuple[str, ...]:
    """The nodes that may have missing entries."""
    try:
        vae.require_sight(["x"])
    except InputError:
        return ()
    return ("x",)


def _traced(part: _Part, least: int = 1) -> tuple[torch.export.ExportedProgram, int]:
    """One graph of a part for any lengths of its axes, or where that cannot be for all from two; the least one."""
    given = tuple(_cut(each, axes) for each, axes in zip(part.given, part.axes, strict=True))
    sizes = {name: torch.export.Dim(name, min=least) for axes in part.axes for name in axes.values()}
    shapes = tuple({axis: sizes[name] for axis, name in axes.items()} for axes in part.axes)
    try:
        # Without the option a length of one is always a case of its own.
        with _tracer_options(backed_size_oblivious=True), _quiet():
            return torch.export.export(part.net, given, dynamic_shapes=shapes, strict=False), least
    except torch._dynamo.exc.UserError:  # a product that broadcasts
        if least > 1:
            raise
        return _traced(part, least=2)


def _cut(example: Tensor, axes: dict[int, str]) -> Tensor:
    """No more rows than a trace needs, and two at least: a length of one would be taken for a constant."""
    (axis,) = (axis for axis, name in axes.items() if name == "rows")
    few = example.narrow(axis, 0, min(_ROWS, example.shape[axis]))
    return few if few.shape[axis] > 1 else torch.cat([few, few], axis)


def _content(program: torch.export.ExportedProgram, part: _Part, format: Format) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        if format == "torch":
            torch.export.save(program, buffer)
        else:
            made = torch.onnx.export(
                program, input_names=list(part.inputs), output_names=list(part.outputs), dynamo=True, verbose=False
            )
            assert made is not None
            buffer.write(made.model_proto.SerializeToString())
    return buffer.getvalue()


def _furthest(part: _Part, path: Path, format: Format) -> dict[str, float]:
    """Largest difference of each output of the file, opened anew, from the run's own, on all the rows at hand."""
    wanted = part.net(*part.given)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    if format == "torch":
        found = torch.export.load(path).module()(*part.given)
        found = found if isinstance(found, tuple | list) else (found,)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = {name: each.numpy() for name, each in zip(part.inputs, part.given, strict=True)}
        found = [torch.from_numpy(each) for each in session.run(list(part.outputs), given)]
    away = {}
    for name, one, other in zip(part.outputs, found, wanted, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())  # infinities too
        gap, size = torch.where(same, 0.0, (one - other).abs()), torch.where(other.isfinite(), other.abs(), 0.0)
        away[name] = float(gap.max())
        if not away[name] <= _ROUNDING * (1 + float(size.max())):
            raise InputError(f"its {name} is {away[name]:g} away from the run's own")
    return away


def _reason(error: Exception, format: Format) -> str:
    """Why a part could not be written, in one line."""
    if isinstance(error, InputError):
        return str(error)
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    text = str(causes[-1]) or type(causes[-1]).__name__
    return f"which {format} cannot hold: " + text.strip().splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracers say of themselves."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@final
class _Encoder(nn.Module):
    """Mean and standard deviation of q of each latent node, at the means of those above; then what is computed."""

    def __init__(self, vae: VAE, nodes: tuple[str, ...], computed: tuple[str, ...]) -> None:
        super().__init__()
        self.vae, self.nodes, self.computed = vae, nodes, computed

    def forward(self, x: Tensor, batch: Tensor | None = None) -> tuple[Tensor, ...]:
        known, found = _nodes(x, batch), []
        seen = ", ".join(known)
        for node in self.vae.drawing_order(self.nodes):
            d = self.vae.home(node).distribution(node, known)
            try:
                known[node] = d.mean
                found += [d.mean, d.stddev] if node in self.nodes else []
            except NotImplementedError:
                raise InputError(f"q({node} | {seen}) is a flow, which has no moments in closed form") from None
        return (*found, *(known[node] for node in self.computed))


@final
class _Decoder(nn.Module):
    """E[x | z] of latent nodes side by side."""

    def __init__(self, vae: VAE, widths: dict[str, int]) -> None:
        super().__init__()
        self.vae, self.widths = vae, widths

    def forward(self, z: Tensor) -> Tensor:
        values = dict(zip(self.widths, z.split(list(self.widths.values()), dim=-1), strict=True))
        return self.vae.p.distribution("x", values).mean


@final
class _Scorer(nn.Module):
    r"""Log of the mean of p(x, z_k) / q(z_k | x), z_k made of x and the noise."""

    def __init__(self, vae: VAE, widths: dict[str, int], holes: tuple[str, ...]) -> None:
        super().__init__()
        self.vae, self.widths, self.holes = vae, widths, holes

    def forward(self, x: Tensor, noise: Tensor, batch: Tensor | None = None) -> Tensor:
        each = dict(zip(self.widths, noise.split(list(self.widths.values()), dim=-1), strict=True))
        found = terms(
            self.vae, _nodes(x, batch), noise.shape[0], kl="sampled", holes=self.holes,
            noise=lambda node: Given([each[node]]),
        )  # fmt: skip
        log_w = found.log_weights()
        # K counted by the graph: Python would write the example's into it.
        return log_w.logsumexp(0) - torch.ones_like(log_w).sum(0).log()
