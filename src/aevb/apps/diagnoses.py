"""The deeper diagnoses of a run by name, each from the rows and the model to a `Finding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from aevb._shapes import Values, evenly
from aevb.apps.progress import rows_done
from aevb.apps.summary import (
    Finding,
    given_to,
    of_annealing,
    of_calibration,
    of_checks,
    of_gaps,
    of_information,
    quantity,
)
from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import evaluating
from aevb.config import InputError
from aevb.data import SparseRows
from aevb.distributions import base_of
from aevb.evaluate.annealing import ais, bidirectional
from aevb.evaluate.calibration import simulation_based_calibration
from aevb.evaluate.gaps import inference_gaps
from aevb.evaluate.latents import Information, aggregated, information
from aevb.evaluate.predictive import predictive_check

__all__ = ["DIAGNOSES", "Subject", "check"]

_PAIRED_ROWS = 10_000
"""Most rows that are set beside each other: time grows with their square."""
_PRIOR_DRAWS, _HISTOGRAMS, _BINS, _MATRIX, _POINTS = 20_000, 12, 40, 4, 500
"""Draws of a prior without closed-form marginals; dimensions and bins of histograms; dimensions and points in pairs."""


def _x_alone(rows: Tensor) -> Values:
    return {"x": rows}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is diagnosed."""

    vae: VAE
    rows: Tensor | SparseRows  # (N, P), the rows that were evaluated
    log_prob: Tensor  # (N,) nats, their importance-sampling estimates
    samples: int  # importance samples of each
    few: int  # rows that the dear diagnoses take, at most
    temperatures: int  # of annealing
    columns: Sequence[str] | None  # names of the P columns
    seed: int
    quiet: bool  # no progress bars
    nodes: Callable[[Tensor], Values] = _x_alone  # of the model, in rows (n, P)

    @property
    def of(self) -> str:
        """What log p is of."""
        return quantity(given_to(self.vae), False)

    def some(self, most: int) -> Tensor:
        """Positions of at most `most` rows, evenly spaced: data are often sorted; of sparse ones few at a time."""
        if isinstance(self.rows, SparseRows):
            most = min(most, len(self.rows.split()[0]))
        return evenly(len(self.rows), most)

    def values(self, kept: Tensor) -> Values:
        """The nodes in rows at these positions."""
        return self.nodes(self.rows[kept])

    def given(self, kept: Tensor) -> Values:
        """Of the nodes those that the model is given."""
        like = next(self.vae.parameters(), torch.empty(0))
        return {name: value.to(like) for name, value in self.values(kept).items() if name in self.vae.given}


def check(
    vae: VAE, rows: Tensor | SparseRows, names: Sequence[str], few: int, temperatures: int,
    nodes: Callable[[Tensor], Values] = _x_alone,
) -> None:  # fmt: skip
    """Raise what the diagnoses would raise after minutes, before anything is computed.

    Raises:
        InputError: For an unknown name, counts below 1, a model without latents, or latents that cannot be annealed.
    """
    if unknown := [name for name in names if name not in DIAGNOSES]:
        raise InputError(
            f"`--also` knows no `{unknown[0]}`; it knows {', '.join(DIAGNOSES)}. Name some of these, after RUN."
        )
    if few < 1:
        raise InputError(f"`--also-rows` must be at least 1; got {few}. Give the number of rows for ais and gaps.")
    if temperatures < 1:
        raise InputError(f"`--temperatures` must be at least 1; got {temperatures}. The default is 1000.")
    if vae.config is not None and vae.config.target and names:
        raise InputError(
            f"`--also {names[0]}` is for models without a target, whose rows are x alone. Train without --target for "
            "it."
        )
    if vae.context and (lost := [name for name in names if name in ("ais", "calibration", "checks")]):
        raise InputError(
            f"`{lost[0]}` simulates rows, and the model draws them only where {', '.join(vae.context)} is given. Train "
            "with --library latent, or name gaps and information only."
        )
    needy = [name for name in names if name != "checks"]
    if needy and not any(node in vae.p.nodes and not vae.q.computes(node) for node in vae.q.nodes):
        raise InputError(f"The model has no latents, so that `{needy[0]}` tells nothing of it. `checks` does.")
    if {"ais", "gaps"} & set(names):  # importance sampling of one row raises what annealing would
        ais(vae, nodes(rows[:1]), chains=1, temperatures=1, leapfrogs=1)


def _annealing(subject: Subject) -> Finding:
    kept = subject.some(subject.few)
    settings: dict[str, Any] = {"temperatures": subject.temperatures, "seed": subject.seed}
    with rows_done(f"annealing, {subject.temperatures} temperatures", len(kept), subject.quiet) as progress:
        lower = ais(subject.vae, subject.values(kept), **settings, progress=progress)
    with rows_done("annealing simulated rows, both ways", 2 * len(kept), subject.quiet) as progress:
        given = subject.given(kept)
        bracket = bidirectional(subject.vae, len(kept), given=given, **settings, progress=progress)
    return of_annealing(subject.log_prob[kept], subject.samples, len(subject.rows), lower, bracket, subject.of)


def _gaps(subject: Subject) -> Finding:
    kept = subject.some(subject.few)
    with rows_done("inference gaps, three rounds", 3 * len(kept), subject.quiet) as progress:
        found = inference_gaps(
            subject.vae,
            subject.values(kept),
            samples=subject.samples,
            temperatures=subject.temperatures,
            seed=subject.seed,
            progress=progress,
        )
    return of_gaps(found, len(subject.rows), subject.of)


def _information(subject: Subject) -> Finding:
    values = subject.values(subject.some(_PAIRED_ROWS))
    found = information(subject.vae, values, seed=subject.seed)
    drawn = aggregated(subject.vae, values, seed=subject.seed)
    return of_information(found, len(subject.rows), _aggregate(subject, found, drawn))


def _calibration(subject: Subject) -> Finding:
    given = subject.given(subject.some(_PAIRED_ROWS))
    return of_calibration(simulation_based_calibration(subject.vae, given=given, seed=subject.seed))


def _checks(subject: Subject) -> Finding:
    values = subject.values(subject.some(len(subject.rows)))
    found = predictive_check(subject.vae, values, seed=subject.seed)
    return of_checks(found, len(subject.rows), subject.columns)


DIAGNOSES: dict[str, Callable[[Subject], Finding]] = {
    "ais": _annealing,
    "gaps": _gaps,
    "information": _information,
    "calibration": _calibration,
    "checks": _checks,
}
"""By the name that the command line knows."""


def _aggregate(subject: Subject, found: Information, drawn: dict[str, Tensor]) -> dict[str, Any] | None:
    """Of the first node that is not one of classes: draws of q(z) beside p(z), the most informative dimensions first.

    The prior's density is closed where it is Gaussian by dimension, else a histogram of draws.
    """
    node = next((name for name, z in drawn.items() if z.is_floating_point()), None)
    if node is None:
        return None
    z = drawn[node].flatten(1).double().cpu()
    kl, spread = found.kl[node], found.mean_variance[node].flatten()
    splits = len(kl) == len(spread)
    order = (kl if splits else spread).argsort(descending=True, stable=True)[:_HISTOGRAMS]
    with evaluating(subject.vae), torch.random.fork_rng():
        torch.manual_seed(subject.seed)
        prior = _above(subject.vae.p, node).sample(_PRIOR_DRAWS)[node].flatten(1).double().cpu()
        gaussian = _gaussian(subject.vae, node)
    histograms = []
    for j in order.tolist():
        reach = torch.cat([z[:, j], prior[:, j]])
        edges = torch.linspace(float(reach.min()), float(reach.max()), _BINS + 1, dtype=torch.float64)
        centres = (edges[1:] + edges[:-1]) / 2
        closed = None if gaussian is None else td.Normal(gaussian[0][j], gaussian[1][j]).log_prob(centres).exp()
        histograms.append(
            {
                "dimension": j,
                "edges": edges,
                "aggregated": torch.histogram(z[:, j], edges, density=True).hist,
                "prior": torch.histogram(prior[:, j], edges, density=True).hist if closed is None else closed,
            }
        )
    top, points = order[:_MATRIX], torch.linspace(0, len(z) - 1, min(len(z), _POINTS)).round().long()
    return {
        "node": node,
        "ordered_by": "KL" if splits else "spread of the posterior mean",
        "histograms": histograms,
        "top": top,
        "points": z[points][:, top],
        "prior_points": prior[: len(points)][:, top],
        "gaussian": None if gaussian is None else {"loc": gaussian[0][top], "scale": gaussian[1][top]},
    }


def _above(p: BayesNet, node: str) -> BayesNet:
    """The part of p that draws a node: rows may need what is given, and a latent does not."""
    needed = {node}
    for each in reversed(p.nodes):
        needed |= set(p.parents[each]) if each in needed else set()
    return BayesNet({key: p.conditional(each) for each, key in zip(p.nodes, p.keys, strict=True) if each in needed})


def _gaussian(vae: VAE, node: str) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation by dimension of a prior that is Gaussian and has no parents."""
    if vae.p.parents[node]:
        return None
    base = base_of(vae.p.distribution(node, {}))
    if type(base) is not td.Normal:
        return None
    loc, scale = (each.detach().flatten().double().cpu() for each in (base.loc, base.scale))
    return loc, scale
