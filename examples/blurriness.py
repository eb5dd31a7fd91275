"""Why samples of a VAE are blurred, and two cures (notes, *Blurriness*; N20).

Training lowers KL(q_D,phi(x, z) || p(x, z)) = E_q [log q - log p] + const, an expectation over the data: p is punished
without limit where the data are and p has no mass (log p goes to *minus* infinity there), and hardly for mass where
there are no data. A p that cannot be right has therefore too much variance; and q counts as well as p, since a
q(z | x) too simple for the posterior makes p pay for every z that q wrongly draws. The cures are

    a more flexible q    a normalizing flow in place of a factorized Gaussian,
    a more flexible p    a learned prior, here a mixture of 20 Gaussians, in place of N(0, I).

Data: a ring of radius 1 with radial standard deviation 0.05, whose density is known. The picture goes to the path given
on the command line: `python examples/blurriness.py ring.png`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributions as td
from matplotlib.figure import Figure
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig

WIDTH = 0.05


def ring(rows: int) -> Tensor:
    angle, radius = 2 * math.pi * torch.rand(rows), 1 + WIDTH * torch.randn(rows)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def log_density(x: Tensor) -> Tensor:
    """Log p*(x) of the ring in nats; radii below zero, 20 standard deviations away, are left out."""
    radius = x.norm(dim=1)
    return td.Normal(1.0, WIDTH).log_prob(radius) - math.log(2 * math.pi) - radius.log()


def model(posterior: str = "Gaussian", prior: str = "N(0, I)") -> VAE:
    """The noise of p(x | z) is learned; the same nets everywhere, but for what the flow's net has to return."""
    width = {"Gaussian": 4, "flow": aevb.SylvesterFlow.width(2, 4)}[posterior]
    encoder = MLP(2, [32], width)
    q = aevb.DiagonalNormal(encoder) if posterior == "Gaussian" else aevb.SylvesterFlow(encoder, 2, 4)
    z = aevb.StandardNormal(2) if prior == "N(0, I)" else aevb.MixtureOfNormals(2, 20)
    return VAE(BayesNet({"z": z, "x | z": aevb.Normal(MLP(2, [64, 64], 2), 2, "global")}), BayesNet({"z | x": q}))


MODELS = {
    "plain VAE": {},
    "more flexible q": {"posterior": "flow"},
    "more flexible p": {"prior": "mixture"},
}


@dataclass(frozen=True, kw_only=True)
class Blur:
    draws: Tensor  # (N, 2) from the model
    spread: float  # root mean square of radius - 1, the ring's own being 0.05
    off: float  # share of draws more than 4 standard deviations, 0.2, off the ring
    divergence: float  # mean log p* - ELBO, nats: at least KL(p* || p)
    divergence_error: float


def measure(vae: VAE, test: Tensor) -> Blur:
    draws = vae.p.sample(4000)["x"]
    away = (draws.norm(dim=1) - 1).abs()
    with torch.no_grad():
        above = log_density(test) - aevb.elbo(vae, {"x": test}, 100)
    return Blur(
        draws=draws,
        spread=float(away.square().mean().sqrt()),
        off=float((away > 4 * WIDTH).double().mean()),
        divergence=float(above.mean()),
        divergence_error=float(above.std()) / len(test) ** 0.5,
    )


def train(name: str, data: Tensor, steps: int) -> VAE:
    torch.manual_seed(0)
    vae = model(**MODELS[name])
    # Without the warm-up every one of these collapses: the noise starts as wide as the ring, and z is given up.
    config = TrainConfig(
        steps=steps, batch_size=200, learning_rate=5e-3, kl_warmup_steps=steps // 4, average=0.99, validation=0.0
    )
    aevb.fit(vae, {"x": data}, config)
    return vae


def draw(data: Tensor, found: dict[str, Blur], path: Path) -> None:
    figure = Figure(figsize=(3.1 * (1 + len(found)), 3.9))
    axes = figure.subplots(1, 1 + len(found), sharex=True, sharey=True)
    panels = {"data": (data, WIDTH, 0.0)} | {name: (b.draws, b.spread, b.off) for name, b in found.items()}
    for axis, (name, (points, spread, off)) in zip(axes, panels.items(), strict=True):
        axis.scatter(points[:2000, 0], points[:2000, 1], s=2, alpha=0.4, linewidths=0, color="#1f4e79")
        axis.set(title=name, xlabel="$x_1$", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), aspect="equal", xticks=(-1, 0, 1))
        axis.text(0, -1.68, f"spread {spread:.3f}, off the ring {100 * off:.1f} %", ha="center", fontsize=9)
    axes[0].set(ylabel="$x_2$", yticks=(-1, 0, 1))
    told = (
        "2000 draws a panel, one seed. Spread: root mean square of radius - 1; off the ring: by more than 0.2 "
        "(both of 4000 draws; of the data, the true values)."
    )
    figure.text(0.5, 0.03, told, ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)


def main(path: str | Path = "blurriness.png", steps: int = 1500) -> dict[str, Blur]:
    torch.manual_seed(0)
    data, test = ring(5000), ring(1000)
    found = {name: measure(train(name, data, steps), test) for name in MODELS}
    print(f"A ring of spread {WIDTH}; 4000 draws of each model")
    for name, blur in found.items():
        error = math.sqrt(blur.off * (1 - blur.off) / len(blur.draws))
        print(
            f"  {name:16s} spread {blur.spread:.3f}   off the ring {100 * blur.off:4.1f} +- {100 * error:.1f} %"
            f"   KL(p* || p) at most {blur.divergence:.3f} +- {blur.divergence_error:.3f} nats"
        )
    draw(data, found, Path(path))
    print(f"Picture: {path}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
