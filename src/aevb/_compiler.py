"""Whether this machine can compile: torch's inductor needs a C++ compiler."""

from __future__ import annotations

__all__ = ["can_compile"]


def can_compile() -> str | None:
    """None if this machine can compile, else why not."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found"
    return None
