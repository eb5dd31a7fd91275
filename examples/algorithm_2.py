"""Algorithm 2 of the notes, line by line in plain torch, next to the library's form of it (N15).

One unbiased estimate of a datum's ELBO, for q(z | x) with full covariance and p(x | z) of independent binary entries:

    (mu, log sigma, L') <- EncoderNeuralNet(x)
    L <- L_mask * L' + diag(sigma)
    eps ~ N(0, I)
    z <- L eps + mu
    log q(z | x) <- -sum_i (1/2 (eps_i^2 + log 2 pi) + log sigma_i)
    log p(z)     <- -sum_i 1/2 (z_i^2 + log 2 pi)
    p <- DecoderNeuralNet(z)
    log p(x | z) <- sum_i (x_i log p_i + (1 - x_i) log(1 - p_i))
    L~ <- log p(x | z) + log p(z) - log q(z | x)

As printed in the notes, log sigma_i stands inside the one half. That is a slip: exp of it is no density, since it
integrates to prod_i sqrt(sigma_i); here this is seen by importance sampling. `FullNormal` takes sigma as the softplus
of the net's output, not as its exponential; otherwise the lines are the same, and so are the numbers.
"""

from __future__ import annotations

import math

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet

D = 3
LOG_2PI = math.log(2 * math.pi)


def algorithm_2(encoder: MLP, decoder: MLP, x: Tensor, eps: Tensor) -> Tensor:
    """L~ for each row, `(N,)`."""
    mu, raw, rows = encoder(x).split([D, D, D * D], dim=-1)
    sigma = F.softplus(raw)
    mask = torch.ones(D, D).tril(-1)
    tril = mask * rows.reshape(-1, D, D) + torch.diag_embed(sigma)
    z = (tril @ eps.unsqueeze(-1)).squeeze(-1) + mu
    log_qz = -(0.5 * (eps**2 + LOG_2PI) + sigma.log()).sum(-1)
    log_pz = -(0.5 * (z**2 + LOG_2PI)).sum(-1)
    p = decoder(z).sigmoid()
    log_px = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    return log_px + log_pz - log_qz


def model(pixels: int) -> VAE:
    return VAE(
        BayesNet({"z": aevb.StandardNormal(D), "x | z": aevb.Bernoulli(MLP(D, [16], pixels))}),
        BayesNet({"z | x": aevb.FullNormal(MLP(pixels, [16], 2 * D + D * D), D)}),
    )


def integrals(sigma: Tensor, draws: int = 200_000) -> dict[str, tuple[float, float]]:
    """Integral of exp(log q) over z = sigma * eps, as printed and as it should be, with standard errors.

    By importance sampling from a Gaussian of 1.5 times the scales.
    """
    proposal = td.Independent(td.Normal(torch.zeros(len(sigma)), 1.5 * sigma), 1)
    z = proposal.sample((draws,))
    eps = z / sigma
    forms = {
        "printed": -(0.5 * (eps**2 + LOG_2PI + sigma.log())).sum(-1),
        "right": -(0.5 * (eps**2 + LOG_2PI) + sigma.log()).sum(-1),
    }
    weights = {name: (form - proposal.log_prob(z)).exp() for name, form in forms.items()}
    return {name: (float(w.mean()), float(w.std()) / draws**0.5) for name, w in weights.items()}


@torch.no_grad()
def main() -> dict[str, float | dict[str, tuple[float, float]]]:
    torch.manual_seed(0)
    vae, x = model(20).double(), (torch.rand(6, 20) < 0.5).double()
    torch.manual_seed(1)
    library = aevb.elbo(vae, {"x": x}, samples=1, kl="sampled")
    torch.manual_seed(1)  # the same noise: elbo draws one vector for each row, and nothing else
    eps = torch.randn(6, D, dtype=torch.float64)
    by_hand = algorithm_2(vae.q.conditional("z").net, vae.p.conditional("x").net, x, eps)
    away = float((library - by_hand).abs().max())
    print("Estimates of six data's ELBO, nats")
    print("  Algorithm 2 ", " ".join(f"{float(value):10.6f}" for value in by_hand))
    print("  aevb.elbo   ", " ".join(f"{float(value):10.6f}" for value in library))
    print(f"  largest difference {away:.1e}")
    sigma = torch.tensor([0.5, 2.0, 3.0])
    found, root = integrals(sigma), float(sigma.sqrt().prod())
    print(f"Integral of exp(log q) for sigma = {sigma.tolist()}")
    print(f"  as printed       {found['printed'][0]:.4f} +- {found['printed'][1]:.4f}; prod sqrt(sigma) = {root:.4f}")
    print(f"  as it should be  {found['right'][0]:.4f} +- {found['right'][1]:.4f}")
    return {"away": away, "root": root, "integrals": found}


if __name__ == "__main__":
    main()
