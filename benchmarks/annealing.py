"""Minutes of `ais` on the 784-200-200-z50 net, and its share of what the decoder's matrix products allow.

    python benchmarks/annealing.py [--images 100] [--chains 16] [--temperatures 1000] [--leapfrogs 10] [--run RUN]

A leapfrog is one pass of a chain through the decoder and back to its inputs; the pilot's are counted. `--run` names the
folder of a trained Bernoulli model with one latent node, else weights are random. The products, forward and back to the
inputs on packs of as many chains, into memory that is kept, run before and after for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from torch import Tensor

import aevb
from aevb import MLP, VAE, BayesNet, Bernoulli, DiagonalNormal, StandardNormal
from aevb.evaluate.annealing import ais

FEATURES, HIDDEN, LATENTS, PILOTS = 784, [200, 200], 50, 4


def model() -> VAE:
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(LATENTS), "x | z": Bernoulli(MLP(LATENTS, HIDDEN, FEATURES, activation="tanh"))})
    q = BayesNet({"z | x": DiagonalNormal(MLP(FEATURES, HIDDEN, 2 * LATENTS, activation="tanh"))})
    return VAE(p, q)


def products(weights: list[Tensor], pack: int, seconds: float, clock) -> float:
    """Passes of a chain, forward and back, a second."""
    sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    values = [torch.randn(pack, size) for size in sizes]
    layers = [*zip(weights, itertools.pairwise(values), strict=True)]
    began, done = clock(), 0
    while clock() - began < seconds:
        for weight, (before, after) in layers:
            torch.mm(before, weight.T, out=after)
        for weight, (before, after) in reversed(layers):
            torch.mm(after, weight, out=before)
        for value in values:
            value.clamp_(-1, 1)  # what grows past the largest float would take longer
        done += pack
    return done / (clock() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--temperatures", type=int, default=1000)
    parser.add_argument("--leapfrogs", type=int, default=10)
    parser.add_argument("--pack", type=int, default=2048)
    parser.add_argument("--start", choices=("prior", "posterior"), default="prior")
    parser.add_argument("--run", help="folder of a trained run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    vae = aevb.load(options.run).vae if options.run else model()
    x = vae.p.sample(options.images)["x"]
    weights = [w.detach() for w in vae.p.conditional("x").net.parameters() if w.ndim == 2]
    pack = min(options.pack, options.images * options.chains)
    plan = {name: getattr(options, name) for name in ("chains", "temperatures", "leapfrogs", "start", "pack")}
    ais(vae, {"x": x[:2]}, **plan | {"temperatures": 3})
    before = products(weights, pack, 2.0, clock)
    began = clock()
    found = ais(vae, {"x": x}, **plan)
    seconds = clock() - began
    after = products(weights, pack, 2.0, clock)
    # The pilot: 30 more transitions at the first temperature, and max(1, 50 / T) at each.
    pilot = PILOTS * (30 + (options.temperatures - 1) * max(1, 50 // options.temperatures))
    passes = options.images * options.leapfrogs * (options.chains * (options.temperatures - 1) + pilot)
    print(
        f"torch {torch.__version__}, {options.threads} threads: {options.images} images, {options.chains} chains, "
        f"{options.temperatures} temperatures, {options.leapfrogs} leapfrogs\n"
        f"log p {found.log_prob.mean():.2f}, acceptance {found.acceptance.mean():.2f}; {seconds / 60:.2f} minutes, "
        f"{passes / seconds:.0f} chains x leapfrogs a second, where the products make "
        f"{before:.0f} and {after:.0f}: a share of {passes / seconds / before:.2f} and {passes / seconds / after:.2f}"
    )


if __name__ == "__main__":
    main()
