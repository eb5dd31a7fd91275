"""The column that names each row's batch (donor, plate, technology), which a model is given beside x, one-hot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from aevb.config import InputError
from aevb.data.files import listed, shown

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A column's values by code; rows that carry them, one-hot, behind their P entries, as the nodes of a model.

    Example:
        >>> batch = Batch.of("donor", ["B", "A", "B", "A"])
        >>> batch.values, batch.counts
        (('A', 'B'), (2, 2))
        >>> batch.split(torch.tensor([[7.0, 5.0, 0.0, 1.0]]))
        {'x': tensor([[7., 5.]]), 'batch': tensor([[0., 1.]])}
    """

    column: str
    values: tuple[str, ...]  # by code; numbers by size, else by the alphabet
    counts: tuple[int, ...]  # rows of each, among those that the model was made for

    @classmethod
    def of(cls, column: str, names: Sequence[str | None], where: str = "The data") -> Self:
        """The batches of the rows to train on, `names` having one a row.

        Raises:
            InputError: If a row has none, or there are too few or too many of them to learn what they have in common.
        """
        _check_known(column, names, where)
        counts = {name: 0 for name in _in_order({name for name in names if name is not None})}
        for name in names:
            counts[name] += 1  # type: ignore[index]
        if len(counts) == 1:
            raise InputError(
                f"{where} has one batch only, `{shown(column)}` being {shown(next(iter(counts)))!r} in every row, and "
                "there is nothing to tell apart. Name another column, or train without a batch."
            )
        if 2 * len(counts) > len(names):
            raise InputError(
                f"{where} has {len(counts)} values of `{shown(column)}` in {len(names)} rows, which look like names of "
                "rows and not of batches. Name a column whose values many rows share."
            )
        return cls(column=column, values=tuple(counts), counts=tuple(counts.values()))

    @classmethod
    def told(cls, data: Mapping[str, Any]) -> Self | None:
        """That of a run whose data are described so, where it has one."""
        told = data.get("batch")
        return told and cls(column=told["column"], values=tuple(told["values"]), counts=tuple(told["counts"]))

    def to_json(self) -> dict[str, Any]:
        """What `told` reads under the name "batch"."""
        return {"column": self.column, "values": list(self.values), "counts": list(self.counts)}

    def __len__(self) -> int:
        """Batches B."""
        return len(self.values)

    def codes(self, names: Sequence[str | None], where: str = "The data") -> Tensor:
        """Of names, one a row, `(N,)`.

        Raises:
            InputError: If a row has none, or one that the model was not made for.
        """
        _check_known(self.column, names, where)
        code = {name: i for i, name in enumerate(self.values)}
        if (odd := next((row for row, name in enumerate(names) if name not in code), None)) is not None:
            raise InputError(
                f"{where}: `{shown(self.column)}` is {shown(str(names[odd]))!r} in row {odd} (counting from 0), a "
                f"batch that the model was not trained on; it knows {listed(self.values)}. Leave such rows out, or "
                "train anew with them."
            )
        return torch.tensor([code[name] for name in names if name is not None])

    def one_hot(self, codes: Tensor) -> Tensor:
        """Codes `(N,)` as the node that a model is given, `(N, B)`."""
        return torch.eye(len(self))[codes]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows `(*, P + B)` as x `(*, P)` and batch `(*, B)`."""
        return {"x": rows[..., : -len(self)], "batch": rows[..., -len(self) :]}

    def drawn(self, rows: int) -> Tensor:
        """Codes `(rows,)` as frequent as among the rows trained on, from torch's current generator."""
        return torch.multinomial(torch.tensor(self.counts, dtype=torch.float64), rows, replacement=True)


_MISSING = (None, "", "nan", "None", "<NA>")
"""What stands for no value: also as text, which columns that were once made text of have."""


def _check_known(column: str, names: Sequence[str | None], where: str) -> None:
    if (gap := next((row for row, name in enumerate(names) if name in _MISSING), None)) is not None:
        raise InputError(
            f"{where}: row {gap} (counting from 0) has no value of `{shown(column)}`, and the model is given every "
            "row's batch. Fill it in, or leave that row out."
        )


def _in_order(names: set[str]) -> list[str]:
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
