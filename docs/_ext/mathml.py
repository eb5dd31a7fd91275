"""Formulas as MathML, made while the site is built: browsers draw it without a script, and without a network."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

__all__ = ["setup", "to_mathml"]

_log = logging.getLogger(__name__)

_SPELLINGS = (
    (r"\\([bB]ig)(?=[(\[])", r"\\\1l"),
    (r"\\([bB]ig)(?=[)\]])", r"\\\1r"),
    (r"\\dots\b", r"\\ldots"),
    ("½", r"\\tfrac{1}{2}"),
)
"""What docutils' converter does not know, and what it does."""

_APPLY = "\u2061"
_ACCENTS = {"~", "ˉ", "^", "ˆ", "ˇ", "→", "˙"}


def to_mathml(source: str, *, block: bool) -> str:
    """LaTeX to MathML by docutils, with its spacing of functions and its accents put right.

    Raises:
        MathError: For a command that the converter does not know.
    """
    for pattern, replacement in _SPELLINGS:
        source = re.sub(pattern, replacement, source)
    text: str = latex2mathml.tex2mathml(source, as_block=block)
    namespace = "http://www.w3.org/1998/Math/MathML"
    root = ElementTree.fromstring(text.replace("&ApplyFunction;", _APPLY).replace(f' xmlns="{namespace}"', ""))
    for parent in list(root.iter()):
        _separate_accents(parent)
        _space_functions(parent)
    for each in root.iter():
        each.tail = None
        if each.tag == "mo" and each.text in ("‖", "∥"):
            each.set("stretchy", "false")
        if each.tag == "mo" and each.text == "/":
            each.set("lspace", "0")
            each.set("rspace", "0")
    root.set("xmlns", namespace)
    return ElementTree.tostring(root, encoding="unicode")


def _separate_accents(node: Element) -> None:
    """An accent with a subscript comes as limits above and below: `r` under a tilde gets its subscript beside it."""
    if node.tag != "munderover" or (node[2].text or "").strip() not in _ACCENTS:
        return
    base, below, accent = node
    over = Element("mover", accent="true")
    over.extend([base, accent])
    node.tag = "msub"
    node[:] = [over, below]


def _space_functions(row: Element) -> None:
    """A thin space between a function and its argument, none where a parenthesis opens; bars after it are fences."""
    if row.tag not in ("math", "mrow", "mtd", "mstyle"):
        return
    made: list[Element] = []
    inside = False
    for item in row:
        function = bool(made) and (made[-1].text == _APPLY or _is_function(made[-1]))
        if (item.text or "") == "|" and (inside or function):
            item.set("form", "postfix" if inside else "prefix")
            inside = not inside
        elif function and item.text not in (_APPLY, "(", "[", "{", ")", "]", ",", ".", "=", "+", "-", "−"):
            made.append(Element("mspace", width="0.1667em"))
        elif _is_function(item) and made and made[-1].tag in ("mi", "mn", "msub", "msup", "msubsup"):
            made.append(Element("mspace", width="0.1667em"))
        if item.get("class") in ("mathopen", "mathclose"):
            item.set("form", "prefix" if item.get("class") == "mathopen" else "postfix")
        made.append(item)
    row[:] = made


def _is_function(node: Element) -> bool:
    if node.tag in ("msub", "msup", "msubsup"):
        node = node[0]
    return node.tag == "mi" and len((node.text or "").strip()) > 1


def _write(writer: Any, node: nodes.Element, *, block: bool) -> None:
    try:
        formula = to_mathml(node.astext(), block=block)
    except MathError as error:
        _log.warning("%s in the formula %r", error, node.astext(), location=node)
        raise nodes.SkipNode from error
    writer.body.append(f'<div class="math">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda writer, node: _write(writer, node, block=False), None),
        block_renderers=(lambda writer, node: _write(writer, node, block=True), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
