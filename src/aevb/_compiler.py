"""How functions are compiled, and whether this machine can: torch's inductor needs a C++ compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["can_compile", "compiled"]

_VERSIONS = 256
"""Compiled versions of one function that a process keeps, one for each kind of model: torch's own limit is 8, and the
next model would end in an error. As many as its limit for all functions together."""


def can_compile() -> str | None:
    """None if this machine can compile, else why not."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found"
    return None


def compiled(function: Callable[..., Any], *, whole: bool = True, **options: bool) -> Callable[..., Any]:
    """A function compiled at its first call, for inputs of one size; `options` are inductor's.

    It is one graph or, unless `whole`, several, with what cannot be compiled run between them.
    """
    # tanh x = 2 / (1 + exp(-2 x)) - 1, right to 2e-7: a third of the time of the library's, right to the last digit.
    graph: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        function, fullgraph=whole, dynamic=False, options={"cpp.use_decompose_tanh": True} | options,
        recompile_limit=_VERSIONS,
    )  # fmt: skip
    return graph
