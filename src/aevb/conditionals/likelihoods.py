"""Likelihoods of observed data, normalised in the units of the data."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb import distributions
from aevb.conditionals.form import check_out, check_width, independent
from aevb.config import InputError

__all__ = [
    "Bernoulli",
    "BetaBinomial",
    "Binomial",
    "DiscretizedLogistic",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]


class _InUnits(nn.Module):
    """A location and a learned scale for each entry: the net works on standardised values, the result is in x's units.

    The arguments are those of `Normal`.
    """

    loc: Tensor
    scale: Tensor
    floor: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        dims: int,
        noise: str = "dimension",
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        floor: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        _check_per("noise", noise)
        self._owner, wanted = type(self).__name__, 2 * dims if noise == "datum" else dims
        check_width(self._owner, net, lambda width: width == wanted, f"{wanted} for D = {dims} and noise={noise!r}")
        self.net, self.dims, self.noise, self._width = net, dims, noise, wanted
        self.register_buffer("loc", torch.as_tensor(loc, dtype=torch.get_default_dtype()).expand(dims).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.get_default_dtype()).expand(dims).clone())
        if not bool((self.scale > 0).all()):
            raise InputError("`scale` must be above 0 in every dimension; drop constant columns, or give them a scale.")
        least = None if floor is None else torch.as_tensor(floor, dtype=torch.get_default_dtype()).expand(dims).clone()
        if least is not None and not bool(((least >= 0) & least.isfinite()).all()):
            raise InputError("`floor` must be finite and at least 0 in every dimension; give 0 where there is none.")
        self.register_buffer("floor", least)  # None is no entry of the state: models without a floor save as ever
        if noise != "datum":
            self.raw_noise = nn.Parameter(torch.zeros(1 if noise == "global" else dims))

    def _loc_and_scale(self, *parents: Tensor) -> tuple[Tensor, Tensor]:
        """Both `(*, D)`, in the units of x."""
        out = self.net(*parents)
        check_out(self._owner, out, self._width)
        mean, raw = out.chunk(2, dim=-1) if self.noise == "datum" else (out, self.raw_noise)
        sigma = F.softplus(raw) if self.floor is None else self.floor + F.softplus(raw)
        return self.loc + self.scale * mean, (self.scale * sigma).expand_as(mean)


@final
class Normal(_InUnits):
    r"""Gaussian likelihood with learned noise, in the units of the data.

    :math:`p(x | a) = \prod_j N(x_j;\, m_j + s_j \mu_j(a),\, (s_j \sigma_j)^2)`: the net works on standardised values,
    the density is that of x itself (the Jacobian :math:`-\sum_j \log s_j` is part of it).

    Args:
        net: Returns :math:`\mu`, `(*, D)`; with `noise="datum"` also what softplus turns into :math:`\sigma`,
            `(*, 2 D)`.
        dims: D.
        noise: One learned :math:`\sigma` ("global"), one per dimension ("dimension"), or from the net ("datum").
        loc: m, the centre of the data; a number or `(D,)`.
        scale: s > 0, the spread of the data; a number or `(D,)`.
        floor: Least :math:`\sigma`, in units of s, to which what is learned adds; a number or `(D,)`, none if None. On
            values rounded to steps of h a net can be right to the last digit, and a density without a floor then
            grows without limit: :math:`h / (s \sqrt{12})` is the spread that rounding itself has.

    Example:
        >>> from aevb import MLP
        >>> Normal(MLP(2, [8], 3), 3)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(td.Normal(*self._loc_and_scale(*parents), validate_args=False))


@final
class StudentT(_InUnits):
    r"""Student's t with learned noise and tails, in the units of the data: outliers cost a logarithm, not a square.

    :math:`p(x | a) = \prod_j t_{\nu_j}\big((x_j - m_j - s_j \mu_j(a)) / (s_j \sigma_j)\big) / (s_j \sigma_j)`. Each
    dimension learns its degrees of freedom :math:`\nu_j = 1 + \operatorname{softplus}(\cdot)`, which start at 5: above
    1, so that the mean exists, of which reconstructions and imputations are made; at 2 and below the variance does not.

    Args:
        net: Returns :math:`\mu`, `(*, D)`; with `noise="datum"` also what softplus turns into :math:`\sigma`,
            `(*, 2 D)`.
        dims: D.
        noise: One learned :math:`\sigma` ("global"), one per dimension ("dimension"), or from the net ("datum"); a
            scale, smaller than the standard deviation.
        loc: m, the centre of the data; a number or `(D,)`.
        scale: s > 0, the spread of the data; a number or `(D,)`.
        floor: Least :math:`\sigma`, in units of s, as for `Normal`.

    Example:
        >>> from aevb import MLP
        >>> StudentT(MLP(2, [8], 3), 3)(torch.zeros(5, 2)).log_prob(torch.full((5, 3), 1e6)).isfinite().all().item()
        True
    """

    def __init__(
        self,
        net: nn.Module,
        dims: int,
        noise: str = "dimension",
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        floor: Tensor | float | None = None,
    ) -> None:
        super().__init__(net, dims, noise, loc, scale, floor)
        self.raw_df = nn.Parameter(torch.full((dims,), math.log(math.expm1(4.0))))

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.StudentT(1 + F.softplus(self.raw_df), *self._loc_and_scale(*parents)))


@final
class Bernoulli(nn.Module):
    r"""Independent binary entries, :math:`\prod_j \pi_j^{x_j} (1 - \pi_j)^{1 - x_j}`.

    Args:
        net: Returns the logits, `(*, D)`.

    Example:
        >>> from aevb import MLP
        >>> Bernoulli(MLP(50, [200], 784))(torch.zeros(3, 50)).event_shape
        torch.Size([784])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.Bernoulli(logits=self.net(*parents), validate_args=False))


@final
class Binomial(nn.Module):
    r"""Independent counts out of n, :math:`\prod_j \binom{n}{x_j} \pi_j^{x_j} (1 - \pi_j)^{n - x_j}`.

    Args:
        net: Returns the logits of :math:`\pi`, `(*, D)`.
        total_count: n.

    Example:
        >>> from aevb import MLP
        >>> Binomial(MLP(32, [200], 64), 16)(torch.zeros(3, 32)).event_shape
        torch.Size([64])
    """

    def __init__(self, net: nn.Module, total_count: int) -> None:
        super().__init__()
        if total_count < 1:
            raise InputError(f"`total_count` must be at least 1; got {total_count}. Give the largest possible count.")
        self.net, self.total_count = net, total_count

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.Binomial(self.total_count, self.net(*parents)))


@final
class BetaBinomial(nn.Module):
    r"""Independent counts out of n whose probabilities vary more than a binomial's.

    .. math:: p(x | a) = \prod_j \binom{n}{x_j} \frac{B(x_j + s_j \pi_j,\, n - x_j + s_j (1 - \pi_j))}
        {B(s_j \pi_j,\, s_j (1 - \pi_j))}

    The mean count is :math:`n \pi_j`; its variance is :math:`(s_j + n) / (s_j + 1)` times the binomial's.

    Args:
        net: Returns `(*, 2 D)`: the logits of :math:`\pi`, then :math:`\log s`. Not through softplus: concentrations
            span orders of magnitude, and the density's gradient in their log is bounded by the counts.
        total_count: n.

    Example:
        >>> from aevb import MLP
        >>> BetaBinomial(MLP(32, [200], 2 * 64), 16)(torch.zeros(3, 32)).event_shape
        torch.Size([64])
    """

    def __init__(self, net: nn.Module, total_count: int) -> None:
        super().__init__()
        if total_count < 1:
            raise InputError(f"`total_count` must be at least 1; got {total_count}. Give the largest possible count.")
        _check_heads("BetaBinomial", net, 2, "logits and log s")
        self.net, self.total_count = net, total_count

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        logits, log_concentration = _heads("BetaBinomial", self.net(*parents), 2)
        return independent(distributions.BetaBinomial(self.total_count, logits, log_concentration))


@final
class Poisson(nn.Module):
    r"""Independent counts without a largest, :math:`\prod_j \lambda_j^{x_j} e^{-\lambda_j} / x_j!`.

    The link is the logarithm, as in log-linear models: factors act by multiplication, whatever the size of the counts.
    A rate above e^88 overflows in float32.

    Args:
        net: Returns :math:`\log \lambda`, `(*, D)`.

    Example:
        >>> from aevb import MLP
        >>> Poisson(MLP(4, [8], 10))(torch.zeros(3, 4)).log_prob(torch.ones(3, 10)).shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.Poisson(self.net(*parents)))


class _Dispersed(nn.Module):
    """Negative binomials: `heads` outputs of the net for each entry, and the log of the inverse dispersion."""

    def __init__(self, net: nn.Module, dims: int, dispersion: str, heads: int, library: bool) -> None:
        super().__init__()
        _check_per("dispersion", dispersion)
        self._heads = heads + 1 if dispersion == "datum" else heads
        self._owner, wanted = type(self).__name__, self._heads * dims
        rule = f"{wanted} for D = {dims} and dispersion={dispersion!r}"
        check_width(self._owner, net, lambda width: width == wanted, rule)
        self.net, self.dims, self.dispersion, self.library = net, dims, dispersion, library
        if dispersion != "datum":
            self.log_theta = nn.Parameter(torch.zeros(1 if dispersion == "global" else dims))

    def _parts(self, *parents: Tensor) -> list[Tensor]:
        """Log mu, log theta, and what else the net gives, `(*, D)` each but log theta, which broadcasts to it."""
        if self.library and (len(parents) < 2 or parents[-1].shape[-1] != 1):
            raise InputError(
                f"{self._owner} takes the log of the library size, (*, 1), as its last parent; got shapes "
                f"{', '.join(str(tuple(parent.shape)) for parent in parents)}. Name it last in the key, or drop "
                "`library`."
            )
        out = self.net(*(parents[:-1] if self.library else parents))
        check_out(self._owner, out, self._heads * self.dims)
        parts = list(out.split(self.dims, dim=-1))
        if self.library:
            parts[0] = parts[0].log_softmax(-1) + parents[-1]
        return parts if self.dispersion == "datum" else [parts[0], self.log_theta, *parts[1:]]


@final
class NegativeBinomial(_Dispersed):
    r"""Independent counts of mean :math:`\mu_j` and variance :math:`\mu_j + \mu_j^2 / \theta_j`, as in scVI.

    .. math:: p(x | a) = \prod_j \frac{\Gamma(x_j + \theta_j)}{\Gamma(\theta_j)\, x_j!}
        \Big(\frac{\theta_j}{\theta_j + \mu_j}\Big)^{\theta_j} \Big(\frac{\mu_j}{\theta_j + \mu_j}\Big)^{x_j}

    Source: Lopez et al. (2018). :math:`\theta`, the inverse dispersion, starts at 1; at infinity this is the Poisson.

    Args:
        net: Returns :math:`\log \mu`, `(*, D)`; with `dispersion="datum"` also :math:`\log \theta`, `(*, 2 D)`.
        dims: D.
        dispersion: One learned :math:`\theta` ("global"), one per dimension ("dimension"), or from the net ("datum").
        library: Let the last parent be :math:`\log l`, `(*, 1)`, of the library size l, and
            :math:`\mu = l \operatorname{softmax}(\cdot)` of what the net makes of the other parents.

    Example:
        >>> from aevb import MLP
        >>> NegativeBinomial(MLP(4, [8], 10), 10)(torch.zeros(3, 4)).log_prob(torch.ones(3, 10)).shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, dims: int, dispersion: str = "dimension", *, library: bool = False) -> None:
        super().__init__(net, dims, dispersion, 1, library)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.NegativeBinomial(*self._parts(*parents)))


@final
class ZeroInflatedNegativeBinomial(_Dispersed):
    r"""Independent counts with more zeros than a negative binomial has.

    .. math:: p(x | a) = \prod_j \big(\pi_j [x_j = 0] + (1 - \pi_j) \mathrm{NB}(x_j;\, \mu_j, \theta_j)\big)

    Source: Lopez et al. (2018), where :math:`\pi` is the probability of a dropout. :math:`\mu` and :math:`\theta` are
    those of the negative binomial alone; the mean count is :math:`(1 - \pi_j) \mu_j`.

    Args:
        net: Returns :math:`\log \mu`, then the logits of :math:`\pi`, `(*, 2 D)`; with `dispersion="datum"`
            :math:`\log \theta` between them, `(*, 3 D)`.
        dims: D.
        dispersion: One learned :math:`\theta` ("global"), one per dimension ("dimension"), or from the net ("datum").
        library: Let the last parent be :math:`\log l`, `(*, 1)`, of the library size l, and
            :math:`\mu = l \operatorname{softmax}(\cdot)` of what the net makes of the other parents.

    Example:
        >>> from aevb import MLP
        >>> net = MLP(4, [8], 2 * 10)
        >>> ZeroInflatedNegativeBinomial(net, 10)(torch.zeros(3, 4)).log_prob(torch.zeros(3, 10)).shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, dims: int, dispersion: str = "dimension", *, library: bool = False) -> None:
        super().__init__(net, dims, dispersion, 2, library)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        return independent(distributions.ZeroInflatedNegativeBinomial(*self._parts(*parents)))


@final
class DiscretizedLogistic(nn.Module):
    r"""Independent entries in 0, 1, ..., L - 1, as the bytes of an image: logistics rounded to whole levels.

    .. math:: p(x | a) = \prod_j \sum_m w_{jm} \Big[F\Big(\frac{x_j + ½ - \mu_{jm}}{s_{jm}}\Big)
        - F\Big(\frac{x_j - ½ - \mu_{jm}}{s_{jm}}\Big)\Big], \quad F(u) = \frac{1}{1 + e^{-u}}

    Source: Salimans et al. (2017), section 2.1. The end levels take the tails beyond them. x is in levels; the net
    works on a scale on which level 0 is -1 and level L - 1 is 1.

    Args:
        net: Returns locations, then what softplus turns into scales, `(*, 2 D)`; with M > 1 components `(*, 3 D M)`,
            the logits of the weights last, entry by entry, component by component.
        levels: L.
        components: M.

    Example:
        >>> from aevb import MLP
        >>> bits = DiscretizedLogistic(MLP(4, [8], 2 * 64))(torch.zeros(3, 4))
        >>> bits.log_prob(torch.full((3, 64), 255.0)).shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, levels: int = 256, components: int = 1) -> None:
        super().__init__()
        if levels < 2:
            raise InputError(f"`levels` must be at least 2; got {levels}. Give the largest level plus one.")
        if components < 1:
            raise InputError(f"`components` must be at least 1; got {components}. Give the logistics of each mixture.")
        self._heads, told = (2, "locations, scales") if components == 1 else (3, "locations, scales, logits of weights")
        _check_heads("DiscretizedLogistic", net, self._heads, told, components)
        self.net, self.levels, self.components = net, levels, components

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        parts = _heads("DiscretizedLogistic", self.net(*parents), self._heads, self.components)
        loc, raw, *rest = (part.unflatten(-1, (-1, self.components)) for part in parts)
        half = 0.5 * (self.levels - 1)
        # A two-hundredth of a level is added: finer scales tell no two levels apart, but overflow on the way.
        scale = half * F.softplus(raw) + 0.005
        logits = rest[0] if rest else torch.zeros_like(loc)
        return independent(distributions.DiscretizedLogistic(half * (1 + loc), scale, logits, self.levels))


def _check_per(name: str, choice: str) -> None:
    if choice not in ("global", "dimension", "datum"):
        raise InputError(f"`{name}` must be one of global, dimension, datum; got {choice!r}.")


def _check_heads(owner: str, net: nn.Module, heads: int, told: str, components: int = 1) -> None:
    """As `check_width`, where D is known from the net alone."""
    rule = f"{heads} D, {told}" if components == 1 else f"{heads} D times {components} components, {told}"
    check_width(owner, net, lambda width: width > 0 and width % (heads * components) == 0, rule)


def _heads(owner: str, out: Tensor, heads: int, components: int = 1) -> tuple[Tensor, ...]:
    """The net's output in `heads` parts, `(*, D * components)` each."""
    unit = heads * components
    check_out(owner, out, max(unit, out.shape[-1] // unit * unit))
    return out.chunk(heads, dim=-1)
