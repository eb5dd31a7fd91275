"""Single-cell counts: held-out log-likelihood and agreement of clusters with labels, beside scvi-tools' scVI.

    python benchmarks/single_cell.py DATA.npz [--genes 1200] [--seeds 0 1 2] [--methods AEVB scVI] [--out cells.csv]

DATA is a matrix of counts `x` with labels `y`, or a sparse one, as `scipy.sparse.save_npz` writes it, with `y` beside
it. A fifth of the cells, drawn by the seed, is held out; of the others' genes the most variable ones are kept (by the
variance of log(1 + count), without a look at labels or held-out cells). Both models see the same training cells, and
hold a tenth of them back by their own defaults. Each contestant runs at its own defaults: `scVI` is scvi-tools' (10
latents, one hidden layer of 128, zero-inflated, 400 epochs for few cells); `AEVB` is `aevb train`'s for counts, of the
same sizes, unless --model and --training say otherwise.

Held-out log-likelihood: both models take a cell's library size, the sum of its counts here, as given, so that figures
are log p(x | library), nats a cell, with all constants; they compare with each other and not with log p(x). All models
are judged by one and the same importance sampler, `aevb.log_marginal`: scVI's encoder and decoder are handed to it as
they are. scVI's own estimate, `get_marginal_ll`, stands beside it as "own". ARI: k-means (ten starts, seed 0) with as
many clusters as there are labels, on the posterior means of all cells, against the labels, which nothing else sees.

scvi-tools needs an environment of its own: `benchmarks/requirements-single-cell.txt`.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

import aevb
from aevb.apps.choices import model_config
from aevb.bounds import evaluating
from aevb.data import Data, SparseRows, load
from aevb.distributions import ZeroInflatedNegativeBinomial


@dataclass(frozen=True, kw_only=True)
class Fitted:
    vae: aevb.VAE
    seconds: float
    own: Callable[[Tensor], float] | None = None  # its own estimate of the mean log-likelihood of some rows
    validation: float = float("nan")  # the bound of the cells it held back, by which its weights were chosen


def by_aevb(train: SparseRows, seed: int, model: dict[str, Any], training: dict[str, Any]) -> Fitted:
    config = aevb.TrainConfig(**{"seed": seed} | training)
    sizes = model_config(model, Data(name="cells", train=train), config)
    torch.manual_seed(seed)
    began = time.monotonic()
    vae = aevb.build_vae(sizes, train)
    run = aevb.fit(vae, train, config)
    seconds = time.monotonic() - began
    bound = max(record["validation"] for record in run.history if "validation" in record)
    return Fitted(vae=vae, seconds=seconds, validation=bound)


class _Encoder(nn.Module):
    """scVI's q(z | x): without covariates, in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        q, _ = self.module.z_encoder(x.log1p(), torch.zeros(len(x), 1))
        return torch.distributions.Independent(q, 1, validate_args=False)


class _Decoder(nn.Module):
    """scVI's p(x | z, library)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor, library: Tensor) -> torch.distributions.Distribution:
        flat = z.reshape(-1, z.shape[-1])
        sizes = library.expand(*z.shape[:-1], 1).reshape(-1, 1)
        _, _, rate, dropout = self.module.decoder("gene", flat, sizes, torch.zeros(len(flat), 1))
        rate, dropout = (each.reshape(*z.shape[:-1], -1) for each in (rate, dropout))
        # The small number is scVI's own: shares of rare genes underflow.
        counts = ZeroInflatedNegativeBinomial((rate + 1e-8).log(), self.module.px_r, dropout)
        return torch.distributions.Independent(counts, 1, validate_args=False)


def by_scvi(train: SparseRows, seed: int) -> Fitted:
    import anndata
    import scvi
    from scipy.sparse import csr_matrix

    scvi.settings.seed, scvi.settings.verbosity = seed, 40
    data = anndata.AnnData(csr_matrix(train.matrix))  # arrays are unknown to it
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data)
    began = time.monotonic()
    model.train(accelerator="cpu", enable_progress_bar=False)
    seconds = time.monotonic() - began
    model.module.eval()
    latents = aevb.StandardNormal(model.module.n_latent)
    vae = aevb.VAE(
        aevb.BayesNet({"z": latents, "x | z, library": _Decoder(model.module)}),
        aevb.BayesNet({"library | x": aevb.Deterministic(aevb.LogTotal()), "z | x": _Encoder(model.module)}),
    )

    def own(rows: Tensor) -> float:
        held_out = anndata.AnnData(rows.numpy())
        return float(model.get_marginal_ll(held_out, n_mc_samples=1000, n_mc_samples_per_pass=10))

    return Fitted(vae=vae, seconds=seconds, own=own)


METHODS = ("AEVB", "scVI")


def split(rows: SparseRows, genes: int, seed: int) -> tuple[SparseRows, SparseRows, np.ndarray]:
    """Training rows and held-out rows with the genes kept, and the positions of both, in that order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    train, test = np.sort(order[len(rows) // 5 :]), np.sort(order[: len(rows) // 5])
    shown = rows.matrix[train].log1p()
    spread = np.asarray(shown.power(2).mean(0)).ravel() - np.square(np.asarray(shown.mean(0)).ravel())
    kept = torch.from_numpy(np.sort(np.argsort(-spread, kind="stable")[:genes]))
    found = rows.select(columns=kept)
    return found.select(torch.from_numpy(train)), found.select(torch.from_numpy(test)), np.concatenate([train, test])


def means(vae: aevb.VAE, rows: SparseRows) -> np.ndarray:
    with evaluating(vae):
        return torch.cat([vae.posterior(rows.take(part))["z"].mean for part in rows.split()]).double().numpy()


def judged(fitted: Fitted, train: SparseRows, test: SparseRows, labels: np.ndarray, samples: int) -> dict[str, float]:
    marginal = aevb.log_marginal(fitted.vae, {"x": test[:]}, samples)
    codes = np.concatenate([means(fitted.vae, each) for each in (train, test)])
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=0).fit_predict(codes)
    return {
        "log_prob": float(marginal.log_prob.mean()),
        "std_error": float(marginal.log_prob.std()) / len(test) ** 0.5,
        "monte_carlo": float(marginal.std_error.square().sum().sqrt()) / len(test),
        "elbo": float(marginal.elbo.mean()),
        "validation": fitted.validation,
        "untrusted": float((marginal.pareto_k > 0.7).double().mean()),
        "own": fitted.own(test[:]) if fitted.own else float("nan"),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "seconds": fitted.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--genes", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--model", type=json.loads, default={}, help="fields of ModelConfig, of AEVB alone")
    parser.add_argument("--training", type=json.loads, default={}, help="fields of TrainConfig, likewise")
    parser.add_argument("--out", type=Path, default=Path("cells.csv"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # scvi-tools' and Lightning's advice
    data = load(options.data)
    rows = data.train if isinstance(data.train, SparseRows) else SparseRows(csr_array(data.train.numpy()))
    assert data.train_labels is not None, "labels `y` must lie beside the matrix"
    for seed in options.seeds:
        train, test, order = split(rows, options.genes, seed)
        for name in options.methods:
            ours = name == "AEVB"
            fitted = by_aevb(train, seed, options.model, options.training) if ours else by_scvi(train, seed)
            figures = judged(fitted, train, test, data.train_labels.numpy()[order], options.samples)
            row = {"method": name, "seed": seed, "genes": train.shape[1], "samples": options.samples, **figures}
            new = not options.out.exists()
            with options.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
