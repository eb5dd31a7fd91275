r"""Conditionals p(child | parents): modules whose `forward(*parents)` returns a distribution. They know no names.

Every distribution is built with `validate_args=False`: values are checked once, where they enter the library.
"""

from aevb.conditionals.autoregressive import AutoregressiveBernoulli
from aevb.conditionals.deterministic import Deterministic
from aevb.conditionals.form import Conditional
from aevb.conditionals.likelihoods import (
    Bernoulli,
    BetaBinomial,
    Binomial,
    DiscretizedLogistic,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from aevb.conditionals.mixed import Mixed
from aevb.conditionals.posteriors import DiagonalNormal, FullNormal, LadderNormal, ProductNormal
from aevb.conditionals.priors import Categorical, LearnedNormal, MixtureOfNormals, StandardNormal, VampPrior
from aevb.conditionals.scaled import Scaled

__all__ = [
    "AutoregressiveBernoulli",
    "Bernoulli",
    "BetaBinomial",
    "Binomial",
    "Categorical",
    "Conditional",
    "Deterministic",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "FullNormal",
    "LadderNormal",
    "LearnedNormal",
    "Mixed",
    "MixtureOfNormals",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "ProductNormal",
    "Scaled",
    "StandardNormal",
    "StudentT",
    "VampPrior",
    "ZeroInflatedNegativeBinomial",
]
