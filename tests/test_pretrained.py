"""Models for others: the folder holds the run to the bit, its card the run's figures, and neither what is private."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

import aevb
from aevb import MLP, VAE, BayesNet, DiagonalNormal, InputError, ModelConfig, Normal, Run, StandardNormal, TrainConfig
from aevb.apps.card import _yaml
from aevb.data import Data
from test_cli import refuse, succeed

TRAIN = ["--steps", "20", "--hidden", "4", "--latents", "2", "--validate-every", "10", "--log-every", "10"]
NAMES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of several kinds with holes, in a folder whose name is nobody's business; an evaluated run, published."""
    folder = tmp_path_factory.mktemp("confidential")
    rng = np.random.default_rng(0)
    pl.DataFrame(
        {
            "sex|gender": rng.choice(["f", "m"], 90),
            "height": rng.normal(1.7, 0.1, 90).round(4),
            "born": [f"19{year}-03-01" if year % 9 else None for year in rng.integers(10, 99, 90)],
            "record": [f"P{i:05d}" for i in range(90)],
        }
    ).write_csv(folder / "people.csv")
    succeed("train", folder / "people.csv", "--out", folder / "run", *TRAIN)
    succeed("evaluate", folder / "run", "--samples", "40", "--also", "information")
    told = succeed("export", folder / "run", "--out", folder / "model", "--format", "pretrained", "--license", "mit")
    assert "README.md" in told
    return folder


def _run(vae: VAE | None = None, **fields: Any) -> Run:
    torch.manual_seed(0)
    made = vae or aevb.build_vae(ModelConfig(**{"features": 3, "hidden": (4,), "latents": 2} | fields))
    return Run(vae=made, config=TrainConfig(), history=[])


def _front_matter(folder: Path) -> dict[str, Any]:
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_model_comes_back_to_the_bit(people: Path) -> None:
    assert {path.name for path in (people / "model").iterdir()} == NAMES
    ours, theirs = aevb.load(people / "run").vae, aevb.from_pretrained(people / "model")
    assert theirs.config == ours.config
    assert not theirs.training
    x = ours.p.sample(20)["x"]
    bounds = []
    for vae in (ours, theirs):
        torch.manual_seed(1)
        bounds.append(aevb.elbo(vae, {"x": x}))
    assert torch.equal(*bounds)


def test_the_cards_figures_are_those_of_the_evaluation(people: Path) -> None:
    told, text = _front_matter(people / "model"), (people / "model" / "README.md").read_text()
    wanted = json.loads((people / "run" / "evaluation.json").read_text())
    assert (told["library_name"], told["license"]) == ("aevb", "mit")
    (index,) = told["model-index"]
    (result,) = index["results"]
    assert index["name"] == "model"
    assert result["dataset"] == {"type": "people.csv", "name": "people.csv", "split": "validation"}
    assert {each["type"]: each["value"] for each in result["metrics"]} == {
        "log-likelihood": wanted["log_prob"], "elbo": wanted["elbo"],
    }  # fmt: skip
    assert all(each["args"] == {"samples": 40, "seed": 0} for each in result["metrics"])
    assert f"**validation log p(x) = {wanted['log_prob']:.2f} ± {wanted['std_error']:.2f} nats (40 samples)**" in text
    assert f"Monte-Carlo error {wanted['monte_carlo_error']:.3f} nats" in text
    assert f"k-hat > 0.7 in {wanted['untrusted']} of 9 rows" in text
    assert f"| ELBO | {wanted['elbo']:.2f} nats |" in text
    assert "### What the latents carry" in text
    history = aevb.load(people / "run").history
    assert f"| steps | {history[-1]['step']} of at most 20 |" in text
    assert "| rows | 90 to train on, 9 of them held out to choose the weights; none to test on |" in text
    for row in (r"| `sex\|gender` | binary |", "| `height` | continuous |", "| `record` | identifier, set aside |"):
        assert row in text
    assert '"x | z": Mixed' in text
    assert "steps=20, validate_every=10, log_every=10" in text


def test_nothing_private_is_in_the_folder(people: Path) -> None:
    """Neither paths, nor cells, nor what a schema's reasons tell of them; categories are, and the card says so."""
    heights = pl.read_csv(people / "people.csv")["height"].to_list()
    for path in (people / "model").iterdir():
        content = path.read_bytes()
        for word in ("confidential", str(Path.home()), str(people.parent), "P00007", "fractions"):
            assert word.encode() not in content, f"{word} in {path.name}"
        if path.suffix != ".safetensors":
            text = content.decode()
            assert not re.search(r"""(^|[\s"'`(])/\w""", text)
            assert not any(str(height) in text for height in heights)
            fingerprint = aevb.load(people / "run").data["sha256"]["train"]
            assert fingerprint not in text
    assert '"f"' in (people / "model" / "config.json").read_text()
    assert "names of the columns and of all categories" in (people / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    "config",
    [
        {"holes": True},
        {"likelihood": "bernoulli", "posterior": "planar"},
        {"likelihood": "negative-binomial", "library": "observed"},
        {"likelihood": "negative-binomial", "library": "latent", "posterior": "full"},
        {"likelihood": "negative-binomial", "library": "observed", "batches": 2},
        {"likelihood": "poisson", "batches": 4},
        {"likelihood": "mixed", "kinds": ("binary", "categorical:3", "count"), "posterior": "product"},
    ],
)
def test_the_cards_lines_run_as_they_stand(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = aevb.save_pretrained(_run(**config), tmp_path / "model")
    code, told = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[:2]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["x"].shape == (3, 3)
    assert eval(told, names) == names["vae"].config


def test_a_target_is_predicted_by_the_cards_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"features": 2, "likelihood": "mixed", "kinds": ("binary", "count"), "target": "categorical:3"}
    folder = aevb.save_pretrained(_run(**config), tmp_path / "model")
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert {name: value.shape for name, value in names["rows"].items()} == {"x": (3, 2), "y": (3,)}
    marginal = aevb.log_marginal(names["vae"], names["rows"], samples=50)
    assert bool((marginal.std_error > 0).all())  # z is summed over, not observed
    predicted = names["vae"].q.distribution("y", names["rows"]).mean
    torch.testing.assert_close(predicted.sum(1), torch.ones(3))


def test_a_model_that_was_not_judged_says_so_and_gives_no_figure(people: Path, tmp_path: Path) -> None:
    run = aevb.load(people / "run")
    with torch.no_grad():
        next(run.vae.parameters()).add_(1.0)
    for name, each, told in (
        ("never", Run(vae=run.vae, config=run.config, history=run.history, data=run.data), "was not evaluated"),
        ("other", run, "is of other weights than these"),
    ):
        folder = aevb.save_pretrained(each, tmp_path / name)
        text = (folder / "README.md").read_text()
        assert told in text
        assert "model-index" not in text
        assert not re.search(r"-?\d+\.\d+ (± \S+ )?nats", text)
        assert "license" not in _front_matter(folder)
        assert "None was given" in text


def test_files_are_scored_and_made_by_what_was_published_as_by_the_run(people: Path, tmp_path: Path) -> None:
    model, run, table = people / "model", people / "run", people / "people.csv"
    scores = [json.loads(succeed("score", each, table, "--samples", "30", "--json")) for each in (model, run)]
    assert scores[0] == scores[1]
    assert "not compared with the rows trained on" in succeed(
        "sample", model, "-n", "4", "--out", tmp_path / "made.csv"
    )
    made = pl.read_csv(tmp_path / "made.csv")
    assert made.columns == ["sex|gender", "height", "born"]
    assert set(made["sex|gender"]) <= {"f", "m"}
    succeed("encode", model, table, "--out", tmp_path / "codes.npy")
    assert np.load(tmp_path / "codes.npy").shape == (90, 4)
    for verb in (["evaluate", model], ["report", model], ["export", model, "--out", tmp_path / "nets"]):
        assert "does not hold its data's fingerprint. Give the run" in refuse(*verb)
    assert "no state of training" in refuse("train", "--resume", model)
    assert {path.name for path in model.iterdir()} == NAMES


def _composed(width: int = 4) -> VAE:
    shared = MLP(2, [width], 2)  # one net held by p and by q
    p = BayesNet({"z": StandardNormal(2), "y | z": Normal(shared, 2), "x | z": Normal(MLP(2, [], 5), 5)})
    return VAE(p, BayesNet({"z | x": DiagonalNormal(nn.Sequential(MLP(5, [], 2), shared, MLP(2, [], 4)))}))


def test_a_model_composed_by_hand_is_filled_and_compared(tmp_path: Path) -> None:
    aevb.save(_run(_composed()), tmp_path / "run")
    run = aevb.load(tmp_path / "run", _composed())
    run.data.update(name="/home/me/secret", sha256="secret")  # words of the user's own
    folder = aevb.save_pretrained(run, tmp_path / "model")
    told, text = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert told["aliases"]
    assert "secret" not in json.dumps(told) + text
    assert 'q: "z | x": DiagonalNormal' in text
    assert f"{sum(p.numel() for p in run.vae.parameters())} weights, float32" in text
    again = aevb.from_pretrained(folder, _composed())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in run.vae.state_dict().items())
    with pytest.raises(InputError, match=r"composed by hand .* pass it: aevb.from_pretrained"):
        aevb.from_pretrained(folder)
    with pytest.raises(InputError, match=r"layers.0.weight: \(9, 2\) float32 here, \(4, 2\) float32 there"):
        aevb.from_pretrained(folder, _composed(width=9))
    with pytest.raises(InputError, match="composed by hand"):
        aevb.save_pretrained(tmp_path / "run", tmp_path / "by-path")
    assert not (tmp_path / "by-path").exists()


def test_data_of_the_library_are_told_if_they_describe_themselves(tmp_path: Path) -> None:
    data = Data(name="/home/me/grey.npy", train=torch.rand(4, 3), test=torch.ones(2, 3), binarize="epoch", seed=7)
    run = Run(vae=_run().vae, config=TrainConfig(), history=[], data=data.describe())
    folder = aevb.save_pretrained(run, tmp_path / "model")
    text = (folder / "README.md").read_text()
    assert "A deep latent-variable model of `grey.npy`" in text
    assert "| rows | 4 to train on; 2 to test on |" in text
    assert f"| binarisation | {data.describe()['binarize']} |" in text
    assert "home" not in text + (folder / "config.json").read_text()


def test_a_vamp_priors_rows_are_told_of(tmp_path: Path) -> None:
    for prior, told in (("vamp", True), ("standard", False)):
        folder = aevb.save_pretrained(_run(prior=prior, components=2), tmp_path / prior)
        assert ("start as rows of the training data" in (folder / "README.md").read_text()) == told


def _changed(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _other_width(folder: Path) -> None:
    model = json.loads((folder / "config.json").read_text())["model"]
    _changed(model=model | {"latents": 5})(folder)


def _other_weights(folder: Path) -> None:
    content = safetensors.torch.save({"odd": torch.zeros(2, dtype=torch.long)})
    (folder / "model.safetensors").write_bytes(content)
    _changed(weights_sha256=hashlib.sha256(content).hexdigest())(folder)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"there is no `config.json` in it"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "another library": (_changed(library_name="transformers"), "`library_name` is 'transformers', not 'aevb'"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "`library_name` is None, not 'aevb'"),
    "a newer format": (
        _changed(format=2, aevb_version="9.0"), "is of format 2, by aevb 9.0, and this version reads format 1",
    ),
    "a field of another version": (
        _changed(train={"stride": 1}), "TrainConfig has no field stride.*written by another version",
    ),
    "a part missing": (_changed(factors=None), "is damaged"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(), "`.*model.safetensors` cannot be read: No such file",
    ),
    "cut weights": (_cut, "is not what `config.json` was written with: it was cut or exchanged"),
    "foreign weights": (_other_weights, r"The configuration does not match .*\(odd: absent here, \(2,\) int64 there"),
    "another width": (_other_width, r"The configuration does not match the folder `.*` in \d+ tensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = aevb.save_pretrained(_run(), tmp_path_factory.mktemp("small") / "model")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_folder_that_is_not_whole_or_not_ours_is_told(name: str, small: dict[str, bytes], tmp_path: Path) -> None:
    for file, content in small.items():
        (tmp_path / file).write_bytes(content)
    aevb.from_pretrained(tmp_path)
    spoil, told = MISTAKES[name]
    spoil(tmp_path)
    with pytest.raises(InputError, match=told):
        aevb.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_told_and_nothing_is_left(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="exists already, and is not overwritten"):
        aevb.save_pretrained(_run(), tmp_path / "full")
    with pytest.raises(InputError, match="exists already"):
        aevb.save_pretrained(_run(), tmp_path / "full" / "mine.txt")
    with pytest.raises(InputError, match="is not a run: it holds no checkpoint"):
        aevb.save_pretrained(tmp_path / "full", tmp_path / "new")
    with pytest.raises(InputError, match=r"`license` must be an identifier .* got 'MIT License'"):
        aevb.save_pretrained(_run(), tmp_path / "new", license="MIT License")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for name in ("new", "empty"):
            with pytest.raises(InputError, match=r"Could not write .* No space left on device"):
                aevb.save_pretrained(_run(), tmp_path / name)
    new = ["export", people / "run", "--out", tmp_path / "new"]
    assert "are for parts that are compared" in refuse(*new, "--format", "pretrained", "--seed", "1")
    assert "`--license` stands in the card" in refuse(*new, "--license", "mit")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "full", "mine.txt"]
    assert {path.name for path in aevb.save_pretrained(_run(), tmp_path / "empty").iterdir()} == NAMES


def _hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_name_is_fetched_from_the_hub_if_no_folder_has_it(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        assert set(allow_patterns) == NAMES
        (tmp_path / "snapshot").mkdir()
        for file in allow_patterns:
            (tmp_path / "snapshot" / file).write_bytes(small[file])
        return str(tmp_path / "snapshot")

    _hub(monkeypatch, download)
    assert aevb.from_pretrained("some-one/people_1.0").p.keys == ("z", "x | z")
    (tmp_path / "own").mkdir()
    (tmp_path / "snapshot").rename(tmp_path / "own" / "model")
    aevb.from_pretrained("own/model")
    for path in ("./absent", "../absent", "absent", "a/b/c", tmp_path / "absent", Path("own/absent")):
        with pytest.raises(InputError, match=r"there is no `config.json`"):
            aevb.from_pretrained(path)
    assert asked == ["some-one/people_1.0"]


def test_a_name_that_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=r"`own/er` is no folder here, and huggingface_hub.* pip install huggingface_hub"
    ):
        aevb.from_pretrained("own/er")

    def absent(**_: object) -> str:
        raise OSError("404 Client Error.\nmore")

    _hub(monkeypatch, absent)
    with pytest.raises(InputError, match=r"could not be fetched from the hub \(404 Client Error.\)"):
        aevb.from_pretrained("own/er")


def test_front_matter_is_yaml_whatever_the_names() -> None:
    told = {
        "name": 'a: "b" # c\nd', "tags": ["no", "1e3", "", "- é 😀", "\x7f"], "figure": -133.25,
        "nested": [{"x": {"y": [1e-05, -3e20, 2]}}],
    }  # fmt: skip
    assert yaml.safe_load("\n".join(_yaml(told))) == told | {
        "name": 'a: "b" # c d', "tags": ["no", "1e3", "", "- é 😀", " "],
    }  # fmt: skip
