"""Scores against known factors: exact values where codes are the factors, none where they are noise."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import mutual_info_score

from aevb import InputError
from aevb.factors import _dci, _mutual_information, disentanglement

pytestmark = pytest.mark.usefixtures("double")

CLASSES = (3, 4, 5)


def _grid(repeats: int = 20) -> torch.Tensor:
    """Every combination of factors equally often: they are independent in the sample, not only in law."""
    return torch.cartesian_prod(*(torch.arange(float(count)) for count in CLASSES)).repeat(repeats, 1)


def _uniform(rows: int = 1500) -> torch.Tensor:
    return torch.rand(rows, 3, generator=torch.Generator().manual_seed(0))


def _noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _rotated(z: torch.Tensor, angle: float = math.pi / 4) -> torch.Tensor:
    """The first two columns turned into one another, all at unit variance before."""
    z = (z - z.mean(0)) / z.std(0)
    c, s = math.cos(angle), math.sin(angle)
    return z @ torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]).T


# -- codes that are the factors ---------------------------------------------------------------------------------------


def test_permuted_and_rescaled_factors_are_disentangled():
    """Exact on the whole grid: the code of another factor tells nothing, and is right for one class of each."""
    factors = _grid()
    found = disentanglement(factors[:, [2, 0, 1]] * torch.tensor([-2.0, 3.0, 0.1]) + 1, factors)
    assert found.mig == pytest.approx(1, abs=1e-12)
    assert found.sap == pytest.approx(np.mean([1 - 1 / count for count in CLASSES]), abs=1e-12)
    assert (found.disentanglement, found.completeness, found.informativeness) == pytest.approx((1, 1, 1), abs=1e-12)
    own = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(found.importance, own, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.information, own * torch.tensor(CLASSES).log(), rtol=0, atol=1e-12)
    chance = 1 / torch.tensor(CLASSES)
    torch.testing.assert_close(found.accuracy, own * (1 - chance) + chance, rtol=0, atol=1e-12)


def test_a_code_too_many_changes_nothing():
    """A constant one: a posterior that collapsed."""
    factors = _grid()
    found = disentanglement(torch.cat([factors, torch.full((len(factors), 1), 0.3)], 1), factors)
    assert (found.mig, found.disentanglement, found.completeness) == pytest.approx((1, 1, 1), abs=1e-12)
    for table in (found.information, found.importance, found.accuracy):
        assert table[3].tolist() == [0, 0, 0]


def test_a_factor_in_two_codes_is_disentangled_not_complete():
    """Both codes of a pair are equally good, so the gaps of MIG and SAP close; DCI's first score does not mind."""
    factors = _grid()
    found = disentanglement(torch.cat([factors, -factors], 1), factors)
    assert (found.mig, found.sap) == pytest.approx((0, 0), abs=1e-12)
    assert found.disentanglement == pytest.approx(1, abs=1e-12)
    # Two of six codes share the importance, at best all in one, at worst in halves: 1 - log 2 / log 6 at least.
    assert 1 - math.log(2) / math.log(6) - 1e-12 <= found.completeness < 0.9
    assert found.informativeness == 1


def test_continuous_factors():
    """SAP is r² less the largest r² of another code; MIG loses to the plug-in bias alone."""
    factors = _uniform()
    found = disentanglement(-3 * factors[:, [2, 0, 1]], factors, discrete=False)
    squared = np.corrcoef(factors.numpy().T) ** 2
    expected = np.mean([1 - max(squared[f, d] for d in range(3) if d != f) for f in range(3)])
    assert found.sap == pytest.approx(expected, abs=1e-12)
    # 2 N I is chi-squared with 19 * 19 degrees of freedom where codes and factors are independent, and the gap falls
    # short of 1 by the larger of two such I over H = log 20 (within 1 %, 75 rows a bin).
    worst = scipy.stats.chi2.ppf(1 - 1e-6, 19 * 19) / (2 * len(factors)) / math.log(20)
    assert 1 - 1.01 * worst < found.mig < 1
    # A leaf of 0.5 % of the rows still holds a spread of 0.005 of the range: no other code can win much there.
    assert min(found.disentanglement, found.completeness, found.informativeness) > 0.99


def test_kinds_of_factors_can_be_mixed():
    """Each column of the tables is what it is when all factors are of its kind."""
    factors = torch.cat([_grid()[:, :2], _uniform(1200)[:, :1]], 1)
    codes = _rotated(factors)
    mixed = disentanglement(codes, factors, discrete=(True, True, False))
    classes = disentanglement(codes[:, :2], factors[:, :2])
    ranges = disentanglement(codes, factors, discrete=False)
    torch.testing.assert_close(mixed.information[:2, :2], classes.information, rtol=0, atol=0)
    torch.testing.assert_close(mixed.accuracy[:2, :2], classes.accuracy, rtol=0, atol=0)
    for name in ("information", "accuracy", "importance"):
        torch.testing.assert_close(getattr(mixed, name)[:, 2], getattr(ranges, name)[:, 2], rtol=0, atol=0)


# -- codes that are not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_turned_codes_score_lower(kind):
    """Two of three factors turned by 45 degrees: gaps close for them, by symmetry, and the third stays."""
    factors = _grid() if kind == "discrete" else _uniform()
    straight, turned = (
        disentanglement(codes, factors, discrete=kind == "discrete") for codes in (factors, _rotated(factors))
    )
    for name in ("mig", "sap"):
        # A third of the straight score is left, and what the sample's asymmetry leaves of the gaps of the two.
        assert getattr(turned, name) == pytest.approx(getattr(straight, name) / 3, abs=0.05)
    # Two codes share two factors evenly, by symmetry: 1 - log 2 / log 3 each, and the third is as before.
    shared = (1 + 2 * (1 - math.log(2) / math.log(3))) / 3
    for name in ("disentanglement", "completeness"):
        assert getattr(straight, name) > 0.99
        assert getattr(turned, name) == pytest.approx(shared, abs=0.02)  # shares within 0.1 of a half
    assert straight.informativeness == pytest.approx(turned.informativeness, abs=0.02)


def test_the_gaps_close_as_codes_are_turned():
    factors = _uniform()
    scores = [disentanglement(_rotated(factors, angle), factors, discrete=False) for angle in (0.0, 0.2, 0.4, 0.7)]
    for name in ("mig", "sap", "disentanglement", "completeness"):
        figures = [getattr(score, name) for score in scores]
        assert figures == sorted(figures, reverse=True), name


@pytest.mark.parametrize("seed", range(3))
def test_noise_tells_nothing(seed):
    factors = _grid()
    found = disentanglement(_noise(len(factors), 4, seed), factors, seed=seed)
    # The gap is at most the largest of 12 plug-in informations of independent columns: 2 N I is chi-squared with
    # 19 (classes - 1) degrees of freedom at most; empty cells make it smaller.
    worst = [scipy.stats.chi2.ppf(1 - 1e-6, 19 * (c - 1)) / (2 * len(factors)) / math.log(c) for c in CLASSES]
    assert 0 <= found.mig < np.mean(worst)
    # A class's recall on n = N / classes rows has standard deviation 0.5 / sqrt(n) at most, the balanced accuracy, a
    # mean over classes, no more than 0.5 / sqrt(N); choosing thresholds from data adds about one a threshold (4 at
    # most). Five deviations and four choices bound the gap of two.
    assert 0 <= found.sap < 9 * 0.5 / math.sqrt(len(factors))
    # Leaves of 8 % at most leave a tree 11 splits, each on any of 4 codes: were all trees alike, shares would scatter
    # by p (1 - p) / 11, and 1 - entropy / log 4 would be about (4 - 1) / (2 * 11) / log 4 = 0.1.
    assert 0 <= found.disentanglement < 0.1
    assert 0 <= found.completeness < 0.1
    # Held-out accuracy: chance, 5 standard errors of a mean over 300 rows.
    chance = np.mean([1 / count for count in CLASSES])
    assert abs(found.informativeness - chance) < 5 * 0.5 / math.sqrt(len(factors) // 4)


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_mutual_information(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(7, (500,), generator=generator)
    b = (a + torch.randint(4, (500,), generator=generator)).clamp(max=6)
    assert _mutual_information(a, b) == pytest.approx(mutual_info_score(a, b), abs=1e-12)
    assert _mutual_information(a, a) == pytest.approx(scipy.stats.entropy(a.bincount()), abs=1e-12)


def test_histograms_are_numpys():
    factors = _uniform()[:, :2]
    codes = _noise(len(factors), 3, 0) + factors[:, :1]
    found = disentanglement(codes, factors, discrete=False, bins=12)

    def cells(x):
        return np.digitize(x, np.histogram_bin_edges(x, 12)[1:-1])

    expected = [[mutual_info_score(cells(z), cells(v)) for v in factors.numpy().T] for z in codes.numpy().T]
    torch.testing.assert_close(found.information, torch.tensor(expected), rtol=0, atol=1e-12)


def test_the_gap_is_relative_to_the_factors_entropy():
    """Chen et al. (2018), eq. 6, with scikit-learn's information and scipy's entropy."""
    factors = _grid()[:, :2]
    codes = torch.cat([factors, factors], 1) + 0.7 * _noise(len(factors), 4, 1)
    found = disentanglement(codes, factors)
    binned = [np.digitize(z, np.histogram_bin_edges(z, 20)[1:-1]) for z in codes.numpy().T]
    gaps = []
    for v in factors.numpy().T:
        entropy = scipy.stats.entropy(np.unique(v, return_counts=True)[1])
        second, first = sorted(mutual_info_score(z, v) for z in binned)[-2:]
        gaps.append((first - second) / entropy)
    assert found.mig == pytest.approx(np.mean(gaps), abs=1e-12)


@pytest.mark.parametrize(
    ("importance", "clear", "complete"),
    [
        ([[1, 0], [0, 1]], 1, 1),
        ([[0, 2], [5, 0], [0, 0]], 1, 1),  # an unused code weighs nothing
        ([[1, 1], [1, 1]], 0, 0),
        ([[0, 0], [0, 0]], 0, 0),
        ([[1, 1], [0, 0]], 0, 1),  # one code for both factors
        ([[1, 0], [1, 0], [0, 2]], 1, (1 - math.log(2) / math.log(3) + 1) / 2),
    ],
)
def test_scores_of_importances(importance, clear, complete):
    assert _dci(torch.tensor(importance, dtype=torch.float64)) == pytest.approx((clear, complete), abs=1e-12)


def test_scores_of_importances_by_hand():
    """Eastwood and Williams (2018), section 2, with scipy's entropies in base F and D."""
    table = np.array([[0.75, 0.1], [0.25, 0.3], [0.0, 0.6]])
    rows = [1 - scipy.stats.entropy(row, base=2) for row in table]
    columns = [1 - scipy.stats.entropy(column, base=3) for column in table.T]
    expected = np.average(rows, weights=table.sum(1)), np.mean(columns)
    assert _dci(torch.tensor(table)) == pytest.approx(expected, abs=1e-12)


def test_thresholds_are_judged_by_class():
    """One row in ten is of class 1, and the code is right for four fifths of either class, exactly.

    To call every row 0 is right nine times in ten, but only in half of the classes: the best threshold is the code's.
    """
    rows = torch.arange(1000)
    rare, wrong = rows % 10 == 0, rows // 10 % 5 == 0
    factors = torch.stack([rare, rows >= 500], 1)
    found = disentanglement(torch.stack([rare ^ wrong, rows >= 500], 1), factors)
    assert found.accuracy[0, 0] == pytest.approx(0.8, abs=1e-12)
    # Kept by chance: 100 rows in each half of the data are wrong, so the code tells nothing of the half.
    assert found.accuracy[1].tolist() == pytest.approx([0.5, 1], abs=1e-12)


def test_codes_that_tell_nothing_get_little_importance():
    """Beside codes with noise of their own, three of pure noise: trees that fit the noise would let them share.

    The score is 0.09 with trees grown to the end, 0.30 with leaves of 0.5 % of the rows, 0.66 with 2 %.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(4, (2000, 2), generator=generator).double()
    codes = torch.cat([factors, torch.zeros(2000, 3)], 1) + _noise(2000, 5, 0)
    found = disentanglement(codes, factors)
    assert found.disentanglement > 0.6
    assert found.completeness > 0.5


def test_the_seed_decides():
    factors = _grid()
    codes = _rotated(factors) + 0.5 * _noise(len(factors), 3, 2)
    before = torch.get_rng_state()
    one, again, other = (disentanglement(codes, factors, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert not torch.equal(one.importance, other.importance)
    assert (one.mig, one.sap) == (other.mig, other.sap)  # nothing random in them


def test_order_and_units_of_the_columns_do_not_matter():
    factors = _grid()
    codes = _rotated(factors)
    one = disentanglement(codes, factors)
    other = disentanglement(codes[:, [2, 0, 1]].float() * 4, factors[:, [1, 2, 0]].long())
    assert (one.mig, one.sap) == pytest.approx((other.mig, other.sap), abs=1e-6)
    assert one.disentanglement == pytest.approx(other.disentanglement, abs=0.02)  # ties fall otherwise in the forest


@pytest.mark.parametrize(
    ("codes", "factors", "options", "pattern"),
    [
        (torch.zeros(10), torch.zeros(10, 2), {}, r"`codes` must be \(N, columns\).*got shape \(10,\)"),
        (torch.zeros(10, 1), torch.zeros(10, 2), {}, r"`codes` .*at least two columns.*got shape \(10, 1\)"),
        (torch.zeros(10, 2), torch.zeros(10, 1), {}, r"`factors` .*got shape \(10, 1\)"),
        (_grid(1), _grid(2), {}, "must have the same rows; got 60 and 120"),
        (_grid(2).log(), _grid(2), {}, "`codes` must be finite; column 0"),
        (_grid(2), torch.full((120, 2), math.nan), {}, "`factors` must be finite; column 0"),
        (_grid(2), _grid(2) * torch.tensor([1.0, 0.0, 1.0]), {}, "Factor 1 has one value only"),
        (_grid(2), _grid(2) * torch.tensor([1.0, 0.0, 1.0]), {"discrete": False}, "Factor 1 has one value only"),
        (_grid(1), _grid(1), {}, "Factor 1 has 4 classes, and needs 80 rows.*with 20 bins; got 60"),
        (_uniform(400), _uniform(400), {}, "Factor 0 has 400 classes, and needs 8000 rows.*it is continuous"),
        (_uniform(200), _uniform(200), {"discrete": False}, "Factor 0 has 20 bins in use, and needs 400 rows.*got 200"),
        (_grid(), _grid(), {"discrete": [True]}, "one answer for each of 3 factors; got 1"),
        (_grid(), _grid(), {"bins": 1}, "`bins` must be at least 2; got 1"),
    ],
)
def test_tables_that_cannot_be_scored(codes, factors, options, pattern):
    with pytest.raises(InputError, match=pattern):
        disentanglement(codes, factors, **options)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(InputError, match=r"needs scikit-learn.*pip install 'aevb\[apps\]'"):
        disentanglement(_grid(), _grid())
