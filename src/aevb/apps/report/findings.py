"""Pictures of the deeper diagnoses, drawn from what an evaluation keeps: nothing is computed anew.

What a diagnosis found is said by its `Finding`; a caption here says how to read the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np

from aevb.apps.report.drawing import BLUE, CLASSES, GREY, ORANGE, Array, Picture, blank, grid, picture
from aevb.apps.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["drawn"]

_NAMES = {"own": "q's family", "full": "full covariance", "flow": "flow"}
_NAMED = 6
"""Curves that have a colour and a name of their own."""
_SMALL = {"fontsize": 8, "pad": 3}


def drawn(summary: Summary) -> dict[str, list[Picture]]:
    """The pictures of each finding, by its name."""
    of = {"of": f"log {summary.quantity}"}  # what the captions call it
    return {
        name: [each for draw in _PICTURES.get(name, ()) if (each := draw({**finding.figures, **of})) is not None]
        for name, finding in summary.findings.items()
    }


def _array(values: Any) -> Array:
    """None becomes NaN."""
    return np.array(values, dtype=np.float64)


def _estimates(told: Mapping[str, Any]) -> Picture:
    sampled, annealed = _array(told["importance"]), _array(told["annealing"])
    figure, axes = blank()
    axes.axline((sampled[0], sampled[0]), slope=1, color=GREY, linewidth=1)
    axes.plot(sampled, annealed, "o", color=BLUE, markersize=4, alpha=0.7, markeredgewidth=0)
    axes.set(xlabel="importance sampling, nats", ylabel="annealing, nats")
    higher = int((annealed > sampled).sum())
    note = (
        f"A point is a row, at its two estimates of {told['of']}, both lower bounds; above the line annealing is the "
        f"higher, as in {higher} of {len(sampled)} rows."
    )
    return picture(
        figure, f"Two estimates of {told['of']}", f"Annealing against importance sampling, row by row. {note}", note
    )


def _bracket(told: Mapping[str, Any]) -> Picture:
    lower, upper = _array(told["lower"]), _array(told["upper"])
    mean, error = _array(told["bracket"])
    figure, axes = blank()
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axhline(mean, color=ORANGE, linestyle="--", label="mean")
    if np.isfinite(error):
        axes.axhspan(mean - error, mean + error, color=ORANGE, alpha=0.2, linewidth=0, label="± standard error")
    axes.plot(lower, upper - lower, "o", color=BLUE, markersize=4, alpha=0.7, markeredgewidth=0)
    axes.set(xlabel=f"lower bound of {told['of']}, nats", ylabel="upper − lower bound, nats")
    figure.legend(loc="outside upper center", ncols=2)
    note = (
        f"A point is a row simulated from the model, where annealing bounds {told['of']} from both sides; a bound "
        "holds in expectation, so that single points may fall below 0."
    )
    return picture(figure, "Two-sided bracket", f"Width of the bracket, {len(lower)} simulated rows. {note}", note)


def _split(told: Mapping[str, Any]) -> Picture:
    parts = [("amortization", BLUE, ""), ("approximation", ORANGE, "//")]
    figure, axes = blank(2.0)
    start = 0.0
    for name, colour, hatch in parts:
        mean, error = _array(told[name])
        axes.barh(
            [0], [mean], left=[start], height=0.5, color=colour, hatch=hatch, edgecolor="white",
            label=f"{name} {mean:.2f}",
        )  # fmt: skip
        start += mean
        if np.isfinite(error):
            axes.errorbar([start], [0], xerr=[error], color="black", capsize=4, linewidth=1.2)
    axes.set(xlabel="nats per row", yticks=[], ylim=(-0.6, 0.6))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=2)
    note = (
        f"Mean of {told['of']} − ELBO over the rows, in two parts; each error bar is the standard error of its own "
        "part."
    )
    return picture(figure, "Where the gap comes from", f"Stacked bar of the mean gap. {note}", note)


def _families(told: Mapping[str, Any]) -> Picture:
    levels = [(_NAMES.get(name, name), each) for name, each in told["above_elbo"].items()]
    levels.append((told["of"].replace(" | ", "\n| "), told["gap"]))  # in two lines: it is wider than the others
    means, errors = _array([each for _, each in levels]).T
    figure, axes = blank()
    axes.axhline(0, color=GREY, linewidth=1)
    axes.errorbar(np.arange(len(levels)), means, yerr=np.nan_to_num(errors), fmt="o", color=BLUE, capsize=5)
    axes.set_xticks(np.arange(len(levels)), [name for name, _ in levels])
    axes.set(ylabel="nats above the ELBO of q", xlim=(-0.6, len(levels) - 0.4))
    axes.grid(visible=False, axis="x")
    note = (
        f"ELBO of q refined for each row, less that of q as it is, by family; last {told['of']}, which none exceeds. "
        "Error bars are standard errors of the mean difference, row by row."
    )
    return picture(figure, "What refining q would win", f"ELBO by family of q. {note}", note)


def _aggregated(told: Mapping[str, Any]) -> Picture | None:
    if not (kept := told["aggregate"]):
        return None
    histograms = kept["histograms"]
    columns = min(3, len(histograms))
    rows = -(-len(histograms) // columns)
    figure, all_axes = grid(rows, columns, 0.7 + 1.35 * rows, 1.87 * columns)
    for axes in all_axes.flat[len(histograms) :]:
        axes.set_visible(False)
    for axes, each in zip(all_axes.flat, histograms, strict=False):
        edges = _array(each["edges"])
        axes.stairs(_array(each["aggregated"]), edges, fill=True, color=BLUE, alpha=0.55, label="q(z), aggregated")
        axes.plot((edges[1:] + edges[:-1]) / 2, _array(each["prior"]), color=ORANGE, linewidth=1.3, label="p(z), prior")
        axes.set_title(f"{kept['node']}[{each['dimension']}]", **_SMALL)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
    figure.legend(*all_axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    note = (
        f"Density of draws of q(z), the mean of q(z|x) over the rows, beside the prior's; {len(histograms)} dimensions "
        f"with the largest {kept['ordered_by']}. Where the prior has mass and q(z) none, samples start from a z that "
        "the decoder was not trained on."
    )
    return picture(figure, "Aggregated posterior", f"Histograms by dimension of {kept['node']}. {note}", note)


def _pairs(told: Mapping[str, Any]) -> Picture | None:
    if not (kept := told["aggregate"]) or len(kept["top"]) < 2:
        return None
    top, points, prior = kept["top"], _array(kept["points"]), _array(kept["prior_points"])
    width = len(top) - 1
    figure, all_axes = grid(width, width, 0.6 + 1.75 * width, 0.2 + 1.8 * width)
    for row in range(width):
        for column in range(width):
            axes, (i, j) = all_axes[row, column], (column, row + 1)
            if i >= j:
                axes.set_visible(False)
                continue
            if kept["gaussian"]:
                _ellipses(axes, *(_array(kept["gaussian"][name])[[i, j]] for name in ("loc", "scale")))
            else:
                axes.plot(prior[:, i], prior[:, j], "o", color=ORANGE, markersize=2, alpha=0.4, markeredgewidth=0)
            axes.plot(points[:, i], points[:, j], "o", color=BLUE, markersize=2.5, alpha=0.5, markeredgewidth=0)
            axes.tick_params(labelsize=7)
            if row == width - 1:
                axes.set_xlabel(f"{kept['node']}[{top[i]}]", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{kept['node']}[{top[j]}]", fontsize=8)
    what = (
        "orange ellipses hold 39 % and 86 % of the prior"
        if kept["gaussian"]
        else "orange points are draws of the prior"
    )
    note = (
        f"The first {len(top)} of these dimensions, two by two: blue points are {len(points)} draws of q(z), {what}. "
        "Under the prior blue would be spread like orange."
    )
    return picture(figure, "Pairs of dimensions", f"Scatter plots of dimensions of {kept['node']}. {note}", note)


def _ellipses(axes: Axes, loc: Array, scale: Array) -> None:
    """At one and two standard deviations, which hold 1 - exp(-1/2) and 1 - exp(-2) of a Gaussian in the plane."""
    turn = np.linspace(0, 2 * np.pi, 200)
    for radius in (1, 2):
        x, y = loc[:, None] + radius * scale[:, None] * np.stack([np.cos(turn), np.sin(turn)])
        axes.plot(x, y, color=ORANGE, linewidth=1.2)


def _ranks(told: Mapping[str, Any]) -> Picture:
    figure, axes = blank(3.8, 5.4)
    band, curves = told["band"], told["curves"]
    places = np.arange(len(curves[0]["ecdf_difference"]))
    axes.axhspan(-band, band, color=GREY, alpha=0.3, linewidth=0, label="band")
    axes.axhline(0, color="black", linewidth=0.8)
    for i, curve in enumerate(curves):
        named = i < _NAMED
        axes.plot(
            places, _array(curve["ecdf_difference"]), color=CLASSES[i] if named else GREY,
            linewidth=1.6 if named else 0.9, linestyle="-" if curve["rejected"] else ":",
            label=curve["name"] if named else None,
            zorder=3 - 0.01 * i,  # the farthest above the others
        )  # fmt: skip
    axes.set(xlabel="rank of the truth among q's draws", ylabel="share of ranks up to it, less uniform")
    figure.legend(loc="outside upper center", ncols=4)
    note = (
        f"The {len(curves)} of {told['statistics']} statistics with the smallest p-values"
        + (f", the first {_NAMED} by name" if len(curves) > _NAMED else "")
        + f"; dotted where not rejected. Ranks of an exact q stay in the band, with all {told['statistics']}, with "
        f"probability {1 - told['level']:g} or more. Above 0 at the left and below at the right: draws too narrow; the "
        "reverse: too wide; above throughout: draws too high; below throughout: too low."
    )
    return picture(figure, "Ranks of the truth", f"Difference of the ranks' distribution from uniform. {note}", note)


def _replicates(told: Mapping[str, Any]) -> Picture | None:
    if not (worst := told["worst"]):
        return None
    columns = min(2, len(worst))
    rows = -(-len(worst) // columns)
    figure, all_axes = grid(rows, columns, 0.6 + 1.9 * rows, 2.8 * columns)
    for axes in all_axes.flat[len(worst) :]:
        axes.set_visible(False)
    for letter, axes, each in zip(ascii_lowercase, all_axes.flat, worst, strict=False):
        axes.hist(_array(each["replicated"]), 25, color=BLUE, alpha=0.6, label="replicates")
        axes.axvline(each["observed"], color=ORANGE, linewidth=2, label="data")
        axes.set_title(letter, **_SMALL)  # a column's name may have glyphs that the font lacks
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(labelsize=7)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("replicates", fontsize=8)
    figure.legend(*all_axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    named = ", ".join(f"{letter}: {each['name']}" for letter, each in zip(ascii_lowercase, worst, strict=False))
    note = (
        f"{named}. These are the {len(worst)} figures with the smallest tails, of the data and of "
        f"{told['replicates']} data sets that the model draws; they are picked as the worst of many."
    )
    return picture(figure, "Data against replicates", f"Histograms of {len(worst)} figures. {note}", note)


_PICTURES: dict[str, tuple[Callable[[Mapping[str, Any]], Picture | None], ...]] = {
    "ais": (_estimates, _bracket),
    "gaps": (_split, _families),
    "information": (_aggregated, _pairs),
    "calibration": (_ranks,),
    "checks": (_replicates,),
}
"""By name of the diagnosis."""
