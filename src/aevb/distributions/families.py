r"""Families of distributions that torch lacks, or whose digits it loses.

A log-mass of counts is a small difference of terms as large as :math:`x \log x`, which is taken in float64 whatever the
dtype of the parameters; the result has their dtype.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor

from aevb.distributions.special import LOG_RANGE, count_term, log_gamma_draw, log_rising, mean_term, positive, softplus

__all__ = [
    "Bernoulli",
    "BetaBinomial",
    "Binomial",
    "DiscretizedLogistic",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()


@final
class Bernoulli(td.Bernoulli):
    r"""torch's own with :math:`\log p(x) = x\, l - \log(1 + e^l)`, elementwise, in half the time.

    Linear in x, so that a relaxed value has its gradient.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        # At torch's own threshold, 20, softplus is 2e-9 too little; past 40 it is l to the last digit of float64.
        log_prob: Tensor = value * self.logits - F.softplus(self.logits, threshold=40.0)
        return log_prob

    def log_prob_of_rows(self, value: Tensor) -> Tensor:
        """Log-mass in nats, summed over the last axis: faster than entry by entry, except in its gradient."""
        # log(1 + e^l) = max(l, 0) + log(1 + e^-|l|), where up to eight factors, each in [1, 2], share one logarithm.
        logits = self.logits
        factors = ((-logits.abs()).exp() + 1).unflatten(-1, (math.gcd(8, logits.shape[-1]), -1)).unbind(-2)
        shared = functools.reduce(torch.mul, factors).log().sum(-1)
        log_prob: Tensor = (value * logits - logits.clamp(min=0)).sum(-1) - shared
        return log_prob


@final
class Binomial(td.Distribution):
    r"""Counts out of n, elementwise; torch's own loses 25 nats over 64 entries at n = 1e6 in float32.

    The terms of :math:`\log \binom{n}{x} + x\, l - n \log(1 + e^l)` are as large as n and cancel. The coefficient has
    no gradient and is taken in float64, on the values' own axes; above n = 1000 the rest is, too.

    Args:
        total_count: n.
        logits: l, `(*batch,)`.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, total_count: int, logits: Tensor) -> None:
        self.total_count, self.logits = total_count, logits
        super().__init__(logits.shape, validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """0, 1, ..., n."""
        return td.constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """Expected count, n pi."""
        return self.total_count * self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        """Spread of the count, n pi (1 - pi)."""
        return self.total_count * self.logits.sigmoid() * (-self.logits).sigmoid()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Binomial:
        """The same over more leading axes."""
        return Binomial(self.total_count, self.logits.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            probs = self.logits.sigmoid().expand(torch.Size(sample_shape) + self.batch_shape)
            return torch.binomial(torch.full_like(probs, self.total_count), probs)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        n, x = self.total_count, value.double()
        coefficient = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        if n > 1000:
            logits = self.logits.double()
            return (coefficient + x * logits - n * softplus(logits)).to(self.logits.dtype)
        return coefficient.to(self.logits.dtype) + (value * self.logits - n * softplus(self.logits))


@final
class BetaBinomial(td.Distribution):
    r"""Counts out of n whose probability is itself drawn from Beta(a, b), elementwise.

    .. math:: p(x) = \binom{n}{x} \frac{B(x + a,\, n - x + b)}{B(a, b)}, \quad a = s \pi, \; b = s (1 - \pi)

    Mean n pi; variance n pi (1 - pi) (s + n) / (s + 1), so that s to infinity is the binomial. torch has none.

    Args:
        total_count: n.
        logits: Of pi, `(*batch,)`.
        log_concentration: log s, `(*batch,)` or what broadcasts to it.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, total_count: int, logits: Tensor, log_concentration: Tensor) -> None:
        self.total_count, self.logits, self.log_concentration = total_count, logits, log_concentration
        super().__init__(torch.broadcast_shapes(logits.shape, log_concentration.shape), validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """0, 1, ..., n."""
        return td.constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        """Expected count, n pi."""
        return (self.total_count * self.logits.sigmoid()).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Spread of the count, n pi (1 - pi) (s + n) / (s + 1)."""
        n, s = self.total_count, positive(self.log_concentration)
        return (self.mean * (-self.logits).sigmoid() * ((s + n) / (s + 1))).to(self.logits.dtype)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> BetaBinomial:
        """The same over more leading axes."""
        return BetaBinomial(self.total_count, self.logits.expand(torch.Size(batch_shape)), self.log_concentration)

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            a, b = (each.expand(torch.Size(sample_shape) + self.batch_shape) for each in self._shapes())
            # The ratio of two gamma draws, from their logs: with small shapes both underflow, and 0 / 0 is no draw.
            probs = (log_gamma_draw(a) - log_gamma_draw(b)).sigmoid()
            return torch.binomial(torch.full_like(probs, self.total_count), probs).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        n, x = self.total_count, value.double()
        a, b = self._shapes()
        coefficient = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
        rising = log_rising(a, x) + log_rising(b, n - x) - log_rising(a + b, n)
        return (coefficient + rising).to(self.logits.dtype)

    def _shapes(self) -> tuple[Tensor, Tensor]:
        log_s, logits = self.log_concentration.double().clamp(*LOG_RANGE), self.logits.double()
        a, b = log_s + F.logsigmoid(logits), log_s + F.logsigmoid(-logits)
        return a.clamp(min=2 * LOG_RANGE[0]).exp(), b.clamp(min=2 * LOG_RANGE[0]).exp()


@final
class Poisson(td.Distribution):
    r"""Counts :math:`p(x) = e^{x l - e^l} / x!`, elementwise; torch's own loses 2e-2 nats at x = 3e4 in float32.

    Args:
        log_rate: l, `(*batch,)`.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count, the rate."""
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        """Spread of the count, the rate again."""
        return self.log_rate.exp()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Poisson:
        """The same over more leading axes."""
        return Poisson(self.log_rate.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            rate = self.log_rate.double().exp().expand(torch.Size(sample_shape) + self.batch_shape)
            return torch.poisson(rate).to(self.log_rate.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        x, log_rate = value.double(), self.log_rate.double()
        return (x * log_rate - log_rate.exp() - torch.lgamma(x + 1)).to(self.log_rate.dtype)


@final
class NegativeBinomial(td.Distribution):
    r"""Counts of mean mu and variance mu + mu^2 / theta, elementwise: Poisson with a rate drawn from a Gamma.

    .. math:: p(x) = \frac{\Gamma(x + \theta)}{\Gamma(\theta)\, x!}
        \left(\frac{\theta}{\theta + \mu}\right)^\theta \left(\frac{\mu}{\theta + \mu}\right)^x

    As in scVI (Lopez et al., 2018); theta to infinity is the Poisson, where this keeps its digits. The terms of torch's
    own are as large as theta log theta: 0.1 nats are lost at theta = 1e6 in float32.

    Args:
        log_mean: log mu, `(*batch,)`.
        log_theta: Log of the inverse dispersion, `(*batch,)` or what broadcasts to it.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, log_theta: Tensor) -> None:
        self.log_mean, self.log_theta = log_mean, log_theta
        super().__init__(torch.broadcast_shapes(log_mean.shape, log_theta.shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count, mu."""
        return self.log_mean.exp().expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Spread of the count, mu + mu^2 / theta."""
        return self.mean + (2 * self.log_mean - self.log_theta).exp()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> NegativeBinomial:
        """The same over more leading axes."""
        return NegativeBinomial(self.log_mean.expand(torch.Size(batch_shape)), self.log_theta)

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            theta = positive(self.log_theta)
            gamma = log_gamma_draw(theta.expand(torch.Size(sample_shape) + self.batch_shape))
            return torch.poisson((gamma + self.log_mean.double() - theta.log()).exp()).to(self.log_mean.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        log_theta = self.log_theta.clamp(*LOG_RANGE)
        if torch.compiler.is_compiling():  # no graph has a shape that hangs on values
            return (count_term(log_theta, value) + mean_term(self.log_mean, log_theta, value)).to(self.log_mean.dtype)
        # Most counts are often zero, where one term is left; the others are looked at where counts are not, and what
        # does not depend on the mean not once for every draw.
        ratio = self.log_mean.double() - log_theta.double()
        zero = (-log_theta.double().exp() * softplus(ratio)).to(self.log_mean.dtype)
        rows = torch.broadcast_shapes(log_theta.shape, value.shape)
        at = (value.expand(rows) != 0).nonzero(as_tuple=True)
        found = count_term(log_theta.expand(rows)[at], value.expand(rows)[at])
        rising = torch.zeros(rows, dtype=found.dtype, device=value.device).index_put(at, found)
        shape = torch.broadcast_shapes(zero.shape, rows)
        at = at if shape == rows else (value.expand(shape) != 0).nonzero(as_tuple=True)
        mean, dispersion, x = (each.expand(shape)[at] for each in (self.log_mean, log_theta, value))
        rest = rising.expand(shape)[at] + mean_term(mean, dispersion, x)
        return zero.expand(shape).index_put(at, rest.to(zero.dtype))


@final
class ZeroInflatedNegativeBinomial(td.Distribution):
    r"""Zero with probability pi, else a draw of the negative binomial, elementwise.

    .. math:: p(x) = \pi [x = 0] + (1 - \pi)\, \mathrm{NB}(x;\, \mu, \theta)

    Args:
        log_mean: log mu, of the negative binomial alone, `(*batch,)`.
        log_theta: Log of its inverse dispersion, `(*batch,)` or what broadcasts to it.
        zero_logits: Of pi, `(*batch,)`.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> None:
        self.counts, self.zero_logits = NegativeBinomial(log_mean, log_theta), zero_logits
        super().__init__(torch.broadcast_shapes(self.counts.batch_shape, zero_logits.shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count, (1 - pi) mu."""
        return (-self.zero_logits).sigmoid() * self.counts.mean

    @property
    def variance(self) -> Tensor:
        """Spread of the count, (1 - pi) (mu + mu^2 / theta + pi mu^2)."""
        between = self.zero_logits.sigmoid() * self.counts.mean.square()
        return (-self.zero_logits).sigmoid() * (self.counts.variance + between)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> ZeroInflatedNegativeBinomial:
        """The same over more leading axes."""
        counts = self.counts.expand(batch_shape)
        zero_logits = self.zero_logits.expand(torch.Size(batch_shape))
        return ZeroInflatedNegativeBinomial(counts.log_mean, counts.log_theta, zero_logits)

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Counts `(*sample_shape, *batch)`."""
        with torch.no_grad():
            counts = self.counts.expand(self.batch_shape).sample(sample_shape)
            return torch.where(torch.rand_like(counts) < self.zero_logits.sigmoid(), 0.0, counts)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        counts = F.logsigmoid(-self.zero_logits) + self.counts.log_prob(value)
        # Both arguments are finite everywhere, so the branch that is not taken leaves no NaN in the gradient.
        return torch.where(value == 0, torch.logaddexp(F.logsigmoid(self.zero_logits), counts), counts)


@final
class StudentT(td.Distribution):
    r"""Student's t, elementwise; torch's own checks its parameters whatever it is told, which reads them back.

    .. math:: p(x) = \frac{\Gamma(\frac{\nu + 1}{2})}{\Gamma(\frac{\nu}{2}) \sqrt{\pi \nu}\, \sigma}
        \left(1 + \frac{(x - m)^2}{\nu \sigma^2}\right)^{-\frac{\nu + 1}{2}}

    Args:
        df: Degrees of freedom nu > 0, `(*batch,)` or what broadcasts to it.
        loc: m, `(*batch,)`.
        scale: sigma > 0, `(*batch,)` or what broadcasts to it; not the standard deviation.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.real
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        super().__init__(torch.broadcast_shapes(df.shape, loc.shape, scale.shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location m; NaN where nu <= 1, which has no mean."""
        return torch.where(self.df > 1, self.loc, torch.nan).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """sigma^2 nu / (nu - 2); infinite where nu <= 2, NaN where nu <= 1."""
        finite = self.scale.square() * self.df / (self.df - 2)
        variance = torch.where(self.df > 2, finite, torch.where(self.df > 1, torch.inf, torch.nan))
        return variance.expand(self.batch_shape)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> StudentT:
        """The same over more leading axes."""
        return StudentT(self.df, self.loc.expand(torch.Size(batch_shape)), self.scale)

    def rsample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Differentiable draws `(*sample_shape, *batch)`: a Gaussian over the root of a chi-squared by its nu."""
        shape = torch.Size(sample_shape) + self.batch_shape
        half = (0.5 * self.df).expand(shape)
        precision = td.Gamma(half, half, validate_args=False).rsample()
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * eps * precision.rsqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, elementwise."""
        df = self.df.double()  # on its own axes, where two terms of size nu log nu cancel
        constant = (log_rising(0.5 * df, 0.5) - 0.5 * (math.pi * df).log()).to(self.df.dtype)
        square = ((value - self.loc) / self.scale).square()
        return constant - self.scale.log() - 0.5 * (self.df + 1) * torch.log1p(square / self.df)


@final
class DiscretizedLogistic(td.Distribution):
    r"""Levels 0, ..., L - 1: a mixture of M logistics rounded to whole numbers, elementwise (Salimans et al., 2017).

    .. math:: p(x) = \sum_m w_m [F(u_m) - F(v_m)], \quad u_m = \frac{x + ½ - \mu_m}{s_m}, \;
        v_m = \frac{x - ½ - \mu_m}{s_m}, \; F(u) = \frac{1}{1 + e^{-u}}

    The lowest level also takes the mass below it, the highest that above. Since
    :math:`F(u) - F(v) = F(u) F(-v) (1 - e^{v - u})`, nothing cancels and no tail needs a floor.

    Args:
        loc: mu in levels, `(*batch, M)`.
        scale: s in levels, above 0, `(*batch, M)`.
        logits: Of the weights w, `(*batch, M)`, normalised here.
        levels: L.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor, levels: int) -> None:
        self.loc, self.scale, self.logits, self.levels = loc, scale, logits.log_softmax(-1), levels
        super().__init__(loc.shape[:-1], validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """0, 1, ..., L - 1."""
        return td.constraints.integer_interval(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """Expected level, the sum of P(X >= k) over k; costs a pass a level."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Spread of the level; costs a pass a level."""
        mean, square = self._moments()
        return square - mean.square()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> DiscretizedLogistic:
        """The same over more leading axes."""
        shape = torch.Size(batch_shape) + self.loc.shape[-1:]
        return DiscretizedLogistic(
            self.loc.expand(shape), self.scale.expand(shape), self.logits.expand(shape), self.levels
        )

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Levels `(*sample_shape, *batch)`."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.loc.shape
            gumbel = -torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).exponential_().log()
            component = (self.logits + gumbel).argmax(-1, keepdim=True)
            loc, scale = (each.expand(shape).gather(-1, component).squeeze(-1) for each in (self.loc, self.scale))
            u = torch.rand_like(loc)
            return (loc + scale * (u.log() - (-u).log1p())).round().clamp(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        x = value.unsqueeze(-1)
        lowest, highest = x == 0, x == self.levels - 1
        # x + 1/2 has no rounding: the end of a level is to the last digit the start of the next.
        below_upper = torch.where(highest, 0.0, F.logsigmoid(((x + 0.5) - self.loc) / self.scale))
        above_lower = torch.where(lowest, 0.0, F.logsigmoid((self.loc - (x - 0.5)) / self.scale))
        width = torch.where(lowest | highest, 0.0, (-torch.expm1(-1 / self.scale)).log())
        return (self.logits + below_upper + above_lower + width).logsumexp(-1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """E X = sum over k >= 1 of P(X >= k), E X^2 that of (2 k - 1) P(X >= k)."""
        mean = square = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            above = ((self.loc - (k - 0.5)) / self.scale).sigmoid()
            mean, square = mean + above, square + (2 * k - 1) * above
        weights = self.logits.exp()
        return (weights * mean).sum(-1), (weights * square).sum(-1)
