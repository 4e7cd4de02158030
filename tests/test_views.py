"""What is shown is what the record holds, in every language and on every medium."""

import json
import re
import string
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import pytest
from markupsafe import Markup
from rich.console import Console

from cli_tools import COMMANDS
from report_plan import bare_plan, plan, repaired_plan, run_plan
from report_tools import (
    INVISIBLE,
    SECTIONS,
    Seen,
    complete,
    healed,
    hostile,
    html,
    page,
    passed_gate,
    put,
    repaired,
    save,
    seen,
    snapshot,
    sparse,
)
from sleb.acceptance import LIMITS, Gate
from sleb.calibration.split import SELF_GENERATED
from sleb.cli.verbs import VERBS
from sleb.core.errors import InputError
from sleb.core.files import record_path
from sleb.core.finding import finding
from sleb.core.plan import SimilarityGate, Target
from sleb.core.statistics import Interval
from sleb.core.units import MLP, Unit
from sleb.evaluation.grading import Judged
from sleb.record import BETWEEN, GateResult, RepairStatus
from sleb.runtimes.bench import Skipped
from sleb.runtimes.rules import VLLM
from sleb.selection.metrics import METRICS
from sleb.surgery.gates import GATES
from sleb.surgery.restore import Restored
from sleb.verbs import Verified
from sleb.views import proof, quality
from sleb.views.card import model_card
from sleb.views.compare import comparison
from sleb.views.html import render
from sleb.views.locale import LANGUAGES, LINK, Locale, names
from sleb.views.model import Folded, SideBySide
from sleb.views.quality import warning
from sleb.views.report import LINE, plan_path, write_report
from sleb.views.results import items
from sleb.views.selection import block_map
from sleb.views.terminal import draw

EN, JA = (Locale(lang, markup=True) for lang in LANGUAGES)
NAN = float("nan")
EXAMPLE = Path(__file__).parents[1] / "docs" / "example"


def drawn(*results, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for result in results:
        console.print(f"-- {type(result).__name__}")
        draw(items(result), console)
    return console.export_text()


def measured_alone():
    """An evaluation and tasks where nothing is removed and nothing compared."""
    whole = complete()
    nothing = dict.fromkeys(
        ("pruned_perplexity", "perplexity_ratio", "loss_increase", "divergence", "agreement")
    )
    evaluation = replace(whole.evaluation, removed=(), domains={}, unrepaired=None, **nothing)
    return evaluation, tuple(replace(task, pruned=None, flips=None) for task in whole.tasks)


def test_a_model_that_is_measured_alone_is_no_original():
    both, alone = drawn(complete().evaluation), drawn(*measured_alone())
    assert "loss of the original" in both
    assert "ratios paired" in both
    assert alone.count("this model") == 2
    assert "original" not in alone
    assert "ratio" not in alone


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_page_says_what_it_said(lang):
    found = seen(repaired(), repaired_plan(), lang)
    parts = ["summary", *SECTIONS]
    snapshot(f"page.{lang}.txt", "\n\n".join(f"# {p}\n{found.lines(p)}" for p in parts))


def test_the_terminal_shows_what_it_showed():
    r, p = repaired(), repaired_plan()
    results = (p, run_plan(p.rounds[:1]), r.verification, r, r.evaluation, r.tasks, r.answers)
    snapshot("terminal.txt", drawn(*results, r.speed, r.draft, r.transfer, r.runtimes, r.gate))


def test_the_card_says_what_it_said(tmp_path):
    card = model_card(repaired_plan(), repaired(model="a/clerk-1b"), tmp_path, kept=True)
    snapshot("card.md", card)


def numbers(value, path=""):
    """Every number below ``value``, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from numbers(item, f"{path}.{i}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


# what a page leaves out: in the record for whoever wants to compute further
UNSHOWN = {
    "record": re.compile(
        r"(removed|blocks|schema_version|evaluation_text|repair)\b.*|.*\.removed\.\d+"
        r"|evaluation\..*loss(_increase)?\..*|evaluation\.domains\..*\.tokens"
        r"|evaluation\.unrepaired\.(?!.*perplexity_ratio).*"
        r"|speed\.skipped\..*|answers\.pairs\.[027]\..*|answers\.pairs\..*\.repetition"
        r"|speed\.models\..*\.(seconds\.\d|1\.tokens_per_second)|draft\.(blocks|threads|seconds).*"
        r"|draft\.drafts\.0\.(blocks|tallies|seconds).*|tasks\.\d\.flips\.p_value"
    ),
    "plan": re.compile(
        r"(removed|order|model\.blocks|schema_version)\b.*|rounds\..*(se|removed\.\d|block|windows)"
        r"|baseline\.se|curve\.baseline\.se|repair\.(reach|gaps\.\d\.removed\.\d)"
    ),
}


def unseen(record, chosen, which):
    """Paths of numbers of the ``which`` that could be any other without a change on the page."""
    before, value = str(page(record, chosen)), {"record": record, "plan": chosen}[which]
    for path, number in numbers(asdict(value) if which == "record" else value.model_dump()):
        new = 3 * number + 7 if isinstance(number, int) else 1.37 * number + 0.11
        both = {"record": record, "plan": chosen, which: put(value, path, new)}
        shown = UNSHOWN[which].fullmatch(path) or str(page(both["record"], both["plan"])) != before
        if not shown:
            yield path


@pytest.mark.parametrize("which", ["record", "plan"])
def test_every_number_reaches_the_page(which):
    assert [*unseen(repaired(), repaired_plan(), which)] == []


def test_a_record_without_sections_says_how_to_measure_each():
    found = seen(sparse(), bare_plan())
    for place in ("texts", "tasks", "answers", "speed", "draft", "transfer", "similarity", "curve"):
        assert "Not measured: " in found.text(place), place
        assert "sleb " in found.text(place), place
    assert "--runtime transformers" in found.text("runtimes")


@pytest.mark.parametrize("out", ["small", "small.gguf"])
def test_page_one_says_once_what_was_not_measured_and_how_to(out):
    found = seen(put(sparse(), "verification.checkpoint", out), bare_plan())
    assert {i for i in found.ids if i.startswith("sum-")} == {
        *("sum-removed", "sum-untested", "sum-rollback")
    }
    told = [
        line for line in found.lines("summary").split("\n") if "FILE" in line or "bench" in line
    ]
    for part in ("--text FILE --record", "--prompts", "--task", "sleb bench", "sleb transfer"):
        assert sum(part in line for line in told) == 1, part
    assert len(told) == 5
    assert found.text("summary").count("not measured") == 1  # the heading
    assert "sleb " not in seen().text("sum-untested")


@pytest.mark.parametrize("out", ["small", "small.gguf"])
def test_answers_that_were_measured_are_not_called_unmeasured(out):
    def told(record):
        found = seen(put(record, "verification.checkpoint", out), bare_plan())
        return [found.text("sum-untested"), found.text("answers")]

    own = sparse(prompts=complete().prompts)
    for text in told(own):
        assert "answers to your own" not in text
        assert ("sleb compare" in text) == (out == "small")
    for text in told(put(own, "prompts.source", "default")):
        assert "answers to your own prompts" in text


@pytest.mark.parametrize(
    ("record", "tone", "text"),
    [
        (complete(gate=None), "none", "does not judge"),
        (complete(gate=passed_gate()), "good", "2 of 2"),
        (complete(), "bad", "kept 2, not kept 1, cannot be told yet 1"),
        (put(complete(), "gate.rows.2.verdict", "unclear"), "unclear", "cannot be told yet 2"),
        (put(complete(gate=None), "verification.checks.4.passed", False), "bad", "1 of 6"),
        (put(complete(gate=passed_gate()), "verification.checks.0.passed", False), "bad", "1 of 6"),
    ],
)
def test_the_verdict_is_the_gates_unless_the_checkpoint_is_not_exact(record, tone, text):
    verdict = page(record).verdict
    assert verdict.tone == tone
    assert text in verdict.text
    shown = [row[0] for row in verdict.table.rows]
    assert len(shown) == len({*shown}) == len(verdict.table.meters)
    for name in ("perplexity ratio, all texts", "peak memory", "weights on disk"):
        assert name in shown  # with a limit or without
    for row in record.gate.rows if record.gate else ():
        assert any(EN.tables["limits"][row.name] in name for name in shown)


def test_a_row_s_bar_is_as_long_as_its_figure_and_marks_its_limit():
    table = page(complete()).verdict.table
    meters = dict(zip((row[0] for row in table.rows), table.meters, strict=True))
    ratio = meters["perplexity ratio, all texts"]  # begins at 1, where nothing is lost
    assert ratio.value / ratio.limit == pytest.approx(0.0812 / 0.2)
    assert ratio.worst / ratio.limit == pytest.approx(0.1234 / 0.2)
    assert ratio.tone == "kept"
    size, (before, after) = meters["weights on disk"], complete().nbytes
    assert size.value / size.dense == pytest.approx(after / before)
    assert size.limit is None
    share = meters["answers, the same next token"]
    assert (share.value, share.worst, share.dense) == (0.9021, 0.8853, 1.0)
    assert meters["score kept, law"] is None  # was not measured
    assert all(0 <= x <= 1 for m in meters.values() if m for x in (m.value, m.worst))


def test_what_cannot_be_told_says_what_would_tell():
    record = complete()
    for needed, told in ((None, "no number of measurements"), (73, "about 73"), (1234, "1,300")):
        row = replace(record.gate.rows[0], verdict="unclear", needed=needed)
        gate = replace(record.gate, rows=(row,))
        said = page(replace(record, gate=gate)).verdict.table.rows
        assert any(told in row[-1] for row in said)


@pytest.mark.parametrize("missing", ["none-right", "dense-zero", "at-chance"])
def test_what_no_command_would_tell_names_none(missing):
    row = replace(complete().gate.rows[3], verdict="unclear", missing=missing, judged=1)
    shown = seen(complete(gate=GateResult(rows=(row,))))
    (told,) = (r[-1] for r in shown.rows["summary"] if r[-1].startswith("cannot tell yet"))
    assert not re.search(r"; run\b", told)
    assert "<code><span></span></code>" not in shown.source


def test_this_model_stands_in_the_curve_where_it_is():
    """A repaired one below the plain cut of its depth; on other text than the curve's, nowhere."""
    record, chosen = repaired(), repaired_plan()
    e, heldout = record.evaluation, chosen.curve.heldout
    record = put(record, "evaluation.windows", heldout.windows)
    record = put(record, "evaluation.length", heldout.length)
    own = Interval(value=0.05, low=0.04, high=0.06)
    record = put(record, "evaluation.loss_increase", own)

    def marked(record, chosen):
        (curve,) = (s for s in page(record, chosen).sections if s.name == "curve")
        chart = next(i.chart for i in curve.items if i.kind == "figure")
        return chart.chosen, chart.chosen_label

    depth = len(chosen.order)
    assert marked(record, chosen) == ((depth, 0.05, 0.04, 0.06), "this model, repaired")
    assert marked(put(record, "evaluation_text.source", "given"), chosen)[0] is None
    point = next(p for p in chosen.curve.points if p.depth == depth)
    plain = put(complete(), "evaluation.windows", e.windows + 1)
    assert marked(plain, plan()) == (
        (depth, point.increase, point.low, point.high),
        "this model",
    )


@pytest.mark.parametrize("made", [EN, JA])
def test_the_curve_has_sizes_of_what_was_written(made):
    """A folder from a GGUF file stands among sizes of folders, unless a plan has those of files."""
    chosen = plan()
    (written,) = (p.nbytes for p in chosen.curve.points if p.depth == len(chosen.order))
    for nbytes, of_file in ((written, False), (2 * written, True)):
        record = complete(file_nbytes=10**9, nbytes=(3 * written, nbytes))
        (curve,) = (s for s in page(record, chosen, made.lang).sections if s.name == "curve")
        (table,) = (item for item in curve.items if item.kind == "table")
        assert (made("curve.file") in table.columns) == of_file
        assert (made("curve.size") in table.columns) == (not of_file)


def of_file(runtime):
    """A record of a GGUF file, timed in ``runtime``."""
    record = complete(gate=None)
    for i, path in enumerate(("big.gguf", "s.gguf")):
        record = put(record, f"speed.models.{i}.path", path)
        record = put(record, f"speed.models.{i}.runtime", runtime)
    models = record.speed.models[:2]
    return replace(record, speed=replace(record.speed, models=models, dtype="float32"))


@pytest.mark.parametrize("made", [EN, JA])
def test_memory_of_a_gguf_file_is_told_with_what_held_it(made):
    """It is dequantized by transformers, and by llama.cpp not."""
    for runtime, key in (("llama.cpp", "as_stored"), ("transformers", "unpacked")):
        record = of_file(runtime)
        said = made(f"memory.{key}", runtime=runtime, dtype="float32")
        found = page(record, lang=made.lang)
        (row,) = (
            r[0] for r in found.verdict.table.rows if made.named("limits", "memory.max_mb") in r[0]
        )
        assert said in row
        (section,) = (s for s in found.sections if s.name == "speed")
        tables = [item for item in section.items if item.kind == "table"]
        (models,) = (t for t in tables if t.caption == made("memory.caption"))
        assert all(said in cells[0] for cells in models.rows)
        (chart,) = (i.chart for i in section.items if i.kind == "figure" and i.name == "memory")
        assert all(said in group for group in chart.groups)
    assert drawn(of_file("transformers").speed).count("transformers, unpacked to float32") == 2
    assert "unpacked" not in drawn(complete().speed)


def test_the_number_of_a_block_is_not_read_as_a_count():
    """Of one block, of several, and of parts, which stay as many blocks."""
    for removed, told in (
        ((7,), "removed block 7; 11 of 12 blocks stay"),
        ((4, 7), "removed blocks 4, 7; 10 of 12 blocks stay"),
        ((Unit.of(3, MLP),), "removed 3.mlp; 12 of 12 blocks stay"),
    ):
        assert told in drawn(plan(removed=removed, order=removed, rounds=()))
        if removed == (7,):
            assert "\nremoved block 7\n" in drawn(complete(removed=removed))
            assert "without block 7 " in drawn(replace(complete().evaluation, removed=removed))
            assert "; removed block 7\n" in drawn({"out": "o", "blocks": 11, "removed": removed})


def test_limits_on_speed_are_called_as_in_the_report(tmp_path):
    by_name = {verb.name: verb for verb in VERBS}
    row = replace(complete().gate.rows[1], verdict="unclear", needed=9)
    record = put(complete(), "gate.rows.1", row)
    folder = save(tmp_path / "o", record, plan())
    proven = Verified(verification=record.verification, gate=record.gate, record=folder)
    for verb, result in (("run", record), ("verify", proven)):
        shown = drawn(by_name[verb].drawn(result))
        assert shown.count("speed, writing 8 × 64 tokens after 128") == 2  # and what would tell
        assert "generate-8" not in shown


@pytest.mark.parametrize("made", [EN, JA])
def test_without_limits_a_line_of_their_file_is_shown(made, tmp_path):
    for place in ("summary", "gate"):
        assert LINE in seen(complete(gate=None), lang=made.lang).text(place)
    (tmp_path / "limits.toml").write_text(LINE)
    assert Gate.load(tmp_path / "limits.toml").check(complete()).rows[0].name in LINE


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_without_limits_page_one_says_that_too_little_is_kept(lang):
    """Nothing else on it does."""
    kept = Interval(value=0.8, low=0.75, high=0.85)
    record = complete(gate=None)
    record = replace(record, prompts=replace(record.prompts, agreement=kept))
    (told,) = warning(Locale(lang), record.prompts)
    assert "80" in told.text
    assert " ".join(told.text.split()) in seen(record, lang=lang).text("summary")


def test_a_file_that_grows_has_a_plus():
    record = complete(file_nbytes=100_000_000)
    record = replace(record, nbytes=(record.nbytes[0], 250_000_000))
    assert "+150.0" in seen(record).text("summary")


def test_the_time_between_stages_is_none_of_the_longest_stages():
    shown = drawn(complete(seconds={"searching": 9.0, BETWEEN: 8.0, "evaluating": 7.0}))
    assert "longest: searching 9 s, evaluating 7 s\n" in shown


def test_runs_stand_side_by_side_and_what_differs_is_said(tmp_path):
    other = replace(complete(), answers=None, model="models/other")
    other = put(other, "evaluation_text.source", "given")
    runs = [("a", complete(), plan()), ("b", other, plan())]
    made = comparison(EN, runs, {})
    rows = {row[0]: row[1:] for row in made.verdict.table.rows}
    assert made.verdict.table.columns[1:] == ("a", "b")
    one = complete().evaluation.perplexity_ratio
    shown = f"{EN.figure(one.value, 'x')} (at worst {EN.figure(one.high, 'x')})"
    assert [x.translate(INVISIBLE) for x in rows["perplexity ratio, all texts"]] == [shown] * 2
    assert rows["answers, repetitive"][1] == "–"
    said = str(made.summary)
    for told in ("The originals are the same", "on different text", "The tasks and their items"):
        assert told in said
    assert "(sleb compare)" not in said  # which one of them alone has
    same = str(comparison(EN, [runs[0], ("c", *runs[0][1:])], {}).summary)
    assert "different" not in same
    assert "prompts in each run" in same
    folders = [save(tmp_path / name, record, p) for name, record, p in runs]
    found = Seen(write_report(folders, tmp_path / "r.html", "ja").read_text(encoding="utf-8"))
    assert len(found.ids) == len({*found.ids})
    assert all(link.removeprefix("#") in found.ids for link in found.links)
    assert {"worst-0", "worst-1", "provenance"} <= {*found.ids}


def test_runs_with_other_right_answers_differ_in_a_row_of_them():
    right = complete().prompts.right

    def rows(record, p):
        lost = put(record, "prompts.right", replace(right, dense=1, pruned=0, lost=1, won=0))
        made = comparison(EN, [("a", record, p), ("b", lost, p), ("c", sparse(), p)], {})
        shown = {row[0]: row[1:] for row in made.verdict.table.rows}
        sizes = [row for row in made.summary[0].items[0].rows if row[0] == "weights on disk"]
        return shown["right answers"], sizes

    ((one, other, none), sizes) = rows(complete(), plan())
    assert f"{right.dense} before, {right.pruned} after" in one
    assert other == f"1 before, 0 after (lost 1, won 0), of {right.judged}"
    assert none == "–"
    assert not sizes  # it is among the figures


def test_of_what_a_page_names_only_commands_have_whole_paths():
    home = "/home/someone/work"
    record, chosen = complete(model=f"{home}/big", command=f"sleb run {home}/sleb.toml"), plan()
    record = put(record, "verification.checkpoint", f"{home}/small")
    record = replace(record, seconds={f"loading {home}/big": 1.0})
    record = put(record, "answers.pairs.0.id", f"{home}/a.jsonl: 3")
    chosen = put(chosen, "calibration.sources.0.spec", f"answers to {home}/a.jsonl, {home}/b.jsonl")
    html = render(page(record, chosen))
    assert f"{home}/small" in html
    told = re.sub("<code>.*?</code>", lambda code: code[0] if " " not in code[0] else "", html)
    assert home not in told
    for name in ("loading big", "answers to a.jsonl, b.jsonl", "a.jsonl: 3"):
        assert name in told
    assert "original big checkpoint small" in seen(record, chosen).text("provenance")


@pytest.mark.parametrize("out", ["small", "small.gguf"])
def test_files_are_named_as_they_lie_there(tmp_path, out):
    runs = [tmp_path / name / out for name in "ab"]
    for run in runs:
        run.parent.mkdir()
        if not run.suffix:
            run.mkdir()
        complete().save(record_path(run))
        plan().save(plan_path(run))
    for given in (runs, runs[:1]):
        found = write_report(given, tmp_path / "r.html", force=True)
        text = Seen(found.read_text(encoding="utf-8")).text("provenance")
        for run in given:
            for path in (record_path(run), plan_path(run)):
                name = path.relative_to(tmp_path).as_posix() if given == runs else path.name
                assert f"SHA-256 of {name} " in text


def test_runs_are_compared_by_what_they_have():
    """What one run alone has is not said to be the same; of three, who has it is named."""
    full, none = (complete(), plan()), (sparse(), plan())

    def told(*runs):
        (lines, _) = comparison(EN, [(name, *run) for name, run in runs], {}).summary[1].items
        return [Markup(line).striptags() for line in lines.lines]

    (model,) = told(("a", full), ("b", none))
    assert model == "The originals are the same."
    both = told(("a", full), ("b", full))
    assert len(both) == 6
    assert told(("a", full), ("b", none), ("c", full)) == [
        model, *(f"a, c: {line}" for line in both[1:])
    ]  # fmt: skip


def test_names_are_as_short_as_tells_them_apart():
    assert names(["a/b/c"]) == {"a/b/c": "c"}
    assert names(["a/x/c", "a/y/c", "d"]) == {"a/x/c": "x/c", "a/y/c": "y/c", "d": "d"}
    assert names(["c", "b/c"]) == {"c": "c", "b/c": "b/c"}
    assert names(["/", ""]) == {"/": "/", "": ""}


def test_commands_of_a_gguf_file_s_report_name_what_lies_beside_it():
    record = sparse(prompts=None)
    record = put(record, "verification.checkpoint", "small.gguf")
    text = seen(record, bare_plan()).text("summary")
    assert "--plan small.plan.json" in text
    assert "small.gguf/" not in text
    assert "sleb compare" not in text  # which takes folders


def test_one_text_is_all_texts_on_page_one():
    mail = complete().evaluation.domains["mail"]
    alone = put(complete(gate=None), "evaluation.domains", {"mail": mail})
    shown = [row[0] for row in page(alone).verdict.table.rows]
    assert [name for name in shown if name.startswith("perplexity")] == [
        "perplexity ratio, all texts"
    ]


def test_a_folder_from_a_gguf_file_stands_beside_that_file(tmp_path):
    """Its size on page one, and what can be rebuilt: the folder it was read as."""
    before, after = complete().nbytes
    for file, said in (
        (after - 1, "larger than the .gguf file"),
        (after + 1, "the .gguf file that"),
    ):
        found = seen(complete(file_nbytes=file, gate=None))
        (row,) = (row for row in found.rows["summary"] if row[0].startswith("weights on disk"))
        assert "16 bits" in row[0]
        assert said in row[0]
        assert EN.size(file).translate(INVISIBLE) in row[0]
        for made in (EN, JA):  # the folder that the file was read as has a size that nobody gave
            text = seen(complete(file_nbytes=file, gate=None), lang=made.lang).text("summary")
            for size in (EN.size(before), EN.figure(before / 1e6, "MB")):
                assert size.translate(INVISIBLE) not in text
            assert EN.figure(file / 1e6, "MB").translate(INVISIBLE) in text
            assert made("removed.as_file", size=EN.size(file)).translate(INVISIBLE) in text
    assert ".gguf" not in seen(complete(gate=None)).text("summary")
    weights = re.search("^weights .*", drawn(complete(file_nbytes=98_400_000)), re.MULTILINE)
    assert re.sub(r"\s+", " ", weights[0]) == "weights 98.4 MB as .gguf 1.89 GB in 16 bits"
    card = model_card(plan(), complete(file_nbytes=9), tmp_path, kept=True)
    assert "The original is kept too" not in card
    assert "folder of 16-bit weights" in card
    back = Restored(path="B", removed=(), blocks=4, nbytes=9, repair_undone=False, from_gguf=True)
    assert "folder of 16-bit weights" in drawn(back)
    assert "the original, byte" in drawn(replace(back, from_gguf=False))


def test_a_lost_right_answer_is_the_worst_beside_what_was_expected_and_a_won_one_never_is():
    pairs = complete().answers.pairs
    lost = Judged(expected={"answer": "30 days", "regex": "keep"}, dense=True, pruned=False)
    first = put(complete(), "answers.pairs.6.judged", lost)
    assert "Right answers, of 1 that can be judged: 1 before, 0 after (lost 1, won 0)." in seen(
        first
    ).text("answers")
    text = seen(first).text("sum-worst")
    assert "Prompt q5" in seen().text("sum-worst")
    assert "Prompt q7 " in text
    assert "expected 30 days regex: keep" in text
    assert re.search("original .* right .* pruned .* wrong", text)
    won = tuple(
        replace(p, judged=replace(lost, dense=False, pruned=True)) if not p.identical else p
        for p in pairs
    )
    text = seen(put(complete(), "answers.pairs", won)).text("sum-worst")
    assert "Prompt p7" in text  # of those by which the result was measured
    assert "expected Thursday" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\n\n  \n  a\n\n b \n\n", "  a\n\n b"), ("a", "a"), ("  a", "  a"), ("\n \n", ""), (" ", "")],
)
def test_both_texts_of_a_pair_begin_at_the_top(text, shown):
    record = put(sparse(prompts=complete().prompts), "prompts.worst.0.pruned", text)
    (pair,) = page(record, bare_plan()).summary[0].items[1:]
    assert pair.pruned.text == shown


def test_all_that_the_cut_answered_can_be_read():
    one = complete().prompts.worst[0]
    many = tuple(replace(one, id=f"prompt{i}") for i in range(5))
    record = put(complete(), "prompts.worst", many)
    section = quality.examples(EN, record.prompts)
    assert [item.title for item in section if isinstance(item, Folded)] == [
        "Prompt prompt3",
        "Prompt prompt4",
    ]
    assert sum(isinstance(item, SideBySide) for item in section) == 3


def test_how_to_go_back_names_restore_where_its_side_car_is():
    assert "sleb restore" not in seen().text("sum-rollback")
    text = seen(complete(kept=True)).text("sum-rollback")
    assert "sleb restore OUT -o ORIGINAL" in text.replace(complete().verification.checkpoint, "OUT")
    assert "--depth D" in text
    assert "16-bit" in seen(complete(kept=True, file_nbytes=9)).text("sum-rollback")


@pytest.mark.parametrize("nothing", [None, NAN])
def test_one_measurement_has_no_interval_and_says_so(nothing):
    alone = Interval(value=1.5, low=nothing, high=nothing)
    record = put(complete(), "evaluation.perplexity_ratio", alone)
    for i in range(4):
        record = put(record, f"speed.ratios.{i}.ratio", alone)
    found = seen(put(record, "similarity.3", (NAN,) * 13), charts=True)
    rows = [row for row in found.rows["summary"] if row[0].startswith(("speed", "perplexity"))]
    assert ("1.5×", "–") in {tuple(row[1:3]) for row in rows}
    assert "No saving is claimed" in found.text("sum-servers")
    assert "nan" not in found.text("summary").lower()
    assert "None" not in found.source


def test_a_saving_of_servers_is_claimed_only_where_the_worse_end_is_above_1():
    """Whatever the other cases are, it is said of the one that is like a server's load."""
    shown = seen().text("sum-servers")
    assert "would keep about" in shown
    for low, claimed in ((1.01, True), (1.0, False), (0.9, False)):
        record = complete()
        for i in range(4):
            ratio = record.speed.ratios[i].ratio
            record = put(record, f"speed.ratios.{i}.ratio", replace(ratio, low=low))
        text = seen(record).text("sum-servers")
        assert ("would keep about" in text) == claimed
        assert ("No saving is claimed" in text) != claimed


def test_right_answers_kept_are_on_page_one_without_a_limit():
    def bars(record):
        return [row[0] for row in page(record).verdict.table.rows]

    assert "right answers kept" in bars(complete(gate=None))
    unjudged = put(complete(gate=None), "prompts.right", None)
    assert "right answers kept" not in bars(unjudged)


def test_figures_that_are_not_finite_are_not_numbers_on_the_page():
    ratio = Interval(value=float("inf"), low=2.0, high=float("inf"))
    text = seen(put(complete(), "evaluation.perplexity_ratio", ratio)).text("texts")
    assert "∞× (2.000 to ∞)" in text
    assert "–×" in seen(put(complete(), "speed.ratios.0.ideal", NAN)).text("speed")


def test_more_texts_than_page_one_has_room_for_are_the_worst_ones():
    mail = complete().evaluation.domains["mail"]
    values = {"a": 1.5, "b": 1.1, "c": 1.9, "d": 1.2, "e": 1.7, "f": 1.3, "g": 1.6}
    domains = {name: put(mail, "perplexity_ratio.value", v) for name, v in values.items()}
    found = seen(put(complete(), "evaluation.domains", domains))
    shown = [row[0] for row in found.rows["summary"] if row[0].startswith("perplexity ratio")]
    assert len(shown) == 5
    ungated = put(complete(gate=None), "evaluation.domains", domains)
    table = page(ungated).verdict.table
    shown = [row[0] for row in table.rows if row[0].startswith("perplexity ratio")]
    assert len(shown) == 5
    assert "3" in table.note
    assert len(found.rows["texts"]) == 1 + 7 + 1


def test_text_that_was_not_held_out_is_not_called_so():
    given = {"source": "given", "texts": ("mail.jsonl", "b.txt")}
    other = seen(complete(evaluation_text=replace(complete().evaluation_text, **given)))
    assert "held-out" in seen().text("texts")
    assert "held-out" not in other.text("texts")
    assert "mail.jsonl, b.txt" in other.text("texts")


def test_what_is_true_of_a_plain_cut_alone_is_not_said_of_a_repaired_one():
    plain, found = seen(), seen(repaired(), repaired_plan())
    for place, told in {
        "sum-removed": "6 matrices re-fitted; gaps repaired: 1 of 2",
        "exact": "every other weight equals the original’s",
        "sum-rollback": "That cut has no repair",
        "curve": "of cuts without repair",
        "transfer": "of cuts without repair",
        "texts": "Without the repair it is 1.432× (1.358 to 1.515)",
        "provenance": "which fits of the repair stay",
    }.items():
        assert told in found.text(place), place
        assert told not in plain.text(place), place
    gap = {"ridge": None, "tensors": (), "after": repaired_plan().repair.gaps[0].before}
    first = repaired_plan().repair.gaps[0].model_copy(update=gap)
    refused = seen(chosen=put(repaired_plan(), "repair.gaps.0", first))
    assert "repair none" in refused.text("sum-removed")
    assert "kept none" in refused.text("texts")
    assert "2.970 → 2.930" in seen(repaired(evaluation=None), repaired_plan()).text("texts")


@pytest.mark.parametrize(
    ("repair", "told"),
    [
        (RepairStatus(status="not-asked"), "not asked for"),
        (RepairStatus.impossible(InputError("it is packed")), "not possible: it is packed"),
        (RepairStatus(status="no-gain"), "no fit"),
        (RepairStatus(status="repaired", tensors=4, self_generated=True), "model's own text"),
        (RepairStatus(status="repaired", tensors=4), "given texts"),
        (RepairStatus(status="repaired", note="as it was"), "repair: as it was"),
    ],
)
def test_the_summary_of_a_run_says_what_became_of_the_repair(repair, told):
    assert told in drawn(complete(repair=repair))


def test_the_worst_answers_come_first_and_equal_ones_are_not_shown():
    found = re.findall(r"Prompt (q\d)(?!:)", seen().text("answers"))
    assert found == ["q5", "q2", "q4", "q6", "q7", "q3", "q8", "q1"]
    assert re.findall(r"Prompt (q\d):", seen().text("answers")) == ["q8", "q1"]  # to be opened
    same = tuple(p for p in complete().answers.pairs if p.identical)
    assert "All answers are identical" in seen(put(complete(), "answers.pairs", same)).text(
        "answers"
    )


def test_nothing_of_a_file_steers_the_terminal():
    bad = "\x1b[31mred\x1b]0;t\x07 [bold]x[/] \u202eback\r\n\x9b2J"
    record, chosen = hostile(bad, bad)
    parts = (record.verification, record.tasks, record.answers, record.speed, record.draft)
    shown = drawn(chosen, record, *parts, record.transfer, record.runtimes, record.gate)
    assert not {*shown} & set("\x1b\x07\x9b\r\u202e")
    assert "[bold]x[/]" in shown


def sentences(words):
    for table, entries in words.tables.items():
        for key, value in entries.items():
            for i, text in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(text, str):
                    yield f"{table}.{key}.{i}", text


def fields(text):
    return {name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_have_the_same_keys_that_fill_in_the_same_things():
    keys = [[(t, [*entries]) for t, entries in words.tables.items()] for words in (EN, JA)]
    assert keys[0] == keys[1]
    japanese = dict(sentences(JA))
    for key, text in sentences(EN):
        assert fields(text) == fields(japanese[key]), key


@pytest.mark.parametrize("words", [EN, JA], ids=LANGUAGES)
def test_every_linked_term_is_in_the_glossary_and_every_term_is_linked(words):
    linked = {m[1] for _, text in sentences(words) for m in LINK.finditer(text)}
    assert linked == {*words.tables["glossary"]}
    for key, text in sentences(words):
        assert text, key
        assert "[[" not in LINK.sub("", text), key
        assert "  " not in text, key


def variety():
    """Records and plans that between them have the views say all that they can."""
    full, chosen, first = complete(), plan(), plan().rounds[0]
    worse = put(chosen, "rounds.0.scores.0.mean", 2.95)
    early = put(worse, "rounds.0.scores.1.windows", 9)
    same = tuple(p for p in full.answers.pairs if p.identical)
    alone = Interval(value=1.5, low=None, high=None)
    yield from [(full, chosen), (sparse(), bare_plan()), (full, worse), (full, early)]
    yield from [(repaired(), repaired_plan()), (full, put(chosen, "rounds.0.scores.1.block", 4))]
    yield repaired(), put(repaired_plan(), "curve.fitted", 8192)
    yield healed(), chosen
    seen = finding("all-seen", prompts=11)
    yield replace(healed(), prompts=None, answers=None, unasked=seen), chosen
    yield complete(answers=None), chosen
    yield complete(kept=True, file_nbytes=9), chosen
    yield complete(file_nbytes=10**12), chosen
    yield complete(file_nbytes=10**9, nbytes=(4 * 10**9, 3 * 10**9)), chosen
    for runtime in ("llama.cpp", "transformers"):
        yield of_file(runtime), chosen
    heldout = chosen.curve.heldout
    own = replace(repaired().evaluation, windows=heldout.windows, length=heldout.length)
    yield repaired(evaluation=own), repaired_plan()
    yield replace(healed(), evaluation=own), chosen
    about = {"runtime": "vllm", "models": ("a",), "others": ("b",)}
    by = SimilarityGate(measure="cosine", threshold=0.9, candidates=(4, 7, 8))
    yield full, plan(similarity=by)
    for kind in ("remove", "speedup", "size", "keep-answers"):
        yield full, plan(target=Target(kind=kind, limit=3, reached=3))
    whole = complete(removed=(7, 8, 9))
    for rounds in (chosen, worse, early, put(chosen, "rounds.0.scores.1.excess_se", 1.0)):
        yield whole, run_plan(rounds.rounds[:1])
    yield whole, run_plan((first,), excess=0.001)
    yield whole, run_plan((first,), answers=0.125, texts=0.25)
    ordered = put(first, "scores", tuple(s for s in first.scores if s.block == 7))
    part = (Unit.of(7, MLP),)
    yield sparse(removed=part), plan(order=part, removed=part, rounds=())
    yield (
        complete(removed=(7,)),
        plan(order=(7,), removed=(7,), strategy="refine", rounds=(ordered,)),
    )
    for path, new in {
        "gate": passed_gate(),
        "answers.pairs.6.judged": Judged(expected={"answer": "9"}, dense=True, pruned=False),
        "gate.rows.2.verdict": "unclear",
        "gate.rows": tuple(
            replace(full.gate.rows[0], name=name, verdict="unclear", needed=9)
            for name in (
                "perplexity.max_ratio",
                "tasks.min_retention",
                "answers.max_empty",
                "speed.min_speedup",
                "draft.min_acceptance",
            )
        ),
        "kept": True,
        "file_nbytes": 9,
        "speed.skipped": tuple(
            Skipped(reason=key, **about) for key in [*EN.tables["skipped"]][:-2]
        ),
        "verification.checks.0.passed": False,
        "gate.rows.3.near": "law",
        "speed.ratios.0.runtime": "vllm",
        "speed.ratios": full.speed.ratios * 2,
        "speed.models.0.runs.0.high": 9.0,
        "evaluation.domains": dict.fromkeys("abcdefg", full.evaluation.domains["mail"]),
        "evaluation_text.source": "given",
        "answers.pairs": same,
        "answers.pairs.0": replace(full.answers.pairs[4], id="again"),
        "tasks": full.tasks * 3,
        "answers.languages": False,
        "answers.pairs.4.pruned.text": "",
        "speed.ratios.3.ratio": Interval(value=0.9, low=0.8, high=1.1),
        "speed.ratios.0.ratio": alone,
        "speed.ratios.1.ratio": Interval(value=0.9, low=0.0, high=1e5),
        "prompts.agreement": Interval(value=0.7, low=0.5, high=0.95),
        "gate.rows.0": replace(full.gate.rows[0], verdict="unclear", needed=19_000),
        "tasks.0.flips.won": 90,
        "tasks.1.flips": None,
        "tasks.0.chance": 0.9,
        "started": "2026",
        "runtimes.verdicts.2.no_file": True,
    }.items():
        yield put(full, path, new), chosen
    yield put(full, "speed.ratios.3.ratio", alone), chosen
    yield put(put(full, "tasks.0.flips.won", 0), "tasks.0.flips.lost", 0), chosen


def side_by_side():
    """Pairs of runs that have all in common, nothing, or nothing measured."""
    full, chosen = complete(), plan()
    yield (full, chosen), (full, chosen)
    yield (sparse(), bare_plan()), (healed(), repaired_plan())
    other = put(full, "evaluation_text.source", "given")
    for path, new in {
        "prompts.tokens": 9,
        "answers.sha256": "0",
        "tasks.0.items": 9,
        "environment": {"cpus": 1},
    }.items():
        other = put(other, path, new)
    yield (full, chosen), (other, put(chosen, "model.weights_sha256", "a" * 64))
    yield (full, chosen), (repaired(), repaired_plan())


def test_every_sentence_is_said_sometimes_and_none_is_missing():
    said = set()

    def raw(self, key):
        said.add(key)
        return plain(self, key)

    plain = Locale.raw
    with patch.object(Locale, "raw", raw):
        for record, chosen in variety():
            noise = Interval(value=0.0, low=-0.1, high=0.1)
            found = put(record, "tasks.0.flips.difference", noise) if record.tasks else record
            page(found, chosen)
            page(record, chosen)
        drawn(complete().tasks, *measured_alone())
        for one, two in side_by_side():
            comparison(EN, [("a", *one), ("b", *two)], {})
            comparison(EN, [("a", *one), ("b", *two), ("c", sparse(), bare_plan())], {})
    by_name = {"limits", "reasons", "checks", "environment", "metrics", "strategies", "glossary"}
    by_name |= {"found", "must", "rules", "roles", "called"}
    known = {f"{t}.{k}" for t, found in EN.tables.items() if t not in by_name for k in found}
    assert known - said == {"format.large"}


@pytest.mark.parametrize("words", [EN, JA], ids=LANGUAGES)
def test_keys_of_the_record_have_words(words):
    """What the library can write into a record is told in the reader's language."""
    assert {*METRICS} == {*words.tables["metrics"]}
    assert {limit.key for limit in LIMITS} == {*words.tables["limits"]} - {"all"}
    assert {*GATES} == {*words.tables["checks"]}
    assert {*GATES} <= {*words.tables["must"]}
    assert {rule.key for rule in VLLM.values()} <= {*words.tables["rules"]}


@pytest.mark.parametrize("key", [*EN.tables["commands"]])
def test_commands_on_the_page_exist(key):
    verb, *arguments = EN.raw(f"commands.{key}").removeprefix("sleb ").split()
    command = COMMANDS[verb]
    options = {o for p in command.params for o in p.opts}
    assert {a for a in arguments if a.startswith("-")} <= options
    assert EN.raw(f"commands.{key}") == JA.raw(f"commands.{key}")


def test_blocks_that_left_together_have_no_order():
    for chosen, turns in ((plan(), list(plan().order)), (run_plan(plan().rounds[:1]), [])):
        drawn_map = block_map(EN, chosen)
        by_turn = sorted((b.turn, b.number) for b in drawn_map.blocks if b.turn)
        assert [number for _, number in by_turn] == turns
        assert {b.number for b in drawn_map.blocks if b.state == "removed"} == set(chosen.order)
        assert ("together" in str(drawn_map.legend)) == (not turns)


def test_a_ratio_whose_interval_says_nothing_has_none():
    wide, narrow = Interval(value=0.88, low=1e-9, high=1e5), Interval(value=0.9, low=0.1, high=8.0)
    for t in (EN, JA, Locale()):
        assert "100,000" not in t.interval(wide, t.times)
        assert t.times(wide.value) in t.interval(wide, t.times)
        assert "8.0" in t.interval(narrow, t.times)
        assert "100,000" in t.interval(wide, t.number)  # no ratio


def test_that_too_little_is_kept_is_said_flatly_only_where_it_is_told():
    kept = complete().prompts
    for high, flat, more in ((0.92, True, False), (0.95, False, True), (None, False, False)):
        share = Interval(value=0.7, low=None if high is None else 0.5, high=high)
        (text,) = warning(Locale(), replace(kept, agreement=share))
        assert ("Only 70.0" in text.text) == flat
        assert ("cannot tell" in text.text) != flat
        assert ("would tell" in text.text) == more
    enough = Interval(value=0.95, low=0.9, high=0.97)
    assert not warning(Locale(), replace(kept, agreement=enough))


def test_nobody_is_asked_for_more_questions_than_anybody_has():
    for count, shown in ((9_500, "9,500 questions"), (19_000, "too close")):
        assert shown in proof.needed(Locale(), count, "questions")
        assert proof.needed(JA, count, "questions")


SPAN = Interval(value=0.5, low=0.4, high=0.6)


@pytest.mark.parametrize(
    ("shown", "english", "japanese"),
    [
        (lambda t: t.number(1234.5, 1), "1,234.5", "1,234.5"),
        (lambda t: t.number(-0.0001, 2), "0.00", "0.00"),
        (lambda t: t.number(-3, 0), "−3", "−3"),
        (lambda t: t.signed(0.25, 2), "+0.25", "+0.25"),
        (lambda t: t.signed(0.001, 2), "0.00", "0.00"),
        (lambda t: t.level(181.74), "181.7", "181.7"),
        (lambda t: t.level(18174.1), "18,174", "18,174"),
        (lambda t: t.percent(0.1234), "12.3 %", "12.3%"),
        (lambda t: t.points(-0.0725), "−7.2 points", "−7.2ポイント"),
        (lambda t: t.times(1.255), "1.25×", "1.25倍"),
        (lambda t: t.ratio(1.0449), "1.045×", "1.045倍"),
        (lambda t: t.seconds(0.0123), "12.3 ms", "12.3ミリ秒"),
        (lambda t: t.seconds(3.456), "3.46 s", "3.46秒"),
        (lambda t: t.seconds(412.5), "412 s", "412秒"),
        (lambda t: t.size(2_400_000_000), "2.40 GB", "2.40 GB"),
        (lambda t: t.size(999), "999 B", "999 B"),
        (lambda t: t.large(1_200_000_000), "1.20 billion", "12.00億"),
        (lambda t: t.large(95_000), "95,000", "10万"),
        (lambda t: t.figure(0.93, "%"), "93.0 %", "93.0%"),
        (lambda t: t.figure(1.25, "x"), "1.25×", "1.25倍"),
        (lambda t: t.figure(512.25, "MB"), "512.2 MB", "512.2 MB"),
        (lambda t: t.figure(0.0812, "nats/token"), "0.0812 nats/token", "0.0812 nats/token"),
        (
            lambda t: t.moment("2026-11-24T03:37:22+09:00"),
            "2026-11-23 18:37 UTC",
            "2026年11月23日 18:37（UTC）",
        ),
        (lambda t: t.moment("yesterday"), "yesterday", "yesterday"),
        (lambda t: t.interval(SPAN, t.percent), "50.0 % (40.0 to 60.0)", "50.0%（40.0〜60.0）"),
        (lambda t: t.interval(SPAN, t.ratio), "0.500× (0.400 to 0.600)", "0.500倍（0.400〜0.600）"),
        (lambda t: t.interval(None, t.nats), "–", "–"),
        (lambda t: t.join(["a", "b"]), "a, b", "a、b"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_the_language_writes_them(shown, english, japanese):
    for words, expected in ((EN, english), (JA, japanese)):
        assert shown(words).translate(INVISIBLE) == expected


def test_what_is_filled_in_is_escaped_and_cannot_link_or_name_fields():
    words = {"k": 1, "n": 2, "started": "{n}", "model": "[[block|x]]<b>{k}"}
    shown = EN("page.subtitle", **words)
    assert "[[block|x]]&lt;b&gt;{k}" in shown
    assert "Run started {n}." in shown
    plain = Locale("en")("page.subtitle", **words)
    assert "[[block|x]]<b>{k}" in plain
    assert "href" not in plain
    with pytest.raises(InputError, match="en or ja"):
        Locale("de")


def test_the_japanese_page_has_no_english_sentence_of_ours():
    """What remains in English comes from the record: names, commands, checks' figures."""
    for record, chosen in ((repaired(), repaired_plan()), (sparse(), plan())):
        japanese = html(record, chosen, lang="ja")
        for key, text in sentences(EN):
            plain = LINK.sub(r"\2", text).strip()
            if len(plain) > 15 and "{" not in plain and key.split(".")[0] != "commands":
                assert plain not in japanese, key


def test_names_of_ours_in_a_record_are_in_the_page_s_language():
    """Rows of a file, texts and stages; what the user calls something stays as it is."""
    stages = json.loads((EXAMPLE / "run.json").read_text(encoding="utf-8"))["seconds"]
    ours = [*stages, BETWEEN, SELF_GENERATED, "default", "line 17", "row 3", "answers to p.jsonl"]
    theirs = re.compile(r"SmolLM2-135M-Instruct\.Q4_1\.gguf|p\.jsonl|heal")
    for name in ours:
        assert not re.search("[a-z]", theirs.sub("", JA.called(name))), name
        assert EN.called(name) == name
    assert JA.called("line 17") == "17行目"
    for name in ("wiki", "line by line", "my answers", "line 17\nline 18"):
        assert JA.called(name) == name
    record = repaired(seconds={"searching": 1.0, "loading <b>": 2.0})
    worst = replace(record.prompts.worst[0], id="line 17")
    record = put(record, "prompts.worst", (worst, *record.prompts.worst[1:]))
    found = seen(record, repaired_plan(), "ja")
    whole = "\n".join(found.text(part) for part in ["summary", *SECTIONS])
    assert "17行目" in whole
    assert "<b>の読み込み" in whole
    for text in ("line 17", "searching", "loading"):
        assert text not in whole
