"""Examples per second of `aevb.fit` against a hand-written eager PyTorch loop, on the same net and data in memory.

    python benchmarks/train_step.py [--rounds 7] [--batches 100 500] [--threads 2]

The contestants take turns in one process, each round in another order; the figure is the median over rounds of the
ratio to the hand-written loop of the same round, with its range. `fit` runs with all its checks, its averaged weights
and its history; the hand-written loop has one fused Adam, permutation slices, no checks and no logging. Time before the
first update (checks, compilation) is not counted: it is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import aevb
from aevb import MLP, VAE, BayesNet, Bernoulli, DiagonalNormal, StandardNormal

FEATURES, HIDDEN, LATENTS, ROWS = 784, [200, 200], 50, 20_000


def hand_written(x: torch.Tensor, batch: int):
    """A closure that trains for some steps, as a good engineer writes it by hand."""
    torch.manual_seed(0)
    tanh = nn.Tanh
    encoder = nn.Sequential(nn.Linear(784, 200), tanh(), nn.Linear(200, 200), tanh(), nn.Linear(200, 100))
    decoder = nn.Sequential(nn.Linear(50, 200), tanh(), nn.Linear(200, 200), tanh(), nn.Linear(200, 784))
    params = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)

    def train(steps: int) -> float:
        began, done = time.perf_counter(), 0
        while done < steps:
            order = torch.randperm(len(x))
            for start in range(0, len(x) - batch + 1, batch):
                rows = x[order[start : start + batch]]
                loc, raw = encoder(rows).chunk(2, -1)
                scale = F.softplus(raw)
                logits = decoder(loc + scale * torch.randn_like(loc))
                nll = F.binary_cross_entropy_with_logits(logits, rows, reduction="none").sum(-1)
                kl = 0.5 * (scale.square() + loc.square() - 1 - 2 * scale.log()).sum(-1)
                loss = (nll + kl).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
        return steps * batch / (time.perf_counter() - began)

    return train


class Fitted:
    """`aevb.fit`, one call held open: it trains for some steps each time it is asked."""

    def __init__(self, x: torch.Tensor, batch: int, compile: bool) -> None:
        torch.manual_seed(0)
        p = BayesNet(
            {"z": StandardNormal(LATENTS), "x | z": Bernoulli(MLP(LATENTS, HIDDEN, FEATURES, activation="tanh"))}
        )
        q = BayesNet({"z | x": DiagonalNormal(MLP(FEATURES, HIDDEN, 2 * LATENTS, activation="tanh"))})
        self.vae, self.x, self.batch, self.compile = VAE(p, q), x, batch, compile

    def __call__(self, steps: int) -> float:
        # The clock runs from the first record of the history to the last, one log interval apart: no set-up in it.
        marks: list[float] = []
        config = aevb.TrainConfig(
            steps=steps + 50, batch_size=self.batch, compile=self.compile, log_every=50, validation=0.0, patience=0
        )
        aevb.fit(self.vae, {"x": self.x}, config, progress=lambda record: marks.append(time.perf_counter()))
        return steps * self.batch / (marks[-1] - marks[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = (torch.rand(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds of {options.steps} steps")
    for batch in options.batches:
        contestants = {
            "hand-written eager": hand_written(x, batch),
            "aevb eager": Fitted(x, batch, compile=False),
            "aevb compiled": Fitted(x, batch, compile=True),
        }
        for train in contestants.values():
            train(100)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(options.rounds):
            names = list(contestants)
            for name in names[turn % 3 :] + names[: turn % 3]:
                rates[name].append(contestants[name](options.steps))
        for name, values in rates.items():
            ratios = [v / h for v, h in zip(values, rates["hand-written eager"], strict=True)]
            print(
                f"batch {batch:4d}  {name:20s} {statistics.median(values):8.0f} examples/s   ratio "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
