r"""Conditionals p(child | parents): modules whose `forward(*parents)` returns a distribution. They know no names.

Every distribution is built with `validate_args=False`: values are checked once, where they enter the library.
"""

from aevb.conditionals.form import Conditional
from aevb.conditionals.likelihoods import Bernoulli, Binomial, Normal
from aevb.conditionals.posteriors import DiagonalNormal, FullNormal
from aevb.conditionals.priors import StandardNormal

__all__ = ["Bernoulli", "Binomial", "Conditional", "DiagonalNormal", "FullNormal", "Normal", "StandardNormal"]
