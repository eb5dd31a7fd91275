r"""Where the bound loses: by the encoder, or by the family it chooses from (Cremer, Li and Duvenaud, 2018).

With :math:`q^*` the best member, for the datum, of q's own family:

.. math:: \log p(x) - \text{ELBO}(q) =
    \underbrace{\log p(x) - \text{ELBO}(q^*)}_{\text{approximation gap}} +
    \underbrace{\text{ELBO}(q^*) - \text{ELBO}(q)}_{\text{amortization gap}}

A richer family refined in the same way tells what of the approximation gap it would close.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, final, get_args

import torch
from torch import Tensor, nn

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import draw_latents, estimate, evaluating, holes_in, prepare, refuse_shared
from aevb.conditionals import FullNormal
from aevb.config import InputError
from aevb.distributions import count_states, reparameterize
from aevb.evaluate.annealing import Annealed, ais
from aevb.evaluate.marginal import Marginal, log_marginal
from aevb.evaluate.path import NotNormal, Path, RowNoise, latents_of, row_keys
from aevb.flows import SylvesterFlow
from aevb.nets import Fixed

__all__ = ["Family", "Gaps", "inference_gaps"]

Family = Literal["full", "flow"]


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Log p(x) and the ELBO of q as it is and refined for each datum; nats, higher is better."""

    log_prob: Tensor  # (N,) by the estimate with the highest mean over rows; each is a lower bound in expectation
    log_prob_error: Tensor  # (N,) Monte Carlo standard error, like those below
    source: str  # that estimate: "importance sampling", from q or from a refined one, or "annealing"
    elbo: Tensor  # (N,) of q as it is
    elbo_error: Tensor  # (N,)
    refined: dict[str, Tensor]  # "own", and each richer family, to (N,)
    refined_error: dict[str, Tensor]  # (N,)
    samples: int
    steps: int

    @property
    def amortization(self) -> Tensor:
        """What refining q for each datum wins, `(N,)`; a better encoder could."""
        return self.refined["own"] - self.elbo

    @property
    def approximation(self) -> Tensor:
        """What the best member of q's own family still loses, `(N,)`."""
        return self.log_prob - self.refined["own"]

    def gain(self, family: str) -> Tensor:
        """What a richer family wins over q's own, both refined for each datum, `(N,)`."""
        return self.refined[family] - self.refined["own"]


def inference_gaps(
    vae: VAE,
    values: Values,
    *,
    families: Sequence[Family] = ("full", "flow"),
    samples: int = 5000,
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 10,
    steps: int = 500,
    draws: int = 8,
    seed: int = 0,
    pack: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Gaps:
    r"""Amortization and approximation gap of each datum, and what richer families would win.

    q's own family is what shifts of its nets' outputs reach, one shift for each datum and node, from none: any member
    of it where the net's outputs are all the parameters, as in `DiagonalNormal`, `FullNormal` and planar and Sylvester
    flows. Of a q with masked nets or with nodes above others it is a part: there the amortization gap is a lower bound.
    Richer families hold all latents together on the reals: "full", a Gaussian with any covariance that starts from the
    moments of the refined q; "flow", two Sylvester layers (van den Berg et al., 2018) before that Gaussian's map.

    All are climbed by Adam, with the gradient of sticking the landing (Roeder et al., 2017) where the density is known
    at any point. A climb that led down, by two standard errors of draws of its own, is undone. The ELBOs that are told
    come from fresh draws, so that they are unbiased for what was found, and what was found is at most the best: gaps of
    approximation may be too large, by what the climb did not reach, and too small, by what log p(x) is underestimated.
    Log p(x) is by importance sampling from q, by `ais`, or by importance sampling from a refined q, whose draws are
    those of its ELBO: each a lower bound in expectation, of which the one with the highest mean over rows is taken.
    Chosen on the draws that it is told by, it may lie above log p(x), by no more than about its error.

    A row's noise is keyed by (seed, the row's content, how many rows like it came before), that of importance sampling
    from q by the first two: beyond rounding its figures depend on no other row.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        families: Richer ones to refine; none where there are latent classes.
        samples: Importance draws for log p(x), and draws for each ELBO, a datum.
        chains: Of `ais`.
        temperatures: Of `ais`; 0 for importance sampling alone.
        leapfrogs: Of `ais`.
        steps: Of each climb.
        draws: For each step and datum.
        seed: Key of all noise; torch's own generator is neither used nor moved.
        pack: Most draws times rows held in memory at once.
        progress: Called with the number of rows finished since the last call; a row counts once for importance
            sampling, once for annealing, and once for the climbs.

    Returns:
        The figures, float64.

    Raises:
        InputError: As `log_marginal` and `ais`; for an unknown family, counts below 1, no latent node, richer families
            or annealing with latent classes, or a factor of q without a `net` whose outputs could be shifted.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> found = inference_gaps(vae, {"x": torch.ones(3, 5)}, samples=500, temperatures=20, steps=50)
        >>> bool((found.amortization > 0).all()), sorted(found.refined)
        (True, ['flow', 'full', 'own'])
    """
    for name, count in (("steps", steps), ("draws", draws), ("samples", samples), ("pack", pack)):
        if count < 1:
            raise InputError(f"`{name}` must be at least 1; got {count}. Give a positive number.")
    if unknown := [name for name in families if name not in get_args(Family)]:
        raise InputError(f"`families` holds {unknown[0]!r}; it takes {', '.join(get_args(Family))}.")
    refuse_shared(vae)
    cast = prepare(vae, values)
    if temperatures < 0:
        raise InputError(f"`temperatures` must be at least 1, or 0 for no annealing; got {temperatures}.")
    _check_latents(vae, cast, bool(families), bool(temperatures))
    estimates: dict[str, Marginal | Annealed] = {}
    estimates["importance sampling"] = log_marginal(vae, cast, samples, seed=seed, pack=pack, progress=progress)
    if temperatures:
        estimates["annealing"] = ais(
            vae, cast, chains=chains, temperatures=temperatures, leapfrogs=leapfrogs, seed=seed, pack=pack,
            progress=progress,
        )  # fmt: skip
    plan = _Climb(steps=steps, draws=draws, samples=samples, families=tuple(dict.fromkeys(families)))
    keys, rows, width = row_keys(cast, seed), rows_of(cast), max(1, pack // max(draws, _BLOCK))
    parts: list[dict[str, _Judged]] = []
    with evaluating(vae), torch.enable_grad():
        for first in range(0, rows, width):
            chunk = slice(first, min(first + width, rows))
            parts += _refined(vae, {n: v[chunk] for n, v in cast.items()}, keys[chunk], plan)
            if progress is not None:
                progress(chunk.stop - chunk.start)
    found = {name: _Judged(*(torch.cat(e) for e in zip(*(p[name] for p in parts), strict=True))) for name in parts[0]}
    _check_finite(found)
    log_prob, error, source = _best(estimates, found)
    start = found.pop("start")
    return Gaps(
        log_prob=log_prob,
        log_prob_error=error,
        source=source,
        elbo=start.elbo,
        elbo_error=start.elbo_error,
        refined={name: judged.elbo for name, judged in found.items()},
        refined_error={name: judged.elbo_error for name, judged in found.items()},
        samples=samples,
        steps=steps,
    )


_RATE = 0.1
"""Adam's first step length, which falls to zero along a cosine; parameters are of size one or nearly so."""
_MOMENTS, _BLOCK = 256, 64
"""Draws that the richer families start from, and those by which a climb is kept or undone and bounds are judged."""
_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class _Climb:
    steps: int
    draws: int
    samples: int
    families: tuple[Family, ...]


class _Tuned(Protocol):
    """A q for each of some rows, with parameters of its own for each row."""

    parameters: list[Tensor]  # (N, ...) each

    def integrand(self, count: int, noise: RowNoise) -> Tensor:
        """Log p(x, z) - log q(z) at `count` draws of each row, `(K, N)`, its gradient that of the ELBO in the mean."""
        ...


class _Judged(NamedTuple):
    """Figures of a q from its own draws, `(N,)` each; float64."""

    elbo: Tensor
    elbo_error: Tensor
    log_prob: Tensor  # by importance sampling
    log_prob_error: Tensor


def _best(estimates: Mapping[str, Marginal | Annealed], found: Mapping[str, _Judged]) -> tuple[Tensor, Tensor, str]:
    """Log p(x), its error and where it is from, by the highest mean: the highest of each row would be far off."""
    every = {name: (each.log_prob, each.std_error) for name, each in estimates.items()}
    # Not of q's own family, whose integrand is no weight where classes are summed over.
    every |= {
        f"importance sampling from q refined ({name})": (each.log_prob, each.log_prob_error)
        for name, each in found.items()
        if name in get_args(Family)
    }
    source = max(every, key=lambda name: float(every[name][0].mean()))
    return *every[source], source


def _check_finite(found: Mapping[str, _Judged]) -> None:
    for name, each in found.items():
        if bool((bad := ~each.elbo.isfinite()).any()):
            named = ", ".join(str(int(i)) for i in bad.nonzero()[:10, 0])
            raise InputError(
                f"The ELBO of q ({name}) is not finite in rows {named}. Look at those rows, and at the weights for "
                "non-finite values."
            )


def _check_latents(vae: VAE, cast: Values, richer: bool, annealing: bool) -> None:
    """Raise unless each latent node can be refined."""
    hidden = vae.latents(cast)
    if not hidden:
        raise InputError("`values` gives every node of p: nothing is latent, and there is no gap. Use log_marginal.")
    for node in hidden:
        if not isinstance(getattr(vae.q.conditional(node), "net", None), nn.Module):
            raise InputError(
                f"q's factor of `{node}`, a {type(vae.q.conditional(node)).__name__}, has no attribute `net` whose "
                "outputs could be shifted for each datum. Keep the module that gives its parameters under that name."
            )
    first = {name: value[:1] for name, value in cast.items()}
    for node in hidden:
        with evaluating(vae):
            _no_shift(vae, node, first, 1)
    with evaluating(vae), torch.random.fork_rng():
        posterior = draw_latents(vae, first, 1, holes_in(first)).posterior
    if discrete := [node for node in hidden if count_states(posterior[node]) is not None]:
        for asked, name, remedy in ((richer, "families", "families=()"), (annealing, "temperatures", "temperatures=0")):
            if asked:
                raise InputError(
                    f"`{discrete[0]}` is latent and discrete, and `{name}` asks for what moves through real numbers "
                    f"only. Give {remedy}."
                )


def _refined(vae: VAE, observed: Values, keys: list[bytes], plan: _Climb) -> list[dict[str, _Judged]]:
    """Figures of q as it is ("start") and refined, for some rows."""
    try:
        return [_climbed(vae, observed, keys, plan)]
    except NotNormal:  # then noise is a row's own only if the row is drawn alone
        alone = [{name: value[i : i + 1] for name, value in observed.items()} for i in range(len(keys))]
        return [_climbed(vae, each, keys[i : i + 1], plan) for i, each in enumerate(alone)]


def _climbed(vae: VAE, observed: Values, keys: list[bytes], plan: _Climb) -> dict[str, _Judged]:
    own = _Own(vae, observed)
    found = {"start": _judge(own, plan, RowNoise(keys, "start judged"))}
    _climb(own, plan, keys, "own")
    found["own"] = _judge(own, plan, RowNoise(keys, "own judged"))
    if plan.families:
        path = Path(vae, observed, latents_of(vae, observed), "prior")
        full = _Full(path, *_moments(own, path, RowNoise(keys, "moments")))
        _climb(full, plan, keys, "full")
        if "full" in plan.families:
            found["full"] = _judge(full, plan, RowNoise(keys, "full judged"))
        if "flow" in plan.families:
            flow = _Flow(path, *full.map())
            _climb(flow, plan, keys, "flow")
            found["flow"] = _judge(flow, plan, RowNoise(keys, "flow judged"))
    return found


@torch.no_grad()
def _moments(q: _Own, path: Path, noise: RowNoise) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on the reals, `(N, D)`, by the draws that do not round to the edge of a support."""
    drawn = torch.cat([path.to_reals(q.draw(_BLOCK, noise)) for _ in range(_MOMENTS // _BLOCK)])
    drawn = torch.where(drawn.isfinite(), drawn, math.nan)
    mean = drawn.nanmean(0)
    return mean, (drawn - mean).square().nanmean(0).sqrt()


def _climb(q: _Tuned, plan: _Climb, keys: list[bytes], stage: str) -> None:
    """Adam on each row's own parameters; elementwise, so that rows do not see one another."""
    start = [each.detach().clone() for each in q.parameters]
    noise, optimizer = RowNoise(keys, f"{stage} climbed"), torch.optim.Adam(q.parameters, lr=_RATE)
    for step in range(plan.steps):
        optimizer.param_groups[0]["lr"] = 0.5 * _RATE * (1 + math.cos(math.pi * step / plan.steps))
        height = q.integrand(plan.draws, noise).mean(0).sum()
        slopes = torch.autograd.grad(height, q.parameters)
        for each, slope in zip(q.parameters, slopes, strict=True):
            each.grad = -slope.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    with torch.no_grad():
        ended = [each.detach().clone() for each in q.parameters]
        after = q.integrand(_BLOCK, RowNoise(keys, f"{stage} chosen"))
        _put(q, start)
        gain = after - q.integrand(_BLOCK, RowNoise(keys, f"{stage} chosen"))
        rows = gain.mean(0) >= -2 * gain.std(0) / math.sqrt(_BLOCK)  # false where `after` is NaN
        _put(q, [torch.where(rows.reshape(-1, *(1,) * (e.ndim - 1)), e, s) for e, s in zip(ended, start, strict=True)])


def _put(q: _Tuned, parameters: list[Tensor]) -> None:
    for each, value in zip(q.parameters, parameters, strict=True):
        each.copy_(value)


@torch.no_grad()
def _judge(q: _Tuned, plan: _Climb, noise: RowNoise) -> _Judged:
    """The ELBO of each row and the mean of its weights, from `samples` draws."""
    rows, count = len(q.parameters[0]), plan.samples
    # Whole blocks, whatever the pack: torch draws other numbers for other sizes.
    draws = [q.integrand(_BLOCK, noise).double().cpu() for _ in range(-(-count // _BLOCK))]
    integrand = torch.cat(draws)[:count]
    if count == 1:
        return _Judged(integrand[0], none := torch.full((rows,), math.nan), integrand[0], none)
    weight = (integrand - integrand.max(0).values).exp()
    return _Judged(
        integrand.mean(0),
        integrand.std(0) / math.sqrt(count),
        integrand.logsumexp(0) - math.log(count),
        weight.std(0) / weight.mean(0) / math.sqrt(count),
    )


class _Shifted(nn.Module):
    """A net with a shift of its outputs for each row."""

    def __init__(self, net: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.net, self.shift = net, nn.Parameter(shift)

    def forward(self, *parents: Tensor) -> Tensor:
        """The net's outputs `(..., N, P)`, shifted."""
        out: Tensor = self.net(*parents) + self.shift
        return out


@final
class _Own:
    """q with shifted nets."""

    def __init__(self, vae: VAE, observed: Values) -> None:
        self.observed, self.holes, self.rows = observed, holes_in(observed), rows_of(observed)
        hidden, factors = set(vae.latents(observed)), {}
        self.parameters: list[Tensor] = []
        for node, key in zip(vae.q.nodes, vae.q.keys, strict=True):
            factor = vae.q.conditional(node)
            if node in hidden and not vae.q.computes(node):
                # A copy around the same weights: the factor itself may be part of p (VampPrior).
                factor = copy.copy(factor)
                factor._modules = dict(factor._modules)
                factor.net = _Shifted(_net(vae, node), _no_shift(vae, node, observed, self.rows))
                self.parameters.append(factor.net.shift)
            factors[key] = factor
        self.vae = VAE(vae.p, BayesNet(factors), given=vae.given).eval()
        self.gradient: Literal["plain", "stl"] = "stl"
        try:  # the density of some flows is known at their own draws only
            self.integrand(1, RowNoise([b""] * self.rows, "probe"))
        except InputError:
            self.gradient = "plain"

    def integrand(self, count: int, noise: RowNoise) -> Tensor:
        """As the protocol has it."""
        found = estimate(
            self.vae,
            self.observed,
            count,
            kl="sampled",
            gradient=self.gradient,
            holes=self.holes,
            noise=lambda _: noise,
        )
        return found.weighted().expand(count, self.rows)

    def draw(self, count: int, noise: RowNoise) -> dict[str, Tensor]:
        """Latents `(K, N, *event)`."""
        found = estimate(self.vae, self.observed, count, kl="sampled", holes=self.holes, noise=lambda _: noise)
        return {node: found.values[node] for node in found.latents}


def _net(vae: VAE, node: str) -> nn.Module:
    net = vae.q.conditional(node).net
    assert isinstance(net, nn.Module)  # `_check_latents` saw to it
    return net


def _no_shift(vae: VAE, node: str, observed: Values, rows: int) -> Tensor:
    """Zeros of the width of a node's net, whose outputs are seen at one draw."""
    seen: list[object] = []
    hook = _net(vae, node).register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            estimate(vae, observed, 1, kl="sampled", holes=holes_in(observed))
    finally:
        hook.remove()
    out = seen[0] if seen else None
    if not isinstance(out, Tensor):
        raise InputError(
            f"The `net` of q's factor of `{node}` must return one tensor (..., N, P), the factor's parameters, to be "
            f"shifted for each datum; got {type(out).__name__ if seen else 'no call of it'}. Join them in one tensor."
        )
    return out.new_zeros(rows, out.shape[-1])


@final
class _Full:
    r"""A Gaussian on the reals: :math:`u = m + s \odot v`, v with any mean and covariance."""

    def __init__(self, path: Path, loc: Tensor, scale: Tensor) -> None:
        self.path, self.loc, self.scale = path, loc, scale.clamp_min(torch.finfo(scale.dtype).tiny)
        rows, self.dims = loc.shape
        start = torch.cat([torch.zeros(self.dims), torch.ones(self.dims).expm1().log(), torch.zeros(self.dims**2)])
        self.factor = FullNormal(Fixed(start.to(loc).repeat(rows, 1)), self.dims)
        self.parameters = list[Tensor](self.factor.parameters())
        self.index = torch.arange(rows, device=loc.device)

    def integrand(self, count: int, noise: RowNoise) -> Tensor:
        """As the protocol has it."""
        d = self.factor(self.index)
        v, _ = reparameterize(d, torch.Size([count, len(self.index)]), noise)
        stopped = {name: each.detach() for name, each in self.factor.named_parameters()}
        log_q: Tensor = torch.func.functional_call(self.factor, stopped, (self.index,)).log_prob(v)
        return self.path.log_joint(self.loc + self.scale * v) - log_q + self.scale.log().sum(-1)

    def map(self) -> tuple[Tensor, Tensor]:
        """Mean `(N, D)` and Cholesky factor `(N, D, D)` of u."""
        with torch.no_grad():
            d = self.factor(self.index)
            return self.loc + self.scale * d.loc, self.scale.unsqueeze(-1) * d.scale_tril


@final
class _Flow:
    r"""A Sylvester flow before a given affine map: :math:`u = m + L v`."""

    def __init__(self, path: Path, loc: Tensor, tril: Tensor) -> None:
        self.path, self.loc, self.tril = path, loc, tril
        rows, dims = loc.shape
        width = SylvesterFlow.width(dims, _LAYERS)
        start = torch.zeros(width)
        start[dims : 2 * dims] = math.log(math.expm1(1))
        # Not zero, where the gradient vanishes; the same for all rows.
        start[2 * dims :] = 0.01 * torch.randn(width - 2 * dims, generator=torch.Generator().manual_seed(0))
        table = Fixed(start.to(loc).repeat(rows, 1))
        self.factor = SylvesterFlow(table, dims, _LAYERS).to(loc)
        self.factor.gain.data.fill_(1.0).requires_grad_(False)  # it is shared by the rows
        self.parameters: list[Tensor] = [table.table]
        self.index = torch.arange(rows, device=loc.device)

    def integrand(self, count: int, noise: RowNoise) -> Tensor:
        """As the protocol has it."""
        v, log_q = reparameterize(self.factor(self.index), torch.Size([count, len(self.index)]), noise)
        u = self.loc + torch.einsum("nij,knj->kni", self.tril, v)
        return self.path.log_joint(u) - log_q() + self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
