"""A gate passes what keeps its limits, at the boundary and both ways, and what is missing fails."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from report_tools import put
from sleb.acceptance import LIMITS, Gate
from sleb.core.errors import InputError, VerificationFailed
from sleb.core.statistics import Flips, Interval, proportion
from sleb.core.toml import read_toml
from sleb.evaluation.agreement import AnswersKept, RightAnswers
from sleb.evaluation.answers import Answers, Comparison
from sleb.evaluation.perplexity import Evaluation, Quality
from sleb.evaluation.tasks import TaskResult
from sleb.record import COMMANDS, GateResult, RunRecord
from sleb.runtimes.bench import Measured, Ratio, Speed
from sleb.runtimes.compatibility import RuntimeReport, Verdict
from sleb.runtimes.speculative import Draft, Drafting
from sleb.views.results import items

EXAMPLE = Path(__file__).parents[1] / "examples" / "gate.toml"


def span(value, low, high):
    return Interval(value=value, low=low, high=high)


def made(kind, **given):
    """A ``kind`` of which only ``given`` matters here."""
    needed = [f.name for f in fields(kind) if f.default is f.default_factory]  # both are missing
    return kind(**{**dict.fromkeys(needed), **given})


ALONE = span(1.0, None, None)


def quality(high, kind=Quality, **more):
    """Quality with this upper bound of the ratio of perplexities."""
    return made(
        kind,
        perplexity_ratio=span(1.0, 0.5, high),
        divergence=span(0.1, 0.0, 0.25),
        agreement=span(0.9, 0.75, 1.0),
        **more,
    )


def task(name, low, dense=0.5):
    """A task with this lower bound of the paired difference."""
    found = made(Flips, difference=span(0.0, low, 0.3))
    return made(TaskResult, name=name, dense=span(dense, 0.0, 1.0), flips=found)


def answers(**shares):
    found = {name: share and span(share, share, share) for name, share in shares.items()}
    return made(Answers, **found)


def model(path, blocks, peak):
    same = {"path": path, "runtime": "transformers", "runs": ()}
    return made(Measured, **same, blocks=blocks, peak_bytes=peak)


def ratio(case, low, path="smaller"):
    return made(Ratio, path=path, runtime="transformers", case=case, ratio=span(9.0, low, 10.0))


DRAFT = made(Draft, path="smaller", ratio=span(2.0, 1.5, 3.0), acceptance=span(0.7, 0.6, 0.8))
FULL = made(
    RunRecord,
    nbytes=(900_000_000, 250_000_000),
    evaluation=quality(1.5, Evaluation, domains={"mail": quality(1.25), "code": quality(1.75)}),
    tasks=(task("sums", -0.125), task("facts", -0.25)),
    answers=made(
        Comparison,
        dense=answers(ended=0.1, empty=0.9, repetitive=0.9, json_valid=0.1),
        pruned=answers(ended=0.7, empty=0.1, repetitive=0.2, json_valid=0.8),
        switched=span(0.4, 0.4, 0.4),
    ),
    speed=made(
        Speed,
        models=(model("big", 6, 800_000_000), model("smaller", 5, 500_000_000)),
        ratios=(ratio("prefill", 1.5), ratio("decode", 1.25)),
    ),
    draft=made(Drafting, drafts=(DRAFT,)),
    runtimes=made(RuntimeReport, verdicts=(made(Verdict, runtime="vllm", pruned=0.01),)),
)
SECTIONS = ("evaluation", "tasks", "answers", "speed", "draft", "runtimes")
EMPTY = replace(FULL, **dict.fromkeys(SECTIONS))


def check(tables, record=FULL):
    return Gate.parse(tables, "gate.toml").check(record).rows


def nested(path, value):
    """``a.b.c`` as tables."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# Where the record stands.
STANDS = {
    "perplexity.domains.mail": 1.25,
    "divergence.max": 0.25,
    "agreement.min": 0.75,
    "tasks.each.sums": 0.75,
    "answers.max_repetitive": 0.2,
    "answers.max_empty": 0.1,
    "answers.max_unfinished": 0.3,
    "answers.max_switched": 0.4,
    "answers.min_json_valid": 0.8,
    "speed.cases.decode": 1.25,
    "draft.min_speedup": 1.5,
    "draft.min_acceptance": 0.6,
    "runtimes.max_deviation": 0.01,
    "memory.max_mb": 500,
    "size.max_mb": 250,
}


@pytest.mark.parametrize(("path", "stands"), STANDS.items())
def test_a_limit_holds_at_the_boundary_and_not_beyond(path, stands):
    table = path.partition(".")[0]
    key = next(x.key for x in LIMITS if x.key == path or path.startswith(f"{table}.{x.by_name}."))
    at_most = ".max" in key
    for factor in (0.999, 1, 1.001):
        (row,) = check(nested(path, stands * factor))
        assert (row.verdict == "kept") == (factor == 1 or at_most == (factor > 1))
        assert (row.name, row.at_most, row.limit) == (key, at_most, stands * factor)
        assert row.worst == pytest.approx(stands)
        assert not row.missing


@pytest.mark.parametrize(
    ("path", "stands"),
    [
        ("perplexity.max_ratio", {"": 1.5, "mail": 1.25, "code": 1.75}),
        ("tasks.min_retention", {"sums": 0.75, "facts": 0.5}),
        ("speed.min_speedup", {"prefill": 1.5, "decode": 1.25}),
    ],
)
def test_a_limit_for_all_is_held_against_each(path, stands):
    for limit in stands.values():
        rows = {row.of: row for row in check(nested(path, limit))}
        assert {name: row.worst for name, row in rows.items()} == stands
        for name, row in rows.items():
            worse = stands[name] > limit if row.at_most else stands[name] < limit
            assert (row.verdict == "kept") != worse


def test_a_limit_by_name_goes_before_the_one_for_all():
    rows = check(
        {
            "perplexity": {"max_ratio": 1.5, "domains": {"code": 1.75}},
            "tasks": {"min_retention": 0.75, "each": {"facts": 0.5}},
            "speed": {"min_speedup": 1.5, "cases": {"decode": 1.25}},
        }
    )
    assert [row.limit for row in rows] == [0.75, 0.5, 1.5, 1.5, 1.75, 1.5, 1.25]
    assert all(row.verdict == "kept" for row in rows)


def test_one_text_alone_is_all_texts():
    alone = put(FULL, "evaluation.domains", {"mail": quality(1.5)})
    (row,) = check(nested("perplexity.max_ratio", 1.5), alone)
    assert row.of == ""
    assert len(check({"perplexity": {"max_ratio": 2, "domains": {"mail": 1.5}}}, alone)) == 2


@pytest.mark.parametrize("path", [*STANDS, "perplexity.max_ratio", "tasks.min_retention"])
def test_what_was_not_measured_fails_and_says_what_measures_it(path):
    if path == "size.max_mb":  # is always known
        return
    (row,) = check(nested(path, 1), EMPTY)
    assert (row.verdict, row.measured, row.missing) == ("unclear", None, "not-measured")
    table = row.name.partition(".")[0]
    with pytest.raises(VerificationFailed, match=re.escape(COMMANDS[table])):
        GateResult(rows=(row,)).require()


def test_what_a_failed_limit_says_is_what_the_table_says():
    """Not kept or not to be told, with the figures and the next step of its row."""

    def said(low, high):
        flips = made(Flips, difference=span(0.0, low, high))
        facts = made(TaskResult, name="facts", dense=span(0.5, 0, 1), flips=flips, items=10)
        result = Gate.parse({"tasks": {"min_retention": 0.85}}, "").check(
            replace(FULL, tasks=(facts,))
        )
        with pytest.raises(VerificationFailed) as error:
            result.require()
        (table, *told) = items(result)
        (row,) = table.rows
        assert all(cell.replace("\u00a0", " ") in str(error.value) for cell in row[1:4])
        return str(error.value), told[0].text.partition(": ")[2]

    message, would = said(-0.45, 0.3)
    name = "tasks.min_retention, facts"
    figures = "measured 100.0 %, at worst 10.0 %, allowed at least 85.0 %"
    of = "(of 1 limits 0 not kept, 1 cannot be told yet)"
    assert re.fullmatch("about [0-9,]+ questions would tell", would)
    assert message == f"it cannot be told yet whether {name} is kept: {figures}; {would} {of}"
    assert said(-0.45, -0.4)[0].startswith(f"a limit is not kept: {name}: {figures} (of 1 ")


def test_a_dense_evaluation_is_no_measure_of_the_pruned_model():
    dense = made(Evaluation)
    gate = {"perplexity": {"max_ratio": 9}, "divergence": {"max": 9}, "agreement": {"min": 0}}
    rows = check(gate, replace(FULL, evaluation=dense))
    assert [row.verdict for row in rows] == ["unclear"] * 3
    only = replace(FULL.speed, models=FULL.speed.models[:1], ratios=())
    gate = {"memory": {"max_mb": 10_000}, "speed": {"min_speedup": 0.1}}
    rows = check(gate, replace(FULL, speed=only))
    assert [row.verdict for row in rows] == ["unclear"] * 2


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("perplexity.domains.mial", "mail"),
        ("tasks.each.sum", "sums"),
        ("speed.cases.code", "decode"),
    ],
)
def test_a_name_that_the_record_lacks_fails(path, near):
    (row,) = check(nested(path, 0.1))
    assert (row.verdict, row.missing, row.near) == ("unclear", "unknown-name", near)
    assert row.of == path.rpartition(".")[2]


def test_without_an_interval_there_is_nothing_to_judge_by():
    whole = replace(FULL.evaluation, perplexity_ratio=ALONE, divergence=ALONE, agreement=ALONE)
    slow = replace(FULL.speed, ratios=(replace(ratio("decode", 2.0), ratio=ALONE),))
    record = replace(FULL, evaluation=replace(whole, domains={}), speed=slow)
    gate = {"perplexity": {"max_ratio": 9}, "divergence": {"max": 9}, "agreement": {"min": 0}}
    for row in check({**gate, "speed": {"min_speedup": 0.1}}, record):
        assert (row.verdict, row.worst, row.missing) == ("unclear", None, "no-interval")
        assert row.measured is not None


def test_tasks_and_answers_that_give_no_figure_say_why():
    def kept(task):
        return check(nested("tasks.min_retention", 0.1), replace(FULL, tasks=(task,)))[0]

    assert kept(replace(task("sums", -0.1), flips=None)).missing == "not-paired"
    assert kept(task("sums", 0.0, dense=0.0)).missing == "dense-zero"
    guessed = replace(task("sums", -0.1), chance=0.99)
    assert (kept(guessed).missing, kept(guessed).needed) == ("at-chance", None)
    assert kept(task("sums", -0.9)).worst == 0  # no less than nothing is kept
    none = RightAnswers(judged=40, dense=0, pruned=1, lost=0, won=1, kept=None)
    prompts = made(AnswersKept, right=none)
    (row,) = check(nested("answers.min_right", 0.9), replace(FULL, prompts=prompts))
    assert (row.verdict, row.missing, row.judged) == ("unclear", "none-right", 40)
    with pytest.raises(VerificationFailed, match=r"the original had too few right of 40 \(of"):
        GateResult(rows=(row,)).require()
    told = " ".join(item.text for item in items(GateResult(rows=(row,)))[1:])
    assert "the original had too few right of 40" in told
    assert "sleb eval" not in told
    silent = replace(FULL.answers, pruned=answers(ended=1.0, empty=0.1, repetitive=0.1))
    (row,) = check(nested("answers.min_json_valid", 0), replace(FULL, answers=silent))
    assert (row.verdict, row.missing) == ("unclear", "no-json-prompt")


def test_nan_keeps_no_limit():
    sick = replace(FULL.evaluation, divergence=span(math.nan, math.nan, math.nan))
    (row,) = check(nested("divergence.max", 1e9), replace(FULL, evaluation=sick))
    assert row.verdict == "unclear"


@pytest.mark.parametrize("limit", [0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9])
@pytest.mark.parametrize("key", ["divergence.max", "agreement.min"])
def test_there_are_three_verdicts_and_the_interval_alone_decides(key, limit):
    """Kept by the worst case, not kept by the best, else unclear; wherever the value lies."""
    table, name = key.split(".")
    for value in (0.25, 0.5, 0.75):
        whole = replace(FULL.evaluation, windows=20, **{table: span(value, 0.25, 0.75)})
        (row,) = check({table: {name: limit}}, replace(FULL, evaluation=whole))
        kept = limit >= 0.75 if name == "max" else limit <= 0.25
        lost = limit < 0.25 if name == "max" else limit > 0.75
        assert row.verdict == ("kept" if kept else "not-kept" if lost else "unclear")
        assert (row.measured, row.worst) == (value, 0.75 if name == "max" else 0.25)
        assert (row.needed is not None) <= (row.verdict == "unclear")
        assert row.needed is None or row.needed >= 20


def test_so_many_prompts_as_are_named_would_tell():
    """None of 20 answers is empty: that 5 % are cannot be excluded yet, but with more of them."""

    def of(prompts):
        empty = replace(FULL.answers.pruned, empty=proportion(0, prompts))
        return replace(FULL, answers=replace(FULL.answers, prompts=prompts, pruned=empty))

    gate = {"answers": {"max_empty": 0.05}}
    (row,) = check(gate, of(20))
    assert (row.verdict, row.measured) == ("unclear", 0.0)
    assert check(gate, of(row.needed))[0].verdict == "kept"
    assert check(gate, of(row.needed - 1))[0].verdict == "unclear"
    assert check({"answers": {"max_empty": 0}}, of(20))[0].needed is None  # nothing shows that


def test_several_pruned_models_are_held_to_the_limit_each():
    speed = replace(
        FULL.speed,
        models=(*FULL.speed.models, model("tiny", 4, 400_000_000)),
        ratios=(ratio("decode", 1.25), ratio("decode", 2.0, "tiny")),
    )
    rows = check(
        {"speed": {"min_speedup": 1.5}, "memory": {"max_mb": 450}}, replace(FULL, speed=speed)
    )
    assert [(row.of, row.path, row.verdict) for row in rows] == [
        ("decode", "smaller", "unclear"),
        ("decode", "tiny", "kept"),
        ("", "smaller", "not-kept"),
        ("", "tiny", "kept"),
    ]


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("", "sets no limit"),
        ("[perplexity]\n[speed.cases]\n", "sets no limit"),
        ("[preplexity]\n", "'preplexity'.*'perplexity'"),
        (f"{'x' * 5000} = 1", f"there is no table '{'x' * 60}'"),
        ("max_ratio = 1\n", "no table 'max_ratio'"),
        ("[answers]\nmax_repetative = 0.1", r"\[answers\].*'max_repetitive'"),
        ("[divergence]\nmin = 0.1", r"\[divergence\] has no limit 'min'"),
        ("perplexity = 1.2", r"write \[perplexity\]"),
        ("[speed]\ncases = 2", r"write \[speed.cases\]"),
        ("[perplexity]\nmax_ratio = '1.2'", r"\[perplexity\] max_ratio = '1.2'"),
        ("[perplexity]\nmax_ratio = 2024-01-01", r"max_ratio = datetime.date\("),
        ("[perplexity]\nmax_ratio = nan", "max_ratio = nan"),
        ("[perplexity]\nmax_ratio = 0", "max_ratio = 0.*greater"),
        ("[divergence]\nmax = -0.1", "max = -0.1"),
        ("[agreement]\nmin = 90", "min = 90.*less"),
        ("[tasks.each]\nsums = {a = 1}", r"sums = \{'a': 1\}"),
        (f"[size]\nmax_mb = {'9' * 400}", "max_mb = 999"),
        ("[size]\n\nmax_mb = = 2\n", "TOML.*line 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, monkeypatch, text, nouns):
    monkeypatch.chdir(tmp_path)
    Path("gate.toml").write_text(text)
    with pytest.raises(InputError, match=rf"^gate\.toml.*{nouns}") as caught:
        Gate.load("gate.toml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match="no file"):
        Gate.load("missing.toml")


def test_the_example_names_every_limit_and_is_right(tmp_path):
    """Also with the limits that are commented out."""
    text = EXAMPLE.read_text(encoding="utf-8")
    Gate.load(EXAMPLE)
    path = tmp_path / "gate.toml"
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    given = read_toml(path, "")
    assert Gate.load(path).tables == given
    named = {f"{x.key.partition('.')[0]}.{x.by_name}" for x in LIMITS if x.by_name}
    keys = {f"{table}.{key}" for table, keys in given.items() for key in keys}
    assert keys == {limit.key for limit in LIMITS} | named


def test_the_result_is_required():
    found = Gate.parse({"divergence": {"max": 0.2}, "agreement": {"min": 0.7}}, "g").check(FULL)
    said = (
        r"divergence.max is kept: .* 0.1 .* at worst 0.25 .* 0.2 .*of 2 limits 0 not .*, 1 cannot"
    )
    with pytest.raises(VerificationFailed, match=said):
        found.require()
    GateResult(rows=found.rows[1:]).require()
    assert items(found)[-1].text.startswith("Of 2 limits: ")
    assert items(GateResult(rows=found.rows[1:]))[-1].text == "Limits kept: 1 of 1."


@pytest.mark.parametrize("verdict", ["not-kept", "unclear"])
def test_of_several_limits_that_fail_the_first_is_named_and_the_others_counted(verdict):
    rows = tuple(replace(row, verdict=verdict) for row in check({"divergence": {"max": 9}}))
    for count, said in ((1, r"[a-z] \(of 1 "), (3, r"; and 2 more \(of 3 ")):
        with pytest.raises(VerificationFailed, match=said):
            GateResult(rows=rows * count).require()
