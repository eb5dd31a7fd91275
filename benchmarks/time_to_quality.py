"""Minutes to a test log-likelihood: MNIST binarised anew at each use, the net of Burda et al. (2016), 784-200-200-z50.

    python benchmarks/time_to_quality.py ../shared/data [--seed 0] [--epochs 410] [--threads 2]

Of the 60,000 training images 1000, drawn at random, choose nothing: they show the bound on the way. The final weights
are the averaged ones of the last step. The test images are drawn once, seed 0; their log p is importance sampling's
with 5000 draws. The paper's figure for this net is -86.76, after 3280 epochs of batch 20. Writes the figure to
`results/`, and the curve beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from results import FOLDER, conditions, write

import aevb
from aevb.data import Binarized, load
from aevb.evaluate import rounding

PAPER = -86.76


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=410)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--average", type=float, default=0.9995)
    parser.add_argument("--objective", choices=("elbo", "iwae"), default="iwae")
    parser.add_argument("--draws", type=int, default=5, help="of the objective, a row")
    parser.add_argument("--gradient", default="dreg")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="bfloat16", help="of training's products"
    )
    parser.add_argument("--samples", type=int, default=5000, help="of importance sampling")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    told = conditions(options.threads)
    torch.set_num_threads(options.threads)
    data = load(options.data / "mnist" / "mnist.npz", binarize="epoch")
    shown = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(options.seed))[:1000]
    grey = data.train[np.setdiff1d(np.arange(len(data.train)), shown.numpy())]
    drawn = (torch.rand(1000, 784, generator=torch.Generator().manual_seed(1)) * 255 < data.train[shown]).float()
    shape = {"features": 784, "latents": 50, "hidden": (200, 200), "activation": "tanh"}
    torch.manual_seed(options.seed)
    vae = aevb.build_vae(aevb.ModelConfig(likelihood="bernoulli", **shape), grey / 255)
    steps = int(options.epochs * len(grey) / options.batch)
    config = aevb.TrainConfig(
        steps=steps, batch_size=options.batch, learning_rate=options.rate, warmup_steps=500, gradient=options.gradient,
        samples=options.draws, precision=options.precision, average=options.average, compile=True, validation=0.0,
        patience=0, seed=options.seed, log_every=100,
    )  # fmt: skip
    curve: list[tuple[float, float, float]] = []
    next_look, began, spent = 0.0, time.perf_counter(), 0.0

    @torch.no_grad()
    def look(record: dict[str, object]) -> None:
        nonlocal next_look, spent
        if record["epoch"] >= next_look or record["step"] == steps:
            asked = time.perf_counter()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                bound = float(aevb.iwae(vae.eval(), {"x": drawn}, samples=20).mean())
            vae.train()
            curve.append((record["epoch"], (asked - began - spent) / 60, bound))
            print(f"epoch {curve[-1][0]:6.1f}  {curve[-1][1]:5.1f} min  iwae-20 {bound:.2f}", flush=True)
            next_look += 10
            spent += time.perf_counter() - asked

    aevb.fit(vae, Binarized(grey), config, objective=options.objective, progress=look)
    minutes = (time.perf_counter() - began - spent) / 60
    began = time.perf_counter()
    found = aevb.log_marginal(vae, {"x": data.test}, samples=options.samples, compile=True)
    mean, error = float(found.log_prob.mean()), float(found.log_prob.std() / len(data.test) ** 0.5)
    print(
        f"{minutes:.1f} min of training, seed {options.seed}: test log p(x) = {mean:.2f} ± {error:.2f} nats, "
        f"Monte-Carlo error {float(found.std_error.square().mean().sqrt() / len(data.test) ** 0.5):.4f}, "
        f"k-hat above 0.7 in {int((found.pareto_k > 0.7).sum())} of {len(data.test)} "
        f"({(time.perf_counter() - began) / 60:.1f} min of evaluation)"
    )
    few = {"x": data.test[:: max(1, len(data.test) // 1000)]}
    exact, coarse = (
        aevb.log_marginal(vae, few, samples=options.samples, compile=True, precision=each)
        for each in ("float32", "bfloat16")
    )
    rounded = rounding(exact, coarse, len(data.test))
    print(f"bfloat16 in evaluation, on some of these images: {rounded}, allowed: {rounded.allowed}")
    plot(curve, mean, FOLDER / "time_to_quality.svg")
    named = ("seed", "epochs", "batch", "rate", "average", "objective", "draws", "gradient", "precision")
    row = {name: getattr(options, name) for name in named}
    row |= {"minutes": minutes, "log_prob": mean, "std_error": error}
    write("time_to_quality", [row], told)


def plot(curve: list[tuple[float, float, float]], final: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, minutes, bounds = zip(*curve, strict=True)
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    panel.plot(minutes, bounds, label="IWAE bound of 20 draws, 1000 images held out, weights as they are")
    panel.axhline(PAPER, color="gray", linestyle=":", label=f"Burda et al. (2016), test: {PAPER}")
    panel.plot(minutes[-1], final, "o", color="C1", label=f"test log p(x), IS-5000, averaged weights: {final:.2f}")
    panel.set(xlabel="minutes of training", ylabel="nats", ylim=(min(bounds[len(bounds) // 10 :]) - 1, PAPER + 1.5))
    panel.legend(fontsize="small", loc="lower right")
    plt.rcParams["svg.hashsalt"] = "aevb"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
