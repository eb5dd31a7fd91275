r"""How surprising each entry of a row is given the others, :math:`-\log p(x_j | x_{-j})`.

With draws :math:`z_l \sim q(z | x)` and weights :math:`w_l = p(x, z_l) / q(z_l | x)`, both marginals come from the same
ones, since entries are independent given z:

.. math:: p(x) \approx \frac{1}{L} \sum_l w_l, \quad p(x_{-j}) \approx \frac{1}{L} \sum_l \frac{w_l}{p(x_j | z_l)}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import Terms, prepare
from aevb.config import InputError
from aevb.distributions import base_of, entries_log_prob
from aevb.evaluate.stream import stream

__all__ = ["Surprisal", "surprisal"]


@dataclass(frozen=True, kw_only=True)
class Surprisal:
    """Estimates of -log p(x_j | the other observed entries), with their Monte Carlo errors."""

    nll: Tensor  # (N, P) nats, higher is more surprising; NaN where x_j is missing
    std_error: Tensor  # (N, P) nats, delta method
    ess: Tensor  # (N, P) in [1, samples]: how many draws the marginal without x_j rests on
    samples: int  # drawn for each datum


def surprisal(
    vae: VAE,
    values: Values,
    samples: int = 1000,
    *,
    node: str = "x",
    seed: int = 0,
    pack: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Surprisal:
    r"""Estimate :math:`-\log p(x_j | x_{-j})` for each entry of a node, by two marginals from the same draws of q.

    .. math:: -\log p(x_j | x_{-j}) \approx \log \sum_l v_{lj} - \log \sum_l w_l, \quad v_{lj} = w_l / p(x_j | z_l),

    .. math:: \text{SE}^2 \approx
        \frac{L}{L - 1} \sum_l \Big(\frac{w_l}{\sum_k w_k} - \frac{v_{lj}}{\sum_k v_{kj}}\Big)^2

    What the two have in common cancels, in the estimate as in its error. The density of a continuous entry depends on
    its units; compare rows within a column rather than columns with one another.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws L of the latents per datum; at least 2.
        node: The node, `(N, P)`, whose entries are independent given its parents.
        seed: Key of the draws; torch's own generator is neither used nor moved.
        pack: As for `log_marginal`.
        progress: Called with the number of rows finished since the last call.

    Returns:
        The estimates, float64.

    Raises:
        InputError: For values the model cannot take, a node whose entries do not factorize, or fewer than two samples.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=3, likelihood="bernoulli", latents=2))
        >>> surprisal(vae, {"x": torch.ones(2, 3)}, samples=100).nll.shape
        torch.Size([2, 3])
    """
    if samples < 2:
        raise InputError(f"`samples` must be at least 2; got {samples}: one draw tells nothing of its spread.")
    cast = prepare(vae, values)
    if node not in cast or cast[node].ndim != 2 or node in vae.p.classes:
        raise InputError(f"`node` must be an observed node of shape (N, P) in `values`; got {node!r}. Name such a one.")
    nll, std_error, ess = stream(
        vae, cast, samples, lambda given, _: _Ratios(vae, given, node, samples),
        look=lambda given, count, made: made.terms(vae, given, count), seed=seed, pack=pack, progress=progress,
    )  # fmt: skip
    return Surprisal(nll=nll, std_error=std_error, ess=ess, samples=samples)


class _Ratios:
    """Running sums of both kinds of weights, their squares and products, each relative to the largest so far."""

    def __init__(self, vae: VAE, given: Values, node: str, samples: int) -> None:
        self.vae, self.node, self.value, self.samples = vae, node, given[node], samples
        rows, columns = rows_of(given), given[node].shape[1]
        self.known = ~given[node].isnan()
        # Column P is that of the full marginal, whose weights are w themselves.
        self.top = torch.full((rows, columns + 1), -math.inf, dtype=torch.float64)
        self.sums = torch.zeros(3, rows, columns + 1, dtype=torch.float64)  # of v, of v^2 and of v w

    def add(self, found: Terms, count: int) -> None:
        """Take in one pack."""
        d = self.vae.p.distribution(self.node, found.values)
        base = base_of(d)
        if base is d:
            raise InputError(
                f"`{self.node}` has a {type(d).__name__} likelihood, which does not factorize over its entries. Use a "
                "factorized likelihood."
            )
        rows, columns = self.value.shape
        by_state = found.log_weights_by_state()
        lead = torch.broadcast_shapes(by_state.shape, (count, rows))
        entries = entries_log_prob(base, self.value, self.known).expand(*lead, columns).double().cpu()
        log_w = by_state.expand(lead).double().cpu().unsqueeze(-1)
        log_v = torch.cat([log_w - entries, log_w], -1)
        log_v = log_v.reshape(-1, count, rows, columns + 1).logsumexp(0)  # over the states of classes
        top = torch.maximum(self.top, log_v.amax(0))
        base_top = torch.where(top == -math.inf, 0.0, top)
        v, shrink = (log_v - base_top).exp(), (self.top - base_top).exp()
        w, both = v[..., -1:], torch.stack([shrink, shrink.square(), shrink * shrink[:, -1:]])
        self.sums = self.sums * both + torch.stack([v.sum(0), v.square().sum(0), (v * w).sum(0)])
        self.top = top

    def result(self) -> tuple[Tensor, ...]:
        """-log p of each entry given the others, its standard error, ESS."""
        total, square, product = self.sums
        log_total = self.top + total.log()
        full, part = total[:, -1:], total[:, :-1]
        variance = square[:, -1:] / full.square() - 2 * product[:, :-1] / (full * part) + square[:, :-1] / part.square()
        error = (variance.clamp(min=0) * self.samples / (self.samples - 1)).sqrt()
        found = (log_total[:, :-1] - log_total[:, -1:], error, part.square() / square[:, :-1])
        return tuple(torch.where(self.known.cpu(), each, math.nan) for each in found)
