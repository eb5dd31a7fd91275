"""A posterior over the weights of a net (notes, the remark on SGVB: "also for the posterior of the parameters"; N16).

The weights w are a node of the model like any other, with one value for the whole data set:

    p(w) prod_n p(y_n | x_n, w),    q(w),    ELBO = E_q sum_n log p(y_n | x_n, w) - KL(q(w) || p(w)).

`shared="w"` says so; each datum then carries 1/N of the KL, and `fit` knows N. `ParametricMLP` is a net whose weights
are its last parent. Two uses: a small net, whose predictions must be less certain away from the data, and linear
regression, where the exact q(w) is known and turns the ELBO into log p(D), the evidence.

A factorized q has one mode and too little spread: far from the data the truth lies several spreads away. That the
spread widens tells where the net does not know, not by how much.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
from torch import Tensor, nn

import aevb
from aevb import VAE, BayesNet, ParametricMLP, TrainConfig


def curve(rows: int = 300, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Pairs y = sin 3x + noise, x in [-1, 1]."""
    x = 2 * torch.rand(rows, 1) - 1
    return x, (3 * x).sin() + noise * torch.randn(rows, 1)


def bayesian_net(hidden: int = 16) -> VAE:
    net = ParametricMLP(1, [hidden], 1, "relu")
    p = BayesNet({"w": aevb.StandardNormal(net.weight_count), "y | x, w": aevb.Normal(net, 1)})
    q = aevb.LearnedNormal(net.weight_count, scale=0.05)
    nn.init.normal_(q.loc)  # at zero all hidden units are alike, and their gradients too
    return VAE(p, BayesNet({"w": q}), given="x", shared="w")


@torch.no_grad()
def predict(vae: VAE, x: Tensor, draws: int = 2000) -> tuple[Tensor, Tensor]:
    """Mean of y at `x`, and the standard deviation of its expectation under q(w): what more data would reduce."""
    w = vae.q.distribution("w", {}).sample((draws, 1))  # (draws, 1, weights): one vector for all rows
    mean = vae.p.distribution("y", {"x": x, "w": w}).mean  # (draws, rows, 1)
    return mean.mean(0)[:, 0], mean.std(0)[:, 0]


class Gaussian(nn.Module):
    """A conditional of one's own, here the root N(mean, cov): a module whose `forward` returns a distribution."""

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("tril", torch.linalg.cholesky(cov))

    def forward(self) -> td.Distribution:
        return td.MultivariateNormal(self.mean, scale_tril=self.tril)


class LinearRegression:
    """y = w . (x, 1) + s eps with w ~ N(0, I): posterior, evidence and best factorized bound in closed form."""

    def __init__(self, x: Tensor, y: Tensor, s: float) -> None:
        self.x, self.y, self.s = x, y, s
        features = torch.cat([x, torch.ones(len(x), 1)], 1)
        self.precision = torch.eye(features.shape[1]) + features.T @ features / s**2
        self.mean = torch.linalg.solve(self.precision, features.T @ y[:, 0]) / s**2
        marginal = td.MultivariateNormal(torch.zeros(len(y)), features @ features.T + s**2 * torch.eye(len(y)))
        self.log_evidence = float(marginal.log_prob(y[:, 0]))
        # The best factorized q has the variances 1 / precision_ii; its KL to the posterior is what the bound lacks.
        lacking = 0.5 * (self.precision.diagonal().log().sum() - self.precision.logdet())
        self.best_factorized = self.log_evidence - float(lacking)

    def vae(self, q: nn.Module) -> VAE:
        net = ParametricMLP(self.x.shape[1], [], 1)
        likelihood = aevb.Normal(net, 1, "global")
        likelihood.raw_noise.data.fill_(math.log(math.expm1(self.s)))  # softplus turns it into s
        likelihood.requires_grad_(False)
        p = BayesNet({"w": aevb.StandardNormal(net.weight_count), "y | x, w": likelihood})
        return VAE(p, BayesNet({"w": q}), given="x", shared="w")

    def bound(self, vae: VAE, samples: int, kl: str) -> Tensor:
        """ELBO of the data set, a sum over its rows."""
        values = {"x": self.x, "y": self.y}
        return aevb.elbo(vae, values, samples, kl, data_size=len(self.y)).sum().detach()


def linear_regression(rows: int = 40) -> LinearRegression:
    """Correlated inputs, so that the posterior is correlated too."""
    x = torch.randn(rows, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    return LinearRegression(x, x @ torch.tensor([[1.0], [-2.0]]) + 0.5 + 0.5 * torch.randn(rows, 1), 0.5)


def main(steps: int = 2500) -> dict[str, float]:
    torch.manual_seed(0)
    x, y = curve()
    vae = bayesian_net()
    aevb.fit(vae, {"x": x, "y": y}, TrainConfig(steps=steps, samples=4, learning_rate=0.02, validation=0.0))
    at = torch.tensor([-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    mean, spread = predict(vae, at[:, None])
    print("A net with a posterior over its weights, data in [-1, 1]: E y and the spread of it under q(w)")
    for point, m, s in zip(at, mean, spread, strict=True):
        where = "" if abs(point) <= 1 else "   no data here"
        print(f"  x = {point:5.2f}   {m:6.2f} +- {s:4.2f}   truth {math.sin(3 * point):5.2f}{where}")
    inside, outside = spread[at.abs() <= 1].mean(), spread[at.abs() >= 2].mean()

    model = linear_regression()
    exact = model.vae(Gaussian(model.mean, torch.linalg.inv(model.precision)))
    factorized = model.vae(aevb.LearnedNormal(3, scale=0.1))
    values = {"x": model.x, "y": model.y}
    aevb.fit(factorized, values, TrainConfig(steps=steps // 2, samples=8, learning_rate=0.02, validation=0.0))
    bounds = torch.stack([model.bound(factorized, 1, "auto") for _ in range(400)])
    found = {
        "inside": float(inside),
        "outside": float(outside),
        "log_evidence": model.log_evidence,
        "exact": float(model.bound(exact, 1, "sampled")),
        "factorized": float(bounds.mean()),
        "factorized_error": float(bounds.std() / len(bounds) ** 0.5),
        "best_factorized": model.best_factorized,
    }
    print("Linear regression, nats for the whole data set")
    print(f"  log evidence, closed form          {found['log_evidence']:.4f}")
    print(f"  ELBO at the exact q(w), one draw   {found['exact']:.4f}")
    print(f"  best factorized q(w), closed form  {found['best_factorized']:.4f}")
    print(f"  trained factorized q(w)            {found['factorized']:.4f} +- {found['factorized_error']:.4f}")
    return found


if __name__ == "__main__":
    main()
