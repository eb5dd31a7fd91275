"""What torch.distributions lacks: drawing with the density, keyed noise, densities with holes, closed-form KLs."""

from aevb.distributions.between import between
from aevb.distributions.density import (
    base_of,
    check_factorizes,
    entries_log_prob,
    log_prob,
    support_filler,
    support_violation,
)
from aevb.distributions.drawing import Given, Noise, draw, normals, reparameterize, rsample_and_log_prob
from aevb.distributions.families import (
    Bernoulli,
    BetaBinomial,
    Binomial,
    DiscretizedLogistic,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from aevb.distributions.finite import Delta, OneHot, count_states, relaxed, states
from aevb.distributions.kl import CLOSED_KL, closed_kl
from aevb.distributions.mixed import Codes, LogNormal, Mixed, Together
from aevb.distributions.mixtures import NormalMixture

__all__ = [
    "CLOSED_KL",
    "Bernoulli",
    "BetaBinomial",
    "Binomial",
    "Codes",
    "Delta",
    "DiscretizedLogistic",
    "Given",
    "LogNormal",
    "Mixed",
    "NegativeBinomial",
    "Noise",
    "NormalMixture",
    "OneHot",
    "Poisson",
    "StudentT",
    "Together",
    "ZeroInflatedNegativeBinomial",
    "base_of",
    "between",
    "check_factorizes",
    "closed_kl",
    "count_states",
    "draw",
    "entries_log_prob",
    "log_prob",
    "normals",
    "relaxed",
    "reparameterize",
    "rsample_and_log_prob",
    "states",
    "support_filler",
    "support_violation",
]
