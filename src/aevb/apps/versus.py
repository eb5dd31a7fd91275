"""Runs side by side on the same rows: what may be compared, the table of paired differences, a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aevb.apps.summary import DENSITIES, UNTRUSTED_ABOVE, Summary, given_to, quantity
from aevb.checkpoint import Run
from aevb.config import InputError
from aevb.data import SparseRows, Target
from aevb.evaluate import Comparison

__all__ = ["Contestant", "check_comparable", "to_json", "told"]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A run with its evaluation."""

    run: Run
    summary: Summary

    @property
    def cost(self) -> str:
        """Parameters and time of training."""
        count = sum(p.numel() for p in self.run.vae.parameters())
        seconds = self.run.history[-1]["seconds"] if self.run.history else math.nan
        return (
            f"{count:,} parameters, {seconds:.0f} s of training" if math.isfinite(seconds) else f"{count:,} parameters"
        )


def check_comparable(runs: Mapping[str, Run], rows: Mapping[str, Tensor | SparseRows]) -> None:
    """Raise unless the runs give the same rows densities in the same units.

    Args:
        runs: By name.
        rows: The rows that each would be judged on.
    """
    if len(runs) < 2:
        raise InputError("`aevb compare` needs two runs or more. Give their folders: aevb compare RUN RUN")
    (first, one), *others = runs.items()
    for name, other in others:
        _check_given(first, one, name, other)
        for field, about, remedy in (
            ("binarize", "binarisation", "Binarise alike"),
            ("dropped", "columns left out", "Leave out the same columns"),
            ("sha256", "data", "Train both on the same file"),
        ):
            here, there = one.data.get(field), other.data.get(field)
            if here != there:
                shown = "" if field == "sha256" else f": {here or 'none'} and {there or 'none'}"
                raise InputError(
                    f"`{first}` and `{name}` differ in their {about}{shown}; log p(x) of other rows or units cannot be "
                    f"compared. {remedy}."
                )
        if _densities(one) != _densities(other):
            raise InputError(
                f"`{first}` has the likelihood {_likelihood(one)} and `{name}` {_likelihood(other)}: one is a density "
                "where the other is a probability, and their logarithms have no common unit. Choose likelihoods of one "
                "kind, and a table's columns of one kind."
            )
        if not _same(rows[first], rows[name]):
            raise InputError(
                f"`{first}` and `{name}` would be judged on different rows ({len(rows[first])} and {len(rows[name])}), "
                "since the data have no test rows and each run held out its own. Train with the same --seed and "
                "--validation, or give test rows."
            )


def _check_given(first: str, one: Run, name: str, other: Run) -> None:
    """Raise unless both have the density of the same thing given the same things."""
    here, there = (given_to(run.vae) for run in (one, other))
    if here != there:
        raise InputError(
            f"`{first}` is given {' and '.join(here) or 'nothing'}, `{name}` {' and '.join(there) or 'nothing'}: "
            f"log {quantity(here, False)} is no log {quantity(there, False)}. Train both with the same --library and "
            "--batch."
        )
    by, other_by = ((run.data.get("batch") or {}).get("column") for run in (one, other))
    if by != other_by:
        raise InputError(
            f"`{first}` and `{name}` take the batch from different columns, `{by}` and `{other_by}`: they are given "
            "different things. Train both with the same --batch."
        )


def _same(one: Tensor | SparseRows, other: Tensor | SparseRows) -> bool:
    if isinstance(one, SparseRows) or isinstance(other, SparseRows):
        return isinstance(one, SparseRows) and isinstance(other, SparseRows) and one.sha256() == other.sha256()
    return one.shape == other.shape and torch.equal(one.nan_to_num(math.pi), other.nan_to_num(math.pi))


def _likelihood(run: Run) -> str:
    return run.vae.config.likelihood if run.vae.config else "unknown"


def _densities(run: Run) -> tuple[bool, ...]:
    """Which columns have a density in their units; the others have probabilities."""
    config = run.vae.config
    if config is not None and config.kinds:
        found = [kind in ("continuous", "positive") for kind in config.kinds]
        if target := Target.told(run.data.get("command", {})):  # whose numbers are Gaussian, of whatever kind
            found.insert(target.at, not target.classes)
        return tuple(found)
    return (_likelihood(run) in DENSITIES,) * (config.features if config else 1)


def told(contestants: Sequence[Contestant], found: Comparison) -> list[str]:
    """The comparison as the terminal shows it; the verdict is last."""
    best, width = found.best, max(len(name) for name in (*found.names, "run"))
    split, of = contestants[0].summary.split, f"log {contestants[0].summary.quantity}"
    wide = max(18, len(of))
    lines = [f"{split} {of} of {found.rows} rows, nats a row; differences are to {found.names[best]}, row by row"]
    lines.append(
        f"{'rank':<7}{'run':<{width}}  {of:>{wide}}  {'difference':>17}  "
        f"{f'{100 * found.confidence:g} % interval':>20}  k-hat > {UNTRUSTED_ABOVE}"
    )
    for i in found.mean.argsort(descending=True).tolist():
        low, high = found.ranks[i]
        place = str(low) if low == high else f"{low}-{high}"
        own = f"{float(found.mean[i]):.2f} ± {float(found.std_error[i]):.2f}"
        difference = interval = "-"
        if i != best:
            difference = f"{float(found.difference[i, best]):+.3f} ± {float(found.difference_error[i, best]):.3f}"
            interval = f"{float(found.low[i, best]):+.3f} to {float(found.high[i, best]):+.3f}"
        lines.append(
            f"{place:<7}{found.names[i]:<{width}}  {own:>{wide}}  {difference:>17}  {interval:>20}  "
            f"{contestants[i].summary.untrusted} of {found.rows}"
        )
    lines += [f"{name}: {one.cost}" for name, one in zip(found.names, contestants, strict=True)]
    if any(one.summary.untrusted for one in contestants):
        lines.append(
            f"k-hat is above {UNTRUSTED_ABOVE} in some rows: there the estimates are lower bounds, and a difference of "
            "them may be one of posteriors q, not of models p."
        )
        return [*lines, verdict(found, of="lower bounds")]
    return [*lines, verdict(found, of)]


def verdict(found: Comparison, of: str) -> str:
    """What the intervals allow to be said, and no more; `of` names what was compared."""
    best, (_, worst_place) = found.best, found.ranks[found.best]
    rivals = [i for i in found.mean.argsort(descending=True).tolist() if i != best]
    certainty = f"{of} compared, {100 * found.confidence:g} % confidence over all pairs"
    if worst_place == 1:
        next_best = rivals[0]
        by = f"{float(found.difference[best, next_best]):.3f} ± {float(found.difference_error[best, next_best]):.3f}"
        other = found.names[next_best] if len(rivals) == 1 else f"every other; than {found.names[next_best]}, the next"
        return f"verdict: {found.names[best]} is better than {other}, by {by} nats a row ({certainty})."
    tied = [found.names[i] for i in rivals if float(found.low[best, i]) <= 0]
    if len(tied) == len(rivals):
        return f"verdict: these rows do not tell {found.names[best]} from {_names(tied)} ({certainty})."
    beaten = [found.names[i] for i in rivals if float(found.low[best, i]) > 0]
    return (
        f"verdict: {found.names[best]} is better than {_names(beaten)}; these rows do not tell it from {_names(tied)} "
        f"({certainty})."
    )


def to_json(contestants: Sequence[Contestant], found: Comparison) -> dict[str, Any]:
    """Every figure in full precision."""
    return {
        "rows": found.rows,
        "confidence": found.confidence,
        "runs": [
            {"name": name, "ranks": list(ranks), "cost": one.cost, "summary": one.summary.to_json()}
            for name, ranks, one in zip(found.names, found.ranks, contestants, strict=True)
        ],
        **{
            field: np.asarray(getattr(found, field)).tolist()
            for field in ("mean", "std_error", "difference", "difference_error", "low", "high")
        },
        "verdict": told(contestants, found)[-1],
    }


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
