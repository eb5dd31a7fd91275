"""The examples: each is run, with fewer steps where that is enough, and what it prints is held to a number.

Every test names what its example claims. Comparisons of estimates allow four standard errors.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import aevb

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = {
    "algorithm_2", "bayesian_regression", "blurriness", "conditional", "disentangle", "estimators",
    "generative_classifier", "ladder", "mixture", "per_datum", "remedies", "score_function", "semi_supervised",
    "two_layers", "wiring",
}  # fmt: skip


def example(name: str) -> ModuleType:
    """The example's file as a module; it runs nothing on import."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def gain(better: Tensor, worse: Tensor) -> float:
    """Mean difference row by row, in its standard errors."""
    difference = better - worse
    return float(difference.mean() / (difference.std() / len(difference) ** 0.5))


def test_every_example_is_tested_and_names_its_row_of_the_notes():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED
    for name in TESTED:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert re.search(r"\bN\d+\)", text.split('"""')[1].replace("\n", " ")), name
        assert 'if __name__ == "__main__":' in text, name


def test_two_layers(capsys):
    """Bounds rise with K, and the second layer is worth more than it costs."""
    found = example("two_layers").main()
    for rows in found.values():
        means = [float(value.mean()) for value in rows.values()]
        assert means == sorted(means)
    for wiring in ("bottom-up", "top-down"):
        assert gain(found[wiring]["log p"], found["one layer"]["log p"]) > 4
    assert "IWAE 50" in capsys.readouterr().out


def test_ladder():
    """Five layers: the plain q gives up the upper ones; the ladder uses them all, to a better bound."""
    found = example("ladder").main(steps=400)
    plain, ladder = found["bottom-up, plain"], found["ladder"]
    assert int(plain["active"][2:].sum()) == 0
    assert int(ladder["active"][-1]) > 0
    assert gain(ladder["elbo"], plain["elbo"]) > 4
    assert gain(ladder["elbo"], found["bottom-up"]["elbo"]) > 4


def test_conditional():
    """A Gaussian p(x | c) lacks most of log 2 and the width; a latent split does better, and draws on both branches."""
    found = example("conditional").main(steps=1200)
    observed, latent = found["p(x | c)"], found["p(x, z | c)"]
    # Of two narrow branches at +-m the best Gaussian's standard deviation is sqrt(m^2 + 0.1^2); m = 0.3 + c, c uniform.
    m = 0.3 + (torch.arange(10_000) + 0.5) / 10_000
    best = float((0.5 * (m.square() + 0.01).log()).mean() - torch.tensor(0.1 / 0.5).log())
    assert float(observed["monte_carlo"].max()) == 0
    error = float(observed["lacking"].std()) / 1000**0.5
    assert best - 4 * error < float(observed["lacking"].mean()) < best + 4 * error + 0.1
    assert gain(observed["lacking"], latent["lacking"]) > 20
    assert 0.4 < float((latent["draws"] > 0).double().mean()) < 0.6


def test_wiring():
    """Ancestral draws have the frequencies of the table; explaining away; a cycle is named."""
    found = example("wiring").main()
    assert float(found["joint"].sum()) == pytest.approx(1, abs=1e-6)
    assert bool(((found["counts"] - found["joint"]).abs() < 4 * found["error"]).all())
    assert found["rain"] < found["both"] < found["wet"]
    assert "cycle" in found["cycle"]
    assert "a -> c -> b -> a" in found["cycle"]


def test_mixture():
    """Summed classes are exact and reach EM; sampled and relaxed ones come near, judged by the exact bound."""
    found = example("mixture").main(steps=1000)
    best = found["em"]["log_p"]
    for discrete in ("sum", "sample", "relax"):
        one = found[discrete]
        assert one["rounding"] < 1e-5
        assert one["elbo"] <= one["log_p"]
    assert abs(found["sum"]["log_p"] - best) < 2e-3
    assert abs(found["sample"]["log_p"] - best) < 0.02
    assert found["relax"]["log_p"] < best
    assert found["several"]["call"] == pytest.approx(found["several"]["loop"], abs=1e-5)


def test_semi_supervised(capsys):
    """Unlabelled rows are worth something: M2 beats the classifier of the labels alone on the same test rows."""
    found = example("semi_supervised").main(steps=600)
    alone = found["p(y | x) on the labels"]
    assert gain(alone, found["M2"]) > 4
    assert float(found["M2"].mean()) < 0.2
    assert float(found["M1 + M2"].mean()) < float(found["p(y | z1) on the labels"].mean())
    assert "fewer by" in capsys.readouterr().out


def test_generative_classifier():
    """p(y | x) meets the exact rule within the Monte Carlo error; its probabilities are those of being right."""
    module = example("generative_classifier")
    found = module.gaussian(steps=1000)
    away = (found["p"] - found["exact"]).abs()
    assert bool((away < 5 * found["error"] + 1e-6).all())  # 5: six thousand comparisons
    assert float(found["error"].max()) < 0.02
    for _, sure, right, error in module.reliability(found["p"], found["y"]):
        assert abs(right - sure) < 4 * error
    digits = module.digits(steps=800)
    assert float((digits["p"].argmax(1) == digits["y"]).double().mean()) > 0.85
    torch.testing.assert_close(digits["p"].sum(1), torch.ones(len(digits["p"]), dtype=torch.float64))


def test_reliability_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.85, 0.15]], dtype=torch.float64)
    found = example("generative_classifier").reliability(p, torch.tensor([0, 0, 1]))
    assert [one[0] for one in found] == [1, 2]
    assert found[0][1:] == pytest.approx((0.6, 0.0, (0.24) ** 0.5))
    assert found[1][1:] == pytest.approx((0.825, 0.5, (0.16 + 0.85 * 0.15) ** 0.5 / 2))


def test_bayesian_regression():
    """The spread widens away from the data; at the exact q(w) the ELBO is the evidence, factorized its closed form."""
    found = example("bayesian_regression").main(steps=1800)
    assert found["outside"] > 4 * found["inside"]
    assert found["exact"] == pytest.approx(found["log_evidence"], abs=1e-3)  # float32, tens of nats
    below = found["best_factorized"] - found["factorized"]
    assert -4 * found["factorized_error"] < below < 4 * found["factorized_error"] + 0.05
    assert found["best_factorized"] < found["log_evidence"] - 0.1


def test_per_datum():
    """Refined from nothing, a factorized q reaches its closed form; the encoder's gap is real and not all of it."""
    found = example("per_datum").main(steps=800)
    closed = found["closed"]
    assert closed["lacking"] > 0.1
    assert -4 * closed["error"] < closed["below"] < 4 * closed["error"] + 5e-3
    digits = found["digits"]
    refined = digits["refined 600 steps"]
    assert gain(refined, digits["encoder"]) > 4
    assert gain(digits["log_prob"], refined) > 4
    assert abs(float((refined - digits["from nothing, 600 steps"]).mean())) < 0.1


def test_algorithm_2():
    """To rounding the library's number; as printed in the notes log q is no density."""
    found = example("algorithm_2").main()
    assert found["away"] < 1e-12
    printed, right = found["integrals"]["printed"], found["integrals"]["right"]
    assert abs(printed[0] - found["root"]) < 4 * printed[1]
    assert abs(right[0] - 1) < 4 * right[1]
    assert abs(printed[0] - 1) > 100 * printed[1]


def test_blurriness(tmp_path):
    """Both cures: fewer draws off the ring and a smaller divergence; all have more spread than the data."""
    module = example("blurriness")
    found = module.main(tmp_path / "ring.png", steps=1000)
    plain, q, p = found["plain VAE"], found["more flexible q"], found["more flexible p"]
    assert min(one.spread for one in found.values()) > module.WIDTH
    assert plain.off > 1.3 * q.off > 1.3 * p.off
    for cured in (q, p):
        assert plain.divergence - cured.divergence > 4 * (plain.divergence_error + cured.divergence_error)
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")


def test_density_of_the_ring():
    """It integrates to one, by a sum over a grid."""
    module = example("blurriness")
    axis = torch.arange(-1.5, 1.5, 0.005) + 0.0025
    total = module.log_density(torch.cartesian_prod(axis, axis)).exp().sum() * 0.005**2
    assert float(total) == pytest.approx(1, abs=1e-3)


def test_remedies(caplog):
    """Plain training collapses to the best model without z and says so; each remedy is better by many errors."""
    found = example("remedies").main(steps=700)
    assert "Posterior collapse" in caplog.text
    ring = found["ring"]
    assert float(ring["plain"]["kl"].sum()) < 0.05
    without = -torch.tensor(2 * torch.pi * torch.e * 0.51).log()
    assert float(ring["plain"]["elbo"].mean()) == pytest.approx(float(without), abs=0.02)
    for name in ("warm-up", "cyclical", "free bits"):
        assert gain(ring[name]["elbo"], ring["plain"]["elbo"]) > 4
        assert float(ring[name]["kl"].sum()) > 1
    digits = found["digits"]
    assert float(digits["warm-up"]["kl"].sum()) > float(digits["plain"]["kl"].sum())


def test_disentangle():
    """Total correlation finds the independent factors, at a cost in the bound."""
    found = example("disentangle").main(seeds=(1,))
    (elbo, plain), (cost, turned) = found["ELBO"][0], found["TC, gamma = 6"][0]
    assert turned.disentanglement > 0.95 > 0.5 > plain.disentanglement
    assert turned.mig > plain.mig + 0.2
    assert gain(elbo, cost) > 4


def test_estimators(capsys):
    """A density finds novelties, holes are filled better than by means, and rows without labels help."""
    found = example("estimators").main(draws=2, steps=250)
    assert found["auroc"] > 0.9
    assert 0 < found["monte carlo"] < 5
    error = (found["imputed, error"] ** 2 + found["column means, error"] ** 2) ** 0.5
    assert found["column means"] - found["imputed"] > 4 * error
    assert found["and 371 rows without"] > found["ten labels"]
    assert "nats a row" in capsys.readouterr().out


def test_score_function():
    """Both estimators have the exact mean; the pathwise one has the least variance, whatever the dimension."""
    found = example("score_function").main()
    for by_name in found.values():
        for away, error, _ in by_name.values():
            assert abs(away) < 4 * error
        spread = {name: one[2] for name, one in by_name.items()}
        assert spread["pathwise"] < spread["with a baseline"] < spread["score function"]
    assert found[100]["pathwise"][2] == pytest.approx(found[1]["pathwise"][2], rel=0.05)
    assert found[100]["with a baseline"][2] > 3 * found[1]["with a baseline"][2]


def test_examples_take_public_names_only():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert "from aevb." not in text, path.name
        imported = [line for line in text.splitlines() if line.startswith("from aevb import")]
        for line in imported:
            for name in line.removeprefix("from aevb import").split(","):
                assert name.strip() in aevb.__all__, (path.name, name)
