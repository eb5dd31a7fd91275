r"""The known-answer self-test: a linear VAE, for which everything is known in closed form (Tipping and Bishop, 1999).

:math:`z \sim N(0, I_k)`, :math:`x | z \sim N(W z + b, s^2 I_d)`; with :math:`M = W^T W + s^2 I`,
:math:`x \sim N(b, W W^T + s^2 I)` and :math:`z | x \sim N(M^{-1} W^T (x - b), s^2 M^{-1})`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import elbo, evaluating
from aevb.conditionals import FullNormal, Normal, StandardNormal
from aevb.config import TrainConfig
from aevb.evaluate import log_marginal
from aevb.nets import MLP
from aevb.training import fit

__all__ = ["Result", "compare", "linear_vae", "table"]

_D, _K, _ROWS, _NOISE = 6, 2, 400, 0.5


@dataclass(frozen=True, kw_only=True)
class Result:
    """One quantity, ours and in closed form."""

    quantity: str
    ours: float
    exact: float
    tolerance: float  # largest difference that rounding, Monte Carlo or the end of training excuses
    reason: str  # where the tolerance comes from

    @property
    def ok(self) -> bool:
        """Whether the two agree."""
        return abs(self.ours - self.exact) <= self.tolerance


def compare(seed: int = 0) -> list[Result]:
    """Compare ours with the closed forms, in float64; torch's generator and default dtype are left as they were."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [*_at_exact_posterior(), *_after_training(seed)]
    finally:
        torch.set_default_dtype(before)


def table(results: Sequence[Result]) -> str:
    """The comparison in columns."""
    lines = [f"{'quantity':<44}{'ours':>14}{'closed form':>14}{'difference':>13}{'allowed':>10}"]
    for result in results:
        verdict = "ok" if result.ok else "OFF"
        difference = result.ours - result.exact
        lines.append(
            f"{result.quantity:<44}{result.ours:>14.6f}{result.exact:>14.6f}{difference:>13.1e}{result.tolerance:>10.1e}"
            f"  {verdict} ({result.reason})"
        )
    return "\n".join(lines)


def linear_vae(weight: Tensor, bias: Tensor, scale: float) -> VAE:
    """A linear p with these parameters and q at its exact posterior, `weight` `(d, k)`."""
    d, k = weight.shape
    precision = weight.T @ weight + scale**2 * torch.eye(k)
    gain = torch.linalg.solve(precision, weight.T)  # M^-1 W^T
    tril = torch.linalg.cholesky(scale**2 * torch.linalg.inv(precision))
    decoder, encoder = MLP(k, [], d), MLP(d, [], 2 * k + k * k)
    likelihood = Normal(decoder, d, "global")
    with torch.no_grad():
        decoder.last.weight.copy_(weight)
        decoder.last.bias.copy_(bias)
        likelihood.raw_noise.fill_(_softplus_inverse(scale))
        encoder.last.weight.zero_()
        encoder.last.weight[:k] = gain
        spread = torch.tensor([_softplus_inverse(float(value)) for value in tril.diagonal()])
        encoder.last.bias.copy_(torch.cat([-gain @ bias, spread, tril.flatten()]))
    return VAE(BayesNet({"z": StandardNormal(k), "x | z": likelihood}), BayesNet({"z | x": FullNormal(encoder, k)}))


def _at_exact_posterior() -> list[Result]:
    weight, bias = torch.randn(_D, _K), torch.randn(_D)
    vae = linear_vae(weight, bias, _NOISE)
    x = vae.p.sample(_ROWS)["x"]
    covariance = weight @ weight.T + _NOISE**2 * torch.eye(_D)
    exact = float(torch.distributions.MultivariateNormal(bias, covariance).log_prob(x).mean())
    marginal = log_marginal(vae, {"x": x}, samples=100)
    with evaluating(vae):
        sampled = float(elbo(vae, {"x": x}, kl="sampled").mean())
        draws = torch.stack([elbo(vae, {"x": x}).mean() for _ in range(100)])
        posterior = vae.posterior({"x": x})["z"]
    precision = weight.T @ weight + _NOISE**2 * torch.eye(_K)
    mean = torch.linalg.solve(precision, weight.T @ (x - bias).T).T
    error = float(draws.std()) / math.sqrt(len(draws))  # the closed-form KL leaves the draws' scatter in the rest
    rounding = "rounding"
    return [
        Result(quantity="ELBO, sampled, exact q (nats)", ours=sampled, exact=exact, tolerance=1e-9, reason=rounding),
        Result(
            quantity="ELBO, closed-form KL, exact q (nats)", ours=float(draws.mean()), exact=exact, tolerance=4 * error,
            reason="4 standard errors",
        ),
        Result(
            quantity="log marginal likelihood, exact q (nats)", ours=float(marginal.log_prob.mean()), exact=exact,
            tolerance=1e-9, reason=rounding,
        ),
        Result(
            quantity="posterior mean, largest difference", ours=float((posterior.mean - mean).abs().max()), exact=0.0,
            tolerance=1e-9, reason=rounding,
        ),
        Result(
            quantity="posterior variance of z1",
            ours=float(posterior.variance[0, 0]),
            exact=float((_NOISE**2 * torch.linalg.inv(precision))[0, 0]),
            tolerance=1e-9,
            reason=rounding,
        ),
    ]  # fmt: skip


def _after_training(seed: int) -> list[Result]:
    """Train from a random start; the best log-likelihood of the model on these rows is known."""
    weight = torch.linalg.qr(torch.randn(_D, _K)).Q * torch.tensor([3.0, 2.0])
    x = torch.randn(_ROWS, _K) @ weight.T + _NOISE * torch.randn(_ROWS, _D)
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = values[_K:].mean()
    best = -0.5 * float(_D * math.log(2 * math.pi) + values[:_K].log().sum() + (_D - _K) * noise.log() + _D)
    likelihood = Normal(MLP(_K, [], _D), _D, "global")
    vae = VAE(
        BayesNet({"z": StandardNormal(_K), "x | z": likelihood}),
        BayesNet({"z | x": FullNormal(MLP(_D, [], 2 * _K + _K * _K), _K)}),
    )
    config = TrainConfig(
        steps=2000,
        batch_size=_ROWS,
        samples=4,
        learning_rate=2e-2,
        validation=0.0,
        average=0.99,
        seed=seed,
        log_every=2000,
    )
    fit(vae, {"x": x}, config)
    marginal = log_marginal(vae, {"x": x}, samples=200, seed=seed)
    error = 4 * float(marginal.std_error.square().sum().sqrt()) / _ROWS
    return [
        Result(
            quantity="trained: log-likelihood a datum (nats)",
            ours=float(marginal.log_prob.mean()),
            exact=best,
            tolerance=1e-3 + error,
            reason="1e-3 for training, 4 standard errors",
        )
    ]


def _softplus_inverse(value: float) -> float:
    return value + math.log(-math.expm1(-value))
