"""Nets, and the widths that conditionals ask of them."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import aevb
from aevb import MLP, Bernoulli, Binomial, DiagonalNormal, FullNormal, Holes, InputError, Normal, StandardNormal
from aevb.build import LIKELIHOODS
from aevb.nets import ACTIVATIONS, ConvNet, Fixed, ParametricMLP, Rows, Standardize, TransposedConvNet

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-12
FORMULAS = {
    "tanh": torch.tanh,
    "relu": lambda a: a * (a > 0),
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),
    "silu": lambda a: a / (1 + (-a).exp()),
    "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))),
}


def _random(*widths):
    """Parents of these widths at any leading axes."""
    return lambda lead: tuple(torch.randn(*lead, width) for width in widths)


# Name to (maker, parents at given leading axes); what is true of all nets is tested on each.
NETS = {
    "MLP": (lambda: MLP(5, [7, 7], 4), _random(3, 2)),
    "MLP, affine": (lambda: MLP(5, [], 4), _random(5)),
    "MLP, batch-norm": (lambda: MLP(5, [7, 6], 4, "tanh", batch_norm=True), _random(3, 2)),
    "MLP, gated": (lambda: MLP(5, [7, 6], 4, gated=True), _random(5)),
    "MLP, residual": (lambda: MLP(5, [7, 7, 6, 6], 4, residual=True), _random(5)),
    "MLP, all": (lambda: MLP(5, [7, 7], 4, batch_norm=True, gated=True, residual=True), _random(2, 3)),
    "Holes": (lambda: Holes(MLP(10, [7], 4)), _random(3, 2)),
    "Standardize": (lambda: Standardize(MLP(2, [7], 4), torch.ones(2), torch.tensor([0.5, 2.0])), _random(2)),
    "Rows": (lambda: Rows(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4))), _random(3, 2)),
    "ConvNet": (lambda: ConvNet((2, 5, 7), [3, 4], 4), _random(70)),
    "ConvNet, batch-norm": (lambda: ConvNet((2, 5, 7), [3, 4], 4, "gelu", batch_norm=True), _random(35, 35)),
    "TransposedConvNet": (lambda: TransposedConvNet(5, [4, 3], (1, 4, 1)), _random(2, 3)),
    "TransposedConvNet, batch-norm": (lambda: TransposedConvNet(5, [4, 3], (1, 4, 1), batch_norm=True), _random(5)),
    "ParametricMLP": (lambda: ParametricMLP(3, [6], 4), _random(2, 1, 52)),
    "Fixed": (lambda: Fixed(torch.randn(9, 4)), lambda lead: (torch.randint(9, lead).double(),)),
}


@pytest.fixture
def case(request):
    """One of `NETS`, its weights and running statistics moved off their start, and its parents' maker."""
    torch.manual_seed(0)
    make, parents = NETS[request.param]
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(3):
        net(*parents((20,)))
    return net, parents


every_net = pytest.mark.parametrize("case", NETS, indirect=True)


@every_net
@pytest.mark.parametrize("lead", [(6,), (3, 6), (2, 3, 6), (1, 1)])
def test_leading_axes_are_rows(case, lead):
    """Out of training every row is mapped alone."""
    net, make = case
    net.eval()
    parents = make(lead)
    together = net(*parents)
    assert together.shape == (*lead, 4)
    shape = [(math.prod(lead), *parent.shape[len(lead) :]) for parent in parents]
    rows = zip(*(parent.reshape(to) for parent, to in zip(parents, shape, strict=True)), strict=True)
    alone = torch.stack([net(*(parent[None] for parent in row))[0] for row in rows])
    torch.testing.assert_close(together.reshape(-1, 4), alone, rtol=0, atol=ROUNDING)


@every_net
@pytest.mark.parametrize("train", [True, False])
def test_gradients_reach_every_weight_and_parent(case, train):
    net, make = case
    net.train(train)
    parents = make((4, 6))
    wanted = [*net.parameters(), *([] if isinstance(net, Fixed) else [parent.requires_grad_() for parent in parents])]
    direction = torch.randn(4, 6, 4)
    for gradient in torch.autograd.grad((net(*parents) * direction).sum(), wanted):
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


@pytest.mark.parametrize("case", [name for name in NETS if name != "Fixed"], indirect=True)  # an index has no gradient
def test_gradients_are_those_of_finite_differences(case):
    net, make = case
    net.train()
    parents = tuple(parent.requires_grad_() for parent in make((3,)))
    assert torch.autograd.gradcheck(lambda *values: copy.deepcopy(net)(*values), parents)


@every_net
@pytest.mark.parametrize("train", [True, False])
def test_nets_are_traced_whole(case, train):
    """No graph break and no value read back; the trace computes what eager does."""
    net, make = case
    eager = net.train(train)
    traced = copy.deepcopy(eager)
    parents = make((2, 6))
    torch._dynamo.reset()
    found = torch.compile(traced, fullgraph=True, backend="aot_eager")(*parents)
    torch.testing.assert_close(found, eager(*parents), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(dict(traced.state_dict()), dict(eager.state_dict()), rtol=0, atol=ROUNDING)


@every_net
def test_nets_tell_their_width(case):
    net, _ = case
    assert net.outputs == (None if isinstance(net, Rows) else 4)


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


def test_initial_weights_behind_a_gate():
    """He et al. (2015): normal, of variance 2 / in, both halves of the layer."""
    torch.manual_seed(0)
    layer = MLP(300, [200], 2, gated=True).layers[0]
    squares = layer.weight.detach().square()
    assert abs(float(squares.mean()) - 2 / 300) < 4 * float(squares.std()) / math.sqrt(squares.numel())
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


PARENTS = {
    "a root": ((3,), (6, 2)),
    "classes": ((6, 3), (4, 1, 1, 2)),
    "draws": ((6, 3), (5, 6, 2)),
    "classes and draws": ((5, 6, 1), (4, 1, 1, 2), (6, 2)),
}


@pytest.mark.parametrize(
    ("hidden", "options"),
    [([], {}), ([7], {}), ([7, 6], {}), ([7], {"batch_norm": True}), ([7, 7], {"gated": True, "residual": True})],
)
@pytest.mark.parametrize("name", PARENTS)
def test_parents_with_axes_of_their_own_are_as_if_joined(name, hidden, options):
    """Values, gradients and batch statistics are those of the concatenation; the sums are in another order."""
    torch.manual_seed(0)
    net = MLP(5, hidden, 3, **options)
    other = copy.deepcopy(net)
    parents = [torch.randn(*shape).requires_grad_() for shape in PARENTS[name]]
    lead = torch.broadcast_shapes(*(parent.shape[:-1] for parent in parents))
    joined = torch.cat([parent.expand(*lead, parent.shape[-1]) for parent in parents], -1)
    found, expected = net(*parents), other(joined)
    assert found.shape == (*lead, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    direction = torch.randn_like(found)
    ours = torch.autograd.grad((found * direction).sum(), [*parents, *net.parameters()])
    theirs = torch.autograd.grad((expected * direction).sum(), [*parents, *other.parameters()])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=100 * ROUNDING)  # sums over 120 rows
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=ROUNDING)


def test_parents_with_axes_of_their_own_are_not_repeated():
    """No tensor on the way has the width of the joined parents."""
    x, y = torch.randn(6, 50), torch.eye(4).view(4, 1, 1, 4)
    net, sizes = MLP(54, [8], 3), []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Seen():
        net(x, y)
    assert max(sizes) <= max(54 * 8, 4 * 6 * 8) < 4 * 6 * 54


@pytest.mark.parametrize("parents", [[(5, 4)], [(5, 1)], [(5, 2), (5, 2)], [(3, 1, 1)]])
def test_wrong_input_width(parents):
    with pytest.raises(InputError, match="takes 3 inputs") as error:
        MLP(3, [4], 2)(*(torch.zeros(shape) for shape in parents))
    assert all(str(shape) in str(error.value) for shape in parents)
    assert f"MLP({sum(shape[-1] for shape in parents)}, ...)" in str(error.value)


def test_batch_norm_is_that_of_the_flattened_rows():
    """Statistics, values in training and values in evaluation are nn.BatchNorm1d's on (E * K * N, D)."""
    torch.manual_seed(0)
    net, norms = MLP(3, [5, 4], 2, "tanh", batch_norm=True), [nn.BatchNorm1d(5), nn.BatchNorm1d(4)]
    first, _, _, second, _, _, last = net.layers
    assert first.bias is None
    assert second.bias is None
    assert net.last is last
    assert last.bias is not None

    def expected(x):
        h = norms[0](x.flatten(0, -2) @ first.weight.T).tanh()
        h = norms[1](h @ second.weight.T).tanh()
        return (h @ last.weight.T + last.bias).reshape(*x.shape[:-1], 2)

    for _ in range(3):
        x = torch.randn(2, 4, 6, 3) + 1
        torch.testing.assert_close(net(x), expected(x), rtol=0, atol=ROUNDING)
    for layer, norm in zip((net.layers[1], net.layers[4]), norms, strict=True):
        torch.testing.assert_close(layer.net.state_dict(), norm.state_dict(), rtol=0, atol=ROUNDING)
        assert int(norm.num_batches_tracked) == 3
        norm.eval()
    net.eval()
    torch.testing.assert_close(net(x), expected(x), rtol=0, atol=ROUNDING)


def test_hidden_layers_are_normalised_in_training():
    torch.manual_seed(0)
    net = MLP(3, [50], 2, batch_norm=True)
    seen = []
    net.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    net(5 * torch.randn(4, 25, 3) + 2)
    flat = seen[0].flatten(0, 1).detach()
    torch.testing.assert_close(flat.mean(0), torch.zeros(50), rtol=0, atol=ROUNDING)
    # torch divides by sqrt(var + 1e-5), and these variances are above 1e-2.
    torch.testing.assert_close(flat.var(0, correction=0), torch.ones(50), rtol=0, atol=1e-3)


def test_gated_layers():
    """Tomczak and Welling (2018): h = (A x + b) * sigmoid(C x + d)."""
    torch.manual_seed(0)
    net, x = MLP(3, [5, 4], 2, gated=True), torch.randn(6, 3)
    h = x
    for layer in (net.layers[0], net.layers[2]):
        layer.bias.data.normal_()
        (a, c), (b, d) = layer.weight.chunk(2), layer.bias.chunk(2)
        h = (h @ a.T + b) / (1 + (-(h @ c.T + d)).exp())
    torch.testing.assert_close(net(x), h @ net.last.weight.T + net.last.bias, rtol=0, atol=ROUNDING)


def test_residual_layers():
    """He et al. (2016): h + f(W h + b) between hidden layers of one width, as ever elsewhere, the first layer too."""
    torch.manual_seed(0)
    net, x = MLP(5, [5, 5, 3, 3], 2, "tanh", residual=True), torch.randn(6, 5)
    linear = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    h = linear[0](x).tanh()
    h = h + linear[1](h).tanh()
    h = linear[2](h).tanh()
    h = h + linear[3](h).tanh()
    torch.testing.assert_close(net(x), linear[4](h), rtol=0, atol=ROUNDING)
    assert net.last is linear[4]


def test_options_leave_the_shape_of_a_net():
    """Each option changes what a hidden layer does, not what stands where: names of the plain net's weights stay."""
    plain = set(MLP(3, [4, 4], 2).state_dict())
    assert plain == {f"layers.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
    assert set(MLP(3, [4, 4], 2, gated=True).state_dict()) == plain


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: MLP(3, [], 2, batch_norm=True), r"`batch_norm` acts on hidden layers; got hidden=\[\]"),
        (lambda: MLP(3, [], 2, gated=True), r"`gated` acts on hidden layers; got hidden=\[\]"),
        (lambda: MLP(3, [4], 2, "tanh", gated=True), "`gated` takes the place of `activation`.*'tanh'"),
        (lambda: MLP(3, [4], 2, "swish", gated=True), "tanh.*'swish'"),
        (lambda: MLP(4, [4, 3, 4], 2, residual=True), r"`residual` .*got hidden=\[4, 3, 4\]"),
        (lambda: MLP(3, [], 2, residual=True), r"`residual` .*got hidden=\[\]"),
        (lambda: ConvNet((28, 28), [4], 2), r"`image` must be \(C, H, W\).*got \(28, 28\)"),
        (lambda: ConvNet((1, 0, 28), [4], 2), r"`image` .*got \(1, 0, 28\)"),
        (lambda: ConvNet((1, 28, 28), [], 2), "`channels` is empty"),
        (lambda: ConvNet((1, 28, 28), [4], 2, "swish"), "tanh.*'swish'"),
        (lambda: TransposedConvNet(2, [4], (28, 28)), r"`image` must be \(C, H, W\).*got \(28, 28\)"),
        (lambda: TransposedConvNet(2, [], (1, 28, 28)), "`channels` is empty"),
        (lambda: ParametricMLP(3, [4], 2, "swish"), "tanh.*'swish'"),
        (lambda: Fixed(torch.zeros(3)), r"`start` must be \(rows, outputs\).*got shape \(3,\)"),
        (lambda: Fixed(torch.zeros(0, 3)), r"`start` .*got shape \(0, 3\)"),
    ],
)
def test_arguments_of_nets(make, pattern):
    with pytest.raises(InputError, match=pattern):
        make()


@pytest.mark.parametrize(
    ("net", "shapes", "pattern"),
    [
        (ConvNet((1, 4, 4), [2], 3), [(5, 1, 4, 4)], r"ConvNet takes 16 inputs; .*\(5, 1, 4, 4\), 4 together"),
        (ConvNet((1, 4, 4), [2], 3), [(5, 16), (5, 16)], r"ConvNet takes 16 .*\(5, 16\), \(5, 16\), 32 together"),
        (TransposedConvNet(3, [2], (1, 4, 4)), [(5, 2)], r"takes 3 inputs; .*\(5, 2\).*TransposedConvNet\(2, \.\.\.\)"),
        (ParametricMLP(3, [], 2), [(5, 2), (8,)], r"takes 3 inputs; .*\(5, 2\), 2 together.*ParametricMLP\(2, "),
        (ParametricMLP(3, [], 2), [(5, 3), (4, 1, 9)], r"must end in 8 entries; got shape \(4, 1, 9\)"),
    ],
)
def test_wrong_widths_of_other_nets(net, shapes, pattern):
    with pytest.raises(InputError, match=pattern):
        net(*(torch.zeros(shape) for shape in shapes))


def test_rows_of_a_module_that_knows_one_batch():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2))
    a, b = torch.randn(7, 4), torch.randn(5, 7, 2)
    expected = inner(torch.cat([a.expand(5, 7, 4), b], -1).flatten(0, 1)).unflatten(0, (5, 7))
    assert torch.equal(Rows(inner)(a, b), expected)  # whatever event the module returns
    assert expected.shape == (5, 7, 4, 1, 2)
    assert Rows(nn.Linear(6, 3))(torch.zeros(6)).shape == (3,)
    assert Rows(MLP(6, [], 3)).outputs == 3
    with pytest.raises(InputError, match="needs a net of output width"):
        DiagonalNormal(Rows(MLP(6, [], 3)))


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}])
@pytest.mark.parametrize("image", [(1, 28, 28), (2, 5, 7), (3, 1, 6), (1, 9, 16), (1, 1, 1)])
@pytest.mark.parametrize("channels", [[4], [4, 3], [2, 3, 4, 5, 6]])
def test_sizes_of_images(image, channels, options):
    """Odd sides come out whole, however often they are halved; one net's smallest image is the other's."""
    down, up = ConvNet(image, channels, 5, **options), TransposedConvNet(5, channels[::-1], image, **options)
    x = torch.randn(2, 3, math.prod(image))
    assert down(x).shape == (2, 3, 5)
    assert up(down(x)).shape == x.shape
    assert (down.inputs, down.outputs) == (up.outputs, up.inputs) == (math.prod(image), 5)
    assert down.last.in_features == up.layers[0].out_features


def test_convolutions():
    """The layers by hand, in torch's functions; the image is flattened channel by channel, as `x.flatten(1)` does."""
    torch.manual_seed(0)
    down, up = ConvNet((2, 5, 7), [3, 4], 6, "tanh"), TransposedConvNet(6, [4, 3], (2, 5, 7), "tanh")
    for net in (down, up):
        for parameter in net.parameters():
            parameter.data.normal_()
    image = torch.randn(8, 2, 5, 7)
    first, second = (layer for layer in down.layers if isinstance(layer, nn.Conv2d))
    h = F.conv2d(image, first.weight, first.bias, stride=2, padding=1).tanh()
    h = F.conv2d(h, second.weight, second.bias, stride=2, padding=1).tanh()
    assert h.shape == (8, 4, 2, 2)
    expected = h.flatten(1) @ down.last.weight.T + down.last.bias
    torch.testing.assert_close(down(image.flatten(1)), expected, rtol=0, atol=1e-10)

    z = torch.randn(8, 6)
    small = (z @ up.layers[0].weight.T + up.layers[0].bias).unflatten(1, (4, 2, 2)).tanh()
    first, second = (layer for layer in up.layers if isinstance(layer, nn.ConvTranspose2d))
    h = F.conv_transpose2d(small, first.weight, first.bias, stride=2, padding=1, output_padding=(0, 1)).tanh()
    assert h.shape == (8, 3, 3, 4)
    h = F.conv_transpose2d(h, second.weight, None, stride=2, padding=1)
    torch.testing.assert_close(up(z), h.flatten(1) + up.last.bias, rtol=0, atol=1e-10)


def test_every_pixel_is_seen():
    """No stride or padding leaves a pixel out, also in the last row and column of odd and even sides."""
    for size in ((1, 4, 5), (1, 7, 8)):
        net = ConvNet(size, [3, 4], 2, "tanh")
        x = torch.randn(1, math.prod(size)).requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).sum(), x)
        assert bool((gradient != 0).all())


def test_every_pixel_is_drawn():
    for size in ((1, 4, 5), (1, 7, 8)):
        net = TransposedConvNet(2, [4, 3], size, "tanh")
        assert bool((net(torch.randn(1, 2)) != 0).all())


def test_an_image_starts_at_the_mean():
    """`last.bias` has an entry for each channel and pixel; with the weights at zero it is the result."""
    net, mean = TransposedConvNet(3, [4], (2, 5, 7)), torch.randn(70)
    with torch.no_grad():
        net.last.bias.copy_(mean)
        net.layers[-3].weight.zero_()
    assert torch.equal(net(torch.randn(6, 3)), mean.expand(6, 70))


def test_a_convolution_sees_holes_as_channels():
    torch.manual_seed(0)
    inner = ConvNet((2, 3, 4), [3], 5)
    x = torch.randn(6, 12)
    x[:, 3] = torch.nan
    image = torch.stack([x.nan_to_num(0.0), (~x.isnan()).double()], 1).flatten(1)
    torch.testing.assert_close(Holes(inner)(x), inner(image), rtol=0, atol=ROUNDING)


def test_batch_norm_of_a_convolution_is_over_rows_and_pixels():
    torch.manual_seed(0)
    net, norm = ConvNet((1, 4, 4), [3], 2, batch_norm=True), nn.BatchNorm2d(3)
    x = torch.randn(5, 6, 16)
    assert net.layers[1].bias is None
    norm(net.layers[1](x.reshape(30, 1, 4, 4)))
    net(x)
    torch.testing.assert_close(net.layers[2].state_dict(), norm.state_dict(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("hidden", [[], [6], [6, 5]])
@pytest.mark.parametrize("lead", [(), (4, 1), (3, 4, 1), (7,), (4, 7)])
def test_weights_as_values(hidden, lead):
    """Values and gradients are those of one MLP for each vector of weights."""
    torch.manual_seed(0)
    net, plain = ParametricMLP(3, hidden, 2, "tanh"), MLP(3, hidden, 2, "tanh")
    assert not list(net.parameters())
    assert net.weight_count == parameters_to_vector(plain.parameters()).numel()
    x, weights = torch.randn(7, 3).requires_grad_(), torch.randn(*lead, net.weight_count).requires_grad_()
    found = net(x, weights)
    assert found.shape == (*torch.broadcast_shapes(lead, (7,)), 2)
    direction = torch.randn_like(found)
    ours = torch.autograd.grad((found * direction).sum(), [x, weights])

    shape = found.shape[:-1]
    row_weights = weights.detach().expand(*shape, -1).reshape(-1, net.weight_count)
    row_inputs = x.detach().expand(*shape, 3).reshape(-1, 3)
    grad_x, grad_weights = torch.zeros(len(row_inputs), 3), torch.zeros_like(row_weights)
    for row, (a, w) in enumerate(zip(row_inputs, row_weights, strict=True)):
        a = a.clone().requires_grad_()
        vector_to_parameters(w, plain.parameters())
        out = plain(a)
        torch.testing.assert_close(out, found.reshape(-1, 2)[row], rtol=0, atol=ROUNDING)
        to_x, *to_weights = torch.autograd.grad(out @ direction.reshape(-1, 2)[row], [a, *plain.parameters()])
        grad_x[row], grad_weights[row] = to_x, parameters_to_vector(to_weights)
    expected = (grad_x.reshape(*shape, 3), grad_weights.reshape(*shape, -1))
    for one, two in zip(ours, expected, strict=True):
        two = two.sum_to_size(one.shape)
        torch.testing.assert_close(one, two, rtol=0, atol=100 * ROUNDING)


def test_one_vector_of_weights_is_a_sequential():
    torch.manual_seed(0)
    net = ParametricMLP(3, [6, 5], 2, "silu")
    plain = nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 2))
    weights, x = parameters_to_vector(plain.parameters()), torch.randn(4, 7, 3)
    torch.testing.assert_close(net(x, weights), plain(x), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(net(x[..., :1], x[..., 1:], weights), plain(x), rtol=0, atol=ROUNDING)
    assert net(torch.zeros(3), weights).shape == (2,)
    assert net(torch.zeros(3), weights.expand(4, 1, -1)).shape == (4, 1, 2)
    ours = torch.autograd.grad(net(x, weights).square().sum(), list(plain.parameters()))
    theirs = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=100 * ROUNDING)


def test_a_vector_of_weights_comes_apart():
    net = ParametricMLP(2, [3], 1)
    (a, b), (c, d) = net.split(torch.arange(13.0).expand(4, 1, 13))
    assert [part.shape for part in (a, b, c, d)] == [(4, 1, 3, 2), (4, 1, 3), (4, 1, 1, 3), (4, 1, 1)]
    assert a[0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (b[0, 0].tolist(), c[0, 0].tolist(), d[0, 0].tolist()) == ([6, 7, 8], [[9, 10, 11]], [12])


def test_fixed_rows():
    start = torch.randn(4, 3)
    net = Fixed(start)
    index = torch.tensor([2.0, 0.0, 2.0])
    assert torch.equal(net(index), start[[2, 0, 2]])
    assert torch.equal(net(index.long()), start[[2, 0, 2]])
    assert net(index.expand(5, 3)).shape == (5, 3, 3)
    assert net(torch.tensor(1.0)).shape == (3,)
    (gradient,) = torch.autograd.grad(net(index).sum(), net.table)
    assert gradient[:, 0].tolist() == [1, 0, 2, 0]
    start.zero_()  # it keeps its own copy
    assert bool(net(index).any())
    assert DiagonalNormal(Fixed(torch.zeros(4, 6)))(index).event_shape == (3,)
    assert Fixed(torch.ones(2, 1, dtype=torch.int64)).table.dtype == torch.float64


@pytest.mark.parametrize("index", [4.0, -1.0, 1.5, math.nan, math.inf, -math.inf])
def test_fixed_rows_that_are_not_there(index):
    with pytest.raises(InputError, match=rf"whole numbers from 0 to 3; got {index}"):
        Fixed(torch.zeros(4, 2))(torch.tensor([0.0, index]))


def test_fixed_rows_that_a_float_cannot_tell_apart():
    """bfloat16 holds whole numbers up to 2 ** 8 exactly."""
    index = torch.zeros(2, dtype=torch.bfloat16)
    assert Fixed(torch.zeros(256, 2))(index).shape == (2, 2)
    with pytest.raises(InputError, match="bfloat16 cannot tell 257 rows apart"):
        Fixed(torch.zeros(257, 2))(index)


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


# -- convolutional models by name --------------------------------------------------------------------------------------

IMAGES = {"features": 70, "net": "convolutional", "image": (2, 5, 7), "channels": (3, 4), "latents": 3}


def _levels(rows=6):
    torch.manual_seed(1)
    return torch.randint(0, 256, (rows, 70)).double()


@pytest.mark.parametrize("holes", [False, True])
def test_a_convolutional_model_is_the_one_composed_of_its_nets(holes):
    """Same seed, same weights, same bound; with holes the net sees the channels of the image, then of the mask."""
    x = _levels()
    x[:, 0] = 7.0  # a pixel that never changes
    if holes:
        x[1, :3] = x[2, 40:] = math.nan
    torch.manual_seed(0)
    config = aevb.ModelConfig(likelihood="discretized-logistic", activation="tanh", holes=holes, **IMAGES)
    built = aevb.build_vae(config, x)
    torch.manual_seed(0)
    decoder = TransposedConvNet(3, (4, 3), (4, 5, 7), "tanh")
    mean = x.nanmean(0)
    with torch.no_grad():
        decoder.last.bias[:70].copy_(mean / 127.5 - 1)  # locations of all channels come before scales
    encoder = ConvNet((4 if holes else 2, 5, 7), (3, 4), 6, "tanh")
    spread = (x - mean).square().nanmean(0).mean().sqrt().expand(70)
    by_hand = aevb.VAE(
        aevb.BayesNet({"z": StandardNormal(3), "x | z": aevb.DiscretizedLogistic(decoder)}),
        aevb.BayesNet({"z | x": DiagonalNormal(Standardize(Holes(encoder) if holes else encoder, mean, spread))}),
    )
    bounds = []
    for vae in (built, by_hand):
        torch.manual_seed(2)
        bounds.append(aevb.elbo(vae, {"x": x}))
    assert bool(bounds[0].isfinite().all())
    torch.testing.assert_close(bounds[0], bounds[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name != "mixed"])
def test_every_likelihood_has_convolutional_nets(name):
    x = _levels()
    x = {"bernoulli": x > 128, "autoregressive": x > 128, "normal": x / 9, "student-t": x / 9}.get(name, x).double()
    count = {"total_count": 255} if name in ("binomial", "beta-binomial") else {}
    for more in ({}, {"noise": "datum"} if name in ("normal", "zero-inflated") else {"batch_norm": True}):
        torch.manual_seed(0)
        vae = aevb.build_vae(aevb.ModelConfig(likelihood=name, **IMAGES, **count, **more), x)
        assert any(isinstance(module, ConvNet) for module in vae.q.modules())
        assert any(isinstance(module, TransposedConvNet) for module in vae.p.modules()) == (name != "autoregressive")
        bound = aevb.elbo(vae, {"x": x})
        grads = torch.autograd.grad(bound.sum(), [p for p in vae.parameters() if p.requires_grad])
        assert bool(bound.isfinite().all())
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert aevb.log_marginal(vae.eval(), {"x": x}, 4).log_prob.shape == (6,)
    if name not in ("student-t", "autoregressive", "zero-inflated"):  # decoders start at the mean of the pixels
        at_zero = vae.p.distribution("x", {"z": torch.zeros(1, 3)}).mean[0]
        assert torch.corrcoef(torch.stack([at_zero, x.mean(0)]))[0, 1] > 0.9


def test_latent_sizes_and_learned_inputs_beside_convolutions():
    x = _levels()
    for more in ({"likelihood": "negative-binomial", "library": "latent"}, {"likelihood": "poisson", "prior": "vamp"}):
        vae = aevb.build_vae(aevb.ModelConfig(components=4, **IMAGES, **more), x)
        assert bool(aevb.elbo(vae, {"x": x}).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"image": (3, 5, 7)}, r"`image` must be \(C, H, W\) with 70 = C H W; got \(3, 5, 7\).*\(1, H, W\)"),
        ({"image": ()}, r"`image` must be \(C, H, W\)"),
        ({"image": (10, 7)}, r"`image` must be \(C, H, W\)"),
        ({"channels": ()}, "`channels` must be one number of at least 1 for each convolution"),
        ({"channels": (4, 0)}, r"`channels` must be .*got \(4, 0\). Write e.g. --channels 32 64"),
        ({"net": "plain"}, r"`image` goes with net convolutional only; got \(2, 5, 7\) with plain. Drop it"),
        ({"net": "gated", "image": ()}, "`channels` goes with net convolutional only"),
        ({"hidden": (9,)}, r"`hidden` has no effect on convolutional layers; got \(9,\). Give --channels, or drop it"),
        ({"posterior": "product"}, "take one column at a time"),
        ({"likelihood": "mixed", "kinds": ("count",) * 70}, "take one column at a time"),
    ],
)
def test_convolutional_models_that_cannot_be(fields, told):
    with pytest.raises(InputError, match=told):
        aevb.ModelConfig(**IMAGES | fields)


def test_a_configuration_with_convolutions_comes_back_from_json():
    config = aevb.ModelConfig(**IMAGES)
    assert aevb.ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
