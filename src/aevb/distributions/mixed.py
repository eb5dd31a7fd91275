r"""Rows of a table whose columns are of different kinds: entries that are independent, each of its own family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
import torch.distributions as td
from torch import Tensor

__all__ = ["Codes", "LogNormal", "Mixed", "Together"]

_Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()


@final
class Codes(td.Distribution):
    r"""One of C classes as its code 0, ..., C - 1, elementwise, :math:`\log p(c) = \log \pi_c`.

    Args:
        logits: Of :math:`\pi`, `(*batch, C)`, normalised here.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """0, ..., C - 1."""
        return td.constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @property
    def probs(self) -> Tensor:
        """Of each class, `(*batch, C)`."""
        return self.logits.exp()

    @property
    def mean(self) -> Tensor:
        """Of the code as a number; says little where the order of codes does."""
        return self.probs @ self._codes

    @property
    def variance(self) -> Tensor:
        """Of the code as a number."""
        return self.probs @ self._codes.square() - self.mean.square()

    @property
    def _codes(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Codes:
        """The same over more leading axes."""
        return Codes(self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]))

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Codes `(*sample_shape, *batch)`: the largest of the logits with Gumbel noise."""
        with torch.no_grad():
            logits = self.logits.expand(torch.Size(sample_shape) + self.logits.shape)
            return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1).to(logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, elementwise."""
        lead = torch.broadcast_shapes(value.shape, self.batch_shape)
        logits = self.logits.expand(lead + self.logits.shape[-1:])
        return logits.gather(-1, value.expand(lead).long().unsqueeze(-1)).squeeze(-1)


@final
class LogNormal(td.Distribution):
    r"""Positive values whose logarithm is Gaussian, elementwise; its Jacobian :math:`-\log x` is part of the density.

    .. math:: \log p(x) = \log N(\log x;\, m, s^2) - \log x

    Args:
        loc: m, `(*batch,)`.
        scale: s, `(*batch,)`.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}
    support = td.constraints.positive

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.log = td.Normal(loc, scale, validate_args=False)
        super().__init__(self.log.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """exp(m + s^2 / 2)."""
        return (self.log.loc + 0.5 * self.log.scale.square()).exp()

    @property
    def variance(self) -> Tensor:
        """(exp(s^2) - 1) exp(2 m + s^2)."""
        return torch.expm1(self.log.scale.square()) * self.mean.square()

    def expand(self, batch_shape: _Shape, _instance: object = None) -> LogNormal:
        """The same over more leading axes."""
        shape = torch.Size(batch_shape)
        return LogNormal(self.log.loc.expand(shape), self.log.scale.expand(shape))

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Positive values `(*sample_shape, *batch)`."""
        return self.bounded(self.log.sample(torch.Size(sample_shape)).exp())

    def bounded(self, value: Tensor) -> Tensor:
        """A draw that overflows, or vanishes, would leave the support."""
        return value.clamp(torch.finfo(value.dtype).tiny, torch.finfo(value.dtype).max)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, elementwise."""
        log = value.log()
        log_prob: Tensor = self.log.log_prob(log) - log
        return log_prob


@dataclass(frozen=True)
class Together:
    """Columns of one family, whose parameters are computed together."""

    at: Tensor  # (M,) int64, their positions in the table
    family: td.Distribution  # elementwise, batch shape (*, M)
    lowest: int = 0  # what is added to the family's values


@final
class Mixed(td.Distribution):
    r"""Entries of a row, each of its column's family, elementwise: :math:`\log p(x_j) ` in the units of column j.

    Args:
        parts: The families; together they hold every position once.
        filler: A value inside the support of each column, `(P,)`.
        order: Where each column stands among the parts, one after another, `(P,)` int64.
        kinds: What each column is called.
    """

    arg_constraints: ClassVar[dict[str, td.constraints.Constraint]] = {}

    def __init__(self, parts: Sequence[Together], filler: Tensor, order: Tensor, kinds: tuple[str, ...]) -> None:
        self.parts, self.filler, self.order, self.kinds = tuple(parts), filler, order, kinds
        super().__init__(parts[0].family.batch_shape[:-1] + filler.shape, validate_args=False)

    @property
    def support(self) -> td.constraints.Constraint:
        """That of each column."""
        return _Supports(self)

    @property
    def mean(self) -> Tensor:
        """Expected entries; of a category, that of its code, for which `states` is the better answer."""
        return self.in_order([part.family.mean + part.lowest for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """Of each entry; of a category, that of its code."""
        return self.in_order([part.family.variance for part in self.parts])

    @property
    def states(self) -> dict[int, Tensor]:
        """Probabilities of its categories, `(*batch, C)`, by the position of each column that has them."""
        return {
            int(j): part.family.probs[..., i, :]
            for part in self.parts
            if isinstance(part.family, Codes)
            for i, j in enumerate(part.at.tolist())
            if self.kinds[j].startswith("categorical")  # the codes of an ordinal column are numbers
        }

    def expand(self, batch_shape: _Shape, _instance: object = None) -> Mixed:
        """The same over more leading axes."""
        lead = torch.Size(batch_shape)[:-1]
        parts = [replace(part, family=part.family.expand(lead + part.at.shape)) for part in self.parts]
        return Mixed(parts, self.filler, self.order, self.kinds)

    def sample(self, sample_shape: _Shape = _NO_SHAPE) -> Tensor:
        """Entries `(*sample_shape, *batch)`."""
        with torch.no_grad():
            return self.in_order([part.family.sample(torch.Size(sample_shape)) + part.lowest for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density or log-mass of each entry in nats."""
        return self.in_order(
            [part.family.log_prob(value.index_select(-1, part.at) - part.lowest) for part in self.parts]
        )

    def in_order(self, found: list[Tensor]) -> Tensor:
        """What was found of the entries of each part, `(*, M)`, as one of all entries, `(*, P)`."""
        lead = torch.broadcast_shapes(*(each.shape[:-1] for each in found))
        joined = torch.cat([each.expand(lead + each.shape[-1:]) for each in found], -1)
        return joined.index_select(-1, self.order)


class _Supports(td.constraints.Constraint):
    """Each column's own support."""

    def __init__(self, d: Mixed) -> None:
        self.d, self.filler = d, d.filler
        self.is_discrete = all(part.family.support.is_discrete for part in d.parts)  # type: ignore[union-attr]
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is inside."""
        d = self.d
        return d.in_order(
            [
                part.family.support.check(value.index_select(-1, part.at) - part.lowest)  # type: ignore[union-attr]
                for part in d.parts
            ]
        )
