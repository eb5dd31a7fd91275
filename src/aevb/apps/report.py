r"""One page of HTML that shows a run: figures of its `Summary`, training curves, latents, reconstructions, samples.

The page is one file that fetches nothing. A reconstruction is the mean of :math:`p(x | z)` at :math:`z = E_q[z | x]`; a
sample starts from :math:`z \sim p(z)`. Here the pictures are drawn; what is said of them stands in `report.html`.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aevb.apps.summary import ACTIVE_ABOVE, UNTRUSTED_ABOVE, Summary
from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import evaluating, prepare, terms
from aevb.checkpoint import Run, write_atomically
from aevb.config import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_report"]

Array = NDArray[np.float64]

_POINTS, _ENTRIES, _DIMS, _COLUMNS = 5000, 10_000_000, 64, 12
"""Most rows, numbers in them, latent dimensions and columns of a table that are drawn."""
_FEWEST = 3
"""Rows, and values in a column, below which nothing is plotted."""
_TILES, _SAMPLES, _TABLE_DRAWS = 20, 40, 2000
"""Images reconstructed, images sampled, rows sampled to compare columns with."""

# Okabe and Ito (2008) for the few, Tol's "muted" for the many: told apart by the colour-blind.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#9aa1ab"
_CLASSES = "#332288 #88ccee #117733 #ddcc77 #cc6677 #aa4499 #44aa99 #999933 #882255 #000000".split()
_MARKERS = "os^DvP<X>*"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": "#6b7280", "axes.grid": True, "axes.spines.right": False,
    "axes.spines.top": False, "figure.constrained_layout.use": True, "font.size": 10, "grid.color": "#e5e7eb",
    "legend.fontsize": 9, "legend.frameon": False, "savefig.dpi": 200, "svg.hashsalt": "aevb",
    "xtick.labelsize": 9, "ytick.labelsize": 9,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Picture:
    title: str
    alt: str
    note: str  # what the caption says of these data
    uri: str
    width: int  # CSS pixels
    height: int


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the model makes of the rows that are drawn, in the data's own units."""

    x: Array  # (N, P), NaN where missing
    total: int  # rows that the N were taken from
    labels: Array | None  # (N,)
    node: str | None  # the latent node shown, None if there is none
    codes: Array  # (N, D) its posterior means
    kl: Array  # (G,) its KL, nats, mean over the rows
    reconstruction: Array  # (N, P)
    samples: Array  # (M, P) draws of x
    sample_means: Array  # (M, P) mean of p(x | z) at the z of those draws


def write_report(
    run: Run, summary: Summary, path: Path, *, test: Tensor, labels: Tensor | None = None,
    image_shape: tuple[int, int] | None = None, columns: Sequence[str] | None = None, maximum: float | None = None,
    seed: int = 0,
) -> None:  # fmt: skip
    """Write the report of a run to one HTML file, whole or not at all.

    Args:
        run: Trained model with its history.
        summary: Its evaluation; every figure is printed as it stands there.
        path: File to write; one that exists is replaced.
        test: Rows of the node `x` that were evaluated, `(N, P)`, NaN for missing; at most 5000 are drawn.
        labels: Classes `(N,)` to colour the latent space by; negative or NaN where unknown.
        image_shape: Height and width, if rows are images; else they are shown as a table's columns.
        columns: Names of the P columns.
        maximum: Pixel value shown as full ink; the largest test pixel if None.
        seed: Key of the samples; torch's own generator is not moved.

    Raises:
        InputError: For arguments that do not fit each other, rows the model cannot take, a missing package, or a file
            that cannot be written; what was there before is then untouched.

    Example:
        >>> import aevb, tempfile
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
    _check(test, labels, image_shape, columns)
    seen = _look(run.vae, test, labels, _TABLE_DRAWS if image_shape is None else _SAMPLES, seed)
    with style.context(["default", _STYLE]):
        pictures = _curves(run) | _rise(summary) | _usage(summary, seen) | _map(seen)
        pictures |= _columns(seen, columns) if image_shape is None else _images(seen, image_shape, maximum)
    source = importlib.resources.files("aevb.apps").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(source).render(
        summary=summary,
        seen=seen,
        untrusted_above=UNTRUSTED_ABOVE,
        active_above=ACTIVE_ABOVE,
        **_story(run),
        **pictures,
    )
    write_atomically(path, page.encode(errors="replace"))  # a file name may hold what UTF-8 does not


def _check(
    test: Tensor, labels: Tensor | None, image_shape: tuple[int, int] | None, columns: Sequence[str] | None
) -> None:
    if test.ndim < 2 or not len(test):
        raise InputError(f"`test` must be (N, P) with at least one row; got shape {tuple(test.shape)}. Give the rows.")
    width = test[0].numel()
    if labels is not None and labels.shape != test.shape[:1]:
        raise InputError(
            f"`labels` must be ({len(test)},), one a row; got shape {tuple(labels.shape)}. Match the rows."
        )
    if image_shape is not None and math.prod(image_shape) != width:
        raise InputError(
            f"`image_shape` {tuple(image_shape)} needs rows of {math.prod(image_shape)} pixels; `test` has {width}. "
            "Give the images' height and width, or None for a table."
        )
    if columns is not None and len(columns) != width:
        raise InputError(f"`columns` must have {width} names, one a column; got {len(columns)}. Name every column.")


def _look(vae: VAE, test: Tensor, labels: Tensor | None, draws: int, seed: int) -> _Seen:
    """Encode, reconstruct and sample."""
    most = max(_TILES, _ENTRIES // test[0].numel())
    kept, draws = _evenly(len(test), min(_POINTS, most)), min(draws, most)
    with torch.random.fork_rng(), evaluating(vae):
        torch.manual_seed(seed)
        x = prepare(vae, {"x": test[kept.to(test.device)]})["x"]
        means = {node: d.mean for node, d in vae.posterior({"x": x}).items()}
        node = next(iter(means), None)
        found, drawn = terms(vae, {"x": x}), vae.p.sample(draws)
        return _Seen(
            x=_array(x),
            total=len(test),
            labels=None if labels is None else _array(labels[kept.to(labels.device)])[:, 0],
            node=node,
            codes=_array(means[node]) if node else np.zeros((len(x), 0)),
            kl=_array(found.node_kl(node).flatten(0, -2).mean(0))[:, 0] if node else np.zeros(0),
            reconstruction=_mean_of_x(vae.p, {"x": x, **means}, len(x)),
            samples=_array(drawn["x"]),
            sample_means=_mean_of_x(vae.p, drawn, draws),
        )


def _mean_of_x(p: BayesNet, values: Mapping[str, Tensor], rows: int) -> Array:
    d = p.distribution("x", values)
    return _array(d.mean.expand(rows, *d.event_shape))


def _array(value: Tensor) -> Array:
    array: Array = value.detach().reshape(len(value), -1).double().cpu().numpy()
    return array


def _evenly(rows: int, most: int) -> Tensor:
    """Positions of at most `most` of `rows`, evenly spaced: data are often sorted."""
    return torch.linspace(0, rows - 1, min(rows, most), dtype=torch.float64).round().long()


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


def _curves(run: Run) -> dict[str, Any]:
    """Bound, reconstruction and KL against the step."""
    series = {
        key: [(r["step"], r[key]) for r in run.history if math.isfinite(r.get(key, math.nan))]
        for key in ("bound", "objective", "validation", "reconstruction", "kl")
    }
    bound = {"bound, training": series["bound"], "ELBO, validation": series["validation"]}
    pairs = [(r.get("objective", math.nan), r.get("bound", math.nan)) for r in run.history]
    if differs := any(abs(aim - own) > 1e-4 * abs(own) for aim, own in pairs):
        bound["objective, training"] = series["objective"]
    best = max(series["validation"], key=lambda point: point[1], default=None)
    curves = {
        "Bound": _curve("Bound", bound, best),
        "Reconstruction": _curve("Reconstruction", {"training": series["reconstruction"]}),
        "KL": _curve("KL", {"training": series["kl"]}),
    }
    return {"curves": {name: curve for name, curve in curves.items() if curve}, "best": best, "differs": differs}


def _curve(
    title: str, lines: Mapping[str, list[tuple[int, float]]], best: tuple[int, float] | None = None
) -> _Picture | None:
    """Lines in a frame that fits all but the first twentieth of the steps."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    figure, axes = _figure()
    looks = (_BLUE, "-"), (_ORANGE, "-."), (_GREEN, "--")
    for (name, points), (colour, dashes) in zip(lines.items(), looks, strict=False):
        marker = "." if len(points) < 30 else ""  # one point is no line
        axes.plot(*np.transpose(points), color=colour, linestyle=dashes, marker=marker, label=name)
    if best:
        axes.plot(*best, "o", color=_ORANGE, markersize=11, fillstyle="none", label="best validation")
    axes.set(xlabel="training steps", ylabel="nats per datum")
    everything = np.array([point for points in lines.values() for point in points])
    settled = everything[everything[:, 0] >= everything[:, 0].max() / 20, 1]
    margin = 0.06 * np.ptp(settled) or 0.5
    low, high = settled.min() - margin, settled.max() + margin
    axes.set_ylim(low, high)
    outside = int(((everything[:, 1] < low) | (everything[:, 1] > high)).sum())
    if len(lines) > 1 or best:
        figure.legend(loc="outside upper center", ncols=2)
    ends = "; ".join(f"{name} from {points[0][1]:.1f} to {points[-1][1]:.1f} nats" for name, points in lines.items())
    note = f"Early points outside the frame: {outside}." if outside else ""
    return _picture(figure, title, f"{title} against training steps: {ends}.", note)


def _rise(summary: Summary) -> dict[str, Any]:
    """The bound against the number of draws."""
    if len(summary.curve) < 2:
        return {"rise": None}
    counts, bounds = np.array(summary.curve).T
    figure, axes = _figure()
    axes.plot(counts, bounds, ".-", color=_BLUE)
    axes.set(xscale="log", xlabel="draws of z for each row", ylabel="nats per row")
    told = f"The bound rises from {bounds[0]:.2f} nats with one draw to {bounds[-1]:.2f} with {int(counts[-1])}."
    return {"rise": _picture(figure, "Bound by draws", told)}


def _usage(summary: Summary, seen: _Seen) -> dict[str, Any]:
    """KL and spread of the posterior mean by dimension, in one order."""
    spread = np.array(summary.latent_spread.get(seen.node or "", []))
    if not len(spread):
        return {"usage": {}, "splits": False, "others": [], "more": 0}
    splits = len(seen.kl) == len(spread)
    order = np.argsort(-(seen.kl if splits else spread), kind="stable")[:_DIMS]
    pictures = {"KL": _by_dimension(seen.node, seen.kl[order], spread[order], order, log=False)} if splits else {}
    pictures["spread"] = _by_dimension(seen.node, spread[order], spread[order], order, log=True)
    others = [node for node in summary.latent_spread if node != seen.node]
    return {"usage": pictures, "splits": splits, "others": others, "more": len(spread) - len(order)}


def _by_dimension(node: str | None, heights: Array, spread: Array, order: NDArray[np.intp], *, log: bool) -> _Picture:
    figure, axes = _figure()
    places, active = np.arange(len(order)), spread > ACTIVE_ABOVE
    for chosen, label, colour in ((active, "active", _BLUE), (~active, "not active", _GREY)):
        if not chosen.any():
            continue
        if log:  # points: on a logarithmic axis the length of a bar means nothing
            fill = "full" if label == "active" else "none"
            axes.plot(places[chosen], heights[chosen], "o", color=colour, fillstyle=fill, label=label)
        else:
            axes.bar(places[chosen], heights[chosen], color=colour, label=label)
    if log:
        axes.axhline(ACTIVE_ABOVE, color=_ORANGE, linestyle="--", label=f"threshold {ACTIVE_ABOVE}")
        shown = np.append(heights[heights > 0], ACTIVE_ABOVE)
        axes.set(yscale="log", ylim=(shown.min() / 2, shown.max() * 2))
    axes.set_xticks(places, [str(i) for i in order], fontsize=7, rotation=90 if len(order) > 12 else 0)
    axes.set_xlim(-0.8, max(len(order), 10) - 0.2)
    axes.grid(visible=False, axis="x")
    what = f"variance over rows of E[{node}|x]" if log else "KL in nats per datum"
    axes.set(xlabel=f"dimension of {node}", ylabel=what)
    figure.legend(loc="outside upper center", ncols=3)
    title = "Spread of the posterior mean" if log else "KL by dimension"
    return _picture(figure, title, f"{what}, by dimension of {node}: {heights.min():.3g} to {heights.max():.3g}.")


def _images(seen: _Seen, shape: tuple[int, int], maximum: float | None) -> dict[str, Any]:
    """Test images above their reconstructions, and samples."""
    known = seen.x[np.isfinite(seen.x)]
    low = known.min(initial=0.0)
    limits = low, max(known.max(initial=low), low + 1e-9) if maximum is None else maximum
    pictures = {}
    if seen.node:
        kept = _evenly(len(seen.x), _TILES).numpy()
        pairs = {"real": seen.x[kept], "rebuilt": seen.reconstruction[kept]}
        told = f"{len(kept)} images, each above its reconstruction by the model."
        pictures["rebuilt"] = _mosaic("Real and reconstructed", pairs, shape, limits, told)
    made = {"": seen.sample_means if seen.node else seen.samples}
    pictures["drawn"] = _mosaic("Samples", made, shape, limits, f"{_SAMPLES} images made by the model.")
    return {"images": pictures, "columns": {}, "holes": bool(np.isnan(seen.x).any())}


def _mosaic(
    title: str, kinds: Mapping[str, Array], shape: tuple[int, int], limits: tuple[float, float], alt: str
) -> _Picture:
    """Images in one array, kind above kind; frames lie below the colour scale, missing pixels are NaN."""
    import matplotlib

    zoom = max(1, -(-32 // min(shape)))
    height, width = shape[0] * zoom + 2, shape[1] * zoom + 2
    across = min(10, max(2, round(10 * shape[0] / shape[1])))
    strips = math.ceil(len(next(iter(kinds.values()))) / across) * len(kinds)
    canvas = np.full((strips * height, across * width), limits[0])
    for kind, images in enumerate(kinds.values()):
        for i, image in enumerate(images):
            top, left = (i // across * len(kinds) + kind) * height, i % across * width
            tile = np.clip(image, *limits).reshape(shape).repeat(zoom, 0).repeat(zoom, 1)
            canvas[top : top + height, left : left + width] = np.pad(
                tile, 1, constant_values=2 * limits[0] - limits[1] - 1
            )
    figure, axes = _figure(0.6 + 4.2 * canvas.shape[0] / canvas.shape[1])
    colours = matplotlib.colormaps["gray_r"].with_extremes(under="#b9c6da", bad="#e69f00")
    masked = np.ma.masked_array(canvas, np.isnan(canvas))
    shown = axes.imshow(masked, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    middles = (np.arange(strips) + 0.5) * height
    axes.set_yticks(middles, [*kinds] * (strips // len(kinds)), rotation=90, va="center", fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.15, aspect=50, pad=0.02)
    bar.set_label("pixel value, in the data's units", fontsize=9)
    return _picture(figure, title, alt)


def _columns(seen: _Seen, names: Sequence[str] | None) -> dict[str, Any]:
    """Reconstruction against value, and quantiles of samples against those of the data, column by column."""
    chosen = np.flatnonzero(np.isfinite(seen.x).sum(0) >= _FEWEST)[:_COLUMNS]
    rebuilt, drawn = [], []
    for j in chosen.tolist():
        name = names[j] if names else f"column {j}"
        known = np.isfinite(seen.x[:, j])
        real, made, gone = seen.x[known, j], seen.reconstruction[known, j], int((~known).sum())
        note = f"{len(real)} values" + (f", {gone} missing" if gone else "")
        levels = np.linspace(0.01, 0.99, min(99, len(real)))
        quantiles = np.quantile(real, levels), np.quantile(seen.samples[:, j], levels)
        rebuilt.append(_against(name, real, made, "real", "reconstructed", note))
        drawn.append(_against(name, *quantiles, "real quantile", "model's quantile", note))
    return {"images": {}, "columns": ({"rebuilt": rebuilt} if seen.node else {}) | {"drawn": drawn}}


def _against(name: str, across: Array, up: Array, xlabel: str, ylabel: str, note: str) -> _Picture:
    figure, axes = _figure(2.3, 2.5)
    # One scale for both, or a cloud that hardly varies would be drawn as tall as it is wide.
    low, high = min(across.min(), up.min()), max(across.max(), up.max())
    margin = 0.05 * (high - low) or 0.5
    axes.axline((low, low), slope=1, color=_GREY, linewidth=1)
    axes.plot(across, up, "o", color=_BLUE, markersize=3, alpha=0.5, markeredgewidth=0, rasterized=True)
    limits = (low - margin, high + margin)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=limits, ylim=limits, aspect="equal")
    axes.locator_params(nbins=4)
    return _picture(figure, name, f"Column {name}: {ylabel} against {xlabel}, {note}.", note)


def _map(seen: _Seen) -> dict[str, Any]:
    """Posterior means in the plane."""
    rows, width = seen.codes.shape
    groups = _groups(seen.labels, rows)
    if not width or rows < _FEWEST:
        return {"map": None, "labelled": False}
    figure, axes = _figure(4.2)
    if width == 1:
        parts = [seen.codes[chosen, 0] for _, chosen, _, _ in groups]
        xlabel, ylabel = f"E[{seen.node}|x]", "rows"
        axes.hist(parts, 30, stacked=True, color=[c for _, _, c, _ in groups], label=[n for n, _, _, _ in groups])
    else:
        points, xlabel, ylabel = _plane(seen)
        for name, chosen, colour, marker in groups:
            x, y = points[chosen].T
            axes.plot(x, y, marker, color=colour, markersize=5, markeredgewidth=0, label=name, rasterized=True)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=6, title="label", handletextpad=0.1, columnspacing=1)
    return {
        "map": _picture(figure, "Posterior means", f"{ylabel} against {xlabel}, {rows} rows."),
        "labelled": len(groups) > 1,
    }


def _plane(seen: _Seen) -> tuple[Array, str, str]:
    """Two dimensions as they are; more by their first two principal components, with their share of the variance."""
    if seen.codes.shape[1] == 2:
        return seen.codes, f"E[{seen.node}[0]|x]", f"E[{seen.node}[1]|x]"
    centred = seen.codes - seen.codes.mean(0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(1)])
    shares = np.square(scales[:2]) / max(np.square(scales).sum(), 1e-300)
    first, second = (f"principal component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares))
    return centred @ (directions[:2] * signs[:, None]).T, first, second


def _groups(labels: Array | None, rows: int) -> list[tuple[str, NDArray[np.bool_], str, str]]:
    """Name, rows, colour and marker by label: the ten most frequent, the others, the unknown."""
    if labels is None:
        return [("rows", np.ones(rows, dtype=bool), _BLUE, "o")]
    known = labels >= 0  # NaN is not
    values, counts = np.unique(labels[known], return_counts=True)
    kept = sorted(values[np.argsort(-counts, kind="stable")][: len(_CLASSES)])
    groups = [(f"{v:g}", labels == v, _CLASSES[i], _MARKERS[i]) for i, v in enumerate(kept)]
    groups += [("others", known & ~np.isin(labels, kept), _GREY, "."), ("unknown", ~known, "#d1d5db", ".")]
    return [group for group in groups if group[1].any()]


def _figure(height: float = 3.2, width: float = 4.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _picture(figure: Figure, title: str, alt: str, note: str = "") -> _Picture:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    width, height = (round(96 * float(inches)) for inches in figure.get_size_inches())
    # As an image of its own the drawing's ids cannot clash with another's, and the browser runs nothing in it.
    uri = "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
    return _Picture(title=title, alt=alt, note=note, uri=uri, width=width, height=height)
