"""ModelConfig to VAE: the tables of names that the command line, the estimators and checkpoints read."""

from aevb.build.models import LIKELIHOODS, POSTERIORS, PRIORS, build_vae
from aevb.build.target import semi_supervised

__all__ = ["LIKELIHOODS", "POSTERIORS", "PRIORS", "build_vae", "semi_supervised"]
