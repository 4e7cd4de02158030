"""Tasks: everything that a user can get wrong, and what the terminal shows."""

import importlib.util
import json

import pytest
import torch

from cli_tools import refused, run
from sleb.core.errors import DataError, InputError, ResourceError
from sleb.evaluation.questions import read_questions
from sleb.evaluation.tasks import check_tasks, run_tasks

GOOD = {"question": "Two?", "choices": ["a", "b", "c"], "answer": 1}
SAY = {"question": "Two?", "answer": "2"}


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
        ([], "no questions"),
        (["", "  "], "no questions"),
        ([GOOD, "{"], "line 2 .*not JSON"),
        ([GOOD, "", "[1]"], "line 3.*not an object"),
        ([{**GOOD, "answr": 1}], "line 1.*`answr`.*'answer'"),
        ([{"question": "Two?", "choices": ["a", "b"]}], "`answer`"),
        ([{**GOOD, "answer": True}], "`answer`"),
        ([{**GOOD, "answer": 1.0}], "`answer`"),
        ([{**GOOD, "question": 3}], "`question`"),
        ([{**GOOD, "choices": ["a"], "answer": 0}], "`choices`"),
        ([{**GOOD, "choices": []}], "`choices`"),
        ([{**GOOD, "choices": ["a", " ", "b"]}], "`choices`"),
        ([{**GOOD, "choices": ["a", "b", "a"]}], "`choices`"),
        ([GOOD, {**GOOD, "answer": 3}], "line 2.*`answer` 3 .* 2"),
        ([{**GOOD, "answer": -1}], "`answer` -1"),
        ([{**GOOD, "answer": "d"}], "`answer` 'd'"),
        ([{**GOOD, "answer": ["a"]}], "one choice"),
        ([{"question": " ", "answer": "2"}], "empty"),
        ([{"prompt": " ", "answer": "2"}], "empty"),
        ([{"answer": "2"}], "`question` or `prompt`"),
        ([{**SAY, "prompt": "x"}], "`question` or `prompt`"),
        ([{"prompt": "x", "context": "y", "answer": "2"}], "`context`"),
        ([{**SAY, "answer": 2}], '`answer` as "2"'),
        ([{**SAY, "answer": []}], "`answer`"),
        ([{**SAY, "answer": ["2", " . "]}], "`answer` ' . '"),
        ([{**SAY, "answer": "2\n3"}], "several lines"),
        ([GOOD, SAY], "line 2.*words after a question.*choices"),
        ([SAY, {"prompt": "x", "answer": "y"}], "line 2.*after a prompt"),
        ([{**SAY, "id": 1}, {**SAY, "id": "1"}], "line 2.*'1'"),
        (['{"question": "\\ud800", "answer": "x"}'], "surrogate"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(rows, said):
    path = write("q.jsonl", *rows)
    with pytest.raises(InputError, match=said):
        check_tasks([path])


def test_rows_keep_their_ids_and_forms():
    path = write("q.jsonl", "", {**GOOD, "id": 7}, {**GOOD, "answer": "c"})
    found = read_questions(path).items
    assert {where: item.answers for where, item in found.items()} == {"7": ("b",), "line 3": ("c",)}


def test_files_and_names_that_are_not_there(monkeypatch):
    with open("latin.jsonl", "wb") as file:
        file.write(b'{"question": "\xff"}')
    write("q.jsonl", GOOD)
    for tasks, folder, said in [
        (["none.jsonl"], None, "none.jsonl"),
        (["latin.jsonl"], None, "offset 14"),
        ([], None, "no task"),
        (["x"], "nowhere", "nowhere"),
        (["q.jsonl", "./q.jsonl"], None, "'q'"),
        (["q.jsonl", "q"], None, "'q'"),
    ]:
        with pytest.raises(InputError, match=said):
            check_tasks(tasks, folder=folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="lm-evaluation-harness"):
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
        "sleb.evaluation.lm_eval.TaskManager",
        lambda include_path, include_defaults: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    (tmp_path / "tasks").mkdir()
    write("tasks/mine.yaml", YAML)
    write("q.jsonl", GOOD, GOOD)
    return "tasks"


def test_unknown_names_and_broken_definitions(loaded, folder):
    check_tasks(["mine"], folder=folder)
    assert run_tasks(loaded, task=["mine"], tasks_folder=str(folder))[0].metric == "acc_norm"
    for name, said in [
        ("mime", "'mime'.*'mine'"),
        ("zzzzzz", "'zzzzzz'"),
        ("tasks/mine.yaml", "`task`"),
        ("other", r"other\.yaml: while parsing"),
    ]:
        if name == "other":
            write("tasks/other.yaml", "task: [")
        with pytest.raises(InputError, match=said):
            check_tasks([name], folder=folder)
    check_tasks(["mine"], folder=folder)


FAR = "metric_list: [{metric: far, aggregation: mean, higher_is_better: true}]"
TARGET = "doc_to_target: answer"


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("q.jsonl", "gone.jsonl", "'mine' cannot be loaded: .*gone.jsonl"),
        (TARGET, "doc_to_target: '{{gone}}'", "loaded: 'gone'"),
        ("doc_to_choice: choices", "doc_to_choice: '{{gone.far}}'", "loaded: 'gone'"),
        ("output_type: multiple_choice", "output_type: nonsense", "cannot be loaded"),
        ("task: mine", "task: mine\nunsafe_code: true", "runs code.*--run-code"),
        ("task: mine", "task: mine\ndoc_to_image: question", "images or sound"),
        (TARGET, f"{TARGET}\nmetric_list: [{{metric: brier_score}}]", "no metric .*brier_score"),
        (TARGET, f"{TARGET}\nprocess_results: !function own.far\n{FAR}", "far gives an item 7"),
    ],
)
def test_definitions_that_cannot_be_scored(loaded, folder, line, instead, said):
    assert line in YAML
    write("tasks/own.py", "def far(doc, results):\n    return {'far': 7}")
    write("tasks/mine.yaml", YAML.replace(line, instead))
    with pytest.raises(InputError, match=said):
        run_tasks(loaded, task=["mine"], tasks_folder=str(folder))


@pytest.mark.parametrize("picked", [None, 2])
def test_a_right_answer_that_is_no_choice_is_not_scored_as_wrong(loaded, folder, picked):
    write("q.jsonl", GOOD, GOOD, {**GOOD, "answer": 7})
    with pytest.raises(InputError, match="item 2: its answer 7 is none of the 3 choices"):
        run_tasks(loaded, task=["mine"], tasks_folder=str(folder), limit=picked, seed=1)


def test_data_on_the_hub_needs_a_network(loaded, folder):
    hub = YAML.replace("dataset_path: json", "dataset_path: some/questions")
    write("tasks/mine.yaml", hub.replace("dataset_kwargs: {data_files: {test: q.jsonl}}\n", ""))
    with pytest.raises(ResourceError, match=r"data of task 'mine' cannot be fetched .*tasks\.md"):
        run_tasks(loaded, task=["mine"], tasks_folder=str(folder))


def scored(*_, **__):
    raise AssertionError("scored, though an item is too long")


def test_an_item_that_is_too_long_is_refused_before_any_is_scored(loaded, monkeypatch):
    # 256 tokens are read, of which the last one is only predicted; a byte is a token
    frame = len("Question: \nAnswer:")
    fits = {**GOOD, "question": "x" * (256 - frame - 1)}
    assert run_tasks(loaded, task=[write("fits.jsonl", fits)])[0].items == 1
    say = {**SAY, "question": "x" * (256 - frame - 10)}
    assert run_tasks(loaded, task=[write("say.jsonl", say)])[0].items == 1
    monkeypatch.setattr("sleb.evaluation.lm_eval.evaluate", scored)
    long = write("long.jsonl", *[GOOD] * 4, {**fits, "question": fits["question"] + "x"})
    with pytest.raises(InputError, match=r"'long', line 5 takes 257 tokens .* reads 256; shorten"):
        run_tasks(loaded, task=["fits.jsonl", long])
    long = write("long.jsonl", SAY, {**say, "id": "it", "question": say["question"] + "x"})
    with pytest.raises(InputError, match=r"'long', it takes 257 tokens with its answer"):
        run_tasks(loaded, task=[long])


def test_limits_and_nan(loaded, monkeypatch):
    path = write("q.jsonl", GOOD)
    for wrong in ("limit", "batch"):
        with pytest.raises(InputError, match=f"--{wrong} 0"):
            run_tasks(loaded, task=[path], **{wrong: 0})
    head = loaded.model.lm_head
    nan = torch.nn.Parameter(torch.full_like(head.weight, float("nan")))
    monkeypatch.setitem(head._parameters, "weight", nan)
    with pytest.raises(DataError, match="q, dense: log-probabilities are NaN"):
        run_tasks(loaded, task=[path])


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
    assert "bad.jsonl line 1: `answer` 5" in line  # before the model is looked for
