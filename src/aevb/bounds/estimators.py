r"""Bounds on log p(x) and the estimators of their gradients: reductions of the terms.

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x, z) - \log q(z | x)] = \text{ELBO}(x)

The value of a bound is the bound whatever the estimator of its gradient; only free bits, other weights and a relaxation
make an objective that is none.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds.boundary import holes_in, keeping_buffers, prepare
from aevb.bounds.integrand import Draws, Kl, Terms, draw_latents, terms_at
from aevb.config import Discrete, Gradient, InputError
from aevb.distributions import Noise, base_of, support_filler

__all__ = [
    "elbo",
    "estimate",
    "free_bits_kl",
    "iwae",
    "label_weight",
    "log_mean",
    "log_q",
    "log_weights",
    "mean_bound",
    "mean_log_bound",
    "total_correlation",
    "with_classifier",
]


def elbo(
    vae: VAE,
    values: Values,
    samples: int = 1,
    kl: Kl = "auto",
    *,
    gradient: Literal["plain", "stl"] = "plain",
    discrete: Literal["sum", "sample"] = "sum",
    data_size: int | None = None,
) -> Tensor:
    r"""Evidence lower bound :math:`E_q[\log p(x, z) - \log q(z | x)]` (Kingma and Welling, 2014, eqs. 3, 6 and 7).

    Latent classes are summed over exactly: mean over K of :math:`\sum_y q(y | x) [\dots - \log q(y | x)]`.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws of the latents per datum that are averaged.
        kl: "auto" replaces a node's log-ratio by its closed-form KL where one is known and leaves the mean as it is
            (eq. 7); "sampled" never does (eq. 6).
        gradient: "stl" drops the term of q's gradient whose mean is zero (sticking the landing, Roeder et al., 2017);
            takes KLs sampled, and needs q's density at a given point.
        discrete: "sum" over the states of latent classes and binary vectors, or "sample" them, with the score-function
            gradient and the mean of the other draws (of other rows, if there is one) as its baseline.
        data_size: Rows of the whole data set, for nodes in `vae.shared`, 1/N of whose terms each datum holds.

    Returns:
        An unbiased estimate of the bound in nats, `(N,)`; higher is better.

    Raises:
        InputError: If `values` lacks a node that neither network can draw, or holds what the likelihood cannot.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> aevb.elbo(vae, {"x": torch.ones(3, 5)}).shape
        torch.Size([3])
    """
    _check_samples(samples)
    _check_choice("kl", kl, Kl)
    _check_choice("gradient", gradient, Literal["plain", "stl"])
    _check_choice("discrete", discrete, Literal["sum", "sample"])
    values = prepare(vae, values)
    found = estimate(vae, values, samples, kl=kl, gradient=gradient, discrete=discrete, data_size=data_size)
    return mean_bound(found, found.weighted(), samples, rows_of(values))


def iwae(
    vae: VAE,
    values: Values,
    samples: int,
    *,
    gradient: Literal["plain", "dreg"] = "plain",
    discrete: Literal["sum", "sample"] = "sum",
) -> Tensor:
    r"""Importance-weighted bound :math:`\log \frac{1}{K} \sum_k w_k` (Burda et al., 2016, eq. 8).

    Where latent classes are summed over, :math:`w_k` is the sum over them, and q(y | x) plays no part in it: the bound
    at K = 1 is at least the ELBO, and teaches q(y | x) nothing.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws K of the latents per datum.
        gradient: "dreg" is the doubly reparameterized estimator of q's gradient (Tucker et al., 2019, eq. 8), whose
            signal does not fade as K grows; needs q's density at a given point.
        discrete: As for `elbo`; sampled, the score-function gradient has VIMCO's baseline (Mnih and Rezende, 2016).

    Returns:
        The bound in nats, `(N,)`; higher is better; its mean rises with `samples` to :math:`\log p(x)`.

    Raises:
        InputError: If `values` lacks a node that neither network can draw, or holds what the likelihood cannot.

    Example:
        >>> import aevb
        >>> _ = torch.manual_seed(0)
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5, likelihood="bernoulli", latents=2))
        >>> aevb.iwae(vae, {"x": torch.ones(3, 5)}, samples=8).shape
        torch.Size([3])
    """
    _check_samples(samples)
    _check_choice("gradient", gradient, Literal["plain", "dreg"])
    _check_choice("discrete", discrete, Literal["sum", "sample"])
    refuse_shared(vae)
    values = prepare(vae, values)
    found = estimate(vae, values, samples, kl="sampled", gradient=gradient, discrete=discrete)
    return mean_log_bound(found, found.log_weights(), samples, rows_of(values))


def log_weights(vae: VAE, values: Values, samples: int, *, discrete: Literal["sum", "sample"] = "sum") -> Tensor:
    r""":math:`\log w_k = \log p(x, z_k) - \log q(z_k | x)` with :math:`z_k \sim q`, `(K, N)` in nats."""
    _check_samples(samples)
    refuse_shared(vae)
    values = prepare(vae, values)
    found = estimate(vae, values, samples, kl="sampled", discrete=discrete)
    return found.log_weights().expand(samples, rows_of(values))


def log_q(vae: VAE, values: Values, node: str) -> Tensor:
    """Log-density of q's factor of `node` at its observed values: of the labels under the classifier q(y | x).

    Args:
        vae: Its q has a factor of `node` whose parents are observed.
        values: Observed nodes by name; each `(N, *event)`.
        node: An observed node, in some rows at least.

    Returns:
        Nats, `(N,)`, higher is better; 0 in rows where the node is missing.
    """
    inside = vae.p.to_states(values)
    if node not in vae.q.nodes or node not in inside:
        raise InputError(f"`{node}` must have a factor in q and observed values. Give both, or name another node.")
    if not torch.compiler.is_compiling():
        vae.p.check_codes(values)
    reference = next(vae.parameters(), torch.empty(0))
    inside = {name: value.to(reference) for name, value in inside.items()}
    known = dict(inside)
    for parent in vae.q.parents[node]:
        _find(vae, parent, known, node)
    value, d = inside[node], vae.q.distribution(node, known)
    missing = value.isnan()
    # A value of the support, since what is masked afterwards would leave NaN in the gradient.
    filler = 0.0 if node in vae.p.classes else support_filler(base_of(d))
    density = d.log_prob(torch.where(missing, filler, value))
    return torch.where(missing.flatten(1).all(-1) if missing.ndim > 1 else missing, 0.0, density)


def _find(vae: VAE, name: str, known: dict[str, Tensor], node: str) -> None:
    """Put the value of `name`, a parent of `node`, into `known`, computing what it is computed from."""
    if name in known:
        return
    if not vae.computes(name):
        raise InputError(f"q's factor of `{node}` depends on `{name}`, which is latent. Observe it.")
    home = vae.home(name)
    for parent in home.parents[name]:
        _find(vae, parent, known, node)
    known[name] = home.distribution(name, known).mean


def with_classifier(node: str, weight: float) -> Callable[..., Tensor]:
    r"""The objective ELBO + weight :math:`\log q(y | x)`, the second in labelled rows (Kingma et al., 2014, eq. 9).

    The paper's weight is :math:`\alpha = 0.1 N` on the mean over the labelled rows: with :math:`N_l` of N rows labelled
    it is `weight = 0.1 * N / N_l` here, as this term is summed over the rows like the others. Tables are trained with
    `aevb.bounds.label_weight`, a hundred times as much.

    `fit` judges held-out rows by it, too: in the bound of a labelled row q(y | x) plays no part.

    Args:
        node: y, a node that q infers from observed nodes.
        weight: Of the classification term.

    Returns:
        An objective for `fit`.

    Example:
        >>> import aevb
        >>> objective = aevb.with_classifier("y", weight=0.1 * 50_000 / 100)
    """
    return _WithClassifier(node, weight)


@final
@dataclass(frozen=True)
class _WithClassifier:
    node: str
    weight: float
    __qualname__ = "with_classifier.<locals>.objective"  # as runs have recorded it since there are any

    def __call__(self, vae: VAE, values: Values, *, bound: Tensor, **_: Tensor) -> Tensor:
        return bound + self.beside(vae, values)

    def beside(self, vae: VAE, values: Values) -> Tensor:
        """What stands beside the bound, `(N,)` nats, in training as in validation."""
        return self.weight * log_q(vae, values, self.node)


def label_weight(rows: int, labelled: int) -> float:
    r""":math:`10 N / N_l`, the weight of log q(y | x) that tables are trained with.

    The mean of log q(y | x) over the labelled rows then counts ten times the mean bound of all: a hundred times the
    paper's weight, at which bounds of thirty columns and more talk q(y | x) into clusters that are not the classes.

    Example:
        >>> label_weight(rows=500, labelled=50)
        100.0
    """
    return 10.0 * rows / labelled


def estimate(
    vae: VAE,
    values: Values,
    samples: int = 1,
    *,
    kl: Kl = "auto",
    gradient: Gradient = "plain",
    discrete: Discrete = "sum",
    temperature: float = 0.5,
    data_size: int | None = None,
    holes: tuple[str, ...] | None = None,
    noise: Callable[[str], Noise] | None = None,
) -> Terms:
    """The terms of prepared `values`, with the densities arranged as the estimator of q's gradient needs them."""
    seen = holes_in(values) if holes is None else holes
    if gradient != "plain":
        _refuse_dropout(vae)
    draws = draw_latents(vae, values, samples, seen, noise, None, discrete, temperature)
    if gradient == "plain":
        return terms_at(vae, draws, kl=kl, holes=seen, data_size=data_size)
    if draws.sampled or discrete == "relax":
        raise InputError(
            f'`gradient` {gradient} passes through the draws, and sampled classes have none. Use gradient="plain", or '
            'discrete="sum".'
        )
    if gradient == "stl":
        return terms_at(vae, draws, kl="sampled", holes=seen, data_size=data_size, stop=True)
    _refuse_shared_draws(vae, draws)
    # Compiled, both looks are one, if they are of the same formulas: log_prob has another where there is no gradient.
    looking = contextlib.nullcontext() if torch.compiler.is_compiling() else torch.no_grad()
    with looking, keeping_buffers(vae):
        by_state = terms_at(vae, draws, kl="sampled", holes=seen).log_weights_by_state()
        axes = tuple(range(len(draws.summed) + 1))  # states and draws
        weights = (by_state - by_state.logsumexp(axes, keepdim=True)).exp()
    scale = {node: _along(weights, draws.drawn[node], draws.posterior[node]) for node in draws.log_q}
    for node in draws.summed:
        del scale[node]
    return terms_at(vae, draws, kl="sampled", holes=seen, scale=scale, stop=True)


def _refuse_dropout(vae: VAE) -> None:
    """Raise if q's densities would be evaluated anew under another dropout mask: the value would be no bound."""
    conditionals = [*vae.q.children(), *(vae.p.conditional(node) for node in vae.p.nodes if vae.p.computes(node))]
    for module in itertools.chain.from_iterable(conditional.modules() for conditional in conditionals):
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise InputError(
                "`gradient` stl and dreg evaluate q anew at its draws, where dropout would be drawn anew, too. Use "
                'gradient="plain", or take the dropout out of q.'
            )


def _refuse_shared_draws(vae: VAE, draws: Draws) -> None:
    """Raise where a node drawn once a state depends on one drawn once for all: its weights would count twice."""
    lead = {n: z.ndim - len(draws.posterior[n].event_shape) for n, z in draws.drawn.items() if n not in draws.summed}
    for above, axes in lead.items():
        for node in vae.below(above):
            if lead.get(node, axes) != axes:
                raise InputError(
                    f"`gradient` dreg is biased where `{node}`, drawn for each state of {', '.join(draws.summed)}, "
                    f'depends on `{above}`, drawn once for all. Use gradient="plain".'
                )


def _along(weights: Tensor, drawn: Tensor, d: td.Distribution) -> Tensor:
    """Normalised weights `(E..., K, N)` of each draw of a node: summed over the states that share it."""
    lead = drawn.shape[: drawn.ndim - len(d.event_shape)]
    weights = weights.sum_to_size(lead) if weights.ndim >= len(lead) else weights
    return weights.reshape(*weights.shape, *(1,) * len(d.event_shape))


def mean_bound(found: Terms, integrand: Tensor, samples: int, rows: int) -> Tensor:
    """Mean over the draws, `(N,)`, with the score function of the draws that no gradient passes through."""
    integrand = integrand.expand(samples, rows)
    if not found.scored:
        return integrand.mean(0)
    signal = integrand.detach()
    if samples > 1:  # what the other draws of a row, or the other rows, expect does not depend on this draw
        signal = (signal - signal.mean(0)) * samples / (samples - 1)
    elif rows > 1 and all(score.shape[-1] == rows for score in found.scored.values()):
        signal = (signal - signal.mean(1, keepdim=True)) * rows / (rows - 1)
    return (integrand + _score(found, signal)).mean(0)


def mean_log_bound(found: Terms, log_w: Tensor, samples: int, rows: int) -> Tensor:
    """Log of the mean weight over the draws, `(N,)`, with the score function where it is needed."""
    log_w = log_w.expand(samples, rows)
    bound = log_mean(log_w)
    if not found.scored:
        return bound
    if samples < 2:
        return bound + _score(found, bound.detach().unsqueeze(0)).sum(0)
    fixed = log_w.detach()
    baselines = []
    for k in range(samples):  # VIMCO: a geometric mean stands in for the draw left out
        others = torch.cat([fixed[:k], fixed[k + 1 :]])
        baselines.append(torch.cat([others, others.mean(0, keepdim=True)]).logsumexp(0) - math.log(samples))
    baseline = torch.stack(baselines)
    signal = bound.detach() - torch.where(baseline > -math.inf, baseline, 0.0)
    return bound + _score(found, signal).sum(0)


def _score(found: Terms, signal: Tensor) -> Tensor:
    """Zero, with the gradient of signal * log q."""
    log_density = torch.stack([value.expand(signal.shape) for value in found.scored.values()]).sum(0)
    return signal * (log_density - log_density.detach())


def free_bits_kl(found: Terms, nats: float, groups: int, shared: tuple[str, ...] = ()) -> Tensor:
    r"""KL with free bits, :math:`\sum_g \max(\lambda, \text{mean KL}_g)` (Kingma et al., 2016, eq. 15).

    Where a group's mean over the minibatch is above :math:`\lambda`, each row has its own KL and the gradient is whole;
    else each has :math:`\lambda` and there is none.

    Args:
        found: Terms of a minibatch.
        nats: :math:`\lambda`.
        groups: Into how many groups the dimensions of each node fall, in their order; 0 for one a dimension.
        shared: Nodes with one value for the data set, which have no free bits.

    Returns:
        Nats, broadcasts to `(K, N)`.

    Raises:
        InputError: If `groups` does not divide a node's dimensions.
    """
    total = torch.zeros(())
    for node in found.latents:
        kl = found.node_kl(node)
        if node not in shared:
            if groups and kl.shape[-1] % groups:
                why = "" if kl.shape[-1] > 1 else ", since the KL of these families does not split by dimension"
                raise InputError(
                    f"`free_bits_groups` must divide the dimensions of `{node}`, which come in {kl.shape[-1]}{why}; "
                    f"got {groups}. Give a divisor, or 0."
                )
            if groups:
                kl = kl.unflatten(-1, (groups, -1)).sum(-1)
            means = kl.detach().reshape(-1, kl.shape[-1]).mean(0)
            kl = torch.where(means > nats, kl, nats)
        total = total + kl.sum(-1)
    return total


def total_correlation(found: Terms) -> Tensor:
    r"""Total correlation of the aggregated posterior, :math:`E \log q(z) - \sum_d \log q(z_d)`, at the draws.

    q(z) is estimated from the minibatch, :math:`\log q(z_n) \approx \log \frac{1}{M} \sum_m q(z_n | x_m)` (minibatch
    weighted sampling of Chen et al., 2018, eq. S4, but for constants): biased, and no bound.

    Args:
        found: Terms of a minibatch whose q of every latent node is a factorized Gaussian of the rows.

    Returns:
        Nats, `(K, N)`, summed over the latent nodes.
    """
    total = torch.zeros(())
    for node in found.latents:
        d = found.posterior[node]
        base = base_of(d)
        if type(base) is not td.Normal or len(d.batch_shape) != 1:
            raise InputError(
                f"`tc_weight` needs a q(`{node}` | x) that is a factorized Gaussian of observed nodes. "
                "Use DiagonalNormal, or leave the weight at 1."
            )
        pairs = base.log_prob(found.values[node].unsqueeze(-2))  # (K, N, M, D): each draw under each row's q
        rows = pairs.shape[-2]
        joint = pairs.sum(-1).logsumexp(-1) - math.log(rows)
        total = total + joint - (pairs.logsumexp(-2) - math.log(rows)).sum(-1)
    return total


def log_mean(weights: Tensor) -> Tensor:
    """Log of the mean over the first axis of exp(weights)."""
    return weights.logsumexp(0) - math.log(weights.shape[0])


def refuse_shared(vae: VAE) -> None:
    """Raise for a model with nodes that all rows share: a datum's own log p(x) is then not a marginal of theirs."""
    if vae.shared:
        raise InputError(
            f"`{vae.shared[0]}` has one value for the whole data set, so rows are not independent and a marginal per "
            "datum is not defined. Use elbo with `data_size`, or draw the shared nodes and observe them."
        )


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise InputError(f"`samples` must be at least 1; got {samples}. Give a positive number of draws.")


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise InputError(f"`{name}` must be one of {', '.join(get_args(choices))}; got {value!r}.")
