"""House rules that a reader relies on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sleb

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_only_the_command_line_prints():
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not printing or path.parent.name == "cli", path


def test_dependencies_point_one_way():
    """The order of docs/architecture.md; a module may import from its own layer and below."""
    layers = [
        {"core", "data"},
        {"checkpoints", "calibration"},
        {"models"},
        {"selection", "repairs", "surgery", "evaluation", "runtimes", "formats", "distillation"}
        | {"record", "pipeline", "views", "project"},
        {"cli", "__main__", "__init__"},
    ]
    level = {name: i for i, names in enumerate(layers) for name in names}
    for path in SOURCES:
        own = path.relative_to(ROOT / "src" / "sleb").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in re.findall(r"^\s*from sleb\.(\w+)", path.read_text(), re.MULTILINE):
            assert level[name] <= level[own], f"{path} imports sleb.{name}"


def test_no_pickle_and_no_eval_of_data():
    for path in SOURCES:
        assert not re.search(
            r"(import pickle|pickle\.|torch\.load)|(?<![.\w])(eval|exec)\(", path.read_text()
        ), path


def test_importing_sleb_is_light_and_the_check_can_fail():
    def heavy(statement: str) -> bool:
        code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
        return subprocess.run([sys.executable, "-c", code], check=False).returncode == 1

    assert not heavy("import sleb, sleb.core.plan, sleb.cli.main")
    assert heavy("import sleb; sleb.load")


def test_every_exported_name_exists():
    assert sleb.__all__ == list(sleb._HOME)
    for name in sleb.__all__:
        assert getattr(sleb, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sleb.nonsense  # noqa: B018
