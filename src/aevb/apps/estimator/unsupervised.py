"""`AEVB`: a variational autoencoder as a transformer, a density and a novelty detector."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, DensityMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted

from aevb.apps.estimator.columns import Floats
from aevb.apps.estimator.core import ONE_AT_A_TIME, Fitted, Settings, whole
from aevb.config import InputError
from aevb.evaluate import impute, log_marginal

__all__ = ["AEVB"]

_ROWS_FOR_OFFSET = 10_000


# OutlierMixin before DensityMixin: the first of them names the estimator's type, and scikit-learn checks by it.
class AEVB(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, OutlierMixin, DensityMixin, Fitted
):  # fmt: skip
    r"""A variational autoencoder for a table: embeddings, log-densities, novelties, imputations and new rows.

    .. math:: p(x) = \int N(z;\, 0, I)\, p(x | z)\, dz, \qquad q(z | x) \propto N(z;\, 0, I) \prod_{j\ \text{known}}
        N(t_j(x_j);\, w_j^T z,\, 1)

    up to what a net corrects in q (see `ProductNormal`). NaN means missing: it is integrated out of p, and its factor
    is left out of q. Rows with holes train by the importance-weighted bound of 10 draws, complete ones by the ELBO. Of
    a model trained on complete rows, whose q has seen no hole, scores of rows with holes are lower than they should be.
    Columns are standardised inside the model; every log-density is of the data in the units they came in. Scores are
    importance estimates whose draws are keyed by a row's content, in float64: neither a row's company nor its place
    matters.

    Args:
        latents: Dimensions of z; half of the columns, from 2 to 16, if None.
        hidden: Widths of the hidden layers of the encoder; the decoder has them in reverse.
        likelihood: Family of p(x | z): "student-t" or "normal" for real numbers, "bernoulli" for 0 and 1, "poisson",
            "negative-binomial" or "zero-inflated" for counts.
        steps: Minibatch updates; if None, 40 and three for four rows, at most 34 times the square root of the rows,
            and twice as many where rows have holes.
        samples: Draws of z behind each score; eight times as many behind an imputation, whose Monte Carlo error adds a
            variance of the missing entry's over the effective sample size to the squared error.
        contamination: Share of the training rows that `predict` calls novel, in (0, 0.5].
        random_state: A number makes `fit` a function of the data.

    Attributes:
        weights_: The trained model, safetensors.
        kl_: Nats that each latent dimension tells of a row, `(latents,)`; all near 0 where x is modelled without z.
        offset_: Score below which a row is novel, nats.
        n_features_in_: Columns.
        feature_names_in_: Their names, where the data had any.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(200, 1)) @ [[1.0, -2.0, 3.0]] + [5.0, 0.0, 100.0]
        >>> model = AEVB(latents=1, steps=100, random_state=0).fit(x)
        >>> model.transform(x).shape, model.score_samples(x).shape
        ((200, 1), (200,))
        >>> bool(model.score_samples([[50.0, 0.0, 0.0]])[0] < model.score_samples(x).min())
        True
    """

    def __init__(
        self,
        latents: int | None = None,
        hidden: tuple[int, ...] = (128,),
        likelihood: str = "student-t",
        steps: int | None = None,
        samples: int = 256,
        contamination: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.latents = latents
        self.hidden = hidden
        self.likelihood = likelihood
        self.steps = steps
        self.samples = samples
        self.contamination = contamination
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on rows `(N, D)`, NaN for missing; `y` is ignored.

        Raises:
            InputError: For infinite values, a column without a known value, or a parameter out of range.
        """
        x = self._rows(X, reset=True)
        samples = whole("samples", self.samples, 1)
        share = self.contamination
        if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 < share <= 0.5:
            raise InputError(f"`contamination` must be in (0, 0.5]; got {share!r}. Give the share of novel rows.")
        settings = Settings.of(self.get_params(deep=False), *x.shape, holes=bool(np.isnan(x).any()))
        seed = self._seeded()
        self._train(x, settings, seed)
        some = np.random.RandomState(seed).permutation(len(x))[:_ROWS_FOR_OFFSET]
        scores = self._log_prob(x[np.sort(some)], samples)[0]
        self.offset_ = float(np.percentile(scores, 100.0 * float(share)))
        return self

    def transform(self, X: Any) -> Floats:
        """Embeddings of rows `(N, D)`: the means of q(z | x), `(N, latents)`."""
        return self._encoded(self._known(X), "z").mean.numpy()

    def inverse_transform(self, X: Any) -> Floats:
        """Rows `(N, D)` that are expected at embeddings `(N, latents)`, E[x | z]."""
        check_is_fitted(self)
        z = check_array(X, dtype=np.float64)
        if z.shape[1] != self._form.latents:
            raise InputError(
                f"`X` must have a column for each of the {self._form.latents} latents; got shape {z.shape}. Give what "
                "`transform` returns."
            )
        with torch.no_grad():
            mean = self._vae.p.distribution("x", {"z": torch.from_numpy(z)}).mean
        return self._columns.in_units(mean)

    def score_samples(self, X: Any, return_std: bool = False) -> Any:
        """Log p(x) of rows `(N, D)` in nats, `(N,)`, higher is better: importance sampling from q.

        Args:
            X: Rows, NaN for missing; of such a row it is the density of what is known.
            return_std: Also return the Monte Carlo standard error, `(N,)` nats.
        """
        log_prob, error = self._log_prob(self._known(X), whole("samples", self.samples, 1))
        return (log_prob, error) if return_std else log_prob

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of log p(x) over rows `(N, D)`, nats a row, higher is better; `y` is ignored."""
        return float(np.mean(self.score_samples(X)))

    def decision_function(self, X: Any) -> Floats:
        """Score of rows `(N, D)` above `offset_`, `(N,)` nats: below 0 for a novel one."""
        result: Floats = self.score_samples(X) - self.offset_
        return result

    def predict(self, X: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows `(N, D)` that look like the training rows, 1, and novel ones, -1; `(N,)`."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def impute(self, X: Any, draws: int = 0, return_ess: bool = False) -> Any:
        """Rows `(N, D)` with their missing entries filled in by importance sampling; known ones stay as they are.

        Args:
            X: Rows, NaN for missing.
            draws: Multiple imputations M, each drawn from p(missing | known); 0 for the expected values, which have
                the least squared error.
            return_ess: Also return how many draws of z each row rests on in effect, `(N,)`; infinite where none is
                missing.

        Returns:
            `(N, D)`, or with draws `(M, N, D)`.
        """
        x = self._known(X)
        count = whole("draws", draws, 0)
        missing = np.isnan(x)
        filled: Floats = np.broadcast_to(x, (count, *x.shape)).copy() if count else x.copy()
        some = missing.any(1)
        ess = np.full(len(x), np.inf)
        if some.any():
            with ONE_AT_A_TIME:
                found = impute(
                    self._vae, {"x": self._columns.standardized(x[some])}, 8 * whole("samples", self.samples, 1),
                    draws=count, seed=self._seed, pack=self._pack,
                )  # fmt: skip
            guess = self._columns.in_units(found.draws["x"] if count else found.mean["x"])
            filled[..., some, :] = np.where(missing[some], guess, x[some])
            ess[some] = found.ess.numpy()
        return (filled, ess) if return_ess else filled

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> Floats:
        """New rows `(n_samples, D)`, drawn from the model.

        Args:
            n_samples: How many.
            random_state: A number makes the rows a function of it and of the model.
        """
        check_is_fitted(self)
        rows = whole("n_samples", n_samples, 1)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            z = torch.randn(rows, self._form.latents, dtype=torch.float64)
            return self._columns.in_units(self._vae.p.sample(rows, {"z": z})["x"])

    @property
    def _n_features_out(self) -> int:
        return self._form.latents

    def _log_prob(self, x: Floats, samples: int) -> tuple[Floats, Floats]:
        with ONE_AT_A_TIME:
            found = log_marginal(
                self._vae, {"x": self._columns.standardized(x)}, samples, seed=self._seed, pack=self._pack
            )
        log_prob = found.log_prob.numpy() - self._columns.log_jacobian(x)
        known = ~np.isnan(x).all(1)  # of a row that tells nothing the answer is exact: log 1
        return np.where(known, log_prob, 0.0), np.where(known, found.std_error.numpy(), 0.0)
