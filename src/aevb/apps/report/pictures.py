"""Pictures of a run itself: training, latents, reconstructions and samples, the map of the latent space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aevb._shapes import evenly
from aevb.apps.report.drawing import BLUE, CLASSES, GREEN, GREY, MARKERS, ORANGE, Array, Picture, blank, picture
from aevb.apps.report.seen import SAMPLES, TILES, Seen
from aevb.apps.summary import ACTIVE_ABOVE, Summary
from aevb.checkpoint import Run
from aevb.data.files import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["columns", "curves", "images", "latent_map", "rise", "usage"]

_DIMS, _COLUMNS = 64, 12
"""Most latent dimensions and columns of a table that are drawn."""
_FEWEST, _LONGEST = 3, 20
"""Rows, and values in a column, below which nothing is plotted; letters of a class's name."""


def curves(run: Run) -> dict[str, Any]:
    """Bound, reconstruction and KL against the step."""
    series = {
        key: [(r["step"], r[key]) for r in run.history if math.isfinite(r.get(key, math.nan))]
        for key in ("bound", "objective", "validation", "reconstruction", "kl")
    }
    judged = "objective" if "label_weight" in run.data else "bound"  # see `with_classifier`
    bound = {"bound, training": series["bound"], f"{judged}, validation": series["validation"]}
    pairs = [(r.get("objective", math.nan), r.get("bound", math.nan)) for r in run.history]
    if differs := any(abs(aim - own) > 1e-4 * abs(own) for aim, own in pairs):
        bound["objective, training"] = series["objective"]
    best = max(series["validation"], key=lambda point: point[1], default=None)
    curves = {
        "Bound": _curve("Bound", bound, best),
        "Reconstruction": _curve("Reconstruction", {"training": series["reconstruction"]}),
        "KL": _curve("KL", {"training": series["kl"]}),
    }
    shown = {name: curve for name, curve in curves.items() if curve}
    return {"curves": shown, "best": best, "judged": judged, "differs": differs}


def _curve(
    title: str, lines: Mapping[str, list[tuple[int, float]]], best: tuple[int, float] | None = None
) -> Picture | None:
    """Lines in a frame that fits all but the first twentieth of the steps."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    figure, axes = blank()
    looks = (BLUE, "-"), (ORANGE, "-."), (GREEN, "--")
    for (name, points), (colour, dashes) in zip(lines.items(), looks, strict=False):
        marker = "." if len(points) < 30 else ""  # one point is no line
        axes.plot(*np.transpose(points), color=colour, linestyle=dashes, marker=marker, label=name)
    if best:
        axes.plot(*best, "o", color=ORANGE, markersize=11, fillstyle="none", label="best validation")
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
    return picture(figure, title, f"{title} against training steps: {ends}.", note)


def rise(summary: Summary) -> dict[str, Any]:
    """The bound against the number of draws."""
    if len(summary.curve) < 2:
        return {"rise": None}
    counts, bounds = np.array(summary.curve).T
    figure, axes = blank()
    axes.plot(counts, bounds, ".-", color=BLUE)
    axes.set(xscale="log", xlabel="draws of z for each row", ylabel="nats per row")
    told = f"The bound rises from {bounds[0]:.2f} nats with one draw to {bounds[-1]:.2f} with {int(counts[-1])}."
    return {"rise": picture(figure, "Bound by draws", told)}


def usage(summary: Summary, seen: Seen) -> dict[str, Any]:
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


def _by_dimension(node: str | None, heights: Array, spread: Array, order: NDArray[np.intp], *, log: bool) -> Picture:
    figure, axes = blank()
    places, active = np.arange(len(order)), spread > ACTIVE_ABOVE
    for chosen, label, colour in ((active, "active", BLUE), (~active, "not active", GREY)):
        if not chosen.any():
            continue
        if log:  # points: on a logarithmic axis the length of a bar means nothing
            fill = "full" if label == "active" else "none"
            axes.plot(places[chosen], heights[chosen], "o", color=colour, fillstyle=fill, label=label)
        else:
            axes.bar(places[chosen], heights[chosen], color=colour, label=label)
    if log:
        axes.axhline(ACTIVE_ABOVE, color=ORANGE, linestyle="--", label=f"threshold {ACTIVE_ABOVE}")
        shown = np.append(heights[heights > 0], ACTIVE_ABOVE)
        axes.set(yscale="log", ylim=(shown.min() / 2, shown.max() * 2))
    axes.set_xticks(places, [str(i) for i in order], fontsize=7, rotation=90 if len(order) > 12 else 0)
    axes.set_xlim(-0.8, max(len(order), 10) - 0.2)
    axes.grid(visible=False, axis="x")
    what = f"variance over rows of E[{node}|x]" if log else "KL in nats per datum"
    axes.set(xlabel=f"dimension of {node}", ylabel=what)
    figure.legend(loc="outside upper center", ncols=3)
    title = "Spread of the posterior mean" if log else "KL by dimension"
    return picture(figure, title, f"{what}, by dimension of {node}: {heights.min():.3g} to {heights.max():.3g}.")


def images(seen: Seen, shape: tuple[int, ...], maximum: float | None, *, light: bool) -> dict[str, Any]:
    """Test images above their reconstructions, and samples; a high value is light, or ink."""
    known = seen.x[np.isfinite(seen.x)]
    low = known.min(initial=0.0)
    limits = low, max(known.max(initial=low), low + 1e-9) if maximum is None else maximum
    pictures = {}
    if seen.node:
        kept = evenly(len(seen.x), TILES).numpy()
        pairs = {"real": seen.x[kept], "rebuilt": seen.reconstruction[kept]}
        told = f"{len(kept)} images, each above its reconstruction by the model."
        pictures["rebuilt"] = _mosaic("Real and reconstructed", pairs, shape, limits, light, told)
    made = {"": seen.sample_means if seen.node else seen.samples}
    pictures["drawn"] = _mosaic("Samples", made, shape, limits, light, f"{SAMPLES} images made by the model.")
    tones = f"{'Light' if light else 'Dark'} is a high value; the scale is below each picture."
    if len(shape) == 3:
        tones = f"Red, green and blue are shown from {limits[0]:g}, dark, to {limits[1]:g}, light."
    return {"images": pictures, "columns": {}, "tones": tones, "holes": bool(np.isnan(seen.x).any())}


def _mosaic(
    title: str, kinds: Mapping[str, Array], shape: tuple[int, ...], limits: tuple[float, float], light: bool, alt: str
) -> Picture:
    """Images in one array, kind above kind; frames lie below the colour scale, missing pixels are NaN."""
    zoom = max(1, -(-32 // min(shape[-2:])))
    height, width = shape[-2] * zoom + 2, shape[-1] * zoom + 2
    across = min(10, max(2, round(10 * shape[-2] / shape[-1])))
    strips = math.ceil(len(next(iter(kinds.values()))) / across) * len(kinds)
    frame = 2 * limits[0] - limits[1] - 1
    ground = float(limits[1] if light else limits[0])
    canvas = np.full((*shape[:-2], strips * height, across * width), ground)
    for kind, images in enumerate(kinds.values()):
        for i, image in enumerate(images):
            top, left = (i // across * len(kinds) + kind) * height, i % across * width
            tile = np.clip(image, *limits).reshape(shape).repeat(zoom, -2).repeat(zoom, -1)
            margin = [*[(0, 0)] * (len(shape) - 2), (1, 1), (1, 1)]
            canvas[..., top : top + height, left : left + width] = np.pad(tile, margin, constant_values=frame)
    figure, axes = blank((0.2 if len(shape) == 3 else 0.6) + 4.2 * canvas.shape[-2] / canvas.shape[-1])
    if len(shape) == 3:
        axes.imshow(_in_colour(canvas, limits, frame), interpolation="nearest")
    else:
        _in_tones(figure, axes, canvas, limits, light)
    middles = (np.arange(strips) + 0.5) * height
    axes.set_yticks(middles, [*kinds] * (strips // len(kinds)), rotation=90, va="center", fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return picture(figure, title, alt)


_FRAME, _MISSING = "#b9c6da", "#e69f00"


def _in_colour(canvas: Array, limits: tuple[float, float], frame: float) -> Array:
    """Planes `(3, H, W)` as a picture `(H, W, 3)` in [0, 1]; a pixel that lacks one of the three counts as missing."""
    from matplotlib.colors import to_rgb

    lost, edge = np.isnan(canvas).any(0), (canvas == frame).all(0)
    pixels: Array = np.moveaxis((canvas - limits[0]) / (limits[1] - limits[0]), 0, -1)
    pixels[lost], pixels[edge] = to_rgb(_MISSING), to_rgb(_FRAME)
    return pixels


def _in_tones(figure: Figure, axes: Axes, canvas: Array, limits: tuple[float, float], light: bool) -> None:
    """A picture `(H, W)` with its scale."""
    import matplotlib

    colours = matplotlib.colormaps["gray" if light else "gray_r"].with_extremes(under=_FRAME, bad=_MISSING)
    masked = np.ma.masked_array(canvas, np.isnan(canvas))
    shown = axes.imshow(masked, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.15, aspect=50, pad=0.02)
    bar.set_label("pixel value, in the data's units", fontsize=9)


def columns(seen: Seen, names: Sequence[str] | None) -> dict[str, Any]:
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


def _against(name: str, across: Array, up: Array, xlabel: str, ylabel: str, note: str) -> Picture:
    figure, axes = blank(2.3, 2.5)
    # One scale for both, or a cloud that hardly varies would be drawn as tall as it is wide.
    low, high = min(across.min(), up.min()), max(across.max(), up.max())
    margin = 0.05 * (high - low) or 0.5
    axes.axline((low, low), slope=1, color=GREY, linewidth=1)
    axes.plot(across, up, "o", color=BLUE, markersize=3, alpha=0.5, markeredgewidth=0, rasterized=True)
    limits = (low - margin, high + margin)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=limits, ylim=limits, aspect="equal")
    axes.locator_params(nbins=4)
    return picture(figure, name, f"Column {name}: {ylabel} against {xlabel}, {note}.", note)


def latent_map(seen: Seen, classes: Sequence[str] = (), batch: str = "") -> dict[str, Any]:
    """Posterior means in the plane; `classes` are names of the labels 0, 1, ..., which are those of `batch`, if any."""
    rows, width = seen.codes.shape
    groups = _groups(seen.labels, rows, classes)
    if not width or rows < _FEWEST:
        return {"map": None, "labelled": False, "batch": batch}
    figure, axes = blank(4.2)
    if width == 1:
        parts, names = [seen.codes[chosen, 0] for _, chosen, _, _ in groups], [_verbatim(n) for n, _, _, _ in groups]
        xlabel, ylabel = f"E[{seen.node}|x]", "rows"
        axes.hist(parts, 30, stacked=True, color=[c for _, _, c, _ in groups], label=names)
    else:
        points, xlabel, ylabel = _plane(seen)
        for name, chosen, colour, marker in groups:
            x, y = points[chosen].T
            axes.plot(
                x, y, marker, color=colour, markersize=5, markeredgewidth=0, label=_verbatim(name), rasterized=True
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if len(groups) > 1:
        ncols = 6 if max(len(name) for name, _, _, _ in groups) < 8 else 3
        title = _verbatim(batch or "label")
        figure.legend(loc="outside lower center", ncols=ncols, title=title, handletextpad=0.1, columnspacing=1)
    told = f", by {batch or 'label'}: {', '.join(name for name, _, _, _ in groups)}" if len(groups) > 1 else ""
    return {
        "map": picture(figure, "Posterior means", f"{ylabel} against {xlabel}, {rows} rows{told}."),
        "labelled": len(groups) > 1,
        "batch": batch,
    }


def _plane(seen: Seen) -> tuple[Array, str, str]:
    """Two dimensions as they are; more by their first two principal components, with their share of the variance."""
    if seen.codes.shape[1] == 2:
        return seen.codes, f"E[{seen.node}[0]|x]", f"E[{seen.node}[1]|x]"
    centred = seen.codes - seen.codes.mean(0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(1)])
    shares = np.square(scales[:2]) / max(np.square(scales).sum(), 1e-300)
    first, second = (f"principal component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares))
    return centred @ (directions[:2] * signs[:, None]).T, first, second


def _named(label: float, classes: Sequence[str]) -> str:
    """A label by its class's name, if that is known: one line, not endless."""
    if not classes:
        return f"{label:g}"
    name = shown(classes[int(label)])
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1].rstrip() + "…"


def _verbatim(name: str) -> str:
    """A name as matplotlib's legends show it: no formula, and not left out for an underscore in front."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _groups(labels: Array | None, rows: int, classes: Sequence[str]) -> list[tuple[str, NDArray[np.bool_], str, str]]:
    """Name, rows, colour and marker by label: the ten most frequent, the others, the unknown."""
    if labels is None:
        return [("rows", np.ones(rows, dtype=bool), BLUE, "o")]
    known = labels >= 0  # NaN is not
    values, counts = np.unique(labels[known], return_counts=True)
    kept = sorted(values[np.argsort(-counts, kind="stable")][: len(CLASSES)])
    groups = [(_named(v, classes), labels == v, CLASSES[i], MARKERS[i]) for i, v in enumerate(kept)]
    groups += [("others", known & ~np.isin(labels, kept), GREY, "."), ("unknown", ~known, "#d1d5db", ".")]
    return [group for group in groups if group[1].any()]
