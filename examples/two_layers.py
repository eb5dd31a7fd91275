"""Two stochastic layers z2 -> z1 -> x, and two ways to infer them (notes, *Encoder*; N9).

    p(z2) p(z1 | z2) p(x | z1)
    bottom-up  q(z1 | x) q(z2 | z1)            top-down  q(z2 | x) q(z1 | z2, x)

q is a Bayesian network like p, of any acyclic wiring: each of the two is a dictionary. The ELBO and the bound of Burda
et al. (2016), log (1/K) sum_k p(x, z_k) / q(z_k | x), rise towards log p(x) from below.

Data: two factors a = (a1, a2), each of them seen through itself and its square, with noise, and mixed into eight
coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig

D, D1, D2 = 8, 4, 2


def data(rows: int) -> Tensor:
    """Two layers in truth: a ~ N(0, I), b = (a1, a1^2, a2, a2^2) / 2 + noise, x = B b + noise."""
    a = torch.randn(rows, D2)
    b = torch.stack([a[:, 0], a[:, 0].square(), a[:, 1], a[:, 1].square()], 1) / 2 + 0.2 * torch.randn(rows, D1)
    mixing = torch.randn(D1, D, generator=torch.Generator().manual_seed(1))
    return b @ mixing + 0.2 * torch.randn(rows, D)


def generative() -> BayesNet:
    return BayesNet({
        "z2": aevb.StandardNormal(D2),
        "z1 | z2": aevb.DiagonalNormal(MLP(D2, [32], 2 * D1)),
        "x | z1": aevb.Normal(MLP(D1, [32], D), D),
    })  # fmt: skip


def bottom_up() -> BayesNet:
    return BayesNet({
        "z1 | x": aevb.DiagonalNormal(MLP(D, [32], 2 * D1)),
        "z2 | z1": aevb.DiagonalNormal(MLP(D1, [32], 2 * D2)),
    })  # fmt: skip


def top_down() -> BayesNet:
    return BayesNet({
        "z2 | x": aevb.DiagonalNormal(MLP(D, [32], 2 * D2)),
        "z1 | z2, x": aevb.DiagonalNormal(MLP(D2 + D, [32], 2 * D1)),
    })  # fmt: skip


def one_layer() -> VAE:
    """What the second layer is worth: p(z1) is N(0, I)."""
    return VAE(
        BayesNet({"z1": aevb.StandardNormal(D1), "x | z1": aevb.Normal(MLP(D1, [32], D), D)}),
        BayesNet({"z1 | x": aevb.DiagonalNormal(MLP(D, [32], 2 * D1))}),
    )


def bounds(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    """Per row: ELBO, IWAE with 5 and 50 draws, and the estimate of log p(x)."""
    with torch.no_grad():
        found = {"ELBO": aevb.elbo(vae, {"x": x}, 100)}
        for k in (5, 50):
            found[f"IWAE {k}"] = torch.stack([aevb.iwae(vae, {"x": x}, k) for _ in range(10)]).mean(0)
    return found | {"log p": aevb.log_marginal(vae, {"x": x}, 1000, pack=16_384).log_prob.float()}


def main(steps: int = 1500) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    train, test = data(4000), data(300)
    models = {
        "one layer": one_layer,
        "bottom-up": lambda: VAE(generative(), bottom_up()),
        "top-down": lambda: VAE(generative(), top_down()),
    }
    found = {}
    for name, build in models.items():
        torch.manual_seed(0)
        vae = build()
        aevb.fit(vae, {"x": train}, TrainConfig(steps=steps, learning_rate=5e-3, average=0.99, validation=0.0))
        found[name] = bounds(vae, test)
    error = found["one layer"]["log p"].std() / len(test) ** 0.5
    print(
        f"Nats a datum, means over 300 test rows; other rows would move them by +- {error:.2f}, the differences by less"
    )
    for name, rows in found.items():
        print(f"  {name:10s}" + "".join(f"   {bound} {value.mean():7.3f}" for bound, value in rows.items()))
    for name, baseline in (("bottom-up", "one layer"), ("top-down", "one layer"), ("top-down", "bottom-up")):
        gain = found[name]["log p"] - found[baseline]["log p"]
        print(f"  log p, {name} less {baseline}: {gain.mean():6.3f} +- {gain.std() / len(gain) ** 0.5:.3f}")
    return found


if __name__ == "__main__":
    main()
