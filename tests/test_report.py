"""The report: one file that fetches nothing, says each figure as `Summary` has it, and says what its pictures show."""

import base64
import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import aevb
from aevb import BayesNet, InputError, ModelConfig, TrainConfig
from aevb.apps.diagnoses import DIAGNOSES, Subject
from aevb.apps.report import write_report
from aevb.apps.summary import Summary, summarize
from aevb.checkpoint import Run
from aevb.data import load

DIGITS = load("digits")
TEST = DIGITS.test.float()
LOOK = {"labels": DIGITS.test_labels, "image_shape": (8, 8), "maximum": 16.0}


class Page(HTMLParser):
    """Text, tags with their attributes, and tags left open."""

    void = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html):
        super().__init__()
        self.html, self.text, self.tags, self.open = html, [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    @property
    def images(self):
        return [attrs for tag, attrs in self.tags if tag == "img"]


def evaluated(vae, x):
    return summarize(vae, {"x": x}, aevb.log_marginal(vae, {"x": x}, 60), data="rows of a test")


def report(path, run, x, summary=None, **look):
    write_report(run, summary or evaluated(run.vae, x), path, test=x, **look)
    return Page(path.read_text(encoding="utf-8"))


def trained(config, x, steps=30, **train):
    torch.manual_seed(0)
    vae = aevb.build_vae(config, x)
    return aevb.fit(vae, {"x": x}, TrainConfig(steps=steps, log_every=10, validate_every=10, **train))


def table(rows=60, columns=4):
    torch.manual_seed(1)
    return torch.randn(rows, columns) @ torch.randn(columns, columns) + 5


@pytest.fixture(scope="module")
def run():
    config = ModelConfig(features=64, likelihood="binomial", total_count=16, latents=6, hidden=(32,))
    torch.manual_seed(0)
    vae = aevb.build_vae(config, DIGITS.train.float())
    schedule = TrainConfig(steps=300, log_every=20, validate_every=60)
    return aevb.fit(vae, {"x": DIGITS.train.float()}, schedule, describe=DIGITS.describe())


@pytest.fixture(scope="module")
def summary(run):
    return evaluated(run.vae, TEST)


@pytest.fixture(scope="module")
def page(run, summary, tmp_path_factory):
    return report(tmp_path_factory.mktemp("report") / "report.html", run, TEST, summary, **LOOK)


def test_nothing_is_fetched(page):
    allowed = {
        "html",
        "head",
        "body",
        "main",
        "section",
        "title",
        "meta",
        "style",
        "h1",
        "h2",
        "p",
        "b",
        "div",
        "table",
    }
    allowed |= {"caption", "tr", "th", "td", "figure", "figcaption", "img", "details", "summary", "pre"}
    assert {tag for tag, _ in page.tags} <= allowed
    for _, attrs in page.tags:
        assert not {"href", "srcset", "data", "action", "poster", "background"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attrs)


def test_styles_and_pictures_fetch_nothing(page):
    assert "url(" not in page.html.split("</style>")[0]
    assert "@import" not in page.html
    for image in page.images:
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")).decode()
        links = [part.split('"')[1] for part in svg.split("href=")[1:]]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "<script" not in svg


def test_each_picture_says_what_it_shows(page):
    assert len(page.images) == 9
    assert all(len(image["alt"]) > 20 for image in page.images)
    assert len({image["alt"] for image in page.images}) == 9
    assert sum(tag == "figcaption" for tag, _ in page.tags) == 9


def test_figures_are_those_of_the_summary(page, summary):
    for words in (summary.headline, summary.caveat, *(word for fact in summary.facts() for word in fact)):
        assert " ".join(words.split()) in page.words
    titles = [attrs for tag, attrs in page.tags if tag in ("h1", "title")]
    assert len(titles) == 2
    assert page.words.count(summary.headline) == 2


def test_distrust_is_said_in_words_only_where_it_is_due(run, summary, tmp_path):
    warning = "Do not take this figure as exact."
    fields = summary.to_json()
    for untrusted in (0, 3):
        told = Summary.from_json(fields | {"untrusted": untrusted})
        page = report(tmp_path / "report.html", run, TEST, told, **LOOK)
        assert (warning in page.words) == (untrusted > 0)


def test_model_data_and_training_are_told(page, run):
    for words in (
        "p(x | z)",
        "q(z | x)",
        "Binomial",
        "DiagonalNormal",
        "learning_rate",
        "total_count",
        "sha256, train",
    ):
        assert words in page.words
    assert run.data["sha256"]["test"] in page.words
    assert "best (step " in page.words


def test_same_run_same_file(run, summary, tmp_path):
    for name in ("a", "b"):
        report(tmp_path / name, run, TEST, summary, **LOOK)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    report(tmp_path / "b", run, TEST, summary, seed=1, **LOOK)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_global_state_stays(run, summary, tmp_path):
    run.vae.train()
    before, settings = torch.get_rng_state(), dict(matplotlib.rcParams)
    report(tmp_path / "report.html", run, TEST, summary, **LOOK)
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(matplotlib.rcParams) == settings
    assert all(module.training for module in run.vae.modules())


def test_a_failed_write_leaves_the_old_report(run, summary, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"report\.html.*No space left"):
        write_report(run, summary, path, test=TEST, **LOOK)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_missing_package_is_named(run, summary, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(InputError, match=r"jinja2.*aevb\[apps\]"):
        write_report(run, summary, tmp_path / "report.html", test=TEST)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_shape": (8, 9)}, r"72 pixels; `test` has 64"),
        ({"labels": torch.zeros(3)}, r"`labels` must be \(297,\)"),
        ({"columns": ["a"]}, r"`columns` must have 64 names"),
        ({"test": TEST[:0]}, r"at least one row"),
        ({"test": TEST + 20}, r"`x` is 20.0 .* outside the support"),
    ],
)
def test_arguments_that_do_not_fit(run, summary, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        write_report(run, summary, tmp_path / "report.html", **({"test": TEST} | wrong))
    assert not list(tmp_path.iterdir())


def test_table_with_holes_and_hostile_names(tmp_path):
    x = table()
    x[::7, 1] = math.nan
    x[:, 3] = x[:, 0]
    run = trained(ModelConfig(features=4, latents=2, hidden=(8,), holes=True), x)
    names = ["<script>alert(1)</script>", 'a" onload="x', "$\\frac{", "身高"]
    run = Run(vae=run.vae, config=run.config, history=run.history, data={"name": "</pre><img src=x>"})
    page = report(tmp_path / "report.html", run, x, columns=names)
    assert "<script" not in page.html
    assert all(name in page.words for name in (*names, "</pre><img src=x>"))
    assert sum(names[0] in image["alt"] for image in page.images) == 2
    assert not any("onload" in attrs for _, attrs in page.tags)
    assert "51 values, 9 missing" in page.words
    assert "label" not in "".join(image["alt"] for image in page.images)
    assert "Labels only colour" not in page.words


def test_images_with_holes(tmp_path):
    x = TEST[:40].clone()
    x[:, 10:20] = math.nan
    config = ModelConfig(features=64, likelihood="binomial", total_count=16, latents=3, hidden=(8,), holes=True)
    page = report(tmp_path / "report.html", trained(config, TEST), x, image_shape=(8, 8))
    assert "Missing pixels are orange" in page.words


def _pixels(image):
    """All colours of the picture inside a figure, `(K, 3)`."""
    svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")).decode()
    (inner,) = re.findall(r"data:image/png;base64,\s*([^\"]+)", svg)[:1]
    return np.unique(np.asarray(Image.open(io.BytesIO(base64.b64decode(inner))).convert("RGB")).reshape(-1, 3), axis=0)


@pytest.mark.parametrize("holes", [False, True])
def test_colours_are_shown_as_they_are(tmp_path, holes):
    """Rows hold plane after plane; what the page shows of real rows has their very colours, channel for channel."""
    torch.manual_seed(0)
    colours = torch.tensor([[250, 10, 20], [30, 240, 40], [50, 60, 230]]).float()
    x = colours[torch.randint(3, (12, 4))].transpose(1, 2).reshape(12, 12)
    run = trained(ModelConfig(features=12, latents=2, hidden=(8,), likelihood="discretized-logistic", holes=holes), x)
    if holes:
        x = x.clone()
        x[:, 4] = math.nan  # green of the first pixel
    page = report(tmp_path / "report.html", run, x, image_shape=(3, 2, 2))
    assert "Red, green and blue are shown from 0, dark, to 255, light." in page.words
    (rebuilt,) = [image for image in page.images if "reconstruction" in image["alt"]]
    shown = _pixels(rebuilt).tolist()
    assert all(colour in shown for colour in colours.int().tolist())
    assert ([0xE6, 0x9F, 0x00] in shown) == ("Missing pixels are orange" in page.words) == holes
    if not holes:
        grey = report(tmp_path / "grey.html", run, x, image_shape=(3, 4))
        assert "Light is a high value; the scale is below each picture." in grey.words


@pytest.mark.parametrize(("latents", "posterior"), [(1, "planar"), (2, "diagonal"), (5, "full"), (5, "planar")])
def test_latents_of_any_number(tmp_path, latents, posterior):
    x = table(columns=2)
    run = trained(ModelConfig(features=2, latents=latents, hidden=(8,), posterior=posterior), x)
    labels = torch.arange(60) % 13 - 1  # twelve classes, more than have a colour, and unknown ones
    page = report(tmp_path / "report.html", run, x, labels=labels)
    axes = {1: "rows against E[z|x]", 2: "E[z[1]|x] against E[z[0]|x]", 5: "principal component 2"}
    assert axes[latents] in page.images[-1]["alt"]
    splits = posterior != "planar" or latents == 1
    assert ("does not split by dimension" in page.words) != splits


def test_classes_have_their_names(tmp_path):
    x = table(columns=2)
    run = trained(ModelConfig(features=2, latents=2, hidden=(8,)), x)
    labels, names = torch.arange(60) % 3, ("_hidden", "$1, $2", "a name longer than a legend takes")
    page = report(tmp_path / "report.html", run, x, labels=labels, classes=names)
    assert "60 rows, by label: _hidden, $1, $2, a name longer than…." in page.images[-1]["alt"]
    with pytest.raises(InputError, match="must name every label, 0 to 2; got 2 names"):
        report(tmp_path / "report.html", run, x, labels=labels, classes=names[:2])


def test_principal_components_hold_the_variance_they_say(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.diag(torch.tensor([3.0, 2.0, 1.0])))

        def forward(self, x):
            return torch.cat([x @ self.weight, torch.zeros_like(x)], -1)

    p = BayesNet({"z": aevb.StandardNormal(3), "x | z": aevb.Normal(nn.Linear(3, 3), 3)})
    vae = aevb.VAE(p, BayesNet({"z | x": aevb.DiagonalNormal(Fixed())}))
    x = torch.cat([torch.eye(3), -torch.eye(3)])
    page = report(tmp_path / "report.html", Run(vae=vae, config=TrainConfig(), history=[]), x)
    assert "component 1 (64% of variance)" in page.images[-1]["alt"]  # 9 of 9 + 4 + 1
    assert "component 2 (29% of variance)" in page.images[-1]["alt"]
    assert "no history" in page.words
    assert "The run holds none." in page.words


def test_several_latent_nodes_and_double_precision(tmp_path):
    x = table().double()
    torch.manual_seed(0)
    p = {
        "w": aevb.StandardNormal(2),
        "z | w": aevb.Normal(nn.Linear(2, 3), 3),
        "x | z": aevb.Normal(nn.Linear(3, 4), 4),
    }
    q = {"z | x": aevb.DiagonalNormal(nn.Linear(4, 6)), "w | z": aevb.DiagonalNormal(nn.Linear(3, 4))}
    vae = aevb.VAE(BayesNet(p), BayesNet(q)).double()
    run = aevb.fit(vae, {"x": x}, TrainConfig(steps=10, log_every=5, kl_warmup_steps=20))
    page = report(tmp_path / "report.html", run, x)
    assert "Dimensions of z" in page.words
    assert "Further latent nodes, not shown: w" in page.words
    assert "The objective is what was maximised" in page.words


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_no_latents(tmp_path, shape):
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(4))

        def forward(self):
            return torch.distributions.Independent(torch.distributions.Normal(self.loc, 1.0), 1)

    vae = aevb.VAE(BayesNet({"x": Free()}), BayesNet({}))
    run = aevb.fit(vae, {"x": table()}, TrainConfig(steps=10, log_every=5))
    page = report(tmp_path / "report.html", run, table(), image_shape=shape)
    assert "The model has no latents" in page.words
    assert "reconstructed" not in "".join(image["alt"] for image in page.images)


@pytest.mark.parametrize(("rows", "shape"), [(1, None), (1, (2, 2)), (2, None), (3, (2, 2))])
def test_few_rows(tmp_path, rows, shape):
    x = table()
    run = trained(ModelConfig(features=4, latents=3, hidden=(8,)), x)
    page = report(tmp_path / "report.html", run, x[:rows], labels=torch.zeros(rows), image_shape=shape)
    assert ("One row tells neither" in page.words) == (rows == 1)
    assert ("fewer than three rows" in page.words) == (rows < 3)


def test_many_rows_are_thinned_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr("aevb.apps.report.seen._POINTS", 20)
    x = table()
    page = report(tmp_path / "report.html", trained(ModelConfig(features=4, latents=2, hidden=(8,)), x), x)
    assert "Drawn are 20 of 60 rows" in page.words


@pytest.mark.parametrize(("rows", "latents"), [(1, 1), (40, 3)])
def test_diagnoses_are_drawn_from_what_the_evaluation_keeps(tmp_path, rows, latents):
    x = table()[:rows]
    run = trained(ModelConfig(features=4, latents=latents, hidden=(8,)), table())
    subject = Subject(
        vae=run.vae, rows=x, log_prob=aevb.log_marginal(run.vae, {"x": x}, 60).log_prob, samples=60, few=5,
        temperatures=2, columns=["<b>", "$\\frac{", "身高", 'a"'], seed=0, quiet=True,
    )  # fmt: skip
    names = ["ais", "information", "calibration", "checks"]
    summary = replace(evaluated(run.vae, x), findings={name: DIAGNOSES[name](subject) for name in names})
    (tmp_path / "evaluation.json").write_text(json.dumps(summary.to_json(), allow_nan=False))
    page = report(tmp_path / "report.html", run, x, Summary.load(tmp_path / "evaluation.json"))
    for finding in summary.findings.values():
        for words in (finding.title, *finding.meaning, *(word for fact in finding.facts for word in fact)):
            assert " ".join(words.split()) in page.words
    titles = ["Two estimates of log p(x)", "Two-sided bracket", "Aggregated posterior", "Ranks of the truth"]
    for title in [*titles, "Data against replicates"]:
        assert title in page.words
    assert ("Pairs of dimensions" in page.words) == (latents > 1)
    assert len({image["alt"] for image in page.images}) == len(page.images)
    assert "<b>" not in page.html.split("Predictive checks")[1].split("</table>")[0]


def test_rows_without_a_chance_are_named_and_not_averaged():
    """A decoder that is sure of the wrong value: log p(x) = -inf in every draw."""
    net = aevb.MLP(1, [], 2)
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.bias.fill_(3e38)  # two of them overflow
    vae = aevb.VAE(
        aevb.BayesNet({"z": aevb.StandardNormal(1), "x | z": aevb.Bernoulli(net)}),
        aevb.BayesNet({"z | x": aevb.DiagonalNormal(aevb.MLP(2, [], 2))}),
    )
    with pytest.raises(aevb.InputError, match="-inf for 2 of 3 rows, the first of them 0, 2"):
        evaluated(vae, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
