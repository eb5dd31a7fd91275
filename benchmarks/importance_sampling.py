"""Draws per second and peak memory of `aevb.log_marginal` against Pythae's `get_nll`, on the same net and weights.

    python -m venv peers && peers/bin/pip install -e . -r benchmarks/requirements.txt
    peers/bin/python benchmarks/importance_sampling.py [--rounds 7] [--rows 10] [--threads 2] [--no-memory]

The net is 784-200-200-z50 with tanh and a Bernoulli likelihood, in float32, with random weights. Each contestant has a
process of its own, and they take turns, each round in another order; the figures are medians over rounds of ratios
within a round, with their range. Time before the first pack (checks of the values, compilation) is left out by a first
call; draws are those that were drawn, not those that were asked for. `get_nll` runs without gradients, at its default
batch of 100 and at larger ones, of which the best has the largest median. The products are those of the decoder on
packs of 512 to 2048 draws in float32, the best of them likewise, into memory that is kept, with no biases and no
nonlinearities. "aevb bfloat16" is compiled, too, and multiplies matrices in bfloat16 where the processor has units for
it; what that changes of log p, `aevb.evaluate.rounding` says, on a trained model: see `time_to_quality.py`.

Memory: how far the peak of the resident set rises above the process after a first call (which imports and compiles), in
MB of 10^6 bytes. A row's data are the caller's: they are made before.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES, HIDDEN, LATENTS, SAMPLES = 784, 200, 50, 5000
PACKS, BATCHES = (512, 1024, 2048), (100, 250, 500, 1000, 2500, 5000)


def data(rows: int) -> Tensor:
    return (torch.rand(rows, FEATURES, generator=torch.Generator().manual_seed(0)) < 0.2).float()


def model():
    from aevb import MLP, VAE, BayesNet, Bernoulli, DiagonalNormal, StandardNormal

    torch.manual_seed(0)
    hidden = [HIDDEN, HIDDEN]
    decoder = MLP(LATENTS, hidden, FEATURES, activation="tanh")
    encoder = MLP(FEATURES, hidden, 2 * LATENTS, activation="tanh")
    return VAE(
        BayesNet({"z": StandardNormal(LATENTS), "x | z": Bernoulli(decoder)}),
        BayesNet({"z | x": DiagonalNormal(encoder)}),
    )


def ours(rows: int, compile: bool, precision: str = "float32"):
    """A closure that estimates log p(x) and tells the draws, and the mean estimate."""
    import aevb

    vae, x = model(), data(rows)

    def run() -> tuple[int, float]:
        found = aevb.log_marginal(vae, {"x": x}, SAMPLES, compile=compile, precision=precision)
        return found.samples * rows, float(found.log_prob.mean())

    return run


def pythae(rows: int, batch: int):
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    vae, x = model(), data(rows)
    drawn = [0]

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.q.conditional("z").net

        def forward(self, x: Tensor) -> ModelOutput:
            # softplus as the scale of ours, so that both draw from the same q
            loc, raw = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=2 * nn.functional.softplus(raw).log())

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.p.conditional("x").net

        def forward(self, z: Tensor) -> ModelOutput:
            drawn[0] += len(z)
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    config = VAEConfig(input_dim=(FEATURES,), latent_dim=LATENTS, reconstruction_loss="bce")
    peer = VAE(config, encoder=Encoder(), decoder=Decoder()).eval()

    def run() -> tuple[int, float]:
        drawn[0] = 0
        with torch.no_grad():
            log_prob = peer.get_nll(x, n_samples=SAMPLES, batch_size=batch)  # + log p under that name
        return drawn[0], float(log_prob)

    return run


def products(rows: int, pack: int):
    sizes = [LATENTS, HIDDEN, HIDDEN, FEATURES]
    weights = [torch.randn(out, into) / math.sqrt(into) for into, out in itertools.pairwise(sizes)]
    values = [torch.randn(pack, size) for size in sizes]
    packs = math.ceil(SAMPLES * rows / pack)

    def run() -> tuple[int, float]:
        with torch.no_grad():
            for _ in range(packs):
                for weight, (before, after) in zip(weights, itertools.pairwise(values), strict=True):
                    torch.mm(before, weight.T, out=after)
        return packs * pack, math.nan

    return run


CONTESTANTS = {
    "aevb eager": lambda rows: ours(rows, compile=False),
    "aevb compiled": lambda rows: ours(rows, compile=True),
    "aevb bfloat16": lambda rows: ours(rows, compile=True, precision="bfloat16"),
    **{f"pythae, batch {batch}": lambda rows, batch=batch: pythae(rows, batch) for batch in BATCHES},
    **{f"products, pack {pack}": lambda rows, pack=pack: products(rows, pack) for pack in PACKS},
}


def work(name: str, rows: int, threads: int, cpu_time: bool, pipe) -> None:
    """A contestant's process: one timed run each time it is asked."""
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    run = CONTESTANTS[name](rows)
    run()
    pipe.send(None)
    while pipe.recv():
        began = clock()
        drawn, log_prob = run()
        pipe.send((drawn / (clock() - began), drawn, log_prob))


def race(rounds: int, rows: int, threads: int, cpu_time: bool) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTESTANTS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, rows, threads, cpu_time, theirs), daemon=True).start()
        theirs.close()  # so that a process that dies ends the wait
        pipes[name].recv()
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    told = {}
    names = list(CONTESTANTS)
    for turn in range(rounds):
        shift = turn * 5 % len(names)
        for name in names[shift:] + names[:shift]:
            pipes[name].send(True)
            rate, *told[name] = pipes[name].recv()
            rates[name].append(rate)
    best = {
        "products": rates[max((f"products, pack {pack}" for pack in PACKS), key=lambda n: statistics.median(rates[n]))],
        "pythae's default": rates["pythae, batch 100"],
        "pythae's best": rates[max((f"pythae, batch {b}" for b in BATCHES), key=lambda n: statistics.median(rates[n]))],
    }
    print(f"{'':22s}{'draws/s':>9s}{'draws a row':>13s}{'log p':>10s}")
    for name in CONTESTANTS:
        drawn, log_prob = told[name]
        print(f"{name:22s}{statistics.median(rates[name]):9.0f}{drawn / rows:13.0f}{log_prob:10.3f}")
    for pipe in pipes.values():
        pipe.send(False)
    for name in (name for name in names if name.startswith("aevb")):
        for other, theirs in best.items():
            ratios = [a / b for a, b in zip(rates[name], theirs, strict=True)]
            print(
                f"{name:14s} / {other:17s} {statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def peak() -> int:
    """The largest resident set since it was reset, in bytes."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def swell(rows: int, samples: int, compile: bool, pipe) -> None:
    """How far one call's peak rises above what the process holds after a call like it on two rows."""
    import aevb

    torch.set_num_threads(1)
    vae, x = model(), data(rows)
    aevb.log_marginal(vae, {"x": x[:2]}, min(samples, SAMPLES), compile=compile)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    aevb.log_marginal(vae, {"x": x}, samples, compile=compile)
    pipe.send((peak() - before) / 1e6)


def memory() -> None:
    context = multiprocessing.get_context("spawn")
    for compile in (False, True):
        for rows, samples in ((1, 10_000), (1, 1_000_000), (10_000, 1), (100_000, 1)):
            pipe, theirs = context.Pipe()
            process = context.Process(target=swell, args=(rows, samples, compile, theirs))
            process.start()
            theirs.close()
            print(
                f"{'aevb compiled' if compile else 'aevb eager':14s} {rows:7d} rows of {samples:7d} draws: peak "
                f"{pipe.recv():+6.0f} MB",
                flush=True,
            )
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a busy machine")
    parser.add_argument("--no-race", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds of {options.rows} rows")
    if not options.no_race:
        race(options.rounds, options.rows, options.threads, options.cpu_time)
    if not options.no_memory:
        memory()


if __name__ == "__main__":
    main()
