"""What the latent dimensions carry."""

from __future__ import annotations

from torch import Tensor

from aevb._shapes import Values
from aevb.bayesnet import VAE
from aevb.bounds import evaluating, prepare

__all__ = ["active_units"]


def active_units(vae: VAE, values: Values) -> dict[str, Tensor]:
    r"""Spread of each latent dimension's posterior mean over the data, :math:`\operatorname{Var}_x E_q[z_d | x]`.

    A dimension is called active where it exceeds 0.01 (Burda et al., 2016, section 5.2).

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`.

    Returns:
        By latent node, `(*event,)`; in the square of the node's own units.

    Example:
        >>> import aevb, torch
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> active_units(vae, {"x": torch.ones(3, 5)})["z"].round(decimals=6)
        tensor([0., 0.])
    """
    with evaluating(vae):
        return {node: d.mean.var(0, correction=0) for node, d in vae.posterior(prepare(vae, values)).items()}
