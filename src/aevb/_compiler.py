"""How functions are compiled, whether this machine can, and in what numbers matrices are multiplied.

torch's inductor needs a C++ compiler.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aevb.config import Precision

__all__ = ["can_compile", "compiled", "products"]

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


def compiled(
    function: Callable[..., Any], *, whole: bool = True, precision: Precision = "float32", **options: Any
) -> Callable[..., Any]:
    """A function compiled at its first call, for inputs of one size; `options` are inductor's.

    It is one graph or, unless `whole`, several, with what cannot be compiled run between them. `precision` is that of
    the `products` within which it is called.
    """
    # tanh x = 2 / (1 + exp(-2 x)) - 1, right to 2e-7: a third of the time of the library's, right to the last digit.
    options = {"cpp.use_decompose_tanh": True} | options
    if precision == "bfloat16":
        options["post_grad_custom_post_pass"] = _bias_apart()
    graph: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        function, fullgraph=whole, dynamic=False, options=options, recompile_limit=_VERSIONS
    )
    return graph


@functools.cache
def _bias_apart() -> Any:
    """A pass that splits what a layer computes, b + x W, into product and sum.

    For the two at once oneDNN is handed a result that holds b in every row, to be written and read again; a sum alone
    costs nothing in the kernel that reads it. A tenth of the time of importance sampling in bfloat16; in float32, whose
    products are MKL's, nothing.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class BiasApart(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
                bias, *factors = node.args
                if node.kwargs:  # weights of the two parts
                    continue
                with graph.inserting_before(node):
                    product = graph.call_function(torch.ops.aten.mm.default, tuple(factors))
                    total = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
                for made in (product, total):
                    made.meta.update(node.meta)
                if "val" in node.meta:  # a value of its own, or the two would pass for one buffer
                    product.meta["val"] = torch.empty_like(node.meta["val"])
                node.replace_all_uses_with(total)
                graph.erase_node(node)

        def uuid(self) -> str:
            return "aevb bias apart 1"

    return BiasApart()


@contextlib.contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Matrix products of a precision, in the whole process; float32 leaves torch's own setting as it is.

    For bfloat16 torch takes float32 where a processor has no units for it, and TensorFloat32 on a GPU.
    """
    if precision == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
