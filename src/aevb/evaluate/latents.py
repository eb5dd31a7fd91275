r"""What the latent dimensions carry: rate, distortion, mutual information and the aggregated posterior.

With :math:`q(z) = \frac{1}{N} \sum_n q(z | x_n)` over the rows, the rate splits (Hoffman and Johnson, 2016):

.. math:: \frac{1}{N} \sum_n \mathrm{KL}(q(z | x_n) \| p(z)) = I_q(x; z) + \mathrm{KL}(q(z) \| p(z)), \qquad
    -\text{ELBO} = \text{rate} + \text{distortion}.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributions as td
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import Terms, draw_latents, evaluating, holes_in, prepare, refuse_shared, terms
from aevb.config import InputError
from aevb.distributions import base_of

__all__ = ["ACTIVE_ABOVE", "Information", "active_units", "aggregated", "drawing", "information"]

ACTIVE_ABOVE = 0.01
"""A dimension is active above this, in the square of the node's units by its mean, in nats by its KL."""

_LOG_2PI = math.log(2 * math.pi)
_PAIRS = 32
"""Pairs of a draw and a row, two numbers and a density, that take the place of one draw of the data in a pack."""


@dataclass(frozen=True, kw_only=True)
class Information:
    """Where the information goes, nats a row; None where q's densities or one prior of all rows are not to be had."""

    kl: dict[str, Tensor]  # (D,) mean over rows by dimension; (1,) for a node whose KL does not split
    kl_std_error: dict[str, Tensor]  # as kl; over rows, draws included; NaN for one row
    mean_variance: dict[str, Tensor]  # (*event,) spread over rows of the posterior mean, from `active_units`
    active_by_mean: dict[str, Tensor]  # (*event,) bool: mean_variance above 0.01
    active_by_kl: dict[str, Tensor]  # as kl, bool: above 0.01 nats
    rate: float  # mean KL(q(z | x) || p(z)) of all nodes
    rate_std_error: float  # over rows, like those below
    distortion: float  # mean -E_q log p(x | z)
    distortion_std_error: float
    mutual_information: float | None  # I_q(x; z), at most log rows; of these rows unbiased, of their population low
    mutual_information_std_error: float | None
    mutual_information_upper: float | None  # of the population high: each row is left out of its own mixture
    marginal_kl: float | None  # KL(q(z) || p(z)); of these rows unbiased, of their population high
    marginal_kl_std_error: float | None
    saturated: bool | None  # mutual_information is at least 0.9 log rows: it tells the number of rows
    reason: str | None  # why the figures above are None
    rows: int
    samples: int


def active_units(vae: VAE, values: Values) -> dict[str, Tensor]:
    r"""Spread of each latent dimension's posterior mean over the data, :math:`\operatorname{Var}_x E_q[z_d | x]`.

    A dimension is called active where it exceeds 0.01 (Burda et al., 2016, section 5.2).

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`.

    Returns:
        By latent node, `(*event,)`; in the square of the node's own units.

    Example:
        >>> import aevb, torch
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> active_units(vae, {"x": torch.ones(3, 5)})["z"].round(decimals=6)
        tensor([0., 0.])
    """
    with evaluating(vae):
        return {node: d.mean.var(0, correction=0) for node, d in vae.posterior(prepare(vae, values)).items()}


def information(vae: VAE, values: Values, samples: int = 10, *, seed: int = 0, pack: int = 2048) -> Information:
    r"""KL by dimension, active dimensions, rate and distortion, mutual information and marginal KL.

    .. math:: R = \tfrac{1}{N} \sum_n \mathrm{KL}(q(z | x_n) \| p(z)), \quad
        D = -\tfrac{1}{N} \sum_n E_{q(z | x_n)} \log p(x_n | z), \quad
        \hat I = \tfrac{1}{N K} \sum_{n, k} \log \frac{q(z_{nk} | x_n)}{\frac{1}{N} \sum_j q(z_{nk} | x_j)}

    R and D are those of Alemi et al. (2018); R + D = -ELBO. KLs are closed forms where one is known and exact, else
    means over the draws; by dimension where q and p factorize, and where q is a `FullNormal`, each dimension given
    those before it. A node below another in q has the mean over its parents' draws. Latent classes are drawn, not
    summed over.

    :math:`\hat I` is unbiased for the mutual information between a row's index and z when rows are drawn from these N
    alone. As an estimate for the population that the rows come from it is biased down, and no term of it exceeds log N:
    an encoder that tells all rows apart has log N, whatever it would tell of more of them (`saturated`). With each row
    left out of its own mixture it is biased up instead (Poole et al., 2019): in expectation the
    population's figure lies between the two. KL(q(z) || p(z)), by the same draws, is biased up by what :math:`\hat I`
    is biased down; the two sum to the rate up to Monte Carlo error (Hoffman and Johnson, 2016).

    The aggregated figures take N * N * `samples` densities of q, and as many passes of the nets of nodes that have
    latent parents in q. They are None, with the `reason`, where q knows the density of its own draws only (planar and
    Sylvester flows), or where p's factor of a latent node depends on observed ones, so that the rows share no prior.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws K of the latents per datum.
        seed: Of the draws; torch's own generator is not moved.
        pack: Most draws held in memory at once, or 32 times as many pairs of a draw and a row. A row's draws are held
            together. Which numbers are drawn depends on it, too.

    Returns:
        The figures, float64.

    Raises:
        InputError: For values the model cannot take, `samples` or `pack` below 1, no latent node, one that is latent
            in some rows only, or a figure that is not a number.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> found = information(vae, {"x": torch.eye(5)})
        >>> found.kl["z"].shape, found.mutual_information <= math.log(5)
        (torch.Size([2]), True)
    """
    if samples < 1 or pack < 1:
        raise InputError(f"`samples` and `pack` must be at least 1; got {samples} and {pack}.")
    refuse_shared(vae)
    cast = prepare(vae, values)
    latents = _latents(vae, cast)
    rows, holes = rows_of(cast), holes_in(cast)
    packs: list[_Rows] = []
    with drawing(vae, seed, "information"):
        for start in range(0, rows, width := max(1, pack // samples)):
            given = {name: value[start : start + width] for name, value in cast.items()}
            found = terms(vae, given, samples, holes=holes, discrete="sample")
            packs.append(_figures(vae, found, torch.Size([samples, rows_of(given)])))
        kl = {node: torch.cat([part.kl[node] for part in packs]) for node in latents}
        distortion = torch.cat([part.distortion for part in packs])
        rate = torch.stack([each.sum(-1) for each in kl.values()]).sum(0)
        _check_numbers(rate, distortion)
        points = {node: torch.cat([part.points[node] for part in packs]) for node in latents}
        reason = _why_not(vae, cast, points)
        log_prior = torch.cat([part.log_prior for part in packs])
        shared = _aggregate(vae, cast, points, log_prior, _PAIRS * pack) if reason is None else _NOTHING
    spread = {node: each.double().cpu() for node, each in active_units(vae, values).items()}
    means = {node: each.mean(0) for node, each in kl.items()}
    return Information(
        kl=means,
        kl_std_error={node: _std_error(each) for node, each in kl.items()},
        mean_variance=spread,
        active_by_mean={node: each > ACTIVE_ABOVE for node, each in spread.items()},
        active_by_kl={node: each > ACTIVE_ABOVE for node, each in means.items()},
        rate=float(rate.mean()),
        rate_std_error=float(_std_error(rate)),
        distortion=float(distortion.mean()),
        distortion_std_error=float(_std_error(distortion)),
        mutual_information=shared.mutual_information,
        mutual_information_std_error=shared.mutual_information_std_error,
        mutual_information_upper=shared.mutual_information_upper,
        marginal_kl=shared.marginal_kl,
        marginal_kl_std_error=shared.marginal_kl_std_error,
        saturated=None if shared.mutual_information is None else shared.mutual_information >= 0.9 * math.log(rows),
        reason=reason,
        rows=rows,
        samples=samples,
    )


def aggregated(vae: VAE, values: Values, *, seed: int = 0, pack: int = 2048) -> dict[str, Tensor]:
    r"""Draws of the aggregated posterior :math:`q(z) = \frac{1}{N} \sum_n q(z | x_n)`, one a row, to set beside p(z).

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        seed: Of the draws; torch's own generator is not moved.
        pack: Most rows held in memory at once; which numbers are drawn depends on it, too.

    Returns:
        By latent node, `(N, *event)`; classes as codes `(N,)`. A row that observes the node has its own value.

    Raises:
        InputError: For values the model cannot take, `pack` below 1, or no latent node.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> aggregated(vae, {"x": torch.eye(5)})["z"].shape
        torch.Size([5, 2])
    """
    if pack < 1:
        raise InputError(f"`pack` must be at least 1; got {pack}.")
    refuse_shared(vae)
    cast = prepare(vae, values)
    holes = holes_in(cast)
    latents = _some(vae.latent_rows(cast, holes))
    parts = []
    with drawing(vae, seed, "aggregated"):
        for start in range(0, rows_of(cast), pack):
            given = {name: value[start : start + pack] for name, value in cast.items()}
            known = draw_latents(vae, given, 1, holes, discrete="sample").values
            parts.append({node: known[node][0] for node in latents})
    whole = {node: torch.cat([part[node] for part in parts]) for node in latents}
    return {node: z.argmax(-1) if node in vae.p.classes else z for node, z in whole.items()}


@contextlib.contextmanager
def drawing(vae: VAE, seed: int, purpose: str) -> Iterator[None]:
    """Evaluation with draws of its own: torch's generator, seeded for `purpose` and put back afterwards.

    Data that a user simulated under `torch.manual_seed(seed)` share no noise with them.
    """
    digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    with evaluating(vae), torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        yield


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Figures of some rows."""

    kl: dict[str, Tensor]  # (n, G)
    distortion: Tensor  # (n,)
    points: dict[str, Tensor]  # draws, (n, K, *event)
    log_prior: Tensor  # log p of the latents at them, (n, K)


def _figures(vae: VAE, found: Terms, lead: torch.Size) -> _Rows:
    kl, points, log_prior = {}, {}, torch.zeros(lead, dtype=torch.float64)
    for node in found.latents:
        q, z = found.posterior[node], found.values[node]
        p = vae.p.distribution(node, found.values)
        if node in found.kl:
            groups = found.kl[node]
        elif base_of(q) is not q and base_of(p) is not p:
            groups = (base_of(q).log_prob(z) - base_of(p).log_prob(z)).flatten(2)
        else:
            groups = (found.log_q[node] - found.log_p[node]).expand(lead).unsqueeze(-1)
        kl[node] = groups.expand(*lead, groups.shape[-1]).double().mean(0).cpu()
        points[node] = z.transpose(0, 1)
        log_prior = log_prior + p.log_prob(z).expand(lead).double().cpu()
    distortion = -found.reconstruction.expand(lead).double().mean(0).cpu()
    return _Rows(kl=kl, distortion=distortion, points=points, log_prior=log_prior.T)


def _latents(vae: VAE, cast: Values) -> tuple[str, ...]:
    found = vae.latent_rows(cast, holes_in(cast))
    for node, rows in found.items():
        if rows is not None:
            raise InputError(
                f"`{node}` is latent in {int(rows.sum())} of {len(rows)} rows and observed in the others, and a mean "
                "over both tells of neither. Give the rows of one kind, without the node where it is latent."
            )
    return _some(found)


def _some(latents: dict[str, Tensor | None]) -> tuple[str, ...]:
    if not latents:
        raise InputError("`values` gives every node of p, so nothing is latent. Leave out what q is to infer.")
    return tuple(latents)


def _check_numbers(rate: Tensor, distortion: Tensor) -> None:
    if bool((bad := (rate + distortion).isnan()).any()):
        named = ", ".join(str(int(i)) for i in bad.nonzero()[:10, 0])
        raise InputError(
            f"KL or log p(x | z) is not a number for {int(bad.sum())} of {len(bad)} rows, the first of them {named}: a "
            "net returned NaN or infinity there. Look at those rows, and at the weights for non-finite values."
        )


def _std_error(figures: Tensor) -> Tensor:
    """Of the mean over rows, `(N, *)` to `(*,)`; NaN for one row."""
    rows = len(figures)
    return figures.std(0) / math.sqrt(rows) if rows > 1 else torch.full_like(figures[0], math.nan)


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """The figures that set a row beside all others."""

    mutual_information: float | None = None
    mutual_information_std_error: float | None = None
    mutual_information_upper: float | None = None
    marginal_kl: float | None = None
    marginal_kl_std_error: float | None = None


_NOTHING = _Shared()


def _why_not(vae: VAE, cast: Values, points: dict[str, Tensor]) -> str | None:
    """Why the aggregated posterior has no density here, or no prior to be set beside."""
    for node in points:
        for parent in _sources(vae, node):
            if parent not in points:
                return f"p's factor of `{node}` depends on `{parent}`, which is observed: the rows share no prior."
    try:
        one = {name: value[:1] for name, value in cast.items()}
        _log_q(vae, one, {node: z[0, :1] for node, z in points.items()}, {}, frozenset())
    except (InputError, NotImplementedError) as error:
        return f"q has no density at a given point. {error}".strip()
    return None


def _sources(vae: VAE, node: str) -> Iterator[str]:
    """Nodes and context that p's factor of `node` depends on, through what is computed."""
    for parent in vae.p.parents[node]:
        if parent in vae.p.nodes and vae.p.computes(parent):
            yield from _sources(vae, parent)
        else:
            yield parent


def _aggregate(vae: VAE, cast: Values, points: dict[str, Tensor], log_prior: Tensor, pairs: int) -> _Shared:
    rows, samples = log_prior.shape
    own, others = _densities(vae, cast, {node: z.flatten(0, 1) for node, z in points.items()}, samples, pairs)
    own, others = (each.cpu().reshape(rows, samples) for each in (own, others))
    mixture = torch.logaddexp(own, others) - math.log(rows)
    told, gap = (own - mixture).mean(1), (mixture - log_prior).mean(1)
    upper = own - others + math.log(rows - 1) if rows > 1 else torch.full_like(own, math.inf)
    # The influence of one row's law on I is its own term less I, so that the scatter over rows is the standard error.
    return _Shared(
        mutual_information=float(told.mean()),
        mutual_information_std_error=float(_std_error(told)),
        mutual_information_upper=float(upper.mean()),
        marginal_kl=float(gap.mean()),
        marginal_kl_std_error=float(_std_error(gap)),
    )


def _densities(vae: VAE, cast: Values, points: dict[str, Tensor], samples: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Log q of each of the N * `samples` points under its own row, and the log of the sum under the others."""
    rows = rows_of(cast)
    first_point = next(iter(points.values()))
    total, device = len(first_point), first_point.device
    home = torch.arange(rows, device=device).repeat_interleave(samples)
    own = torch.zeros(total, dtype=torch.float64, device=device)
    others = torch.full_like(own, -math.inf)
    steady = frozenset(node for node in vae.drawing_order(points) if not any(node in vae.below(z) for z in points))
    width = min(rows, math.isqrt(pairs))
    for start in range(0, rows, width):
        known = {name: value[start : start + width] for name, value in cast.items()}
        for node in steady - set(points):
            _find(vae, node, known)
        encoded: dict[str, td.Distribution] = {}
        for first in range(0, total, step := pairs // width):
            here = slice(first, first + step)
            log_q = _log_q(vae, known, {node: z[here] for node, z in points.items()}, encoded, steady)
            column = home[here] - start
            (mine,) = ((column >= 0) & (column < log_q.shape[1])).nonzero(as_tuple=True)
            own[first + mine] = log_q[mine, column[mine]]
            log_q[mine, column[mine]] = -math.inf
            others[here] = torch.logaddexp(others[here], log_q.logsumexp(1))
    return own, others


def _log_q(
    vae: VAE, rows: Values, points: dict[str, Tensor], encoded: dict[str, td.Distribution], steady: frozenset[str]
) -> Tensor:
    """Log q of each point `(S, *event)` under each of the rows, `(S, M)`; q of a steady node is computed once."""
    known = dict(rows) | {node: z.unsqueeze(1) for node, z in points.items()}
    total = torch.zeros((), dtype=torch.float64)
    for node, z in points.items():
        if node not in encoded:
            for parent in vae.q.parents[node]:
                _find(vae, parent, known)
        d = encoded[node] if node in encoded else vae.q.distribution(node, known)
        if node in steady:
            encoded[node] = d
        total = total + _at_pairs(d, z)
    return total.expand(len(z), rows_of(rows)).clone()


def _find(vae: VAE, name: str, known: dict[str, Tensor]) -> None:
    """Put the value of a computed node into `known`, with what it is computed from."""
    if name not in known:
        home = vae.home(name)
        for parent in home.parents[name]:
            _find(vae, parent, known)
        known[name] = home.distribution(name, known).mean


def _at_pairs(d: td.Distribution, z: Tensor) -> Tensor:
    """Log-density of M distributions at each of S points, broadcasts to `(S, M)`, float64."""
    base = base_of(d)
    if type(base) is not td.Normal or len(base.loc.shape) != 2:
        return d.log_prob(z.unsqueeze(1)).double()
    # Matrix products instead of S M D entries: an order of magnitude faster. Their terms cancel, hence float64.
    z, loc, scale = z.double(), base.loc.double(), base.scale.double()
    precision = scale.square().reciprocal()
    constant = -(scale.log() + 0.5 * _LOG_2PI + 0.5 * loc.square() * precision).sum(-1)
    return constant + z @ (loc * precision).mT - 0.5 * (z.square() @ precision.mT)
