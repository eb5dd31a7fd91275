r"""Bounds on log p(x): one pass over both networks gives every term, a bound reduces the terms.

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x, z) - \log q(z | x)] = \text{ELBO}(x)
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb._shapes import Values, check_event, rows_of
from aevb.bayesnet import VAE, BayesNet
from aevb.config import InputError
from aevb.distributions import Noise, check_factorizes, closed_kl, draw, log_prob, reparameterize, support_violation

__all__ = ["Kl", "Terms", "elbo", "evaluating", "holes_in", "iwae", "log_mean", "log_weights", "prepare", "terms"]

Kl = Literal["auto", "sampled"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a bound, by node, for K draws of N data; nats."""

    log_p: dict[str, Tensor] = field(default_factory=dict)  # observed and sampled nodes, broadcasts to (K, N)
    log_q: dict[str, Tensor] = field(default_factory=dict)  # sampled nodes, (K, N)
    kl: dict[str, Tensor] = field(default_factory=dict)  # nodes in closed form, broadcasts to (K, N, G), summed over G
    values: dict[str, Tensor] = field(default_factory=dict)  # observed (N, *event); latent (K, N, *event)

    @property
    def reconstruction(self) -> Tensor:
        """Log-density of the observed nodes, broadcasts to `(K, N)`; higher is better."""
        return _total(value for node, value in self.log_p.items() if node not in self.log_q)

    def node_kl(self, node: str) -> Tensor:
        """KL of a latent node, or its log-ratio log q - log p at the draw, by groups of dimensions: `(K, N, G)`."""
        if node in self.kl:
            return self.kl[node]
        return (self.log_q[node] - self.log_p[node]).unsqueeze(-1)

    @property
    def latents(self) -> tuple[str, ...]:
        """Nodes that q drew, or whose KL is closed."""
        return (*self.kl, *self.log_q)

    def weighted(self, kl_weight: Tensor | float = 1.0) -> Tensor:
        """Reconstruction - weight * KL, broadcasts to `(K, N)`; the bound's integrand at weight 1."""
        if not self.latents:
            return self.reconstruction
        return self.reconstruction - kl_weight * _total(self.node_kl(node).sum(-1) for node in self.latents)


def terms(
    vae: VAE,
    values: Values,
    samples: int = 1,
    *,
    kl: Kl = "auto",
    holes: Iterable[str] | None = None,
    noise: Callable[[str], Noise] | None = None,
    encoded: dict[str, td.Distribution] | None = None,
) -> Terms:
    """Draw the latents from q and evaluate both networks there: what every bound and estimate is made of.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws K of the latents per datum.
        kl: "auto" takes the closed form where one is known and exact, "sampled" nowhere.
        holes: Names whose values hold NaN; looked up in the values if None.
        noise: Source of randomness for each node; torch's current generator if None.
        encoded: Kept between calls at the same values: q of nodes that have no latent parent is computed once.

    Returns:
        The terms by node, in nats.

    Raises:
        InputError: If a node can neither be read nor drawn, or shapes do not fit.
    """
    holes = holes_in(values) if holes is None else holes
    latents = vae.latents(values)
    shape = torch.Size([samples, rows_of(values)])
    result = Terms(values=dict(values))
    posterior, log_q = {}, {}
    for node in latents:
        posterior[node] = _encode(vae.q, node, result.values, values, encoded)
        source = noise(node) if noise else None
        result.values[node], log_q[node] = reparameterize(posterior[node], shape, source)
    for node in vae.p.nodes:
        d, value = vae.p.distribution(node, result.values), result.values[node]
        if node in posterior:
            _check_pair(node, posterior[node], d)
            closed = closed_kl(posterior[node], d) if kl == "auto" and _closed_form_is_exact(vae, node) else None
            if closed is not None:
                result.kl[node] = closed
                continue
            result.log_q[node] = log_q[node]()
        else:
            check_event(node, value, d.event_shape)
        result.log_p[node] = log_prob(d, value, ~value.isnan() if node in holes else None)
    return result


def elbo(vae: VAE, values: Values, samples: int = 1, kl: Kl = "auto") -> Tensor:
    r"""Evidence lower bound :math:`E_q[\log p(x, z) - \log q(z | x)]` (Kingma and Welling, 2014, eqs. 3, 6 and 7).

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws of the latents per datum that are averaged.
        kl: "auto" replaces a node's log-ratio by its closed-form KL where one is known and leaves the mean as it is
            (eq. 7); "sampled" never does (eq. 6).

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
    _check_kl(kl)
    values = prepare(vae, values)
    return terms(vae, values, samples, kl=kl).weighted().expand(samples, rows_of(values)).mean(0)


def iwae(vae: VAE, values: Values, samples: int) -> Tensor:
    r"""Importance-weighted bound :math:`\log \frac{1}{K} \sum_k w_k` (Burda et al., 2016, eq. 8).

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`, NaN for a missing entry.
        samples: Draws K of the latents per datum.

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
    return log_mean(log_weights(vae, values, samples))


def log_weights(vae: VAE, values: Values, samples: int) -> Tensor:
    r""":math:`\log w_k = \log p(x, z_k) - \log q(z_k | x)` with :math:`z_k \sim q`, `(K, N)` in nats."""
    _check_samples(samples)
    values = prepare(vae, values)
    return terms(vae, values, samples, kl="sampled").weighted().expand(samples, rows_of(values))


def log_mean(weights: Tensor) -> Tensor:
    """Log of the mean over the first axis of exp(weights)."""
    return weights.logsumexp(0) - math.log(weights.shape[0])


def holes_in(values: Values) -> tuple[str, ...]:
    """Names whose values hold NaN; while a graph is traced, where no value can be read, every name that could."""
    floats = [name for name, value in values.items() if value.is_floating_point()]
    if torch.compiler.is_compiling():
        return tuple(floats)
    return tuple(name for name in floats if bool(values[name].isnan().any()))


def prepare(vae: VAE, values: Values) -> dict[str, Tensor]:
    """Values as the model takes them: in its dtype and on its device, once they are seen to be what it can model.

    Costs a reduction over the values and one pass over a single row; the checks are left out while a graph is traced.

    Raises:
        InputError: Naming the node, what came, the rule and the remedy: for shapes, infinities, values outside the
            support, and holes that a net cannot see.
    """
    reference = next(vae.parameters(), torch.empty(0))
    if not isinstance(values, Mapping):
        rows_of(values)
    given = {name: torch.as_tensor(value) for name, value in values.items()}
    cast = {name: value.to(reference) for name, value in given.items()}
    if torch.compiler.is_compiling():
        return cast
    for name, value in given.items():
        if torch.finfo(reference.dtype).bits < 64 and value.dtype in (torch.float64, torch.int64, torch.int32):
            _check_cast(name, value.double(), cast[name])
    if not rows_of(cast):
        raise InputError("`values` has no rows; give at least one datum.")
    if len(vae.latents(cast)) == len(vae.p.nodes):
        raise InputError(f"`values` gives no node of p, which has {', '.join(vae.p.nodes)}. Give at least one.")
    for name, value in cast.items():
        if bool(value.isinf().any()):
            at = tuple(int(i) for i in value.isinf().nonzero()[0])
            raise InputError(
                f"`{name}` is infinite at {at}; values must be finite, or NaN for missing. Clean that entry."
            )
    holes = holes_in(cast)
    vae.require_sight(holes)
    _check_support(vae, cast, holes)
    return cast


def _check_cast(name: str, value: Tensor, cast: Tensor) -> None:
    """Raise if the model's dtype holds the values, but not what tells them apart."""
    lost = (value - cast.to(value)).abs().nan_to_num(0.0)
    known = (~value.isnan()).sum(0).clamp(min=1)
    spread = ((value - value.nansum(0) / known).square().nansum(0) / known).sqrt()
    # A thousandth of a column's spread: far more than rounding, unless its offset is ten thousand times its spread.
    worst = lost.amax(0) > 1e-3 * spread
    if len(value) > 1 and bool((worst & (spread > 0)).any()):
        at = tuple(int(i) for i in worst.nonzero()[0])
        raise InputError(
            f"`{name}` loses its differences in {str(cast.dtype).removeprefix('torch.')}, the model's dtype, at entry "
            f"{at} of a row: its size is too far from its spread. Subtract its mean, or use the model in float64: "
            "vae.double()."
        )


def _check_support(vae: VAE, values: Values, holes: Iterable[str]) -> None:
    # Supports do not depend on the row, so one row tells all.
    first = {name: value[:1].nan_to_num(0.0) for name, value in values.items()}
    with evaluating(vae), torch.random.fork_rng(devices=[]):
        known = dict(first)
        for node in vae.latents(first):
            known[node] = draw(_named(vae.q, node, known), torch.Size([1, 1]))
        for node in vae.p.nodes:
            if node in values:
                d = _named(vae.p, node, known)
                check_event(node, values[node], d.event_shape)
                if node in holes:
                    check_factorizes(d)
                _refuse(node, values[node], d)


def _named(net: BayesNet, node: str, known: Values) -> td.Distribution:
    """The conditional of a node; what its net refuses is told with the factor's name."""
    try:
        return net.distribution(node, known)
    except InputError as error:
        came = ", ".join(f"{parent}: {tuple(known[parent].shape[1:])}" for parent in net.parents[node])
        raise InputError(f"The factor of `{node}` cannot take one row of its parents ({came}). {error}") from None


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each submodule's own mode restored afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes:
            each.training = training


def _refuse(node: str, value: Tensor, d: td.Distribution) -> None:
    at = support_violation(d, value)
    if at is None:
        return
    base = d.base_dist if isinstance(d, td.Independent) else d
    family, came = type(base).__name__, value[at].tolist() if len(at) == value.ndim else value[at[0]].tolist()
    remedy = {
        "Bernoulli": "Binarise the values first, or choose a likelihood for grey values (binomial, normal).",
        "Binomial": "Values are whole counts from 0 to total_count: raise total_count, or choose another likelihood.",
    }.get(family, "Choose a likelihood whose support holds the data.")
    raise InputError(f"`{node}` is {came} at {at}, outside the support of its {family} likelihood. {remedy}")


def _encode(
    q: BayesNet, node: str, known: Values, observed: Values, encoded: dict[str, td.Distribution] | None
) -> td.Distribution:
    if encoded is None or not set(q.parents[node]) <= set(observed):
        return q.distribution(node, known)
    if node not in encoded:
        encoded[node] = q.distribution(node, known)
    return encoded[node]


def _closed_form_is_exact(vae: VAE, node: str) -> bool:
    """The KL may replace the log-ratio only if no parent of the node in p descends from it in q."""
    descendants = {node}
    for other in vae.q.nodes:  # topological order
        if descendants & set(vae.q.parents[other]):
            descendants.add(other)
    return not descendants & set(vae.p.parents[node])


def _check_pair(node: str, q: td.Distribution, p: td.Distribution) -> None:
    if q.event_shape != p.event_shape:
        raise InputError(
            f"`{node}` has event shape {tuple(q.event_shape)} in q and {tuple(p.event_shape)} in p; they must agree. "
            "Give both conditionals the same dimensions."
        )


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise InputError(f"`samples` must be at least 1; got {samples}. Give a positive number of draws.")


def _check_kl(kl: str) -> None:
    if kl not in get_args(Kl):
        raise InputError(f"`kl` must be one of {', '.join(get_args(Kl))}; got {kl!r}.")


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
