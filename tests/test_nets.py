"""Nets, and the widths that conditionals ask of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aevb import MLP, Bernoulli, Binomial, DiagonalNormal, FullNormal, Holes, InputError, Normal, StandardNormal
from aevb.nets import ACTIVATIONS, Standardize

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-12
FORMULAS = {
    "tanh": torch.tanh,
    "relu": lambda a: a * (a > 0),
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),
    "silu": lambda a: a / (1 + (-a).exp()),
    "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))),
}


@pytest.mark.parametrize(
    ("inputs", "hidden", "outputs"), [(3, [], 2), (3, [7], 2), (1, [4, 5], 6), (2, (8,), 1), (4, [3, 3, 3], 4)]
)
def test_widths(inputs, hidden, outputs):
    net = MLP(inputs, hidden, outputs)
    layers = [layer for layer in net.layers if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in layers] == [inputs, *hidden]
    assert [layer.out_features for layer in layers] == [*hidden, outputs]
    assert (net.inputs, net.outputs) == (inputs, outputs)
    assert net.last is layers[-1]
    assert net(torch.zeros(5, inputs)).shape == (5, outputs)
    assert net(torch.zeros(inputs)).shape == (outputs,)
    assert net(torch.zeros(2, 3, 4, inputs)).shape == (2, 3, 4, outputs)


def test_without_hidden_layers_a_net_is_affine():
    torch.manual_seed(0)
    net, x, y = MLP(3, [], 2), torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(net(0.3 * x + 0.7 * y), 0.3 * net(x) + 0.7 * net(y), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Affine, activation, affine, and nothing after it."""
    torch.manual_seed(0)
    net, x = MLP(3, [6], 2, name), 3 * torch.randn(50, 3)
    first, last = net.layers[0], net.layers[-1]
    expected = FORMULAS[name](x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    # softplus is the identity above 20 in torch, exp(-20) = 2e-9 too low at most; no input here is that large.
    assert float((x @ first.weight.T).detach().abs().max()) < 20
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


def test_every_activation_has_its_formula_here():
    assert set(FORMULAS) == set(ACTIVATIONS)


def test_unknown_activation():
    with pytest.raises(InputError, match=r"tanh.*'swish'"):
        MLP(3, [4], 2, "swish")


def test_initial_weights():
    """Glorot and Bengio (2010): uniform within sqrt(6 / (in + out)), its variance 2 / (in + out); biases zero."""
    torch.manual_seed(0)
    layer = MLP(300, [], 200).last
    bound = math.sqrt(6 / 500)
    assert float(layer.weight.detach().abs().max()) <= bound
    squares = layer.weight.detach().square()
    assert abs(float(squares.mean()) - 2 / 500) < 4 * float(squares.std()) / math.sqrt(squares.numel())
    assert not bool(layer.bias.any())


def test_parents_are_joined_in_order_and_broadcast():
    torch.manual_seed(0)
    net = MLP(5, [4], 2)
    a, b = torch.randn(6, 3), torch.randn(7, 6, 2)
    expected = net(torch.cat([a.expand(7, 6, 3), b], -1))
    torch.testing.assert_close(net(a, b), expected, rtol=0, atol=ROUNDING)
    assert not torch.allclose(net(b, a), expected)
    root = torch.randn(3)
    torch.testing.assert_close(net(root, b), net(torch.cat([root.expand(7, 6, 3), b], -1)), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("parents", [[(5, 4)], [(5, 1)], [(5, 2), (5, 2)], [(3, 1, 1)]])
def test_wrong_input_width(parents):
    with pytest.raises(InputError, match="takes 3 inputs") as error:
        MLP(3, [4], 2)(*(torch.zeros(shape) for shape in parents))
    assert all(str(shape) in str(error.value) for shape in parents)
    assert f"MLP({sum(shape[-1] for shape in parents)}, ...)" in str(error.value)


def test_holes_hand_on_what_is_known_and_where():
    x = torch.tensor([[1.0, torch.nan, 0.0], [torch.nan, torch.nan, -2.0]])
    y = torch.tensor([[torch.nan], [5.0]])
    seen = []

    class Net(nn.Module):
        def forward(self, *parents):
            seen.extend(parents)
            return parents[0]

    Holes(Net())(x, y)
    expected = [[[1, 0, 0], [0, 0, -2]], [[0], [5]], [[1, 0, 1], [0, 0, 1]], [[0], [1]]]
    assert [parent.tolist() for parent in seen] == expected
    assert all(parent.dtype == torch.float64 for parent in seen)
    assert bool(x.isnan().any())  # what the caller holds is not written to


def test_gradients_pass_holes():
    """Finite in weights and in the values; zero in a missing value, that of a filled one in the others."""
    torch.manual_seed(0)
    net = MLP(6, [5], 4, "tanh")
    x = torch.tensor([[1.0, torch.nan, 0.3]], requires_grad=True)
    inputs = torch.tensor([[1.0, 0.0, 0.3, 1.0, 0.0, 1.0]], requires_grad=True)
    holes = torch.autograd.grad(Holes(net)(x).square().sum(), [x, *net.parameters()])
    filled = torch.autograd.grad(net(inputs).square().sum(), [inputs, *net.parameters()])
    torch.testing.assert_close(holes[0][0, [0, 2]], filled[0][0, [0, 2]], rtol=0, atol=ROUNDING)
    assert float(holes[0][0, 1]) == 0
    for ours, theirs in zip(holes[1:], filled[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_a_zero_and_a_hole_differ():
    torch.manual_seed(0)
    net = Holes(MLP(2, [], 3))
    assert not torch.allclose(net(torch.tensor([[0.0]])), net(torch.tensor([[torch.nan]])))


def test_standardize():
    torch.manual_seed(0)
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])
    net, x = MLP(2, [4], 3), torch.randn(5, 2)
    around = Standardize(net, loc, scale)
    torch.testing.assert_close(around(x), net((x - loc) / scale), rtol=0, atol=ROUNDING)
    loc.zero_()  # it keeps its own copy
    assert around.loc.tolist() == [1, -2]
    assert set(around.state_dict()) >= {"loc", "scale"}
    assert len(list(around.parameters())) == len(list(net.parameters()))
    seen = Standardize(nn.Identity(), torch.zeros(2), torch.ones(2))(torch.tensor([[torch.nan, 1.0]]))
    assert seen.isnan().tolist() == [[True, False]]


def test_wrappers_tell_the_width():
    net = MLP(6, [], 5)
    assert Holes(net).outputs == Standardize(net, torch.zeros(1), torch.ones(1)).outputs == 5
    assert Holes(nn.Identity()).outputs is None
    assert Standardize(Holes(net), torch.zeros(3), torch.ones(3)).outputs == 5


# (maker from a net, a width that fits, widths that do not)
WIDTHS = {
    "DiagonalNormal": (DiagonalNormal, 6, (1, 5, 7)),
    "FullNormal": (lambda net: FullNormal(net, 3), 15, (3, 6, 9, 14, 16)),
    "Normal, global": (lambda net: Normal(net, 3, "global"), 3, (1, 2, 6)),
    "Normal, dimension": (lambda net: Normal(net, 3, "dimension"), 3, (1, 2, 6)),
    "Normal, datum": (lambda net: Normal(net, 3, "datum"), 6, (1, 2, 3, 7)),
}


class Silent(nn.Module):
    """A net that does not tell its width."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, parent):
        return self.net(parent)


@pytest.mark.parametrize("wrap", [lambda net: net, Holes, lambda net: Standardize(net, torch.zeros(2), torch.ones(2))])
@pytest.mark.parametrize("name", WIDTHS)
def test_widths_are_checked_when_a_conditional_is_made(name, wrap):
    make, fits, others = WIDTHS[name]
    make(wrap(MLP(2, [], fits)))
    for width in others:
        with pytest.raises(InputError, match=f"{name.split(',')[0]} needs a net .*got {width}"):
            make(wrap(MLP(2, [], width)))


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_are_checked_at_the_first_call_where_not_known_before(name):
    make, fits, others = WIDTHS[name]
    assert make(Silent(MLP(2, [], fits)))(torch.zeros(4, 2)).event_shape == (3,)
    for width in others:
        conditional = make(Silent(MLP(2, [], width)))
        with pytest.raises(InputError, match=str(width)):
            conditional(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: StandardNormal(0), "`dims` must be at least 1; got 0"),
        (lambda: Binomial(MLP(2, [], 3), 0), "`total_count` must be at least 1; got 0"),
        (lambda: Normal(MLP(2, [], 3), 3, "row"), "`noise` must be one of .*'row'"),
        (lambda: Normal(MLP(2, [], 3), 3, scale=0.0), "`scale` must be above 0"),
        (lambda: Normal(MLP(2, [], 3), 3, scale=torch.tensor([1.0, -1.0, 1.0])), "`scale` must be above 0"),
        (lambda: Normal(MLP(2, [], 3), 3, scale=torch.tensor([1.0, torch.nan, 1.0])), "`scale` must be above 0"),
    ],
)
def test_arguments_of_conditionals(make, pattern):
    with pytest.raises(InputError, match=pattern):
        make()


def test_likelihoods_take_any_width():
    for make in (Bernoulli, lambda net: Binomial(net, 4)):
        assert make(MLP(2, [], 7))(torch.zeros(4, 2)).event_shape == (7,)
