"""Findings: their words say no more than the errors allow, and they come back from JSON as they went."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import aevb
from aevb.apps.check import linear_vae
from aevb.apps.diagnoses import DIAGNOSES, Subject, check
from aevb.apps.summary import (
    Finding,
    Summary,
    of_annealing,
    of_calibration,
    of_checks,
    of_gaps,
    of_information,
    summarize,
)
from aevb.apps.summary.finding import figure, mean_and_error, plain, told_from_zero
from aevb.evaluate.annealing import Annealed, Bracket
from aevb.evaluate.calibration import simulation_based_calibration
from aevb.evaluate.gaps import Gaps
from aevb.evaluate.latents import information
from aevb.evaluate.predictive import predictive_check


def gaps(amortization, full, flow, rows=100, rest=1.0):
    """Gaps of these means, each with a standard error of 0.011 over a hundred rows."""
    torch.manual_seed(0)
    noise = torch.randn(3, rows, dtype=torch.float64)
    noise = 0.11 * (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True) if rows > 1 else 0 * noise
    elbo = torch.linspace(-20, -10, rows, dtype=torch.float64)
    own = elbo + amortization + noise[0]
    refined = {"own": own, "full": own + full + noise[1], "flow": own + flow + noise[2]}
    none = torch.zeros(rows, dtype=torch.float64)
    return Gaps(
        log_prob=own + rest, log_prob_error=none, source="annealing", elbo=elbo, elbo_error=none, refined=refined,
        refined_error=dict.fromkeys(refined, none), samples=10, steps=5,
    )  # fmt: skip


def tiny():
    torch.manual_seed(0)
    return linear_vae(torch.randn(4, 2), torch.randn(4), 0.8)


def annealed(log_prob):
    return Annealed(
        log_prob=log_prob, std_error=log_prob, ess=log_prob, acceptance=torch.full_like(log_prob, 0.65), chains=16,
        temperatures=7,
    )  # fmt: skip


def beside(difference, rows=50):
    """Annealing beside importance sampling, apart by `difference` with an error of 0.1."""
    torch.manual_seed(0)
    noise = torch.randn(rows, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std() * 0.1 * math.sqrt(rows) if rows > 1 else torch.zeros(1)
    sampled = torch.linspace(-20, -10, rows, dtype=torch.float64)
    side = annealed(sampled)
    bracket = Bracket(lower=side, upper=side, values={}, gap=0.25, std_error=0.0125)
    return of_annealing(sampled, 300, 100, annealed(sampled + difference + noise), bracket)


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (1.0, None, "1.00"),
        (1.0, math.nan, "1.00"),
        (-81.234, 0.456, "-81.23 ± 0.46"),
        (0.00345, 0.0011, "0.0034 ± 0.0011"),
        (12.0, 3.0, "12.00 ± 3.00"),
        (1.0, 0.0, "1.00 ± 0.00"),
        (1.0, 1e-12, "1.00000 ± 0.00000"),
    ],
)
def test_a_figure_has_two_digits_of_its_error(value, error, told):
    assert figure(value, error) == told


def test_what_json_does_not_have_becomes_none():
    found = plain({"a": torch.tensor([1.0, math.nan]), "b": (math.inf, 2, "c", None, True)})
    assert found == {"a": [1.0, None], "b": [None, 2, "c", None, True]}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (0.15, "do not tell them apart"),
        (-0.15, "do not tell them apart"),
        (0.25, "annealing is higher by 0.25 ± 0.10 nats"),
        (-0.25, "importance sampling is higher by 0.25 ± 0.10 nats"),
    ],
)
def test_annealing_and_importance_sampling_are_told_apart_by_two_errors(difference, verdict):
    found = beside(difference)
    assert verdict in found.meaning[0]
    assert ("two-sided bracket", "0.250 ± 0.013 nats wide, rows simulated from the model: 50") in found.facts
    assert "on real rows it is a lower bound only" in found.meaning[1]


@pytest.mark.parametrize("rows", [2, 3, 5, 100])
def test_what_is_told_from_zero_is_so_at_one_level_for_any_number_of_rows(rows):
    """Of 20,000 samples of a mean of zero, 4.55 % are told from it; four standard errors of that share."""
    torch.manual_seed(0)
    share, count = 2 * stats.norm.sf(2), 20_000
    told = sum(told_from_zero(*mean_and_error(each), rows) for each in torch.randn(count, rows, dtype=torch.float64))
    assert abs(told / count - share) < 4 * math.sqrt(share * (1 - share) / count)
    assert not told_from_zero(1.0, math.nan, 1)


def test_one_row_concludes_nothing():
    assert "One row tells no error" in beside(5.0, rows=1).meaning[0]
    assert "One row tells no error" in of_gaps(gaps(1.0, 2.0, 3.0, rows=1), 1).meaning[0]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ((2.0, 0.5, 0.6), "What would help most: q refined for each row, or a better encoder, by 2.000 ± 0.011 nats."),
        ((0.5, 2.0, 0.6), "What would help most: full covariance in q, by 2.000 ± 0.011 nats."),
        ((0.5, 2.0, 2.01), "a flow as q, by 2.010 ± 0.011 nats. These rows do not tell it from full covariance"),
        ((0.01, 0.0, -1.0), "No remedy's gain is told from none"),
    ],
)  # fmt: skip
def test_the_remedy_named_is_the_one_told_from_the_others(given, verdict):
    found = of_gaps(gaps(*given), 200)
    assert verdict in found.meaning[0]
    assert dict(found.facts)["amortization"].startswith(figure(given[0], 0.011))
    assert dict(found.facts)["rows"] == "100 of 200, evenly spaced"
    assert "lies above log p(x)" not in found.meaning[0]


def test_a_refined_q_above_log_prob_is_pointed_out():
    assert "lies above log p(x)" in of_gaps(gaps(2.0, 0.5, 0.6, rest=-1.0), 200).meaning[0]


def test_information_is_saturated_or_biased_and_says_so():
    vae = tiny()
    free = information(vae, {"x": vae.p.sample(400)["x"]})
    assert not free.saturated
    assert "is saturated" in of_information(replace(free, saturated=True), 400).meaning[1]
    found = of_information(free, 800)
    assert "biased low" in found.meaning[1]
    assert dict(found.facts)["rows"] == "400 of 800, evenly spaced"
    assert dict(found.facts)["rate"].startswith(figure(free.rate, free.rate_std_error))
    none = replace(free, mutual_information=None, marginal_kl=None, reason="No density.")
    assert "No density." in of_information(none, 800).meaning[1]


def test_calibration_of_an_exact_and_of_a_narrow_q():
    vae = tiny()
    exact = of_calibration(simulation_based_calibration(vae, 300))
    assert exact.meaning[0].startswith("Calibrated as far as 300 simulations can tell")
    assert exact.figures["calibrated"] is True
    last = vae.q.conditional("z").net.last
    with torch.no_grad():
        last.bias[2:4] -= 2  # the standard deviations, before their softplus
    narrow = of_calibration(simulation_based_calibration(vae, 300))
    assert narrow.meaning[0] == "Not calibrated: q is not the model's posterior; its draws are mostly too narrow."
    curves, band = narrow.figures["curves"], narrow.figures["band"]
    assert max(map(abs, curves[0]["ecdf_difference"])) > band
    assert max(max(map(abs, curve["ecdf_difference"])) for curve in exact.figures["curves"]) < band
    assert all(curve["ecdf_difference"][-1] == pytest.approx(0) for curve in curves)


def test_checks_name_the_smallest_tails():
    vae = tiny()
    torch.manual_seed(1)
    x = vae.p.sample(60)["x"]
    x[:, 2] += 5
    found = of_checks(predictive_check(vae, {"x": x}, replicates=99), 60, ["a", "b", "c", "d"])
    assert found.figures["worst"][0]["name"] == "mean of c"
    assert "tail 0.02" in dict(found.facts)["mean of c"]
    assert "mean 1 of 4" in dict(found.facts)["by statistic"]
    assert found.meaning[0].startswith("No more small tails than chance")  # one of fourteen
    x[:, 1:] += 5
    worse = of_checks(predictive_check(vae, {"x": x}, replicates=99), 60)
    assert worse.meaning[0].startswith("More small tails than a true model has")
    assert found.figures["expected"] == pytest.approx(0.05 * found.figures["figures"])
    assert len(found.figures["worst"]) == 4


def test_summaries_come_back_from_json_and_old_ones_still_load():
    vae = tiny()
    x = vae.p.sample(20)["x"]
    plain_summary = summarize(vae, {"x": x}, aevb.log_marginal(vae, {"x": x}, 50))
    summary = replace(plain_summary, findings={"ais": beside(0.25), "gaps": of_gaps(gaps(1, 2, 3), 200)})
    again = Summary.from_json(json.loads(json.dumps(summary.to_json(), allow_nan=False)))
    assert again == summary
    assert again.lines() == summary.lines()
    assert isinstance(again.findings["ais"], Finding)
    assert summary.lines()[-1] == plain_summary.lines()[-1] == summary.headline
    old = {name: value for name, value in plain_summary.to_json().items() if name not in ("findings", "likelihood")}
    assert Summary.from_json(old).findings == {}
    assert not any(name == "likelihood" for name, _ in Summary.from_json(old).facts())
    del old["computed"]  # when `given` was what is computed alone, and for a while what rows bring stood beside it
    for beside_it, given in (({}, ("library",)), ({"beside": ["batch"]}, ("batch", "library"))):
        found = Summary.from_json(old | {"given": ["library"]} | beside_it)
        assert (found.given, found.computed, found.quantity) == (given, ("library",), f"p(x | {', '.join(given)})")


@pytest.mark.parametrize("holes", [False, True])
def test_bits_per_dimension_are_those_that_code_a_byte(holes):
    """Entries that z tells nothing of: log p is a sum of logs of logistic masses, and so are the bits."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (30, 5)).double()
    x[0] = torch.tensor([0.0, 255, 0, 255, 7])
    if holes:
        x[:10, 2] = math.nan
    config = aevb.ModelConfig(features=5, latents=1, hidden=(4,), likelihood="discretized-logistic", holes=holes)
    vae = aevb.build_vae(config, x).double()
    net = vae.p.conditional("x").net
    last = [module for module in vae.q.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        net.last.weight.zero_()
        last.weight.zero_()  # and q is the posterior, which is the prior
        last.bias.copy_(torch.tensor([0.0, math.log(math.e - 1)]))
    loc = 127.5 * (1 + net.last.bias[:5].detach().numpy())
    scale = 127.5 * math.log(2) + 0.005  # softplus of the bias 0
    above = np.where(x == 255, 1.0, stats.logistic.cdf(x + 0.5, loc, scale))
    bits = -np.log2(above - np.where(x == 0, 0.0, stats.logistic.cdf(x - 0.5, loc, scale)))
    summary = summarize(vae, {"x": x}, aevb.log_marginal(vae, {"x": x}, 30))
    assert summary.bits_per_dim == pytest.approx(np.nanmean(bits), abs=1e-6)
    if not holes:
        assert summary.bits_per_dim == -summary.log_prob / (5 * math.log(2)) == summary.to_json()["bits_per_dim"]
    told = dict(summary.facts())["bits per dimension"]
    error = summary.std_error / (summary.known / 30 * math.log(2))
    assert told.startswith(f"{summary.bits_per_dim:.3f} ± {error:.3f} (-log p(x) / (5 log 2)")
    assert ("of the entries that are known" in told) == holes
    again = Summary.from_json(json.loads(json.dumps(summary.to_json(), allow_nan=False)))
    assert again.lines() == summary.lines()
    other = replace(summary, likelihood="normal")
    assert other.bits_per_dim is other.to_json()["bits_per_dim"] is None
    assert "bits per dimension" not in dict(other.facts())


def subject(vae, x):
    return Subject(
        vae=vae, rows=x, log_prob=aevb.log_marginal(vae, {"x": x}, 50).log_prob, samples=50, few=5, temperatures=3,
        columns=None, seed=0, quiet=True,
    )  # fmt: skip


@pytest.mark.parametrize("prior", ["standard", "mixture"])
def test_each_diagnosis_is_made_and_can_be_stored(prior):
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    vae = aevb.build_vae(aevb.ModelConfig(features=3, latents=2, hidden=(4,), prior=prior, components=3), x)
    for name in ("ais", "information", "checks"):
        json.dumps(vars(DIAGNOSES[name](subject(vae, x))), allow_nan=False)
    kept = DIAGNOSES["information"](subject(vae, x)).figures["aggregate"]
    assert (kept["gaussian"] is not None) == (prior == "standard")
    for each in kept["histograms"]:
        width = each["edges"][1] - each["edges"][0]
        assert sum(each["aggregated"]) * width == pytest.approx(1)
        assert sum(each["prior"]) * width == pytest.approx(1, abs=0.02)


def test_diagnoses_that_cannot_be_are_refused_before_they_start():
    vae, x = tiny(), torch.zeros(3, 4)
    check(vae, x, list(DIAGNOSES), 1, 1)
    for names, few, temperatures, message in (
        (["ais", "gap"], 5, 5, r"knows no `gap`; it knows ais, gaps, information, calibration, checks"),
        (["ais"], 0, 5, r"`--also-rows` must be at least 1; got 0"),
        (["ais"], 5, 0, r"`--temperatures` must be at least 1; got 0"),
    ):
        with pytest.raises(aevb.InputError, match=message):
            check(vae, x, names, few, temperatures)


def test_a_model_without_latents_or_with_classes():
    p = aevb.BayesNet({"y": aevb.Categorical(3), "x | y": aevb.Normal(aevb.MLP(3, [], 2), 2)})
    q = aevb.BayesNet({"y | x": aevb.Categorical(3, aevb.MLP(2, [], 3))})
    x = torch.zeros(4, 2)
    with pytest.raises(aevb.InputError, match=r"`y`"):
        check(aevb.VAE(p, q), x, ["ais"], 5, 5)
    alone = aevb.VAE(aevb.BayesNet({"x": aevb.StandardNormal(2)}), aevb.BayesNet({}))
    check(alone, x, ["checks"], 5, 5)
    with pytest.raises(aevb.InputError, match=r"no latents, so that `information` tells nothing"):
        check(alone, x, ["information"], 5, 5)
