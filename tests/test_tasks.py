"""Tasks: the harness's own figures, paired on the same items, and those of the cut checkpoint."""

import json
import logging
import os
import random
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import sleb
from conftest import byte_tokenizer, tiny_llama
from sleb.core.errors import InputError
from sleb.evaluation.questions import read_questions
from sleb.evaluation.tasks import run_tasks
from sleb.surgery.apply import apply

REMOVED = (1, 3)
PAIRS = [("sky", "blue"), ("sun", "gold"), ("sea", "green"), ("tar", "black")]
PAIRS += [("rose", "red"), ("snow", "white")]
COLOURS = [colour for _, colour in PAIRS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def taught_dir(tmp_path_factory):
    """A checkpoint of six blocks that has learned the colours by heart."""
    tokenizer, model = byte_tokenizer(), tiny_llama(seed=3)
    texts = [f"Question: {thing}?\nAnswer: {colour}\n" for thing, colour in PAIRS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(120):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("taught") / "model"
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def taught(taught_dir):
    return sleb.load(taught_dir, dtype="float32", device="cpu")


def cut(folder: Path, removed, out: Path):
    """The really pruned checkpoint, loaded alone."""
    plan = sleb.search(folder, remove=len(removed), windows=2, length=16, device="cpu", protect="")
    order = tuple(removed)
    plan = plan.model_copy(update={"order": order, "removed": order, "rounds": ()})
    apply(plan, folder, out)
    return sleb.load(out, dtype="float32", device="cpu")


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def chosen(n=40):
    """Items with three choices of different lengths, the right one anywhere."""
    draw = random.Random(0)
    for i in range(n):
        thing, colour = PAIRS[i % len(PAIRS)]
        others = draw.sample([c for c in COLOURS if c != colour], 2)
        order = draw.sample([colour, *others], 3)
        question = f"{'the ' * (i % 4)}{thing}?"
        yield {"question": question, "choices": order, "answer": order.index(colour)}


def written():
    for thing, colour in PAIRS:
        yield {"question": f"{thing}?", "answer": [f" {colour.upper()}. ", "none"]}


def harness_of(model):
    from sleb.evaluation.lm_eval import Harness  # here, since importing it takes seconds

    return Harness(model, batch=2, progress=sleb.core.progress.silent)


@torch.inference_mode()
def by_hand(model, tokenizer, row) -> bool:
    """Whether the choice of the greatest log-probability per character is the right one."""
    scores = []
    context = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
    for choice in row["choices"]:
        ids = context + tokenizer(f" {choice}").input_ids
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        steps = range(len(context), len(ids))
        scores.append(sum(float(logs[i - 1, ids[i]]) for i in steps) / len(choice))
    return int(np.argmax(scores)) == row["answer"]


def test_choices_are_those_of_a_computation_by_hand(taught, tmp_path):
    rows = list(chosen())
    (result,) = run_tasks(taught, task=[write(tmp_path / "q.jsonl", rows)], removed=REMOVED)
    dense = [by_hand(taught.model, taught.tokenizer, row) for row in rows]
    with sleb.bypassed(taught, REMOVED):
        pruned = [by_hand(taught.model, taught.tokenizer, row) for row in rows]
    lost = sum(a and not b for a, b in zip(dense, pruned, strict=True))
    won = sum(b and not a for a, b in zip(dense, pruned, strict=True))
    assert lost > 0  # or the test would be of nothing
    assert (result.flips.lost, result.flips.won, result.flips.items) == (lost, won, 40)
    assert result.dense.value == sum(dense) / 40
    assert result.pruned.value == sum(pruned) / 40
    assert result.dense.low < result.dense.value < result.dense.high
    assert (result.name, result.metric, result.items) == ("q", "acc_norm", 40)
    assert result.chance == pytest.approx(1 / 3)
    assert result.retention == pytest.approx(sum(pruned) / sum(dense))


@pytest.mark.parametrize("removed", [(1, 3), (0, 4)], ids=["cached", "block 0, not cached"])
def test_the_pruned_score_is_that_of_the_cut_checkpoint(taught, taught_dir, tmp_path, removed):
    tasks = [write(tmp_path / "choose.jsonl", chosen()), write(tmp_path / "say.jsonl", written())]
    side = run_tasks(taught, task=tasks, removed=removed)
    alone = run_tasks(cut(taught_dir, removed, tmp_path / "cut"), task=tasks)
    assert [r.pruned for r in side] == [r.dense for r in alone]
    assert all(r.pruned is None and r.flips is None and r.retention is None for r in alone)


def test_an_exact_match_forgives_case_space_and_a_full_stop_alone(taught, tmp_path):
    (result,) = run_tasks(taught, task=[write(tmp_path / "say.jsonl", written())])
    assert (result.metric, result.chance, result.dense.value) == ("exact_match", None, 1.0)
    wrong = [{"question": f"{thing}?", "answer": f"{colour}-"} for thing, colour in PAIRS]
    (result,) = run_tasks(taught, task=[write(tmp_path / "wrong.jsonl", wrong)])
    assert result.dense.value == 0
    # an answer that only begins like an accepted one does not match
    begin = [{"question": f"{thing}?", "answer": colour[:2]} for thing, colour in PAIRS]
    (result,) = run_tasks(taught, task=[write(tmp_path / "begin.jsonl", begin)])
    assert result.dense.value == 0


def test_a_prompt_is_read_word_for_word(taught, tmp_path):
    asked = list(chosen(12))
    raw = [
        {
            "prompt": f"Question: {row['question']}\nAnswer:",
            "choices": [f" {choice}" for choice in row["choices"]],
            "answer": f" {row['choices'][row['answer']]}",
            "id": i,
        }
        for i, row in enumerate(asked)
    ]
    harness = harness_of(taught)

    def requests(name, rows):
        asked = read_questions(write(tmp_path / f"{name}.jsonl", rows))
        (task,) = harness.load([asked], [], None, limit=None, seed=0)
        return [request.args for request in task.task.instances]

    assert requests("a", asked) == requests("b", raw)
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    a, b = run_tasks(taught, task=files, removed=REMOVED)
    assert (a.dense, a.pruned, a.flips) == (b.dense, b.pruned, b.flips)
    glued = requests("glued", [row | {"choices": ["x", " y"], "answer": 1} for row in raw])
    assert [answer for _, answer in glued[:2]] == ["x", " y"]
    ((text, _), *_) = requests("c", [asked[0] | {"context": " Look up. "}])
    assert text.startswith("Look up.\n\nQuestion: ")


YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of tasks in the harness's YAML, on local files."""
    data = write(tmp_path / "rows.jsonl", chosen())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(YAML.format(name="colours", data=data))
    return tmp_path / "tasks"


WRITES = """task: writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
unsafe_code: true
output_type: generate_until
doc_to_text: "Question: {{{{thing}}}}?\\nAnswer:"
doc_to_target: colour
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: !function own.passes, aggregation: mean, higher_is_better: true}}]
filter_list: [{{name: programs, filter: [{{function: custom, filter_fn: !function own.programs}}]}}]
"""
OWN = """
import os

def programs(answers, docs):
    return [[f"said = {answer.strip()!r}" for answer in row] for row in answers]

def passes(references, predictions):
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    found = {}
    exec(predictions[0][0], found)
    return {"pass@1": float(found["said"] == references[0])}
"""


def test_a_task_that_runs_what_the_model_writes_needs_a_word(taught, tmp_path):
    """Written as humaneval is: a filter of its own, and a metric under another name than its
    function's."""
    rows = [{"thing": thing, "colour": colour} for thing, colour in PAIRS]
    data = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "writes.yaml").write_text(WRITES.format(data=data))
    (tmp_path / "own.py").write_text(OWN)
    asked = {"task": ["writes"], "tasks_folder": str(tmp_path), "removed": REMOVED}
    with pytest.raises(InputError, match="--run-code"):
        run_tasks(taught, **asked)
    (result,) = run_tasks(taught, **asked, run_code=True)
    assert (result.dense.value, result.items) == (1, len(PAIRS))
    assert 0 <= result.pruned.value < 1
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


FOLLOWS = """
task: follows
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: 0
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
process_results: !function own.process_results
metric_list:
  - {{metric: prompt_level_strict_acc, aggregation: mean, higher_is_better: true}}
  - {{metric: inst_level_strict_acc, aggregation: !function own.of_all, higher_is_better: true}}
  - {{metric: prompt_level_loose_acc, aggregation: mean, higher_is_better: true}}
  - {{metric: inst_level_loose_acc, aggregation: !function own.of_all, higher_is_better: true}}
"""
CHECKS = """
from lm_eval.tasks.ifeval.utils import agg_inst_level_acc as of_all
from lm_eval.tasks.ifeval.utils import process_results
"""


def test_instructions_are_checked_by_the_harness_of_ifeval(taught, tmp_path):
    """Its packages are in the extra; items are judged by several metrics, of which one is a mean
    over items."""
    rows = [
        {
            "key": i,
            "prompt": f"Question: {thing}?\nAnswer:",
            "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": [colour if i else "nothing of the kind"]}],
        }
        for i, (thing, colour) in enumerate(PAIRS)
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "follows.yaml").write_text(FOLLOWS.format(data=data))
    (tmp_path / "own.py").write_text(CHECKS)
    (result,) = run_tasks(taught, task=["follows"], tasks_folder=str(tmp_path), removed=REMOVED)
    assert result.metric == "prompt_level_strict_acc"
    assert result.dense.value == pytest.approx(1 - 1 / len(PAIRS))


def test_a_local_task_scores_as_the_harness_itself_does(taught, folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (result,) = run_tasks(taught, task=["colours"], tasks_folder=str(folder), removed=REMOVED)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def itself() -> float:
        lm = HFLM(pretrained=taught.model, tokenizer=taught.tokenizer, batch_size=3)
        found = simple_evaluate(
            model=lm, tasks=["colours"], task_manager=manager, bootstrap_iters=0
        )
        return found["results"]["colours"]["acc,none"]

    assert result.metric == "acc"
    assert result.dense.value == itself()
    with sleb.bypassed(taught, REMOVED):
        assert result.pruned.value == itself()
    assert result.flips.difference.value == pytest.approx(result.pruned.value - result.dense.value)


def test_the_recipes_for_local_files_work(taught, tmp_path, monkeypatch):
    recipes = Path(__file__).parents[1] / "examples" / "tasks"
    (tmp_path / "data").mkdir()
    rows = [
        {
            "query": f"Question: {r['question']}\nAnswer:",
            "choices": r["choices"],
            "gold": r["answer"],
        }
        for r in chosen(6)
    ]
    for name in ("arc_easy", "piqa", "hellaswag"):
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    twice = [
        {"contexts": ["Question: sky?\nAnswer:", "sky? what"], "continuation": "blue", "gold": 0},
        {"contexts": ["what then", "Question: sun?\nAnswer:"], "continuation": "gold", "gold": 1},
    ]
    write(tmp_path / "data" / "winogrande.jsonl", twice)
    monkeypatch.chdir(tmp_path)
    names = sorted(path.stem for path in recipes.glob("*.yaml"))
    assert len(names) == 4
    found = {r.name: r for r in run_tasks(taught, task=names, tasks_folder=str(recipes))}
    (own,) = run_tasks(taught, task=[write(tmp_path / "own.jsonl", chosen(6))])
    for name in ("arc_easy_local", "piqa_local", "hellaswag_local"):
        assert (found[name].dense, found[name].metric) == (own.dense, "acc_norm")
    assert found["winogrande_local"].dense.value == 1.0
    assert found["winogrande_local"].chance == 0.5


def test_the_documentations_example_works(taught, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    jsonl = [body for language, body in blocks if language == "json"]
    (yaml,) = [body for language, body in blocks if language == "yaml"]
    for i, body in enumerate(jsonl):
        Path(f"rows{i}.jsonl").write_text(body, encoding="utf-8")
        if i < len(jsonl) - 1:  # the last one is the data of the task
            assert run_tasks(taught, task=[f"rows{i}.jsonl"])[0].items == len(body.splitlines())
    Path("tasks").mkdir()
    Path("tasks/tickets.yaml").write_text(yaml, encoding="utf-8")
    shutil.move(f"rows{len(jsonl) - 1}.jsonl", "tickets.jsonl")
    (result,) = run_tasks(taught, task=["tickets"], tasks_folder="tasks")
    assert (result.name, result.metric) == ("tickets", "acc_norm")


def test_scores_that_are_not_just_right_or_wrong_have_no_flips(taught, folder):
    text = (folder / "colours.yaml").read_text()
    text = text.replace("task: colours", "task: half").replace("metric: acc", "metric: half")
    (folder / "half.yaml").write_text(text + "process_results: !function scores.half\n")
    (folder / "scores.py").write_text(
        "def half(doc, results):\n    return {'half': 0.25 if doc['answer'] else 0.5}\n"
    )
    (result,) = run_tasks(taught, task=["half"], tasks_folder=str(folder), removed=REMOVED)
    wanted = [0.25 if row["answer"] else 0.5 for row in chosen()]
    assert result.flips is None
    assert result.dense == result.pruned == sleb.core.statistics.interval(np.array(wanted))


def test_a_limit_draws_the_same_items_for_both_models(taught, folder):
    def items(limit, seed):
        (task,) = harness_of(taught).load([], ["colours"], folder, limit=limit, seed=seed)
        return task.picked

    assert items(10, 0) == items(10, 0) != items(10, 1)
    assert len(set(items(10, 0))) == 10
    assert items(10, 0) != tuple(range(10))
    assert items(40, 0) is items(99, 0) is None
    options = {"removed": [2], "limit": 10, "seed": 5}
    (result,) = run_tasks(taught, task=["colours"], tasks_folder=str(folder), **options)
    rows = list(chosen())
    alone = write(folder / "p.jsonl", [rows[i] for i in items(10, 5)])
    (again,) = run_tasks(taught, task=[alone], removed=[2])
    assert result.items == again.items == 10


class Watching:
    """Keeps each stage's title, total and ticks."""

    def __init__(self):
        self.stages = {}

    @contextmanager
    def stage(self, title, total):
        done = self.stages[title] = [total, 0]

        def tick(n=1, note=""):
            done[1] += n

        yield tick


def test_progress_counts_requests_and_nothing_else_is_said_or_changed(
    taught, folder, tmp_path, capfd
):
    before = {name: value.clone() for name, value in taught.model.state_dict().items()}
    pad, level = taught.tokenizer.pad_token, logging.getLogger("lm_eval").level
    taught.tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    watching, say = Watching(), write(tmp_path / "say.jsonl", written())
    options = {"removed": REMOVED, "limit": 5, "progress": watching}
    try:
        run_tasks(taught, task=["colours", say], tasks_folder=str(folder), **options)
        assert taught.tokenizer.pad_token is None
    finally:
        taught.tokenizer.pad_token = pad
    assert capfd.readouterr() == ("", "")
    assert watching.stages["colours, dense"] == watching.stages["colours, pruned"] == [15, 15]
    assert watching.stages["say, dense"] == watching.stages["say, pruned"] == [5, 5]
    assert all(torch.equal(value, before[n]) for n, value in taught.model.state_dict().items())
    assert logging.getLogger("lm_eval").level == level
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == states
    assert not any("forward" in vars(block) for block in taught.stack.blocks)
    assert "generate" not in vars(taught.model)


def test_a_group_gives_a_result_for_each_task(taught, folder, monkeypatch):
    text = (folder / "colours.yaml").read_text()
    (folder / "more.yaml").write_text(text.replace("task: colours", "task: more"))
    (folder / "group.yaml").write_text("group: all\ntask: [colours, more]\n")
    monkeypatch.setattr("sleb.evaluation.lm_eval.TaskManager", _without_the_harness_own)
    found = run_tasks(taught, task=["all"], tasks_folder=str(folder), limit=2)
    assert [r.name for r in found] == ["colours", "more"]
    with pytest.raises(InputError, match="leave one out"):
        run_tasks(taught, task=["all", "more"], tasks_folder=str(folder))


def _without_the_harness_own(include_path, include_defaults):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)
