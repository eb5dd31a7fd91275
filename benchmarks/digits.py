"""The demo's figure on several seeds, with the defaults: test log p(x) of handwritten digits, importance sampling.

    python benchmarks/digits.py [--seeds 0 1 2] [--samples 5000]

Rows 0-1499 of scikit-learn's digits train (a tenth held out, which chooses the weights), rows 1500-1796 are the test
set; likelihood Binomial(16).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def aevb(*words: str) -> str:
    code = "import sys; sys.argv[0] = 'aevb'; from aevb.apps.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=5000)
    options, flags = parser.parse_known_args()  # further flags go to `aevb train`
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            run, began = str(Path(folder) / "run"), time.perf_counter()
            aevb("train", "digits", "--out", run, "--seed", str(seed), *flags)
            trained = time.perf_counter() - began
            found = json.loads(aevb("evaluate", run, "--samples", str(options.samples), "--json"))
        print(
            f"seed {seed}: test log p(x) = {found['log_prob']:.2f} ± {found['std_error']:.2f} nats "
            f"({options.samples} samples), Monte-Carlo error {found['monte_carlo_error']:.3f}, "
            f"k-hat > 0.7 in {found['untrusted']} of {found['rows']}, "
            f"ELBO {found['elbo']:.2f}, active {found['active']['z'][0]} of {found['active']['z'][1]}, "
            f"trained in {trained:.0f} s, all {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
