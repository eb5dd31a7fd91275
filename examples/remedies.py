"""Posterior collapse, seen and remedied (notes, *Optimization issues*; N19).

Early in training log p(x | z) says little of z, and the KL pulls q(z | x) onto p(z). Where the way back is long, every
dimension's KL ends at zero: the posterior has collapsed, and `fit` says so in a warning. Four ways to train one model:

    plain       the ELBO
    warm-up     the weight of the KL rises from 0 to 1 over the first half of the steps
    cyclical    it rises four times
    free bits   E[log p(x | z)] - sum_g max(lambda, mean KL of group g): each of two groups of three dimensions may
                use lambda = 0.5 nats, as a mean over the minibatch, at no cost. No bound; what is printed is the ELBO

First a ring in two dimensions. The learned noise of p(x | z) starts as wide as the ring, and as long as the decoder is
nearly linear the directions of a ring, all alike, are explained by noise just as well: plain training stays there.
There the remedies raise the ELBO (but not free bits in three groups: z then carries its free nats, and is of no more
use for that). Then digits with an autoregressive likelihood, p(x | z) = prod_j p(x_j | x_<j, z),
which models pixels from pixels and needs z little. There a remedy makes z used, and the ELBO is the lower for it.

All figures are of test rows, with standard errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig


def ring(rows: int) -> Tensor:
    angle = 2 * math.pi * torch.rand(rows, 1)
    return torch.cat([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(rows, 2)


def ring_model() -> VAE:
    return VAE(
        BayesNet({"z": aevb.StandardNormal(6), "x | z": aevb.Normal(MLP(6, [32, 32], 2), 2, "global")}),
        BayesNet({"z | x": aevb.DiagonalNormal(MLP(2, [32], 2 * 6))}),
    )


def digits_model(pixels: int = 64, masked: int = 64) -> VAE:
    biases = MLP(6, [32], masked + pixels)
    return VAE(
        BayesNet({"z": aevb.StandardNormal(6), "x | z": aevb.AutoregressiveBernoulli(biases, pixels, [masked])}),
        BayesNet({"z | x": aevb.DiagonalNormal(MLP(pixels, [32], 2 * 6))}),
    )


def configs(steps: int) -> dict[str, TrainConfig]:
    plain = TrainConfig(steps=steps, batch_size=200, learning_rate=1e-2, average=0.99, validation=0.0)
    return {
        "plain": plain,
        "warm-up": dataclasses.replace(plain, kl_warmup_steps=steps // 2),
        "cyclical": dataclasses.replace(plain, kl_warmup_steps=steps // 8, kl_cycles=4),
        "free bits": dataclasses.replace(plain, free_bits=0.5, free_bits_groups=2),
    }


@torch.no_grad()
def measure(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    """ELBO by row, and the KL of each dimension of z, nats."""
    found = aevb.terms(vae, {"x": x}, samples=20)
    return {"elbo": found.weighted().mean(0), "kl": found.node_kl("z").flatten(0, -2).mean(0)}


def compare(
    train: Tensor, test: Tensor, model: Callable[[], VAE], steps: int, names: list[str]
) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    print("            ELBO, nats      less plain's      KL by dimension of z")
    for name in names:
        torch.manual_seed(0)
        vae = model()
        aevb.fit(vae, {"x": train}, configs(steps)[name])
        found[name] = one = measure(vae, test)
        error, rows = one["elbo"].std() / len(test) ** 0.5, one["elbo"] - found["plain"]["elbo"]
        gain = f"{rows.mean():6.2f} +- {rows.std() / len(test) ** 0.5:.2f}" if name != "plain" else " " * 14
        by_dimension = "  ".join(f"{kl:.2f}" for kl in one["kl"])
        print(f"  {name:9s} {one['elbo'].mean():6.2f} +- {error:.2f}   {gain}    {by_dimension}")
    return found


def main(steps: int = 1000) -> dict[str, dict[str, dict[str, Tensor]]]:
    torch.manual_seed(0)
    # Without z, p(x) is at best the Gaussian of the ring's moments: mean 0, variance 1 / 2 + 0.1 ** 2.
    without = -math.log(2 * math.pi * math.e * (0.5 + 0.1**2))
    print(f"A ring, Gaussian p(x | z); without z the best is {without:.2f}")
    found = {"ring": compare(ring(3000), ring(1000), ring_model, steps, list(configs(steps)))}
    x = torch.as_tensor(load_digits().data > 7).float()
    print("Digits, autoregressive p(x | z)")
    found["digits"] = compare(x[:1400], x[1400:], digits_model, steps // 2, ["plain", "warm-up"])
    return found


if __name__ == "__main__":
    main()
