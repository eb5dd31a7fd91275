"""scikit-learn estimators: the library's models behind `fit`, `transform` and `predict`."""

from aevb.apps.estimator.semi_supervised import AEVBClassifier, AEVBRegressor
from aevb.apps.estimator.unsupervised import AEVB

__all__ = ["AEVB", "AEVBClassifier", "AEVBRegressor"]
