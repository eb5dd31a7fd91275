"""Paired differences: scipy's own tests as oracle, coverage of the intervals, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from aevb import InputError, compare


def test_two_models_are_the_paired_t_test():
    rng = np.random.default_rng(0)
    a = rng.normal(-90, 20, 40)
    b = a - 0.5 + rng.normal(0, 1, 40)
    found = compare({"a": torch.as_tensor(a), "b": torch.as_tensor(b)}, 0.9)
    wanted = stats.ttest_rel(a, b).confidence_interval(0.9)
    assert float(found.low[0, 1]) == pytest.approx(wanted.low, rel=1e-9)
    assert float(found.high[0, 1]) == pytest.approx(wanted.high, rel=1e-9)
    assert float(found.low[1, 0]) == pytest.approx(-wanted.high, rel=1e-9)
    assert float(found.difference_error[0, 1]) == pytest.approx(stats.sem(a - b), rel=1e-9)
    assert float(found.std_error[1]) == pytest.approx(stats.sem(b), rel=1e-9)
    assert found.best == int(a.mean() < b.mean())
    assert found.rows == 40


def test_intervals_cover_all_differences_together():
    """Three models, 2000 repetitions: all three true differences inside in 95 % or more (binomial band at 1e-4)."""
    rng, inside, repetitions = np.random.default_rng(1), 0, 2000
    for _ in range(repetitions):
        common = rng.normal(0, 5, 30)
        rows = {name: torch.as_tensor(common + rng.normal(m, 1, 30)) for name, m in (("a", 0), ("b", 0.3), ("c", 1))}
        found = compare(rows)
        true = torch.tensor([[0, -0.3, -1], [0.3, 0, -0.7], [1, 0.7, 0]])
        inside += bool(((found.low <= true) & (true <= found.high)).all())
    assert inside >= stats.binom(repetitions, 0.95).ppf(1e-4)


def test_ranks_claim_no_more_than_the_intervals_allow():
    x = torch.linspace(-5, 5, 200, dtype=torch.float64)
    noise = 0.5 * torch.sin(40 * x)
    found = compare({"best": x, "tied": x - 0.02 + noise, "worst": x - 3 - noise})
    assert found.ranks == [(1, 2), (1, 2), (3, 3)]
    same = compare({"a": x, "b": x})
    assert same.ranks == [(1, 2), (1, 2)]
    assert float(same.difference_error[0, 1]) == 0


@pytest.mark.parametrize(
    ("rows", "confidence", "message"),
    [
        ({"a": torch.zeros(3)}, 0.95, "two models or more; got 1"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, 0.95, r"`a` \(3,\), `b` \(4,\)"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, 0.95, "same two rows or more"),
        ({"a": torch.zeros(3), "b": torch.tensor([0, -math.inf, 0])}, 0.95, "log p of `b` is -inf in row 1"),
        ({"a": torch.zeros(3), "b": torch.ones(3)}, 1.0, "`confidence` must lie between 0 and 1; got 1.0"),
    ],
)
def test_what_is_refused(rows, confidence, message):
    with pytest.raises(InputError, match=message):
        compare(rows, confidence)
