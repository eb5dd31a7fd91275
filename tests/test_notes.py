"""Identities of the notes that hold exactly on problems small enough to enumerate, and where a printed line slips.

N18 (*Marginal Likelihood and ELBO as KL Divergences*) is about discrete x: for points in a continuous space the entropy
of the empirical distribution is minus infinity. Numbers in brackets are those of the errata.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributions as td
from scipy import integrate
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, Bernoulli, Categorical, DiagonalNormal, StandardNormal
from aevb.bounds import terms

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-12


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew, biases too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def kl(q: Tensor, p: Tensor) -> Tensor:
    """Sum q log q / p over all entries of two tables; 0 log 0 is 0."""
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum()


class Toy(NamedTuple):
    """x one of five, z one of three, all conditionals tables; 17 data, of which one value of x never occurs."""

    vae: VAE
    data: Tensor  # codes (17,)

    @property
    def q_data(self) -> Tensor:
        """q_D(x), (5,)."""
        return torch.bincount(self.data, minlength=5) / len(self.data)

    @property
    def entropy(self) -> Tensor:
        return -torch.xlogy(self.q_data, self.q_data).sum()

    @property
    def q_z(self) -> Tensor:
        """q(z | x), (5, 3)."""
        return self.vae.q.distribution("z", {"x": torch.eye(5)}).mean.detach()

    @property
    def joint(self) -> Tensor:
        """p(x, z), (5, 3), of the nodes' log-densities at every state."""
        x, z = torch.cartesian_prod(torch.arange(5), torch.arange(3)).unbind(1)
        by_node = self.vae.p.log_prob({"x": x, "z": z})
        return (by_node["x"] + by_node["z"]).exp().reshape(5, 3).detach()


@pytest.fixture
def toy() -> Toy:
    p = BayesNet({"z": Categorical(3, learned=True), "x | z": Categorical(5, MLP(3, [], 5))})
    q = BayesNet({"z | x": Categorical(3, MLP(5, [], 3))})
    data = torch.tensor([0] * 6 + [1] * 5 + [2] * 4 + [4] * 2)
    return Toy(shaken(VAE(p, q)), data[torch.randperm(17)])


def test_the_tables_are_those_of_the_model(toy: Toy):
    """p(x, z) sums to one; its sum over z is what a summed latent gives for log p(x)."""
    assert float(toy.joint.sum()) == pytest.approx(1, abs=ROUNDING)
    log_p = aevb.iwae(toy.vae, {"x": torch.arange(5)}, samples=1).detach()
    torch.testing.assert_close(log_p, toy.joint.sum(1).log(), rtol=0, atol=ROUNDING)


def test_maximum_likelihood_is_a_kl_divergence(toy: Toy):
    """KL(q_D(x) || p(x)) = -mean log p(x) - H(q_D)."""
    mean = aevb.iwae(toy.vae, {"x": toy.data}, samples=1).mean().detach()
    torch.testing.assert_close(kl(toy.q_data, toy.joint.sum(1)), -mean - toy.entropy, rtol=0, atol=ROUNDING)


def test_the_elbo_is_a_kl_divergence_and_the_chain_rule(toy: Toy):
    """KL(q_D,phi(x, z) || p(x, z)) = -mean ELBO - H(q_D) = KL(q_D || p(x)) + E KL(q(z | x) || p(z | x)) (7).

    The notes print -E log q_D, that is +H(q_D), in the first equation: off by twice the entropy, so that the chain rule
    in the second fails (9).
    """
    augmented = toy.q_data[:, None] * toy.q_z
    whole = kl(augmented, toy.joint)
    elbo = aevb.elbo(toy.vae, {"x": toy.data}).mean().detach()
    torch.testing.assert_close(whole, -elbo - toy.entropy, rtol=0, atol=ROUNDING)
    p_x = toy.joint.sum(1)
    inference = sum(
        weight * kl(q, p) for weight, q, p in zip(toy.q_data, toy.q_z, toy.joint / p_x[:, None], strict=True)
    )
    chain = kl(toy.q_data, p_x) + inference
    torch.testing.assert_close(whole, chain, rtol=0, atol=ROUNDING)
    assert float(whole) >= float(kl(toy.q_data, p_x))
    printed = -elbo - (toy.q_data * toy.q_data.clamp_min(1e-300).log()).sum()
    torch.testing.assert_close(printed - chain, 2 * toy.entropy, rtol=0, atol=ROUNDING)
    assert float(printed - chain) > 2


def test_the_aggregated_posterior_against_the_prior(toy: Toy):
    """Mean KL(q(z | x) || p(z)) = I(x; z) + KL(q_phi(z) || p(z)): what z tells of x, and how far q(z) is from p(z)."""
    found = terms(toy.vae, toy.vae.p.to_states({"x": toy.data}))
    mean = found.node_kl("z").sum(-1).mean().detach()
    augmented, aggregated, prior = toy.q_data[:, None] * toy.q_z, toy.q_data @ toy.q_z, toy.joint.sum(0)
    information = kl(augmented, toy.q_data[:, None] * aggregated)
    torch.testing.assert_close(mean, information + kl(aggregated, prior), rtol=0, atol=ROUNDING)
    assert 0.05 < float(information) <= float(toy.entropy)


def test_the_best_p_of_both_objectives(toy: Toy):
    """p of the augmented data, q_D(x) q(z | x), makes both divergences zero: mean log p = mean ELBO = -H(q_D)."""
    augmented = toy.q_data[:, None] * toy.q_z
    prior, net = toy.vae.p.conditional("z"), toy.vae.p.conditional("x").net.last
    with torch.no_grad():
        prior.logits.copy_(augmented.sum(0).log())
        net.weight.copy_((augmented / augmented.sum(0)).clamp_min(1e-300).log())  # a table (5, 3): z is one-hot
        net.bias.zero_()
    for bound in (aevb.elbo(toy.vae, {"x": toy.data}), aevb.iwae(toy.vae, {"x": toy.data}, samples=1)):
        torch.testing.assert_close(bound.mean().detach(), -toy.entropy, rtol=0, atol=ROUNDING)


def test_bayes_rule_makes_a_classifier():
    """N1: p(y | x) from log p(x, y) of each class, z summed, is the ratio of enumerated joint probabilities."""
    p = BayesNet({
        "y": Categorical(3, learned=True), "z | y": Categorical(4, MLP(3, [], 4)),
        "x | y, z": Categorical(5, MLP(7, [], 5)),
    })  # fmt: skip
    vae = shaken(VAE(p, BayesNet({"z | x, y": Categorical(4, MLP(8, [], 4))})))
    y, z, x = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).unbind(1)
    table = sum(p.log_prob({"x": x, "y": y, "z": z}).values()).detach().exp().reshape(3, 4, 5).sum(1)  # p(y, x)
    every = torch.arange(5)
    log_joint = [aevb.log_marginal(vae, {"x": every, "y": torch.full((5,), c)}, samples=1).log_prob for c in range(3)]
    found = torch.stack(log_joint, 1).softmax(1)
    torch.testing.assert_close(found, (table / table.sum(0)).T, rtol=0, atol=ROUNDING)


class Sums(NamedTuple):
    """log p of each of N = 6 rows of a mixture, exact, and its gradient in all of p's parameters."""

    values: Tensor  # (6,)
    gradients: Tensor  # (6, P)

    def of(self, rows: tuple[int, ...]) -> Tensor:
        """log p(M) of the notes and its gradient, sums over the rows, `(1 + P,)`."""
        return torch.cat([self.values[list(rows)].sum()[None], self.gradients[list(rows)].sum(0)])


@pytest.fixture
def sums() -> Sums:
    p = BayesNet({"y": Categorical(2, learned=True), "x | y": Bernoulli(MLP(2, [], 4))})
    vae = shaken(VAE(p, BayesNet({"y | x": Categorical(2, MLP(4, [], 2))})))
    log_p = aevb.iwae(vae, {"x": (torch.rand(6, 4) < 0.5).double()}, samples=1)
    parameters = list(p.parameters())
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in log_p]
    return Sums(log_p.detach(), torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_minibatches_are_unbiased_with_the_factor(sums: Sums, size: int):
    """N6: over all minibatches of a size, without replacement, the mean of N/N_M log p(M) is log p(D); gradients too.

    Without the factor it is N_M/N of it (6).
    """
    whole = sums.of(tuple(range(6)))
    plain = torch.stack([sums.of(rows) for rows in itertools.combinations(range(6), size)]).mean(0)
    torch.testing.assert_close(6 / size * plain, whole, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(plain, size / 6 * whole, rtol=0, atol=ROUNDING)
    # As fit has it: the mean over the minibatch, whose mean is 1/N of log p(D).
    torch.testing.assert_close(plain / size, whole / 6, rtol=0, atol=ROUNDING)


def test_unbiasedness_needs_equal_inclusion_and_no_independence(sums: Sums):
    """(14): rows drawn without replacement are dependent, which lowers the variance by (N - N_M) / (N - 1).

    Both designs are unbiased, as is a partition into fixed batches; windows that leave the ends out more often are not.
    """
    whole, size = sums.of(tuple(range(6))), 2
    scaled = {
        "without": torch.stack([3 * sums.of(rows) for rows in itertools.permutations(range(6), size)]),
        "with": torch.stack([3 * sums.of(rows) for rows in itertools.product(range(6), repeat=size)]),
        "partition": torch.stack([3 * sums.of(rows) for rows in ((0, 4), (1, 2), (3, 5))]),
    }
    for estimates in scaled.values():
        torch.testing.assert_close(estimates.mean(0), whole, rtol=0, atol=ROUNDING)
    variance = {name: estimates.var(0, correction=0) for name, estimates in scaled.items()}
    torch.testing.assert_close(variance["without"], variance["with"] * (6 - size) / 5, rtol=0, atol=ROUNDING)
    windows = torch.stack([3 * sums.of((first, first + 1)) for first in range(5)]).mean(0)
    assert float((windows - whole).abs().max()) > 1e-3


def test_the_elbo_and_its_gap_by_quadrature():
    """N7, N11: one continuous z and a nonlinear decoder; log p(x) = ELBO + KL(q(z | x) || p(z | x)), each an integral.

    The sampled ELBO meets the integral within 4 standard errors, for both forms of its KL, and iwae lies between.
    """
    vae = VAE(
        BayesNet({"z": StandardNormal(1), "x | z": Bernoulli(MLP(1, [4], 3, "tanh"))}),
        BayesNet({"z | x": DiagonalNormal(MLP(3, [4], 2))}),
    )
    shaken(vae, seed=3)
    x = torch.tensor([[1.0, 0.0, 1.0]])
    found = vae.posterior({"x": x})["z"]
    q = td.Normal(found.mean[0, 0], found.stddev[0, 0])

    @torch.no_grad()
    def log_joint(z: float) -> float:
        return float(sum(part[0] for part in vae.p.log_prob({"z": torch.tensor([[z]]), "x": x}).values()))

    def integral(integrand: Callable[[float], float]) -> float:
        value, error = integrate.quad(
            integrand, -12, 12, epsabs=1e-11, epsrel=1e-11, limit=400, points=[0.0, float(q.mean)]
        )
        assert error < 1e-8
        return value

    def log_q(z: float) -> float:
        return float(q.log_prob(torch.tensor(z)))

    log_p = math.log(integral(lambda z: math.exp(log_joint(z))))
    elbo = integral(lambda z: math.exp(log_q(z)) * (log_joint(z) - log_q(z)))
    gap = integral(lambda z: math.exp(log_q(z)) * (log_q(z) - (log_joint(z) - log_p)))
    assert elbo + gap == pytest.approx(log_p, abs=1e-7)
    assert gap > 0.01
    torch.manual_seed(0)
    rows = {"x": x.repeat(40_000, 1)}
    for form in ("auto", "sampled"):
        draws = aevb.elbo(vae, rows, kl=form).detach()
        assert abs(float(draws.mean()) - elbo) < 4 * float(draws.std()) / 200
    five = aevb.iwae(vae, {"x": x.repeat(10_000, 1)}, samples=5).detach()
    assert elbo < float(five.mean()) < log_p + 4 * float(five.std()) / 100
    marginal = aevb.log_marginal(vae, {"x": x}, samples=50_000)
    assert abs(float(marginal.log_prob) - log_p) < 4 * float(marginal.std_error)
