r"""Predictive checks: do data that the model draws look like the data it was given, by figures that someone cares for?

With T a figure of a whole data set and :math:`x^{(1)}, \dots, x^{(R)}` data sets of the same size and with the same
holes drawn from the model, T(x) should be an ordinary value among :math:`T(x^{(r)})` (Gelman, Meng and Stern, 1996).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributions as td
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import draw_latents, holes_in, prepare, refuse_shared
from aevb.config import InputError
from aevb.distributions import base_of
from aevb.evaluate.latents import drawing

__all__ = ["DEFAULT_STATISTICS", "PredictiveCheck", "predictive_check"]

Statistic = Callable[[Tensor], Tensor]
"""Data `(N, *event)`, float64 with NaN for holes, classes as codes `(N,)`, to a number or a vector."""

Conditional = Literal["population", "rows"]

_COLUMNS = 64
"""Most columns between which correlations are taken: evenly spaced ones of more."""


@dataclass(frozen=True, kw_only=True)
class PredictiveCheck:
    """Figures of the data beside those of replicated data, by statistic; `()` or `(V,)` each."""

    observed: dict[str, Tensor]
    replicated: dict[str, Tensor]  # (R,) or (R, V)
    tail: dict[str, Tensor]  # two-sided tail probability, from 2 * resolution to 1; near 0: not as the model draws
    z_score: dict[str, Tensor]  # observed less the replicates' mean, in their standard deviations
    resolution: float  # 1 / (R + 1): a one-sided tail is a multiple of it
    replicates: int  # R
    conditional: Conditional  # what was replicated
    node: str


def predictive_check(
    vae: VAE,
    values: Values,
    statistics: Mapping[str, Statistic] | None = None,
    *,
    node: str | None = None,
    replicates: int = 200,
    conditional: Conditional = "population",
    seed: int = 0,
    pack: int = 2048,
) -> PredictiveCheck:
    r"""Compare figures of the data with those of data sets that the model draws (Gelman, Meng and Stern, 1996).

    .. math:: p_- = \frac{1 + \#\{r : T(x^{(r)}) \le T(x)\}}{R + 1}, \quad
        p_+ = \frac{1 + \#\{r : T(x^{(r)}) \ge T(x)\}}{R + 1}, \quad \text{tail} = \min(1, 2 \min(p_-, p_+))

    "population" draws new rows from p(x): the model as a density. On rows that were not trained on, and were the model
    the truth, the tail is uniform (above uniform where values tie): at most a share t of them is below t. "rows" draws
    each row anew from p(x | z), z ~ q(z | x): the likelihood alone, given latents that have seen the very row. There,
    and on training rows in both, the data are used twice, and tails lean to 1: a small one is a defect, a large one is
    no proof of fit. The parameters are held where training left them; with rows enough, what it left to learn shows,
    and a z-score tells better than a tail whether it matters. Many figures are many chances: among V tails of a good
    model the least is about 1 / V.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry, missing in each replicate.
        statistics: By name, functions of the node's data `(N, *event)`, float64 with NaN for holes and classes as codes
            `(N,)`, to a number or a vector. None for those of the likelihood's kind in `DEFAULT_STATISTICS`.
        node: Which observed node is checked; may be left out where there is one.
        replicates: R.
        conditional: "population" or "rows".
        seed: Of the replicates; torch's own generator is not moved.
        pack: Most rows held in memory at once while they are drawn, beside one replicate; which numbers are drawn
            depends on it, too.

    Returns:
        The figures, float64. A figure that is NaN of the data and of all replicates, of a column without data say, has
        a NaN tail.

    Raises:
        InputError: For values the model cannot take, a node that is not observed, counts below 1, or a statistic that
            does not return numbers, the same number of them each time.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> found = predictive_check(vae, {"x": torch.ones(20, 5)}, {"ones": lambda x: x.mean()}, replicates=99)
        >>> round(float(found.tail["ones"]), 2), found.resolution
        (0.02, 0.01)
    """
    if replicates < 1 or pack < 1:
        raise InputError(f"`replicates` and `pack` must be at least 1; got {replicates} and {pack}.")
    if conditional not in get_args(Conditional):
        raise InputError(f"`conditional` must be one of {', '.join(get_args(Conditional))}; got {conditional!r}.")
    refuse_shared(vae)
    cast = prepare(vae, values)
    node = _node(vae, cast, node)
    data = _data(vae, node, cast[node])
    replicated: dict[str, list[Tensor]] = {}
    with drawing(vae, seed, "predictive"):
        functions = _defaults(vae, cast, node) if statistics is None else dict(statistics)
        observed = {name: _figure(name, function, data) for name, function in functions.items()}
        together = max(1, pack // len(data))
        for first in range(0, replicates, together):
            for one in _replicates(vae, cast, node, min(together, replicates - first), conditional, pack):
                held = torch.where(data.isnan(), math.nan, one)
                for name, function in functions.items():
                    replicated.setdefault(name, []).append(_figure(name, function, held, observed[name]))
    stacked = {name: torch.stack(figures) for name, figures in replicated.items()}
    return PredictiveCheck(
        observed=observed,
        replicated=stacked,
        tail={name: _tail(observed[name], stacked[name]) for name in functions},
        z_score={name: _z_score(observed[name], stacked[name]) for name in functions},
        resolution=1 / (replicates + 1),
        replicates=replicates,
        conditional=conditional,
        node=node,
    )


def _node(vae: VAE, cast: Values, node: str | None) -> str:
    observed = [name for name in cast if name in vae.p.nodes]
    if node is None and len(observed) > 1:
        raise InputError(f"`values` gives {', '.join(observed)}: say by `node` which of them is checked.")
    if node is not None and node not in observed:
        raise InputError(f"`node` must be an observed node of p, one of {', '.join(observed)}; got {node!r}.")
    return observed[0] if node is None else node


def _data(vae: VAE, node: str, value: Tensor) -> Tensor:
    """What statistics see: float64, classes as codes."""
    if node not in vae.p.classes:
        return value.double().cpu()
    return torch.where(value.isnan().any(-1), math.nan, value.argmax(-1).double()).cpu()


def _replicates(vae: VAE, cast: Values, node: str, count: int, conditional: Conditional, pack: int) -> Tensor:
    """`count` data sets, `(count, N, *event)`."""
    parts, width = [], max(1, pack // count)
    for start in range(0, rows_of(cast), width):
        given = {name: value[start : start + width] for name, value in cast.items()}
        lead = torch.Size([count, rows_of(given)])
        if conditional == "population":
            context = {name: given[name].expand(count, *given[name].shape).flatten(0, 1) for name in vae.p.inputs}
            drawn = vae.p.sample(lead.numel(), context)[node].unflatten(0, lead)
            parts.append(drawn.double().cpu())
        else:
            known = draw_latents(vae, given, count, holes_in(cast), discrete="sample").values
            drawn = vae.p.distribution(node, known).expand(lead).sample()
            parts.append(torch.stack([_data(vae, node, one) for one in drawn]))
    return torch.cat(parts, 1)


def _figure(name: str, function: Statistic, data: Tensor, like: Tensor | None = None) -> Tensor:
    figure = function(data)
    if not isinstance(figure, Tensor | float | int) or (isinstance(figure, Tensor) and figure.ndim > 1):
        came = f"shape {tuple(figure.shape)}" if isinstance(figure, Tensor) else type(figure).__name__
        raise InputError(f"The statistic `{name}` must return a number or a vector (V,); got {came}. Reduce the rows.")
    found = torch.as_tensor(figure, dtype=torch.float64)
    if like is not None and found.shape != like.shape:
        raise InputError(
            f"The statistic `{name}` returned {tuple(like.shape)} for the data and {tuple(found.shape)} for a "
            "replicate. Make its length depend on the columns alone."
        )
    if bool(found.isinf().any()) or (like is not None and bool((found.isnan() != like.isnan()).any())):
        raise InputError(
            f"The statistic `{name}` is infinite, or NaN for the data and not for a replicate, or the reverse. Leave "
            "out NaN in the data, which marks holes, and guard divisions."
        )
    return found


def _tail(observed: Tensor, replicated: Tensor) -> Tensor:
    total = len(replicated) + 1
    lower = (1 + (replicated <= observed).sum(0)).double() / total
    upper = (1 + (replicated >= observed).sum(0)).double() / total
    return torch.where(observed.isnan(), math.nan, (2 * torch.minimum(lower, upper)).clamp(max=1))


def _z_score(observed: Tensor, replicated: Tensor) -> Tensor:
    """0 where no replicate differs from the data; infinite where they differ from it and not from one another."""
    off = observed - replicated.mean(0)
    same = off.abs() <= 1e-12 * observed.abs()  # beyond rounding
    return torch.where(same, 0.0, off / replicated.std(0, correction=0))


def _defaults(vae: VAE, cast: Values, node: str) -> dict[str, Statistic]:
    """The statistics of the likelihood's kind; those that relate columns, where there are several."""
    if node in vae.p.classes:
        return {"share": functools.partial(_share, vae.p.classes[node])}
    one = {name: value[:1] for name, value in cast.items()}
    d = vae.p.distribution(node, draw_latents(vae, one, 1, holes_in(cast), discrete="sample").values)
    found = DEFAULT_STATISTICS[_kind(d)]
    single = d.event_shape.numel() < 2
    return {name: each for name, each in found.items() if not (single and name in ("row_sum_std", "correlation"))}


def _kind(d: td.Distribution) -> str:
    support = base_of(d).support
    if isinstance(support, td.constraints.independent):
        support = support.base_constraint
    if not support.is_discrete:  # type: ignore[union-attr]
        return "real"
    return "binary" if support is td.constraints.boolean else "count"


def _columns(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _mean(x: Tensor) -> Tensor:
    """Of each column, `(P,)`."""
    return _columns(x).nanmean(0)


def _std(x: Tensor) -> Tensor:
    """Of each column, `(P,)`."""
    table = _columns(x)
    return (table - table.nanmean(0)).square().nanmean(0).sqrt()


def _standardized(x: Tensor) -> Tensor:
    """Columns less their means in their standard deviations, `(N, P)`; 0 in a constant column."""
    table, std = _columns(x), _std(x)
    # The mean of equal numbers is off by rounding, as with seven times 0.1, and their spread is then not zero.
    constant = std <= 1e-12 * table.nanmean(0).abs()
    return torch.where(constant, 0.0 * table, (table - table.nanmean(0)) / std)


def _skewness(x: Tensor) -> Tensor:
    """Mean cube of the standardized column, `(P,)`; 0 for a constant one."""
    return _standardized(x).pow(3).nanmean(0)


def _beyond_3_std(x: Tensor) -> Tensor:
    """Share of all entries that are farther than three standard deviations from their column's mean."""
    z = _standardized(x).flatten()
    return (z[~z.isnan()].abs() > 3).double().mean()


def _zeros(x: Tensor) -> Tensor:
    """Share of zeros in each column, `(P,)`."""
    table = _columns(x)
    return torch.where(table.isnan(), table, (table == 0).double()).nanmean(0)


def _maximum(x: Tensor) -> Tensor:
    """Of each column, `(P,)`."""
    table = _columns(x)
    largest = table.nan_to_num(-math.inf).amax(0)
    return torch.where(largest == -math.inf, math.nan, largest)


def _share(classes: int, codes: Tensor) -> Tensor:
    """Of each class among the known codes `(N,)`, `(C,)`."""
    known = codes[~codes.isnan()].long()
    return torch.bincount(known, minlength=classes) / codes.new_tensor(len(known))


def _row_sum_std(x: Tensor) -> Tensor:
    """Standard deviation over rows of the sum of a row's known entries."""
    return _columns(x).nansum(1).std(correction=0)


def _correlation(x: Tensor) -> Tensor:
    """Root mean square correlation of two columns, over pairs of at most 64 columns, on rows that know both."""
    z = _standardized(x)
    if z.shape[1] > _COLUMNS:
        z = z[:, torch.linspace(0, z.shape[1] - 1, _COLUMNS).long()]
    known = (~z.isnan()).double()
    both = known.T @ known
    r = z.nan_to_num(0.0).T @ z.nan_to_num(0.0) / both.clamp(min=1)
    apart = ~torch.eye(len(r), dtype=torch.bool)
    return r[apart].square().mean().sqrt()


DEFAULT_STATISTICS: dict[str, dict[str, Statistic]] = {
    "real": {
        "mean": _mean,
        "std": _std,
        "skewness": _skewness,
        "beyond_3_std": _beyond_3_std,
        "correlation": _correlation,
    },
    "count": {
        "mean": _mean,
        "std": _std,
        "zeros": _zeros,
        "maximum": _maximum,
        "row_sum_std": _row_sum_std,
        "correlation": _correlation,
    },
    "binary": {"mean": _mean, "row_sum_std": _row_sum_std, "correlation": _correlation},
}
"""By kind of likelihood, name to figure; of a node of classes, the share of each class."""
