"""Flows of masked nets, autoregressive or coupled; the only file that knows zuko."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width
from aevb.config import InputError
from aevb.flows.amortised import check_counts
from aevb.flows.transformed import Map, TransformedNormal, chain, scaled, standardized

__all__ = ["FlowPrior", "InverseAutoregressiveFlow", "SplineFlow"]

_SLOPE = 1e-3
_BOUND = 5.0
"""Where zuko's splines end."""


@final
class InverseAutoregressiveFlow(nn.Module):
    r"""Gaussian whose dimensions are rescaled in turn given those before (Kingma et al., 2016, eqs. 9-11).

    .. math:: z_0 = \mu + \sigma \odot \epsilon, \qquad z_t = \mu_t(z_{t-1}, h) + \sigma_t(z_{t-1}, h) \odot z_{t-1},
        \qquad \log |\det \partial z_T / \partial \epsilon| = \sum_{t, i} \log \sigma_{t, i} ,

    where entry i of :math:`\mu_t, \sigma_t` comes from a masked net that sees the entries of :math:`z_{t-1}` before i
    and the context h; every other t takes them in reverse order. :math:`\log \sigma_t` is kept within
    :math:`\pm \log 10^3`. A draw with its density is one pass; the density at a given point takes D passes a transform,
    and memory for all of them where gradients are on. Needs zuko.

    Args:
        net: Returns `(*, 2 D + context)`: :math:`\mu`, what softplus turns into :math:`\sigma`, and h.
        dims: D.
        context: Width of h; 0 if the masked nets see the parents through :math:`z_0` alone.
        transforms: T.
        hidden: Widths of the masked nets' hidden layers, each at least D; none makes them affine.

    Raises:
        InputError: If zuko is not installed, or a width does not fit.

    Example:
        >>> from aevb import MLP
        >>> width = InverseAutoregressiveFlow.width(dims=2, context=4)
        >>> q = InverseAutoregressiveFlow(MLP(5, [8], width), dims=2, context=4)
        >>> d = q(torch.zeros(3, 5))
        >>> z, log_q = d.rsample_and_log_prob(torch.Size([7, 3]))
        >>> torch.allclose(log_q, d.log_prob(z), atol=1e-5)
        True
    """

    def __init__(
        self, net: nn.Module, dims: int, context: int, transforms: int = 2, hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__()
        _check_context("InverseAutoregressiveFlow", net, dims, context)
        self.net, self.dims, self.context = net, dims, context
        self.transforms = _transforms(dims, context, transforms, hidden)

    @staticmethod
    def width(dims: int, context: int) -> int:
        """Output width of the net, 2 D + context."""
        return 2 * dims + context

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        loc, scale, context = _heads("InverseAutoregressiveFlow", self.net(*parents), self.dims, self.context)
        push, pull = _both(self.transforms, context)
        return TransformedNormal(
            loc,
            chain(functools.partial(scaled, loc, scale), push),
            chain(pull, functools.partial(standardized, loc, scale)),
        )


@final
class SplineFlow(nn.Module):
    r"""Gaussian noise bent by monotone rational-quadratic splines, then scaled (Durkan et al., 2019).

    :math:`z = \mu + \sigma \odot f_T(\cdots f_1(\epsilon; h) \cdots; h)`, where :math:`f_t` maps each entry by a spline
    on [-5, 5] (their section 3.1; the identity outside). Half of the entries take their knots from the context h, the
    other half from h and the first half: a coupling, whose halves change places with every t. A draw with its density
    is one pass; the density at a given point takes two passes a transform. Needs zuko.

    Args:
        net: Returns `(*, 2 D + context)`: :math:`\mu`, what softplus turns into :math:`\sigma`, and h.
        dims: D.
        context: Width of h; 0 if the splines are the same for all parents.
        transforms: T.
        bins: Of each spline, at least 2.
        hidden: Widths of the masked nets' hidden layers, each at least 2.

    Raises:
        InputError: If zuko is not installed, or a width does not fit.

    Example:
        >>> from aevb import MLP
        >>> q = SplineFlow(MLP(5, [8], SplineFlow.width(dims=2, context=4)), dims=2, context=4)
        >>> d = q(torch.zeros(3, 5))
        >>> z, log_q = d.rsample_and_log_prob(torch.Size([7, 3]))
        >>> torch.allclose(log_q, d.log_prob(z), atol=1e-5)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        dims: int,
        context: int,
        transforms: int = 2,
        bins: int = 8,
        hidden: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        _check_context("SplineFlow", net, dims, context)
        self.net, self.dims, self.context = net, dims, context
        self.transforms = _transforms(dims, context, transforms, hidden, bins, passes=2)

    @staticmethod
    def width(dims: int, context: int) -> int:
        """Output width of the net, 2 D + context."""
        return 2 * dims + context

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        loc, scale, context = _heads("SplineFlow", self.net(*parents), self.dims, self.context)
        push, pull = _both(self.transforms, context)
        return TransformedNormal(
            loc,
            chain(push, functools.partial(scaled, loc, scale)),
            chain(functools.partial(standardized, loc, scale), pull),
        )


@final
class FlowPrior(nn.Module):
    r"""Density over vectors without parents, in one pass at any point: a prior, or a model of the data themselves.

    .. math:: \log p(z) = \log N(\epsilon; 0, I) + \log |\det \partial \epsilon / \partial z|, \qquad
        \epsilon = f_T(\cdots f_1((z - m) / s))

    where :math:`f_t` maps each entry given those before, every other t in reverse order: by
    :math:`\mu_t + \sigma_t z` ("affine"; Papamakarios et al., 2017, eqs. 4-5) or by a rational-quadratic spline on
    [-5, 5], the identity outside ("spline"; Durkan et al., 2019, autoregressive). A draw takes D passes a transform.
    Needs zuko.

    Args:
        dims: D.
        transforms: T.
        hidden: Widths of the masked nets' hidden layers, each at least D.
        kind: "spline" or "affine".
        bins: Of each spline, at least 2.
        loc: m, the centre of the data, where z are data; a number or `(D,)`.
        scale: s > 0, the spread of the data; a number or `(D,)`. Splines bend what lies within 5 s of m.

    Raises:
        InputError: If zuko is not installed, or an argument does not fit.

    Example:
        >>> FlowPrior(2)().log_prob(torch.zeros(2))
        tensor(-1.8379, grad_fn=<AddBackward0>)
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        dims: int,
        transforms: int = 2,
        hidden: Sequence[int] = (128, 128),
        kind: Literal["spline", "affine"] = "spline",
        bins: int = 8,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in ("spline", "affine"):
            raise InputError(f"`kind` must be one of spline, affine; got {kind!r}.")
        self.transforms = _transforms(dims, 0, transforms, hidden, bins if kind == "spline" else None)
        self.register_buffer("loc", torch.as_tensor(loc, dtype=torch.get_default_dtype()).expand(dims).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.get_default_dtype()).expand(dims).clone())
        if not bool((self.scale > 0).all()):
            raise InputError("`scale` must be above 0 in every dimension; drop constant columns, or give them a scale.")

    def forward(self) -> td.Distribution:
        """A root has no parents."""
        towards_noise, away = _both(self.transforms, None)
        return TransformedNormal(
            self.loc,
            chain(away, functools.partial(scaled, self.loc, self.scale)),
            chain(functools.partial(standardized, self.loc, self.scale), towards_noise),
        )


def _heads(owner: str, out: Tensor, dims: int, context: int) -> tuple[Tensor, Tensor, Tensor | None]:
    r""":math:`\mu`, :math:`\sigma` and h, which is None where it has no width."""
    check_out(owner, out, 2 * dims + context)
    loc, raw, h = out.split([dims, dims, context], dim=-1)
    return loc, F.softplus(raw), h if context else None


def _both(transforms: nn.ModuleList, context: Tensor | None) -> tuple[Map, Map]:
    """Transforms of zuko given the context, one after another, and the way back."""
    steps = [transform(context) for transform in transforms]
    return chain(*(step.call_and_ladj for step in steps)), chain(
        *(functools.partial(_inverse, step) for step in reversed(steps))
    )


def _inverse(step: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    x = step.inv(y)
    return x, -step.log_abs_det_jacobian(x, y)


def _transforms(
    dims: int, context: int, count: int, hidden: Sequence[int], bins: int | None = None, passes: int | None = None
) -> nn.ModuleList:
    """Masked autoregressive maps that start as the identity.

    Args:
        dims: D.
        context: Width of the context.
        count: Number of maps; every other one takes the dimensions in reverse order.
        hidden: Widths of the hidden layers.
        bins: Of splines; affine maps if None.
        passes: Groups of dimensions, each of which depends on those before, and passes of the inverse; D if None.
    """
    groups = min(passes or dims, dims)
    check_counts(dims=dims, transforms=count)
    if bins is not None and bins < 2:
        raise InputError(f"`bins` must be at least 2; got {bins}. A spline of one bin is the identity.")
    if any(width < groups for width in hidden):
        raise InputError(
            f"`hidden` widths must be at least {groups} for {dims} dimensions, or the later ones cannot see all those "
            f"before; got {tuple(hidden)}. Widen the hidden layers."
        )
    zuko = _zuko()
    if bins is None:
        univariate = functools.partial(zuko.transforms.MonotonicAffineTransform, slope=_SLOPE)
    else:
        univariate = functools.partial(_spline, zuko.transforms.MonotonicRQSTransform)
    steps = [
        zuko.flows.autoregressive.MaskedAutoregressiveTransform(
            features=dims,
            context=context,
            passes=groups,
            order=torch.arange(dims).flip(0) if index % 2 else torch.arange(dims),
            univariate=univariate,
            shapes=[(), ()] if bins is None else [(bins,), (bins,), (bins - 1,)],
            hidden_features=tuple(hidden),
            activation=nn.SiLU,  # smooth, so that the density is
        )
        for index in range(count)
    ]
    for step in steps:
        # One dimension without context has no net, but the parameters themselves.
        for parameter in step.hyper[-1].parameters() if hasattr(step, "hyper") else step.phi:
            nn.init.zeros_(parameter)
    return nn.ModuleList(steps)


def _spline(kind: Callable[..., Any], widths: Tensor, heights: Tensor, derivatives: Tensor) -> Any:
    """Zuko's spline with knots at the same places, whose gradient torch's compiler gets right.

    zuko takes the cumulative sum of a softmax. For its gradient on processors, inductor (torch 2.13) keeps one row of
    the softmax where the loop that follows reads sixteen: silently wrong by as much as the gradient itself.
    """
    spline = kind(widths, heights, derivatives, slope=_SLOPE)
    spline.horizontal, spline.vertical = _knots(widths), _knots(heights)
    return spline


def _knots(raw: Tensor) -> Tensor:
    """Places of the knots in [-5, 5], `(*, bins + 1)`, from what sets the bins' widths, `(*, bins)`."""
    # The exponent stays within 3.5 of zero, so there is no maximum to take off.
    ends = (raw / (1 + (2 * raw / math.log(_SLOPE)).abs())).exp().cumsum(-1)
    return _BOUND * (2 * F.pad(ends / ends[..., -1:], (1, 0)) - 1)


def _check_context(owner: str, net: nn.Module, dims: int, context: int) -> None:
    check_counts(dims=dims)
    if context < 0:
        raise InputError(f"`context` must be at least 0; got {context}. Give the width of h.")
    wanted = 2 * dims + context
    check_width(owner, net, lambda width: width == wanted, f"{wanted} = {owner}.width({dims}, {context})")


@functools.cache
def _zuko() -> Any:
    """The module zuko, with torch's argument validation left as it was.

    zuko switches it off for the whole process where it is imported, and empties `Distribution.arg_constraints`. With
    both put back, its own distributions need constraints of their own: without them each would warn.
    """
    shared = {name: vars(td.Distribution)[name] for name in ("_validate_args", "arg_constraints")}
    try:
        zuko = importlib.import_module("zuko")
    except ImportError as error:
        raise InputError("Flows of this kind need zuko, which is not installed. pip install 'aevb[flows]'") from error
    finally:
        for name, value in shared.items():
            setattr(td.Distribution, name, value)
    for kind in vars(zuko.distributions).values():
        if getattr(kind, "__module__", None) == "zuko.distributions" and hasattr(kind, "arg_constraints"):
            if kind.arg_constraints is shared["arg_constraints"]:
                kind.arg_constraints = {}
    return zuko
