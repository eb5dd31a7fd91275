"""How functions are compiled, whether this machine can, and in what numbers matrices are multiplied.

torch's inductor needs a C++ compiler.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from aevb.config import Precision

__all__ = ["can_compile", "compiled", "products", "program"]

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
    rewriting = _rewriting(rounded and precision == "bfloat16" and _has_bfloat16())
    options = {"cpp.use_decompose_tanh": True, "post_grad_custom_post_pass": rewriting} | options
    graph: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        function, fullgraph=whole, dynamic=False, options=options, recompile_limit=_VERSIONS
    )
    return graph


def program(method: Any, *arguments: Any) -> Callable[..., Any] | None:
    """What the last call of a bound method that is compiled whole ran, if another call would run it, too; else None.

    Called itself, it goes without dynamo's search among all versions of the method: whoever does so must know that the
    search would still end there.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    newest = next(iter(_debug_get_cache_entry_list(method.__code__)), None)  # the last one that ran comes first
    given = inspect.signature(method.__func__).bind(method.__self__, *arguments).arguments
    if newest is None or newest.code is None or not newest.guard_manager.check(given):
        return None
    made = FunctionType(newest.code, method.__globals__, closure=method.__func__.__closure__)
    return MethodType(made, method.__self__)


def _has_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 by units of its own."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def _rewriting(rounded: bool) -> Any:
    """What is changed in a graph before its kernels are made, as inductor takes it."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    softplus = softplus_patterns()

    class Rewriting(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            bias_apart(graph)
            softplus.apply(graph)
            merge_equal(graph)
            if rounded:
                round_products(graph)

        def uuid(self) -> Any:  # names the graphs that are cached on disk
            return get_hash_for_files((__file__,), f"{rounded} {_log1p_powers()}")

    return Rewriting()


def merge_equal(graph: torch.fx.Graph) -> None:
    """Compute once what is computed twice from the same, but for random numbers and results, each a tensor of its own.

    The doubly reparameterized gradient looks at p twice at the same draws, before it and within it.
    """
    returned: set[torch.fx.Node] = set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        returned.add(node)
        if node.target is operator.getitem or getattr(node.target, "is_view", False):  # of the same memory
            pending.append(node.all_input_nodes[0])
    # Draws, and sizes and numbers that are read from values.
    tags = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    first: dict[str, torch.fx.Node] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:  # what is read again after it may be another value
                first.clear()
            if node.is_impure() or any(tag in node.target.tags for tag in tags):
                continue
        elif node.target is not operator.getitem:
            continue
        if node not in returned:
            told = f"{node.target} {node.args} {node.kwargs}"  # 1 and 1.0 are not the same
            if (same := first.setdefault(told, node)) is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def bias_apart(graph: torch.fx.Graph) -> None:
    """Split what a layer computes, b + x W, into product and sum.

    For the two at once the product is handed a result that holds b in every row, to be written and read again; a sum
    alone costs nothing in the kernel that reads it. A tenth of the time of importance sampling in bfloat16, a
    twentieth of a step of batch 100 in float32. Processors only: for a GPU inductor does so itself.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
        bias, *factors = node.args
        if node.kwargs or node.meta["val"].device.type != "cpu":  # weights of the two parts
            continue
        with graph.inserting_before(node):
            product = graph.call_function(torch.ops.aten.mm.default, tuple(factors))
            total = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
        for made in (product, total):
            made.meta.update(node.meta)
        product.meta["val"] = torch.empty_like(node.meta["val"])  # its own, or the two would pass for one buffer
        node.replace_all_uses_with(total)
        graph.erase_node(node)


@functools.cache
def _log1p_powers() -> tuple[float, ...]:
    """Coefficients of log(1 + t) / t on [0, 1], the highest power first: right to 3e-8."""
    series = Chebyshev.interpolate(lambda t: np.log1p(t) / t, 8, (0, 1)).convert(kind=Polynomial, window=(-1, 1))
    return tuple(series.coef[::-1].tolist())


def softplus_by_powers(logit: Tensor) -> Tensor:
    r""":math:`\log(1 + e^l) = \max(l, 0) + \log(1 + t)`, :math:`t = e^{-|l|}`: right to 3e-7 in float32."""
    small = torch.exp(-torch.abs(logit))
    first, *others = _log1p_powers()
    total = small * first
    for power in others[:-1]:
        total = small * (total + power)
    return torch.relu(logit) + small * (total + others[-1])


def slope_by_powers(gradient: Tensor, logit: Tensor) -> Tensor:
    r"""The gradient of softplus, :math:`g \sigma(l)`, from the same t: 1 or t, as the sign of l is, over 1 + t."""
    small = torch.exp(-torch.abs(logit))
    most = 1 / (1 + small)
    return gradient * torch.where(logit > 0, most, small * most)


@functools.cache
def softplus_patterns() -> Any:
    """What finds float32 log(1 + e^l) and softplus's gradient, as torch writes it out, and puts the above there.

    The library's own log(1 + x), right to the last digit for all x, and a second division took half of the time of a
    Bernoulli's log-mass with its gradient. Processors only: a GPU waits for memory there.
    """
    from torch._inductor.pattern_matcher import Match, PatternMatcherPass, fwd_only, register_replacement

    def value(logit: Tensor) -> Tensor:
        return torch.log1p(torch.exp(logit))

    def slope(gradient: Tensor, logit: Tensor) -> Tensor:
        power = torch.exp(logit)
        return gradient * power / (power + 1.0)

    def fits(match: Match) -> bool:
        given = [node.meta["val"] for node in match.kwargs.values()]
        plain = not any(node.kwargs for node in match.nodes)  # a sum's factor, which the search does not look at
        return plain and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in given)

    patterns = PatternMatcherPass()
    for found, instead, inputs in ((value, softplus_by_powers, 1), (slope, slope_by_powers, 2)):
        examples = [torch.zeros(2, 2, dtype=torch.float32) for _ in range(inputs)]
        register_replacement(found, instead, examples, fwd_only, patterns, extra_check=fits)
    return patterns


def round_products(graph: torch.fx.Graph) -> None:
    """Round the factors of each float32 product of two matrices to bfloat16 once, where they are made, and the product.

    oneDNN rounds float32 factors anew in each product: a weight, and what a layer is given, twice a step. Of a result
    that is bfloat16 half as much is written and read. The sum of a factor over rows, as a bias's gradient is, is of its
    rounded entries: for the others all that led to them would be computed once more; data's own are not touched.
    Processors only; products of batches of matrices and convolutions stay.
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
    for x, made in found.items():
        if x.op == "placeholder":
            continue
        for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            if total.args[:2] != (x, [0]) or total.kwargs:
                continue
            with graph.inserting_before(total):
                again = graph.call_function(convert, (made, torch.float32))
            again.meta["val"] = torch.empty_like(x.meta["val"])
            total.replace_input_with(x, again)


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
