"""A q of its own for every datum, against which amortisation is measured (notes, *vs. ordinary VI*; N10).

An encoder gives all rows their q(z | x) by one function: one forward pass, amortised. Ordinary variational inference
has free parameters mu_n, sigma_n for each datum:

    q_n(z) = N(mu_n, diag sigma_n^2)        `"z | row": DiagonalNormal(Fixed(start))` with `given="row"`.

With p held still its bound is the best that the family can do, row by row. What the encoder's bound lacks to it is the
amortisation gap; what it lacks to log p(x) is the approximation gap of the family. `start` may be nothing or what the
encoder says (semi-amortised inference: the encoder first, some steps for each datum after).

First on a linear-Gaussian p, where the best factorized bound has a closed form; then on binary digits.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from sklearn.datasets import load_digits
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig


def refine(p: BayesNet, x: Tensor, start: Tensor, steps: int, rate: float = 0.05) -> VAE:
    """Fit (mu_n, raw sigma_n) `(N, 2 D)` from `start` on, p held still."""
    for weight in p.parameters():
        weight.requires_grad_(False)
    vae = VAE(p, BayesNet({"z | row": aevb.DiagonalNormal(aevb.Fixed(start))}), given="row")
    # All rows in every batch: an optimizer with momentum moves the rows outside a batch as well.
    config = TrainConfig(
        steps=steps, batch_size=len(x), samples=4, learning_rate=rate, average=0.95, validation=0.0, log_every=steps
    )
    aevb.fit(vae, {"x": x, "row": torch.arange(len(x))}, config)
    return vae


@torch.no_grad()
def bound(vae: VAE, x: Tensor, samples: int = 500) -> Tensor:
    """ELBO of each row; the index of a row is context to a q that has one for each."""
    rows = {"row": torch.arange(len(x))} if "row" in vae.given else {}
    return aevb.elbo(vae, {"x": x, **rows}, samples)


def mean_and_error(values: Tensor) -> str:
    return f"{values.mean():8.3f} +- {values.std() / len(values) ** 0.5:.3f}"


def linear_gaussian(dims: int = 5, latents: int = 2, s: float = 0.7) -> tuple[BayesNet, Tensor]:
    """A network p of x = W z + b + s eps, and W."""
    net = MLP(latents, [], dims)
    torch.nn.init.normal_(net.last.weight)
    torch.nn.init.normal_(net.last.bias)
    likelihood = aevb.Normal(net, dims, "global")
    likelihood.raw_noise.data.fill_(math.log(math.expm1(s)))  # softplus turns it into s
    return BayesNet({"z": aevb.StandardNormal(latents), "x | z": likelihood}), net.last.weight.detach()


@torch.no_grad()
def closed_forms(p: BayesNet, w: Tensor, x: Tensor, s: float = 0.7) -> tuple[Tensor, float]:
    """Log p(x) of each row, and by how much the best factorized q stays below: (sum log M_ii - log det M) / 2."""
    offset = p.distribution("x", {"z": torch.zeros(1, w.shape[1])}).mean[0]
    log_p = td.MultivariateNormal(offset, w @ w.T + s**2 * torch.eye(len(w))).log_prob(x)
    m = w.T @ w + s**2 * torch.eye(w.shape[1])
    return log_p, float(m.diagonal().log().sum() - m.logdet()) / 2


def known(steps: int = 500) -> dict[str, float]:
    """The per-datum q of a linear-Gaussian model, nats a datum."""
    torch.manual_seed(0)
    p, w = linear_gaussian()
    x = p.sample(100)["x"]
    log_p, lacking = closed_forms(p, w, x)
    found = bound(refine(p, x, torch.zeros(len(x), 4), steps), x)
    below = log_p - lacking - found  # above zero but for the draws' error
    print("Linear-Gaussian model, nats a datum")
    print(f"  log p(x), closed form              {log_p.mean():8.3f}")
    print(f"  best factorized bound, closed form {log_p.mean() - lacking:8.3f}")
    print(f"  per-datum q, from nothing          {found.mean():8.3f}, below by {mean_and_error(below)}")
    return {"lacking": lacking, "below": float(below.mean()), "error": float(below.std() / len(x) ** 0.5)}


def digits_model(x: Tensor, steps: int, latents: int = 8) -> VAE:
    """A VAE with a small encoder."""
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"z": aevb.StandardNormal(latents), "x | z": aevb.Bernoulli(MLP(latents, [64], x.shape[1]))}),
        BayesNet({"z | x": aevb.DiagonalNormal(MLP(x.shape[1], [16], 2 * latents))}),
    )
    aevb.fit(vae, {"x": x}, TrainConfig(steps=steps, learning_rate=3e-3))
    return vae


def main(steps: int = 2000) -> dict[str, dict[str, float] | dict[str, Tensor]]:
    closed = known()
    x = torch.as_tensor(load_digits().data > 7).float()
    train, test = x[:1400], x[1400:1600]
    vae = digits_model(train, steps)
    bounds = {"encoder": bound(vae, test)}
    with torch.no_grad():
        start = vae.q.conditional("z").net(test)  # what the encoder says of each row, (N, 2 D)
    bounds["refined 100 steps"] = bound(refine(vae.p, test, start, 100), test)
    bounds["refined 600 steps"] = bound(refine(vae.p, test, start, 600), test)
    bounds["from nothing, 600 steps"] = bound(refine(vae.p, test, torch.zeros_like(start), 600), test)
    log_p = aevb.log_marginal(vae, {"x": test}, samples=2000)
    print("Binary digits, 200 test rows, nats a datum; gains are paired, row by row, with standard errors")
    for name, found in bounds.items():
        gain = "" if name == "encoder" else f"   gain {mean_and_error(found - bounds['encoder'])}"
        print(f"  {name:24s} {found.mean():8.3f}{gain}")
    gap = bounds["refined 600 steps"] - bounds["encoder"]
    rest = log_p.log_prob.float() - bounds["refined 600 steps"]
    print(f"  log p(x), 2000 draws     {log_p.log_prob.mean():8.3f}")
    print(f"Amortisation gap of the encoder on rows it was not trained on {mean_and_error(gap)}")
    print(f"Approximation gap of factorized Gaussians                     {mean_and_error(rest)}")
    return {"closed": closed, "digits": bounds | {"log_prob": log_p.log_prob}}


if __name__ == "__main__":
    main()
