"""Deep latent-variable models by auto-encoding variational Bayes.

Names are loaded when they are first used: `import aevb` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aevb._shapes import Values
    from aevb.apps.card import save_pretrained
    from aevb.apps.estimator import AEVB as AEVB
    from aevb.apps.estimator import AEVBClassifier as AEVBClassifier
    from aevb.apps.estimator import AEVBRegressor as AEVBRegressor
    from aevb.bayesnet import VAE, BayesNet
    from aevb.bounds import elbo, iwae, log_q, log_weights, terms, with_classifier
    from aevb.build import build_vae
    from aevb.checkpoint import Run, load, save
    from aevb.conditionals import (
        AutoregressiveBernoulli,
        Bernoulli,
        BetaBinomial,
        Binomial,
        Categorical,
        Conditional,
        Deterministic,
        DiagonalNormal,
        DiscretizedLogistic,
        FullNormal,
        LadderNormal,
        LearnedNormal,
        Mixed,
        MixtureOfNormals,
        NegativeBinomial,
        Normal,
        Poisson,
        StandardNormal,
        StudentT,
        VampPrior,
        ZeroInflatedNegativeBinomial,
    )
    from aevb.config import InputError, ModelConfig, TrainConfig
    from aevb.evaluate import (
        Annealed,
        Bracket,
        Calibration,
        Comparison,
        Conditioned,
        Gaps,
        Imputation,
        Information,
        Marginal,
        PredictiveCheck,
        Surprisal,
        active_units,
        aggregated,
        ais,
        bidirectional,
        compare,
        distance_to_closest,
        impute,
        inference_gaps,
        information,
        log_marginal,
        predictive_check,
        reverse_ais,
        sample_given,
        simulation_based_calibration,
        surprisal,
    )
    from aevb.factors import Disentanglement, disentanglement
    from aevb.flows import FlowPrior, InverseAutoregressiveFlow, PlanarFlow, SplineFlow, SylvesterFlow
    from aevb.nets import (
        MLP,
        Columns,
        ConvNet,
        Evidence,
        Fixed,
        Holes,
        LogTotal,
        ParametricMLP,
        Rows,
        Standardize,
        TransposedConvNet,
    )
    from aevb.pretrained import from_pretrained
    from aevb.training import fit

_HOMES = {
    "_shapes": ("Values",),
    "apps.card": ("save_pretrained",),
    "bayesnet": (
        "VAE",
        "BayesNet",
    ),
    "bounds": (
        "elbo",
        "iwae",
        "log_q",
        "log_weights",
        "terms",
        "with_classifier",
    ),
    "build": ("build_vae",),
    "checkpoint": (
        "Run",
        "load",
        "save",
    ),
    "conditionals": (
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
        "StandardNormal",
        "StudentT",
        "VampPrior",
        "ZeroInflatedNegativeBinomial",
    ),
    "config": (
        "InputError",
        "ModelConfig",
        "TrainConfig",
    ),
    "factors": (
        "Disentanglement",
        "disentanglement",
    ),
    "evaluate": (
        "Annealed",
        "Bracket",
        "Calibration",
        "Comparison",
        "Conditioned",
        "Conditioned",
        "Gaps",
        "Imputation",
        "Information",
        "Marginal",
        "PredictiveCheck",
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
        "predictive_check",
        "reverse_ais",
        "sample_given",
        "simulation_based_calibration",
        "surprisal",
    ),
    "flows": (
        "FlowPrior",
        "InverseAutoregressiveFlow",
        "PlanarFlow",
        "SplineFlow",
        "SylvesterFlow",
    ),
    "nets": (
        "Columns",
        "ConvNet",
        "Evidence",
        "Fixed",
        "Holes",
        "LogTotal",
        "MLP",
        "ParametricMLP",
        "Rows",
        "Standardize",
        "TransposedConvNet",
    ),
    "pretrained": ("from_pretrained",),
    "training": ("fit",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_ESTIMATORS = ("AEVB", "AEVBClassifier", "AEVBRegressor")
"""Not in `__all__`: they need scikit-learn, of the extra `apps`, and `from aevb import *` must do without."""

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "VAE",
    "Annealed",
    "AutoregressiveBernoulli",
    "BayesNet",
    "Bernoulli",
    "BetaBinomial",
    "Binomial",
    "Bracket",
    "Calibration",
    "Categorical",
    "Columns",
    "Comparison",
    "Conditional",
    "Conditioned",
    "ConvNet",
    "Deterministic",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "Disentanglement",
    "Evidence",
    "Fixed",
    "FlowPrior",
    "FullNormal",
    "Gaps",
    "Holes",
    "Imputation",
    "Information",
    "InputError",
    "InverseAutoregressiveFlow",
    "LadderNormal",
    "LearnedNormal",
    "LogTotal",
    "Marginal",
    "Mixed",
    "MixtureOfNormals",
    "ModelConfig",
    "NegativeBinomial",
    "Normal",
    "ParametricMLP",
    "PlanarFlow",
    "Poisson",
    "PredictiveCheck",
    "ProductNormal",
    "Rows",
    "Run",
    "SplineFlow",
    "StandardNormal",
    "Standardize",
    "StudentT",
    "Surprisal",
    "SylvesterFlow",
    "TrainConfig",
    "TransposedConvNet",
    "Values",
    "VampPrior",
    "ZeroInflatedNegativeBinomial",
    "active_units",
    "aggregated",
    "ais",
    "bidirectional",
    "build_vae",
    "compare",
    "disentanglement",
    "distance_to_closest",
    "elbo",
    "fit",
    "from_pretrained",
    "impute",
    "inference_gaps",
    "information",
    "iwae",
    "load",
    "log_marginal",
    "log_q",
    "log_weights",
    "predictive_check",
    "reverse_ais",
    "sample_given",
    "save",
    "save_pretrained",
    "simulation_based_calibration",
    "surprisal",
    "terms",
    "with_classifier",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "training"):  # packages that are spelt with their names: aevb.data.load
        return importlib.import_module(f"aevb.{name}")
    if name in _ESTIMATORS:
        try:
            value = getattr(importlib.import_module("aevb.apps.estimator"), name)
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] == "sklearn":
                raise ImportError(f"aevb.{name} needs scikit-learn: pip install 'aevb[apps]'.") from error
            raise
        globals()[name] = value
        return value
    if name not in _HOME:
        raise AttributeError(f"module 'aevb' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"aevb.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ESTIMATORS])
