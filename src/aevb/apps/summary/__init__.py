"""An evaluation in figures and words: terminal, JSON and report print what stands here and nowhere else."""

from aevb.apps.summary.finding import Finding
from aevb.apps.summary.findings import of_annealing, of_calibration, of_checks, of_gaps, of_information, of_rounding
from aevb.apps.summary.prediction import of_prediction
from aevb.apps.summary.record import (
    ACTIVE_ABOVE,
    DENSITIES,
    UNTRUSTED_ABOVE,
    Summary,
    given_to,
    quantity,
    sizes,
    summarize,
    weights_of,
)

__all__ = [
    "ACTIVE_ABOVE",
    "DENSITIES",
    "UNTRUSTED_ABOVE",
    "Finding",
    "Summary",
    "given_to",
    "of_annealing",
    "of_calibration",
    "of_checks",
    "of_gaps",
    "of_information",
    "of_prediction",
    "of_rounding",
    "quantity",
    "sizes",
    "summarize",
    "weights_of",
]
