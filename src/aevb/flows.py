r"""Conditionals made of normalizing flows; the only file that knows zuko.

A flow is an invertible map of standard normal noise, :math:`z = f(\epsilon; a)`, and its density
(Rezende and Mohamed, 2015, eq. 5)

.. math:: \log q(z | a) = \log N(\epsilon; 0, I) - \log |\det \partial z / \partial \epsilon| .

What each of them can do, with D dimensions:

================================  ===========================  =============================
flow                              a draw with its density      the density at a given point
================================  ===========================  =============================
`PlanarFlow`, `SylvesterFlow`     one pass                     none in closed form: raises
`InverseAutoregressiveFlow`       one pass                     D passes a transform
`SplineFlow`                      one pass                     two passes a transform
`FlowPrior`                       D passes a transform         one pass
================================  ===========================  =============================

Every flow starts as the Gaussian that it transforms, and stretches no direction by less than 1e-3 a step, so that
its determinants are above zero in floating point too.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width
from aevb.config import InputError
from aevb.distributions import Noise

__all__ = [
    "FlowPrior",
    "InverseAutoregressiveFlow",
    "PlanarFlow",
    "SplineFlow",
    "SylvesterFlow",
    "TransformedNormal",
]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()
_Map = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x `(*, D)` to y `(*, D)` and log |det dy/dx|, which broadcasts to `(*,)`."""

_LOG_2PI = math.log(2 * math.pi)
_SLOPE = 1e-3
_UNIT = math.log(math.expm1(1 - _SLOPE))
"""Where `_SLOPE + softplus` is 1."""
_BOUND = 5.0
"""Where zuko's splines end."""


@final
class TransformedNormal(td.Distribution):
    r"""Distribution of :math:`z = f(\epsilon)`, :math:`\epsilon \sim N(0, I)`, with f invertible.

    Args:
        like: `(*batch, D)`, read for its shape, dtype and device.
        push: :math:`\epsilon \mapsto (z, \log |\det \partial z / \partial \epsilon|)`, over any leading axes.
        pull: :math:`z \mapsto (\epsilon, \log |\det \partial \epsilon / \partial z|)`; None if there is no closed form.

    Example:
        >>> d = TransformedNormal(torch.zeros(2), lambda e: (2 * e, e.new_tensor(2 * math.log(2))))
        >>> z, log_q = d.rsample_and_log_prob(torch.Size([5]))
        >>> torch.allclose(log_q, td.Normal(0.0, 2.0).log_prob(z).sum(-1))
        True
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, like: Tensor, push: _Map, pull: _Map | None = None) -> None:
        self.like, self.push, self.pull = like, push, pull
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """All real vectors."""
        return td.constraints.real_vector

    @property
    def mean(self) -> Tensor:
        r"""The centre :math:`f(0)`, image of the mean of the noise, `(*batch, D)`: not E z, which has no closed form.

        A deterministic embedding, equal to E z for a fresh flow; for D = 1 the median. Average draws for E z.
        """
        return self.push(torch.zeros_like(self.like))[0]

    def expand(self, batch_shape: _Shape, _instance: object = None) -> TransformedNormal:
        """The same over more leading axes."""
        return TransformedNormal(self.like.expand(*batch_shape, -1), self.push, self.pull)

    def rsample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Draws `(*sample_shape, *batch, D)`, differentiable in the parameters."""
        return self.rsample_and_log_prob(torch.Size(sample_shape) + self.batch_shape)[0]

    def rsample_and_log_prob(self, shape: torch.Size, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Draws `(*shape, D)` with their log-density in nats, `(*shape,)`; the batch shape broadcasts to `shape`."""
        full, like = shape + self.event_shape, self.like
        if noise is None:
            eps = torch.randn(full, dtype=like.dtype, device=like.device)
        else:
            eps = noise.normal(full, like)
        z, log_det = self.push(eps)
        return z, _log_normal(eps) - log_det

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats at `value` `(*, D)`.

        Raises:
            InputError: If the flow has no inverse in closed form.
        """
        if self.pull is None:
            raise InputError(
                "This flow has no inverse in closed form, so it knows the density of its own draws only "
                "(`rsample_and_log_prob`), not of a given value. Where the density at a point is needed, use "
                "InverseAutoregressiveFlow or SplineFlow."
            )
        # Some of zuko's log-determinants take the shape of the value, and cannot be wider.
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        eps, log_det = self.pull(value.expand(*batch, -1))
        return _log_normal(eps) + log_det


@final
class PlanarFlow(nn.Module):
    r"""Gaussian pushed along one direction a layer (Rezende and Mohamed, 2015).

    :math:`z_0 \sim N(\mu, \operatorname{diag} \sigma^2)`, then for each layer (eqs. 10, 12)

    .. math:: z' = z + \hat u \tanh(w^T z + b), \qquad
        \det \partial z' / \partial z = 1 + (1 - \tanh^2(w^T z + b))\, w^T \hat u .

    As in their appendix A.1 it is invertible since :math:`\hat u = u + (m(w^T u) - w^T u)\, w / \|w\|^2` makes
    :math:`w^T \hat u = m(w^T u) > -1`; ours, :math:`m(t) = -1 + 10^{-3} + \operatorname{softplus}(t + t_0)` with
    :math:`m(0) = 0`, leaves u = 0 as it is, which theirs does not. u is the net's, times a learned gain a layer that
    starts at zero.

    Args:
        net: Returns `(*, PlanarFlow.width(dims, layers))`: :math:`\mu`, what softplus turns into :math:`\sigma`, then
            w, u, b of each layer.
        dims: D.
        layers: Number of maps; each bends one direction.

    Example:
        >>> from aevb import MLP
        >>> q = PlanarFlow(MLP(5, [8], PlanarFlow.width(2, 4)), dims=2, layers=4)
        >>> q(torch.zeros(3, 5)).rsample().shape
        torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module, dims: int, layers: int) -> None:
        super().__init__()
        _check_counts(dims=dims, layers=layers)
        wanted = self.width(dims, layers)
        check_width("PlanarFlow", net, lambda width: width == wanted, f"{wanted} = PlanarFlow.width({dims}, {layers})")
        self.net, self.dims, self.layers = net, dims, layers
        self.gain = nn.Parameter(torch.zeros(layers))

    @staticmethod
    def width(dims: int, layers: int) -> int:
        """Output width of the net, 2 D + layers (2 D + 1)."""
        return 2 * dims + layers * (2 * dims + 1)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("PlanarFlow", out, self.width(self.dims, self.layers))
        loc, raw, *layers = out.split([self.dims, self.dims, *[2 * self.dims + 1] * self.layers], dim=-1)
        steps: list[_Map] = []
        for layer, gain in zip(layers, self.gain, strict=True):
            w, u, b = layer.split([self.dims, self.dims, 1], dim=-1)
            steps.append(functools.partial(_planar, w, *_planar_direction(w, gain * u), b))
        return TransformedNormal(loc, _chain(functools.partial(_scaled, loc, F.softplus(raw)), *steps))


def _planar_direction(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\hat u` `(*, D)` and :math:`1 + w^T \hat u > 0` `(*, 1)`."""
    inner = (w * u).sum(-1, keepdim=True)
    stretch = _SLOPE + F.softplus(inner + _UNIT)
    # Both |inner| and |stretch - 1| are at most |w| |u| here, so the quotient stays bounded as w goes to zero.
    square = w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return u + (stretch - 1 - inner) * w / square, stretch


def _planar(w: Tensor, u: Tensor, stretch: Tensor, b: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    bent = ((w * z).sum(-1, keepdim=True) + b).tanh()
    square = bent.square()
    # A mean of 1 and `stretch`, both above zero: 1 + (1 - square) (stretch - 1) would cancel.
    return z + u * bent, (square + (1 - square) * stretch).log().squeeze(-1)


@final
class SylvesterFlow(nn.Module):
    r"""Gaussian pushed along all directions at once, triangular variant T-SNF of van den Berg et al. (2018).

    :math:`z_0 \sim N(\mu, \operatorname{diag} \sigma^2)`, then for each layer

    .. math:: z' = z + P R \tanh(\tilde R P^T z + b), \qquad
        \det \partial z' / \partial z = \prod_i \left(1 + (1 - \tanh^2(\cdot)_i)\, r_{ii} \tilde r_{ii}\right)

    by Sylvester's identity (their Theorem 1), with :math:`R, \tilde R` upper triangular and P the identity and the
    reversal of the dimensions by turns, so that :math:`P R P^T` is lower triangular in every other layer. Invertible
    by their Theorem 2, :math:`r_{ii} \tilde r_{ii} > -1`: the diagonals pass through tanh, the inner one times
    :math:`1 - 10^{-3}`. R is the net's, times a learned gain a layer that starts at zero.

    Args:
        net: Returns `(*, SylvesterFlow.width(dims, layers))`: :math:`\mu`, what softplus turns into :math:`\sigma`,
            then for each layer a `(D, D)` matrix row by row, which holds R above and on its diagonal and
            :math:`\tilde R^T` below it, the diagonal of :math:`\tilde R`, and b.
        dims: D.
        layers: Number of maps; from two on, every dimension depends on every other.

    Example:
        >>> from aevb import MLP
        >>> q = SylvesterFlow(MLP(5, [8], SylvesterFlow.width(2, 4)), dims=2, layers=4)
        >>> q(torch.zeros(3, 5)).rsample().shape
        torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module, dims: int, layers: int) -> None:
        super().__init__()
        _check_counts(dims=dims, layers=layers)
        wanted = self.width(dims, layers)
        rule = f"{wanted} = SylvesterFlow.width({dims}, {layers})"
        check_width("SylvesterFlow", net, lambda width: width == wanted, rule)
        self.net, self.dims, self.layers = net, dims, layers
        self.gain = nn.Parameter(torch.zeros(layers))

    @staticmethod
    def width(dims: int, layers: int) -> int:
        """Output width of the net, 2 D + layers (D * D + 2 D)."""
        return 2 * dims + layers * (dims * dims + 2 * dims)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("SylvesterFlow", out, self.width(self.dims, self.layers))
        loc, raw, *layers = out.split([self.dims, self.dims, *[self.dims * (self.dims + 2)] * self.layers], dim=-1)
        steps: list[_Map] = []
        for index, (layer, gain) in enumerate(zip(layers, self.gain, strict=True)):
            rows, inner, b = layer.split([self.dims**2, self.dims, self.dims], dim=-1)
            matrix, inner = rows.unflatten(-1, (self.dims, self.dims)), (1 - _SLOPE) * inner.tanh()
            outer = (gain * matrix.diagonal(dim1=-2, dim2=-1)).tanh()
            out_factor = gain * matrix.triu(1) + torch.diag_embed(outer)
            in_factor = matrix.tril(-1).mT + torch.diag_embed(inner)
            if index % 2:
                out_factor, in_factor = out_factor.mT, in_factor.mT
            steps.append(functools.partial(_sylvester, out_factor, in_factor, outer * inner, b))
        return TransformedNormal(loc, _chain(functools.partial(_scaled, loc, F.softplus(raw)), *steps))


def _sylvester(out_factor: Tensor, in_factor: Tensor, diagonal: Tensor, b: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    # einsum, not @: the product of (N, D, D) and (K, N, D, 1) would copy the matrices K times.
    bent = (torch.einsum("...ij,...j->...i", in_factor, z) + b).tanh()
    log_det = ((1 - bent.square()) * diagonal).log1p().sum(-1)
    return z + torch.einsum("...ij,...j->...i", out_factor, bent), log_det


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
            _chain(functools.partial(_scaled, loc, scale), push),
            _chain(pull, functools.partial(_standardized, loc, scale)),
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
            _chain(push, functools.partial(_scaled, loc, scale)),
            _chain(functools.partial(_standardized, loc, scale), pull),
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
            _chain(away, functools.partial(_scaled, self.loc, self.scale)),
            _chain(functools.partial(_standardized, self.loc, self.scale), towards_noise),
        )


def _log_normal(eps: Tensor) -> Tensor:
    return -0.5 * (eps.square() + _LOG_2PI).sum(-1)


def _chain(*maps: _Map) -> _Map:
    """The maps one after another, their log-determinants added."""

    def through(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(())
        for one in maps:
            x, log_det = one(x)
            total = total + log_det
        return x, total

    return through


def _scaled(loc: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return loc + scale * x, scale.log().sum(-1)


def _standardized(loc: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (x - loc) / scale, -scale.log().sum(-1)


def _heads(owner: str, out: Tensor, dims: int, context: int) -> tuple[Tensor, Tensor, Tensor | None]:
    r""":math:`\mu`, :math:`\sigma` and h, which is None where it has no width."""
    check_out(owner, out, 2 * dims + context)
    loc, raw, h = out.split([dims, dims, context], dim=-1)
    return loc, F.softplus(raw), h if context else None


def _both(transforms: nn.ModuleList, context: Tensor | None) -> tuple[_Map, _Map]:
    """Transforms of zuko given the context, one after another, and the way back."""
    steps = [transform(context) for transform in transforms]
    return _chain(*(step.call_and_ladj for step in steps)), _chain(
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
    _check_counts(dims=dims, transforms=count)
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
    _check_counts(dims=dims)
    if context < 0:
        raise InputError(f"`context` must be at least 0; got {context}. Give the width of h.")
    wanted = 2 * dims + context
    check_width(owner, net, lambda width: width == wanted, f"{wanted} = {owner}.width({dims}, {context})")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"`{name}` must be at least 1; got {count}.")


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
