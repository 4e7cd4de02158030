"""Every command that a result's report, its card or the end of `sleb prune` names is accepted."""

import html
import re
import shlex
from pathlib import Path

import gguf
import pytest

import sleb
from cli_tools import run
from gguf_tools import readable, write_tiny  # noqa: F401 (a fixture)
from sleb.core.errors import InputError
from sleb.models.load import LoadedModel
from sleb.runtimes.worker import Worker

pytestmark = pytest.mark.usefixtures("readable")
CPU = ["--dtype", "float32", "--device", "cpu"]
FEW = ["--windows", 4, "--length", 16, *CPU]
SHORT = {
    **dict.fromkeys(("eval", "verify"), CPU),
    **dict.fromkeys(("transfer", "search"), FEW),
    "bench": ["--quick", "--runs", 1, *CPU],
    "run": ["--dry-run"],
}
"""Options that make a command quick; without them it is accepted just so."""
GIVEN = {
    "FILE": "text.txt",
    "FILE1": "text.txt",
    "FILE2": "other.txt",
    "FILE.jsonl": "prompts.jsonl",
    "N": "2",
    "D": "1",
    "PATH": "s",  # a card does not know where it is
    "ORIGINAL": "m.gguf",
}
"""What a reader puts in place of words in capitals."""
STARTS = "a runtime would start"
QUESTIONS = '{"question": "what is one and one", "answer": "2"}\n' * 4


@pytest.fixture
def here(tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    write_tiny(Path("m.gguf"), kind=gguf.GGMLQuantizationType.Q8_0)
    assert text_file == tmp_path / "text.txt"
    Path("other.txt").write_text(text_file.read_text()[::-1])
    Path("prompts.jsonl").write_text('{"prompt": "what is one and one"}\n' * 4)
    Path("gate.toml").write_text("perplexity.max_ratio = 1000.0\n")
    sleb.init("sleb.toml", model="m.gguf")


def named(said: str, out: str) -> list[str]:
    """What the end of `sleb prune`, the report and the card have to type."""
    page = Path("report.html").read_text("utf-8")
    found = [
        html.unescape(re.sub("<[^>]*>", "", code))
        for code in re.findall("<code>(.*?)</code>", page, re.DOTALL)
    ]
    card = Path(out, "README.md")
    if card.is_file():
        found += re.findall(r"^sleb .*$|(?<=`)sleb [^`]*", card.read_text(), re.MULTILINE)
    found += [one for line in said.splitlines() for one in re.split("; |: ", line)]
    starts = ("sleb ", "sleb.load(")
    return [one for one in dict.fromkeys(found) if one.startswith(starts)]


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["block", "attention"])
@pytest.mark.parametrize("out", ["s.gguf", "s"])
def test_every_command_that_a_result_names_is_accepted(
    here, capsys, monkeypatch, out, unit, measured
):
    """``measured``: runtimes are started, which takes minutes; else what would start one is told
    by then to be accepted."""
    if not measured:

        def enter(worker):
            raise InputError(STARTS)

        monkeypatch.setattr(Worker, "__enter__", enter)
    asked = ["--unit", unit, "--remove", 3, "--heldout", 6, "--repair-tokens", 600, *FEW]
    made = run(capsys, "prune", "m.gguf", "-o", out, "--prompts", "none", *asked)
    assert made.code == 0, made.err
    assert sleb.Plan.load("s.plan.json" if out == "s.gguf" else "s/plan.json").repair
    assert run(capsys, "report", out, "-o", "report.html").code == 0
    commands = named(made.out, out)
    verbs = {command.split()[1] for command in commands if command.startswith("sleb ")}
    assert verbs >= {"verify", "eval", "transfer", "search"}
    refused = {}
    for number, command in enumerate(commands):
        if command.startswith("sleb.load("):
            assert isinstance(eval(command, {"sleb": sleb, "D": 1}), LoadedModel)  # noqa: S307
            continue
        _, verb, *words = shlex.split(command)
        if "--task" in words:
            Path("questions.jsonl").write_text(QUESTIONS)
            words[words.index("--task") + 1] = "questions.jsonl"
        if "-o" in words:
            place = words.index("-o") + 1
            words[place] = f"{number}-{words[place]}"
        elif verb == "report":
            words += ["-o", f"{number}.html"]
        ran = run(capsys, verb, *(GIVEN.get(word, word) for word in words), *SHORT.get(verb, []))
        if ran.code and STARTS not in ran.err:
            refused[command] = ran.err
    assert not refused
