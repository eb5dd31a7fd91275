"""The column of a table that a model keeps apart as the node `y`; the others are `x`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from aevb.config import InputError, Kind
from aevb.data.files import listed, shown
from aevb.data.schema import Column, Schema

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A column by its place among the modelled ones, and rows of the table as the nodes of a model and back.

    Example:
        >>> column = Column(name="smokes", kind="binary", reason="", dtype="String", values=("no", "yes"))
        >>> target = Target(column=column, at=1)
        >>> values = target.split(torch.tensor([[1.8, 1.0, 30.0]]))
        >>> values
        {'x': tensor([[ 1.8000, 30.0000]]), 'y': tensor([1.])}
        >>> target.join(values)
        tensor([[ 1.8000,  1.0000, 30.0000]])
    """

    column: Column
    at: int  # among the P columns of the table

    @classmethod
    def of(cls, name: str, schema: Schema, where: str = "The table") -> Self:
        """The column of that name.

        Raises:
            InputError: If there is none, it is set aside, or no other column is left.
        """
        column = next((column for column in schema.columns if column.name == name), None)
        if column is None:
            raise InputError(
                f"`--target` names a column of the table; {where} has no `{shown(name)}`, it has "
                f"{listed([column.name for column in schema.columns])}. Choose one of them."
            )
        if column.model_kind is None:
            raise InputError(
                f"`--target {shown(name)}`: the column is set aside as {column.kind} ({column.reason}), and nothing "
                f"can be learned of it. Choose another, or tell its kind: --column {shown(name)}=KIND."
            )
        if len(schema.names) < 2:
            raise InputError(f"`--target {shown(name)}`: {where} has no other column to learn it from. Give some.")
        return cls(column=column, at=schema.names.index(name))

    @classmethod
    def told(cls, command: Mapping[str, Any]) -> Self | None:
        """That of a run whose command line is recorded so, where it has one."""
        name, schema = command.get("target"), command.get("schema")
        return cls.of(name, Schema.from_json(schema)) if name and schema else None

    @property
    def name(self) -> str:
        """Of the column."""
        return self.column.name

    @property
    def kind(self) -> str:
        """As `ModelConfig.target` takes it."""
        kind = self.column.model_kind
        assert kind is not None  # `of` refuses others
        return kind

    @property
    def classes(self) -> int:
        """How many; 0 where y is a number."""
        return Kind.parse(self.kind).classes

    @property
    def labels(self) -> tuple[Any, ...]:
        """Of the classes, by code."""
        return self.column.values if self.classes else ()

    @property
    def whole(self) -> bool:
        """Whether its numbers are written without fractions."""
        dtype = self.column.dtype
        return not self.classes and (dtype == "Date" or "Int" in dtype or self.column.kind in ("count", "ordinal"))

    def others(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """What there is of P columns without that of the target."""
        return columns[: self.at] + columns[self.at + 1 :]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows `(*, P)` of the table as x `(*, P - 1)` and y: codes `(*,)` of classes, or numbers `(*, 1)`."""
        y = rows[..., self.at]
        return {
            "x": torch.cat([rows[..., : self.at], rows[..., self.at + 1 :]], -1),
            "y": y if self.classes else y.unsqueeze(-1),
        }

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`; NaN for y where `values` has none."""
        x = values["x"]
        y = values["y"] if "y" in values else x.new_full(x.shape[:-1], math.nan)
        y = y.to(x).reshape(*x.shape[:-1], 1)
        return torch.cat([x[..., : self.at], y, x[..., self.at :]], -1)

    def check(self, rows: Tensor, where: str) -> None:
        """Raise unless training rows `(N, P)` have something to learn of the target.

        Raises:
            InputError: If it has no known value, one only, or one class only.
        """
        known = rows[:, self.at]
        known = known[~known.isnan()]
        if not len(known):
            raise InputError(
                f"{where} has no known value of the target `{shown(self.name)}`, and nothing can be learned of it. "
                "Give it in some rows, or train without --target."
            )
        if bool((known == known[0]).all()):
            what = f"class only, {self.labels[int(known[0])]!r}" if self.classes else "value only"
            raise InputError(
                f"{where} has one {what} of the target `{shown(self.name)}`; a model needs two to tell them apart. "
                "Give rows of another, or train without --target."
            )
