"""Prompts, the dense model's answers to them, and what a cut keeps of these."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sleb
from sleb.calibration.answers import ANSWERS, AnswerSplit, answer_windows, prompts_of
from sleb.calibration.prompts import Prompt
from sleb.cli.main import main
from sleb.config import PromptOptions
from sleb.core.errors import InputError, VerificationFailed
from sleb.core.plan import Plan
from sleb.core.progress import silent
from sleb.evaluation import agreement, run_code
from sleb.evaluation.agreement import agreement_of, measure_answers
from sleb.evaluation.grading import Judged, are_right, gradable
from sleb.repairs import repair
from sleb.repairs.answering import answered, answers_to, prompt_ids, written
from sleb.repairs.regression import Regression
from sleb.selection.metrics import KL, NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.search import answers_first
from sleb.selection.sweep import Sweep
from sleb.views.locale import Locale
from sleb.views.model import Facts
from sleb.views.proof import provenance

CPU = {"device": "cpu", "dtype": "float32"}
EN = Locale("en")
NEW = 9
STARTS = [
    "the block",
    "and nothing",
    "for ever",
    "of a model passes",
    "its input",
    "a",
    "lost. the",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLEB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def loaded(learned):
    return sleb.load(learned / "model", **CPU)


@pytest.fixture(scope="module")
def prompts(learned):
    path = learned / "prompts.jsonl"
    rows = [{"prompt": f"{start} {i}"} for i in range(5) for start in STARTS]
    rows = [row | ({"regex": "block|nothing"} if i % 2 else {}) for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def split(loaded, prompts):
    return split_of(loaded, prompts)


def split_of(loaded, prompts):
    options = PromptOptions(new_tokens=NEW)
    return AnswerSplit.of(answers_to(loaded, [str(prompts)], options, progress=silent), seed=0)


def alone(model, ids, removed=()):
    """Greedy tokens behind a prompt, one at a time and without a cache."""
    ids, new = list(ids), []
    with model.stack.bypassed(removed), torch.inference_mode():
        while len(new) < NEW and (not new or new[-1] != 2):
            logits = model.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
    return new


def test_answers_written_together_are_those_written_alone(loaded, prompts):
    ids = prompt_ids(loaded, prompts_of([str(prompts)])[:8], NEW)
    assert answered(loaded, ids, NEW, silent) == [alone(loaded, row) for row in ids]


def test_answers_are_written_once(loaded, prompts, monkeypatch):
    ids = prompt_ids(loaded, prompts_of([str(prompts)])[8:12], NEW)
    first = written(loaded, ids, NEW, silent)
    monkeypatch.setattr("sleb.repairs.answering.answered", None)
    said = []
    told = SimpleNamespace(stage=silent.stage, tell=said.append)
    assert written(loaded, ids, NEW, told) == first
    assert said == ["answers to the prompts: known from before"]
    with pytest.raises(TypeError):
        written(loaded, ids, NEW + 1, silent)


def test_no_answer_has_two_roles(split, prompts):
    roles = [split.search, split.fit, split.validation, split.measured.windows]
    rows = [tuple(row.tolist()) for windows in roles for row in windows.ids]
    assert len(rows) == len(set(rows)) == len(prompts_of([str(prompts)]))
    assert len(split.measured.prompts) == len(split.measured.windows.ids)


def test_only_the_answer_is_scored(loaded, split):
    windows = split.measured.windows
    ids = prompt_ids(loaded, split.measured.prompts, NEW)
    for row, counts, prompt in zip(windows.ids, windows.scored, ids, strict=True):
        assert row[: len(prompt)].tolist() == prompt
        assert row[counts].tolist() == alone(loaded, prompt)


def test_the_worst_answers_are_the_cuts_own_and_of_the_prompts_that_keep_least(loaded, split):
    answers = split.measured
    kept = measure_answers(loaded, answers, [1, 3])
    shares = agreement_of(loaded, answers, [1, 3])[:, 1]
    by_id = {prompt.id: prompt for prompt in answers.prompts}
    share = dict(zip(by_id, shares, strict=True))
    lost = [one.judged is not None and one.judged.lost for one in kept.worst]
    assert lost == sorted(lost, reverse=True)
    assert sum(lost) == kept.right.lost
    assert len(kept.worst) == kept.right.judged - kept.right.won + 3, "and three that none judges"
    for one, before in zip(kept.worst[1:], kept.worst, strict=False):
        assert one.agreement >= before.agreement or before.judged.lost
    for one in kept.worst:
        prompt = by_id[one.id]
        assert one.agreement == share[one.id]
        assert (one.judged.expected if one.judged else {}) == prompt.expected
        (ids,) = prompt_ids(loaded, [prompt], NEW)
        said = [alone(loaded, ids, removed) for removed in ((), (1, 3))]
        decoded = loaded.tokenizer.batch_decode(said, skip_special_tokens=True)
        assert (one.turns, [one.dense, one.pruned]) == ((("", prompt.text),), decoded)


@pytest.mark.parametrize(
    ("dense", "cut", "first"),
    [(True, False, "judged"), (False, True, "least"), (False, False, "least")],
)
def test_the_worst_is_a_right_answer_that_was_lost_and_never_one_that_was_won(
    loaded, split, monkeypatch, dense, cut, first
):
    """The prompt that keeps most is judged: it is the worst if its right answer was lost, and not
    among them if the cut alone has it right."""
    answers, found = split.measured, agreement_of(loaded, split.measured, [1, 3])[:, 1]
    most, least = (answers.prompts[int(i)].id for i in (found.argmax(), found.argmin()))
    asked = [replace(p, expected={"answer": "x"} if p.id == most else {}) for p in answers.prompts]
    both = ("x" if dense else "y", "x" if cut else "y")
    said = dict.fromkeys(range(len(asked)), both)
    monkeypatch.setattr("sleb.evaluation.agreement._said", lambda *_: said)
    kept = measure_answers(loaded, replace(answers, prompts=tuple(asked)), [1, 3])
    assert kept.worst[0].id == {"judged": most, "least": least}[first]
    assert all(one.judged is None or not one.judged.won for one in kept.worst)


@pytest.mark.parametrize("metric", [NLL, KL])
def test_scores_of_padded_windows_are_those_of_each_alone(loaded, split, metric):
    windows, sets = split.fit, [DENSE, BlockSet({1, 3})]
    found = Sweep(loaded.stack, windows.ids, metric, batch=4, scored=windows.scored)
    together = found.values(sets, 0, len(windows.ids))
    for i, (ids, counts) in enumerate(zip(windows.ids, windows.scored, strict=True)):
        end, start = int(counts.nonzero().max()) + 1, int(counts.nonzero().min())
        with torch.inference_mode():
            dense = loaded.model(input_ids=ids[None, :end]).logits[0, start - 1 : end - 1]
            with loaded.stack.bypassed({1, 3}):
                cut = loaded.model(input_ids=ids[None, :end]).logits[0, start - 1 : end - 1]
        for row, logits in zip(together[:, i], (dense, cut), strict=True):
            want = metric.tokens(logits, ids[start:end], dense).mean().item()
            assert row == pytest.approx(want, abs=1e-5)


def test_padding_is_not_fitted_on(loaded, split):
    def fitted(windows):
        fitter = Regression(loaded.stack, {2}, windows.ids, 3, scored=windows.scored)
        try:
            gap = sleb.repairs.gaps({2}, len(loaded.stack))[0]
            fitter.fit(gap, (0.1,))
            return {key: value.clone() for key, value in fitter.changes.values.items()}
        finally:
            fitter.restore()

    other = replace(split.fit, ids=split.fit.ids.clone())
    behind = ~sleb.calibration.windows.unpadded(split.fit.scored)
    assert behind.any()
    other.ids[behind] = 77
    for key, value in fitted(split.fit).items():
        assert torch.equal(value, fitted(other)[key])


def test_agreement_tells_what_the_cut_would_write(loaded, split):
    removed = (2, 3)
    found = agreement_of(loaded, split.measured, removed)
    ids = prompt_ids(loaded, split.measured.prompts, NEW)
    for row, prompt in zip(found, ids, strict=True):
        dense, cut = alone(loaded, prompt), alone(loaded, prompt, removed)
        same = next((i for i, (a, b) in enumerate(zip(dense, cut, strict=False)) if a != b), None)
        assert row[2] == (len(dense) if same is None else same)
        assert row[3] == (same is None)
    assert agreement_of(loaded, split.measured, ())[:, 1] == pytest.approx(1)


def test_a_repair_on_answers_keeps_more_of_them(learned, loaded, split):
    text = [str(learned / "text.txt")]
    given, rest = sleb.load_windows(
        loaded.tokenizer, text, windows=16, length=32, seed=0, heldout=6
    )
    fit = given.beside(split.search + split.fit)
    validation = rest.beside(split.validation)
    fixed = repair(loaded, {2, 3}, fit, validation, self_generated=False)
    assert set(fixed.record.gaps[0].before) == {*rest.names, ANSWERS}
    before = agreement_of(loaded, split.measured, {2, 3})
    after = agreement_of(loaded, split.measured, {2, 3}, lambda: fixed.patch(loaded.stack))
    assert after[:, 0].mean() < before[:, 0].mean()
    assert after[:, 1].mean() > before[:, 1].mean()


def test_prune_measures_answers(learned, prompts, split, tmp_path):
    done = sleb.prune(
        learned / "model",
        tmp_path / "out",
        remove=2,
        text=[str(learned / "text.txt")],
        prompts=[str(prompts)],
        new_tokens=NEW,
        windows=8,
        heldout=4,
        length=32,
        repair_tokens=2000,
        **CPU,
    )
    kept = sleb.RunRecord.load(tmp_path / "out").prompts
    assert kept == done.record.prompts
    assert done.record.evaluation_text.shared == 4  # as its text says the same again and again
    assert kept.prompts == len(STARTS) * 5 // 3
    assert kept.source == str(prompts)
    assert 0 <= kept.agreement.value <= 1
    assert kept.right.judged >= kept.right.dense >= kept.right.lost
    assert kept.right.pruned == kept.right.dense - kept.right.lost + kept.right.won
    assert done.plan.final_comparison is None or done.plan.final_comparison.answers == 5
    assert {"answers", "answers_search"} <= done.plan.split.keys()
    assert done.record.repair.status == "repaired"
    by_answers = {"calibration": split.search.record, "final_comparison": None}
    for plan in (done.plan, done.plan.model_copy(update=by_answers)):
        shown = provenance(EN, done.record, plan, {})
        rows = [row for item in shown if isinstance(item, Facts) for row in item.rows]
        (roles,) = (said for name, said in rows if name == EN("provenance.asked"))
        assert sum(map(int, re.findall(r": (\d+)", roles))) == len(STARTS) * 5, "each has one role"
    assert roles.split(";")[0].endswith(f": {len(split.search.ids)}")
    # eval leaves out the prompts that the cut was made by: the same figure, on the same prompts
    plan = tmp_path / "out" / "plan.json"
    again = sleb.evaluate(learned / "model", plan=plan, prompts=[prompts], new_tokens=NEW, **CPU)
    assert (again.agreement, again.left_out) == (kept.agreement, len(STARTS) * 5 - kept.prompts)


def test_no_prompts_that_a_cut_was_made_by_take_the_place_of_others(
    learned, loaded, prompts, tmp_path, monkeypatch, capsys
):
    plan, fewer = tmp_path / "plan.json", tmp_path / "fewer.jsonl"
    text = {"text": [str(learned / "text.txt")], "windows": 4, "length": 32, "remove": 2}
    search = {**text, "metric": "answers", "new_tokens": NEW, "exact": True}
    found = sleb.search(loaded, prompts=[str(prompts)], **search)
    found.save(plan)
    assert Plan.load(plan) == found
    rows = prompts.read_text().splitlines()
    split = split_of(loaded, prompts)
    measured = {prompt.id for prompt in split.measured.prompts}
    seen = [row for n, row in enumerate(rows, 1) if f"line {n}" not in measured]
    fewer.write_text("\n".join(seen))
    with pytest.raises(InputError, match="had no part in it"):
        sleb.evaluate(loaded, plan=plan, prompts=[str(fewer)], new_tokens=NEW)
    # a plan that does not say which they were
    found.model_copy(update={"prompts_seen": ""}).save(plan)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").touch()
    monkeypatch.setattr("sleb.record.RunRecord.load", lambda _: None)
    asked = ["--plan", str(plan), "--prompts", str(prompts), "--record", str(tmp_path / "out")]
    assert main(["eval", str(learned / "model"), *asked]) == 2
    assert "prune again" in capsys.readouterr().err


def test_the_metric_of_answers_is_their_divergence(learned, loaded, prompts):
    options = {"remove": 1, "text": [str(learned / "text.txt")], "windows": 4, "length": 32}
    found = sleb.search(
        loaded, metric="answers", prompts=[str(prompts)], new_tokens=NEW, exact=True, **options
    )
    split = split_of(loaded, prompts)
    means = {
        b: agreement_of(loaded, replace(split.measured, windows=split.search), [b])[:, 0].mean()
        for b in range(1, len(loaded.stack) - 1)
    }
    assert found.order[0] == min(means, key=means.get)
    assert found.rounds[0].scores[0].mean == pytest.approx(min(means.values()), abs=1e-4)
    with pytest.raises(InputError, match="--prompts"):
        sleb.search(loaded, metric="answers", **options)


def test_as_many_blocks_go_as_keep_the_answers(learned, prompts, tmp_path):
    options = {"text": [str(learned / "text.txt")], "prompts": [str(prompts)], "new_tokens": NEW}
    options |= {"windows": 8, "heldout": 4, "length": 32, "repair_tokens": 2000, **CPU}

    def pruned(share, **more):
        return sleb.prune(
            learned / "model", tmp_path / f"{share}", keep_answers=share, **options, **more
        )

    done = [pruned(share) for share in (0.3, 0.9)]
    for share, one in zip((0.3, 0.9), done, strict=True):
        target = one.plan.target
        assert (target.kind, target.limit) == ("keep-answers", share)
        assert share <= target.reached <= one.record.prompts.agreement.value
    assert len(done[0].plan.removed) > len(done[1].plan.removed)
    with pytest.raises(VerificationFailed, match="keep-answers"):
        pruned(0.9999, protect="0-3,-1", repair=False)
    with pytest.raises(InputError, match="prompts"):
        sleb.search(learned / "model", keep_answers=0.5, text=options["text"], **CPU)


def test_none_switches_prompts_off(learned, loaded, prompts, tmp_path):
    options = {"text": [str(learned / "text.txt")], "windows": 4, "length": 32, "remove": 2}
    options |= {"strategy": "greedy-or-window"}
    plain = sleb.search(loaded, **options)
    assert sleb.search(loaded, prompts=["none"], **options) == plain
    other = sleb.search(loaded, prompts=[str(prompts)], new_tokens=NEW, **options)
    assert other.split.keys() - plain.split.keys() == {"answers", "answers_search"}


def test_the_choice_goes_by_answers_within_a_limit_on_texts(split):
    windows = split.search.beside(split.validation)
    n, last = len(split.search.ids), len(split.validation.ids)
    windows = replace(windows, names=("text", ANSWERS))

    def order(*sets):
        return answers_first(windows, np.array([[a] * n + [b] * last for a, b in sets]))

    assert order((1.0, 0.5), (1.04, 0.1)) == [1, 0]
    assert order((1.0, 0.5), (1.06, 0.1)) == [0, 1]
    assert order((1.5, 0.1), (1.4, 0.1), (1.0, 0.9)) == [2, 1, 0]


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ({"answer": 42}, "6 times 7 is 42.", True),
        ({"answer": 42}, "Answer: 42 apples of 50", True),
        ({"answer": 42}, "42 apples, or 43", False),
        ({"answer": 1234.5}, "It costs $1,234.50", True),
        ({"answer": "1,000"}, "all in all 1000", True),
        ({"answer": -3}, "the result: -3", True),
        ({"answer": 3}, "none", False),
        ({"answer": "New York"}, "It is new  york, I think", True),
        ({"answer": "art"}, "a party", False),
        ({"regex": r"^\d+$"}, "123", True),
        ({"regex": r"^\d+$"}, "a123", False),
        ({"answer": 3, "regex": "x"}, "3", False),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '```json\n{"a": 1}\n```', True),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', False),
        ({"json_schema": {"type": "object", "required": ["a"]}}, "no", False),
        ({"tests": "assert f() == 1"}, "so:\n```python\ndef f(): return 1\n```", True),
        ({"tests": "assert f() == 1"}, "def f(): return 1", True),
        ({"tests": "assert f() == 1", "regex": "g"}, "def f(): return 1", False),
        ({"tests": "assert f() == 1"}, "def f(): return 2", False),
        ({"tests": ""}, "while True: pass", False),
        ({"tests": ""}, "x = bytearray(4 << 30)", False),
        ({"tests": ""}, "open('a', 'wb').write(bytes(32 << 20))", False),
        ({"tests": ""}, "import socket; socket.create_connection(('127.0.0.1', PORT), 1)", False),
        (
            {"tests": ""},
            "import os; assert os.listdir() == [] and 'SECRET' not in os.environ",
            True,
        ),
    ],
)
def test_right_answers_are_told(expected, text, right, monkeypatch):
    monkeypatch.setattr(run_code, "SECONDS", 3)
    monkeypatch.setenv("SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = text.replace("PORT", str(server.getsockname()[1]))
        assert are_right([expected], [text], gradable(True)) == [right]


def test_code_runs_only_where_it_may(monkeypatch):
    assert gradable(True) - gradable(False) == {"tests"}
    monkeypatch.setattr(run_code, "pass_all", None)
    assert are_right([{"tests": "1 / 0"}], ["x"], gradable(False)) == [True]


def test_code_that_would_have_a_network_is_not_run(monkeypatch):
    monkeypatch.setattr(run_code, "NETWORK", 0)  # as if the child had said so
    with pytest.raises(InputError, match="--run-code"):
        run_code.passes("", "")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "regex": "("}] * 9,
        [{"prompt": "a", "answer": [1]}] * 9,
        [{"prompt": "a", "json_schema": "x"}] * 9,
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path, rows):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError):
        prompts_of([str(tmp_path / "p.jsonl")])


def test_too_few_prompts_are_refused(loaded, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match="3 prompts"):
        split_of(loaded, tmp_path / "p.txt")


def test_eval_measures_every_prompt(learned, loaded, prompts, tmp_path):
    options = {"text": [str(learned / "text.txt")], "windows": 4, "length": 32, "remove": 2}
    sleb.search(loaded, **options).save(tmp_path / "plan.json")
    found = sleb.evaluate(
        loaded, plan=str(tmp_path / "plan.json"), prompts=[str(prompts)], new_tokens=NEW
    )
    assert found.prompts == 5 * len(STARTS)
    with pytest.raises(InputError, match="plan"):
        sleb.evaluate(loaded, prompts=[str(prompts)])


def test_a_prompt_that_leaves_no_room_is_refused(loaded):
    long = Prompt(id="long", text="a" * 250, messages=None)
    with pytest.raises(InputError, match="long"):
        prompt_ids(loaded, [long], NEW)


def test_windows_of_several_lengths_stand_beside_each_other(split):
    ids = [[1, 2, 3], [4, 5]]
    short = answer_windows(ids, [[6], [7, 8]], specs=["x"], seed=0)
    both = split.fit.beside(short)
    n = len(split.fit.ids)
    assert both.take(range(n)).tokens == split.fit.tokens
    assert both.tokens == split.fit.tokens + short.tokens == split.fit.tokens + 8
    assert [row[row != 0].tolist() for row in both.ids[n:]] == [[1, 2, 3, 6], [4, 5, 7, 8]]
    assert isinstance(split, AnswerSplit)


def test_of_few_right_answers_no_share_is_told():
    def right(dense):
        one = Judged(expected={"answer": "1"}, dense=True, pruned=False)
        return agreement._right([one] * dense + [replace(one, dense=False)] * 9)

    assert right(agreement.FEW - 1).kept is None
    assert right(agreement.FEW).kept.value == 0
    assert (right(2).dense, right(2).lost, right(2).judged) == (2, 2, 11)
