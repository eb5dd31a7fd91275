"""Five stochastic layers on dynamic MNIST (Sonderby et al., 2016): how many latent units each remedy keeps alive.

    python benchmarks/reproduce/ladder.py ../shared/data --seeds 0 1 2

z 64-32-16-8-4, two hidden layers of 512/256/128/64/32 units a level, or a share of them. `plain` and the two with
batch-norm infer bottom-up, q(z1 | x) q(z2 | z1) ...; `ladder` infers top-down: deterministic features rise from x, and
each level multiplies their Gaussian with p's own. A unit is active where its mean KL over 2000 test images is above
0.01 nats, batch-norm at the statistics of these images: at the running ones a few rows in a thousand may leave the
range that the nets were trained on, and their KLs swamp the mean. The count by the variance of its posterior mean
(above 0.01; Burda et al., 2016) stands beside it, and so does the share of test images whose bound is spoilt so.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from common import Binarized, binarized, mnist, record

import aevb
from aevb import MLP, VAE, BayesNet, Deterministic, DiagonalNormal, LadderNormal, TrainConfig
from aevb.bounds import evaluating, keeping_buffers

LATENTS = (64, 32, 16, 8, 4)
HIDDEN = (512, 256, 128, 64, 32)
MODELS = ("plain", "batch-norm", "batch-norm, warm-up", "ladder")


def build(model: str, start: torch.Tensor, share: float) -> VAE:
    """The pair, with a share of the paper's hidden units and at least 16; p is the same for all but for batch-norm."""
    normed = model != "plain"
    hidden = [max(16, round(share * width)) for width in HIDDEN]

    def net(inputs: int, width: int, outputs: int) -> MLP:
        return MLP(inputs, [width, width], outputs, "relu", batch_norm=normed)

    levels = range(1, len(LATENTS) + 1)
    p: dict[str, torch.nn.Module] = {f"z{len(LATENTS)}": aevb.StandardNormal(LATENTS[-1])}
    for level, (dims, above) in enumerate(pairwise(LATENTS), 1):
        p[f"z{level} | z{level + 1}"] = DiagonalNormal(net(above, hidden[level], 2 * dims))
    decoder = net(LATENTS[0], hidden[0], 784)
    with torch.no_grad():
        decoder.last.bias.copy_(torch.logit(start, eps=1e-4))
    p["x | z1"] = aevb.Bernoulli(decoder)
    q: dict[str, torch.nn.Module] = {}
    if model != "ladder":
        for level, below, dims, width in zip(levels, (784, *LATENTS), LATENTS, hidden, strict=False):
            q[f"z{level} | {f'z{level - 1}' if level > 1 else 'x'}"] = DiagonalNormal(net(below, width, 2 * dims))
        return VAE(BayesNet(p), BayesNet(q))
    for level, below, width in zip(levels, (784, *hidden), hidden, strict=False):
        q[f"d{level} | {f'd{level - 1}' if level > 1 else 'x'}"] = Deterministic(net(below, width, width))
    for level, dims, width in zip(levels, LATENTS, hidden, strict=True):
        evidence = MLP(width, [], 2 * dims)
        if level == len(LATENTS):
            q[f"z{level} | d{level}"] = DiagonalNormal(evidence)
        else:
            q[f"z{level} | d{level}, z{level + 1}"] = LadderNormal(evidence, p[f"z{level} | z{level + 1}"])
    return VAE(BayesNet(p), BayesNet(q))


def by_variance(vae: VAE, x: torch.Tensor) -> list[int]:
    """Active units of each level by the variance of their posterior mean."""
    spread = aevb.active_units(vae, {"x": x})
    return [int((spread[f"z{level}"] > 0.01).sum()) for level in range(1, len(LATENTS) + 1)]


@torch.no_grad()
def by_kl(vae: VAE, x: torch.Tensor, draws: int = 50) -> list[int]:
    """Active units of each level by their mean KL, batch-norm at the statistics of `x`."""
    torch.manual_seed(0)
    total = torch.zeros(sum(LATENTS))
    with keeping_buffers(vae):
        for _ in range(draws):
            values = aevb.terms(vae.train(), {"x": x}).values
            for level, part in enumerate(total.split(LATENTS), 1):
                q, above = (net.distribution(f"z{level}", values) for net in (vae.q, vae.p))
                part += torch.distributions.kl_divergence(q.base_dist, above.base_dist).mean((0, 1)) / draws
    return [int((part > 0.01).sum()) for part in total.split(LATENTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--warmup", type=int, default=40, help="epochs over which the weight of the KL rises")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--share", type=float, default=0.25, help="of the paper's hidden units")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products in training where the processor has them
    x, _, x_test, _ = mnist(args.data)
    steps = args.epochs * len(x) // args.batch
    torch.manual_seed(0)
    test = binarized(x_test)
    for seed in args.seeds:
        for model in args.models:
            torch.manual_seed(seed)
            vae, began = build(model, x.float().mean(0) / 255, args.share), time.monotonic()
            warm = args.warmup * len(x) // args.batch if "warm" in model or model == "ladder" else 0
            config = TrainConfig(
                steps=steps, batch_size=args.batch, learning_rate=args.rate, kl_warmup_steps=warm, average=0.0,
                validation=0.0, seed=seed, compile=True, log_every=500,
            )  # fmt: skip
            torch.set_float32_matmul_precision("medium")
            aevb.fit(vae, Binarized(x), config)
            minutes = (time.monotonic() - began) / 60
            torch.set_float32_matmul_precision("highest")
            counts = by_kl(vae, test[:2000])
            figures: dict[str, float | tuple[float, float]] = {
                "active units (KL)": sum(counts),
                "active units (variance)": sum(by_variance(vae, test[:2000])),
            }
            figures |= {f"active units of z{level} (KL)": count for level, count in enumerate(counts, 1)}
            with evaluating(vae):
                bound = torch.cat([aevb.elbo(vae, {"x": part}) for part in test.split(1000)]).double()
            spoilt = bound < bound.median() - 10 * (bound.quantile(0.75) - bound.quantile(0.25))
            figures["test ELBO"] = (float(bound.mean()), float(bound.std()) / len(bound) ** 0.5)
            figures["test images spoilt, %"] = 100 * float(spoilt.double().mean())
            with torch.no_grad(), keeping_buffers(vae):
                bound = torch.cat([aevb.elbo(vae.train(), {"x": part}) for part in test.split(1000)]).double()
            figures["test ELBO, statistics of the batch"] = (
                float(bound.mean()),
                float(bound.std()) / len(bound) ** 0.5,
            )
            setting = f"{model}; {args.epochs} epochs of batch {args.batch}, warm-up {args.warmup if warm else 0}"
            if any(getattr(args, name) != parser.get_default(name) for name in ("share", "rate")):
                setting += f", {args.share:g} of the widths, relu, cosine rate {args.rate:g}"
            record("five layers, dynamic MNIST", setting, seed, minutes, figures)


if __name__ == "__main__":
    main()
