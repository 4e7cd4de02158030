"""Tasks: everything that a user can get wrong, and what the terminal shows."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from sleb.cli.render_tasks import tasks as draw

import sleb
from cli_tools import refused, run
from sleb.core.errors import DataError, InputError, ResourceError
from sleb.core.statistics import Interval, flips, proportion
from sleb.evaluation import lm_eval as harness_module
from sleb.evaluation.questions import read_questions
from sleb.evaluation.tasks import TaskResult, check_tasks, run_tasks
from sleb.project import Project
from sleb.views import items
from sleb.views.terminal import draw

GOOD = {"question": "Two?", "choices": ["a", "b", "c"], "answer": 1}
SAY = {"question": "Two?", "answer": "2"}


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return sleb.load(tiny_dir, dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(name, *rows):
    with open(name, "w", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return name


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], r"q\.jsonl has no questions; a row is \{"),
        (["", "  "], "has no questions"),
        ([GOOD, "{"], r"q\.jsonl:2: not JSON \(Expecting property name"),
        ([GOOD, "", "[1]"], r"q\.jsonl:3: not an object; a row is"),
        ([{**GOOD, "answr": 1}], "1: there is no `answr` \\(did you mean 'answer'\\?\\)"),
        ([{"question": "Two?", "choices": ["a", "b"]}], "1: `answer`: field required"),
        ([{**GOOD, "answer": True}], "`answer` is the number of a choice, a text, or a list"),
        ([{**GOOD, "answer": 1.0}], "`answer` is the number of a choice"),
        ([{**GOOD, "question": 3}], "`question`: input should be a valid string"),
        ([{**GOOD, "choices": ["a"], "answer": 0}], "1: 1 choices; give at least 2"),
        ([{**GOOD, "choices": []}], "1: 0 choices; give at least 2"),
        ([GOOD, {**GOOD, "answer": 3}], "2: answer 3 is out of range: .* from 0 to 2"),
        ([{**GOOD, "answer": -1}], "answer -1 is out of range"),
        ([{**GOOD, "answer": "d"}], "answer 'd' is none of the choices"),
        ([{**GOOD, "answer": ["a"]}], "one choice is right; give its number"),
        ([{**GOOD, "choices": ["a", " ", "b"]}], "choice 1 is empty"),
        ([{**GOOD, "choices": ["a", "b", "a"]}], "two choices are 'a'"),
        ([{"question": " ", "answer": "2"}], "the question is empty"),
        ([{"prompt": " ", "answer": "2"}], "the prompt is empty"),
        ([{"answer": "2"}], "it has neither `question` nor `prompt`"),
        ([{**SAY, "prompt": "x"}], "it has both `question` and `prompt`"),
        ([{"prompt": "x", "context": "y", "answer": "2"}], "put the `context` into it"),
        ([{**SAY, "answer": 2}], 'answer 2 is a number, .* write "2" for an answer in words'),
        ([{**SAY, "answer": []}], "no answer is accepted"),
        ([{**SAY, "answer": ["2", " . "]}], "answer ' . ' has nothing to compare"),
        ([{**SAY, "answer": "2\n3"}], "has several lines"),
        ([GOOD, SAY], "2: answers in words after a question, and the rows before are choices"),
        ([SAY, {"prompt": "x", "answer": "y"}], "2: answers in words after a prompt"),
        ([{**SAY, "id": 1}, {**SAY, "id": "1"}], "2: id '1' was there before"),
        (['{"question": "\\ud800", "answer": "x"}'], "half of a surrogate pair"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(rows, said):
    path = write("q.jsonl", *rows)
    with pytest.raises(InputError, match=said):
        check_tasks([path])


def test_rows_keep_their_ids_and_forms():
    path = write("q.jsonl", "", {**GOOD, "id": 7}, {**GOOD, "answer": "c"})
    first, second = read_questions(path).items
    assert (first.where, first.answers, second.where, second.answers) == (
        "7", ("b",), "line 3", ("c",),
    )  # fmt: skip


def test_files_and_names_that_are_not_there(monkeypatch):
    with pytest.raises(InputError, match=r"no file of questions at none\.jsonl"):
        check_tasks(["none.jsonl"])
    with open("q.jsonl", "wb") as file:
        file.write(b'{"question": "\xff"}')
    with pytest.raises(InputError, match=r"not UTF-8: invalid byte at offset 14"):
        check_tasks(["q.jsonl"])
    with pytest.raises(InputError, match="no task to score"):
        check_tasks([])
    with pytest.raises(InputError, match="no folder of tasks at nowhere"):
        check_tasks(["x"], folder="nowhere")
    write("q.jsonl", GOOD)
    with pytest.raises(InputError, match="two tasks are named 'q'"):
        check_tasks(["q.jsonl", "./q.jsonl"])
    with pytest.raises(InputError, match="two tasks are named 'q'"):
        check_tasks(["q.jsonl", "q"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sleb\[eval\]'"):
        check_tasks(["q.jsonl"])


YAML = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: q.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a task; the harness's own are left out, since indexing them takes long."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        harness_module,
        "TaskManager",
        lambda include_path, include_defaults: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    (tmp_path / "tasks").mkdir()
    write("tasks/mine.yaml", YAML)
    write("q.jsonl", GOOD, GOOD)
    return "tasks"


def test_unknown_names_and_broken_definitions(tiny, folder):
    check_tasks(["mine"], folder=folder)
    assert run_tasks(tiny, ["mine"], folder=folder)[0].metric == "acc_norm"
    with pytest.raises(InputError, match=r"unknown task 'mime' \(did you mean 'mine'\?\)"):
        check_tasks(["mime"], folder=folder)
    with pytest.raises(InputError, match=r"unknown task 'zzzzzz'; give a .jsonl file"):
        check_tasks(["zzzzzz"], folder=folder)
    with pytest.raises(InputError, match="give the `task` that the file names"):
        check_tasks(["tasks/mine.yaml"], folder=folder)
    write("tasks/other.yaml", "task: [")
    with pytest.raises(InputError, match=r"unknown task 'other'; .*other\.yaml: while parsing"):
        check_tasks(["other"], folder=folder)
    check_tasks(["mine"], folder=folder)


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("q.jsonl", "gone.jsonl", "task 'mine' cannot be loaded: Unable to find .*gone.jsonl"),
        ("doc_to_target: answer", "doc_to_target: '{{gone}}'", "loaded: 'gone' is undefined"),
        ("doc_to_choice: choices", "doc_to_choice: '{{gone.far}}'", "cannot be loaded: 'gone'"),
        ("output_type: multiple_choice", "output_type: nonsense", "cannot be loaded: Got invalid"),
        ("task: mine", "task: mine\nunsafe_code: true", "runs code that the model writes"),
        ("task: mine", "task: mine\ndoc_to_image: question", "needs images or sound"),
        (
            "doc_to_target: answer",
            "doc_to_target: answer\nmetric_list: [{metric: brier_score}]",
            r"no metric that is a mean over items, .* \(it has brier_score\)",
        ),
        (
            "doc_to_target: answer",
            "doc_to_target: answer\nprocess_results: !function own.far\n"
            "metric_list: [{metric: far, aggregation: mean, higher_is_better: true}]",
            "its far gives an item 7, which is no score in 0..1",
        ),
    ],
)
def test_definitions_that_cannot_be_scored(tiny, folder, line, instead, said):
    assert line in YAML
    write("tasks/own.py", "def far(doc, results):\n    return {'far': 7}")
    write("tasks/mine.yaml", YAML.replace(line, instead))
    with pytest.raises(InputError, match=said):
        run_tasks(tiny, ["mine"], folder=folder)


@pytest.mark.parametrize("picked", [None, 2])
def test_a_right_answer_that_is_no_choice_is_not_scored_as_wrong(tiny, folder, picked):
    write("q.jsonl", GOOD, GOOD, {**GOOD, "answer": 7})
    with pytest.raises(InputError, match="item 2: its answer 7 is none of the 3 choices"):
        run_tasks(tiny, ["mine"], folder=folder, limit=picked, seed=1)


def test_data_on_the_hub_needs_a_network(tiny, folder):
    hub = YAML.replace("dataset_path: json", "dataset_path: some/questions")
    write("tasks/mine.yaml", hub.replace("dataset_kwargs: {data_files: {test: q.jsonl}}\n", ""))
    with pytest.raises(ResourceError, match=r"data of task 'mine' cannot be fetched .*tasks\.md"):
        run_tasks(tiny, ["mine"], folder=folder)


def scored(*_, **__):
    raise AssertionError("scored, though an item is too long")


def test_an_item_that_is_too_long_is_refused_before_any_is_scored(tiny, monkeypatch):
    # 256 tokens are read, of which the last one is only predicted; a byte is a token
    frame = len("Question: \nAnswer:")
    fits = {**GOOD, "question": "x" * (256 - frame - 1)}
    assert run_tasks(tiny, [write("fits.jsonl", fits)])[0].items == 1
    say = {**SAY, "question": "x" * (256 - frame - 10)}
    assert run_tasks(tiny, [write("say.jsonl", say)])[0].items == 1
    monkeypatch.setattr(harness_module, "evaluate", scored)
    long = write("long.jsonl", *[GOOD] * 4, {**fits, "question": fits["question"] + "x"})
    with pytest.raises(InputError, match=r"'long', line 5 takes 257 tokens .* reads 256; shorten"):
        run_tasks(tiny, ["fits.jsonl", long])
    long = write("long.jsonl", SAY, {**say, "id": "it", "question": say["question"] + "x"})
    with pytest.raises(InputError, match=r"'long', it takes 257 tokens with its answer"):
        run_tasks(tiny, [long])


def test_limits_and_nan(tiny):
    path = write("q.jsonl", GOOD)
    for wrong in ({"limit": 0}, {"batch": 0}):
        with pytest.raises(InputError, match="0 is not possible; use at least 1"):
            run_tasks(tiny, [path], **wrong)
    head = tiny.model.lm_head.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head.fill_(float("nan"))
        with pytest.raises(DataError, match="q, dense: log-probabilities are NaN"):
            run_tasks(tiny, [path])
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_the_command_line_scores_and_records_nothing_by_halves(place, capsys):
    rows = [{**GOOD, "answer": i % 3} for i in range(6)]
    write("q.jsonl", *rows)
    done = run(capsys, "eval", "MODEL", "--plan", "plan.json", "--task", "q.jsonl", "--limit", "4")
    assert done.code == 0, done.err
    assert "the same items" in done.out
    assert "acc_norm" in done.out
    assert done.err == ""
    found = run(capsys, "eval", "MODEL", "--task", "q.jsonl", "--json").json
    assert [(r["name"], r["items"], r["pruned"]) for r in found] == [("q", 6, None)]
    write("bad.jsonl", {**GOOD, "answer": 5})
    line = refused(capsys, 2, "eval", "missing-model", "--task", "bad.jsonl")
    assert "bad.jsonl:1: answer 5 is out of range" in line  # before the model is looked for


def test_a_project_checks_its_questions_first(folder):
    settings = 'model = "m"\nout = "o"\n[text]\na = "default"\n[search]\nremove = 1\n[measure]\n'
    write("sleb.toml", settings + 'tasks = ["bad.jsonl", "mine"]\ntasks_folder = "tasks"')
    write("bad.jsonl", {**GOOD, "answer": 5})
    with pytest.raises(InputError, match="answer 5 is out of range"):
        Project.load("sleb.toml")
    write("bad.jsonl", GOOD)
    Project.load("sleb.toml")


def shown(*results) -> str:
    console = Console(width=100, record=True, quiet=False, file=open("drawn", "w"))  # noqa: SIM115
    draw(items(results), console)
    return console.export_text()


def result(lost, won, both=300, items=500, chance=0.25) -> TaskResult:
    before = [True] * (both + lost) + [False] * (items - both - lost)
    after = [True] * both + [False] * lost + [True] * won + [False] * (items - both - lost - won)
    return TaskResult(
        name="quiz",
        metric="acc",
        items=items,
        chance=chance,
        dense=proportion(sum(before), items),
        pruned=proportion(sum(after), items),
        flips=flips(before, after),
    )


def test_a_point_on_500_items_is_called_noise():
    text = shown(result(lost=20, won=15))
    assert "−1.0 points (" in text
    assert "within noise" in text
    assert "cannot tell" in text
    text = shown(result(lost=60, won=15))
    assert "−9.0 points (" in text
    assert "worse" in text
    assert "< 0.001" in text
    assert "within noise" not in text
    assert "better" in shown(result(lost=15, won=60))
    assert "nothing flipped" in shown(result(0, 0))
    assert "guessing" not in text
    assert "not clearly better than guessing" in shown(result(1, 1, both=130))
    value = Interval(value=0.5, low=0.4, high=0.6)
    mixed = TaskResult(name="f", metric="f", items=9, chance=None, dense=value, pruned=value)
    assert "not compared item by item" in shown(mixed)
    alone = TaskResult(name="f", metric="f", items=9, chance=None, dense=value)
    assert "the same items" not in shown(alone)
    assert np.isclose(result(20, 15).retention, 315 / 320)
