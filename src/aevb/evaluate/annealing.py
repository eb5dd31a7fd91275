r"""Annealed importance sampling: log p(x) from below, and for simulated data from above.

Along :math:`0 = b_0 < \dots < b_T = 1` a chain goes from :math:`\pi_0(z)`, p's prior or :math:`q(z | x)`, to p(x, z):

.. math:: \log f_b(z) = \log \pi_0(z) + b\, [\log p(x, z) - \log \pi_0(z)], \quad
    \log w = \sum_{t=1}^T \log f_{b_t}(z_{t-1}) - \log f_{b_{t-1}}(z_{t-1}),

where :math:`z_0 \sim \pi_0` and :math:`z_t` comes from :math:`z_{t-1}` by a transition that leaves :math:`f_{b_t}`
invariant. Then :math:`E[w] = p(x)` (Neal, 2001); backwards from :math:`z_T \sim p(z | x)` it is :math:`1 / p(x)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from aevb._heap import keep_pages
from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import evaluating, prepare, refuse_shared
from aevb.config import InputError
from aevb.evaluate.path import Path, Point, RowNoise, Start, latents_of, row_keys, seed_of

__all__ = ["Annealed", "Bracket", "ais", "bidirectional", "reverse_ais"]


@dataclass(frozen=True, kw_only=True)
class Annealed:
    """Estimate of log p(x) by annealing, a bound in expectation: lower from `ais`, upper from `reverse_ais`."""

    log_prob: Tensor  # (N,) nats
    std_error: Tensor  # (N,) nats, over the chains, delta method; NaN for one chain
    ess: Tensor  # (N,) in [1, chains], of the chains' weights
    acceptance: Tensor  # (N,) in [0, 1], mean over chains and temperatures; NaN for one temperature
    chains: int
    temperatures: int


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """Bounds of log p(x) from both sides, on data that the model itself made."""

    lower: Annealed
    upper: Annealed
    values: dict[str, Tensor]  # the data and their exact latents by node, (N, *event)
    gap: float  # nats, mean over the data of upper - lower; lower is better
    std_error: float  # nats, of the gap, over the data; NaN for one datum


def ais(
    vae: VAE,
    values: Values,
    *,
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 10,
    start: Start = "prior",
    seed: int = 0,
    pack: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Annealed:
    r"""Stochastic lower bound of :math:`\log p(x)` per datum by annealing (Neal, 2001; Wu et al., 2017).

    .. math:: \log \hat p = \log \tfrac{1}{K} \sum_k w_k, \quad E[\hat p] = p(x), \quad E[\log \hat p] \le \log p(x)

    Transitions are Hamiltonian (HMC), each in `leapfrogs` steps whose length is jittered by 20 %. Lengths, one for each
    temperature and datum, are found on a pilot path of 4 chains as those that accept about 65 %, and frozen: the
    counted path has noise of its own. Steps that adapt to the path they are counted on are no transitions that leave
    :math:`f_b` invariant, and would void the bound. The schedule is the sigmoidal one of Wu et al.,
    :math:`b_t \propto \sigma(\delta (2t/T - 1)) - \sigma(-\delta)`, :math:`\delta = 4`.

    A row's noise is keyed by (seed, the row's content, how many rows like it came before): its figure depends neither
    on its company nor on `pack` beyond rounding, which over a long path may tip whether a move is accepted. Densities
    are taken in the model's dtype, and in float32 carry its rounding; weights are summed in float64. Latents with a
    constrained support are moved on the reals, with the Jacobian. Parts that depend on the mode run in evaluation mode.

    Args:
        vae: Generative and inference networks; all that is latent is continuous.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        chains: K, for each datum.
        temperatures: T; at 1 this is importance sampling from :math:`\pi_0`.
        leapfrogs: Passes through the generative network and back, for each transition.
        start: :math:`\pi_0`: "prior", or the "posterior" q(z | x), whose density must be known at any point.
        seed: Key of the noise; torch's own generator is neither used nor moved.
        pack: Most chains times rows held in memory at once; a row's chains stay together.
        progress: Called with the number of rows finished since the last call.

    Returns:
        The estimates, float64; higher is better. The bound tightens with `temperatures` and with `chains`.

    Raises:
        InputError: For values the model cannot take, counts below 1, latent classes or counts, nothing latent, nodes
            that all rows share, or weights that are not numbers (the rows are named).

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> x = torch.ones(3, 5)
        >>> found = ais(vae, {"x": x}, temperatures=20, leapfrogs=5)
        >>> bool(((found.log_prob - aevb.log_marginal(vae, {"x": x}).log_prob).abs() < 0.1).all())
        True
    """
    plan = _Plan(chains, temperatures, leapfrogs, start, seed, pack)
    refuse_shared(vae)
    return _anneal(vae, prepare(vae, values), None, plan, progress)


def reverse_ais(
    vae: VAE,
    values: Values,
    *,
    latents: Collection[str] | None = None,
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 10,
    start: Start = "prior",
    seed: int = 0,
    pack: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Annealed:
    r"""Stochastic upper bound of :math:`\log p(x)` from exact posterior draws (Grosse et al., 2015).

    .. math:: -\log \tfrac{1}{K} \sum_k w_k, \quad \log w = \sum_{t=T}^1 \log f_{b_{t-1}}(z_t) - \log f_{b_t}(z_t),
        \quad E[w] = 1 / p(x)

    The path of `ais` backwards, with the same schedule and steps. Only data drawn from p together with their latents
    have exact posterior draws: `vae.p.sample` gives them. With latents from elsewhere, q say, this is no bound.

    A datum has one exact draw, from which all of its chains start. They first make max(10, T / 10) transitions at
    b = 1: these leave p(z | x) invariant, so that each chain is at an exact draw still, and move the chains apart.
    However far, each weight is unbiased for 1 / p(x), and so is their mean: the bound stays. But what the chains keep
    in common, the mode they are in say, is not in `std_error` and `ess`, which then flatter a datum's figure: give
    means over data, with the standard error over data, whose starts are independent. The step lengths come from a pilot
    that starts at :math:`\pi_0` and does not see the exact draw; if it did, the draw given the steps would be exact no
    more, and the bound void.

    Args:
        vae: As for `ais`.
        values: Every node of p but computed ones, latents included; each `(N, *event)`.
        latents: Which of them are latent; those that q infers if None.
        chains: K, for each datum.
        temperatures: T.
        leapfrogs: As for `ais`.
        start: :math:`\pi_0`, where the path ends, as for `ais`.
        seed: As for `ais`.
        pack: As for `ais`.
        progress: As for `ais`.

    Returns:
        The estimates, float64; above log p(x) in expectation, and lower the more `temperatures`.

    Raises:
        InputError: As `ais`, and for latents that are missing or impossible under p.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> values = vae.p.sample(3)
        >>> upper = reverse_ais(vae, values, temperatures=20, leapfrogs=5).log_prob
        >>> bool(((upper - aevb.log_marginal(vae, {"x": values["x"]}).log_prob).abs() < 0.1).all())
        True
    """
    plan = _Plan(chains, temperatures, leapfrogs, start, seed, pack)
    refuse_shared(vae)
    cast = prepare(vae, values)
    hidden = {node for node in vae.q.nodes if not vae.q.computes(node)} if latents is None else set(latents)
    if lost := sorted(hidden - {node for node in cast if node in vae.p.nodes}):
        raise InputError(
            f"`values` lacks {_names(lost)}: reverse AIS starts from an exact posterior draw of each latent node. "
            "Simulate data with their latents by vae.p.sample, or name other `latents`."
        )
    if gaps := [node for node in hidden if bool(cast[node].isnan().any())]:
        raise InputError(
            f"{_names(gaps)} is latent and has missing values (NaN), but exact draws are whole. Fill them."
        )
    observed = {name: value for name, value in cast.items() if name not in hidden}
    return _anneal(vae, observed, {node: cast[node] for node in hidden}, plan, progress)


def bidirectional(
    vae: VAE,
    rows: int,
    *,
    latents: Collection[str] | None = None,
    given: Values | None = None,
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 10,
    start: Start = "prior",
    seed: int = 0,
    pack: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Bracket:
    r"""How well annealing does on this model: both bounds on data drawn from it (Grosse, Ghahramani and Adams, 2015).

    In expectation the gap between them is at least the error of either. It tells which `chains`, `temperatures` and
    `leapfrogs` give figures to be trusted on real data, as far as these are like the model's own.

    Args:
        vae: As for `ais`.
        rows: Data N to draw from p.
        latents: Nodes to be integrated out; those that q infers if None, the others being data.
        given: Context `(N, *event)` by name, where the model has some.
        chains: As for `ais`.
        temperatures: As for `ais`.
        leapfrogs: As for `ais`.
        start: As for `ais`.
        seed: Key of the data and of the noise.
        pack: As for `ais`.
        progress: Called with the number of rows finished since the last call; each row counts twice.

    Returns:
        Both bounds, the data, and the mean gap with its standard error over the data.

    Raises:
        InputError: As `ais`; and for fewer than one row, or `given` that is not the context.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> found = bidirectional(vae, 10, temperatures=20, leapfrogs=5)
        >>> abs(found.gap) < 0.1, found.values["z"].shape
        (True, torch.Size([10, 2]))
    """
    context = dict(given or {})
    if rows < 1:
        raise InputError(f"`rows` must be at least 1; got {rows}. Give the number of data to simulate.")
    if set(context) != set(vae.given):
        raise InputError(
            f"`given` must give the model's context, {_names(vae.given)}; got {_names(context)}. Nodes of p are drawn "
            "with their latents; a node held fixed would leave these no exact posterior draws."
        )
    plan = _Plan(chains, temperatures, leapfrogs, start, seed, pack)
    refuse_shared(vae)
    with evaluating(vae), torch.random.fork_rng():
        torch.manual_seed(seed_of("data", str(seed).encode()))
        values = vae.p.sample(rows, {name: context[name] for name in vae.p.inputs})
    values = context | {name: value for name, value in values.items() if not vae.p.computes(name)}
    upper = reverse_ais(vae, values, latents=latents, progress=progress, **vars(plan))
    hidden = set(vae.q.nodes) if latents is None else set(latents)
    observed = {name: value for name, value in values.items() if name not in hidden}
    lower = ais(vae, observed, progress=progress, **vars(plan))
    gap = upper.log_prob - lower.log_prob
    error = float(gap.std()) / math.sqrt(rows) if rows > 1 else math.nan
    return Bracket(lower=lower, upper=upper, values=values, gap=float(gap.mean()), std_error=error)


_PILOTS, _TARGET = 4, 0.65
"""Chains of the pilot, and the acceptance that it seeks (Beskos et al., 2013: 0.651 in many dimensions)."""
_JITTER = 0.2
"""Steps vary by this share: trajectories of one length can come back to where they started, and mix nothing."""
_CHUNK = 16
"""Transitions whose noise is drawn at once."""


@dataclass(frozen=True)
class _Plan:
    """Arguments that all three functions take."""

    chains: int
    temperatures: int
    leapfrogs: int
    start: Start
    seed: int
    pack: int

    def __post_init__(self) -> None:
        for name in ("chains", "temperatures", "leapfrogs", "pack"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1; got {getattr(self, name)}. Give a positive number.")
        if self.start not in get_args(Start):
            raise InputError(f"`start` must be one of {', '.join(get_args(Start))}; got {self.start!r}.")

    @property
    def schedule(self) -> list[float]:
        """b_0 = 0 to b_T = 1, close together at both ends (Wu et al., 2017)."""
        raw = [1 / (1 + math.exp(4 - 8 * t / self.temperatures)) for t in range(self.temperatures + 1)]
        return [(b - raw[0]) / (raw[-1] - raw[0]) for b in raw]


def _anneal(
    vae: VAE, observed: Values, exact: Values | None, plan: _Plan, progress: Callable[[int], None] | None
) -> Annealed:
    """Forwards from draws of pi_0, or backwards from `exact` draws, pack by pack."""
    latents = latents_of(vae, observed)
    keep_pages()
    keys, rows, width = row_keys(observed, plan.seed), rows_of(observed), max(1, plan.pack // plan.chains)
    parts: list[tuple[Tensor, Tensor]] = []
    with evaluating(vae):
        for first in range(0, rows, width):
            chunk = slice(first, min(first + width, rows))
            path = Path(vae, {n: v[chunk] for n, v in observed.items()}, latents, plan.start)
            drawn = None if exact is None else {node: value[chunk] for node, value in exact.items()}
            log_w, accepted = _travel(path, drawn, plan, keys[chunk])
            if bool((bad := (log_w.isnan() | (log_w == math.inf)).any(0)).any()):
                named = ", ".join(str(first + int(i)) for i in bad.nonzero()[:10, 0])
                why = "a net returned NaN or infinity there, or a latent was drawn where p has no density"
                raise InputError(
                    f"The weights of rows {named} are not finite numbers: {why}. Look at those rows, and at the "
                    "model's weights for non-finite values."
                )
            parts.append((log_w, accepted))
            if progress is not None:
                progress(chunk.stop - chunk.start)
    log_w, accepted = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    count = plan.chains
    log_mean = log_w.logsumexp(0) - math.log(count)
    ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
    # Var(mean w) / mean(w)^2, the delta method, for the log as for its negative.
    relative = (1 / ess - 1 / count) * count / (count - 1) if count > 1 else torch.full_like(ess, math.nan)
    return Annealed(
        log_prob=log_mean if exact is None else -log_mean,
        std_error=relative.clamp(min=0).sqrt(),
        ess=ess,
        acceptance=accepted,
        chains=count,
        temperatures=plan.temperatures,
    )


def _travel(path: Path, exact: Values | None, plan: _Plan, keys: list[bytes]) -> tuple[Tensor, Tensor]:
    """Log-weights of the chains of some rows, `(K, N)`, and the mean acceptance, `(N,)`; both float64."""
    schedule, last = plan.schedule, plan.temperatures
    stops = list(range(last + 1)) if exact is None else list(range(last, -1, -1))
    # The exact draws stay out of the pilot: given steps that had seen them they would be exact no more.
    steps = _pilot(path, plan, last - (exact is None), keys)
    if exact is None:
        point = path.at(path.begin(plan.chains, keys, "start"))
    else:
        point = path.at(path.to_reals({n: v.expand(plan.chains, *v.shape) for n, v in exact.items()}))
    moves = _moves(point.u, keys, "counted" if exact is None else "reverse")
    if exact is not None:
        for _ in range(max(10, last // 10)):
            point, _ = _transition(path, point, 1.0, steps[last], plan.leapfrogs, next(moves))
    log_w = torch.zeros_like(point.anchor, dtype=torch.float64)
    accepted: list[Tensor] = []
    for now, then in itertools.pairwise(stops):
        log_w += (schedule[then] - schedule[now]) * path.ratio(point)
        if then != stops[-1]:
            point, rate = _transition(path, point, schedule[then], steps[then], plan.leapfrogs, next(moves))
            accepted.append(rate.mean(0))
    return log_w, torch.stack(accepted).mean(0) if accepted else torch.full_like(log_w[0], math.nan)


def _pilot(path: Path, plan: _Plan, last: int, keys: list[bytes]) -> list[Tensor]:
    """Step lengths `(N,)` by t, up to t = `last`, from a path of its own from pi_0."""
    steps = [torch.empty(0)]  # none at t = 0
    if not last:
        return steps
    point = path.at(path.begin(_PILOTS, keys, "pilot start"))
    moves = _moves(point.u, keys, "pilot")
    log_step = torch.full_like(point.anchor[0], math.log(0.5), dtype=torch.float64)
    rounds = max(1, 50 // plan.temperatures)
    for t, b in enumerate(plan.schedule[1 : last + 1]):
        # At the first temperature the scale is not known yet: 20 coarse rounds reach any from e^-13 to e^7.
        for gain in ([] if t else [1.0] * 20 + [0.3] * 10) + [0.3] * rounds:
            point, rate = _transition(path, point, b, log_step.exp(), plan.leapfrogs, next(moves))
            # A chain that began where there is no density cannot move, and tells nothing.
            rate = torch.where(path.height(point, b) > -math.inf, rate, _TARGET)
            log_step = log_step + gain * (rate.mean(0) - _TARGET)
        steps.append(log_step.exp())
    return steps


def _transition(
    path: Path, point: Point, b: float, step: Tensor, leapfrogs: int, move: tuple[Tensor, Tensor]
) -> tuple[Point, Tensor]:
    """One HMC transition that leaves f_b invariant, and the probability with which each chain moves, `(K, N)`."""
    momentum, (accept, jitter) = move
    size = (step * (1 - _JITTER + 2 * _JITTER * jitter)).to(momentum).unsqueeze(-1)
    p, new = momentum + 0.5 * size * path.slope(point, b), point
    for i in range(leapfrogs):
        new = path.at(new.u + size * p)
        p = p + (size if i < leapfrogs - 1 else 0.5 * size) * path.slope(new, b)
    kinetic = 0.5 * (momentum.double().square() - p.double().square()).sum(-1)
    gain = path.height(new, b) - path.height(point, b) + kinetic
    # A trajectory that diverges to NaN, or ends where there is no density, is a rejected move.
    probability = gain.nan_to_num(nan=-math.inf).clamp(max=0).exp()
    moved = accept < probability
    kept = (torch.where(moved if a.ndim == 2 else moved.unsqueeze(-1), a, c) for a, c in zip(new, point, strict=True))
    return Point(*kept), probability


def _moves(u: Tensor, keys: list[bytes], stage: str) -> Iterator[tuple[Tensor, Tensor]]:
    """For each transition momenta `(K, N, D)`, and uniforms `(2, K, N)` to accept by and to vary the step by."""
    noise, (chains, rows, dims) = RowNoise(keys, stage), u.shape
    while True:
        normal = noise.normal(torch.Size([_CHUNK * chains, rows, dims]), u).unflatten(0, (_CHUNK, chains))
        uniform = noise.uniform(torch.Size([_CHUNK * chains, rows, 2]), u).unflatten(0, (_CHUNK, chains))
        yield from zip(normal, uniform.movedim(-1, 1), strict=True)


def _names(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
