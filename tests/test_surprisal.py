"""How surprising an entry is given the others: the Gaussian conditional, and a table with classes by quadrature.

Monte Carlo is compared with a closed form, and allowed four of its standard errors, told beside it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import aevb
from aevb import MLP, VAE, BayesNet, Columns, InputError, Mixed, surprisal
from aevb.distributions import log_prob
from test_imputation import conditional_law, holed, linear

pytestmark = pytest.mark.usefixtures("double")


def test_surprisal_converges_to_the_gaussian_conditional():
    vae, mean, cov = linear()
    x = holed(mean, cov)
    found = surprisal(vae, {"x": x}, 20_000)
    assert torch.equal(found.nll.isnan(), x.isnan())
    assert torch.equal(found.std_error.isnan(), x.isnan())
    for row in range(5):
        for j in (~x[row].isnan()).nonzero()[:, 0].tolist():
            asked = x[row].clone()
            asked[j] = math.nan
            loc, var = conditional_law(mean, cov, asked)
            at = int(asked.isnan()[:j].sum())
            truth = -float(torch.distributions.Normal(loc[at], var[at, at].sqrt()).log_prob(x[row, j]))
            assert abs(float(found.nll[row, j]) - truth) < 4 * float(found.std_error[row, j])
            assert float(found.std_error[row, j]) < 0.2


def test_a_row_alone_and_in_packs_of_any_size_has_the_same_figure():
    vae, mean, cov = linear()
    x = holed(mean, cov)
    whole = surprisal(vae, {"x": x}, 600)
    alone = surprisal(vae, {"x": x[2:3]}, 600, pack=256)
    torch.testing.assert_close(whole.nll[2:3], alone.nll, equal_nan=True)
    torch.testing.assert_close(whole.std_error[2:3], alone.std_error, equal_nan=True)


def test_classes_that_are_summed_over_and_columns_of_all_kinds():
    torch.manual_seed(0)
    kinds = ("categorical:3", "positive", "count", "binary")
    likelihood = Mixed(MLP(2 + 1, [], Mixed.width(kinds)), kinds)
    with torch.no_grad():
        likelihood.net.last.weight.mul_(1.5)
    q = {
        "y | x": aevb.Categorical(2, Columns(MLP(Columns.width(kinds), [4], 2), kinds)),
        "z | x": aevb.DiagonalNormal(Columns(MLP(Columns.width(kinds), [4], 2), kinds)),
    }
    p = {"y": aevb.Categorical(2), "z": aevb.StandardNormal(1), "x | y, z": likelihood}
    vae = VAE(BayesNet(p), BayesNet(q))
    with torch.no_grad():  # q wider than the posterior: under a narrower one the weights' standard error says little
        vae.q.conditional("z").net.net.last.bias[1] += 1.5
    x = torch.tensor([[2.0, 0.7, 3.0, 1.0], [0.0, math.nan, 0.0, 0.0]])
    assert bool((aevb.log_marginal(vae, {"x": x}, 20_000).pareto_k < 0.5).all())
    found = surprisal(vae, {"x": x}, 20_000)
    z = torch.linspace(-9, 9, 4001).reshape(-1, 1, 1)
    with torch.no_grad():
        d = [vae.p.distribution("x", {"y": torch.eye(2)[y].expand(4001, 1, 2), "z": z}) for y in range(2)]

    def marginal(known: torch.Tensor) -> torch.Tensor:
        joint = torch.stack([log_prob(each, x, known) - 0.5 * z[..., 0].square() for each in d])
        return joint.flatten(0, 1).logsumexp(0)

    known = ~x.isnan()
    for j in range(4):
        without = known.clone()
        without[:, j] = False
        truth = (marginal(without) - marginal(known)).detach()
        for row in known[:, j].nonzero()[:, 0].tolist():
            assert abs(float(found.nll[row, j] - truth[row])) < 4 * float(found.std_error[row, j])


def test_what_has_no_entries_is_told():
    vae, mean, cov = linear()
    x = holed(mean, cov)
    with pytest.raises(InputError, match="at least 2"):
        surprisal(vae, {"x": x}, 1)
    with pytest.raises(InputError, match="'y'"):
        surprisal(vae, {"x": x}, node="y")
    chain = aevb.AutoregressiveBernoulli(MLP(1, [], 3), 3, [])
    joint = VAE(
        BayesNet({"z": aevb.StandardNormal(1), "x | z": chain}),
        BayesNet({"z | x": aevb.DiagonalNormal(nn.Linear(3, 2))}),
    )
    with pytest.raises(InputError, match="does not factorize"):
        surprisal(joint, {"x": torch.ones(2, 3)}, 10)
