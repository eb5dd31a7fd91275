r"""One pass over both networks: per node log p and log q, or a KL, over (E..., K, N).

E is one axis for each node whose states are summed over, K the draws, N the data. The states of such nodes carry
weights r: q's probabilities, or one-hot where the node is observed. A bound or an estimate reduces these terms:

.. math:: \text{ELBO} = \frac{1}{K} \sum_k \sum_E r\, [\textstyle\sum \log p - \sum \log q], \qquad
    \log w_k = \log \sum_E \exp[\textstyle\sum \log p - \sum_{\text{drawn}} \log q].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributions as td
from torch import Tensor

from aevb._shapes import Values, check_event, rows_of
from aevb.bayesnet import VAE, call_stopped
from aevb.bounds.boundary import holes_in, keeping_buffers
from aevb.config import Discrete, InputError
from aevb.distributions import Noise, closed_kl, count_states, log_prob, relaxed, reparameterize, states

__all__ = ["MAX_STATES", "Draws", "Kl", "Terms", "draw_latents", "terms", "terms_at"]

Kl = Literal["auto", "sampled"]

MAX_STATES = 4096
"""Most joint states of discrete nodes that are summed over; the work of a draw grows in proportion."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a bound, by node; nats. Shapes broadcast to those given."""

    log_p: dict[str, Tensor] = field(default_factory=dict)  # nodes without closed form, (E..., K, N)
    log_q: dict[str, Tensor] = field(default_factory=dict)  # drawn and summed nodes, (E..., K, N); 0 where observed
    kl: dict[str, Tensor] = field(default_factory=dict)  # closed forms, (E..., K, N, G), summed over G
    values: dict[str, Tensor] = field(default_factory=dict)  # observed (N, *event); latent (E..., K, N, *event)
    latent: dict[str, Tensor | None] = field(default_factory=dict)  # rows that leave the node latent (N,); None: all
    posterior: dict[str, td.Distribution] = field(default_factory=dict)  # q of each latent node
    summed: tuple[str, ...] = ()  # nodes whose states are summed over, one axis E each, the last outermost
    log_state: Tensor | None = None  # log r, (E..., K, N)
    log_seen: Tensor | None = None  # 0 for a state that the observed values allow, else -inf, (E..., N)
    scored: dict[str, Tensor] = field(default_factory=dict)  # log q of draws that no gradient passes through, (K, N)

    @property
    def latents(self) -> tuple[str, ...]:
        """Nodes that q infers in some row."""
        return tuple(self.latent)

    @property
    def reconstruction(self) -> Tensor:
        """Log-density of what is observed, `(K, N)`; higher is better."""
        parts = []
        for node, value in self.log_p.items():
            if node not in self.latent:
                parts.append(value)
            elif (rows := self.latent[node]) is not None:
                parts.append(torch.where(rows, 0.0, value))
        return self._mean_over_states(_total(parts)) if parts else torch.zeros(())

    def node_kl(self, node: str) -> Tensor:
        """KL of a latent node, or its log-ratio log q - log p at the draw, by groups of dimensions: `(K, N, G)`."""
        if node in self.kl:
            groups = self.kl[node]
            if self.log_state is None:
                return groups
            return (self.log_state.exp().unsqueeze(-1) * groups).sum(tuple(range(len(self.summed))))
        log_p, rows = self.log_p[node], self.latent[node]
        if rows is not None:
            log_p = torch.where(rows, log_p, 0.0)
        return self._mean_over_states(self.log_q[node] - log_p).unsqueeze(-1)

    def weighted(self, kl_weight: Tensor | float = 1.0) -> Tensor:
        """Reconstruction - weight * KL, broadcasts to `(K, N)`; the integrand of the ELBO at weight 1."""
        if not self.latents:
            return self.reconstruction
        if self.log_state is None:
            return self.reconstruction - kl_weight * _total(self.node_kl(node).sum(-1) for node in self.latents)
        # One sum over the states for all terms together.
        parts = [self._weighted_log_p(node, kl_weight) for node in self.log_p]
        parts += [-kl_weight * value for value in self.log_q.values()]
        parts += [-kl_weight * value.sum(-1) for value in self.kl.values()]
        return self._mean_over_states(_total(parts))

    def log_weights_by_state(self, kl_weight: Tensor | float = 1.0) -> Tensor:
        """Log p - log q of the drawn nodes, -inf where a state is not the observed one, `(E..., K, N)`."""
        assert not self.kl, "weights need every density sampled"
        parts = [self._weighted_log_p(node, kl_weight) for node in self.log_p]
        parts += [-kl_weight * value for node, value in self.log_q.items() if node not in self.summed]
        return _total(parts if self.log_seen is None else [*parts, self.log_seen])

    def log_weights(self, kl_weight: Tensor | float = 1.0) -> Tensor:
        """Log importance weights, summed over the states, broadcasts to `(K, N)`; true ones at weight 1."""
        by_state = self.log_weights_by_state(kl_weight)
        return by_state.logsumexp(tuple(range(len(self.summed)))) if self.summed else by_state

    def _weighted_log_p(self, node: str, kl_weight: Tensor | float) -> Tensor:
        """Log p of a node, weighted in the rows that leave it latent."""
        value = self.log_p[node]
        if node not in self.latent:
            return value
        rows = self.latent[node]
        return kl_weight * value if rows is None else torch.where(rows, kl_weight * value, value)

    def _mean_over_states(self, value: Tensor) -> Tensor:
        if self.log_state is None:
            return value
        # A state of weight zero counts for nothing, even where log p is -inf there.
        kept = torch.where(self.log_state > -math.inf, value, 0.0)
        return (self.log_state.exp() * kept).sum(tuple(range(len(self.summed))))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """One draw of every latent node, before any density of p is looked at."""

    rows: int  # N
    values: dict[str, Tensor]  # every node that is known by now
    drawn: dict[str, Tensor]  # latent nodes as drawn or as states, before observed rows are put in
    posterior: dict[str, td.Distribution]
    log_q: dict[str, Callable[[], Tensor]]
    latent: dict[str, Tensor | None]
    summed: tuple[str, ...]
    sampled: tuple[str, ...]  # discrete nodes that were drawn
    seen: dict[str, Tensor]  # of summed nodes that some rows observe: 0 or -inf, (E..., N)


def terms(
    vae: VAE,
    values: Values,
    samples: int = 1,
    *,
    kl: Kl = "auto",
    holes: Iterable[str] | None = None,
    noise: Callable[[str], Noise] | None = None,
    encoded: dict[str, td.Distribution] | None = None,
    discrete: Discrete = "sum",
    temperature: float = 0.5,
    data_size: int | None = None,
) -> Terms:
    """Draw the latents from q and evaluate both networks there: what every bound and estimate is made of.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name, as `prepare` returns them; each `(N, *event)`, NaN for a missing entry.
        samples: Draws K of the latents per datum.
        kl: "auto" takes the closed form where one is known and exact, "sampled" nowhere.
        holes: Names whose values hold NaN; looked up in the values if None.
        noise: Source of randomness for each node; torch's current generator if None.
        encoded: Kept between calls at the same values: q of nodes that have no drawn parent is computed once.
        discrete: What is done with latent classes and binary vectors: "sum" over their states, exactly, "sample"
            them, or "relax" them (Gumbel-softmax), which makes the result no bound.
        temperature: Of the relaxation.
        data_size: N of the whole data set, of which nodes in `vae.shared` add 1/N of their terms to each datum.

    Returns:
        The terms by node, in nats.

    Raises:
        InputError: If a node can neither be read nor drawn, shapes do not fit, or there are too many states.
    """
    holes = tuple(holes_in(values) if holes is None else holes)
    draws = draw_latents(vae, values, samples, holes, noise, encoded, discrete, temperature)
    return terms_at(vae, draws, kl=kl, holes=holes, data_size=data_size)


def draw_latents(
    vae: VAE,
    values: Values,
    samples: int,
    holes: tuple[str, ...] = (),
    noise: Callable[[str], Noise] | None = None,
    encoded: dict[str, td.Distribution] | None = None,
    discrete: Discrete = "sum",
    temperature: float = 0.5,
) -> Draws:
    """One pass over q: the latent nodes' draws or states, with their log-densities for when they are asked for."""
    rows = rows_of(values)
    draws = Draws(
        rows=rows, values=dict(values), drawn={}, posterior={}, log_q={}, latent=vae.latent_rows(values, holes),
        summed=(), sampled=(), seen={},
    )  # fmt: skip
    known = draws.values
    summed: list[str] = []
    sampled: list[str] = []
    steady = set(values) - set(draws.latent)  # nodes whose value is the same in every call at these values
    total = 1
    for node in vae.drawing_order(draws.latent):
        net = vae.home(node)
        cached = encoded is not None and set(net.parents[node]) <= steady
        d = encoded[node] if cached and encoded is not None and node in encoded else net.distribution(node, known)
        if cached and encoded is not None:
            encoded[node] = d
        if node not in draws.latent:  # computed, not drawn
            known[node] = d.mean
            if set(net.parents[node]) <= steady:
                steady.add(node)
            continue
        draws.posterior[node] = d
        missing = draws.latent[node]
        shape = torch.broadcast_shapes(d.batch_shape, (samples, 1) if node in vae.shared else (samples, rows))
        count = count_states(d)
        if count is not None and discrete == "sum":
            total *= count
            _check_states(node, count, total, summed)
            value = states(d)
            value = value.reshape(count, *(1,) * (len(summed) + 2), *d.event_shape)
            draws.log_q[node] = functools.partial(d.log_prob, value)
            if missing is not None:
                same = value == values[node]
                same = same.flatten(-len(d.event_shape)).all(-1) if d.event_shape else same
                draws.seen[node] = torch.where(missing | same, 0.0, -math.inf)
            summed.append(node)
            steady.add(node)
            draws.drawn[node] = known[node] = value
            continue
        source = noise(node) if noise else None
        if count is not None and discrete == "sample":
            expanded = d.expand(shape)
            value = expanded.sample() if source is None else source.rsample(expanded, shape)
            draws.log_q[node] = functools.partial(d.log_prob, value)
            sampled.append(node)
        else:
            value, draws.log_q[node] = reparameterize(d if count is None else relaxed(d, temperature), shape, source)
        draws.drawn[node] = value
        known[node] = value if missing is None else _blend(value, values[node], missing, d)
    return replace(draws, summed=tuple(summed), sampled=tuple(sampled))


def terms_at(
    vae: VAE,
    draws: Draws,
    *,
    kl: Kl = "auto",
    holes: tuple[str, ...] = (),
    data_size: int | None = None,
    scale: dict[str, Tensor] | None = None,
    stop: bool = False,
) -> Terms:
    """Evaluate both networks at the draws.

    Args:
        vae: Generative and inference networks.
        draws: What `draw_latents` returned.
        kl: As for `terms`.
        holes: Names whose values hold NaN.
        data_size: As for `terms`.
        scale: By drawn node, what the gradient through its draw is multiplied by; the value stays.
        stop: Take q's densities at the draws without a gradient in q's parameters, which then have only that through
            the draws.
    """
    known, drawn = dict(draws.values), dict(draws.drawn)
    for node, factor in (scale or {}).items():
        drawn[node] = _Scaled.apply(drawn[node], factor.detach())
        missing = draws.latent[node]
        known[node] = (
            drawn[node] if missing is None else _blend(drawn[node], draws.values[node], missing, draws.posterior[node])
        )
    if scale:
        with keeping_buffers(vae):
            known |= vae.computed(known, draws.latent)
    inferring = known | vae.computed(known, draws.latent, stop=True) if stop else known
    result = Terms(values=known, latent=draws.latent, posterior=draws.posterior, summed=draws.summed)
    log_state: list[Tensor] = []
    for node in vae.p.nodes:
        if vae.p.computes(node):
            continue
        share = 1.0
        if node in vae.shared:
            share = 1.0 / _size(node, data_size)
        d, value = vae.p.distribution(node, known), known[node]
        if node not in draws.latent:
            check_event(node, value, d.event_shape)
            result.log_p[node] = log_prob(d, value, ~value.isnan() if node in holes else None) * share
            continue
        q, missing = draws.posterior[node], draws.latent[node]
        _check_pair(node, q, d)
        summed = node in draws.summed
        if node in draws.sampled:
            score = draws.log_q[node]()
            result.scored[node] = score if missing is None else torch.where(missing, score, 0.0)
        closed = closed_kl(q, d) if not summed and kl == "auto" and vae.closed_form_is_exact(node) else None
        if closed is not None:
            result.kl[node] = (closed if missing is None else torch.where(missing.unsqueeze(-1), closed, 0.0)) * share
            if missing is not None:
                result.log_p[node] = torch.where(missing, 0.0, log_prob(d, value))
            continue
        if stop and not summed and node not in draws.sampled:
            log_q = call_stopped(vae.q, node, inferring).log_prob(drawn[node])
        else:
            log_q = draws.log_q[node]()
        if missing is not None:
            log_q = torch.where(missing, log_q, 0.0)
        result.log_q[node] = log_q * share
        result.log_p[node] = log_prob(d, value) * share
        if summed:
            seen = draws.seen.get(node)
            log_state.append(log_q if seen is None else log_q + seen)
    if not draws.summed:
        return result
    full = (*(1,) * len(draws.summed), 1, draws.rows)
    weights = _total(log_state).expand(torch.broadcast_shapes(full, *(part.shape for part in log_state)))
    seen_states = _total(draws.seen.values()) if draws.seen else None
    return replace(result, log_state=weights, log_seen=seen_states)


class _Scaled(torch.autograd.Function):
    """The same value, with its gradient multiplied by a factor that has none itself."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


def _blend(drawn: Tensor, observed: Tensor, missing: Tensor, d: td.Distribution) -> Tensor:
    """The draw of `d` in the rows that leave its node latent, in the others what `observed` holds."""
    return torch.where(missing.reshape(-1, *(1,) * len(d.event_shape)), drawn, observed)


def _size(node: str, data_size: int | None) -> int:
    if data_size is None:
        raise InputError(
            f"`{node}` has one value for the whole data set, so a datum's bound holds 1/N of its terms: give N as "
            "`data_size`."
        )
    return data_size


def _check_states(node: str, count: int, total: int, before: list[str]) -> None:
    if total > MAX_STATES:
        names = ", ".join(f"`{name}`" for name in (*before, node))
        raise InputError(
            f"Summing over the states of {names} takes {_short(total)} evaluations a draw, {_short(count)} of them for "
            f"`{node}`; at most {MAX_STATES} are allowed (aevb.bounds.MAX_STATES). Use fewer classes, or "
            'discrete="sample" or "relax".'
        )


def _short(count: int) -> str:
    return str(count) if count < 10**9 else f"about 10^{int(math.log10(count))}"


def _check_pair(node: str, q: td.Distribution, p: td.Distribution) -> None:
    if q.event_shape != p.event_shape:
        raise InputError(
            f"`{node}` has event shape {tuple(q.event_shape)} in q and {tuple(p.event_shape)} in p; they must agree. "
            "Give both conditionals the same dimensions."
        )


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
