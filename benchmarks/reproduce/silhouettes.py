"""Caltech-101 silhouettes (split 1, 1 for the object): priors by the VampPrior paper's recipe; posteriors side by side.

    python benchmarks/reproduce/silhouettes.py ../shared/data priors
    python benchmarks/reproduce/silhouettes.py ../shared/data posteriors

`priors`: the nets of Tomczak and Welling (2018), gated dense 784-300-300-z40 and mirror, which see the pixels as they
are, batch 100, Adam at 5e-4, 500 pseudo-inputs that start around 0.8; the averaged weights of the best validation ELBO,
given up after 50 epochs without improvement; test log p(x) by importance sampling with 5000 draws. Their KL warm-up
over 100 epochs is `--warmup 100`.

`posteriors`: one and the same MLP, and -ELBO on the test set with no flow, planar, inverse autoregressive, spline or
Sylvester.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import record, silhouettes

import aevb
from aevb import MLP, VAE, BayesNet, ModelConfig, TrainConfig
from aevb.bounds import evaluating


def mean_of(values: torch.Tensor) -> tuple[float, float]:
    """Mean over rows with its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def gated(prior: str) -> VAE:
    """The paper's model."""
    q = aevb.DiagonalNormal(MLP(784, [300, 300], 2 * 40, gated=True))
    start = 0.8 + 0.01 * torch.randn(500, 784)
    root = aevb.StandardNormal(40) if prior == "standard" else aevb.VampPrior(q, start, bounds=(0, 1))
    x = aevb.Bernoulli(MLP(40, [300, 300], 784, gated=True))
    return VAE(BayesNet({"z": root, "x | z": x}), BayesNet({"z | x": q}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("priors", "posteriors"))
    parser.add_argument("--only", nargs="+", help="names of priors or posteriors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--average", type=float, default=0.995)
    parser.add_argument("--warmup", type=int, default=0, help="epochs over which the weight of the KL rises")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--validate", action="store_true", help="stop before the test set is looked at")
    args = parser.parse_args()
    data = silhouettes(args.data)
    x, epoch = data["train"], len(data["train"]) // 100
    names = args.only or (
        ["standard", "vamp"] if args.what == "priors" else ["diagonal", "planar", "iaf", "spline", "sylvester"]
    )
    for name in names:
        config = TrainConfig(
            steps=args.epochs * epoch, batch_size=100, learning_rate=args.rate, schedule="constant", patience=50,
            kl_warmup_steps=args.warmup * epoch, average=args.average, validate_every=epoch, seed=args.seed,
            compile=True, log_every=epoch * 10,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("medium")  # bfloat16 products in training where the processor has them
        if args.what == "priors":
            vae = gated(name)
        else:
            vae = aevb.build_vae(
                ModelConfig(
                    features=784, likelihood="bernoulli", latents=40, hidden=(300, 300), activation="relu",
                    posterior=name,
                ), x,
            )  # fmt: skip
        began = time.monotonic()
        run = aevb.fit(vae, {"x": x}, config, validation={"x": data["val"]})
        minutes = (time.monotonic() - began) / 60
        torch.set_float32_matmul_precision("highest")
        best = max((entry for entry in run.history if "validation" in entry), key=lambda entry: entry["validation"])
        print(f"{name}: validation ELBO {best['validation']:.2f} at epoch {best['step'] // epoch}", flush=True)
        if args.validate:
            continue
        with evaluating(vae):
            bound = torch.stack([aevb.elbo(vae, {"x": data["test"]}) for _ in range(50)]).mean(0)
        figures: dict[str, float | tuple[float, float]] = {
            "test -ELBO": (-mean_of(bound)[0], mean_of(bound)[1]), "epochs": best["step"] / epoch,
        }  # fmt: skip
        if args.what == "priors":
            marginal = aevb.log_marginal(vae, {"x": data["test"]}, args.samples)
            figures["test log p(x)"] = mean_of(marginal.log_prob)
            figures["Monte-Carlo error"] = float(marginal.std_error.square().sum().sqrt()) / len(data["test"])
            figures["rows with k-hat > 0.7"] = float((marginal.pareto_k > 0.7).sum())
        setting = f"{name}; {'gated' if args.what == 'priors' else 'relu'} 300-300, warm-up {args.warmup}"
        record(f"Caltech-101 silhouettes, {args.what}", setting, args.seed, minutes, figures)


if __name__ == "__main__":
    main()
