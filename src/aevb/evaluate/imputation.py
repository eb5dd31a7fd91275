r"""Missing entries given the observed ones (Mattei and Frellsen, 2019, section 4.3).

With draws :math:`z_l \sim q(z | x_o)` and weights :math:`w_l = p(x_o, z_l) / q(z_l | x_o)`,

.. math:: E[x_m | x_o] \approx \frac{\sum_l w_l\, E_p[x_m | z_l]}{\sum_l w_l},

and a draw from :math:`p(x_m | x_o)` is one from :math:`p(x_m | z_l)`, with l drawn in proportion to w_l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import Terms, holes_in, prepare
from aevb.config import InputError
from aevb.distributions import Mixed, base_of
from aevb.evaluate.stream import Keyed, stream

__all__ = ["Imputation", "impute"]


@dataclass(frozen=True, kw_only=True)
class Imputation:
    """Missing entries filled in, by node; classes as one-hot vectors.

    A category of `Mixed` has no mean: it is filled in with the most probable code, and its spread is the chance that it
    is another.
    """

    mean: dict[str, Tensor]  # (N, *event) observed entries as they are, missing ones at E[x_m | x_o]
    std: dict[str, Tensor]  # (N, *event) of x_m | x_o; 0 where observed
    draws: dict[str, Tensor]  # (M, N, *event) each missing entry drawn from p(x_m | x_o)
    ess: Tensor  # (N,) in [1, samples]: how many draws of z the figures rest on


def impute(
    vae: VAE, values: Values, samples: int = 1000, *, draws: int = 0, seed: int = 0, pack: int = 2048
) -> Imputation:
    r"""Fill in missing entries by importance sampling from q: :math:`E[x_m | x_o]`, its spread, and draws.

    As `samples` grows the mean and the law of the draws converge to those of :math:`p(x_m | x_o)`, whatever q is.

    Args:
        vae: Generative and inference networks; q sees what is missing through `Holes`.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws L of the latents per datum.
        draws: Multiple imputations M; 0 for none.
        seed: Key of the draws; torch's own generator is neither used nor moved.
        pack: As for `log_marginal`.

    Returns:
        The nodes that have holes, filled, in the model's dtype; a datum without holes keeps its values.

    Raises:
        InputError: For values the model cannot take, fewer than one sample, or negative `draws`.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=2, likelihood="bernoulli", latents=1, holes=True))
        >>> found = impute(vae, {"x": torch.tensor([[1.0, float("nan")]])}, draws=5)
        >>> float(found.mean["x"][0, 0]), bool(0 < found.mean["x"][0, 1] < 1), found.draws["x"].shape
        (1.0, True, torch.Size([5, 1, 2]))
    """
    if draws < 0:
        raise InputError(f"`draws` must not be negative; got {draws}. Give the number of imputations, or 0 for none.")
    cast = prepare(vae, values)
    nodes = holes_in(cast)
    columns = stream(
        vae, cast, samples, lambda given, noise: _Imputing(vae, given, nodes, draws, noise),
        look=lambda given, count, made: made.terms(vae, given, count), seed=seed, pack=pack,
    )  # fmt: skip
    found = dict(zip(("ess", *(f"{kind} {node}" for node in nodes for kind in _KINDS)), columns, strict=True))
    mean, std, drawn = ({node: found[f"{kind} {node}"] for node in nodes} for kind in _KINDS)
    return Imputation(
        mean=mean,
        std=std,
        draws={node: value.transpose(0, 1) for node, value in drawn.items()} if draws else {},
        ess=found["ess"],
    )


_KINDS = ("mean", "std", "draws")


class _Imputing:
    """Running moments of the missing entries under the weights, and latents kept in proportion to them."""

    def __init__(
        self, vae: VAE, given: Values, nodes: tuple[str, ...], draws: int, noise: Callable[[int], Keyed]
    ) -> None:
        self.vae, self.given, self.nodes, self.noise = vae, given, nodes, noise
        self.rows, self.seen = rows_of(given), 0
        self.top = torch.full((self.rows,), -math.inf, dtype=torch.float64)
        self.total = torch.zeros(2, self.rows, dtype=torch.float64)  # of w and of w^2
        self.moments: dict[str, Tensor] = {}  # of x and of x^2, (2, N, *event)
        self.states: dict[tuple[str, int], Tensor] = {}  # of a category by node and column, (N, C)
        self.best = torch.full((draws, self.rows), -math.inf, dtype=torch.float64)
        self.kept: dict[str, Tensor] = {}  # latents, (M, N, *event)

    def add(self, found: Terms, count: int) -> None:
        """Take in one pack."""
        by_state = found.log_weights_by_state()
        lead = torch.broadcast_shapes(by_state.shape, (count, self.rows))
        log_w = by_state.expand(lead).flatten(0, -2).double().cpu()  # (S, N): states and draws alike
        top = torch.maximum(self.top, log_w.amax(0))
        base = torch.where(top == -math.inf, 0.0, top)
        w, shrink = (log_w - base).exp(), (self.top - base).exp()
        self.total = self.total * torch.stack([shrink, shrink.square()]) + torch.stack([w.sum(0), w.square().sum(0)])
        for node in self.nodes:
            event = self.given[node].shape[1:]
            flat = (part.expand(lead + event).flatten(0, len(lead) - 2) for part in self._moments(node, found))
            new = torch.stack([torch.einsum("sn,sn...->n...", w, part.double().cpu()) for part in flat])
            self.moments[node] = self.moments.get(node, torch.zeros_like(new)) * _along(shrink, new[0]) + new
            for column, probs in self._states(node, found).items():
                flat_probs = probs.expand(lead + probs.shape[-1:]).flatten(0, len(lead) - 2).double().cpu()
                new = torch.einsum("sn,snc->nc", w, flat_probs)
                before = self.states.get((node, column), torch.zeros_like(new))
                self.states[node, column] = before * shrink.unsqueeze(-1) + new
        self.top = top
        if len(self.best):
            self._choose(found, log_w, lead)
        self.seen += count

    def result(self) -> tuple[Tensor, ...]:
        """ESS; then mean, spread and draws of each node."""
        parts = [self.total[0].square() / self.total[1]]
        drawn = self._draw() if len(self.best) else {}
        for node in self.nodes:
            value = self.given[node]
            missing, known = value.isnan(), value.nan_to_num(0.0)
            mean, square = self.moments[node] / _along(self.total[0], value)
            spread = (square - mean.square()).clamp(min=0).sqrt()
            for (owner, column), total in self.states.items():
                if owner == node:
                    share, mean[:, column] = (total / self.total[0].unsqueeze(-1)).max(1)
                    spread[:, column] = 1 - share
            parts.append(torch.where(missing, mean.to(value), known))
            parts.append(torch.where(missing, spread.to(value), 0.0))
            parts.append(drawn[node].transpose(0, 1) if drawn else value.new_zeros(self.rows, 0))
        return tuple(parts)

    def _moments(self, node: str, found: Terms) -> tuple[Tensor, Tensor]:
        """First and second moment of a node at each draw of the latents."""
        if node in found.latent:  # q infers it, so that the draw itself is a value of it
            value = found.values[node]
            return value, value.square()
        d = self.vae.p.distribution(node, found.values)
        return d.mean, d.variance + d.mean.square()

    def _states(self, node: str, found: Terms) -> dict[int, Tensor]:
        """Probabilities of the categories of a table's columns, by column."""
        if node in found.latent:
            return {}
        base = base_of(self.vae.p.distribution(node, found.values))
        return base.states if isinstance(base, Mixed) else {}

    def _choose(self, found: Terms, log_w: Tensor, lead: torch.Size) -> None:
        """Keep, for each imputation, the latents with the largest log w + Gumbel noise so far."""
        count, depth = lead[-2], log_w.shape[0] // lead[-2]
        shape = torch.Size([count, self.rows, depth, len(self.best)])
        normal = self.noise(self.seen).normal(shape, log_w).permute(3, 2, 0, 1).flatten(1, 2)  # (M, S, N)
        gumbel = -(-torch.special.log_ndtr(normal)).log()
        best, at = (log_w + gumbel).max(1)  # (M, N)
        better = best > self.best
        self.best = torch.where(better, best, self.best)
        for node in found.latent:
            value = found.values[node]
            event = value.shape[value.ndim - self._event(node, found) :]
            flat = value.expand(lead + event).flatten(0, len(lead) - 2)  # (S, N, *event)
            chosen = flat[at.to(flat.device), torch.arange(self.rows, device=flat.device)]
            before = self.kept.get(node, chosen)
            self.kept[node] = torch.where(_along(better.to(flat.device), chosen), chosen, before)

    def _event(self, node: str, found: Terms) -> int:
        return len(found.posterior[node].event_shape)

    def _draw(self) -> dict[str, Tensor]:
        """Missing entries from p(x | z) at the kept latents."""
        known: dict[str, Tensor] = dict(self.given) | self.kept
        known |= self.vae.computed(known, tuple(self.kept))
        drawn = {}
        generator = self.noise(0)
        with torch.random.fork_rng():
            torch.manual_seed(generator.key)
            for node in self.nodes:
                value = self.given[node]
                if node not in self.kept:
                    fresh = self.vae.p.distribution(node, known).sample()
                    fresh = fresh.expand(len(self.best), *value.shape)
                else:
                    fresh = self.kept[node]
                drawn[node] = torch.where(value.isnan(), fresh, value)
        return drawn


def _along(figures: Tensor, value: Tensor) -> Tensor:
    """`figures` of each row with an axis for each further one of `value`."""
    return figures.reshape(figures.shape + (1,) * (value.ndim - figures.ndim))
