"""What the columns of a table hold: kinds with their reasons, as a small JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aevb.checkpoint import write_atomically
from aevb.config import InputError
from aevb.data.files import opened, parsing, shown

__all__ = ["KINDS", "MAX_CATEGORIES", "Column", "Schema"]

KINDS = ("binary", "categorical", "ordinal", "count", "continuous", "positive", "date")
"""Kinds that a model has a likelihood for; a date is continuous, in days (a time: in seconds)."""
SET_ASIDE = ("constant", "identifier", "text", "empty", "drop")
"""Kinds that it has none for."""
MAX_CATEGORIES = 1000
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Example:
        >>> Column(name="sex", kind="binary", reason="two values", dtype="String", values=("f", "m")).model_kind
        'binary'
    """

    name: str
    kind: str
    reason: str
    dtype: str  # polars' name of its type, restored in results
    values: tuple[Any, ...] = ()  # of a binary, categorical or constant column, in the order of their codes
    low: int | None = None  # of an ordinal column
    high: int | None = None

    @property
    def model_kind(self) -> str | None:
        """As `aevb.Mixed` writes it; None for a column that is set aside."""
        if self.kind == "categorical":
            return f"categorical:{len(self.values)}"
        if self.kind == "ordinal":
            return f"ordinal:{self.low}:{self.high}"
        if self.kind == "date":
            return "continuous"
        return self.kind if self.kind in KINDS else None


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a table, in its order.

    Example:
        >>> column = Column(name="age", kind="ordinal", reason="few levels", dtype="Int64", low=17, high=90)
        >>> Schema(columns=(column,)).kinds
        ('ordinal:17:90',)
    """

    columns: tuple[Column, ...]

    @property
    def modelled(self) -> tuple[Column, ...]:
        """Those a model is made of."""
        return tuple(column for column in self.columns if column.model_kind is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modelled columns, P."""
        return tuple(column.name for column in self.modelled)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the modelled columns, as `ModelConfig.kinds` takes them."""
        return tuple(kind for column in self.columns if (kind := column.model_kind) is not None)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        columns = [
            {key: value for key, value in dataclasses.asdict(column).items() if value not in (None, ())}
            for column in self.columns
        ]
        return {"format": _FORMAT, "columns": columns}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "The schema") -> Self:
        """The inverse of `to_json`.

        Raises:
            InputError: For what is no schema.
        """
        with parsing(where, "a schema"):
            if content["format"] != _FORMAT:
                raise ValueError(f"it is of format {content['format']}, not {_FORMAT}")
            columns = tuple(
                Column(**column | {"values": tuple(column.get("values", ()))}) for column in content["columns"]
            )
            for column in columns:
                _check(column)
            return cls(columns=columns)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it as JSON.

        Raises:
            InputError: If the file exists, or cannot be written.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise InputError(f"`{path}` exists already. A file is never overwritten unasked. Choose another name.")
        if not path.parent.is_dir():
            raise InputError(f"`{path}` cannot be written: there is no folder `{path.parent}`. Create it first.")
        write_atomically(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, or what was edited since.

        Raises:
            InputError: If it is no schema.
        """
        with opened(Path(path)) as file, parsing(f"`{path}`", "a schema"):
            content = json.loads(file.read())
        return cls.from_json(content, f"`{path}`")


def _check(column: Column) -> None:
    if column.kind not in (*KINDS, *SET_ASIDE):
        raise ValueError(f"column {shown(column.name)} is of kind {column.kind}, which is none of {', '.join(KINDS)}")
    sizes = {"binary": (2, 2), "categorical": (2, MAX_CATEGORIES), "constant": (1, 1)}
    low, high = sizes.get(column.kind, (0, 0))
    if not low <= len(column.values) <= high or len(set(column.values)) < len(column.values):
        raise ValueError(
            f"column {shown(column.name)} is {column.kind} with {len(column.values)} values, where {low} to {high} "
            "different ones belong"
        )
    if column.kind == "ordinal" and not (
        isinstance(column.low, int) and isinstance(column.high, int) and column.low < column.high
    ):
        raise ValueError(f"column {shown(column.name)} is ordinal and needs whole numbers low < high")
