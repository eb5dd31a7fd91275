"""What torch.distributions lacks: drawing with the density, keyed noise, densities with holes, closed-form KLs."""

from aevb.distributions.density import base_of, check_factorizes, log_prob, support_violation
from aevb.distributions.drawing import Noise, draw, reparameterize, rsample_and_log_prob
from aevb.distributions.families import Binomial
from aevb.distributions.kl import CLOSED_KL, closed_kl

__all__ = [
    "CLOSED_KL",
    "Binomial",
    "Noise",
    "base_of",
    "check_factorizes",
    "closed_kl",
    "draw",
    "log_prob",
    "reparameterize",
    "rsample_and_log_prob",
    "support_violation",
]
