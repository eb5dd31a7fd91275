r"""How near rows come to those of a table: what tells a model that draws from one that copies."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from aevb.config import InputError

__all__ = ["distance_to_closest"]

_AT_ONCE = 2**22


@torch.no_grad()
def distance_to_closest(rows: Tensor, records: Tensor, categories: Collection[int] = ()) -> Tensor:
    r"""Distance of each row to the closest record of a table whose columns are of different kinds (Gower, 1971).

    .. math:: \min_r \frac{1}{|J|} \sum_{j \in J} d_j, \quad d_j = \frac{|x_j - r_j|}{\text{range}_j}
        \;\text{ or, of categories, }\; [x_j \neq r_j]

    J are the columns that row and record both know; records that share none with a row are not compared with it. 0 is a
    copy. Synthetic rows are to be no closer to the rows trained on than rows held out are.

    Args:
        rows: `(N, P)`, NaN for missing.
        records: `(M, P)`, likewise; the range of a column is theirs.
        categories: Columns whose values are codes without an order.

    Returns:
        Distances in float64, `(N,)`: from 0 to 1 where rows keep to the records' ranges; NaN where no record is
        comparable.

    Raises:
        InputError: If both are not tables with the same columns and at least one record.

    Example:
        >>> records = torch.tensor([[0.0, 1.0], [10.0, 2.0]])
        >>> distance_to_closest(torch.tensor([[10.0, 2.0], [5.0, 0.0]]), records, categories=[1])
        tensor([0.0000, 0.7500], dtype=torch.float64)
    """
    if rows.ndim != 2 or records.ndim != 2 or rows.shape[1] != records.shape[1] or not len(records):
        raise InputError(
            f"`rows` and `records` must be (N, P) and (M, P) with M of at least 1; got {tuple(rows.shape)} and "
            f"{tuple(records.shape)}. Give rows of one table."
        )
    x, table = rows.double(), records.double()
    low, high = table.nan_to_num(torch.inf).amin(0), table.nan_to_num(-torch.inf).amax(0)
    spread = torch.where(high > low, high - low, 1.0)  # of a column with one value or none, its own units
    codes = [j for j in range(x.shape[1]) if j in set(categories)]
    # float32 is enough to find the closest record; its distance is then taken in float64.
    ours, theirs = ((each / spread).float() for each in (x, table))
    ours[:, codes], theirs[:, codes] = 0.0, 0.0
    holes = ours.isnan().any(0) | theirs.isnan().any(0)
    pairs = [_one_hot(x[:, j], table[:, j]) for j in codes]
    alike = [torch.cat(side, 1) for side in zip(*pairs, strict=True)]
    seen, there = (~x.isnan()).float(), (~table.isnan()).float()
    found = []
    for at in torch.arange(len(x)).split(max(1, _AT_ONCE // len(table))):
        total = torch.cdist(ours[at][:, ~holes], theirs[:, ~holes], p=1.0)
        for j in holes.nonzero()[:, 0].tolist():
            total += (ours[at, j : j + 1] - theirs[:, j]).abs_().nan_to_num_(0.0)
        if codes:
            total += seen[at][:, codes] @ there[:, codes].T - alike[0][at] @ alike[1].T
        count = seen[at] @ there.T
        closest = (total / count).nan_to_num_(torch.inf).argmin(1)  # 0 / 0 where nothing is known of both
        found.append(_exact(x[at], table[closest], spread, codes))
    return torch.cat(found)


def _one_hot(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of a column of categories, one column a category, `(N, C)` and `(M, C)`; zeros where missing."""
    values = torch.cat([ours, theirs])
    values = values[~values.isnan()].unique()
    return (ours.unsqueeze(1) == values).float(), (theirs.unsqueeze(1) == values).float()


def _exact(x: Tensor, records: Tensor, spread: Tensor, codes: list[int]) -> Tensor:
    """Distance of each row to a record of its own."""
    off = (x - records).abs() / spread
    off[:, codes] = torch.where(off[:, codes].isnan(), off[:, codes], (off[:, codes] > 0).double())
    return off.nanmean(1)
