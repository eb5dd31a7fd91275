"""ModelConfig to VAE: the tables of names that the command line, the estimators and checkpoints read."""

from aevb.build.models import LIKELIHOODS, POSTERIORS, PRIORS, build_vae

__all__ = ["LIKELIHOODS", "POSTERIORS", "PRIORS", "build_vae"]
