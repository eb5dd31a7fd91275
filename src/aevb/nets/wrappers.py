"""Nets around a net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from aevb._shapes import by_rows, join
from aevb.config import InputError, Kind

__all__ = ["Columns", "Evidence", "Holes", "LogTotal", "Rows", "Standardize"]


@final
class Columns(nn.Module):
    r"""Shows `net` a row of a table: numbers centred and scaled, categories one-hot, and which entries are known.

    A count is shown as :math:`(\log(1 + x) - m) / s`, a positive value as :math:`(\log x - m) / s`, a category as one
    number for each code, any other entry as :math:`(x - m) / s`; a missing entry as zeros. The mask (1 where known)
    follows, `(*, P)`.

    Args:
        net: Takes `(*, Columns.width(kinds))`.
        kinds: What each of the P columns holds, as for `Mixed`.
        loc: m; a number or `(P,)`, of which those of categories are not used.
        scale: s > 0, likewise.

    Example:
        >>> Columns(nn.Identity(), ["binary", "categorical:3"])(torch.tensor([[torch.nan, 2.0]]))
        tensor([[0., 0., 0., 1., 0., 1.]])
    """

    sees_holes = True
    loc: Tensor
    scale: Tensor

    def __init__(
        self, net: nn.Module, kinds: Sequence[str], loc: Tensor | float = 0.0, scale: Tensor | float = 1.0
    ) -> None:
        super().__init__()
        parsed = [Kind.parse(kind) for kind in kinds]
        self.net, self.kinds = net, tuple(kinds)
        dtype = torch.get_default_dtype()
        for name, value in (("loc", loc), ("scale", scale)):
            self.register_buffer(name, torch.as_tensor(value, dtype=dtype).expand(len(parsed)).clone())
        at = [[j for j, kind in enumerate(parsed) if kind.name == name] for name in ("count", "positive")]
        # Where each input comes from, and for a category the code that it stands for.
        source = [(j, code) for j, kind in enumerate(parsed) for code in range(kind.inputs)]
        single = [kind.name != "categorical" for kind in parsed]
        for name, made in (
            ("_counts", torch.tensor(at[0], dtype=torch.long)),
            ("_positive", torch.tensor(at[1], dtype=torch.long)),
            ("_source", torch.tensor([j for j, _ in source])),
            ("_code", torch.tensor([float(code) for _, code in source])),
            ("_single", torch.tensor([single[j] for j, _ in source])),
        ):
            self.register_buffer(name, made, persistent=False)

    @staticmethod
    def width(kinds: Sequence[str]) -> int:
        """Inputs that the net needs."""
        return sum(Kind.parse(kind).inputs for kind in kinds) + len(kinds)

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, parent: Tensor, *others: Tensor) -> Tensor:
        """Parent `(*, P)`, NaN for missing, and others, handed on as they are, to what `net` returns."""
        if parent.shape[-1] != len(self.kinds):
            raise InputError(
                f"The net's parent must end in {len(self.kinds)} columns; got shape {tuple(parent.shape)}. "
                "Give the table the model was made for."
            )
        linked = parent
        for at, link in ((self._counts, torch.log1p), (self._positive, torch.log)):
            if len(at):  # type: ignore[arg-type]
                linked = linked.index_copy(-1, at, link(parent.index_select(-1, at)))  # type: ignore[arg-type]
        known = ~parent.isnan()
        numbers = ((linked - self.loc) / self.scale).masked_fill(~known, 0.0)
        spread, codes = (each.index_select(-1, self._source) for each in (numbers, parent))  # type: ignore[arg-type]
        shown = torch.where(self._single, spread, codes.eq(self._code).to(parent.dtype))  # type: ignore[arg-type]
        result: Tensor = self.net(torch.cat([shown, known.to(parent.dtype)], -1), *others)
        return result


@final
class Evidence(nn.Module):
    r"""What each known column says of z, for `ProductNormal`, and what `net` says of the whole row.

    Of column j, shown as the inputs :math:`u_i`, :math:`i \in I_j` (one, or one for each category), the factors are
    :math:`w_i` and :math:`t_i = s_i u_i - b_i`, and zeros where j is missing; w, s and b are learned. Goes inside
    `Holes` or `Columns`, which show a row in this form.

    Args:
        net: Takes the inputs, then 1 for each column that is missing, then further parents; returns `(*, 2 D)`. The
            weights of an `MLP` for missing columns start at zero, and have no gradient before one is seen: to a net
            trained on complete rows such an entry is an average one.
        inputs: How many inputs show each of the P columns: `[1] * P` for `Holes`.
        dims: D, of z.

    Example:
        >>> from aevb import MLP
        >>> net = Evidence(MLP(2 * 3, [8], 2 * 2), [1, 1, 1], 2)
        >>> net(torch.zeros(5, 3), torch.ones(5, 3)).shape == (5, 3 * 2 + 3 + 2 * 2)
        True
    """

    def __init__(self, net: nn.Module, inputs: Sequence[int], dims: int) -> None:
        super().__init__()
        self.net, self.dims, self.inputs = net, dims, tuple(inputs)
        count, columns = sum(inputs), len(inputs)
        source = torch.arange(columns).repeat_interleave(torch.tensor(self.inputs))
        self.register_buffer("_source", source, persistent=False)
        # Together they say as much as the prior to start with: the trace of the precision they add is D.
        self.weight = nn.Parameter(torch.randn(count, dims) / math.sqrt(count))
        self.slope = nn.Parameter(torch.ones(count))
        self.offset = nn.Parameter(torch.zeros(count))
        first = next((module for module in net.modules() if isinstance(module, nn.Linear)), None)
        if first is not None and first.in_features >= count + columns:
            with torch.no_grad():
                first.weight[:, count : count + columns].zero_()

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        width = getattr(self.net, "outputs", None)
        return None if width is None else len(self.slope) * (self.dims + 1) + width

    def forward(self, *parents: Tensor) -> Tensor:
        """What is shown and what is known of the columns, side by side or apart; then further parents."""
        joined, count = join(parents), len(self.slope)
        shown, known, rest = joined.tensor_split([count, count + len(self.inputs)], dim=-1)
        if known.shape[-1] != len(self.inputs):
            raise InputError(
                f"Evidence takes {count} inputs and {len(self.inputs)} numbers that tell which columns are known; got "
                f"{joined.shape[-1]} in all. Put it inside Holes or Columns."
            )
        use = known.index_select(-1, self._source)  # type: ignore[arg-type]
        w = (use.unsqueeze(-1) * self.weight).flatten(-2)
        t = use * (self.slope * shown - self.offset)
        result: Tensor = torch.cat([w, t, self.net(torch.cat([shown, 1 - known, rest], -1))], -1)
        return result


@final
class Holes(nn.Module):
    """Shows `net` which entries are missing: `net(filled..., mask...)`, NaN becoming 0 in `filled` and in `mask`.

    A net that handles NaN in another way says so by an attribute `sees_holes = True`.

    Args:
        net: Takes the filled parents, then their masks (1 where known, 0 where missing), each `(*, D_i)`: twice the
            width.
        first: How many parents, from the first on, may have missing entries, and have a mask; all if None.

    Example:
        >>> import torch
        >>> from aevb import MLP
        >>> net = Holes(MLP(2 * 3, [8], 4))
        >>> net(torch.tensor([[1.0, float("nan"), 0.0]])).isfinite().all().item()
        True
    """

    sees_holes = True

    def __init__(self, net: nn.Module, *, first: int | None = None) -> None:
        super().__init__()
        self.net, self.first = net, first

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)`, with NaN for missing, to what `net` returns."""
        some, whole = parents[: self.first], parents[len(parents[: self.first]) :]
        missing = [parent.isnan() for parent in some]
        filled = [parent.masked_fill(gap, 0.0) for parent, gap in zip(some, missing, strict=True)]
        result: Tensor = self.net(
            *filled, *whole, *((~gap).to(parent.dtype) for parent, gap in zip(some, missing, strict=True))
        )
        return result


@final
class LogTotal(nn.Module):
    r"""The log of a row's library size, :math:`\log \max(1, \sum_j x_j)`, `(*, 1)`.

    Args:
        net: If given, takes the row, too, and further parents; the first number it returns has that log added, and all
            are handed on.
        loc: Mean of it over the training rows, with which rows can be drawn later; of rows in batches `(B,)`, that over
            each batch.
        scale: Its spread over them, likewise.

    Example:
        >>> LogTotal()(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[0.],
                [0.]])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module | None = None, *, loc: float | Tensor = 0.0, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        self.net = net
        for name, value in (("loc", loc), ("scale", scale)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.get_default_dtype()).reshape(-1).clone())

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return 1 if self.net is None else getattr(self.net, "outputs", None)

    def forward(self, parent: Tensor, *others: Tensor) -> Tensor:
        """Counts `(*, P)`; further parents are shown to the net alone."""
        total = parent.sum(-1, keepdim=True).clamp(min=1.0).log()
        if self.net is None:
            return total
        out: Tensor = self.net(parent, *others)
        return torch.cat([out[..., :1] + total, out[..., 1:]], -1)

    def draw(self, rows: int, batch: Tensor | None = None) -> Tensor:
        """Log sizes `(rows, 1)` from torch's current generator, each by its one-hot `batch` `(rows, B)`, if any."""
        at = torch.zeros(rows, 1, dtype=torch.long) if batch is None else batch.argmax(-1, keepdim=True)
        return self.loc[at] + self.scale[at] * torch.randn(rows, 1)


@final
class Standardize(nn.Module):
    """Hands `net` one of its parents centred and scaled, `(x - loc) / scale`, the others as they are; NaN stays NaN.

    Args:
        net: Takes `(*, D)`.
        loc: Centre of the data, `(D,)`.
        scale: Spread of the data, `(D,)`, above 0.
        log1p: Let log(1 + x) stand for x: counts span orders of magnitude.
        log: Let log x stand for x, which is above 0.
        at: Which parent it is, counting from 0.

    Example:
        >>> import torch
        >>> Standardize(nn.Identity(), torch.tensor([1.0]), torch.tensor([2.0]))(torch.tensor([[5.0]]))
        tensor([[2.]])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, net: nn.Module, loc: Tensor, scale: Tensor, *, log1p: bool = False, log: bool = False, at: int = 0
    ) -> None:
        super().__init__()
        self.net, self.log1p, self.log, self.at = net, log1p, log, at
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)` to what `net` returns."""
        parent = parents[self.at]
        if parent.shape[-1] != self.loc.shape[0]:
            raise InputError(
                f"The net's parent must end in {self.loc.shape[0]} entries; got shape {tuple(parent.shape)}. "
                "Flatten images with `x.flatten(1)`, or build the model for these columns."
            )
        shown = parent.log1p() if self.log1p else parent.log() if self.log else parent
        scaled = (shown - self.loc) / self.scale
        result: Tensor = self.net(*parents[: self.at], scaled, *parents[self.at + 1 :])
        return result


@final
class Rows(nn.Module):
    """A module that takes one batch `(M, D)`, as a net of ours: parents are joined, their leading axes made one.

    The result gets the leading axes back. Inside, M counts everything the library holds at once, classes and draws as
    well as data, (E..., K, N): statistics over the batch are taken over all of it.

    Args:
        net: Maps `(M, D)` to `(M, *)`.

    Example:
        >>> import torch
        >>> net = Rows(nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.Flatten()))
        >>> net(torch.zeros(5, 3, 16)).shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def outputs(self) -> int | None:
        """Width of the result, where `net` knows it."""
        return getattr(self.net, "outputs", None)

    def forward(self, *parents: Tensor) -> Tensor:
        """Parents `(*, D_i)` to what `net` returns, `(*, ...)`."""
        return by_rows(self.net, join(parents))
