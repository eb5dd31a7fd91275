"""Seconds a step on one process and on two, one thread each, against a model of the cost.

    python benchmarks/processes.py [--rounds 5] [--steps 100] [--batches 100 500 2000] [--processes 2]

Net 784-200-200-z50, bytes in memory, `shards` as many as processes, compiled. Of W processes a step takes

    t(W) = (A / W) (f + b r) + u + s(W)

where A is the number of parts, b a part's rows, f what a part costs beside its rows, r the time of a row, u the
update, and s(W) the sum of one flat buffer over the processes. f and r are fitted to one process's steps at the
smallest and the largest batch, u and s are measured apart; the middle batch and all steps on several processes are
then predicted. Rounds alternate. It needs as many idle cores as processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from contestants import NETS, Setting
from race import spread
from results import conditions, write


def work(batch: int, shards: int, steps: int) -> None:
    """Train; the first process prints seconds a step, and those of a sum and of an update alone, as JSON."""
    import torch

    import aevb
    from aevb.training.processes import join
    from aevb.training.updates import OptimizerState, update_eagerly

    torch.set_num_threads(1)
    setting = Setting(contestant="", batch=batch, dtype="uint8", threads=1, **NETS["784-200-200-z50"])
    torch.manual_seed(0)
    shape = {"features": 784, "latents": setting.latents, "hidden": setting.hidden, "activation": setting.activation}
    vae = aevb.build_vae(aevb.ModelConfig(likelihood="bernoulli", **shape))
    marks: list[float] = []
    config = aevb.TrainConfig(
        steps=2 * steps, batch_size=batch, shards=shards, compile=True, validation=0.0, patience=0, log_every=steps
    )
    aevb.fit(vae, {"x": torch.from_numpy(setting.data())}, config, progress=lambda _: marks.append(time.perf_counter()))
    processes = join()
    flat = torch.zeros(sum(p.numel() for p in vae.parameters()))

    def seconds(work: object, times: int = 50) -> float:
        for _ in range(5):
            work()
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    params = [p for p in vae.parameters() if p.requires_grad]
    state = OptimizerState.start(params, config, [])
    grads = [torch.zeros_like(p) for p in params]
    found = {
        "sum": seconds(lambda: processes.sum_(flat)),
        "update": seconds(lambda: update_eagerly(state, grads, torch.zeros(()), 1e-3, config)),
    }
    if processes.is_writer:
        print(json.dumps(found | {"step": (marks[1] - marks[0]) / steps}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batches", type=int, nargs=3, default=[100, 500, 2000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    told = conditions(1)
    found: dict[tuple[int, int], list[dict[str, float]]] = {}
    for turn in range(options.rounds):
        for batch in options.batches:
            for size in (1, options.processes) if turn % 2 else (options.processes, 1):
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
                command = [sys.executable, *launcher[: 4 if size > 1 else 0], __file__, "--worker"]
                numbers = (batch, options.processes, options.steps)
                done = subprocess.run(
                    [*command, *map(str, numbers)], check=True, capture_output=True, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
                found.setdefault((batch, size), []).append(json.loads(line))

    def median(batch: int, size: int, name: str) -> float:
        return statistics.median(run[name] for run in found[batch, size])

    parts, (small, _, large) = options.processes, options.batches
    update = statistics.median(median(batch, 1, "update") for batch in options.batches)
    low, high = median(small, 1, "step") - update, median(large, 1, "step") - update
    row = (high - low) / (large - small)
    fixed = (low - small * row) / parts
    print(f"fitted: {1e6 * row:.2f} us a row, {1e3 * fixed:.2f} ms a part beside; update {1e3 * update:.2f} ms")
    rows = []
    for (batch, size), runs in sorted(found.items()):
        exchange = median(batch, size, "sum") if size > 1 else 0.0
        predicted = parts / size * (fixed + batch / parts * row) + update + exchange
        middle, least, most = spread([run["step"] for run in runs])
        gains = [one["step"] / many["step"] for one, many in zip(found[batch, 1], runs, strict=True)]
        gain = spread(gains)
        print(
            f"batch {batch:5d}, {size} process(es): {1e3 * middle:7.2f} ms a step ({1e3 * least:.2f} to "
            f"{1e3 * most:.2f}), predicted {1e3 * predicted:7.2f}; sum {1e3 * exchange:.2f} ms; {gain[0]:.2f} times "
            f"one process ({gain[1]:.2f} to {gain[2]:.2f})"
        )
        rows.append({
            "batch": batch, "processes": size, "ms_step": 1e3 * middle, "low": 1e3 * least, "high": 1e3 * most,
            "ms_predicted": 1e3 * predicted, "ms_sum": 1e3 * exchange, "gain": gain[0],
        })  # fmt: skip
    write("processes", rows, told)


if __name__ == "__main__":
    main()
