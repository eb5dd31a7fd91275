r"""Estimates to judge a model by, each with what says how far to trust it.

The marginal likelihood (notes, *Estimation of the marginal likelihood*) by importance sampling from q,

.. math:: \log p(x) \approx \log \frac{1}{L} \sum_l w_l, \quad w_l = p(x, z_l) / q(z_l | x), \quad z_l \sim q(z | x),

streams over packs of draws: q's parameters are computed once a row, memory does not grow with L.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.distributions as td
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import draw_latents, evaluating, holes_in, prepare, refuse_shared, terms
from aevb.config import InputError

__all__ = ["Marginal", "active_units", "log_marginal", "pareto_k"]

_BLOCK = 256
"""Draws that share one key: a row's noise is drawn by whole blocks, so that it does not depend on the packs."""


@dataclass(frozen=True, kw_only=True)
class Marginal:
    """Importance-sampling estimate of log p(x), a lower bound in expectation, with its diagnostics."""

    log_prob: Tensor  # (N,) nats, higher is better
    std_error: Tensor  # (N,) nats, Monte Carlo, delta method
    ess: Tensor  # (N,) in [1, samples]
    pareto_k: Tensor  # (N,) above 0.7 the estimate is not to be trusted
    elbo: Tensor  # (N,) nats, from the same draws
    samples: int  # drawn for each datum, not asked for


def log_marginal(
    vae: VAE,
    values: Values,
    samples: int = 5000,
    *,
    seed: int = 0,
    pack: int = 2048,
    discrete: Literal["sum", "sample"] = "sum",
    progress: Callable[[int], None] | None = None,
) -> Marginal:
    r"""Estimate :math:`\log p(x)` per datum by importance sampling from q, with standard error, ESS and Pareto k-hat.

    .. math:: \hat p = \tfrac{1}{L} \sum_l w_l, \quad
        \text{SE}(\log \hat p)^2 \approx \frac{\sum_l (w_l - \hat p)^2}{L (L - 1)\, \hat p^2}, \quad
        \text{ESS} = \frac{(\sum_l w_l)^2}{\sum_l w_l^2}

    A row's draws are keyed by (seed, the row's content, block of draws): its figure depends neither on its company nor
    on `pack`, beyond rounding. Parts of the model that depend on the mode run in evaluation mode.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws L per datum.
        seed: Key of the draws; torch's own generator is neither used nor moved.
        pack: Most draws, times states of classes, held in memory at once, by blocks of 256 draws.
        discrete: "sum" over the states of latent classes and binary vectors, or "sample" them.
        progress: Called with the number of rows finished since the last call.

    Returns:
        The estimates, float64.

    Raises:
        InputError: For values the model cannot take, fewer than one sample, or weights that are not numbers (the rows
            are named).

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> marginal = log_marginal(vae, {"x": torch.ones(3, 5)}, samples=100)
        >>> bool((marginal.log_prob >= marginal.elbo).all()), marginal.samples
        (True, 100)
    """
    if samples < 1 or pack < 1:
        raise InputError(f"`samples` and `pack` must be at least 1; got {samples} and {pack}.")
    refuse_shared(vae)
    values = prepare(vae, values)
    holes, rows = holes_in(values), rows_of(values)
    digests = [_digest(values, row) for row in range(rows)]
    results = []
    encoded: dict[str, td.Distribution] = {}
    pack = max(1, pack // _states(vae, {name: value[:1] for name, value in values.items()}, discrete, encoded))
    draws = max(_BLOCK, pack // _BLOCK * _BLOCK)  # of one row in a pack: whole blocks
    with evaluating(vae):
        # The first row goes alone: it tells whether draws can be keyed for many rows and blocks together.
        start, width = 0, 1
        widest, alone = max(1, pack // min(max(samples, _BLOCK), draws)), False
        while start < rows:
            chunk = slice(start, min(start + width, rows))
            given = {name: value[chunk] for name, value in values.items()}
            try:
                keys = _Keys(seed=seed, digests=digests[chunk], pack=draws, alone=alone)
                results.append(_estimate(vae, given, samples, holes, keys, encoded, discrete))
            except _NotNormal:
                widest, alone = 1, True
                continue
            if progress is not None:
                progress(chunk.stop - chunk.start)
            start, width, encoded = chunk.stop, widest, {}
    columns = [torch.cat(parts) for parts in zip(*results, strict=True)]
    if bool((bad := columns[0].isnan()).any()):
        named = ", ".join(str(int(i)) for i in bad.nonzero()[:10, 0])
        raise InputError(
            f"log p(x) is not a number for {int(bad.sum())} of {rows} rows, the first of them {named}: a net returned "
            "NaN or infinity there. Look at those rows, and at the weights for non-finite values."
        )
    return Marginal(
        **dict(zip(("log_prob", "std_error", "ess", "pareto_k", "elbo"), columns, strict=True)), samples=samples
    )


def active_units(vae: VAE, values: Values) -> dict[str, Tensor]:
    r"""Spread of each latent dimension's posterior mean over the data, :math:`\operatorname{Var}_x E_q[z_d | x]`.

    A dimension is called active where it exceeds 0.01 (Burda et al., 2016, section 5.2).

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`.

    Returns:
        By latent node, `(*event,)`; in the square of the node's own units.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> active_units(vae, {"x": torch.ones(3, 5)})["z"]
        tensor([0., 0.])
    """
    with evaluating(vae):
        return {node: d.mean.var(0, correction=0) for node, d in vae.posterior(prepare(vae, values)).items()}


def pareto_k(tail: Tensor, cutoff: Tensor) -> Tensor:
    r"""Shape :math:`\hat k` of the generalised Pareto law of the largest importance weights (Vehtari et al., 2024).

    The fit is the quasi-Bayesian one of Zhang and Stephens (2009) with Vehtari et al.'s weak prior, worth ten draws at
    k = 0.5. A finite variance of the weights needs k < 0.5; above 0.7 the estimate is not to be trusted.

    Args:
        tail: Log-weights above the cutoff, `(M, N)`.
        cutoff: The largest log-weight not in the tail, `(N,)`.

    Returns:
        `(N,)`; -inf where all of the tail ties with the cutoff, NaN where M < 5 tells nothing.
    """
    count = tail.shape[0]
    if count < 5:
        return torch.full_like(cutoff, math.nan)
    top = tail.max(0).values
    x = ((tail - top).exp() - (cutoff - top).exp()).clamp(min=0).sort(0).values  # (M, N)
    quartile, largest = x[int(count / 4 + 0.5) - 1], x[-1]
    flat = quartile <= 0
    quartile, largest = torch.where(flat, 1.0, quartile), torch.where(flat, 1.0, largest)
    grid = 30 + int(math.sqrt(count))
    j = torch.arange(1, grid + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    theta = 1 / largest + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)  # (grid, N)
    shape = torch.stack([torch.log1p(-row * x).mean(0) for row in theta])
    log_lik = count * ((-theta / shape).log() - shape - 1)
    theta = (theta * log_lik.softmax(0)).sum(0)
    shape = torch.log1p(-theta * x).mean(0)
    return torch.where(flat, -math.inf, (count * shape + 10 * 0.5) / (count + 10))


def _states(vae: VAE, row: Values, discrete: Literal["sum", "sample"], encoded: dict[str, td.Distribution]) -> int:
    """Joint states that are summed over for each draw of a row."""
    with evaluating(vae), torch.random.fork_rng():
        found = draw_latents(vae, row, 1, holes_in(row), None, encoded, discrete)
    return math.prod(len(found.drawn[node]) for node in found.summed)


def _estimate(
    vae: VAE,
    given: Values,
    samples: int,
    holes: tuple[str, ...],
    keys: _Keys,
    encoded: dict[str, td.Distribution],
    discrete: Literal["sum", "sample"],
) -> tuple[Tensor, ...]:
    """All packs of some rows: running sums of w, w^2 and log w, and the tail that k-hat needs."""
    rows, pack = len(keys.digests), _BLOCK if keys.alone else keys.pack
    running = _Running(rows, samples)
    for first in range(0, samples, pack):
        count = min(pack, samples - first)
        noise = functools.partial(_Keyed, keys, first // _BLOCK)
        found = terms(vae, given, count, kl="sampled", holes=holes, noise=noise, encoded=encoded, discrete=discrete)
        running.add(found.log_weights().expand(count, rows).double(), found.weighted().expand(count, rows).double())
    return running.result()


class _Running:
    """Streaming moments of the weights, relative to the largest log-weight so far."""

    def __init__(self, rows: int, samples: int) -> None:
        self.samples = samples
        # Vehtari et al. (2024), section 2.4: the tail is the smaller of a fifth of the draws and 3 sqrt(L).
        self.kept = min(samples // 5, math.ceil(3 * math.sqrt(samples))) + 1
        self.top = torch.full((rows,), -math.inf, dtype=torch.float64)
        self.first = torch.zeros(rows, dtype=torch.float64)
        self.second = torch.zeros(rows, dtype=torch.float64)
        self.integrand = torch.zeros(rows, dtype=torch.float64)
        self.tail = torch.empty(0, rows, dtype=torch.float64)

    def add(self, log_w: Tensor, integrand: Tensor) -> None:
        """Take in log-weights and the ELBO's integrand, `(K, N)`: the same but where classes are summed over."""
        log_w = log_w.to(self.top.device)
        top = torch.maximum(self.top, log_w.max(0).values)
        # A row all of whose weights are zero so far has top = -inf: its sums stay zero.
        base = torch.where(top == -math.inf, 0.0, top)
        scaled = (log_w - base).exp()
        shrink = (self.top - base).exp()
        self.first = self.first * shrink + scaled.sum(0)
        self.second = self.second * shrink.square() + scaled.square().sum(0)
        self.integrand += integrand.to(self.top.device).sum(0)
        self.top = top
        joined = torch.cat([self.tail, log_w])
        self.tail = joined.topk(min(self.kept, joined.shape[0]), dim=0).values

    def result(self) -> tuple[Tensor, ...]:
        """Log p, its standard error, ESS, k-hat, ELBO."""
        count = self.samples
        log_prob = self.top + self.first.log() - math.log(count)
        ess = self.first.square() / self.second
        # Var(mean w) / mean(w)^2, the delta method; one draw tells nothing of its spread.
        relative = (1 / ess - 1 / count) * count / (count - 1) if count > 1 else torch.full_like(ess, math.nan)
        k = pareto_k(self.tail[:-1], self.tail[-1])
        return log_prob, relative.clamp(min=0).sqrt(), ess, k, self.integrand / count


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """What the draws of some rows depend on, and how they are packed."""

    seed: int
    digests: list[bytes]  # content of each row
    pack: int  # draws of one row held at once: whole blocks
    alone: bool  # one row and one block at a time, since some noise is not known to be normal


class _NotNormal(Exception):
    """A draw's noise is not known to be normal, so it can be keyed only for one row and one block alone."""


@final
class _Keyed:
    """Noise of one node for some rows and consecutive blocks of draws, keyed by (seed, row's content, block, node)."""

    def __init__(self, keys: _Keys, block: int, node: str) -> None:
        self.keys, self.block, self.node = keys, block, node

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard normals `(K, N, *event)`; whole blocks are drawn, and the last is cut."""
        count, rows, event = shape[0], shape[1], shape[2:]
        assert rows == len(self.keys.digests)
        blocks = math.ceil(count / _BLOCK)
        result = torch.empty((rows, blocks, _BLOCK, *event), dtype=like.dtype)
        generator = torch.Generator()
        for row in range(rows):
            for block in range(blocks):
                generator.manual_seed(self._key(row, block))
                result[row, block].normal_(generator=generator)
        return result.flatten(1, 2)[:, :count].transpose(0, 1).to(like.device)

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """A draw of any other kind: torch's generator, seeded for this row and block, and put back."""
        if not self.keys.alone:
            raise _NotNormal
        with torch.random.fork_rng():
            torch.manual_seed(self._key(0, 0))
            return d.rsample() if d.has_rsample else d.sample()

    def _key(self, row: int, block: int) -> int:
        # torch's generator keeps 32 bits of it: of 100,000 blocks one or two pairs share their noise, in two rows.
        text = f"{self.keys.seed} {self.block + block} {self.node} ".encode() + self.keys.digests[row]
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _digest(values: Values, row: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(values[name][row].detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
