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
    function: Callable[..., Any],
    *,
    whole: bool = True,
    precision: Precision = "float32",
    rounded: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """A function compiled at its first call, for inputs of one size; `options` are inductor's.

    It is one graph or, unless `whole`, several, with what cannot be compiled run between them. `precision` is that of
    the `products` within which it is called; in bfloat16 and `rounded`, the products' results have it, too.
    """
    # tanh x = 2 / (1 + exp(-2 x)) - 1, right to 2e-7: a third of the time of the library's, right to the last digit.
    options = {"cpp.use_decompose_tanh": True} | options
    if precision == "bfloat16":
        options["post_grad_custom_post_pass"] = _rewriting(rounded and _has_bfloat16())
    graph: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        function, fullgraph=whole, dynamic=False, options=options, recompile_limit=_VERSIONS
    )
    return graph


def _has_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 by units of its own."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def _rewriting(rounded: bool) -> Any:
    """What is changed in a graph whose products are of bfloat16, as inductor takes it."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Rewriting(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            bias_apart(graph)
            if rounded:
                round_products(graph)

        def uuid(self) -> Any:  # names the graphs that are cached on disk
            return get_hash_for_files((__file__,), f"rounded {rounded}")

    return Rewriting()


def bias_apart(graph: torch.fx.Graph) -> None:
    """Split what a layer computes, b + x W, into product and sum.

    For the two at once oneDNN is handed a result that holds b in every row, to be written and read again; a sum alone
    costs nothing in the kernel that reads it. A tenth of the time of importance sampling in bfloat16; in float32, whose
    products are MKL's, nothing.
    """
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


def round_products(graph: torch.fx.Graph) -> None:
    """Round the factors of each float32 product of two matrices to bfloat16 once, where they are made, and the product.

    oneDNN rounds float32 factors anew in each product: a weight, and what a layer is given, twice a step. Of a result
    that is bfloat16 half as much is written and read. Processors only; products of batches of matrices and convolutions
    stay.
    """
    aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
    found: dict[torch.fx.Node, torch.fx.Node] = {}

    def rounded(x: Any) -> torch.fx.Node:
        if x not in found:
            turned = x.target is aten.permute.default  # of a matrix and its transpose, one is rounded
            source = rounded(x.args[0]) if turned else x
            with graph.inserting_after(source):
                target, kind = (aten.permute.default, x.args[1]) if turned else (convert, torch.bfloat16)
                made = graph.call_function(target, (source, kind))
            made.meta["val"] = x.meta["val"].to(torch.bfloat16)
            found[x] = made
        return found[x]

    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        value = node.meta["val"]
        if value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        factors = tuple(rounded(x) for x in node.args)
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, factors)
            result = graph.call_function(convert, (product, torch.float32))
        product.meta["val"] = value.to(torch.bfloat16)
        result.meta["val"] = torch.empty_like(value)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


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
