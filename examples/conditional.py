"""Conditional models, p(x | c) and p(x, z | c) (notes, *Conditional models*, *Deep latent-variable models*; N4, N8).

`given="c"` names the context: something both networks may condition on and neither models.

    p(x | c)                     nothing latent; q is empty and the bound is log p(x | c) itself: maximum likelihood
    p(z | c) p(x | z, c)         with q(z | x, c): log p(x | c) by importance sampling, with its standard error

Data: c uniform in [0, 1] and x = +-(0.3 + c) + 0.1 eps, either branch with probability one half. A Gaussian p(x | c)
cannot split in two, whatever its nets; with z it can. The true conditional density is known, so that what each model
lacks to it can be told: E log p*(x | c) - log p(x | c), a mean KL divergence.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig


def data(rows: int) -> dict[str, Tensor]:
    c = torch.rand(rows, 1)
    sign = 2.0 * (torch.rand(rows, 1) < 0.5) - 1
    return {"c": c, "x": sign * (0.3 + c) + 0.1 * torch.randn(rows, 1)}


def true_log_prob(values: dict[str, Tensor]) -> Tensor:
    branches = torch.stack([td.Normal(sign * (0.3 + values["c"]), 0.1).log_prob(values["x"]) for sign in (-1, 1)])
    return (branches.logsumexp(0) - math.log(2))[:, 0]


def observed() -> VAE:
    """p(x | c) = N(mu(c), sigma(c)^2)."""
    return VAE(
        BayesNet({"x | c": aevb.Normal(MLP(1, [32], 2), 1, noise="datum")}),
        BayesNet({}),
        given="c",
    )


def latent() -> VAE:
    return VAE(
        BayesNet({
            "z | c": aevb.DiagonalNormal(MLP(1, [32], 2)),
            "x | z, c": aevb.Normal(MLP(2, [32, 32], 1), 1),
        }),
        BayesNet({"z | x, c": aevb.DiagonalNormal(MLP(2, [32], 2))}),
        given="c",
    )  # fmt: skip


def draws(vae: VAE, c: float, rows: int = 4000) -> Tensor:
    """Draws of x given one c, `(rows,)`."""
    return vae.p.sample(rows, {"c": torch.full((rows, 1), c)})["x"][:, 0]


def main(steps: int = 2000) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    train, test = data(4000), data(1000)
    truth = true_log_prob(test)
    print("Mean of log p(x | c) over 1000 test rows, nats, and what it lacks to the truth, row by row")
    print(f"  truth            {truth.mean():7.3f}")
    found = {}
    for name, build in {"p(x | c)": observed, "p(x, z | c)": latent}.items():
        torch.manual_seed(0)
        vae = build()
        config = TrainConfig(steps=steps, learning_rate=5e-3, kl_warmup_steps=steps // 4, average=0.99, validation=0.0)
        aevb.fit(vae, train, config)
        marginal = aevb.log_marginal(vae, test, 1000, pack=16_384)
        lacking = truth - marginal.log_prob
        print(
            f"  {name:12s}     {marginal.log_prob.mean():7.3f}   lacks {lacking.mean():6.3f} +- "
            f"{lacking.std() / len(lacking) ** 0.5:.3f}   (largest Monte Carlo error of a row "
            f"{marginal.std_error.max():.3f})"
        )
        found[name] = {"lacking": lacking, "monte_carlo": marginal.std_error, "draws": draws(vae, 0.7)}
    print("Draws at c = 0.7, where the branches are at -1 and 1: share within 0.3 of either")
    for name, one in found.items():
        near = ((one["draws"].abs() - 1).abs() < 0.3).double().mean()
        print(f"  {name:12s}     {near:.3f} +- {(near * (1 - near) / len(one['draws'])) ** 0.5:.3f}; of the data 0.997")
    return found


if __name__ == "__main__":
    main()
