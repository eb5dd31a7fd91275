r"""The marginal likelihood with what says how far to trust it (notes, *Estimation of the marginal likelihood*).

.. math:: \log p(x) \approx \log \frac{1}{L} \sum_l w_l, \quad w_l = p(x, z_l) / q(z_l | x), \quad z_l \sim q(z | x).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, final, get_args

import torch
import torch.distributions as td
from torch import Tensor

from aevb._compiler import can_compile, compiled, products
from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.config import InputError, Precision
from aevb.distributions import Given, Noise
from aevb.evaluate.pareto import pareto_k
from aevb.evaluate.stream import BLOCK, Pass, stream

__all__ = ["Marginal", "Rounding", "log_marginal", "rounding"]

_HELD = 2**16
"""Log-weights summed at once: fewer, and the calls cost more than the sums."""


@dataclass(frozen=True, kw_only=True)
class Marginal:
    """Importance-sampling estimate of log p(x), a lower bound in expectation, with its diagnostics."""

    log_prob: Tensor  # (N,) nats, higher is better
    std_error: Tensor  # (N,) nats, Monte Carlo, delta method
    ess: Tensor  # (N,) in [1, samples]
    pareto_k: Tensor  # (N,) above 0.7 the estimate is not to be trusted
    elbo: Tensor  # (N,) nats, from the same draws
    curve: dict[int, Tensor]  # K to (N,) the bound with K draws, averaged over the samples' groups of K; nats
    samples: int  # drawn for each datum, not asked for


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What coarser matrix products change of log p(x), on the same rows and draws; nats."""

    rows: int
    change: float  # of the mean over rows
    std_error: float  # of the mean of all rows that are judged: how far another set of as many would scatter
    row_change: float  # of a row's estimate, root of the mean square
    row_error: float  # its Monte-Carlo error, root of the mean square

    @property
    def allowed(self) -> bool:
        """Whether the change is lost in the errors: a tenth of that of the mean, and a row's own."""
        return abs(self.change) < self.std_error / 10 and self.row_change < self.row_error


def log_marginal(
    vae: VAE,
    values: Values,
    samples: int = 5000,
    *,
    seed: int = 0,
    pack: int = 2048,
    discrete: Literal["sum", "sample"] = "sum",
    compile: bool = False,
    precision: Precision = "float32",
    progress: Callable[[int], None] | None = None,
) -> Marginal:
    r"""Estimate :math:`\log p(x)` per datum by importance sampling from q, with standard error, ESS and Pareto k-hat.

    .. math:: \hat p = \tfrac{1}{L} \sum_l w_l, \quad
        \text{SE}(\log \hat p)^2 \approx \frac{\sum_l (w_l - \hat p)^2}{L (L - 1)\, \hat p^2}, \quad
        \text{ESS} = \frac{(\sum_l w_l)^2}{\sum_l w_l^2}

    The bound with fewer draws, :math:`E \log \frac{1}{K} \sum_k w_k`, comes from the same ones, cut into groups of
    K = 1, 2, 4, ...: where it still rises at the end, more samples would say more.

    A row's draws are keyed by (seed, the row's content, block of draws): its figure depends neither on its company nor
    on `pack`, beyond rounding. Parts of the model that depend on the mode run in evaluation mode. On a processor rows
    are shared out among as many threads as torch has, so a net must not keep anything of one call for the next.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws L per datum.
        seed: Key of the draws; torch's own generator is neither used nor moved.
        pack: Most draws, times states of classes, held in memory at once, by blocks of 256 draws.
        discrete: "sum" over the states of latent classes and binary vectors, or "sample" them.
        compile: Compile the pass over both networks (a minute, worth it from some ten million draws on); without a C++
            compiler, or where some noise is not normal, it runs as ever. The figures agree to rounding (of tanh: 2e-7).
        precision: Of float32 matrix products; bfloat16 is faster where the processor has units for it, and has no
            effect elsewhere (on a GPU: TensorFloat32). Densities stay in float32. What it changes is for `rounding` to
            say. It is a setting of the whole process, put back at the end: not for calls in several threads.
        progress: Called with the number of rows finished since the last call.

    Returns:
        The estimates, float64. Where classes are summed over, the curve begins above the ELBO. A row of which nothing
        is observed has log p = 0, exactly; its ELBO is what q loses there.

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
    if precision not in get_args(Precision):
        raise InputError(
            f"`precision` must be one of {', '.join(get_args(Precision))}; got {precision!r}. Choose one of the two."
        )
    with products(precision):
        columns = stream(
            vae,
            values,
            samples,
            lambda given, _: _Running(rows_of(given), samples),
            look=_Compiled(vae, precision) if compile and can_compile() is None else functools.partial(_weights, vae),
            seed=seed,
            pack=pack,
            discrete=discrete,
            progress=progress,
        )
    if bool((bad := columns[0].isnan()).any()):
        named = ", ".join(str(int(i)) for i in bad.nonzero()[:10, 0])
        raise InputError(
            f"log p(x) is not a number for {int(bad.sum())} of {len(bad)} rows, the first of them {named}: a net "
            "returned NaN or infinity there. Look at those rows, and at the weights for non-finite values."
        )
    log_prob, std_error, ess, k, elbo, curve = columns
    blank = _blank(vae, values).to(log_prob.device)
    log_prob, std_error = (torch.where(blank, 0.0, column) for column in (log_prob, std_error))
    groups = [2**level for level in range(curve.shape[1])]
    return Marginal(
        log_prob=log_prob,
        std_error=std_error,
        ess=ess,
        pareto_k=k,
        elbo=elbo,
        curve=dict(zip(groups, curve.T, strict=True)) | {samples: log_prob},
        samples=samples,
    )


def rounding(exact: Marginal, coarse: Marginal, total: int | None = None) -> Rounding:
    """What `coarse`, the estimates with `precision="bfloat16"`, changes of `exact`, those of the same rows and draws.

    It is allowed where the mean changes by less than a tenth of its sampling error, and a row (root of the mean square)
    by less than its Monte-Carlo error. An error that is not known, of one row or one draw, hides nothing.

    Args:
        exact: Estimates in float32.
        coarse: Those in bfloat16.
        total: Rows that are to be judged in all, if these are some of them: the change of the mean is no smaller for
            more rows, and its sampling error is.

    Raises:
        InputError: If the two are not of as many rows and draws.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> x = (torch.rand(50, 5) < 0.5).float()
        >>> exact, coarse = (
        ...     log_marginal(vae, {"x": x}, 100, precision=precision) for precision in ("float32", "bfloat16")
        ... )
        >>> rounding(exact, coarse).allowed
        True
    """
    rows = len(exact.log_prob)
    if (rows, exact.samples) != (len(coarse.log_prob), coarse.samples):
        raise InputError(
            f"`rounding` compares estimates of the same rows and draws; got {rows} rows of {exact.samples} and "
            f"{len(coarse.log_prob)} of {coarse.samples}. Give both the same data, samples and seed."
        )
    change = coarse.log_prob - exact.log_prob
    return Rounding(
        rows=rows,
        change=float(change.mean()),
        std_error=float(exact.log_prob.std()) / math.sqrt(total or rows) if rows > 1 else math.nan,
        row_change=float(change.square().mean().sqrt()),
        row_error=float(exact.std_error.square().mean().sqrt()),
    )


def _blank(vae: VAE, values: Values) -> Tensor:
    """Rows `(N,)` of which nothing is observed, so that their probability is one."""
    own = {name: torch.as_tensor(value) for name, value in values.items() if name not in vae.given}
    missing = [value.isnan().flatten(1).all(1) for value in vae.p.to_states(own).values()]
    return torch.stack(missing).all(0) if missing else torch.zeros(rows_of(values), dtype=torch.bool)


def _weights(vae: VAE, values: Values, count: int, made: Pass) -> tuple[Tensor, Tensor]:
    """Log-weights and the ELBO's integrand at a pack of draws, `(K, N)` or what broadcasts to it."""
    found = made.terms(vae, values, count)
    return found.log_weights(), found.weighted()


class _Compiled:
    """`_weights` as one compiled graph of the values and the noise, for packs of one size."""

    def __init__(self, vae: VAE, precision: Precision) -> None:
        self.vae, self.precision = vae, precision
        self.asked: dict[str, list[tuple[torch.Size, Tensor]]] = {}  # noise of each node: event shape, what it is like
        self.graph: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.size = (0, 0)  # draws, rows

    def __call__(self, values: Values, count: int, made: Pass) -> tuple[Tensor, Tensor]:
        """The first pack is looked at as ever, to see what noise is asked for; then those of the second's size."""
        rows = rows_of(values)
        if made.alone or not self.asked:
            self.asked = {}
            return _weights(
                self.vae, values, count, replace(made, noise=lambda node: _Asked(made.noise(node), node, self.asked))
            )
        whole = -(-count // BLOCK) * BLOCK
        if self.graph is None:
            self.size = whole, rows
            self.graph = compiled(self._look(made), precision=self.precision, cpp_wrapper=True)
        if whole > self.size[0] or rows != self.size[1]:
            return _weights(self.vae, values, count, made)
        noise = {
            node: [made.noise(node).normal(torch.Size([self.size[0], rows, *event]), like) for event, like in each]
            for node, each in self.asked.items()
        }
        log_w, integrand = self.graph(dict(values), noise)
        return log_w[:count], integrand[:count]

    def _look(self, made: Pass) -> Callable[..., tuple[Tensor, Tensor]]:
        draws, rows = self.size

        def look(values: dict[str, Tensor], noise: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
            given = {node: Given(tensors) for node, tensors in noise.items()}
            fixed = replace(made, encoded={}, noise=lambda node: given[node])
            log_w, integrand = _weights(self.vae, values, draws, fixed)
            return log_w.expand(draws, rows), integrand.expand(draws, rows)

        return look


@final
class _Asked:
    """Noise that notes what it was asked for."""

    def __init__(self, source: Noise, node: str, asked: dict[str, list[tuple[torch.Size, Tensor]]]) -> None:
        self.source, self.list = source, asked.setdefault(node, [])

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """As the source has it."""
        self.list.append((shape[2:], torch.empty(0, dtype=like.dtype, device=like.device)))
        return self.source.normal(shape, like)

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """As the source has it."""
        return self.source.rsample(d, shape)


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
        # Groups of 1, 2, 4, ... draws: the sum of their log-mean weights, and the group that waits for its neighbour.
        self.levels = samples.bit_length()
        self.grouped = torch.zeros(self.levels, rows, dtype=torch.float64)
        self.waiting: list[Tensor] = [self.tail] * self.levels
        self.held: list[tuple[Tensor, Tensor]] = []  # packs not yet summed

    def add(self, found: tuple[Tensor, Tensor], count: int) -> None:
        """Take in log-weights and the ELBO's integrand, the same but where classes are summed over."""
        log_w, integrand = (each.expand(count, len(self.top)).to(self.top) for each in found)
        self.held.append((log_w, integrand))
        if sum(len(each) for each, _ in self.held) * len(self.top) >= _HELD:
            self._sum()

    def _sum(self) -> None:
        log_w, integrand = (torch.cat(parts) for parts in zip(*self.held, strict=True))
        self.held = []
        top = torch.maximum(self.top, log_w.max(0).values)
        # A row all of whose weights are zero so far has top = -inf: its sums stay zero.
        base = torch.where(top == -math.inf, 0.0, top)
        scaled = (log_w - base).exp()
        shrink = (self.top - base).exp()
        self.first = self.first * shrink + scaled.sum(0)
        self.second = self.second * shrink.square() + scaled.square().sum(0)
        self.integrand += integrand.sum(0)
        self.top = top
        joined = torch.cat([self.tail, log_w])
        self.tail = joined.topk(min(self.kept, joined.shape[0]), dim=0).values
        groups = log_w
        for level in range(self.levels):
            if not len(groups):
                break
            self.grouped[level] += groups.sum(0)
            queue = torch.cat([self.waiting[level], groups])
            pairs = len(queue) // 2
            self.waiting[level] = queue[2 * pairs :]
            groups = torch.logaddexp(queue[: 2 * pairs : 2], queue[1 : 2 * pairs : 2]) - math.log(2)

    def result(self) -> tuple[Tensor, ...]:
        """Log p, its standard error, ESS, k-hat, ELBO, and the bound with 1, 2, 4, ... draws."""
        if self.held:
            self._sum()
        count = self.samples
        log_prob = self.top + self.first.log() - math.log(count)
        ess = self.first.square() / self.second
        # Var(mean w) / mean(w)^2, the delta method; one draw tells nothing of its spread.
        relative = (1 / ess - 1 / count) * count / (count - 1) if count > 1 else torch.full_like(ess, math.nan)
        k = pareto_k(self.tail[:-1], self.tail[-1])
        counts = torch.tensor([count // 2**level for level in range(self.levels)]).unsqueeze(-1)
        return log_prob, relative.clamp(min=0).sqrt(), ess, k, self.integrand / count, (self.grouped / counts).T
