"""House rules that a reader relies on."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import sleb
from sleb.config import (
    ApplyConfig,
    BenchConfig,
    EvalConfig,
    HealConfig,
    PruneConfig,
    SearchConfig,
    in_python,
)
from sleb.runtimes import worker

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sleb"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))

SIBLINGS = {"runtimes", "formats", "distillation"}
"""Folders that know nothing of each other."""
ENTRANCES = {"__init__", "__main__"}
"""They may import everything; nothing imports them."""

LAZY = {"core.showing", "evaluation.tasks", "models.describe", "runtimes.transformers"}
"""Modules that import others of sleb once these are needed: lm-evaluation-harness is an extra,
bars need rich, a model is described from its files without torch, and a child that only scores runs
where there is no sleb."""


@dataclass(frozen=True)
class Import:
    """``module`` imports ``name``; both are dotted, without ``sleb.``. ``lazy``: in a function."""

    module: str
    name: str
    lazy: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


@cache
def imports() -> tuple[Import, ...]:
    """All imports of sleb's own modules, those for types and those inside functions included."""
    found = []
    for module, path in MODULES.items():
        for node, inside in walked(ast.parse(path.read_text(encoding="utf-8"))):
            found += [Import(module, name, inside) for name in named(node)]
    return tuple(found)


def walked(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it is in a function."""
    inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from walked(child, inside)


def named(node: ast.AST) -> Iterator[str]:
    """sleb's modules that a statement imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("sleb."):
                yield alias.name.removeprefix("sleb.")
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        if node.module == "sleb" or (node.module or "").startswith("sleb."):
            base = node.module.removeprefix("sleb").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in MODULES else base or "__init__"


def ranks() -> list[str]:
    """Folders and files, lowest first, as the table of docs/architecture.md has them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| rank |") :].split("\n\n")[0].splitlines()[2:]
    cells = [line.split("|")[2] for line in table]
    return [
        name.rstrip("/").removesuffix(".py") for c in cells for name in re.findall("`(.*?)`", c)
    ]


def upward() -> dict[str, set[str]]:
    """Imports, by module, from what stands below it in the table, or from siblings."""
    place = {name: i for i, name in enumerate(ranks())}
    found: dict[str, set[str]] = {}
    for edge in imports():
        own, other = (name.split(".")[0] for name in (edge.module, edge.name))
        if own in ENTRANCES or own == other or (own, other) == ("cli", "__init__"):
            continue
        assert own in place, f"{own} has no rank: give it a row in docs/architecture.md"
        aside = {own, other} <= SIBLINGS or (own, other) == ("distillation", "evaluation")
        if aside or place.get(other, len(place)) > place[own]:
            found.setdefault(edge.module, set()).add(edge.name)
    return found


def test_imports_point_one_way():
    """A folder imports from those above it in the table and from itself, and not from siblings."""
    assert not upward()


def circular() -> set[str]:
    """Modules that need themselves, by way of others."""
    needs: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in imports():
        if found.module not in ENTRANCES:
            needs[found.module].add(found.name)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        front = [start]
        while front:
            more = needs[front.pop()] - seen
            seen |= more
            front += more
        return seen

    return {module for module in MODULES if module in reached(module)}


def test_no_modules_import_each_other():
    """Not round a circle either, nor for types, nor inside functions."""
    assert not circular()


def lazy() -> set[str]:
    """Modules with imports of sleb's own inside functions."""
    found = {edge.module for edge in imports() if edge.lazy}
    return {m for m in found - ENTRANCES if m.split(".")[0] != "cli"}


def test_imports_stand_at_the_top():
    """Inside functions there are only heavy libraries of others; the command line, which has to
    start quickly, imports sleb's own modules so too."""
    assert lazy() == LAZY


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
def test_tests_share_nothing_but_tools(path):
    """What tests have in common is in conftest.py and in files named ..._tools.py."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("test_")


def test_only_the_command_line_prints():
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not printing or path.parent.name == "cli" or path.name == "display.py", path


def test_importing_sleb_is_light_and_the_check_can_fail():
    def heavy(statement: str) -> bool:
        code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
        return subprocess.run([sys.executable, "-c", code], check=False).returncode == 1

    assert not heavy("import sleb, sleb.core.plan, sleb.cli.main; sleb.init")
    assert heavy("import sleb; sleb.load")


def test_what_runs_in_other_interpreters_needs_no_package():
    """`--python` names interpreters that have a runtime, and nothing of sleb's."""
    start = [sys.executable, "-S", "-I", "-c", worker._START, json.dumps([[], str(PACKAGE)])]
    ran = subprocess.run(start, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_every_exported_name_exists_where_type_checkers_find_it():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    own = [n for n in imported if n.module.startswith("sleb.")]
    typed = {a.asname: n.module.removeprefix("sleb.") for n in own for a in n.names}
    assert typed == sleb._HOME
    assert sleb.__all__ == sorted(typed)
    for name in sleb.__all__:
        assert getattr(sleb, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sleb.nonsense  # noqa: B018


def test_dir_shows_what_is_public_and_nothing_else():
    shown = [name for name in dir(sleb) if not name.startswith("__")]
    assert shown == sleb.__all__


def test_help_says_what_each_option_is():
    """By its keyword, in the words of the command line's help, which are written once."""
    described = {
        "search": SearchConfig,
        "prune": PruneConfig,
        "apply": ApplyConfig,
        "evaluate": EvalConfig,
        "heal": HealConfig,
        "bench": BenchConfig,
    }
    for name, kind in described.items():
        function = getattr(sleb, name)
        parameters = inspect.signature(function).parameters
        text = inspect.getdoc(function)
        for option, field in kind.model_fields.items():
            said = " ".join(in_python(field.description).split())
            found = rf" {option}(={re.escape(repr(field.default))})?: {re.escape(said)}"
            assert re.search(found, " ".join(text.split())), (name, option)
            if option != "repair":  # which sleb.apply takes a fitted one as
                assert parameters[option].default == field.default, (name, option)
        assert max(map(len, text.splitlines())) <= 100
        assert not re.search(r"(?<![\w-])--(remove|windows|prompts|repair)\b", text)
        assert (" length=256: " in text) == (name in ("search", "prune", "apply"))
        assert text.index("Options:") < text.index("Raises:")
        assert " at 0x" not in str(inspect.signature(function))
