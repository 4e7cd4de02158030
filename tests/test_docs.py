"""What the documentation shows works: its commands and examples are run here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import sleb
from conftest import save_tiny
from sleb.cli.main import main
from sleb.cli.verbs import EXAMPLES
from sleb.errors import SlebError
from sleb.metrics import METRICS
from sleb.selection.strategies import STRATEGIES
from sleb.text.sources import SOURCES

ROOT = Path(__file__).parents[1]


def fenced(path: str, language: str) -> list[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a model called MODEL and the README's texts, to run its examples in."""
    save_tiny(tmp_path / "MODEL", blocks=8)
    prose = (ROOT / "README.md").read_text(encoding="utf-8") * 3
    (tmp_path / "mail.jsonl").write_text('{"text": "%s"}\n' % ("mail to all of you " * 900))
    (tmp_path / "other.txt").write_text(prose, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_commands_work_in_their_order(workplace, capsys):
    commands = [
        shlex.split(line, comments=True)
        for block in fenced("README.md", "bash")
        for line in block.splitlines()
        if line.startswith("sleb ")
    ]
    assert [c[1] for c in commands] == [
        "prune", "search", "apply", "inspect", "similarity", "search", "eval", "apply", "verify",
    ]  # fmt: skip
    for command in commands:
        assert main([*command[1:], *(["--force"] if command[1] == "apply" else [])]) == 0, command
    assert "gates passed" in capsys.readouterr().out
    assert sleb.Plan.load("smaller/plan.json").at_depth(4) == sleb.Plan.load("plan.json").at_depth(
        4
    )


def test_the_readmes_python_works(workplace):
    examples = fenced("README.md", "python")
    assert len(examples) == 2
    scope: dict[str, object] = {}
    for example in reversed(examples):  # the second one writes what the first one loads
        exec(example, scope)
    assert scope["model"].config.num_hidden_layers == 6


def test_the_exit_codes_are_those_of_the_errors():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    errors = {cls.exit_code for cls in SlebError.__subclasses__()}
    assert {int(code) for code in rows} == errors | {0, 1, 130}


def test_every_verb_is_documented_and_its_example_names_it():
    readme = (ROOT / "README.md").read_text()
    for verb, (_, example) in EXAMPLES.items():
        assert f"sleb {verb}" in readme or f"make {verb}" in readme
        assert example.startswith(f"sleb {verb}")


def test_the_examples_of_extending_work(workplace, tmp_path):
    metric, strategy, source = fenced("docs/extending.md", "python")
    names = "from sleb.metrics import *; from sleb.metrics import METRICS, Metric, TokenMetric\n"
    exec(names + metric, {})
    found = sleb.search("MODEL", remove=1, metric="error", windows=2, length=16)
    assert found.unit == "share of tokens"
    assert all(0 <= s.mean <= 1 for s in found.rounds[0].scores)

    exec(
        "import random; from sleb.selection.strategies import STRATEGIES, Found\n"
        "from sleb.selection.objective import BlockSet\n" + strategy,
        {},
    )
    from sleb.selection.objective import Objective
    from test_search import toy

    objective = Objective(toy([9, 3, 2, 1, 7]), 2)
    assert STRATEGIES["random"](objective, range(5), 2).order == (2, 3)

    exec("import csv; from sleb.text.sources import SOURCES\n" + source, {})
    Path("table.csv").write_text("id,text\n1,hello there\n2,and more\n")
    assert list(SOURCES[".csv"]("table.csv", None)) == ["hello there", "and more"]


@pytest.fixture(autouse=True)
def _registries_as_before():
    registries = (METRICS, STRATEGIES, SOURCES)
    before = [dict(r._entries) for r in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
