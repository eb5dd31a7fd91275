"""What is changed in a graph before it is compiled, on traced graphs, which need no compiler, and on compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus

from aevb._compiler import (
    bias_apart,
    merge_equal,
    round_products,
    slope_by_powers,
    softplus_by_powers,
    softplus_patterns,
)

aten = torch.ops.aten


def _traced(function: Callable[..., Any], *inputs: Tensor) -> torch.fx.GraphModule:
    """As inductor is handed it."""
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def test_equal_nodes_are_computed_once() -> None:
    """A layer looked at twice; not draws, results, or numbers of two types; and not across a change in place."""

    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first, second = (x @ w).tanh(), (x @ w).tanh()
        noise = torch.rand(3) - torch.rand(3)
        whole, real = torch.full((2,), 1), torch.full((2,), 1.0)
        before = x.sum()
        x.add_(1.0)
        norms = [aten._native_batch_norm_legit.no_stats(x @ w, None, None, True, 0.1, 1e-5)[0] @ w.T for _ in range(2)]
        results = w * 2, (w * 2).view(-1), torch.var_mean(x, 0)[1], torch.var_mean(x, 0)[1]
        return first + second.exp(), noise, whole * 2, real * 2, before * x.sum(), norms[0].exp() + norms[1], *results

    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (4, 3))]
    traced = _traced(twice, *inputs)
    outputs = []
    for change in (lambda graph: None, merge_equal):
        change(traced.graph)
        traced.recompile()
        torch.manual_seed(0)
        outputs.append(traced(*(each.clone() for each in inputs)))
    targets = [node.target for node in traced.graph.nodes]
    counted = (aten.mm.default, aten.tanh.default, aten.rand.default, aten.full.default)
    assert [targets.count(each) for each in counted] == [3, 1, 2, 2]  # products: two of x, since it changes, and W's
    for expected, found in zip(*outputs, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len({each.data_ptr() for each in outputs[1]}) == len(outputs[1])
    assert float(outputs[1][1].abs().min()) > 0


def test_sizes_read_from_values_stay_apart() -> None:
    """Inductor cannot tell the sizes of the later of two equal nodes otherwise."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    found = [graph.call_function(aten.nonzero.default, (x,)) for _ in range(2)]
    graph.output(graph.call_function(aten.sub.Tensor, tuple(found)))
    merge_equal(graph)
    assert len(graph.find_nodes(op="call_function", target=aten.nonzero.default)) == 2


def test_bias_and_product_stand_apart() -> None:
    """Same values; a sum with weights of its own stays as it is."""

    def layers(bias: Tensor, table: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.addmm(bias, x, w).tanh(), torch.addmm(table, x, w), torch.addmm(bias, x, w, beta=2.0)

    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((3,), (5, 3), (5, 4), (4, 3))]
    traced = make_fx(layers, tracing_mode="fake")(*inputs)
    bias_apart(traced.graph)
    traced.recompile()
    targets = [node.target for node in traced.graph.nodes]
    assert (targets.count(aten.addmm.default), targets.count(aten.mm.default)) == (1, 2)
    for found, expected in zip(traced(*inputs), layers(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_factors_are_rounded_once_and_so_are_products() -> None:
    """A layer and its gradients: bfloat16 products of the same matrices, and a bias's gradient; float64's stay."""

    def layer(x: Tensor, w: Tensor, g: Tensor, exact: Tensor) -> tuple[Tensor, ...]:
        g = -g
        return x @ w.T, g.T @ x, g @ w, g.sum(0), exact @ exact

    inputs = (*(torch.randn(shape) for shape in ((5, 4), (3, 4), (5, 3))), torch.randn(2, 2, dtype=torch.float64))
    traced = _traced(layer, *inputs)
    round_products(traced.graph)
    traced.recompile()
    converted = traced.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
    assert [node.args[1] for node in converted].count(torch.bfloat16) == 3  # x, w and g
    low = [each.bfloat16() for each in inputs[:3]]
    products = [each.float() for each in layer(*low, inputs[3])[:3]]
    expected = [*products, -low[2].float().sum(0), inputs[3] @ inputs[3]]
    for found, each in zip(traced(*inputs), expected, strict=True):
        assert found.dtype == each.dtype
        torch.testing.assert_close(found, each, rtol=0, atol=0)


def test_other_sums_of_factors_are_not_of_rounded_entries() -> None:
    """Of data, a row's total, in float64: 257 is 256 in bfloat16."""

    def sums(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = x + 0.0
        return x @ w, y @ w, x.sum(0), x.sum(-1), y.sum(-1), y.sum(0, dtype=torch.float64)

    x, w = torch.full((3, 4), 257.0), torch.randn(4, 2)
    traced = _traced(sums, x, w)
    round_products(traced.graph)
    traced.recompile()
    for found, each in zip(traced(x, w)[2:], sums(x, w)[2:], strict=True):
        assert found.dtype == each.dtype
        torch.testing.assert_close(found, each, rtol=0, atol=0)


def test_softplus_and_its_slope_by_powers() -> None:
    """Against float64, where float32 has room for e^l; limits, and what is no number, too."""
    logit = torch.linspace(-87, 100, 200_001)
    torch.testing.assert_close(softplus_by_powers(logit).double(), softplus(logit.double(), 1, 40), rtol=3e-7, atol=0)
    slope = slope_by_powers(torch.tensor(3.0), logit)
    torch.testing.assert_close(slope.double(), 3 * logit.double().sigmoid(), rtol=3e-7, atol=0)
    odd = torch.tensor([0.0, -200.0, torch.inf, -torch.inf, torch.nan])
    value = torch.tensor([0.6931472, 0.0, torch.inf, 0.0, torch.nan])
    torch.testing.assert_close(softplus_by_powers(odd), value, equal_nan=True)
    slope = torch.tensor([0.5, 0.0, 1.0, 0.0, torch.nan])
    torch.testing.assert_close(slope_by_powers(torch.ones(5), odd), slope, equal_nan=True)


@pytest.mark.parametrize(
    ("found", "function"),
    [
        (1, lambda g, p, a: g * p / (p + 1.0)),
        (1, lambda g, p, a: p.log1p()),
        (0, lambda g, p, a: g * p / (p + 2.0)),
        (0, lambda g, p, a: g * p / torch.add(p, 1.0, alpha=2.0)),
        (0, lambda g, p, a: g * a.exp() / (p + 1.0)),
        (0, lambda g, p, a: (-p).log1p()),
        (0, lambda g, p, a: (g * p / (p + 1.0)).double() * p.double().exp().log1p()),
    ],
)  # fmt: skip
def test_softplus_is_told_from_what_looks_like_it(found, function) -> None:
    """Another constant, a factor, another power: nothing is put in its place. Values stay in any case."""
    inputs = [torch.linspace(-3, 3, 7), torch.linspace(-5, 8, 7), torch.linspace(0, 1, 7)]
    traced = _traced(lambda g, b, a: function(g, b.exp(), a), *inputs)
    assert softplus_patterns().apply(traced.graph) == found
    traced.recompile()
    g, b, a = inputs
    torch.testing.assert_close(traced(*inputs), function(g, b.exp(), a), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_softplus_is_found_as_torch_writes_it_out() -> None:
    """Value and gradient, at any threshold and sharpness."""

    def step(x: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
        value = x * logit - softplus(logit, threshold=40.0) + softplus(logit, 2.0)
        return value.detach(), torch.autograd.grad(value.sum(), logit)[0]

    inputs = torch.rand(301), torch.linspace(-30, 60, 301).requires_grad_()
    traced = _traced(step, *inputs)
    assert softplus_patterns().apply(traced.graph) == 4
    traced.recompile()
    for found, expected in zip(traced(*inputs), step(*(each.double() for each in inputs)), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
