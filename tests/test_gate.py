"""A gate passes what keeps its limits, at the boundary and both ways, and what is missing fails."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import rich.console
from pydantic import TypeAdapter
from sleb.cli.render_transfer import gate as draw
from sleb.evaluation.gate import Gate, GateResult

from sleb.core.errors import InputError, VerificationFailed
from sleb.core.statistics import Flips, Interval
from sleb.core.toml import read_toml
from sleb.evaluation.answers import Answers, Comparison
from sleb.evaluation.perplexity import Evaluation, Quality
from sleb.evaluation.tasks import TaskResult
from sleb.record import RunRecord
from sleb.runtimes.bench import Measured, Ratio, Speed

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
    found = {name: share and span(share, 0.0, 1.0) for name, share in shares.items()}
    return made(Answers, **found)


def model(path, blocks, peak):
    return made(Measured, path=path, runtime="transformers", blocks=blocks, peak_bytes=peak)


def ratio(case, low, path="smaller"):
    return made(Ratio, path=path, runtime="transformers", case=case, ratio=span(9.0, low, 10.0))


FULL = made(
    RunRecord,
    nbytes=(900_000_000, 250_000_000),
    evaluation=quality(1.5, Evaluation, domains={"mail": quality(1.25), "code": quality(1.75)}),
    tasks=(task("sums", -0.125), task("facts", -0.25)),
    answers=made(
        Comparison,
        dense=answers(ended=0.1, empty=0.9, repetitive=0.9, json_valid=0.1),
        pruned=answers(ended=0.7, empty=0.1, repetitive=0.2, json_valid=0.8),
        switched=span(0.4, 0.0, 1.0),
    ),
    speed=made(
        Speed,
        models=(model("big", 6, 800_000_000), model("smaller", 5, 500_000_000)),
        ratios=(ratio("prefill", 1.5), ratio("decode", 1.25)),
    ),
)
EMPTY = replace(FULL, evaluation=None, tasks=None, answers=None, speed=None)


def check(tables, record=FULL):
    return Gate.parse(tables, "gate.toml").check(record).rows


def nested(path, value):
    """``a.b.c`` as tables."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# Limit, where the record stands, whether it is a maximum, and the row's name.
LIMITS = [
    ("perplexity.domains.mail", 1.25, True, "perplexity ratio, mail"),
    ("divergence.max", 0.25, True, "divergence"),
    ("agreement.min", 0.75, False, "agreement"),
    ("tasks.each.sums", 0.75, False, "score kept, sums"),
    ("answers.max_repetitive", 0.2, True, "answers, repetitive"),
    ("answers.max_empty", 0.1, True, "answers, empty"),
    ("answers.max_unfinished", 0.3, True, "answers, unfinished"),
    ("answers.max_switched", 0.4, True, "answers, switched"),
    ("answers.min_json_valid", 0.8, False, "answers, json valid"),
    ("speed.cases.decode", 1.25, False, "speed-up, decode"),
    ("memory.max_mb", 500, True, "memory"),
    ("size.max_mb", 250, True, "size of the weights"),
]


@pytest.mark.parametrize(("path", "stands", "at_most", "name"), LIMITS)
def test_a_limit_holds_at_the_boundary_and_not_beyond(path, stands, at_most, name):
    for factor in (0.999, 1, 1.001):
        (row,) = check(nested(path, stands * factor))
        assert row.passed == (factor == 1 or at_most == (factor > 1))
        assert (row.name, row.at_most, row.limit) == (name, at_most, stands * factor)
        assert row.measured == pytest.approx(stands)
        assert not row.missing


@pytest.mark.parametrize(
    ("path", "stands"),
    [
        ("perplexity.max_ratio", {"all texts": 1.5, "mail": 1.25, "code": 1.75}),
        ("tasks.min_retention", {"sums": 0.75, "facts": 0.5}),
        ("speed.min_speedup", {"prefill": 1.5, "decode": 1.25}),
    ],
)
def test_a_limit_for_all_is_held_against_each(path, stands):
    for limit in stands.values():
        rows = {row.name.split(", ")[1]: row for row in check(nested(path, limit))}
        assert {name: row.measured for name, row in rows.items()} == stands
        for name, row in rows.items():
            worse = stands[name] > limit if row.at_most else stands[name] < limit
            assert row.passed != worse


def test_a_limit_by_name_goes_before_the_one_for_all():
    rows = check(
        {
            "perplexity": {"max_ratio": 1.5, "domains": {"code": 1.75}},
            "tasks": {"min_retention": 0.75, "each": {"facts": 0.5}},
            "speed": {"min_speedup": 1.5, "cases": {"decode": 1.25}},
        }
    )
    assert [row.limit for row in rows] == [1.5, 1.5, 1.75, 0.75, 0.5, 1.5, 1.25]
    assert all(row.passed for row in rows)


def test_one_text_alone_is_all_texts():
    alone = replace(FULL, evaluation=replace(FULL.evaluation, domains={"mail": quality(1.5)}))
    (row,) = check(nested("perplexity.max_ratio", 1.5), alone)
    assert row.name == "perplexity ratio, all texts"


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("perplexity.max_ratio", "sleb eval .* --text"),
        ("perplexity.domains.mail", "sleb eval .* --text"),
        ("divergence.max", "sleb eval .* --text"),
        ("agreement.min", "sleb eval .* --text"),
        ("tasks.min_retention", "sleb eval .* --task"),
        ("tasks.each.sums", "sleb eval .* --task"),
        ("answers.max_repetitive", "sleb compare"),
        ("answers.min_json_valid", "sleb compare"),
        ("speed.min_speedup", "sleb bench"),
        ("speed.cases.decode", "sleb bench"),
        ("memory.max_mb", "sleb bench"),
    ],
)
def test_what_was_not_measured_fails_and_says_what_measures_it(path, command):
    (row,) = check(nested(path, 1), EMPTY)
    assert (row.passed, row.measured) == (False, None)
    assert re.search(f"run: {command}.* --record OUT$", row.missing)


def test_a_dense_evaluation_is_no_measure_of_the_pruned_model():
    dense = made(Evaluation)
    gate = {"perplexity": {"max_ratio": 9}, "divergence": {"max": 9}, "agreement": {"min": 0}}
    assert [row.passed for row in check(gate, replace(FULL, evaluation=dense))] == [False] * 3
    only = replace(FULL.speed, models=FULL.speed.models[:1], ratios=())
    gate = {"memory": {"max_mb": 10_000}, "speed": {"min_speedup": 0.1}}
    assert [row.passed for row in check(gate, replace(FULL, speed=only))] == [False] * 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("perplexity.domains.mial", "the record has no 'mial' \\(did you mean 'mail'"),
        ("tasks.each.sum", "the record has no 'sum' \\(did you mean 'sums'"),
        ("speed.cases.code", "the record has no 'code' \\(did you mean 'decode'"),
    ],
)
def test_a_name_that_the_record_lacks_fails(path, message):
    (row,) = check(nested(path, 0.1))
    assert not row.passed
    assert re.search(message, row.missing)


def test_without_an_interval_there_is_nothing_to_judge_by():
    whole = replace(FULL.evaluation, perplexity_ratio=ALONE, divergence=ALONE, agreement=ALONE)
    slow = replace(FULL.speed, ratios=(replace(ratio("decode", 2.0), ratio=ALONE),))
    record = replace(FULL, evaluation=replace(whole, domains={}), speed=slow)
    gate = {"perplexity": {"max_ratio": 9}, "divergence": {"max": 9}, "agreement": {"min": 0}}
    for row in check({**gate, "speed": {"min_speedup": 0.1}}, record):
        assert (row.passed, row.measured) == (False, None)
        assert "without an interval" in row.missing


def test_tasks_and_answers_that_give_no_figure_say_why():
    def kept(task):
        return check(nested("tasks.min_retention", 0.1), replace(FULL, tasks=(task,)))[0]

    assert "item by item" in kept(replace(task("sums", -0.1), flips=None)).missing
    assert "the dense model scores 0" in kept(task("sums", 0.0, dense=0.0)).missing
    assert kept(task("sums", -0.9)).measured == 0  # no less than nothing is kept
    silent = replace(FULL.answers, pruned=answers(ended=1.0, empty=0.1, repetitive=0.1))
    (row,) = check(nested("answers.min_json_valid", 0), replace(FULL, answers=silent))
    assert not row.passed
    assert "no prompt asks for JSON" in row.missing


def test_nan_keeps_no_limit():
    sick = replace(FULL.evaluation, divergence=span(math.nan, math.nan, math.nan))
    (row,) = check(nested("divergence.max", 1e9), replace(FULL, evaluation=sick))
    assert not row.passed


def test_several_pruned_models_are_held_to_the_limit_each():
    speed = replace(
        FULL.speed,
        models=(*FULL.speed.models, model("tiny", 4, 400_000_000)),
        ratios=(ratio("decode", 1.25), ratio("decode", 2.0, "tiny")),
    )
    rows = check(
        {"speed": {"min_speedup": 1.5}, "memory": {"max_mb": 450}}, replace(FULL, speed=speed)
    )
    assert [(row.name, row.passed) for row in rows] == [
        ("speed-up, decode, smaller with transformers", False),
        ("speed-up, decode, tiny with transformers", True),
        ("memory, smaller with transformers", False),
        ("memory, tiny with transformers", True),
    ]


def test_the_result_is_required_recorded_and_drawn(capsys):
    gate = Gate.parse(
        {"divergence": {"max": 0.2}, "agreement": {"min": 0.7}, "tasks": {"each": {"x": 1}}}, "g"
    )
    found = gate.check(FULL)
    assert not found.passed
    with pytest.raises(
        VerificationFailed,
        match=r"the gate failed: divergence: 0.25 nats/token, allowed is at most 0.2 nats/token "
        r"\(2 of 3 limits failed\)$",
    ):
        found.require()
    with pytest.raises(
        VerificationFailed, match=r"failed: score kept, x: the record has no 'x'; r"
    ):
        GateResult(rows=found.rows[2:]).require()
    good = GateResult(rows=found.rows[1:2])
    assert good.passed
    good.require()

    adapter = TypeAdapter(GateResult)  # as a record reads and writes it
    assert adapter.validate_json(adapter.dump_json(found)) == found

    draw(rich.console.Console(width=100, highlight=False, markup=False), found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["limit", "measured", "allowed"]
    assert re.fullmatch(r"divergence +0.25 nats/token +at most 0.2 nats/token +FAILED *", lines[1])
    assert re.fullmatch(r"agreement +75 % +at least 70 % +passed *", lines[2])
    assert re.fullmatch(r"score kept, x +- +at least 100 % +FAILED *", lines[3])
    assert lines[4].startswith("score kept, x: the record has no 'x'; run: sleb eval")
    assert lines[-1].startswith("gate: 1 of 3 limits kept; ")


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sets no limit; set one"),
        ("[perplexity]\n[speed.cases]\n", "sets no limit"),
        ("[preplexity]\n", "there is no table 'preplexity' (did you mean 'perplexity'?); known: "),
        (f"{'x' * 5000} = 1", f"there is no table '{'x' * 60}'"),
        ("max_ratio = 1\n", "there is no table 'max_ratio'"),
        (
            "[answers]\nmax_repetative = 0.1",
            "[answers] has no limit 'max_repetative' (did you mean 'max_repetitive'?); known: max_",
        ),
        ("[divergence]\nmin = 0.1", "[divergence] has no limit 'min'"),
        ("perplexity = 1.2", "perplexity is a table of limits; write [perplexity] above them"),
        ("[speed]\ncases = 2", "[speed] cases is a table of limits; write [speed.cases] above"),
        (
            "[perplexity]\nmax_ratio = '1.2'",
            "[perplexity] max_ratio = '1.2' is not possible: input",
        ),
        ("[perplexity]\nmax_ratio = true", "[perplexity] max_ratio = True is not possible"),
        ("[perplexity]\nmax_ratio = [1.2]", "[perplexity] max_ratio = [1.2] is not possible"),
        ("[perplexity]\nmax_ratio = 2024-01-01", "[perplexity] max_ratio = datetime.date("),
        ("[perplexity]\nmax_ratio = nan", "[perplexity] max_ratio = nan is not possible: "),
        ("[perplexity]\nmax_ratio = inf", "[perplexity] max_ratio = inf is not possible: "),
        ("[perplexity]\nmax_ratio = 0", "max_ratio = 0 is not possible: input should be greater"),
        ("[divergence]\nmax = -0.1", "[divergence] max = -0.1 is not possible"),
        ("[agreement]\nmin = 90", "min = 90 is not possible: input should be less than or equal"),
        ("[answers]\nmax_empty = 2", "[answers] max_empty = 2 is not possible"),
        ("[tasks.each]\nsums = 'all'", "[tasks.each] sums = 'all' is not possible"),
        ("[tasks.each]\nsums = {a = 1}", "[tasks.each] sums = {'a': 1} is not possible"),
        (f"[size]\nmax_mb = {'9' * 400}", "[size] max_mb = 999"),
        ("[size\nmax_mb = 1", "is not valid TOML: "),
        ("size.max_mb = 1\nsize.max_mb = 2", "is not valid TOML: "),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(write, text, message):
    write("gate.toml", text)
    with pytest.raises(InputError) as caught:
        Gate.load("gate.toml")
    said = str(caught.value)
    assert said.startswith("gate.toml")
    assert message in said
    assert "\n" not in said
    assert len(said) < 300


def test_a_broken_file_names_the_line(write):
    write("gate.toml", "[size]\n\nmax_mb = = 2\n")
    with pytest.raises(InputError, match=r"gate.toml is not valid TOML: .*line 3"):
        Gate.load("gate.toml")


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"no file at .*gate.toml; a gate file holds limits"):
        Gate.load(tmp_path / "gate.toml")
    with pytest.raises(InputError, match="no file at"):
        Gate.load(tmp_path)
    path = tmp_path / "gate.toml"
    path.write_bytes(b"[size]\nmax_mb = 1 # \xff\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        Gate.load(path)
    path.write_bytes(b"[size]\nmax_mb = 1\n" + b"#" * 2**20)
    with pytest.raises(InputError, match="is larger than 1 MiB"):
        Gate.load(path)


def test_a_table_of_another_file_is_named():
    with pytest.raises(InputError, match=r"^sleb.toml: gate: \[speed\] has no limit 'min_speed'"):
        Gate.parse({"speed": {"min_speed": 2}}, "sleb.toml: gate")


def test_the_example_names_every_limit_and_is_right(tmp_path):
    """Also with the limits that are commented out."""
    text = EXAMPLE.read_text(encoding="utf-8")
    Gate.load(EXAMPLE)
    path = tmp_path / "gate.toml"
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    Gate.load(path)
    given = read_toml(path, "")
    for name, field in Gate.model_fields.items():
        assert set(given[name]) == set(field.annotation.model_fields), name


def test_the_example_of_a_ci_step_gives_the_command():
    import yaml

    text = EXAMPLE.with_name("github-actions.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["gate"]["steps"]
    assert steps[-1]["run"] == 'sleb verify "$OUT" --model "$MODEL" --gate gate.toml'
