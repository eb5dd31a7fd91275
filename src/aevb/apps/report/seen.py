"""What the model makes of the rows that a report draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aevb._shapes import evenly
from aevb.apps.report.drawing import Array
from aevb.apps.summary import sizes
from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import evaluating, prepare, terms
from aevb.data import Batch, SparseRows, Target
from aevb.data.dataset import nodes_of

__all__ = ["SAMPLES", "TABLE_DRAWS", "TILES", "Seen", "look"]

TILES, SAMPLES, TABLE_DRAWS = 20, 40, 2000
"""Images reconstructed, images sampled, rows sampled to compare columns with."""
_POINTS, _ENTRIES = 5000, 10_000_000
"""Most rows, and numbers in them, that are drawn."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the model makes of the rows that are drawn, in the data's own units."""

    x: Array  # (N, P), NaN where missing
    total: int  # rows that the N were taken from
    labels: Array | None  # (N,); of rows with batches and no labels, the codes of those
    node: str | None  # the latent node shown, None if there is none
    codes: Array  # (N, D) its posterior means
    kl: Array  # (G,) its KL, nats, mean over the rows
    reconstruction: Array  # (N, P)
    samples: Array  # (M, P) draws of x
    sample_means: Array  # (M, P) mean of p(x | z) at the z of those draws


def look(
    vae: VAE, test: Tensor | SparseRows, labels: Tensor | None, draws: int, seed: int,
    target: Target | None = None, batch: Batch | None = None,
) -> Seen:  # fmt: skip
    """Encode, reconstruct and sample; what stands beside x in the rows, a target or a batch, is not drawn.

    The batches of rows that are drawn are as frequent as among those trained on.
    """
    most = max(TILES, _ENTRIES // test[:1].numel())
    kept, draws = evenly(len(test), min(_POINTS, most)), min(draws, most)
    with torch.random.fork_rng(), evaluating(vae):
        torch.manual_seed(seed)
        chosen = test[kept if isinstance(test, SparseRows) else kept.to(test.device)]
        rows = nodes_of(chosen, target, batch)
        values = prepare(vae, rows)
        x, means = values["x"], {node: d.mean for node, d in vae.posterior(values).items()}
        node = next((each for each in means if each not in values), None)
        known = dict(values)
        for each, mean in means.items():  # as it is where it is known, else at its mean
            known[each] = torch.where(known[each].isnan(), mean, known[each]) if each in known else mean
        given = {} if batch is None else {"batch": batch.one_hot(batch.drawn(draws)).to(x)}
        found, drawn = terms(vae, values), vae.p.sample(draws, given | sizes(vae, draws, given.get("batch")))
        colours = None if labels is None else labels[kept.to(labels.device)]
        if labels is None and batch is not None:
            colours = rows["batch"].argmax(-1)
        return Seen(
            x=_array(x),
            total=len(test),
            labels=None if colours is None else _array(colours)[:, 0],
            node=node,
            codes=_array(means[node]) if node else np.zeros((len(x), 0)),
            kl=_array(found.node_kl(node).flatten(0, -2).mean(0))[:, 0] if node else np.zeros(0),
            reconstruction=_mean_of_x(vae.p, {**known, **vae.computed(known, tuple(means))}, len(x)),
            samples=_array(drawn["x"]),
            sample_means=_mean_of_x(vae.p, vae.p.to_states(drawn), draws),
        )


def _mean_of_x(p: BayesNet, values: Mapping[str, Tensor], rows: int) -> Array:
    d = p.distribution("x", values)
    return _array(d.mean.expand(rows, *d.event_shape))


def _array(value: Tensor) -> Array:
    array: Array = value.detach().reshape(len(value), -1).double().cpu().numpy()
    return array
