"""What imports what: the order of the layers, and what `import aevb` must not bring in or change."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import aevb
from aevb import config
from aevb.build import LIKELIHOODS, POSTERIORS
from aevb.nets import ACTIVATIONS

SOURCE = Path(aevb.__file__).parent

# A module imports what stands to its left, never to its right; those in one set do not import one another.
LAYERS = [
    {"config"},
    {"_compiler", "_heap", "_shapes"},
    {"nets", "distributions"},
    {"conditionals"},
    {"flows"},
    {"bayesnet"},
    {"build"},
    {"bounds"},
    {"evaluate", "checkpoint", "factors"},
    {"pretrained", "training"},
    {"data"},
    {"apps.summary", "apps.progress", "apps.loggers", "apps.choices"},
    {"apps.diagnoses", "apps.flags"},
    {"apps.check", "apps.estimator", "apps.report", "apps.runs", "apps.shards", "apps.versus"},
    {"apps.card", "apps.tables", "apps.train"},
    {"apps.export"},
    {"apps.cli"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "apps" else parts[0]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "aevb" and len(parts) > 1:
                found.add(".".join(parts[1:3]) if parts[1] == "apps" else parts[1])
    return found


def test_modules_import_to_their_left_only() -> None:
    files = [
        path
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py" or path.parent not in (SOURCE, SOURCE / "apps")
    ]
    assert {_module(path) for path in files} == set(LEVEL)
    for path in files:
        module = _module(path)
        for imported in _imports(path) - {module}:
            assert LEVEL[imported] < LEVEL[module], f"{path.name} imports {imported}, which stands to its right"


def test_only_the_apps_and_the_readers_import_what_is_optional() -> None:
    optional = {"tyro", "rich", "polars", "sklearn", "matplotlib", "jinja2", "PIL"}
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in ("apps", "data"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # Its forests are scikit-learn's, brought in by the function that grows them (see _ISOLATED).
            inside = path.name == "factors.py" and getattr(node, "col_offset", 0) > 0
            assert not {name.split(".")[0] for name in names} & (optional - {"sklearn"} if inside else optional), path


_ISOLATED = """
import sys, torch
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
          torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
          torch.distributions.Distribution._validate_args)
import aevb
for name in aevb.__all__:
    getattr(aevb, name)
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
         torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
         torch.distributions.Distribution._validate_args)
assert before == after, "importing changed torch"
unwanted = {"zuko", "lightning", "lightning_fabric", "sklearn", "matplotlib", "polars", "tyro", "rich", "jinja2",
            "fastapi", "starlette", "uvicorn", "flask", "aiohttp"}
print(sorted(unwanted & set(sys.modules)))
"""


def test_importing_changes_nothing_and_brings_in_little() -> None:
    done = subprocess.run([sys.executable, "-c", _ISOLATED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_does_not_wait_for_torch() -> None:
    code = "import aevb, aevb.apps.cli, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_public_name_is_there_and_documented() -> None:
    for name in aevb.__all__:
        assert getattr(aevb, name).__doc__ or name == "Values", name
    assert set(aevb.__all__) <= set(dir(aevb))


def test_tables_and_choices_name_the_same() -> None:
    assert set(LIKELIHOODS) == set(get_args(config.Likelihood))
    assert set(POSTERIORS) == set(get_args(config.Posterior))
    assert set(ACTIVATIONS) == set(get_args(config.Activation))
