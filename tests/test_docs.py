"""README and site: every snippet runs, what is named exists, nothing of the notes is left out, and the site builds."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import aevb

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = ROOT / "docs" / "notes.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EQUATIONS = 98
"""Displayed equations of the notes, an aligned block counting one a line that bears a number."""


def _name(page: Path) -> str:
    return page.name


@pytest.fixture
def fresh() -> Iterator[None]:
    """A page begins with float32 and a seed, and leaves the tests after it alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search(page.read_text())], ids=_name)
def test_snippets_run(page: Path) -> None:
    """In order, in one namespace; an error names the page and its line."""
    text = page.read_text()
    names: dict[str, object] = {"__name__": page.stem}
    for block in FENCE.finditer(text):
        padding = "\n" * (text[: block.start(1)].count("\n"))
        exec(compile(padding + block[1], str(page), "exec"), names)
    if page.name in ("README.md", "index.md"):
        history = names["run"].history
        assert history[-1]["bound"] > history[0]["bound"]


def test_commands_are_those_of_the_command_line() -> None:
    from aevb.apps import cli

    for verb in re.findall(r"^aevb (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert callable(getattr(cli, verb))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for file, test in set(re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", text)):
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test}"
    for dotted in set(re.findall(r"\baevb\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", text)):
        found: object = aevb
        for part in dotted.split("."):
            if not hasattr(found, part):
                found = importlib.import_module(f"{found.__name__}.{part}")
            else:
                found = getattr(found, part)
    for path in set(re.findall(r"`((?:examples|benchmarks|tests)/\w+\.py)`", text)):
        assert (ROOT / path).exists(), path


def test_every_test_named_on_the_notes_page_says_where_it_is() -> None:
    assert len(re.findall(r"::\w+`", NOTES.read_text())) == len(re.findall(r"test_\w+\.py::\w+`", NOTES.read_text()))


def test_every_row_of_the_notes_is_reachable() -> None:
    text = NOTES.read_text()
    headings = " ".join(re.findall(r"^#+ .*$", text, re.MULTILINE))
    table = re.findall(r"^\| N(\d+) \|.*`test_\w+\.py::\w+` \|$", text, re.MULTILINE)
    assert [int(row) for row in table] == list(range(1, 21))
    for row in range(1, 21):
        assert re.search(rf"\bN{row}\b", headings), f"N{row}"


def test_every_equation_and_algorithm_is_restated_in_order() -> None:
    text = NOTES.read_text()
    ranges = [(int(a), int(b or a)) for a, b in re.findall(r"^\*\*Eqs?\. (\d+)(?:–(\d+))?\.\*\*", text, re.MULTILINE)]
    restated = [number for first, last in ranges for number in range(first, last + 1)]
    assert restated == list(range(1, EQUATIONS + 1))
    assert re.findall(r"^\*\*Algorithm (\d)\.\*\*", text, re.MULTILINE) == ["1", "2"]


def test_every_erratum_is_told() -> None:
    where_it_applies = set(re.findall(r"^> \*\*Erratum (\d+)\b", NOTES.read_text(), re.MULTILINE))
    assert where_it_applies == {str(number) for number in range(1, 16)}
    table = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "docs" / "errata.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in table] == list(range(1, 16))
    for _, row in table:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 4
        assert all(cells)


def test_the_reference_holds_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"^\.\. (?:auto|py:)\w+:: aevb\.(\w+)$", text, re.MULTILINE))
    assert named == set(aevb.__all__)


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    """Strictly: a docstring or a page that Sphinx warns about fails here, and so does a resource from elsewhere."""
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-n", "-W", "--keep-going", "-b", "html"]
    where = [str(ROOT / "docs"), str(tmp_path / "html"), "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, *where], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "html").glob("*.html"):
        html = page.read_text()
        assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//", html), page.name
        assert "<math" in html or page.stem in ("genindex", "search", "results", "py-modindex")
