"""Five stochastic layers, and what it takes to use them (notes, *Encoder*; N9).

    p(z5) p(z4 | z5) ... p(z1 | z2) p(x | z1)

With a plain bottom-up q(z1 | x) q(z2 | z1) ... q(z5 | z4) the upper layers tend to carry nothing: their KL goes to
zero. Batch-norm and a KL weight that rises from 0 to 1 help. A ladder (Sonderby et al., 2016, "Ladder variational
autoencoders") goes further: it computes features h1, ..., h5 bottom-up without sampling and then draws top-down, each
level from the product of two Gaussians, evidence from below and p's own conditional from above. `Deterministic` makes
the features, `LadderNormal` the product; it holds p's factor itself, whose weights are trained once.

Data: scikit-learn's digits, 8 by 8 pixels, made binary. Printed on 397 test rows: the ELBO, and by level the KL (where
q goes bottom-up, the mean of log q - log p at its draws) and how many dimensions are active (variance of the posterior
mean over the data above 0.01).
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig

DIMS = (16, 8, 4, 3, 2)  # of z1 to z5
HIDDEN = 32


def net(inputs: int, outputs: int, batch_norm: bool = True) -> MLP:
    return MLP(inputs, [HIDDEN], outputs, batch_norm=batch_norm)


def generative(pixels: int, batch_norm: bool = True) -> BayesNet:
    factors: dict[str, nn.Module] = {"z5": aevb.StandardNormal(DIMS[-1])}
    for level, (dims, above) in enumerate(pairwise(DIMS), start=1):
        factors[f"z{level} | z{level + 1}"] = aevb.DiagonalNormal(net(above, 2 * dims, batch_norm))
    return BayesNet(factors | {"x | z1": aevb.Bernoulli(net(DIMS[0], pixels, batch_norm))})


def bottom_up(pixels: int, batch_norm: bool = True) -> VAE:
    factors: dict[str, nn.Module] = {"z1 | x": aevb.DiagonalNormal(net(pixels, 2 * DIMS[0], batch_norm))}
    for level, (below, dims) in enumerate(pairwise(DIMS), start=2):
        factors[f"z{level} | z{level - 1}"] = aevb.DiagonalNormal(net(below, 2 * dims, batch_norm))
    return VAE(generative(pixels, batch_norm), BayesNet(factors))


def ladder(pixels: int) -> VAE:
    p = generative(pixels)
    factors: dict[str, nn.Module] = {"h1 | x": aevb.Deterministic(net(pixels, HIDDEN))}
    for level in range(2, 6):
        factors[f"h{level} | h{level - 1}"] = aevb.Deterministic(net(HIDDEN, HIDDEN))
    factors["z5 | h5"] = aevb.DiagonalNormal(MLP(HIDDEN, [], 2 * DIMS[-1]))
    for level in range(4, 0, -1):
        evidence = MLP(HIDDEN, [], 2 * DIMS[level - 1])
        factors[f"z{level} | h{level}, z{level + 1}"] = aevb.LadderNormal(evidence, p.conditional(f"z{level}"))
    return VAE(p, BayesNet(factors))


@torch.no_grad()
def measure(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    """ELBO of each row, and by level the mean KL and the count of active dimensions."""
    vae.eval()
    found = aevb.terms(vae, {"x": x}, samples=20)
    active = aevb.active_units(vae, {"x": x})
    levels = [f"z{level}" for level in range(1, 6)]
    return {
        "elbo": found.weighted().mean(0),
        "kl": torch.stack([found.node_kl(level).sum(-1).mean() for level in levels]),
        "active": torch.stack([(active[level] > 0.01).sum() for level in levels]),
    }


def main(steps: int = 500) -> dict[str, dict[str, Tensor]]:
    x = torch.as_tensor(load_digits().data > 7).float()
    plain = TrainConfig(steps=steps, learning_rate=1e-2, average=0.99, validation=0.0, log_every=steps)
    warm = dataclasses.replace(plain, kl_warmup_steps=steps // 2)
    models = {
        "bottom-up, plain": (lambda: bottom_up(64, batch_norm=False), plain),
        "bottom-up": (lambda: bottom_up(64), warm),
        "ladder": (lambda: ladder(64), warm),
    }
    found = {}
    print(f"{'Nats a datum':18s}   ELBO     KL of z1 to z5                        active dimensions, of {DIMS}")
    for name, (build, config) in models.items():
        torch.manual_seed(0)
        vae = build()
        aevb.fit(vae, {"x": x[:1400]}, config)
        found[name] = one = measure(vae, x[1400:])
        divergences = " ".join(f"{kl:6.2f}" for kl in one["kl"])
        print(f"  {name:16s} {one['elbo'].mean():7.2f}   {divergences}   {one['active'].tolist()}")
    for better, worse in (("bottom-up", "bottom-up, plain"), ("ladder", "bottom-up")):
        gain = found[better]["elbo"] - found[worse]["elbo"]
        print(f"{better} less {worse}, row by row: {gain.mean():.2f} +- {gain.std() / len(gain) ** 0.5:.2f} nats")
    return found


if __name__ == "__main__":
    main()
