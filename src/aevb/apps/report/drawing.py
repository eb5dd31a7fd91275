"""How every picture of a report looks, and how it comes into the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "CLASSES",
    "GREEN",
    "GREY",
    "MARKERS",
    "ORANGE",
    "STYLE",
    "Array",
    "Picture",
    "blank",
    "grid",
    "picture",
]

Array = NDArray[np.float64]

# Okabe and Ito (2008) for the few, Tol's "muted" for the many: told apart by the colour-blind.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#9aa1ab"
CLASSES = "#332288 #88ccee #117733 #ddcc77 #cc6677 #aa4499 #44aa99 #999933 #882255 #000000".split()
MARKERS = "os^DvP<X>*"
STYLE: dict[str, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": "#6b7280", "axes.grid": True, "axes.spines.right": False,
    "axes.spines.top": False, "figure.constrained_layout.use": True, "font.size": 10, "grid.color": "#e5e7eb",
    "legend.fontsize": 9, "legend.frameon": False, "savefig.dpi": 200, "svg.hashsalt": "aevb",
    "xtick.labelsize": 9, "ytick.labelsize": 9,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image in the page, with what a reader who cannot see it is told."""

    title: str
    alt: str
    note: str  # what the caption says of these data
    uri: str
    width: int  # CSS pixels
    height: int


def blank(height: float = 3.2, width: float = 4.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def grid(rows: int, columns: int, height: float, width: float) -> tuple[Figure, NDArray[Any]]:
    """A figure with `(rows, columns)` pairs of axes; inches of the whole."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture(figure: Figure, title: str, alt: str, note: str = "") -> Picture:
    """The figure as an SVG in a data URI."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    width, height = (round(96 * float(inches)) for inches in figure.get_size_inches())
    # As an image of its own the drawing's ids cannot clash with another's, and the browser runs nothing in it.
    uri = "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
    return Picture(title=title, alt=alt, note=note, uri=uri, width=width, height=height)
