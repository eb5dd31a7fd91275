"""The flags of `aevb train` that tell the model, derived from `ModelConfig`: never written twice."""

from __future__ import annotations

import ast
import dataclasses
from inspect import getsource
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from aevb.apps.choices import AUTO
from aevb.config import ModelConfig

__all__ = ["ModelFlags", "model_flags"]

_DECIDED = ("features", "kinds", "image", "target", "batches")
"""What the data alone decide, or a flag that names something in them."""
_METAVARS = {"total_count": "INT", "latents": "{auto}|INT", "hidden": "{auto}|INT [INT ...]"}


def model_flags() -> type:
    """The fields of `ModelConfig` that the data do not decide, with their docstrings as help."""
    body = ast.parse(getsource(ModelConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    told = {}
    for line, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, ast.Expr):
            told[line.target.id] = str(ast.literal_eval(text.value))
    hints = get_type_hints(ModelConfig)
    made: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(ModelConfig):
        if field.name in _DECIDED:
            continue
        kind, default, metavar = hints[field.name], field.default, _METAVARS.get(field.name)
        if field.name in AUTO:
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            kind, default = Literal["auto", *choices] if choices else kind | Literal["auto"], "auto"
            told[field.name] += f" auto: {AUTO[field.name]}."
        about = tyro.conf.arg(help=told[field.name], metavar=metavar)
        made.append((field.name, Annotated[kind, about], dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Model", made, frozen=True, kw_only=True)


if TYPE_CHECKING:
    ModelFlags = Any
else:
    ModelFlags = model_flags()
