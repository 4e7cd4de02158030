"""What the documentation shows works: its commands and examples are run here."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import sleb
from cli_tools import COMMANDS
from conftest import save_tiny
from sleb.acceptance import LIMITS, Gate
from sleb.calibration.prompts import read_prompts
from sleb.calibration.sources import SOURCES
from sleb.cli import verbs
from sleb.cli.main import main
from sleb.core.errors import SlebError
from sleb.core.statistics import flips, proportion
from sleb.evaluation.agreement import FLOOR
from sleb.project import Project
from sleb.record import RunRecord
from sleb.selection.metrics import METRICS
from sleb.selection.strategies import STRATEGIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
GUIDE = "docs/guide.md"
GUIDES = {"en": "docs/proof-of-concept.md", "ja": "docs/proof-of-concept.ja.md"}
VERBS = COMMANDS
guides = pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)


def fenced(path: str, language: str) -> list[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def prose(path: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", read(path), flags=re.MULTILINE | re.DOTALL)


def shell(path: str) -> list[list[str]]:
    """The words of each command that a page's code blocks show, without comments."""
    lines = "".join(fenced(path, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Parse one command of sleb, as far as its verb's options and arguments; run nothing."""
    name, verb, *arguments = words
    assert name == "sleb", words
    VERBS[verb].make_context(f"sleb {verb}", arguments)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a model called MODEL and the guide's texts, to run its examples in."""
    save_tiny(tmp_path / "MODEL", blocks=8)
    other = read("docs/guide.md") * 3
    (tmp_path / "mail.jsonl").write_text('{"text": "%s"}\n' % ("mail to all of you " * 900))
    (tmp_path / "other.txt").write_text(other, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_guides_commands_work_in_their_order(workplace, capsys):
    commands = [words for words in shell(GUIDE) if words[0] == "sleb"]
    ran, measuring = commands[:9], commands[9:]
    assert [c[1] for c in ran] == [
        "prune", "search", "apply", "inspect", "similarity", "search", "eval", "apply", "verify",
    ]  # fmt: skip
    assert [c[1] for c in measuring] == [
        "init", "run", "eval", "compare", "bench", "transfer", "verify", "report",
    ]  # fmt: skip
    for command in measuring:
        check_command(command)
    for command in ran:
        assert main([*command[1:], *(["--force"] if command[1] == "apply" else [])]) == 0, command
    assert "checks passed" in capsys.readouterr().out
    assert sleb.Plan.load("smaller/plan.json").at_depth(4) == sleb.Plan.load("plan.json").at_depth(
        4
    )


@pytest.mark.slow
def test_the_guides_measurements_work_in_their_order(workplace):
    Path("prompts.jsonl").write_text('{"prompt": "Dear all,"}\n')
    Path("questions.jsonl").write_text(fenced(GUIDES["en"], "json")[1])
    Path("gate.toml").write_text("size.max_mb = 100\n")
    for command in [words for words in shell(GUIDE) if words[0] == "sleb"][9:]:
        few = ["--new-tokens", "8"] if command[1] == "compare" else []  # the model reads only 256
        code = main([*command[1:], *few])
        # a random model may be slower than the limit that `sleb init` writes
        assert code in ((0, 3) if command[1] == "run" else (0,)), command
    record = RunRecord.load("smaller")
    assert all((record.tasks, record.answers, record.speed, record.transfer, record.gate))
    assert Path("smaller/report.en.html").is_file()
    assert Path("report.html").is_file()


def test_the_guides_python_works(workplace):
    examples = fenced(GUIDE, "python")
    assert len(examples) == 2
    scope: dict[str, object] = {}
    for example in reversed(examples):  # the second one writes what the first one loads
        exec(example, scope)
    assert scope["model"].config.num_hidden_layers == 6


def test_the_readme_is_short_and_the_guide_has_all_of_its_commands():
    readme = read("README.md")
    assert len(readme.splitlines()) < 120
    assert all(words in shell(GUIDE) for words in shell("README.md"))
    assert all(example in fenced(GUIDE, "python") for example in fenced("README.md", "python"))


def test_the_guide_in_japanese_has_the_same_commands_and_codes():
    japanese = "docs/guide.ja.md"
    assert shell(japanese) == shell(GUIDE)
    assert fenced(japanese, "python") == fenced(GUIDE, "python")
    codes = [re.findall(r"^\| (\d+) \|", read(page), re.MULTILINE) for page in (GUIDE, japanese)]
    assert codes[0] == codes[1]
    for command in re.findall(r"`(sleb \w[^`]*)`", prose(japanese)):
        words = shlex.split(command)
        assert words[1] in VERBS
        options = {o for p in VERBS[words[1]].params for o in p.opts}
        assert {word for word in words if word.startswith("-")} <= options


def test_the_exit_codes_are_those_of_the_errors():
    rows = re.findall(r"^\| (\d+) \|", read(GUIDE), re.MULTILINE)
    errors = {cls.exit_code for cls in SlebError.__subclasses__()}
    assert {int(code) for code in rows} == errors | {0, 1, 130}


def test_every_verb_is_documented_and_its_example_names_it():
    guide = read(GUIDE)
    for verb in verbs.VERBS:
        assert f"sleb {verb.name}" in guide or f"make {verb.name}" in guide
        assert verb.example.startswith(f"sleb {verb.name}")


def test_the_examples_of_extending_work(workplace, tmp_path):
    metric, strategy, source = fenced("docs/extending.md", "python")
    names = "from sleb.selection.metrics import METRICS, Metric, TokenMetric\n"
    exec(names + metric, {})
    found = sleb.search("MODEL", remove=1, metric="error", windows=2, length=16)
    assert found.unit == "share of tokens"
    assert all(0 <= s.mean <= 1 for s in found.rounds[0].scores)

    exec(
        "import random; from sleb.selection.strategies import STRATEGIES, SearchResult\n"
        "from sleb.selection.objective import BlockSet\n" + strategy,
        {},
    )
    from search_tools import toy
    from sleb.selection.objective import Objective

    objective = Objective(toy([9, 3, 2, 1, 7]), 2)
    assert STRATEGIES["random"](objective, range(5), 2).order == (2, 3)

    exec("import csv; from sleb.calibration.sources import SOURCES\n" + source, {})
    Path("table.csv").write_text("id,text\n1,hello there\n2,and more\n")
    assert list(SOURCES[".csv"]("table.csv", None)) == ["hello there", "and more"]


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.fixture(scope="module")
def site_tool():
    spec = importlib.util.spec_from_file_location("site_tool", ROOT / "tools" / "site.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_messages_that_are_explained_are_those_of_the_code(site_tool):
    page, known = read("docs/troubleshooting.md"), site_tool.messages()
    quoted = 0
    for section in page.split("\n## Exit code ")[1:]:
        code = int(section.split(":")[0])
        for line in re.findall(r"^\|? ?`([^`]+)`(?: \||: Ctrl)", section, re.MULTILINE):
            # what the message itself has in backticks is left out of a quotation
            said = [text.replace("`…`", "…") for text in known[code]]
            assert any(line in text for text in said), f"{code}: {line}"
            quoted += 1
    assert quoted > 45
    assert {code for code in known if f"## Exit code {code}:" in page} == {*known}


def test_messages_of_every_exit_code_are_in_the_list(site_tool):
    assert {*site_tool.messages()} == {2, 3, 4, 5, 6, 130}
    page = site_tool.message_page()
    for text in ("no plan at …; make one with: sleb search MODEL -o …", "disk full; free some"):
        assert f"\n{text}" in page


def test_the_reference_has_every_verb_option_and_public_name(site_tool):
    found = site_tool.reference()
    for name in sleb.__all__:
        assert f"### sleb.{name}\n" in found
    for verb, command in VERBS.items():
        own = found[found.index(f"### sleb {verb}\n") :].split("\n### ")[0]
        assert all(option in own for p in command.params for option in p.opts if "-" in option)


def test_every_page_is_in_the_site():
    named = set(re.findall(r": (docs/\S+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    (build,) = re.findall(r"mkdocs build.*", read("Makefile"))
    assert build == "mkdocs build --strict"  # with --quiet no warning would count
    made = {"docs/reference.md", "docs/messages.md"}
    assert named - made == {f"docs/{p.name}" for p in ROOT.glob("docs/*.md")}


@guides
def test_the_guides_commands_are_possible(guide):
    shown = [words[words[0] == "time" :] for words in shell(guide)]
    extras = [word for words in shown if words[0] == "pip" for word in re.findall(r"\w+", words[2])]
    known = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert extras
    assert set(extras) <= set(known)
    commands = [words for words in shown if words[0] != "pip"]
    assert len(commands) > 12
    for words in commands:
        check_command(words)
    options = {
        o for verb in VERBS.values() for p in verb.params for o in (*p.opts, *p.secondary_opts)
    }
    named = re.findall(r"`[^`\n]*?(--[\w-]+)", prose(guide))
    assert named
    assert set(named) <= options
    verbs = re.findall(r"`sleb (\w+)", prose(guide))
    assert verbs
    assert set(verbs) <= {*VERBS}


@guides
def test_the_guides_files_are_read(guide, tmp_path):
    prompts, questions = fenced(guide, "json")
    (settings,) = fenced(guide, "toml")
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    (tmp_path / "real.jsonl").write_text('{"prompt": "Who?"}\n' * 12, encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text(questions, encoding="utf-8")
    (tmp_path / "sleb.toml").write_text(settings, encoding="utf-8")
    project = Project.load(tmp_path / "sleb.toml")
    assert [p.json for p in read_prompts(tmp_path / "prompts.jsonl")] == [False, False, True]
    question = json.loads(questions)
    assert 0 <= question["answer"] < len(question["choices"])

    texts = [word for words in shell(guide) if words[1] == "eval" for word in words if "=" in word]
    assert [text.partition("=")[0] for text in texts] == list(project.text)
    tables = {"": project, "search": project.search, "measure": project.measure}
    keys = {key for table in tables.values() for key in type(table).model_fields}
    settings = re.findall(r"`(\w+) = [^`]+`", prose(guide))
    assert settings
    assert set(settings) <= keys


@guides
def test_the_guides_limits_are_those_of_the_gate(guide, tmp_path):
    limits = re.findall(r"`(\w+)\.((?:max|min)_\w+)`", prose(guide))
    assert len(limits) == 11
    for table, key in limits:
        assert f"{table}.{key}" in {limit.key for limit in LIMITS}
    sleb.init(tmp_path / "sleb.toml", model="MODEL")
    written = tomllib.loads((tmp_path / "sleb.toml").read_text(encoding="utf-8"))
    row = next(line for line in prose(guide).splitlines() if "`perplexity.max_ratio`" in line)
    assert str(written["gate"]["perplexity"]["max_ratio"]) in row
    assert written["gate"]["answers"]["min_agreement"] == FLOOR


@guides
def test_the_guides_exit_codes_are_the_readmes(guide):
    def codes(path: str) -> set[str]:
        rows = re.findall(r"^\| (\d[\d,、 ]*) \|", read(path), re.MULTILINE)
        return {code for row in rows for code in re.findall(r"\d+", row)}

    assert codes(guide) == codes(GUIDE)


@guides
def test_the_guides_figures_are_those_of_the_statistics(guide):
    """How much evidence tells how much: every figure is computed again."""

    def difference(items: int, each_way: int):
        """With as many answers won as lost, and the others right."""
        lost, won, same = [True] * each_way, [False] * each_way, [True] * (items - 2 * each_way)
        return flips(lost + won + same, won + lost + same).difference

    prompts = {n: f"{100 * proportion(0, n).high:.0f} ?%" for n in (20, 50, 100, 200)}
    questions = {n: f"{100 * difference(n, n // 20).high:.1f}" for n in (100, 200, 400, 1000)}
    for found in (prompts, questions):
        row = ".*".join(rf"(?<!\d){n:,}\D.*\D{figure}" for n, figure in found.items())
        assert re.search(row, prose(guide)), row
    judged = f"{1 + difference(50, 3).low / 0.6:.2f}"
    assert re.search(rf"`tasks.min_retention`.*\D{judged}", prose(guide))


def test_both_guides_say_the_same():
    en, ja = GUIDES.values()
    assert shell(en) == shell(ja)
    assert tomllib.loads(*fenced(en, "toml")) == tomllib.loads(*fenced(ja, "toml"))

    def form(value):
        """A JSON value without its texts, which are translated."""
        if isinstance(value, dict):
            return {key: item if key == "id" else form(item) for key, item in value.items()}
        return [form(item) for item in value] if isinstance(value, list) else type(value)

    for ours, theirs in zip(fenced(en, "json"), fenced(ja, "json"), strict=True):
        rows = [[form(json.loads(line)) for line in text.splitlines()] for text in (ours, theirs)]
        assert rows[0] == rows[1]
    for pattern in (r"^#+(?= )", r"^- ", r"^\d\. ", r"^\| ", r"^```\w*", r"^\*\*\d\."):
        counts = [re.findall(pattern, read(guide), re.MULTILINE) for guide in (en, ja)]
        assert counts[0] == counts[1], pattern
    spans = [set(re.findall(r"`([^`\n]+)`", prose(guide))) for guide in (en, ja)]
    assert spans[0] ^ spans[1] <= {"smaller/report.en.html", "smaller/report.ja.html"}


def test_the_examples_are_read():
    assert Gate.load(ROOT / "examples/gate.toml")
    assert len(read_prompts(ROOT / "examples/prompts.jsonl")) > 5
    for name in ("gate.toml", "prompts.jsonl", "github-actions.yml"):
        assert all(f"(../examples/{name})" in read(guide) for guide in GUIDES.values())


def test_the_workflow_checks_the_gate():
    import yaml

    (job,) = yaml.safe_load(read("examples/github-actions.yml"))["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    variables = {name for run in runs for name in re.findall(r"\$(\w+)", run)}
    assert variables == set(job["env"])
    (command,) = (shlex.split(run) for run in runs if run.startswith("sleb "))
    assert command[1] == "verify"
    assert "--gate" in command
    check_command(command)


@pytest.fixture(autouse=True)
def _registries_as_before():
    registries = (METRICS, STRATEGIES, SOURCES)
    before = [dict(r._entries) for r in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
