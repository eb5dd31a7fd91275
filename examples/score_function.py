"""Two estimators of one gradient (notes, *Reparameterization Trick*; N13).

For q(z) = N(mu, diag sigma^2) and f(z) = log p(x, z) - log q(z), whose mean is the ELBO,

    pathwise          grad f(mu + sigma eps),                    eps ~ N(0, I)
    score function    f(z) grad log q(z),                        z ~ q, no gradient through z
    with a baseline   (f(z) - b) grad log q(z),                  b the mean of f over other draws

Their means are the same, their variances are not: the pathwise one knows the slope of f, the others only its value,
and every dimension adds its noise to every other's signal. `aevb` takes the pathwise one wherever a draw has a
gradient, and the score function with a baseline for discrete nodes that are sampled (`discrete="sample"`).

p is N(z; 0, I) N(x; z, s^2 I), so that the gradient is known: in mu it is (x - mu) / s^2 - mu.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor, nn

import aevb
from aevb import BayesNet

S = 0.5


def network(dims: int) -> BayesNet:
    likelihood = aevb.Normal(nn.Identity(), dims, "global")
    likelihood.raw_noise.data.fill_(math.log(math.expm1(S)))  # softplus turns it into s
    return BayesNet({"z": aevb.StandardNormal(dims), "x | z": likelihood})


def gradients(p: BayesNet, x: Tensor, mu: Tensor, sigma: Tensor, draws: int) -> dict[str, Tensor]:
    """Gradient in mu of each draw, `(draws, D)`, by each estimator."""
    copies = mu.expand(draws, -1).clone().requires_grad_()  # one mu a draw, so that gradients come apart
    q = td.Independent(td.Normal(copies, sigma), 1)

    def f(z: Tensor) -> Tensor:
        parts = p.log_prob({"z": z, "x": x.expand(draws, -1)})
        return parts["z"] + parts["x"] - q.log_prob(z)

    pathwise = torch.autograd.grad(f(q.rsample()).sum(), copies)[0]
    z = q.sample()
    value = f(z).detach()
    (slope,) = torch.autograd.grad(q.log_prob(z).sum(), copies)
    others = (value.sum() - value) / (draws - 1)
    return {
        "pathwise": pathwise,
        "score function": value.unsqueeze(1) * slope,
        "with a baseline": (value - others).unsqueeze(1) * slope,
    }


def main(draws: int = 20_000) -> dict[int, dict[str, tuple[float, float, float]]]:
    print(f"Gradient of the ELBO in mu_1, {draws} draws: mean with its standard error, standard deviation of one draw")
    found = {}
    for dims in (1, 10, 100):
        torch.manual_seed(0)
        mu, sigma, x = torch.full((dims,), 0.3), torch.full((dims,), 0.4), torch.ones(dims)
        exact = float((x - mu)[0] / S**2 - mu[0])
        print(f"  {dims} dimensions: exactly {exact:.3f}")
        found[dims] = {}
        for name, drawn in gradients(network(dims), x, mu, sigma, draws).items():
            mean, spread = float(drawn[:, 0].mean()), float(drawn[:, 0].std())
            found[dims][name] = (mean - exact, spread / draws**0.5, spread)
            print(f"    {name:16s} {mean:8.3f} +- {spread / draws**0.5:.3f}   {spread:9.3f}")
    return found


if __name__ == "__main__":
    main()
