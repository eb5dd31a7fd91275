"""Log-densities with the missing entries integrated out, and what a support does not hold."""

from __future__ import annotations

import torch
import torch.distributions as td
from torch import Tensor

from aevb.config import InputError
from aevb.distributions.families import Bernoulli

__all__ = ["base_of", "check_factorizes", "entries_log_prob", "log_prob", "support_filler", "support_violation"]


def base_of(d: td.Distribution) -> td.Distribution:
    """The distribution of one entry, where entries are independent given the parents; else `d` itself."""
    if isinstance(d, td.Independent) and d.reinterpreted_batch_ndims == len(d.event_shape):
        base: td.Distribution = d.base_dist
        return base
    return d


def log_prob(d: td.Distribution, value: Tensor, known: Tensor | None = None) -> Tensor:
    r"""Log-density in nats with the unknown entries integrated out, event axes summed.

    Args:
        d: Density of `value`.
        value: `(*, *event)`; anything, NaN included, where `known` is false.
        known: True where `value` is given; None if it is throughout.

    Returns:
        :math:`\log p(x_{\text{known}})`, `(*,)`.

    A joint density that does not factorize takes rows that are known or missing throughout; `check_factorizes` refuses
    others at the boundary, where values can be read.
    """
    base = base_of(d)
    if known is None:
        if isinstance(base, Bernoulli) and len(d.event_shape) == 1 and not torch.is_grad_enabled():
            return base.log_prob_of_rows(value)
        return d.log_prob(value)
    axes = tuple(range(-len(d.event_shape), 0))
    # The density never sees the NaN: where() after log_prob would keep it out of the value but not of the gradient.
    if base is d and d.event_shape:  # a row is known or missing throughout, or the boundary refused it
        whole = known.all(-1) if len(axes) == 1 else known.flatten(-len(axes)).all(-1)
        return torch.where(whole, d.log_prob(torch.where(known, value, 0.0)), 0.0)
    entries = entries_log_prob(base, value, known)
    return entries.sum(axes) if axes else entries


def entries_log_prob(base: td.Distribution, value: Tensor, known: Tensor) -> Tensor:
    """Log-density of each entry in nats, `(*, *event)`; 0 where it is not known.

    Args:
        base: The distribution of one entry, as `base_of` tells it.
        value: Anything, NaN included, where `known` is false.
        known: True where `value` is given.
    """
    return torch.where(known, base.log_prob(torch.where(known, value, support_filler(base))), 0.0)


def check_factorizes(d: td.Distribution, known: Tensor) -> None:
    """Raise if a row of `known` `(N, *event)` is known in part, unless the entries of `d` are independent."""
    if base_of(d) is d and d.event_shape:
        flat = known.flatten(1)
        if bool((flat.all(1) | ~flat.any(1)).all()):
            return
        raise InputError(
            f"{type(d).__name__} does not factorize over its entries, so missing ones cannot be integrated out. "
            "Use a factorized likelihood, or fill the missing entries."
        )


def support_filler(base: td.Distribution) -> float | Tensor:
    """A value inside the support of every entry, found without reading a tensor (this runs inside compiled steps)."""
    support = base.support
    if hasattr(support, "filler"):  # columns of different families have one each
        return support.filler  # type: ignore[union-attr, no-any-return]
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if lower is None:
        return 0.0
    if upper is None:
        return lower + 1.0  # type: ignore[no-any-return]
    return lower if support.is_discrete else 0.5 * (lower + upper)  # type: ignore[union-attr, no-any-return]


def support_violation(d: td.Distribution, value: Tensor) -> tuple[int, ...] | None:
    """Index into `value` `(N, *event)` of the first entry outside the support of `d`, NaN passing as missing.

    Args:
        d: A distribution whose support does not depend on the row, its batch shape all ones or empty.
        value: Data.
    """
    base = base_of(d)
    support = base.support
    if isinstance(support, td.constraints.independent):  # which tells the row, not the entry
        support = support.base_constraint
    inside = support.check(torch.where(value.isnan(), support_filler(base), value))  # type: ignore[union-attr]
    # Bounds that are tensors carry the leading axes of `d`, all ones.
    inside = inside.reshape(inside.shape[max(0, inside.ndim - value.ndim) :])
    if bool(inside.all()):
        return None
    return tuple(int(i) for i in (~inside).nonzero()[0])
