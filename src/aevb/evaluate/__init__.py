"""Estimates to judge a model by, each with what says how far to trust it."""

from aevb.evaluate.imputation import Imputation, impute
from aevb.evaluate.information import active_units
from aevb.evaluate.marginal import Marginal, log_marginal
from aevb.evaluate.pareto import pareto_k

__all__ = ["Imputation", "Marginal", "active_units", "impute", "log_marginal", "pareto_k"]
