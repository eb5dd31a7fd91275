"""The scikit-learn estimators: scikit-learn's own checks whole, and what they cannot know of a density."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils import get_tags

import aevb
from aevb import InputError
from aevb.apps.estimator import AEVB, AEVBClassifier, AEVBRegressor
from aevb.apps.estimator.columns import Columns
from aevb.apps.estimator.core import LIKELIHOODS

NAN = math.nan
STEPS = 60
"""Enough for what holds of any weights."""


def table(rows: int = 120, seed: int = 0) -> np.ndarray:
    """Three correlated columns of unequal size."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, 1))
    return z @ [[2.0, -30.0, 0.1]] + rng.normal(size=(rows, 3)) * [0.5, 5.0, 0.05] + [0.0, 100.0, -1.0]


def with_holes(x: np.ndarray, share: float = 0.2, seed: int = 1) -> np.ndarray:
    """The rows with entries missing at random, none of them whole."""
    holed = np.where(np.random.default_rng(seed).random(x.shape) < share, NAN, x)
    holed[np.isnan(holed).all(1)] = x[np.isnan(holed).all(1)]
    return holed


@pytest.fixture(scope="module")
def model() -> AEVB:
    """Trained on rows with holes."""
    return AEVB(steps=STEPS, random_state=0).fit(with_holes(table()))


_CHECKS = """
import json, sys, torch
from sklearn.utils.estimator_checks import check_estimator
from aevb.apps import estimator
torch.set_num_threads(1)
found = check_estimator(getattr(estimator, sys.argv[1])(), on_fail=None, on_skip=None)
print(json.dumps([[one["check_name"], one["status"], repr(one["exception"])] for one in found]))
"""


@pytest.mark.parametrize(
    ("name", "among"),
    [
        ("AEVB", {"check_outliers_fit_predict", "check_outliers_train", "check_transformer_general"}),
        ("AEVBClassifier", {"check_classifiers_train", "check_supervised_y_no_nan"}),
        ("AEVBRegressor", {"check_regressors_train", "check_supervised_y_no_nan"}),
    ],
)
def test_scikit_learns_checks(name: str, among: set[str]):
    """All of them, none skipped and none expected to fail; array dispatch is decided when scipy is imported."""
    environment = {**os.environ, "SCIPY_ARRAY_API": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CHECKS, name], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one for one in found if one[1] != "passed"] == []
    always = {"check_array_api_input", "check_methods_subset_invariance", "check_n_features_in_after_fitting"}
    assert among | always <= {one[0] for one in found}


def test_the_type_that_the_outlier_checks_go_by():
    assert get_tags(AEVB()).estimator_type == "outlier_detector"
    assert get_tags(AEVBClassifier()).estimator_type == "classifier"
    assert get_tags(AEVBRegressor()).estimator_type == "regressor"


def test_names_are_there_without_being_imported():
    assert aevb.AEVB is AEVB
    assert {"AEVB", "AEVBClassifier", "AEVBRegressor"} <= set(dir(aevb)) - set(aevb.__all__)
    code = "import sys; sys.modules['sklearn'] = None; from aevb import *; import aevb\ntry: aevb.AEVB\n"
    code += "except ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "aevb.AEVB needs scikit-learn: pip install 'aevb[apps]'.\n"


@pytest.mark.parametrize("method", ["score_samples", "decision_function", "predict", "transform", "impute"])
def test_neither_company_nor_place_matters(model: AEVB, method: str):
    x = with_holes(table(40, seed=2), seed=3)
    together = getattr(model, method)(x)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(getattr(model, method)(x[order]), together[order], rtol=0, atol=1e-7)
    alone = np.concatenate([getattr(model, method)(row[None]) for row in x])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(getattr(model, method)(x), together)


def test_density_is_in_the_units_of_the_data():
    """Columns times powers of two, at which no digit is lost, cost the log of these powers, to the last digit or so."""
    x, factors = with_holes(table()), np.array([4.0, 0.25, 1024.0])
    one, other = (AEVB(steps=STEPS, random_state=0).fit(rows) for rows in (x, x * factors))
    shift = ~np.isnan(x) @ np.log(factors)
    np.testing.assert_allclose(other.score_samples(x * factors), one.score_samples(x) - shift, rtol=0, atol=1e-9)
    np.testing.assert_allclose(other.transform(x * factors), one.transform(x), rtol=0, atol=1e-9)
    assert one.score(x) == pytest.approx(one.score_samples(x).mean())


def test_density_integrates_to_one_and_marginalises():
    x = with_holes(table(300)[:, :2])  # only by holes does q learn to see through them
    model = AEVB(latents=1, steps=300, samples=2048, random_state=0).fit(x)
    a, b = np.linspace(-60, 60, 301), np.linspace(-900, 1100, 501)
    line = np.c_[a, np.full_like(a, NAN)]
    assert np.exp(model.score_samples(line)).sum() * (a[1] - a[0]) == pytest.approx(1, abs=0.02)
    for at in (-2.0, 1.0):
        across = np.exp(model.score_samples(np.c_[np.full_like(b, at), b])).sum() * (b[1] - b[0])
        known, error = model.score_samples([[at, NAN]], return_std=True)
        assert np.log(across) == pytest.approx(known[0], abs=4 * error[0] + 0.02)
    assert model.score_samples([[NAN, NAN]])[0] == 0


def test_fit_finds_the_density_and_sees_through_holes():
    """Held-out rows of a known Gaussian: the difference to the truth is below 0.15 nats a row.

    With a fifth of their entries missing, too, though the model was trained on complete rows: what else is known still
    says of z what it said before.
    """
    fresh = table(500, seed=5)
    model = AEVB(random_state=0).fit(table(1000))
    w, s = np.array([[2.0, -30.0, 0.1]]), np.diag(np.square([0.5, 5.0, 0.05]))
    mean, cov = np.array([0.0, 100.0, -1.0]), w.T @ w + s
    for rows in (fresh, with_holes(fresh)):
        truth = [
            stats.multivariate_normal(mean[k], cov[k][:, k]).logpdf(x[k])
            for x, k in zip(rows, ~np.isnan(rows), strict=True)
        ]
        lacking = np.array(truth) - model.score_samples(rows)
        error = lacking.std() / len(rows) ** 0.5
        assert -4 * error < lacking.mean() < 0.15 + 4 * error


def test_what_is_missing_is_told_and_filled_in():
    x = table(600)
    holed = with_holes(x)
    model = AEVB(steps=200, samples=64, random_state=0).fit(holed)
    (filled, ess), missing = model.impute(holed, return_ess=True), np.isnan(holed)
    gone = missing.any(1)
    assert (ess[gone] >= 1).all()
    assert (ess[gone] <= 8 * model.samples).all()
    assert np.isinf(ess[~gone]).all()
    np.testing.assert_array_equal(filled[~missing], x[~missing])
    away = ((filled - x) / x.std(0))[missing]
    assert np.square(away).mean() < 0.5  # a column's mean has 1
    draws = model.impute(holed, draws=20)
    assert draws.shape == (20, *x.shape)
    np.testing.assert_array_equal(draws[:, ~missing], np.broadcast_to(x[~missing], (20, (~missing).sum())))
    assert (draws.std(0)[missing] > 0).all()
    row = np.array([[1.0, NAN, -1.0]])
    filled_by_mean = np.where(np.isnan(row), np.nanmean(holed, 0), row)
    assert np.abs(model.transform(row) - model.transform(filled_by_mean)).max() > 1e-3


INFINITE: list[tuple[str, Callable[[np.ndarray], Any]]] = [
    ("fit", lambda x: AEVB().fit(x)),
    ("classifier", lambda x: AEVBClassifier().fit(x, np.arange(len(x)) % 2)),
    ("regressor", lambda x: AEVBRegressor().fit(x, np.arange(len(x)))),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fit", [fit for _, fit in INFINITE], ids=[name for name, _ in INFINITE])
def test_infinities_are_told_in_one_sentence(fit: Callable[[np.ndarray], Any], sign: int):
    x = table()
    x[7, 2] = sign * math.inf
    told = r"^`X` is infinite in row 7, column 2; values must be finite, or NaN for missing\. Clean that entry\.$"
    with pytest.raises(InputError, match=told):
        fit(x)


@pytest.mark.parametrize("method", ["score_samples", "score", "decision_function", "predict", "transform", "impute"])
def test_infinities_are_told_by_every_method(model: AEVB, method: str):
    with pytest.raises(InputError, match=r"^`X` is infinite in row 0, column 1;"):
        getattr(model, method)([[0.0, -math.inf, 0.0]])


def test_contamination_is_the_share_of_training_rows():
    x = table(200)
    for share in (0.05, 0.5):
        assert (AEVB(steps=20, contamination=share, random_state=0).fit_predict(x) == -1).sum() == 200 * share
    model = AEVB(steps=200, random_state=0).fit(x)
    assert model.predict([[100.0, -500.0, 5.0]])[0] == -1


def test_random_state_decides_everything():
    x = table()
    torch.manual_seed(1)
    before, np_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, same, other = (AEVB(steps=STEPS, random_state=seed).fit(x) for seed in (0, 0, 1))
    for method in ("transform", "score_samples"):
        np.testing.assert_array_equal(getattr(one, method)(x), getattr(same, method)(x))
        assert np.abs(getattr(one, method)(x) - getattr(other, method)(x)).max() > 1e-3
    assert one.weights_ == same.weights_ != other.weights_
    np.testing.assert_array_equal(one.sample(5, random_state=3), same.sample(5, random_state=3))
    assert np.abs(one.sample(5, random_state=3) - one.sample(5, random_state=4)).max() > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all()


def test_fits_in_threads_are_those_of_their_seeds():
    x = table()
    alone = [AEVB(steps=30, random_state=seed).fit(x).weights_ for seed in range(3)]
    fits = (joblib.delayed(AEVB(steps=30, random_state=seed).fit)(x) for seed in range(3))
    together = joblib.Parallel(n_jobs=3, backend="threading")(fits)
    assert [each.weights_ for each in together] == alone


_ELSEWHERE = """
import sys, joblib, numpy as np, torch
torch.set_num_threads(1)
for path in sys.argv[2:]:
    np.save(path + ".npy", joblib.load(path).predict(np.load(sys.argv[1])))
"""


def test_pickles_hold_safetensors_and_open_elsewhere(tmp_path: Path):
    x, y = table(), np.arange(120) % 3
    fitted = [estimator(steps=20, random_state=0).fit(x, y) for estimator in (AEVB, AEVBClassifier, AEVBRegressor)]
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / type(each).__name__) for each in fitted]
    for each, path in zip(fitted, paths, strict=True):
        content = pickle.dumps(each)
        assert b"torch" not in content
        assert each.weights_ in content
        joblib.dump(each, path)
    subprocess.run([sys.executable, "-c", _ELSEWHERE, str(tmp_path / "x.npy"), *paths], check=True)
    for each, path in zip(fitted, paths, strict=True):
        np.testing.assert_array_equal(np.load(path + ".npy"), each.predict(x))


def test_pipelines_searches_and_frames():
    x = pd.DataFrame(with_holes(table()), columns=["a", "b", "c"])
    x["kind"] = pd.Categorical(np.arange(120) % 2)
    y = (np.arange(120) % 2).astype(bool)
    parts = ColumnTransformer(
        [("codes", AEVB(latents=2, steps=20, random_state=0), ["a", "b", "c"]), ("kind", OneHotEncoder(), ["kind"])]
    )
    assert make_pipeline(parts, LogisticRegression()).fit(x, y).score(x, y) == 1
    codes = AEVB(latents=2, steps=20, random_state=0).set_output(transform="pandas").fit_transform(x[["a", "b", "c"]])
    assert list(codes.columns) == ["aevb0", "aevb1"]
    assert codes.index.equals(x.index)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), AEVB(steps=20, random_state=0)), {"aevb__latents": [1, 2]}, cv=2
    )
    search.fit(x[["a", "b", "c"]])
    assert search.best_params_["aevb__latents"] == 1 + search.cv_results_["mean_test_score"].argmax()
    with pytest.raises(ValueError, match="feature names"):
        AEVB(steps=2).fit(x[["a", "b", "c"]]).transform(x[["b", "a", "c"]])


def test_new_rows_and_expected_ones():
    x = table(1000)
    model = AEVB(random_state=0).fit(x)
    new = model.sample(4000, random_state=0)
    assert new.shape == (4000, 3)
    assert (np.abs(np.median(new, 0) - np.median(x, 0)) < 0.2 * x.std(0)).all()
    assert np.abs(np.corrcoef(new.T) - np.corrcoef(x.T)).max() < 0.1
    back = model.inverse_transform(model.transform(x))
    assert (np.square(back - x).mean(0) < 0.2 * x.var(0)).all()
    with pytest.raises(InputError, match="`X` must have a column for each of the 2 latents"):
        model.inverse_transform(x)


def test_scores_carry_their_standard_error(model: AEVB):
    x = table(20, seed=4)
    _, error = model.score_samples(x, return_std=True)
    more = clone(model).set_params(samples=256 * 64).fit(with_holes(table()))
    assert more.weights_ == model.weights_
    better, small = more.score_samples(x, return_std=True)
    away = (model.score_samples(x) - better) / np.hypot(error, small)
    assert (small < error / 4).all()
    assert np.abs(away).max() < 4


def test_unused_latents_are_told_by_the_fit_not_by_the_log(caplog: pytest.LogCaptureFixture):
    unused, used = (AEVB(random_state=0).fit(x).kl_ for x in (np.random.default_rng(0).normal(size=(300, 2)), table()))
    assert unused.shape == (2,)
    assert unused.max() < 0.3 < used.max()
    assert "Posterior collapse" not in caplog.text


def test_the_floor_is_the_resolution_of_a_column():
    rng = np.random.default_rng(0)
    whole, fine = rng.integers(0, 5, 500).astype(float), rng.normal(size=500)
    mixed = np.where(rng.random(500) < 0.5, 0.0, 1 + rng.integers(0, 3, 500) / 10)
    rounded = whole / 10 + rng.permutation(np.r_[np.full(250, 1e-17), np.zeros(250)])
    x = np.c_[whole, fine, mixed, rounded, np.full(500, 0.1), np.zeros(500)]
    found = Columns.of(x)
    least = found.floor * found.scale * math.sqrt(12)
    assert least[[0, 2, 3, 4, 5]] == pytest.approx([1, 0.1, 0.1, 0.1, np.median(found.scale[:4])])
    assert least[1] < 0.02
    assert found.loc == pytest.approx(x.mean(0))


@pytest.mark.parametrize("likelihood", ["normal", "student-t"])
def test_no_density_of_whole_numbers_grows_beyond_their_resolution(likelihood: str):
    """Four columns that are one: a net can be right to the last digit, and no cell of width 1 holds more than all."""
    whole = np.random.default_rng(0).integers(0, 4, (300, 1)).astype(float)
    model = AEVB(likelihood=likelihood, steps=600, random_state=0).fit(np.tile(whole, (1, 4)))
    scores, error = model.score_samples(np.tile([[0.0], [1.0], [2.0], [3.0]], (1, 4)), return_std=True)
    assert (scores < 4 * math.log(math.sqrt(12 / (2 * math.pi))) + 4 * error).all()
    assert scores.min() > -6


def test_constant_columns_and_large_offsets():
    x = np.c_[table(), np.full(120, 0.1), np.zeros(120)]
    moved = x + np.array([0, 0, 1e9, 0, 0])
    model, plain = (AEVB(steps=STEPS, random_state=0).fit(rows) for rows in (moved, x))
    assert model.score(moved) == pytest.approx(plain.score(x), abs=0.2)
    assert model.predict(moved[:1] + np.array([0, 0, 0, 5, 5]))[0] == -1


@pytest.mark.parametrize("value", [0.0, 3e-17])
def test_a_constant_column_that_is_nothing_beside_the_others_is_scaled_as_they_are(value: float):
    """3e-17 is what standardising leaves of a constant: in units of itself any other value would be infinitely far."""
    x = np.c_[table(), np.full(120, value)]
    columns = Columns.of(x)
    assert columns.scale[3] == np.median(columns.scale[:3])
    model = AEVB(steps=STEPS, random_state=0).fit(x)
    moved = x[:1] + np.array([0, 0, 0, 5 * columns.scale[3]])
    assert -100 < model.score_samples(moved)[0] < model.score_samples(x[:1])[0] - 1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood(likelihood: str):
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(size=(200, 1)) + np.array([1.0, 0.0]))
    made = {"bernoulli": (rate > 1).astype(float), "normal": rate, "student-t": rate}
    x = with_holes(made.get(likelihood, rng.poisson(rate).astype(float)))
    model = AEVB(likelihood=likelihood, latents=1, steps=200, samples=4096, random_state=0).fit(x)
    assert model.transform(x).shape == (200, 1)
    assert np.isfinite(model.impute(x[:20])).all()
    assert model.sample(3).shape == model.inverse_transform(np.zeros((3, 1))).shape == (3, 2)
    if likelihood in made and likelihood != "bernoulli":
        untrained = AEVB(likelihood=likelihood, latents=1, steps=1, random_state=0).fit(x)
        assert model.score(x[:50]) > untrained.score(x[:50])
        return
    top = 2 if likelihood == "bernoulli" else 150
    some = np.stack(np.meshgrid(np.arange(top), [NAN]), -1).reshape(-1, 2)
    assert np.exp(model.score_samples(some)).sum() == pytest.approx(1, abs=0.02)
    with pytest.raises(InputError, match="outside the support"):
        model.score_samples([[0.5, 0.0]])


def test_unlabelled_rows_help():
    """Two clusters in ten dimensions, two labels each: rows without a label show where the clusters are."""
    gains = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = np.arange(300) % 2
        x = rng.normal(size=(300, 10)) + 1.0 * truth[:, None]
        labels = np.where(np.arange(300) < 4, truth, -1)
        few = AEVBClassifier(random_state=seed).fit(x[:4], truth[:4]).predict(x[4:]) == truth[4:]
        all_ = AEVBClassifier(unlabelled=-1, random_state=seed).fit(x, labels).predict(x[4:]) == truth[4:]
        gains.append(all_.mean() - few.mean())
    assert np.mean(gains) > 0.03


def test_what_marks_an_unlabelled_row():
    x, codes = table(), np.arange(120) % 3
    hidden = np.arange(120) % 4 == 0
    shown = np.array(["low", "middle", "top"])[codes]

    def fitted(y: Any, **settings: Any) -> AEVBClassifier:
        return AEVBClassifier(steps=20, random_state=0, **settings).fit(x, y)

    with_nan = fitted(np.where(hidden, NAN, codes))
    assert list(with_nan.classes_) == [0, 1, 2]
    want = with_nan.predict_proba(x)
    np.testing.assert_allclose(want.sum(1), 1)
    for y, settings in [
        (np.where(hidden, -1, codes), {"unlabelled": -1}),
        (np.where(hidden, None, codes), {}),
        (np.where(hidden, None, shown), {}),
        (np.where(hidden, "?", shown), {"unlabelled": "?"}),
        (pd.Series(codes, dtype="Int64").mask(hidden), {}),
        (pd.Series(shown).mask(hidden), {}),
    ]:
        other = fitted(y, **settings)
        np.testing.assert_array_equal(other.predict_proba(x), want)
        np.testing.assert_array_equal(other.predict(x), other.classes_[want.argmax(1)])
    assert list(fitted(np.where(hidden, -1, codes)).classes_) == [-1, 0, 1, 2]  # a class like others, unless it is told


def test_regression_is_in_the_units_of_its_targets():
    x = table(300)
    y = x[:, 0] + 0.02 * x[:, 1]
    hidden = np.arange(300) % 3 == 0
    one = AEVBRegressor(random_state=0).fit(x, np.where(hidden, NAN, y))
    assert one.score(x[hidden], y[hidden]) > 0.9
    other = AEVBRegressor(random_state=0).fit(x, np.where(hidden, NAN, 1024 * y))
    mean, spread = one.predict(x, return_std=True)
    wide, wider = other.predict(x, return_std=True)
    np.testing.assert_allclose(wide, 1024 * mean, rtol=1e-9)
    np.testing.assert_allclose(wider, 1024 * spread, rtol=1e-9)


def test_the_spread_of_a_prediction_is_that_of_its_errors():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 2))
    y = x[:, 0] + np.where(x[:, 1] > 0, 1.0, 0.25) * rng.normal(size=1200)
    mean, spread = AEVBRegressor(random_state=0).fit(x[:800], y[:800]).predict(x[800:], return_std=True)
    errors = (y[800:] - mean) / spread
    assert np.square(errors).mean() == pytest.approx(1, abs=4 * np.square(errors).std() / len(errors) ** 0.5)
    noisy, quiet = (np.median(spread[part]) for part in (x[800:, 1] > 0.3, x[800:, 1] < -0.3))
    assert noisy > 2 * quiet


def test_holes_in_labelled_rows():
    x = table(300)
    y = (x[:, 0] > 0).astype(int)
    holed = with_holes(x)
    assert AEVBClassifier(random_state=0).fit(holed, y).score(holed, y) > 0.85
    assert AEVBRegressor(random_state=0).fit(holed, x[:, 0]).score(holed, x[:, 0]) > 0.8


X, Y = table(20), np.arange(20) % 2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: AEVB(latents=0).fit(X), "`latents` must be a whole number of at least 1; got 0"),
        (lambda: AEVB(latents=2.0).fit(X), "`latents` must be a whole number"),
        (lambda: AEVB(steps=0).fit(X), "`steps`"),
        (lambda: AEVB(hidden=64).fit(X), "`hidden` must list"),
        (lambda: AEVB(hidden=(64, 0)).fit(X), "`hidden`"),
        (lambda: AEVB(likelihood="gauss").fit(X), "`likelihood` must be one of normal, student-t"),
        (lambda: AEVB(samples=0).fit(X), "`samples`"),
        (lambda: AEVB(contamination=0.6).fit(X), r"`contamination` must be in \(0, 0.5\]; got 0.6"),
        (lambda: AEVB(contamination="auto").fit(X), "`contamination`"),
        (lambda: AEVB(likelihood="bernoulli").fit(X), "outside the support of its Bernoulli"),
        (lambda: AEVB().fit(np.c_[X, np.full(20, NAN)]), "`X` has no known value in column 3"),
        (lambda: AEVB(steps=2).fit(X).sample(0), "`n_samples`"),
        (lambda: AEVB(steps=2).fit(X).impute(X, draws=-1), "`draws`"),
        (lambda: AEVBClassifier().fit(X, None), "requires y"),
        (lambda: AEVBClassifier().fit(X, np.zeros(20)), "one class"),
        (lambda: AEVBClassifier().fit(X, np.full(20, NAN)), "no label"),
        (lambda: AEVBClassifier().fit(X, np.where(Y == 0, math.inf, 1.0)), "`y` is infinite in row 0"),
        (lambda: AEVBRegressor().fit(X, None), "requires y"),
        (lambda: AEVBRegressor().fit(X, np.full(20, NAN)), "no target"),
        (lambda: AEVBRegressor().fit(X, np.where(Y == 0, math.inf, 1.0)), "`y` is infinite in row 0"),
    ],
)
def test_what_cannot_be_fitted_is_told(make: Callable[[], Any], told: str):
    with pytest.raises(InputError, match=told):
        make()
