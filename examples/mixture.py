"""Discrete latents, summed exactly: a mixture of Gaussians (notes, *Latent variables*; N7).

    p(x) = sum_y p(y) p(x | y),    q(y | x)

With y summed over, log p(x) is exact: one "draw" gives it to rounding. The ELBO is also exact, and below log p(x) by
KL(q(y | x) || p(y | x)). Several class nodes are summed over jointly, up to `aevb.bounds.MAX_STATES` states.

Where there are too many states, `discrete="sample"` draws them (score-function gradient) and `discrete="relax"` makes
them continuous (Gumbel-softmax). A relaxed objective is not a bound on log p(x), and is never reported as one: whatever
a model was trained by, the figures below are the exact ELBO and log p(x). Yardstick: scikit-learn's EM.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributions as td
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig

C = 4


def clusters(rows: int) -> Tensor:
    centres = torch.tensor([[0.0, 2.0], [2.0, 0.0], [-1.5, -1.0], [0.5, 0.0]])
    scales = torch.tensor([[0.6, 0.3], [0.3, 0.6], [0.5, 0.5], [0.3, 0.3]])
    y = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), rows, replacement=True)
    return centres[y] + scales[y] * torch.randn(rows, 2)


def mixture() -> VAE:
    """Each class with its mean and its scales: y is one-hot, so that an affine net is a table."""
    return VAE(
        BayesNet({
            "y": aevb.Categorical(C, learned=True),
            "x | y": aevb.Normal(MLP(C, [], 2 * 2), 2, noise="datum"),
        }),
        BayesNet({"y | x": aevb.Categorical(C, MLP(2, [32], C))}),
    )  # fmt: skip


@torch.no_grad()
def closed_form(vae: VAE, x: Tensor) -> Tensor:
    """Log sum_y pi_y N(x; mu_y, diag sigma_y^2), written out."""
    net = vae.p.conditional("x").net.last
    loc, raw = (net.weight.T + net.bias).chunk(2, 1)  # (C, 2) each
    by_class = td.Normal(loc, F.softplus(raw)).log_prob(x.unsqueeze(1)).sum(2)
    return (by_class + vae.p.conditional("y").logits.log_softmax(0)).logsumexp(1)


def several() -> tuple[float, float]:
    """Three class nodes, a -> b and (a, b, d) -> x: log p(x) of one call and of a loop over the 3 * 2 * 2 states."""
    torch.manual_seed(1)
    p = BayesNet({
        "a": aevb.Categorical(3), "b | a": aevb.Categorical(2, MLP(3, [4], 2)), "d": aevb.Categorical(2),
        "x | a, b, d": aevb.Normal(MLP(7, [8], 2), 2),
    })  # fmt: skip
    q = BayesNet({
        "a | x": aevb.Categorical(3, MLP(2, [4], 3)), "b | a, x": aevb.Categorical(2, MLP(5, [4], 2)),
        "d | x": aevb.Categorical(2, MLP(2, [4], 2)),
    })  # fmt: skip
    x = torch.randn(1, 2)
    one_call = float(aevb.log_marginal(VAE(p, q), {"x": x}, samples=1).log_prob)
    total = 0.0
    for a, b, d in itertools.product(range(3), range(2), range(2)):
        state = {"a": torch.tensor([a]), "b": torch.tensor([b]), "d": torch.tensor([d]), "x": x}
        with torch.no_grad():
            total += math.exp(float(sum(part.sum() for part in p.log_prob(state).values())))
    return one_call, math.log(total)


def main(steps: int = 1500) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    x = clusters(2000)
    em = GaussianMixture(C, covariance_type="diag", n_init=3, tol=1e-6, max_iter=1000, random_state=0).fit(x.numpy())
    best = float(em.score(x.numpy()))
    found: dict[str, dict[str, float]] = {}
    print("Nats a datum on the 2000 training rows         log p(x)   ELBO      lacks to EM, row by row")
    print(f"  scikit-learn's EM                           {best:8.4f}")
    for discrete in ("sum", "sample", "relax"):
        torch.manual_seed(0)
        vae = mixture()
        config = TrainConfig(
            steps=steps, learning_rate=2e-2, discrete=discrete, average=0.99, validation=0.0, log_every=steps
        )
        aevb.fit(vae, {"x": x}, config)
        with torch.no_grad():
            log_p, elbo = aevb.iwae(vae, {"x": x}, 1), aevb.elbo(vae, {"x": x})
        lacking = torch.as_tensor(em.score_samples(x.numpy())) - log_p
        error = float(lacking.std()) / len(x) ** 0.5
        found[discrete] = {
            "log_p": float(log_p.mean()),
            "elbo": float(elbo.mean()),
            "rounding": float((log_p - closed_form(vae, x)).abs().max()),
            "lacking": float(lacking.mean()),
        }
        figures = f"{log_p.mean():8.4f}   {elbo.mean():7.4f}   {lacking.mean():7.4f} +- {error:.4f}"
        print(f"  trained with discrete={discrete!r:9s}             {figures}")
    away = max(one["rounding"] for one in found.values())
    print(f"log p(x) against the sum written out: largest difference of a row {away:.1e}")
    one_call, loop = several()
    print(f"Three class nodes: log p(x) {one_call:.6f}, by a loop over their 12 states {loop:.6f}")
    return found | {"em": {"log_p": best}, "several": {"call": one_call, "loop": loop}}


if __name__ == "__main__":
    main()
