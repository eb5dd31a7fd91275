"""`AEVBClassifier` and `AEVBRegressor`: labels in some rows, and a model of all of them."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from aevb.apps.estimator.columns import Columns, Floats, refuse_infinite
from aevb.apps.estimator.core import Fitted, Settings
from aevb.config import InputError

__all__ = ["AEVBClassifier", "AEVBRegressor"]


class AEVBClassifier(ClassifierMixin, Fitted):
    r"""A classifier that also learns from rows without labels: p(y) p(z) p(x | y, z) with q(y | x) q(z | x, y).

    Rows without a label have the bound of x, in which y is summed over, exactly; rows with one that of (x, y) and the
    term :math:`\alpha \log q(y | x)`, :math:`\alpha = 10 N / N_\text{labelled}` (model M2 of Kingma et al., 2014, whose
    weight is a hundredth of this). Predictions are q(y | x)'s. NaN in x means missing: it is integrated out, and q is
    told.

    Args:
        latents: Dimensions of z; half of the columns, from 2 to 16, if None.
        hidden: Widths of the hidden layers of all three nets.
        likelihood: Family of p(x | y, z), as for `AEVB`.
        steps: Minibatch updates; if None, 40 and three for four rows, at most 34 times the square root of the rows.
        unlabelled: Value of y in rows without a label, beside NaN and None: -1, say, as in scikit-learn's
            semi-supervised estimators; None if there is no other.
        random_state: A number makes `fit` a function of the data.

    Attributes:
        classes_: The labels seen, sorted.
        weights_: The trained model, safetensors.
        kl_: Nats that each dimension of z tells of a row, `(latents,)`.
        n_features_in_: Columns.
        feature_names_in_: Their names, where the data had any.

    Example:
        >>> import numpy as np
        >>> x = np.r_[np.random.default_rng(0).normal(size=(100, 2)), np.random.default_rng(1).normal(6, 1, (100, 2))]
        >>> y = np.full(200, np.nan)
        >>> y[[0, 1, 100, 101]] = [0, 0, 1, 1]
        >>> AEVBClassifier(random_state=0).fit(x, y).predict([[0.0, 0.0], [6.0, 6.0]])
        array([0., 1.])
    """

    def __init__(
        self,
        latents: int | None = None,
        hidden: tuple[int, ...] = (128,),
        likelihood: str = "student-t",
        steps: int | None = None,
        unlabelled: Any = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.latents = latents
        self.hidden = hidden
        self.likelihood = likelihood
        self.steps = steps
        self.unlabelled = unlabelled
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows `(N, D)` and labels `(N,)`; NaN for what is missing of either.

        Raises:
            InputError: For infinite values, labels of fewer than two classes, or a parameter out of range.
        """
        x, labels = _pair(self, X, y)
        open_ = _unlabelled(labels, self.unlabelled)
        known = np.asarray(labels[~open_].tolist()) if labels.dtype == object else labels[~open_]
        if not len(known):
            raise InputError("`y` has no label in any row; give one for some rows of each class.")
        check_classification_targets(known)
        classes, codes = np.unique(known, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"`y` has one class only, {classes[0]!r}; a classifier needs two. Give rows of another.")
        target = torch.full((len(x),), -1)
        target[torch.from_numpy(~open_)] = torch.from_numpy(codes)
        settings = Settings.of(self.get_params(deep=False), *x.shape)
        self.classes_ = classes
        self._train(x, settings, self._seeded(), target, len(classes))
        return self

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities of the classes of rows `(N, D)` by q(y | x), `(N, C)` in the order of `classes_`."""
        result: Floats = self._encoded(self._known(X), "y").mean.numpy()
        return result

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of rows `(N, D)`, `(N,)`."""
        probabilities = self.predict_proba(X)
        result: NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return result


class AEVBRegressor(RegressorMixin, Fitted):
    r"""A regression that also learns from rows without targets: p(y) p(z) p(x | y, z) with q(y | x) q(z | x, y).

    y is Gaussian under p(y), and under q(y | x) with a mean and a spread for each row. Rows without a target have the
    bound of x, in which y is drawn; rows with one that of (x, y) and the term :math:`\alpha \log q(y | x)`,
    :math:`\alpha = 10 N / N_\text{labelled}`. Predictions are q(y | x)'s. NaN in x means missing: it is integrated out,
    and q is told.

    Args:
        latents: Dimensions of z; half of the columns, from 2 to 16, if None.
        hidden: Widths of the hidden layers of all three nets.
        likelihood: Family of p(x | y, z), as for `AEVB`.
        steps: Minibatch updates; if None, 40 and three for four rows, at most 34 times the square root of the rows.
        random_state: A number makes `fit` a function of the data.

    Attributes:
        weights_: The trained model, safetensors.
        kl_: Nats that each dimension of z tells of a row, `(latents,)`.
        n_features_in_: Columns.
        feature_names_in_: Their names, where the data had any.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 2))
        >>> y = 3 * x[:, 0] + 10
        >>> model = AEVBRegressor(random_state=0).fit(x, y)
        >>> round(model.score(x, y), 1)
        1.0
    """

    def __init__(
        self,
        latents: int | None = None,
        hidden: tuple[int, ...] = (128,),
        likelihood: str = "student-t",
        steps: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.latents = latents
        self.hidden = hidden
        self.likelihood = likelihood
        self.steps = steps
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows `(N, D)` and targets `(N,)`; NaN for what is missing of either.

        Raises:
            InputError: For infinite values, no target at all, or a parameter out of range.
        """
        x, targets = _pair(self, X, y)
        targets = np.asarray(targets, dtype=np.float64)
        refuse_infinite(targets, "y")
        if np.isnan(targets).all():
            raise InputError("`y` has no target in any row; give one for some rows.")
        settings = Settings.of(self.get_params(deep=False), *x.shape)
        self._target = Columns.of(targets[:, None], "y")
        self._train(x, settings, self._seeded(), self._target.standardized(targets[:, None]), -1)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Expected target of rows `(N, D)` by q(y | x), `(N,)` in the units of y.

        Args:
            X: Rows, NaN for missing.
            return_std: Also return the standard deviation of q(y | x), `(N,)`.
        """
        found = self._encoded(self._known(X), "y")
        mean = self._target.in_units(found.mean)[:, 0]
        return (mean, found.stddev.numpy()[:, 0] * self._target.scale[0]) if return_std else mean


def _pair(estimator: Fitted, rows: Any, y: Any) -> tuple[Floats, NDArray[Any]]:
    """Training rows `(N, D)` and their targets `(N,)`."""
    if y is None:
        name = type(estimator).__name__
        raise InputError(f"{name} requires y to be passed, but the target y is None. Give `y`, NaN where unknown.")
    x = estimator._rows(rows, reset=True)
    targets = column_or_1d(y, warn=True)
    check_consistent_length(x, targets)
    return x, targets


def _unlabelled(labels: NDArray[Any], marker: Any) -> NDArray[np.bool_]:
    """Rows whose label is NaN, None or the marker."""
    if labels.dtype.kind == "f":
        refuse_infinite(labels, "y")
        found: NDArray[np.bool_] = np.isnan(labels)
    else:
        found = np.array([_missing(value) for value in labels.tolist()], dtype=bool)
    if marker is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of a number beside strings: they are unequal
            found = found | np.asarray(labels == marker, dtype=bool)
    return found


def _missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas' NA is neither equal to itself nor unequal
        return True
