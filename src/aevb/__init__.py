"""Deep latent-variable models by auto-encoding variational Bayes.

Names are loaded when they are first used: `import aevb` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aevb._shapes import Values
    from aevb.bayesnet import VAE, BayesNet
    from aevb.bounds import elbo, iwae, log_weights, terms
    from aevb.build import build_vae
    from aevb.checkpoint import Run, load, save
    from aevb.conditionals import Bernoulli, Binomial, Conditional, DiagonalNormal, FullNormal, Normal, StandardNormal
    from aevb.config import InputError, ModelConfig, TrainConfig
    from aevb.evaluate import Marginal, active_units, log_marginal
    from aevb.nets import MLP, Holes, Standardize
    from aevb.training import fit

_HOMES = {
    "_shapes": ("Values",),
    "bayesnet": ("VAE", "BayesNet"),
    "bounds": ("elbo", "iwae", "log_weights", "terms"),
    "build": ("build_vae",),
    "checkpoint": ("Run", "load", "save"),
    "conditionals": (
        "Bernoulli",
        "Binomial",
        "Conditional",
        "DiagonalNormal",
        "FullNormal",
        "Normal",
        "StandardNormal",
    ),
    "config": ("InputError", "ModelConfig", "TrainConfig"),
    "evaluate": ("Marginal", "active_units", "log_marginal"),
    "nets": ("MLP", "Holes", "Standardize"),
    "training": ("fit",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "VAE",
    "BayesNet",
    "Bernoulli",
    "Binomial",
    "Conditional",
    "DiagonalNormal",
    "FullNormal",
    "Holes",
    "InputError",
    "Marginal",
    "ModelConfig",
    "Normal",
    "Run",
    "StandardNormal",
    "Standardize",
    "TrainConfig",
    "Values",
    "active_units",
    "build_vae",
    "elbo",
    "fit",
    "iwae",
    "load",
    "log_marginal",
    "log_weights",
    "save",
    "terms",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "training"):  # packages that are spelt with their names: aevb.data.load
        return importlib.import_module(f"aevb.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'aevb' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"aevb.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
