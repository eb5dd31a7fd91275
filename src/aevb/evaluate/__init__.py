"""Estimates to judge a model by, each with what says how far to trust it."""

from aevb.evaluate.comparison import Comparison, compare
from aevb.evaluate.imputation import Imputation, impute
from aevb.evaluate.information import active_units
from aevb.evaluate.marginal import Marginal, log_marginal
from aevb.evaluate.pareto import pareto_k

__all__ = ["Comparison", "Imputation", "Marginal", "active_units", "compare", "impute", "log_marginal", "pareto_k"]
