"""Semi-supervised M2 on MNIST with 100 labels (Kingma et al., 2014): test error over draws of the labels.

    python benchmarks/reproduce/m2.py ../shared/data --draws 0 1 2 3 4

Ten labels a class are drawn from the first 50,000 training images by each seed, the other labels are hidden; 1000 of
the last 10,000 training images choose between settings (--validate); the figure is that of the 10,000 test images.
Pixels turn black or white by their grey values anew each time they are used; the classifier is judged at the grey
values. One hidden layer of 500 units and 50 latents as in the paper; its softplus without batch-norm or dropout of
the classifier's inputs is `--activation softplus --no-batch-norm --dropout 0`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import binarized, mnist, record
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, TrainConfig
from aevb.bounds import evaluating


class Mixed:
    """Batches of which the first `share` are labelled rows, drawn anew each time, the rest unlabelled ones."""

    def __init__(self, grey: Tensor, y: Tensor, labelled: Tensor, share: float) -> None:
        self.grey, self.y, self.labelled, self.share = grey, y, labelled, share

    def __len__(self) -> int:
        return len(self.grey)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        known = round(self.share * len(indices))
        chosen = self.labelled[torch.randint(len(self.labelled), (known,))]
        y = torch.cat([self.y[chosen], torch.full((len(indices) - known,), -1)])
        return {"x": binarized(self.grey[torch.cat([chosen, indices[known:]])]), "y": y}


def build(hidden: list[int], latents: int, activation: str, normed: bool, dropout: float) -> VAE:
    """The paper has one layer of 500 softplus units each."""

    def net(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, hidden, outputs, activation, batch_norm=normed)

    p = BayesNet({
        "y": aevb.Categorical(10),
        "z": aevb.StandardNormal(latents),
        "x | y, z": aevb.Bernoulli(net(10 + latents, 784)),
    })  # fmt: skip
    classifier = nn.Sequential(nn.Dropout(dropout), net(784, 10)) if dropout else net(784, 10)
    q = BayesNet({
        "y | x": aevb.Categorical(10, classifier),
        "z | x, y": aevb.DiagonalNormal(net(794, 2 * latents)),
    })  # fmt: skip
    return VAE(p, q)


def error_of(vae: VAE, grey: Tensor, y: Tensor) -> float:
    """Share of wrong labels, %, by q(y | x) at the grey values."""
    with evaluating(vae):
        probs = vae.posterior({"x": grey.float() / 255})["y"].mean
    return 100 * float((probs.argmax(-1) != y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.2, help="labelled rows of a batch")
    parser.add_argument("--weight", type=float, default=50.0, help="of log q(y | x) in a labelled row")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, nargs="+", default=[500])
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--dropout", type=float, default=0.3, help="of the classifier's inputs")
    parser.add_argument("--batch-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--validate", action="store_true", help="judge on 1000 validation labels, record nothing")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products where the processor has them
    x, y, x_test, y_test = mnist(args.data)
    held = 50_000 + torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:1000]
    x_val, y_val = x[held], y[held]
    for seed in args.draws:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(50_000, generator=generator)
        labelled = torch.cat([order[y[order] == digit][:10] for digit in range(10)])
        torch.manual_seed(seed)
        vae, began = build(args.hidden, args.latents, args.activation, args.batch_norm, args.dropout), time.monotonic()
        config = TrainConfig(
            steps=args.steps, batch_size=args.batch, learning_rate=args.rate, average=0.999, validation=0.0, seed=seed,
            log_every=500, compile=True, weight_decay=args.decay,
        )  # fmt: skip

        def told(record: dict[str, object], vae: VAE = vae) -> None:
            if args.validate:
                wrong = error_of(vae, x_val, y_val)
                print(f"{record['step']}: bound {record['bound']:.2f}, validation error {wrong:.2f} %", flush=True)

        aevb.fit(
            vae, Mixed(x[:50_000], y, labelled, args.share), config, progress=told,
            objective=aevb.with_classifier("y", args.weight),
        )  # fmt: skip
        minutes = (time.monotonic() - began) / 60
        if args.validate:
            print(
                f"seed {seed}: validation error {error_of(vae, x_val, y_val):.2f} % ({minutes:.1f} min)",
                flush=True,
            )
            continue
        setting = f"{args.steps} steps of {args.batch}, {args.share:g} labelled, weight {args.weight:g}"
        record("M2, MNIST, 100 labels", setting, seed, minutes, {"test error %": error_of(vae, x_test, y_test)})


if __name__ == "__main__":
    main()
