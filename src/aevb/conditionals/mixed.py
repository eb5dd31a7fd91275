r"""The likelihood of a table's row: one family for each column, by what the column holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb import distributions
from aevb.conditionals.form import check_out, check_width, independent
from aevb.config import InputError, Kind
from aevb.distributions import Codes, LogNormal, Together

__all__ = ["Mixed", "log_levels"]


@final
class Mixed(nn.Module):
    r"""Columns of different kinds, independent given the parents: :math:`\prod_j p_j(x_j | a)`.

    Each factor is normalised in the units of its column, and nothing but these likelihoods balances one column against
    another. By kind, with :math:`u_j` what the net says of column j:

    - `binary`: Bernoulli, :math:`u_j` its logit.
    - `categorical:C`: codes 0, ..., C - 1, :math:`u_j` the C logits.
    - `ordinal:LOW:HIGH`: :math:`p_j(k) \propto e^{b_{jk}} \ell_j(k)`, a logistic rounded to whole numbers,
      :math:`u_j` its location and scale (see `DiscretizedLogistic`), times a learned weight of each level, since
      answers heap: forty hours, round ages. A mass: unlike a density it cannot grow without limit on repeated values.
    - `count`: zero-inflated negative binomial, :math:`u_j = (\log \mu_j, \operatorname{logit} \pi_j)`, with a learned
      inverse dispersion; it comes near the Poisson where the counts do, and needs no largest count.
    - `continuous`: :math:`N(m_j + s_j u_j,\, \sigma_j^2)`, :math:`\sigma_j = r_j + s_j \operatorname{softplus}(\rho_j)`
      with a learned :math:`\rho_j`. The floor :math:`r_j`, the column's resolution, is the step of its values: with
      :math:`\sigma_j \ge r_j` a value's density times its step stays below 0.4, so that columns with ties cannot buy
      likelihood by narrowing onto them.
    - `positive`: the same for :math:`\log x_j`, with its Jacobian :math:`-\log x_j`; m, s and r are those of the logs.

    Args:
        net: Returns what tells the entries, column by column, `(*, Mixed.width(kinds))`.
        kinds: What each of the P columns holds.
        loc: m, for continuous and positive columns; a number or `(P,)`, of which other columns' entries are not used.
        scale: s > 0, likewise.
        resolution: r >= 0, likewise.
        heaps: First b by the position of ordinal columns, `(levels,)` each; zeros where none is given.

    Values are `(N, P)`, one number a column, categories as codes, NaN for missing: a missing entry is integrated out
    exactly, by leaving its factor out.

    Example:
        >>> from aevb import MLP
        >>> kinds = ("binary", "categorical:3", "positive")
        >>> likelihood = Mixed(MLP(2, [8], Mixed.width(kinds)), kinds)
        >>> likelihood(torch.zeros(5, 2)).log_prob(torch.tensor([1.0, 2.0, 0.5])).shape
        torch.Size([5])
    """

    loc: Tensor
    scale: Tensor
    resolution: Tensor
    filler: Tensor
    order: Tensor

    def __init__(
        self,
        net: nn.Module,
        kinds: Sequence[str],
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        resolution: Tensor | float = 0.0,
        heaps: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        parsed = [Kind.parse(kind) for kind in kinds]
        wanted = self.width(kinds)
        check_width("Mixed", net, lambda width: width == wanted, f"{wanted}, what its {len(parsed)} kinds take")
        self.net, self._width = net, wanted
        dtype = torch.get_default_dtype()
        for name, value in (("loc", loc), ("scale", scale), ("resolution", resolution)):
            self.register_buffer(name, torch.as_tensor(value, dtype=dtype).expand(len(parsed)).clone())
        if not bool((self.scale > 0).all() and (self.resolution >= 0).all()):
            raise InputError(
                "`scale` must be above 0 and `resolution` not below 0 in every column; drop constant columns."
            )
        # Columns that differ in nothing but their parameters are computed together.
        groups: dict[Kind, list[int]] = {}
        for j, kind in enumerate(parsed):
            groups.setdefault(kind, []).append(j)
        starts = torch.tensor([0, *(kind.heads for kind in parsed)]).cumsum(0)
        self._groups = tuple(groups)
        for i, (kind, at) in enumerate(groups.items()):
            heads = starts[at].unsqueeze(-1) + torch.arange(kind.heads)
            self.register_buffer(f"_at_{i}", torch.tensor(at), persistent=False)  # (M,) columns
            self.register_buffer(f"_heads_{i}", heads.flatten(), persistent=False)  # (M * heads,) of the net's output
            if kind.name == "ordinal":
                given = [(heaps or {}).get(j, torch.zeros(kind.values)) for j in at]
                self.register_parameter(f"heap_{i}", nn.Parameter(torch.stack(given).to(dtype)))
        order = torch.tensor([j for at in groups.values() for j in at]).argsort()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("_low", torch.tensor([float(kind.low) for kind in parsed], dtype=dtype), persistent=False)
        # One learned number for each column whose family has a spread that the net does not tell.
        real, counts = (sum(kind.name in names for kind in parsed) for names in (_REAL, ("count",)))
        if real:
            self.raw_noise = nn.Parameter(torch.zeros(real))
        if counts:
            self.log_theta = nn.Parameter(torch.zeros(counts))

    @staticmethod
    def width(kinds: Sequence[str]) -> int:
        """Outputs that the net needs."""
        return sum(Kind.parse(kind).heads for kind in kinds)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each."""
        out = self.net(*parents)
        check_out("Mixed", out, self._width)
        family: td.Distribution
        parts, first = [], 0
        for i, kind in enumerate(self._groups):
            at: Tensor = getattr(self, f"_at_{i}")
            heads = out.index_select(-1, getattr(self, f"_heads_{i}")).unflatten(-1, (len(at), kind.heads))
            if kind.name in _REAL:
                raw, scale = self.raw_noise[first : first + len(at)], self.scale[at]
                first += len(at)
                loc = self.loc[at] + scale * heads[..., 0]
                sigma = (self.resolution[at] + scale * F.softplus(raw)).expand_as(loc)
                real = kind.name == "continuous"
                family = td.Normal(loc, sigma, validate_args=False) if real else LogNormal(loc, sigma)
            elif kind.name == "count":
                family = distributions.ZeroInflatedNegativeBinomial(heads[..., 0], self.log_theta, heads[..., 1])
            elif kind.name == "ordinal":
                family = Codes(getattr(self, f"heap_{i}") + log_levels(kind, heads))
            else:
                family = Codes(heads) if kind.name == "categorical" else _binary(heads)
            parts.append(Together(at, family, kind.low))
        return independent(distributions.Mixed(parts, self._filler(), self.order, self.kinds))

    def _filler(self) -> Tensor:
        """The centre of a real column, since a value far from it would overflow; elsewhere the lowest value."""
        filler: Tensor = self._low  # type: ignore[assignment]
        for i, kind in enumerate(self._groups):
            at = getattr(self, f"_at_{i}")
            if kind.name in _REAL:
                centre = self.loc[at] if kind.name == "continuous" else self.loc[at].exp()
                filler = filler.index_copy(0, at, centre.to(filler))
        return filler


def log_levels(kind: Kind, heads: Tensor) -> Tensor:
    """Log-mass of each level of a rounded logistic, `(*, levels)`, from its location and scale, `(*, 2)`."""
    half = 0.5 * (kind.values - 1)
    # As in `DiscretizedLogistic`: a two-hundredth of a level, below which scales tell no two levels apart.
    loc, scale = half * (1 + heads[..., :1]), half * F.softplus(heads[..., 1:]) + 0.005
    loc, scale = loc.unsqueeze(-2), scale.unsqueeze(-2)
    logistic = distributions.DiscretizedLogistic(loc, scale, torch.zeros_like(loc), kind.values)
    return logistic.log_prob(torch.arange(kind.values, dtype=heads.dtype, device=heads.device))


def _binary(heads: Tensor) -> td.Distribution:
    return distributions.Bernoulli(logits=heads[..., 0], validate_args=False)


_REAL = ("continuous", "positive")
"""Kinds with a density in the units of the column; the others have masses."""
