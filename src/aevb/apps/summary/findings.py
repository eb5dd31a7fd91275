"""The records of the deeper diagnoses as findings: which figures are told, and what their errors allow to say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aevb.apps.summary.finding import SURE, Finding, figure, mean_and_error, plain, told_from_zero
from aevb.evaluate.annealing import Annealed, Bracket
from aevb.evaluate.calibration import Calibration
from aevb.evaluate.gaps import Gaps
from aevb.evaluate.latents import ACTIVE_ABOVE, Information
from aevb.evaluate.marginal import Rounding
from aevb.evaluate.predictive import PredictiveCheck

__all__ = ["of_annealing", "of_calibration", "of_checks", "of_gaps", "of_information", "of_rounding"]

_NO_ERROR = "One row tells no error, so that nothing is concluded."
_SMALL_TAIL, _WORST, _CURVES = 0.05, 4, 12
"""Tail that is called small; figures named one by one, and drawn; rank curves drawn."""

_JOINT = "log_joint"
"""The statistic of calibration that is no latent dimension."""
_FAMILIES = {"full": "full covariance", "flow": "a flow"}
_REMEDIES = {
    "own": "q refined for each row, or a better encoder",
    "full": "full covariance in q",
    "flow": "a flow as q",
}


def of_annealing(
    importance: Tensor, samples: int, total: int, annealed: Annealed, bracket: Bracket, of: str = "p(x)"
) -> Finding:
    """Importance sampling of some rows, `(N,)` of `total`, beside annealing, and the bracket on simulated rows.

    What is estimated is the log `of` them.
    """
    difference = annealed.log_prob - importance.to(annealed.log_prob)
    (sampled, sampled_error), (lower, lower_error), (off, error) = map(
        mean_and_error, (importance.double(), annealed.log_prob, difference)
    )
    width, simulated = figure(bracket.gap, bracket.std_error), len(bracket.lower.log_prob)
    wide = told_from_zero(bracket.gap, bracket.std_error, simulated)
    told = "" if wide else "; its width is not told from none"
    if not math.isfinite(error):
        verdict = _NO_ERROR
    elif not told_from_zero(off, error, len(difference)):
        verdict = "Both are lower bounds in expectation; these rows do not tell them apart."
    elif off > 0:
        verdict = (
            f"Both are lower bounds in expectation, and annealing is higher by {figure(off, error)} nats: importance "
            f"sampling misses about that much of log {of}, or more."
        )
    else:
        verdict = (
            f"Both are lower bounds in expectation, and importance sampling is higher by {figure(-off, error)} nats: "
            "annealing has not come as far; more --temperatures would bring it closer."
        )
    accepted = float(annealed.acceptance.mean())
    chains = f"{annealed.chains} chains, {annealed.temperatures} temperatures"
    return Finding(
        title="Annealed importance sampling",
        facts=(
            ("rows", f"{len(difference)} of {total}, evenly spaced"),
            ("importance sampling", f"{figure(sampled, sampled_error)} nats ({samples} samples a row)"),
            ("annealing", f"{figure(lower, lower_error)} nats ({chains})"),
            ("difference", f"{figure(off, error)} nats, annealing less importance sampling, row by row"),
            ("two-sided bracket", f"{width} nats wide, rows simulated from the model: {simulated}{told}"),
            *([("moves accepted", f"{accepted:.0%}")] if math.isfinite(accepted) else []),
        ),
        meaning=(
            verdict,
            f"On simulated rows annealing bounds log {of} from both sides, in expectation; on real rows it is a lower "
            "bound only, and the bracket tells of them as far as they are like the model's own.",
        ),
        figures=plain(
            {
                "importance": importance,
                "annealing": annealed.log_prob,
                "difference": [off, error],
                "bracket": [bracket.gap, bracket.std_error],
                "lower": bracket.lower.log_prob,
                "upper": bracket.upper.log_prob,
                "chains": annealed.chains,
                "temperatures": annealed.temperatures,
                "samples": samples,
            }
        ),
    )


def of_rounding(found: Rounding, total: int, *, kept: bool) -> Finding:
    """What matrix products in bfloat16 change of log p, for some rows of `total`; whether all were `kept` to them."""
    if kept:
        verdict = "The change is lost in the errors: all rows were evaluated with them."
    elif not found.row_change:
        verdict = "They have no effect on this machine and model: all rows were evaluated in float32."
    elif not math.isfinite(found.std_error + found.row_error):
        verdict = "The errors are not known, and hide no change: all rows were evaluated in float32."
    else:
        verdict = (
            "The change is not lost in the errors (a tenth of that of the mean, and a row's own): all rows were "
            "evaluated in float32."
        )
    mean, row = (f"{figure:.2g}" for figure in (found.change, found.row_change))
    rows = f"{total}, all" if found.rows == total else f"{found.rows} of {total}, evenly spaced"
    return Finding(
        title="Matrix products in bfloat16",
        facts=(
            ("rows", f"{rows}, same draws in float32 beside"),
            ("change of the mean", f"{mean} nats; sampling error of the mean of all rows {found.std_error:.2g}"),
            ("change of a row", f"{row} nats, root of the mean square; its Monte-Carlo error {found.row_error:.2g}"),
        ),
        meaning=(verdict,),
        figures=plain(vars(found) | {"allowed": found.allowed}),
    )


def of_gaps(found: Gaps, total: int, of: str = "p(x)") -> Finding:
    """Where log p - ELBO, p being that `of`, comes from for some rows of `total`; which remedy would win most of it."""
    gains = {"own": found.amortization} | {name: found.gain(name) for name in found.refined if name != "own"}
    gap, amortization, approximation = (
        mean_and_error(each) for each in (found.log_prob - found.elbo, found.amortization, found.approximation)
    )
    elbo, log_prob = mean_and_error(found.elbo), mean_and_error(found.log_prob)
    won = {name: mean_and_error(each) for name, each in gains.items()}
    short = approximation[0] < 0 and told_from_zero(*approximation, len(found.elbo))
    warning = f" A refined q lies above log {of}: take more --samples or --temperatures." if short else ""
    return Finding(
        title="Inference gaps",
        facts=(
            ("rows", f"{len(found.elbo)} of {total}, evenly spaced"),
            (f"log {of}", f"{figure(*log_prob)} nats, by {found.source}"),
            ("ELBO of q", f"{figure(*elbo)} nats"),
            (f"log {of} - ELBO", f"{figure(*gap)} nats"),
            ("amortization", f"{figure(*amortization)} nats ({_REMEDIES['own']}, could win it)"),
            ("approximation", f"{figure(*approximation)} nats (q's family, at its best for each row)"),
            *(
                (
                    f"gain of {_FAMILIES.get(name, name)}",
                    f"{figure(*each)} nats over q's family, both at their best for each row",
                )
                for name, each in won.items()
                if name != "own"
            ),
        ),
        meaning=(
            _remedy(gains) + warning,
            f"log {of} is the highest of some lower bounds, and refining may stop short: amortization is, in "
            "expectation, at least what is told; the whole gap most likely is, and how the rest splits may err either "
            "way.",
        ),
        figures=plain(
            {
                "log_prob": log_prob,
                "elbo": elbo,
                "gap": gap,
                "amortization": amortization,
                "approximation": approximation,
                "gain": won,
                "above_elbo": {name: mean_and_error(each - found.elbo) for name, each in found.refined.items()},
                "source": found.source,
                "rows": len(found.elbo),
                "samples": found.samples,
                "steps": found.steps,
            }
        ),
    )


def _remedy(gains: Mapping[str, Tensor]) -> str:
    """The remedy that would help most, if its gain is told from none, and whether it is told from the next."""
    won, rows = {name: mean_and_error(each) for name, each in gains.items()}, len(gains["own"])
    helpful = [name for name, (mean, error) in won.items() if mean > 0 and told_from_zero(mean, error, rows)]
    if not all(math.isfinite(error) for _, error in won.values()):
        return _NO_ERROR
    if not helpful:
        return "No remedy's gain is told from none by these rows."
    first, *others = sorted(won, key=lambda name: -won[name][0] if name in helpful else math.inf)
    verdict = f"What would help most: {_REMEDIES.get(first, first)}, by {figure(*won[first])} nats."
    ties = [name for name in others if not told_from_zero(*mean_and_error(gains[first] - gains[name]), rows)]
    tied = " and ".join(_REMEDIES.get(name, name) for name in ties)
    return f"{verdict} These rows do not tell it from {tied}." if ties else verdict


def of_information(found: Information, total: int, aggregate: Mapping[str, Any] | None = None) -> Finding:
    """What the latents carry; `aggregate` holds what the pictures of q(z) beside p(z) need."""
    by_mean, by_kl = (
        f"{sum(int(each.sum()) for each in active.values())} of {sum(each.numel() for each in active.values())}"
        for active in (found.active_by_mean, found.active_by_kl)
    )
    splits = all(len(each) == found.mean_variance[node].numel() for node, each in found.kl.items())
    whole = "" if splits else ", a node as one where its KL does not split by dimension"
    facts = [
        ("rows", f"{found.rows}" + (f" of {total}, evenly spaced" if found.rows < total else "")),
        ("rate", f"{figure(found.rate, found.rate_std_error)} nats, mean KL(q(z|x) || p(z))"),
        ("distortion", f"{figure(found.distortion, found.distortion_std_error)} nats, mean of -log p(x|z) under q"),
        ("active by spread", f"{by_mean} (Var E[z|x] > {ACTIVE_ABOVE})"),
        ("active by KL", f"{by_kl} (KL > {ACTIVE_ABOVE} nats){whole}"),
    ]
    meaning = ["Rate and distortion add up to -ELBO: what a row spends on its latents, and what they leave untold."]
    if found.mutual_information is None or found.marginal_kl is None:
        meaning.append(f"Mutual information and KL(q(z) || p(z)) are not to be had. {found.reason}")
    else:
        information = figure(found.mutual_information, found.mutual_information_std_error)
        upper = found.mutual_information_upper
        facts += [
            (
                "mutual information",
                f"{information} nats, I(x; z), at most log {found.rows} = {math.log(found.rows):.2f}",
            ),
            *([("each row left out", f"{upper:.2f} nats")] if upper is not None and math.isfinite(upper) else []),
            ("KL(q(z) || p(z))", f"{figure(found.marginal_kl, found.marginal_kl_std_error)} nats"),
        ]
        meaning.append(
            "Mutual information is saturated, within a tenth of its most: it tells how many rows there are, not what "
            "z tells of x, and KL(q(z) || p(z)) falls as rows are added."
            if found.saturated
            else "Of the population that the rows come from, mutual information is biased low, with each row left out "
            "high, and KL(q(z) || p(z)) high."
        )
    figures = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return Finding(
        title="What the latents carry",
        facts=tuple(facts),
        meaning=tuple(meaning),
        figures=plain(figures | {"aggregate": aggregate}),
    )


def of_calibration(found: Calibration) -> Finding:
    """Whether q is the posterior on rows drawn from the model, by the ranks of the truth among q's draws."""
    names = [(name, j) for name, each in found.p_value.items() for j in range(len(each))]
    order = sorted(names, key=lambda at: (float(found.p_value[at[0]][at[1]]), -abs(_departure(found, *at)[1])))
    label = {at: "log p(x, z)" if at[0] == _JOINT else f"{at[0]}[{at[1]}]" for at in names}
    rejected = [at for at in order if bool(found.rejected[at[0]][at[1]])]
    ways = Counter(found.direction[name][j] for name, j in rejected if name != _JOINT)
    simulated = f"{found.simulations} rows from the model, ranks among {found.draws} draws of q"
    facts = [
        ("simulations", simulated),
        ("rejected", f"{len(rejected)} of {len(names)} statistics, at level {found.level:g} over all (Holm)"),
        *([("draws of q are", ", ".join(f"{way} ({count})" for way, count in ways.most_common()))] if ways else []),
        *((label[at], _departure_in_words(found, *at)) for at in order[:_WORST]),
    ]
    if found.calibrated:
        verdict = (
            f"Calibrated as far as {found.simulations} simulations can tell: no statistic departs at level "
            f"{found.level:g}. A smaller error may remain."
        )
    else:
        way = f"its draws are mostly {ways.most_common(1)[0][0]}" if ways else "no dimension departs by itself"
        verdict = f"Not calibrated: q is not the model's posterior; {way}."
    return Finding(
        title="Calibration of q",
        facts=tuple(facts),
        meaning=(
            verdict,
            "Judged on rows that the model draws, where the truth is known. The q that training seeks is as a rule too "
            "narrow, so that a departure is no fault of training by itself.",
        ),
        figures=plain(
            {name: getattr(found, name) for name in _CALIBRATION}
            | {
                "curves": [_curve(found, label[at], *at) for at in order[:_CURVES]],
                "band": _band(found.simulations, found.level / len(names)),
                "statistics": len(names),
            }
        ),
    )


_CALIBRATION = "calibrated level simulations draws p_value location spread direction rejected".split()
"""Fields that are kept as they are."""


def _curve(found: Calibration, label: str, name: str, j: int) -> dict[str, Any]:
    """Share of ranks up to r less that of uniform ones, r = 0, ..., draws."""
    counts = torch.bincount(found.ranks[name][:, j], minlength=found.draws + 1).double()
    difference = counts.cumsum(0) / found.simulations - torch.arange(1, found.draws + 2) / (found.draws + 1)
    return {"name": label, "rejected": bool(found.rejected[name][j]), "ecdf_difference": difference}


def _departure(found: Calibration, name: str, j: int) -> tuple[str, float]:
    """The larger of the two z-scores."""
    pairs = ("mean rank", float(found.location[name][j])), ("spread of ranks", float(found.spread[name][j]))
    return max(pairs, key=lambda pair: abs(pair[1]))


def _departure_in_words(found: Calibration, name: str, j: int) -> str:
    what, z = _departure(found, name, j)
    p = float(found.p_value[name][j])
    return f"{found.direction[name][j]}: z-score {z:+.1f} of the {what}, p = " + (f"{p:.1g}" if p else "0 to rounding")


def _band(simulations: int, level: float) -> float:
    """Half-width that the whole curve of uniform ranks exceeds with probability of at most `level` (Massart, 1990)."""
    return math.sqrt(math.log(2 / level) / (2 * simulations))


def of_checks(found: PredictiveCheck, rows: int, columns: Sequence[str] | None = None) -> Finding:
    """Figures of the rows beside those of data sets that the model draws; the smallest tails by name."""
    tails = {name: each.flatten() for name, each in found.tail.items()}
    places = [(n, j) for n, each in tails.items() for j in range(len(each)) if not math.isnan(float(each[j]))]
    z_score = {name: each.flatten() for name, each in found.z_score.items()}
    order = sorted(places, key=lambda at: (float(tails[at[0]][at[1]]), -abs(float(z_score[at[0]][at[1]]))))
    small = Counter(name for name, j in places if float(tails[name][j]) < _SMALL_TAIL)
    count, expected = small.total(), _SMALL_TAIL * len(places)
    share = f"{count} of {len(places)}; of a true model {expected:.1f} or fewer on average"
    worst = [_one_check(found, name, j, columns) for name, j in order[:_WORST]]
    each = Counter(name for name, _ in places)
    whole = {name: f"{small[name]} of {each[name]}" for name in each}
    # Chance alone, were the figures independent; they hang together, so that it is larger.
    chance = SURE * math.sqrt(expected * (1 - _SMALL_TAIL))
    verdict = (
        "More small tails than a true model has on average: a sign that the model misses something of the data."
        if count > expected + chance
        else "No more small tails than chance gives a true model: these figures show no misfit; others may."
    )
    return Finding(
        title="Predictive checks",
        facts=(
            ("replicates", f"{found.replicates} data sets of {rows} rows, drawn from the model"),
            (f"tails below {_SMALL_TAIL}", share),
            ("by statistic", ", ".join(f"{name} {part}" for name, part in whole.items())),
            *((one["name"], one["told"]) for one in worst),
        ),
        meaning=(
            verdict,
            "The figures are all of one data set and hang together, so that their number is an indication, no test; "
            f"with {found.replicates} replicates no tail is below {2 * found.resolution:.2g}. z-scores tell how far "
            "the data lie from the replicates, in the replicates' standard deviations.",
        ),
        figures=plain(
            {
                "observed": found.observed,
                "tail": found.tail,
                "z_score": found.z_score,
                "small": count,
                "figures": len(places),
                "expected": expected,
                "replicates": found.replicates,
                "worst": worst,
            }
        ),
    )


def _one_check(found: PredictiveCheck, name: str, j: int, columns: Sequence[str] | None) -> dict[str, Any]:
    observed = found.observed[name]
    single = observed.ndim == 0
    label = name if single else f"{name}[{j}]"
    if columns is not None and not single and len(observed) == len(columns):
        label = f"{name} of {columns[j]}"
    replicated = found.replicated[name] if single else found.replicated[name][:, j]
    value, z = float(observed if single else observed[j]), float(found.z_score[name].flatten()[j])
    tail = float(found.tail[name].flatten()[j])
    centre, spread = float(replicated.mean()), float(replicated.std(correction=0))
    told = f"{value:.4g}, replicates {centre:.4g} ± {spread:.2g}: z-score {z:+.1f}, tail {tail:.2g}"
    return {"name": label, "observed": value, "replicated": replicated, "z_score": z, "tail": tail, "told": told}
