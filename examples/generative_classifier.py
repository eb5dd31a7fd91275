"""A generative model turned into a classifier by Bayes' rule (notes, *Motivation*; N1).

    p(y | x) = p(y) p(x | y) / sum_c p(c) p(x | c),    p(x | y) = int p(z) p(x | y, z) dz.

The model p(y) p(z) p(x | y, z) is trained with every label given. log p(x, y) is then estimated by importance sampling
from q(z | x, y) for each class in turn, with a standard error; the rule makes class probabilities of them. Whether
these can be trusted is seen in reliability bins: among the rows that are given probability 0.8, four in five should be
right.

First where the classes are Gaussian and the exact rule is known, then on scikit-learn's digits.
"""

from __future__ import annotations

import torch
import torch.distributions as td
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig


def class_model(classes: int, latents: int, likelihood: nn.Module, inputs: int, hidden: list[int]) -> VAE:
    """`likelihood` takes y and z."""
    return VAE(
        BayesNet({
            "y": aevb.Categorical(classes, learned=True),
            "z": aevb.StandardNormal(latents),
            "x | y, z": likelihood,
        }),
        BayesNet({"z | x, y": aevb.DiagonalNormal(MLP(inputs + classes, hidden, 2 * latents))}),
    )  # fmt: skip


def bayes_rule(vae: VAE, x: Tensor, classes: int, samples: int) -> tuple[Tensor, Tensor]:
    """p(y | x) `(N, C)` and its Monte Carlo standard error, from log p(x, y) for each class."""
    found = [
        aevb.log_marginal(vae, {"x": x, "y": torch.full((len(x),), c)}, samples, pack=16_384) for c in range(classes)
    ]
    joint = torch.stack([one.log_prob for one in found], 1)
    error = torch.stack([one.std_error for one in found], 1)
    p = joint.softmax(1)
    # Delta method: d p_c / d log p(x, k) = p_c ([c = k] - p_k), the classes' errors being independent.
    slope = p.unsqueeze(2) * (torch.eye(classes) - p.unsqueeze(1))
    return p, (slope * error.unsqueeze(1)).square().sum(2).sqrt()


def reliability(p: Tensor, y: Tensor, edges: tuple[float, ...] = (0.5, 0.7, 0.9, 0.99)) -> list[tuple[float, ...]]:
    """By bin of the largest probability: rows, its mean, the share of right answers and the standard error of that.

    The error is that of the bin's rows if the probabilities were right, sqrt(sum p (1 - p)) / rows.
    """
    sure, right = p.max(1).values, (p.argmax(1) == y).double()
    cell, found = torch.bucketize(sure, torch.tensor(edges, dtype=sure.dtype)), []
    for number in range(len(edges) + 1):
        rows = cell == number
        if bool(rows.any()):
            count = int(rows.sum())
            error = float((sure[rows] * (1 - sure[rows])).sum().sqrt()) / count
            found.append((count, float(sure[rows].mean()), float(right[rows].mean()), error))
    return found


def told(bins: list[tuple[float, ...]]) -> None:
    print("    rows   probability given   share right   standard error if calibrated")
    for count, sure, right, error in bins:
        print(f"   {count:5.0f}   {sure:17.3f}   {right:11.3f}   {error:.3f}")


def gaussian_rows(rows: int) -> tuple[Tensor, Tensor]:
    """Three classes with one covariance, y ~ (0.5, 0.3, 0.2), x | y ~ N(U_y, W W^T + I / 4) in four dimensions."""
    y = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), rows, replacement=True)
    means = torch.tensor([[1.0, 0.0, 0.0, 0.5], [-0.5, 1.0, 0.0, 0.0], [0.0, -0.5, 1.0, -0.5]])
    w = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.5], [1.0, -1.0]])
    return means[y] + torch.randn(rows, 2) @ w.T + 0.5 * torch.randn(rows, 4), y


@torch.no_grad()
def exact_rule(vae: VAE, x: Tensor) -> Tensor:
    """p(y | x) of a model whose net is affine: the classes are Gaussian, N(U_y + b, W W^T + diag s^2)."""
    likelihood = vae.p.conditional("x")
    u, w = likelihood.net.last.weight.split([3, 2], 1)
    cov = w @ w.T + torch.diag(F.softplus(likelihood.raw_noise).square())
    means = (u + likelihood.net.last.bias[:, None]).T
    log_x = td.MultivariateNormal(means, cov).log_prob(x.unsqueeze(1))
    return (log_x + vae.p.conditional("y").logits.log_softmax(0)).softmax(1)


def gaussian(steps: int = 1500) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, y = gaussian_rows(3000)
    test_x, test_y = gaussian_rows(2000)
    vae = class_model(3, 2, aevb.Normal(MLP(5, [], 4), 4), 4, [])
    aevb.fit(vae, {"x": x, "y": y}, TrainConfig(steps=steps, learning_rate=1e-2, validation=0.0, average=0.99))
    p, error = bayes_rule(vae, test_x, 3, samples=500)
    exact = exact_rule(vae, test_x)
    away = ((p - exact).abs() / error)[error > 1e-6]
    print(f"Gaussian classes: {100 * (p.argmax(1) == test_y).double().mean():.1f} % of 2000 test rows right")
    print(f"  largest difference from the exact rule of this model {float((p - exact).abs().max()):.4f},")
    print(f"  {float(away.square().mean().sqrt()):.2f} standard errors in root mean square")
    told(reliability(p, test_y))
    return {"p": p, "error": error, "exact": exact, "y": test_y}


def digits(steps: int = 2000) -> dict[str, Tensor]:
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.as_tensor(data.data > 7).float(), torch.as_tensor(data.target)
    order = torch.randperm(len(x))
    train, test = order[:1300], order[1300:]
    vae = class_model(10, 8, aevb.Bernoulli(MLP(18, [64], 64)), 64, [64])
    aevb.fit(vae, {"x": x[train], "y": y[train]}, TrainConfig(steps=steps, learning_rate=3e-3))
    p, error = bayes_rule(vae, x[test], 10, samples=200)
    right = (p.argmax(1) == y[test]).double()
    share, spread = 100 * right.mean(), 100 * right.std() / len(test) ** 0.5
    print(f"Binary digits: {share:.1f} +- {spread:.1f} % of {len(test)} test rows right")
    told(reliability(p, y[test]))
    print("  Where the share right is several standard errors below the probability, the model is too sure of itself.")
    return {"p": p, "error": error, "y": y[test]}


def main() -> dict[str, dict[str, Tensor]]:
    return {"gaussian": gaussian(), "digits": digits()}


if __name__ == "__main__":
    main()
