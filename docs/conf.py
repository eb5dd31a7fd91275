"""The site's settings: Markdown by MyST, docstrings by autodoc, formulas as MathML; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import aevb

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project, author, release = "aevb", "the authors of aevb", aevb.__version__
html_title, html_theme = f"aevb {release}", "furo"
html_static_path, html_css_files = ["_static"], ["aevb.css"]
html_show_copyright = False
html_copy_source = False
exclude_patterns = ["_build", "_ext"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# What docstrings put in backticks is code; they are written to be read in a terminal, too.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Types of other projects have their pages elsewhere, and no inventory is downloaded.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|nn|numpy|np|pl|collections|pathlib)\..*|Tensor|NDArray.*|ndarray.*|Any|Path|Callable|optional|(dict|tuple)\[.*|aevb\..*\._\w+|aevb\.build\.start\.Rows",
    )
]

_COLON = "\ue000"


def _before_napoleon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Words before a colon are no type (annotations tell the types), and "dims: D." starts no list."""
    returns = what in ("attribute", "property", "data")
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"^(\s+\w+: \w)\.(?=\s|$)", r"\1\\.", line)
        if re.fullmatch(r"\w+:", line):
            returns = line == "Returns:"
        elif returns:
            lines[i] = line.replace(": ", f"{_COLON} ")


def _after_napoleon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Colons back; and the fields of a record, which say what they are in a comment on their line."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]
    if inspect.isclass(obj) and dataclasses.is_dataclass(obj):
        told = re.findall(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+)?  # (.+)$", inspect.getsource(obj), re.MULTILINE)
        told = [(field, kind, comment.replace("*", r"\*")) for field, kind, comment in told]
        lines += ["", *(f"* **{field}** (``{kind}``): {comment}" for field, kind, comment in told), ""]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)  # napoleon's own is 500
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
