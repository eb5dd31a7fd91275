"""Estimates to judge a model by, each with what says how far to trust it."""

from aevb.evaluate.annealing import Annealed, Bracket, ais, bidirectional, reverse_ais
from aevb.evaluate.calibration import Calibration, simulation_based_calibration
from aevb.evaluate.closeness import distance_to_closest
from aevb.evaluate.comparison import Comparison, compare
from aevb.evaluate.conditioning import Conditioned, sample_given
from aevb.evaluate.entries import Surprisal, surprisal
from aevb.evaluate.gaps import Gaps, inference_gaps
from aevb.evaluate.imputation import Imputation, impute
from aevb.evaluate.latents import Information, active_units, aggregated, information
from aevb.evaluate.marginal import Marginal, Rounding, log_marginal, rounding
from aevb.evaluate.pareto import pareto_k
from aevb.evaluate.predictive import PredictiveCheck, predictive_check

__all__ = [
    "Annealed",
    "Bracket",
    "Calibration",
    "Comparison",
    "Conditioned",
    "Gaps",
    "Imputation",
    "Information",
    "Marginal",
    "PredictiveCheck",
    "Rounding",
    "Surprisal",
    "active_units",
    "aggregated",
    "ais",
    "bidirectional",
    "compare",
    "distance_to_closest",
    "impute",
    "inference_gaps",
    "information",
    "log_marginal",
    "pareto_k",
    "predictive_check",
    "reverse_ais",
    "rounding",
    "sample_given",
    "simulation_based_calibration",
    "surprisal",
]
