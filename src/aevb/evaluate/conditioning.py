r"""Rows that a model draws under conditions on some of their entries, by importance resampling.

What the conditioned entries depend on is drawn from p, weighted by the probability of the conditions, and picked in
proportion to the weights; all else is then drawn given what was picked:

.. math:: z_l \sim p(z), \quad w_l = p(C | z_l), \quad P(\text{pick } l) = w_l / \textstyle\sum_k w_k, \quad
    x \sim p(x | z_l, C)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import evaluating
from aevb.config import InputError
from aevb.distributions import Codes, OneHot, base_of, between
from aevb.evaluate.pareto import pareto_k

__all__ = ["Conditioned", "sample_given"]


@dataclass(frozen=True, kw_only=True)
class Conditioned:
    """Rows under conditions, and how far they are to be trusted."""

    values: dict[str, Tensor]  # (N, *event) all nodes by name, as `BayesNet.sample` draws them
    log_prob: float  # nats, of the conditions; a log-density where a continuous entry is fixed
    std_error: float  # nats, delta method
    ess: float  # in [1, samples]: how many draws the rows rest on
    pareto_k: float  # above 0.7 the figures are not to be trusted
    samples: int  # drawn


@torch.no_grad()
def sample_given(
    vae: VAE, rows: int, conditions: Mapping[str, Tensor], samples: int = 100_000, *, seed: int = 0, pack: int = 8192
) -> Conditioned:
    r"""Draw rows from :math:`p(x, z | C)`, C being bounds on some entries, :math:`l_j \le x_j \le h_j`.

    Equal bounds fix an entry: its weight is its likelihood. Others weigh as the probability between them, where the
    family has it in closed form; elsewhere the entry is drawn, and weighs 1 inside and 0 outside. The rows converge to
    draws from :math:`p(x, z | C)` as `samples` grows; q plays no part.

    Args:
        vae: The model; p has no context.
        rows: Rows N to draw.
        conditions: By node, lowest and highest value of each entry, `(2, *event)`, -inf and inf where there is none;
            of a node of classes those of its code, `(2,)`.
        samples: Draws L from p, of which the rows are picked with replacement. All are kept in memory.
        seed: Key of the draws; torch's own generator is neither used nor moved.
        pack: Draws that are weighted at once.

    Returns:
        The rows, and the ESS and Pareto k-hat of the weights: rows more than the ESS share their latents.

    Raises:
        InputError: For a node that p does not draw or whose entries depend on each other given its parents, bounds that
            contradict each other, or conditions that none of the draws meets.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=2, likelihood="poisson", latents=1))
        >>> found = sample_given(vae, 5, {"x": torch.tensor([[3.0, 0.0], [3.0, math.inf]])}, samples=1000)
        >>> found.values["x"][:, 0]
        tensor([3., 3., 3., 3., 3.])
    """
    for name, count in (("rows", rows), ("samples", samples), ("pack", pack)):
        if count < 1:
            raise InputError(f"`{name}` must be at least 1; got {count}. Give a positive whole number.")
    p, here = vae.p, next(itertools.chain(vae.parameters(), vae.buffers()), torch.empty(0)).device
    bounds = {node: pair.to(here) for node, pair in _bounds(p, conditions).items()}
    first = _ancestors(p, bounds)
    kept: dict[str, list[Tensor]] = {node: [] for node in first}
    weights = []
    with evaluating(vae), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, samples, pack):
            drawn, log_weight = _weighted(p, first, bounds, min(pack, samples - start))
            weights.append(log_weight)
            for node in first:
                kept[node].append(drawn[node])
        log_w = torch.cat(weights)
        picked = _picked(log_w, rows)
        values = {node: torch.cat(parts)[picked] for node, parts in kept.items()}
        values = _completed(p, values, bounds, rows)
    total = log_w.logsumexp(0)
    ess = float((2 * total - (2 * log_w).logsumexp(0)).exp())
    tail = log_w.topk(min(samples // 5, math.ceil(3 * math.sqrt(samples))) + 1).values.unsqueeze(1)
    return Conditioned(
        values=values,
        log_prob=float(total) - math.log(samples),
        std_error=math.sqrt(max(0.0, (1 / ess - 1 / samples) * samples / (samples - 1))) if samples > 1 else math.nan,
        ess=ess,
        pareto_k=float(pareto_k(tail[:-1], tail[-1])),
        samples=samples,
    )


def _bounds(p: BayesNet, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The conditions in float64, checked as far as that goes without a draw."""
    if p.inputs:
        raise InputError(
            f"p conditions on {', '.join(map(repr, p.inputs))}, which have no distribution. Give them to "
            "`vae.p.sample(rows, values)`, and the conditions as rows to choose from."
        )
    found = {}
    for node, value in conditions.items():
        if node not in p.nodes or p.computes(node):
            named = ", ".join(f"`{each}`" for each in p.nodes if not p.computes(each))
            raise InputError(f"`conditions` gives `{node}`, but p draws {named}. Condition on one of them.")
        pair = torch.as_tensor(value).double()
        if pair.shape[:1] != (2,) or bool(pair.isnan().any()):
            raise InputError(
                f"`conditions` of `{node}` must be (2, *event), lowest and highest values without NaN; got shape "
                f"{tuple(pair.shape)}. Use -inf and inf where there is no bound."
            )
        if bool((crossed := pair[0] > pair[1]).any()):
            entry = tuple(crossed.nonzero()[0].tolist())
            raise InputError(
                f"`conditions` of `{node}` contradict each other: entry {list(entry)} would be above "
                f"{pair[0][entry]:g} and below {pair[1][entry]:g}. Drop one of the two."
            )
        found[node] = pair
    return found


def _ancestors(p: BayesNet, nodes: Mapping[str, Tensor]) -> list[str]:
    """Conditioned nodes and what they depend on, parents first."""
    needed = set(nodes)
    for node in reversed(p.nodes):
        if node in needed:
            needed |= set(p.parents[node])
    return [node for node in p.nodes if node in needed]


def _above(p: BayesNet, node: str, bounds: Mapping[str, Tensor]) -> bool:
    """Whether the conditions on other nodes depend on `node`."""
    return any(node in _ancestors(p, {other: bounds[other]}) for other in bounds if other != node)


def _weighted(p: BayesNet, first: list[str], bounds: dict[str, Tensor], count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of what the conditions depend on, conditioned entries inside them, and log-weights `(count,)`."""
    drawn: dict[str, Tensor] = {}
    log_weight = torch.zeros(count, dtype=torch.float64)
    for node in first:
        d = _expanded(p.distribution(node, drawn), count)
        if node in bounds:
            each, drawn[node] = _held(node, d, bounds[node])
            log_weight = log_weight + each.cpu()
        else:
            drawn[node] = d.mean if p.computes(node) else d.sample()
    return drawn, log_weight


def _expanded(d: td.Distribution, count: int) -> td.Distribution:
    return d if d.batch_shape == (count,) else d.expand(torch.Size([count]))


def _held(node: str, d: td.Distribution, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights `(count,)` and values `(count, *event)` of a node whose entries have bounds."""
    classes = isinstance(d, OneHot)
    family = Codes(d.logits) if isinstance(d, OneHot) else base_of(d)
    event = torch.Size([]) if classes else d.event_shape
    if family is d and event:
        raise InputError(
            f"`{node}` has a {type(d).__name__} distribution, which does not factorize over its entries. Condition on "
            "another node, or use a factorized likelihood."
        )
    if bounds.shape[1:] != event:
        raise InputError(
            f"`conditions` of `{node}` must be {(2, *event)}, lowest and highest values; got shape "
            f"{tuple(bounds.shape)}. Give both for every entry."
        )
    log_weight, value = between(family, *bounds)
    if isinstance(d, OneHot):
        value = F.one_hot(value.long(), d.event_shape[0]).to(d.logits)
    return log_weight.flatten(1).sum(1) if event else log_weight, value


def _picked(log_w: Tensor, rows: int) -> Tensor:
    """Indices `(rows,)` in proportion to the weights, by one uniform draw for all (systematic), shuffled."""
    top = log_w.max()
    if float(top) == -math.inf:
        raise InputError(
            f"None of {len(log_w)} draws of the model meets the conditions: they are contradictory or too rare. Give "
            "fewer or wider ones, or more `samples`."
        )
    share = (log_w - top).exp().cumsum(0)
    at = (torch.rand(1, dtype=torch.float64) + torch.arange(rows)) / rows * share[-1]
    picked = torch.searchsorted(share, at, right=True).clamp(max=int((log_w > -math.inf).nonzero()[-1]))
    return picked[torch.randperm(rows)]


def _completed(p: BayesNet, known: dict[str, Tensor], bounds: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """All nodes: those that were picked, and the others; entries that no condition depends on are drawn anew."""
    values: dict[str, Tensor] = {}
    for node in p.nodes:
        if node in known and (node not in bounds or node in p.classes or _above(p, node, bounds)):
            values[node] = known[node]
            continue
        d = _expanded(p.distribution(node, values), rows)
        values[node] = d.mean if p.computes(node) else d.sample()
        if node in bounds:
            values[node] = torch.where(torch.isinf(bounds[node]).all(0), values[node], known[node])
    return values | {node: values[node].argmax(-1) for node in p.classes}
