"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        torch.manual_seed(0)
        names: dict[str, object] = {}
        exec(compile(block, str(README), "exec"), names)
        assert names["run"].history[-1]["bound"] > names["run"].history[0]["bound"]


def test_commands_are_those_of_the_command_line() -> None:
    from aevb.apps import cli

    for verb in re.findall(r"^aevb (\w+)", README.read_text(), re.MULTILINE):
        assert callable(getattr(cli, verb))
