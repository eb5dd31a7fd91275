r"""Whether q(z | x) is the posterior, judged where the truth is known: on data that the model itself has drawn.

With :math:`z^*, x \sim p(z, x)` and :math:`z_1, \dots, z_L \sim q(z | x)`, the rank of a scalar function of the truth
among that of the draws is uniform on 0, ..., L if q is the posterior (Talts et al., 2018, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import draw_latents, prepare, refuse_shared
from aevb.config import InputError
from aevb.evaluate.latents import drawing

__all__ = ["Calibration", "simulation_based_calibration"]

Statistic = Callable[[Mapping[str, Tensor]], Tensor]
"""All nodes by name, `(M, *event)` each, classes as codes `(M,)`, to one number for each of them, `(M,)`."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Ranks of the truth among q's draws, and how far they are from uniform; by latent node, then by statistic."""

    ranks: dict[str, Tensor]  # (S, D) in 0..draws: draws below the truth, ties broken at random
    histogram: dict[str, Tensor]  # (D, B) how many ranks fall into each of B bins of nearly equal width
    band: Tensor  # (2, B) within which all B counts of one dimension lie with probability of at least 1 - level
    location: dict[str, Tensor]  # (D,) z-score of the mean rank; above 0: draws too low
    spread: dict[str, Tensor]  # (D,) z-score of the ranks' variance; above 0: draws too narrow
    chi_square: dict[str, Tensor]  # (D,) p-value of the histogram
    p_value: dict[str, Tensor]  # (D,) of the three together, Bonferroni
    rejected: dict[str, Tensor]  # (D,) bool: not uniform, at `level` over all dimensions and statistics (Holm)
    direction: dict[str, tuple[str, ...]]  # D words: what the draws are, or "no departure"
    calibrated: bool  # none is rejected
    level: float  # probability that an exact q is called uncalibrated, at most
    simulations: int
    draws: int


def simulation_based_calibration(
    vae: VAE,
    simulations: int = 1000,
    draws: int = 99,
    *,
    given: Values | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    level: float = 0.01,
    seed: int = 0,
    pack: int = 2048,
) -> Calibration:
    r"""Test whether q is the model's posterior by the ranks of simulated truths among q's draws (Talts et al., 2018).

    .. math:: r = \#\{l : f(z_l) < f(z^*)\}, \quad (z^*, x) \sim p, \quad z_l \sim q(z | x)

    with f each latent dimension, and each of the statistics. For each f three tests of r's uniformity: a chi-square
    over bins, the mean (draws too low or too high) and the variance (too narrow or too wide), their p-values combined
    by Bonferroni, and the verdict over all f by Holm. Where one is rejected, `direction` tells what departs most: the
    draws are "too low", "too high", "too narrow", "too wide", or of "another shape"; for a statistic, its values at
    the draws are.

    Ranks of single dimensions are uniform for q(z | x) = p(z), too, which has learned nothing. The default statistic,
    the joint log-density log p(x, z), depends on the data and catches it (Modrak et al., 2023).

    What passes is no proof: an error smaller than what `simulations` can see remains. What fails is no fault of the
    training: the q of a smallest KL(q || p) is as a rule too narrow. And q is judged on data from p, not on real data,
    where it may be better (it was trained there) or worse (p(x | z) does not fit them).

    Args:
        vae: Generative and inference networks; what q infers is latent, the rest of p is data.
        simulations: S, at least 20; a z-score grows with its square root.
        draws: L for each simulation, at least 2; L + 1 a multiple of 20 gives bins of equal width.
        given: Context, and nodes of p to hold fixed whose parents, if any, are held fixed as well; each
            `(M, *event)`, from whose rows the simulations take turns.
        statistics: By name, functions of all nodes, latent and observed: of a mapping of names to `(R, *event)`,
            classes as codes `(R,)`, to `(R,)`. None for the joint log-density ("log_joint"); {} for none.
        level: Of the verdict, in (0, 1).
        seed: Of the simulations and draws; torch's own generator is not moved.
        pack: Most draws held in memory at once; a simulation's draws are held together. Which numbers are drawn
            depends on it, too.

    Returns:
        Ranks, tests and verdict, float64.

    Raises:
        InputError: For counts or a level out of range, a q that infers nothing, nodes that cannot be held fixed, or a
            statistic that does not return one number a row.

    Example:
        >>> import aevb
        >>> from aevb import BayesNet, DiagonalNormal, MLP, Normal, StandardNormal
        >>> _ = torch.manual_seed(0)
        >>> p = BayesNet({"z": StandardNormal(1), "x | z": Normal(MLP(1, [], 3), 3)})
        >>> found = simulation_based_calibration(aevb.VAE(p, BayesNet({"z | x": DiagonalNormal(MLP(3, [], 2))})))
        >>> found.ranks["z"].shape, found.calibrated
        (torch.Size([1000, 1]), False)
    """
    _check_counts(simulations, draws, level, pack)
    refuse_shared(vae)
    held = _held(vae, given)
    latents = tuple(n for n in vae.q.nodes if n in vae.p.nodes and n not in held and not vae.q.computes(n))
    if not latents:
        raise InputError("q infers no node that is not given, so there is nothing to calibrate. Name fewer in `given`.")
    functions = {"log_joint": _log_joint(vae)} if statistics is None else dict(statistics)
    if clash := [name for name in functions if name in latents]:
        raise InputError(f"`statistics` names `{clash[0]}`, which is a latent node. Give the statistic another name.")
    parts: list[dict[str, Tensor]] = []
    with drawing(vae, seed, "calibration"):
        for start in range(0, simulations, width := max(1, pack // (draws + 1))):
            count = min(width, simulations - start)
            turn = {name: value[torch.arange(start, start + count) % len(value)] for name, value in held.items()}
            parts.append(_ranks(vae, latents, count, draws, turn, functions))
    ranks = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return _judge(ranks, draws, level)


def _check_counts(simulations: int, draws: int, level: float, pack: int) -> None:
    if simulations < 20 or draws < 2 or pack < 1:
        raise InputError(
            f"`simulations` must be at least 20, `draws` at least 2 and `pack` at least 1; got {simulations}, {draws} "
            f"and {pack}. Fewer tell nothing of uniformity."
        )
    if not 0 < level < 1:
        raise InputError(f"`level` must be between 0 and 1; got {level}. Give the probability of a false alarm.")


def _held(vae: VAE, given: Values | None) -> dict[str, Tensor]:
    """What stays fixed, in the model's dtype; raises where the rest would then not be drawn from p given it."""
    reference = next(vae.parameters(), torch.empty(0))
    held = {name: torch.as_tensor(value).to(reference) for name, value in (given or {}).items()}
    if held and not rows_of(held):
        raise InputError("`given` has no rows; give at least one.")
    if strangers := [name for name in held if name not in (*vae.p.nodes, *vae.given)]:
        raise InputError(
            f"`given` names `{strangers[0]}`, which is neither a node of p nor a context. p has the nodes "
            f"{', '.join(vae.p.nodes)}. Rename it, or leave it out."
        )
    for node in held:
        if node in vae.p.nodes and (loose := [name for name in vae.p.parents[node] if name not in held]):
            raise InputError(
                f"`given` fixes `{node}`, but not its parent `{loose[0]}`, whose law given `{node}` p cannot draw "
                "from. Fix the parent, too, or leave the node out."
            )
    if missing := [name for name in vae.given if name not in held]:
        raise InputError(f"The context `{missing[0]}` has no value. Give rows of it in `given`.")
    return held


def _log_joint(vae: VAE) -> Statistic:
    names = {*vae.p.nodes, *vae.p.inputs}

    def log_joint(nodes: Mapping[str, Tensor]) -> Tensor:
        terms = vae.p.log_prob({name: value for name, value in nodes.items() if name in names})
        return torch.stack([value.double() for value in terms.values()]).sum(0)

    return log_joint


def _ranks(
    vae: VAE, latents: tuple[str, ...], count: int, draws: int, held: Values, functions: Mapping[str, Statistic]
) -> dict[str, Tensor]:
    """Ranks of `count` simulations, `(count, D)` by latent node and `(count, 1)` by statistic."""
    reference = next(vae.parameters(), torch.empty(0))
    fixed = {name: value for name, value in held.items() if name in (*vae.p.nodes, *vae.p.inputs)}
    sampled = vae.p.sample(count, fixed)
    truth = {name: value.to(reference) for name, value in (sampled | dict(held)).items() if not vae.computes(name)}
    for name, value in truth.items():
        if name not in held and bool(value.isnan().any()):
            raise InputError(f"p drew values of `{name}` that are not numbers. Look at its net for non-finite weights.")
    cast = prepare(vae, {name: value for name, value in truth.items() if name not in latents})
    known = draw_latents(vae, cast, draws, discrete="sample").values
    drawn = {node: known[node] for node in latents}  # (L, count, *event)
    drawn = {node: z.argmax(-1).to(reference) if node in vae.p.classes else z for node, z in drawn.items()}
    ranks = {node: _rank(truth[node], z).reshape(count, -1) for node, z in drawn.items()}
    flat = {}
    if functions:
        every = {name: value.expand(draws, *value.shape) for name, value in truth.items()} | drawn
        flat = {name: value.flatten(0, 1) for name, value in every.items()}
    for name, function in functions.items():
        one, many = _numbers(name, function, truth, count), _numbers(name, function, flat, draws * count)
        ranks[name] = _rank(one, many.reshape(draws, count)).unsqueeze(-1)
    return ranks


def _rank(truth: Tensor, drawn: Tensor) -> Tensor:
    """Draws `(L, *)` below `truth` `(*)`; among those equal to it, any place is as likely."""
    below, ties = (drawn < truth).sum(0), (drawn == truth).sum(0)
    return below + (torch.rand(truth.shape, dtype=torch.float64, device=truth.device) * (ties + 1)).long()


def _numbers(name: str, function: Statistic, nodes: Mapping[str, Tensor], rows: int) -> Tensor:
    values = function(nodes)
    if not isinstance(values, Tensor) or values.shape != (rows,) or bool(values.isnan().any()):
        came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        came = "NaN" if isinstance(values, Tensor) and values.shape == (rows,) else came
        raise InputError(
            f"The statistic `{name}` must return a tensor ({rows},), one number a row; got {came}. Sum over the axes "
            "that follow the first."
        )
    return values


def _judge(ranks: dict[str, Tensor], draws: int, level: float) -> Calibration:
    simulations = len(next(iter(ranks.values())))
    # A chi-square law holds from about ten expected counts a bin on.
    bins = max(2, min(20, draws + 1, simulations // 10))
    cell = torch.arange(draws + 1) * bins // (draws + 1)
    share = torch.bincount(cell, minlength=bins).double() / (draws + 1)
    histogram = {
        name: torch.stack([torch.bincount(cell[column], minlength=bins) for column in each.T])
        for name, each in ranks.items()
    }
    location = {name: _location(each, draws) for name, each in ranks.items()}
    spread = {name: _spread(each, draws) for name, each in ranks.items()}
    chi_square = {name: _chi_square(counts, simulations * share) for name, counts in histogram.items()}
    p_value = {
        name: (3 * torch.stack([chi_square[name], _tails(location[name]), _tails(spread[name])]).amin(0)).clamp(max=1)
        for name in ranks
    }
    rejected = _holm(p_value, level)
    return Calibration(
        ranks=ranks,
        histogram=histogram,
        band=_band(simulations, share, level),
        location=location,
        spread=spread,
        chi_square=chi_square,
        p_value=p_value,
        rejected=rejected,
        direction={name: _direction(location[name], spread[name], rejected[name]) for name in ranks},
        calibrated=not any(bool(each.any()) for each in rejected.values()),
        level=level,
        simulations=simulations,
        draws=draws,
    )


def _location(ranks: Tensor, draws: int) -> Tensor:
    """Mean rank less that of a uniform one, in its standard errors, `(S, D)` to `(D,)`."""
    variance = draws * (draws + 2) / 12
    return (ranks.double().mean(0) - draws / 2) * math.sqrt(len(ranks) / variance)


def _spread(ranks: Tensor, draws: int) -> Tensor:
    """The ranks' variance less that of a uniform one, in its standard errors, `(S, D)` to `(D,)`.

    About the ranks' own mean: about the middle of their range, a shift would pass for narrowness.
    """
    count, places = len(ranks), draws + 1
    variance = (places**2 - 1) / 12
    fourth = (places**2 - 1) * (3 * places**2 - 7) / 240
    error = math.sqrt((fourth - variance**2 * (count - 3) / (count - 1)) / count)
    return (ranks.double().var(0) - variance) / error


def _chi_square(counts: Tensor, expected: Tensor) -> Tensor:
    """P-value of each row of `counts` `(D, B)`."""
    statistic = ((counts - expected).square() / expected).sum(-1)
    half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    p_value: Tensor = torch.special.gammaincc(half, statistic / 2)
    return p_value


def _tails(z: Tensor) -> Tensor:
    """Two-sided p-value of a standard normal."""
    p_value: Tensor = torch.special.erfc(z.abs() / math.sqrt(2))
    return p_value


def _holm(p_value: dict[str, Tensor], level: float) -> dict[str, Tensor]:
    """Which are rejected, so that a false rejection among all of them has probability of at most `level`."""
    sizes = [len(each) for each in p_value.values()]
    joined = torch.cat(list(p_value.values()))
    order = joined.argsort()
    small = joined[order] * torch.arange(len(joined), 0, -1) <= level
    rejected = torch.zeros(len(joined), dtype=torch.bool)
    rejected[order] = small.long().cumprod(0).bool()
    return dict(zip(p_value, rejected.split(sizes), strict=True))


def _direction(location: Tensor, spread: Tensor, rejected: Tensor) -> tuple[str, ...]:
    """In words, the larger of the two departures: a shift narrows the ranks' spread as well."""
    words = []
    for shift, width, out in zip(location.tolist(), spread.tolist(), rejected.tolist(), strict=True):
        if not out:
            words.append("no departure")
        elif max(abs(shift), abs(width)) < 3:
            words.append("another shape")
        elif abs(shift) >= abs(width):
            words.append("too low" if shift > 0 else "too high")
        else:
            words.append("too narrow" if width > 0 else "too wide")
    return tuple(words)


def _band(simulations: int, share: Tensor, level: float) -> Tensor:
    """Least and largest count `(2, B)` of each bin: binomial quantiles, level / B outside of each."""
    k = torch.arange(simulations + 1, dtype=torch.float64)
    n = torch.tensor(float(simulations), dtype=torch.float64)
    log_mass = (
        torch.lgamma(n + 1)
        - torch.lgamma(k + 1)
        - torch.lgamma(n - k + 1)
        + k * share.log().unsqueeze(-1)
        + (n - k) * (-share).log1p().unsqueeze(-1)
    )
    below = log_mass.exp().cumsum(-1)  # (B, S + 1)
    tail = level / len(share) / 2
    lower, upper = ((below <= tail).sum(-1), (below < 1 - tail).sum(-1))
    return torch.stack([lower, upper])
