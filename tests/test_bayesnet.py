"""Networks: keys, wiring, what is latent, sampling, densities, and every error at the boundary.

An error names the thing, and says what to do; Monte Carlo comparisons allow four standard errors.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import stats
from torch import Tensor, nn

import aevb
from aevb import (
    MLP,
    VAE,
    BayesNet,
    Bernoulli,
    Binomial,
    DiagonalNormal,
    FullNormal,
    Holes,
    InputError,
    Normal,
    Standardize,
    StandardNormal,
)
from aevb.bounds import prepare, terms

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-10
ENTRIES = {
    "elbo": aevb.elbo,
    "iwae": lambda vae, values: aevb.iwae(vae, values, 2),
    "log_marginal": lambda vae, values: aevb.log_marginal(vae, values, 9),
}
"""Public functions through which values enter."""


def says(*fragments: str) -> str:
    """A pattern that finds the fragments in this order."""
    return "(?s)" + ".*".join(fragments)


def simple(k: int = 2, d: int = 3, holes: bool = False) -> VAE:
    torch.manual_seed(0)
    net = Holes(MLP(2 * d, [4], 2 * k)) if holes else MLP(d, [4], 2 * k)
    return VAE(
        BayesNet({"z": StandardNormal(k), "x | z": Bernoulli(MLP(k, [4], d))}), BayesNet({"z | x": DiagonalNormal(net)})
    )


def binary(rows: int = 4, d: int = 3) -> Tensor:
    return (torch.rand(rows, d) < 0.5).to(torch.get_default_dtype())


# Keys and wiring.


@pytest.mark.parametrize(
    ("key", "parents"),
    [
        ("x", ()),
        ("x | z", ("z",)),
        ("x|z", ("z",)),
        ("  x  |  z  ", ("z",)),
        ("x | y, z", ("y", "z")),
        ("x | z, y", ("z", "y")),
        ("x | z,y , w_1", ("z", "y", "w_1")),
    ],
)
def test_keys_name_a_node_and_its_parents_in_order(key, parents):
    net = BayesNet({key: DiagonalNormal(nn.Identity())})
    assert net.nodes == ("x",)
    assert net.parents == {"x": parents}
    assert set(net.inputs) == set(parents)
    assert net.keys == (f"x | {', '.join(parents)}" if parents else "x",)


BAD_KEYS = (
    "", " ", "|", "x |", "| z", "x | y | z", "x | y,", "x | ,y", "x | y,,z", "x y", "x | y z", "1x", "x | 2", "x-1",
    "x.y", "x | z, z", "x : z", "p(x | z)",
)  # fmt: skip


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys(key):
    with pytest.raises(InputError, match=says("key", "must be a name", "identifiers")) as error:
        BayesNet({key: StandardNormal(2)})
    assert repr(key) in str(error.value)


def test_node_given_twice():
    with pytest.raises(InputError, match=says("`z` is given twice", "'z | x'", "Keep one")):
        BayesNet({"z": StandardNormal(2), "z | x": StandardNormal(2)})


def test_factor_that_is_no_module():
    with pytest.raises(InputError, match=says("'x | z'", "nn.Module", "function", "Wrap")):
        BayesNet({"x | z": lambda z: z})


def test_factor_that_returns_no_distribution():
    net = BayesNet({"z": StandardNormal(2), "x | z": MLP(2, [], 3)})
    with pytest.raises(InputError, match=says("`x`", "returned Tensor", "Wrap")):
        net.sample(3)


@pytest.mark.parametrize(
    ("factors", "members"),
    [(("z | z",), "z"), (("a | b", "b | a"), "ab"), (("r", "a | c, r", "b | a", "c | b"), "abc")],
)
def test_cycles(factors, members):
    with pytest.raises(InputError, match=says("cycle", " -> ", "Drop")) as error:
        BayesNet({key: StandardNormal(2) for key in factors})
    told = str(error.value).split("cycle, ")[1].split(";")[0].split(" -> ")
    assert set(told) == set(members)
    assert told[0] == told[-1]
    parents = {key.split(" | ")[0]: key.split(" | ")[-1].split(", ") for key in factors}
    assert all(before in parents[after] for before, after in itertools.pairwise(told))  # along the arrows


@pytest.mark.parametrize("order", list(itertools.permutations(["a", "b | a", "c | a, b", "d | c, u"])))
def test_nodes_are_in_topological_order(order):
    net = BayesNet({key: StandardNormal(2) for key in order})
    position = {node: i for i, node in enumerate(net.nodes)}
    assert set(position) == set("abcd")
    assert net.inputs == ("u",)
    assert all(position[pa] < position[n] for n, parents in net.parents.items() for pa in parents if pa in position)


@pytest.mark.parametrize("name", ["type", "values", "forward", "parameters", "training", "nodes", "sample", "x", "_"])
def test_any_identifier_is_a_name(name):
    """A column may be called as an attribute of a module is."""
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(2), f"{name} | z": Bernoulli(MLP(2, [], 3))})
    vae = VAE(p, BayesNet({f"z | {name}": DiagonalNormal(MLP(3, [], 4))}))
    assert p.sample(5)[name].shape == (5, 3)
    assert aevb.elbo(vae, {name: binary()}).shape == (4,)
    assert len(list(vae.parameters())) == 4
    vae.load_state_dict(vae.state_dict())


class Order(nn.Module):
    """N(first - 10 second, 1e-6): tells its parents apart."""

    def forward(self, first: Tensor, second: Tensor) -> td.Distribution:
        return td.Independent(td.Normal(first - 10 * second, 1e-6), 1)


def test_parents_arrive_in_the_order_of_the_key():
    given = {"a": torch.tensor([[1.0]]), "b": torch.tensor([[2.0]])}
    one, other = BayesNet({"x | a, b": Order()}), BayesNet({"x | b, a": Order()})
    assert float(one.sample(1, given)["x"]) == pytest.approx(-19, abs=1e-4)
    assert float(other.sample(1, given)["x"]) == pytest.approx(-8, abs=1e-4)


# The pair.


@pytest.mark.parametrize(
    ("p", "q", "given", "pattern"),
    [
        pytest.param(["z", "x | zz"], ["z | x"], (), says("`zz`", "`given`", "nothing", "given"), id="misspelt in p"),
        pytest.param(["z", "x | z, c"], ["z | x"], (), says("`c`", "Name every input"), id="context not named"),
        pytest.param(["z", "x | z"], ["z | x"], ("c",), says("nothing", "`c`", "Name every"), id="context unused"),
        pytest.param(["z", "x | z"], ["z | x", "w | x"], (), says("q infers `w`", "Give p"), id="stranger in q"),
        pytest.param(["z", "x | z"], ["z | xx"], (), says("q depends on `xx`", "Use nodes"), id="misspelt in q"),
        pytest.param(["z", "x | z"], ["z | x, c"], (), says("q depends on `c`", "given"), id="context of q alone"),
    ],
)
def test_pairs_that_do_not_close(p, q, given, pattern):
    with pytest.raises(InputError, match=pattern):
        VAE(
            BayesNet({key: StandardNormal(2) for key in p}),
            BayesNet({key: StandardNormal(2) for key in q}),
            given=given,
        )


@pytest.mark.parametrize("bound", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        pytest.param(lambda: {"y": binary()}, says("`y`", "`z`, `x`", "Rename"), id="unknown"),
        pytest.param(lambda: {"x": binary(), "X": binary()}, says("`X`", "Rename"), id="one unknown"),
        pytest.param(lambda: {"z": binary(d=2)}, says("`x` of p", "nor inferred", "Give"), id="neither read nor drawn"),
        pytest.param(lambda: {}, says("empty", "at least one"), id="nothing"),
        pytest.param(lambda: {"x": binary(d=1)}, says("takes 3 inputs", "1 together", "flatten"), id="one column"),
        pytest.param(lambda: {"x": binary(d=4)}, says("takes 3 inputs", "4 together"), id="a column too many"),
        pytest.param(lambda: {"x": binary()[0]}, "shape", id="no rows axis"),
        pytest.param(lambda: {"x": torch.tensor(1.0)}, says(r"x: \(\)", "entry a row"), id="a number"),
        pytest.param(lambda: {"x": binary(4), "z": torch.zeros(1, 2)}, says("share", r"\(1, 2\)"), id="rows broadcast"),
        pytest.param(lambda: {"x": binary(), "z": torch.zeros(4, 1)}, says("`z`", r"\(4, 1\)"), id="a column of z"),
    ],
)
def test_values_that_do_not_fit(values, pattern, bound):
    """Shapes that torch would broadcast among them."""
    with pytest.raises(InputError, match=pattern):
        bound(simple(), values())


@pytest.mark.parametrize("bound", ENTRIES.values(), ids=ENTRIES)
def test_no_rows_are_refused(bound):
    with pytest.raises(InputError, match="no rows"):
        bound(simple(), {"x": binary()[:0]})


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 50), (50, 1), (2, 3)])
def test_event_shapes_of_the_two_sides_must_agree(ours, theirs, kl):
    """A 1-d posterior against a 50-d prior broadcasts in torch."""
    vae = VAE(
        BayesNet({"z": StandardNormal(theirs), "x | z": Bernoulli(MLP(ours, [], 3))}),
        BayesNet({"z | x": DiagonalNormal(MLP(3, [], 2 * ours))}),
    )
    with pytest.raises(InputError, match=says("`z`", rf"\({ours},\)", rf"\({theirs},\)", "same dimensions")):
        aevb.elbo(vae, {"x": binary()}, kl=kl)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3)])
def test_terms_refuse_what_would_broadcast(shape):
    """Also where nothing was looked at beforehand."""
    vae = VAE(BayesNet({"z": StandardNormal(50)}), BayesNet({}))
    with pytest.raises(InputError, match=says("`z`", r"\(N, 50\)", "got shape")):
        terms(vae, {"z": torch.zeros(shape)})


def test_latents_are_decided_by_each_call():
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"b": StandardNormal(2), "a | b": DiagonalNormal(MLP(2, [], 4)), "x | a": Bernoulli(MLP(2, [], 3))}),
        BayesNet({"a | x": DiagonalNormal(MLP(3, [], 4)), "b | a": DiagonalNormal(MLP(2, [], 4))}),
    )
    x, a, b = binary(), torch.randn(4, 2), torch.randn(4, 2)
    assert vae.latents({"x": x}) == ("a", "b")
    assert vae.latents({"x": x, "a": a}) == ("b",)
    assert vae.latents({"x": x, "a": a, "b": b}) == ()
    # Observed nodes are factors of p; q's factor of an observed node is not used.
    expected = sum(vae.p.log_prob({"x": x, "a": a, "b": b}).values())
    torch.testing.assert_close(aevb.elbo(vae, {"x": x, "a": a, "b": b}), expected, rtol=0, atol=ROUNDING)
    bound = aevb.elbo(vae, {"x": x, "a": a}).sum()
    unused = torch.autograd.grad(bound, list(vae.q.conditional("a").parameters()), allow_unused=True)
    assert all(gradient is None for gradient in unused)


def test_an_empty_q_is_legal():
    torch.manual_seed(0)
    vae = VAE(BayesNet({"x": StandardNormal(3), "y | x": DiagonalNormal(MLP(3, [], 4))}), BayesNet({}))
    values = {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}
    expected = sum(vae.p.log_prob(values).values())
    for bound in (aevb.elbo(vae, values), aevb.iwae(vae, values, 3)):
        torch.testing.assert_close(bound, expected, rtol=0, atol=ROUNDING)
    with pytest.raises(InputError, match=says("`x` of p", "q a factor")):
        aevb.elbo(vae, {"y": values["y"]})


def test_a_module_in_both_networks_counts_once():
    torch.manual_seed(0)
    shared = DiagonalNormal(MLP(2, [], 4))  # 8 weights, 4 biases
    vae = VAE(
        BayesNet({"b": StandardNormal(2), "a | b": shared, "x | a": Bernoulli(MLP(2, [], 3))}),
        BayesNet({"b | x": DiagonalNormal(MLP(3, [], 4)), "a | b": shared}),
    )
    assert sum(parameter.numel() for parameter in vae.parameters()) == 12 + 9 + 16
    assert len({id(parameter) for parameter in vae.parameters()}) == len(list(vae.parameters())) == 6
    # p(a | b) = q(a | b): its log-ratio is zero at every draw, its KL too.
    found = terms(vae, {"x": binary()}, 5)
    torch.testing.assert_close(found.node_kl("a"), torch.zeros(5, 4, 2), rtol=0, atol=ROUNDING)
    sampled = terms(vae, {"x": binary()}, 5, kl="sampled")
    torch.testing.assert_close(sampled.node_kl("a"), torch.zeros(5, 4, 1), rtol=0, atol=ROUNDING)


def test_posterior_is_taken_at_the_parents_means():
    torch.manual_seed(0)
    top, low = MLP(3, [], 4), MLP(2 + 3, [], 2)
    vae = VAE(
        BayesNet({"b": StandardNormal(2), "a | b": DiagonalNormal(MLP(2, [], 2)), "x | a": Bernoulli(MLP(1, [], 3))}),
        BayesNet({"b | x": DiagonalNormal(top), "a | b, x": DiagonalNormal(low)}),
    )
    x = binary()
    found = vae.posterior({"x": x})
    assert list(found) == ["b", "a"]
    b = top(x)[:, :2]
    torch.testing.assert_close(found["b"].mean, b.detach(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found["a"].mean, low(b, x)[:, :1].detach(), rtol=0, atol=ROUNDING)
    assert not found["a"].mean.requires_grad
    assert list(vae.posterior({"x": x, "b": b})) == ["a"]


# Sampling and densities of one network.


class Chain:
    """a -> b -> c and a -> c, linear and Gaussian, with its joint mean and covariance."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.b_a, self.c_ab = MLP(2, [], 2), MLP(4, [], 1)
        self.net = BayesNet({
            "c | a, b": Normal(self.c_ab, 1, "global"),
            "a": StandardNormal(2),
            "b | a": Normal(self.b_a, 2, "dimension"),
        })  # fmt: skip
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(0.7 * torch.randn_like(parameter))
        # v = lower v + offset + noise, so that v = (1 - lower)^-1 (offset + noise).
        lower, offset, variance = np.zeros((5, 5)), np.zeros(5), np.ones(5)
        lower[2:4, :2], lower[4, :4] = self.b_a.last.weight.detach(), self.c_ab.last.weight.detach()
        offset[2:4], offset[4] = self.b_a.last.bias.detach(), self.c_ab.last.bias.detach()
        softplus = nn.functional.softplus
        variance[2:4] = softplus(self.net.conditional("b").raw_noise.detach()).square()
        variance[4] = softplus(self.net.conditional("c").raw_noise.detach()).square()
        solve = np.linalg.inv(np.eye(5) - lower)
        self.mean, self.cov = solve @ offset, solve @ np.diag(variance) @ solve.T


def test_ancestral_sampling():
    """Moments of the joint within 4 standard errors."""
    chain, draws = Chain(), 100_000
    found = chain.net.sample(draws)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "a": (draws, 2), "b": (draws, 2), "c": (draws, 1),
    }  # fmt: skip
    assert not any(value.requires_grad for value in found.values())
    centred = torch.cat([found["a"], found["b"], found["c"]], 1).numpy() - chain.mean
    assert np.all(np.abs(centred.mean(0)) < 4 * np.sqrt(np.diag(chain.cov) / draws))
    products = centred[:, :, None] * centred[:, None, :]
    assert np.all(np.abs(products.mean(0) - chain.cov) < 4 * products.std(0) / math.sqrt(draws))


def test_sampling_with_nodes_held_fixed():
    """What is given stays, its descendants follow, its ancestors are drawn as if it were not known."""
    chain, draws = Chain(), 50_000
    b = torch.tensor([5.0, -5.0]).expand(draws, -1)
    found = chain.net.sample(draws, {"b": b})
    assert torch.equal(found["b"], b)
    assert float(found["a"].mean(0).abs().max()) < 4 / math.sqrt(draws)
    weight, bias = chain.c_ab.last.weight[0].detach(), chain.c_ab.last.bias.detach()
    noise = nn.functional.softplus(chain.net.conditional("c").raw_noise.detach())
    variance = float(weight[:2].square().sum() + noise.square())
    error = found["c"].mean() - (weight[2:] @ b[0] + bias)
    assert abs(float(error)) < 4 * math.sqrt(variance / draws)


def test_sampling_needs_its_inputs():
    net = BayesNet({"x | c": DiagonalNormal(MLP(2, [], 2))})
    with pytest.raises(InputError, match=says("input", "`c`", "Give it")):
        net.sample(3)
    with pytest.raises(InputError, match=says("`x`", "Give it")):
        net.log_prob({"c": torch.zeros(3, 2)})


def test_every_sampled_row_is_its_own():
    """One row asked for and five given must not become five rows with one noise."""
    net = BayesNet({"x | c": DiagonalNormal(MLP(2, [], 2))})
    given = {"c": torch.zeros(5, 2)}
    assert net.sample(5, given)["x"].unique().numel() == 5
    for rows in (1, 3):
        with pytest.raises(InputError, match="rows"):
            net.sample(rows, given)


def test_sampling_refuses_names_it_does_not_know():
    """A misspelt node to hold fixed would be drawn instead, without a word."""
    net = BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(MLP(2, [], 3))})
    with pytest.raises(InputError, match="Z"):
        net.sample(3, {"Z": torch.zeros(3, 2)})


def test_log_prob_of_a_network_is_that_of_the_joint():
    chain = Chain()
    v = stats.multivariate_normal(chain.mean, chain.cov).rvs(20, random_state=0)
    values = dict(zip("abc", torch.as_tensor(v).split([2, 2, 1], dim=1), strict=True))
    found = chain.net.log_prob(values)
    assert set(found) == set("abc")
    expected = stats.multivariate_normal(chain.mean, chain.cov).logpdf(v)
    np.testing.assert_allclose(sum(found.values()).detach().numpy(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3)])
def test_log_prob_of_a_network_refuses_what_would_broadcast(shape):
    with pytest.raises(InputError, match="z"):
        BayesNet({"z": StandardNormal(50)}).log_prob({"z": torch.zeros(shape)})


@pytest.mark.parametrize("offset", [1e9, 1e40])
def test_values_that_the_models_dtype_cannot_tell_apart_are_refused(offset):
    x = torch.randn(30, 3, dtype=torch.float64)
    x[:, 1] += offset
    vae = aevb.build_vae(aevb.ModelConfig(features=3, latents=2)).float()
    with pytest.raises(InputError, match="`x`"):
        aevb.elbo(vae, {"x": x})


# Context: p(x, z | c).


def test_conditional_marginal_likelihood():
    """N4: z | c and x | z, c linear and Gaussian; log p(x | c) in closed form, each row within 4 standard errors."""
    torch.manual_seed(0)
    z_c, x_zc = MLP(2, [], 1), MLP(3, [], 3)
    p = BayesNet({"z | c": Normal(z_c, 1, "global"), "x | z, c": Normal(x_zc, 3, "global")})
    q = BayesNet({"z | x, c": DiagonalNormal(MLP(5, [], 2))})
    with torch.no_grad():
        for parameter in p.parameters():
            parameter.copy_(torch.randn_like(parameter))
        q.conditional("z").net.last.weight.mul_(0.1)
        q.conditional("z").net.last.bias.copy_(torch.tensor([0.0, 3.0]))
    vae = VAE(p, q, given=["c"])
    c = torch.randn(10, 2)
    x = p.sample(10, {"c": c})["x"]

    softplus = nn.functional.softplus
    t, s = (softplus(p.conditional(node).raw_noise.detach()) for node in ("z", "x"))
    w_z, w_c = x_zc.last.weight.detach().split([1, 2], dim=1)
    cov = t**2 * w_z @ w_z.T + s**2 * torch.eye(3)
    mean = z_c(c).detach() @ w_z.T + c @ w_c.T + x_zc.last.bias.detach()
    exact = torch.stack([
        torch.as_tensor(stats.multivariate_normal(m.numpy(), cov.numpy()).logpdf(row.numpy()))
        for m, row in zip(mean, x, strict=True)
    ])  # fmt: skip
    found = aevb.log_marginal(vae, {"x": x, "c": c}, 20_000)
    assert bool((found.std_error < 0.1).all())
    assert bool(((found.log_prob - exact).abs() < 4 * found.std_error).all())
    with pytest.raises(InputError, match=says("Context", "`c`", "Give it")):
        aevb.elbo(vae, {"x": x})
    # Samples of x given one c have its mean, 4 standard errors.
    draws = p.sample(50_000, {"c": c[:1].expand(50_000, -1)})["x"]
    assert bool(((draws.mean(0) - mean[0]).abs() < 4 * (cov.diagonal() / 50_000).sqrt()).all())


# What enters: `prepare`.


class Watched(nn.Module):
    """A net with dropout and batch statistics, neither of which a check may touch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, outputs))

    def forward(self, parent: Tensor) -> Tensor:
        return self.layers(parent.reshape(-1, parent.shape[-1])).reshape(*parent.shape[:-1], -1)


@pytest.mark.parametrize("training", [True, False])
def test_checks_leave_model_and_generator_as_they_were(training):
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(Watched(2, 3))}),
        BayesNet({"z | x": DiagonalNormal(Watched(3, 4))}),
    )
    vae.train(training)
    vae.q.eval()
    modes = [module.training for module in vae.modules()]
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    x = binary()
    generator = torch.get_rng_state()
    values = prepare(vae, {"x": x})
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(values["x"], x)
    assert [module.training for module in vae.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int64), list])
def test_arrays_of_any_kind_are_taken_in_the_models_precision(make):
    vae = simple().float()
    values = prepare(vae, {"x": make([[0, 1, 1], [1, 0, 0]])})
    assert values["x"].dtype == torch.float32
    assert values["x"].tolist() == [[0, 1, 1], [1, 0, 0]]


def one_column(d: int, make) -> VAE:
    return VAE(
        BayesNet({"z": StandardNormal(2), "x | z": make(MLP(2, [], d))}),
        BayesNet({"z | x": DiagonalNormal(MLP(d, [], 4))}),
    )


@pytest.mark.parametrize(
    ("make", "bad", "pattern"),
    [
        pytest.param(Bernoulli, math.inf, says("`x` is infinite", r"\(2, 1\)", "finite"), id="infinity"),
        pytest.param(Bernoulli, -math.inf, says("`x` is infinite", r"\(2, 1\)", "finite"), id="minus infinity"),
        pytest.param(Bernoulli, 0.5, says("`x` is 0.5", r"\(2, 1\)", "Bernoulli", "Binarise"), id="grey"),
        pytest.param(Bernoulli, -1.0, says("`x` is -1.0", r"\(2, 1\)", "Bernoulli"), id="minus one"),
        pytest.param(
            lambda net: Binomial(net, 16), 17.0, says("`x` is 17.0", r"\(2, 1\)", "Binomial", "total_count"), id="17"
        ),
        pytest.param(lambda net: Binomial(net, 16), 2.5, says("`x` is 2.5", r"\(2, 1\)", "whole counts"), id="2.5"),
        pytest.param(lambda net: Binomial(net, 16), -1.0, says("`x` is -1.0", r"\(2, 1\)"), id="a count of -1"),
        pytest.param(lambda net: Normal(net, 3), math.inf, says("`x` is infinite", r"\(2, 1\)"), id="normal, infinity"),
        pytest.param(Bernoulli, math.nan, says("`x`", "NaN", "'z | x'", "Holes"), id="a hole that q cannot see"),
    ],
)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_values_the_model_cannot_take(make, bad, pattern, entry):
    torch.manual_seed(0)
    vae = one_column(3, make)
    x = binary()
    assert bool(aevb.elbo(vae, {"x": x}).isfinite().all())
    x[2, 1] = bad
    with pytest.raises(InputError, match=pattern):
        entry(vae, {"x": x})


def test_counts_up_to_the_largest_are_taken():
    vae = one_column(1, lambda net: Binomial(net, 16))
    assert bool(aevb.elbo(vae, {"x": torch.arange(17.0).unsqueeze(1)}).isfinite().all())


def test_holes_are_taken_where_every_net_sees_them():
    vae, x = simple(holes=True), binary()
    x[1, 2] = x[3, 0] = torch.nan
    x[2] = torch.nan
    bound = aevb.elbo(vae, {"x": x})
    gradients = torch.autograd.grad(bound.sum(), list(vae.parameters()))
    assert bool(bound.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    # Through a net around it, too.
    torch.manual_seed(0)
    net = Standardize(Holes(MLP(6, [], 4)), torch.zeros(3), torch.ones(3))
    around = VAE(vae.p, BayesNet({"z | x": DiagonalNormal(net)}))
    assert bool(aevb.elbo(around, {"x": x}).isfinite().all())


def test_holes_in_a_parent_of_p_need_a_net_that_sees_them():
    p = BayesNet({"z | c": DiagonalNormal(MLP(2, [], 4)), "x | z": Bernoulli(MLP(2, [], 3))})
    vae = VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(3, [], 4))}), given=("c",))
    c = torch.zeros(4, 2)
    c[0, 0] = torch.nan
    with pytest.raises(InputError, match=says("`c`", "row 0", "known in every row")):
        aevb.elbo(vae, {"x": binary(), "c": c})


def test_holes_in_what_does_not_factorize_are_refused_for_that():
    """Not as values outside the support: a NaN is a missing value wherever it stands."""
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": FullNormal(MLP(2, [], 15), 3)}),
        BayesNet({"z | x": DiagonalNormal(Holes(MLP(6, [], 4)))}),
    )
    x = torch.randn(4, 3)
    x[1, 1] = torch.nan
    with pytest.raises(InputError, match=says("factorize", "missing")):
        aevb.elbo(vae, {"x": x})


@pytest.mark.parametrize("samples", [0, -3])
def test_no_draws_are_refused(samples):
    for bound in (aevb.elbo, aevb.iwae, aevb.log_weights):
        with pytest.raises(InputError, match=says("`samples`", str(samples), "positive")):
            bound(simple(), {"x": binary()}, samples)
