"""Codes that stand for one factor each (notes, *Motivation*: representation learning; N3).

The KL of the ELBO, averaged over the data, splits into three (Chen et al., 2018): the mutual information of x and z,
the total correlation of the aggregated posterior q(z) = mean of q(z | x_n), and the KLs of single dimensions. Two
objectives weigh it otherwise:

    beta    E log p(x | z) - beta KL                                     (Higgins et al., 2017)
    TC      ELBO - (gamma - 1) TC, TC = KL(q(z) || prod_d q(z_d))        (estimated from the minibatch)

Neither is the ELBO, which stands beside the scores: what disentanglement costs. MIG, DCI and SAP compare codes, the
means of q(z | x), with factors that are known here: three, uniform and independent, turned into eight coordinates by a
matrix with orthonormal columns. All three have one strength, so that no variance tells them apart: independence alone
does, and that is what the total correlation measures. Informativeness tells how well all codes together predict the
factors; the other scores ask that each code tells of one factor only.

Each objective is trained from several seeds, since scores move with the seed. On real data nothing but luck or
knowledge says that the true factors are independent (Locatello et al., 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, Disentanglement, TrainConfig


def mixed(rows: int) -> tuple[Tensor, Tensor]:
    """Factors `(rows, 3)` of unit variance and x `(rows, 8)`, with noise of standard deviation 0.1."""
    factors = math.sqrt(12) * (torch.rand(rows, 3) - 0.5)
    mixing = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(3))).Q
    return factors, factors @ mixing.T + 0.1 * torch.randn(rows, 8)


def model() -> VAE:
    return VAE(
        BayesNet({"z": aevb.StandardNormal(5), "x | z": aevb.Normal(MLP(5, [32], 8), 8, "global")}),
        BayesNet({"z | x": aevb.DiagonalNormal(MLP(8, [32], 2 * 5))}),
    )


def configs(steps: int) -> dict[str, TrainConfig]:
    plain = TrainConfig(steps=steps, learning_rate=1e-2, average=0.99, validation=0.0, log_every=steps)
    return {
        "ELBO": plain,
        "beta = 2": dataclasses.replace(plain, beta=2.0),
        "TC, gamma = 6": dataclasses.replace(plain, tc_weight=6.0),
    }


def score(
    config: TrainConfig, data: Tensor, test: Tensor, factors: Tensor, seed: int
) -> tuple[Tensor, Disentanglement]:
    """ELBO by test row, and the scores of the posterior means."""
    torch.manual_seed(seed)
    vae = model()
    aevb.fit(vae, {"x": data}, dataclasses.replace(config, seed=seed))
    with torch.no_grad():
        elbo = aevb.elbo(vae, {"x": test}, 10)
    codes = vae.posterior({"x": test})["z"].mean
    return elbo, aevb.disentanglement(codes, factors, discrete=False)


def main(steps: int = 800, seeds: Sequence[int] = (0, 1)) -> dict[str, list[tuple[Tensor, Disentanglement]]]:
    torch.manual_seed(0)
    _, data = mixed(4000)
    factors, test = mixed(600)
    found = {}
    print("On 600 test rows          ELBO, nats      MIG   SAP    DCI: disentanglement, completeness, informativeness")
    for name, config in configs(steps).items():
        found[name] = [score(config, data, test, factors, seed) for seed in seeds]
        for seed, (elbo, scores) in zip(seeds, found[name], strict=True):
            print(
                f"  {name:14s} seed {seed}   {elbo.mean():6.2f} +- {elbo.std() / len(elbo) ** 0.5:.2f}   "
                f"{scores.mig:5.2f} {scores.sap:5.2f}   {scores.disentanglement:8.2f} {scores.completeness:10.2f} "
                f"{scores.informativeness:10.2f}"
            )
    _, scores = found["TC, gamma = 6"][0]
    print(f"Importance of each code (row) for each factor, TC, seed {seeds[0]}:")
    for row in scores.importance:
        print("   " + " ".join(f"{value:6.2f}" for value in row))
    return found


if __name__ == "__main__":
    main()
