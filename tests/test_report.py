"""The report as a file: complete, self-contained, valid, harmless, and the same every time."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
from sleb.views.answers import LONGEST, START

import sleb
from cli_tools import refused, run, tree
from report_plan import bare_plan, plan, repaired_plan
from report_record import (
    answer,
    complete,
    gate,
    pair,
    repaired,
    save,
    similarity,
    sparse,
    verification,
)
from report_tools import INVISIBLE, Seen, html, page, put, seen
from sleb.core.errors import InputError
from sleb.core.plan import Plan
from sleb.record import RunRecord
from sleb.views import write_report
from sleb.views.locale import LANGUAGES, Words

PANELS = ["removed", "quality", "saved", "servers", "untested", "rollback"]
SECTIONS = [
    *("map", "why", "rounds", "similarity", "curve", "texts", "tasks", "answers", "speed"),
    *("transfer", "exact", "gate", "provenance"),
]
EVIL = "<script>alert(1)</script>"


def hostile():
    """A record and a plan in which whatever a person names is HTML."""
    image = '"><img src=x onerror=alert(1)>'
    record = repaired(command=EVIL, model=f"models/{EVIL}", environment={"device": image})
    record = put(record, "verification.checkpoint", image)
    both = {EVIL: record.evaluation, image: record.evaluation}
    record = put(record, "evaluation.domains", both)
    record = put(record, "evaluation.unrepaired.domains", both)
    record = put(record, "tasks.0.name", EVIL)
    record = put(record, "tasks.1.metric", image)
    record = put(record, "answers.pairs.4.prompt", EVIL)
    record = put(record, "answers.pairs.4.id", image)
    record = put(record, "answers.pairs.4.pruned.text", f"</p>{image}")
    record = put(record, "answers.pairs.3.pruned.script", EVIL)
    record = put(record, "speed.skipped", (EVIL, image))
    record = put(record, "speed.device", EVIL)
    record = put(record, "transfer.domains", (EVIL, image))
    record = put(record, "gate.rows.2.name", f"perplexity ratio, {EVIL}")
    record = put(record, "gate.rows.3.missing", f"{image}; run: {EVIL}")
    record = put(record, "verification.checks.0.measured", EVIL)
    record = put(record, "evaluation_note", f"1 windows from {EVIL}")
    chosen = repaired_plan(metric=EVIL, strategy=image, unit=EVIL, versions={EVIL: image})
    for losses in ("before", "after"):
        chosen = put(chosen, f"repair.gaps.0.{losses}", {EVIL: 3.2, image: 3.1})
    chosen = put(chosen, "repair.calibration.sources.0.spec", image)
    return record, put(chosen, "calibration.sources.0.spec", EVIL)


def big():
    """80 blocks of which 16 leave, and 200 prompts with long answers."""
    blocks, order = 80, tuple(range(10, 58, 3))
    score = plan().rounds[0].scores[0]

    def scores(gone):
        live = [b for b in range(1, 79) if b not in gone]
        return tuple(score.model_copy(update={"block": b, "mean": 2.9 + b / 97}) for b in live)

    rounds = tuple(
        put(put(plan().rounds[0], "scores", scores(order[:i])), "removed", (block,))
        for i, block in enumerate(order)
    )
    chosen = put(plan(), "model.blocks", blocks)
    chosen = chosen.model_copy(
        update={"removed": order, "order": order, "rounds": rounds, "protected": (0, 79)}
    )
    record = complete(removed=order, blocks=blocks)
    alike = similarity()[0]
    states = tuple(tuple(alike[abs(i - j) % 13] for j in range(81)) for i in range(81))
    text = "an answer of many words " * 400
    pairs = tuple(
        pair(i, text, answer(text), answer(text, ended=False), i % 40) for i in range(200)
    )
    return put(replace(record, similarity=states), "answers.pairs", pairs), chosen


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_page_has_every_part_in_order(lang):
    found = seen(lang=lang, charts=True)
    parts = [i for i in found.ids if i in {*SECTIONS, *(f"sum-{p}" for p in PANELS), "summary"}]
    assert parts == ["summary", *(f"sum-{p}" for p in PANELS), *SECTIONS]
    assert [h for h in found.links[:] if h.removeprefix("#") in SECTIONS] == [
        f"#{name}" for name in SECTIONS
    ]
    charts = [tag for tag, named in found.tags if tag == "svg" and named["role"] == "img"]
    assert len(charts) == 5
    for name in SECTIONS:
        assert len(found.text(name)) > 30
    assert dict(found.tags[0][1])["lang"] == lang


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(
    "made",
    [(complete, plan), (repaired, repaired_plan), (sparse, bare_plan)],
    ids=["full", "repaired", "bare"],
)
def test_ids_are_unique_and_links_lead_somewhere(lang, made):
    record, chosen = (make() for make in made)
    source = html(record, chosen, lang, charts=True)
    found = Seen(source)
    assert len(found.ids) == len(set(found.ids))
    assert found.links
    assert all(link.startswith("#") for link in found.links)
    inside = re.findall(r'(?:href="#|url\(#)([^")]+)', source)
    assert {*inside} <= {*found.ids}
    labels = [named.get("aria-labelledby") for _, named in found.tags]
    assert {name for name in labels if name} <= {*found.ids}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_nothing_is_fetched_and_nothing_runs(lang):
    source = html(lang=lang, charts=True)
    found = Seen(source)
    assert not re.search(r"https?:|//[a-z]", source.replace("xmlns", ""))
    assert "script" not in {tag for tag, _ in found.tags}
    for tag, named in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert not any(name.startswith("on") for name in named)
        for name in ("src", "href"):
            assert (named.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    policy = next(n["content"] for _, n in found.tags if n.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert "@import" not in source


@pytest.mark.parametrize("lang", LANGUAGES)
def test_html_in_names_and_texts_is_text(lang):
    record, chosen = hostile()
    source = html(record, chosen, lang, charts=True)
    plain, evil = seen(lang=lang, charts=True), Seen(source)
    assert "<script" not in source
    assert "<img" not in source
    assert {tag for tag, _ in evil.tags} == {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, named in evil.tags for name in named)
    for place in ("summary", "texts", "tasks", "answers", "speed", "transfer", "exact", "gate"):
        assert EVIL in evil.text(place), place
    for place in ("provenance", "why", "rounds"):
        assert EVIL in evil.text(place), place
    assert evil.text("texts").count(EVIL) == 1 + 2  # the source; by text, and by gap
    assert '</p>"><img src=x onerror=alert(1)>' in evil.text("answers")


def test_a_large_run_makes_a_page_below_3_megabytes():
    record, chosen = big()
    source = html(record, chosen, charts=True)
    assert len(source.encode()) < 3_000_000
    found = Seen(source)
    assert found.text("map").count("79") == 1
    assert found.text("answers").count("show the rest") == 3 * 6


def test_a_long_answer_is_whole_up_to_a_limit():
    text = "".join(f"{i} " for i in range(5000))
    record = put(complete(), "answers.pairs.4.pruned.text", text)
    shown = seen(record).text("answers")
    assert "… show the rest …" in shown
    first = next(p for p in page(record).sections if p.name == "answers").items
    pruned = next(i for i in first if i.kind == "answers").pruned
    assert len(pruned.start) <= START
    whole = (pruned.start + pruned.rest).partition("\n[")[0]
    assert whole == text[:LONGEST]
    assert f"[{len(text) - LONGEST:,} more characters are in run.json]" in pruned.rest


def test_the_same_record_gives_the_same_bytes(tmp_path):
    folder = save(tmp_path / "run", complete(), plan())
    pages = [write_report(folder, tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]
    again = save(tmp_path / "elsewhere", complete(), plan())
    assert write_report(again, tmp_path / "c.html").read_bytes() == pages[0]


@pytest.mark.parametrize("changes", [{"removed": (4, 7)}, {"removed": (4, 7, 9)}, {"blocks": 13}])
def test_record_and_plan_of_different_runs_are_refused(tmp_path, changes):
    folder = save(tmp_path / "run", complete(**changes), plan())
    with pytest.raises(InputError, match="not of the same run"):
        write_report(folder, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_order_that_differs_from_the_sorted_removal_is_fine(tmp_path):
    folder = save(tmp_path / "run", complete(removed=(8, 4, 7)), plan())
    assert write_report(folder, tmp_path / "report.html").exists()


def test_the_command_writes_the_file_that_the_library_does(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "smaller", complete(gate=gate(passed=True)), plan())
    for lang in LANGUAGES:
        ran = run(capsys, "report", "smaller", "-o", f"cli.{lang}.html", "--lang", lang)
        assert (ran.code, ran.out, ran.err) == (0, f"report written to cli.{lang}.html\n", "")
        write_report(tmp_path / "smaller", tmp_path / "lib.html", lang, force=True)
        page = (tmp_path / f"cli.{lang}.html").read_text(encoding="utf-8")
        assert page == (tmp_path / "lib.html").read_text(encoding="utf-8")
    assert "合格" in page


def mistakes():
    """What can be wrong, as: what to do before, arguments, and the message."""

    def no_plan(folder):
        (folder / "plan.json").unlink()

    def broken(folder):
        (folder / "run.json").write_text('{"command": 1}')

    def other(folder):
        plan(removed=(4, 7), order=(7, 4)).save(folder / "plan.json")

    def nothing(folder):
        pass

    def old(folder):
        (folder.parent / "old.html").write_text("old")

    def is_folder(folder):
        (folder.parent / "old.html").mkdir()

    to = ("-o", "report.html")
    return [
        (nothing, ("elsewhere", *to), "no run record at elsewhere/run.json; sleb prune and"),
        (
            nothing,
            ("smaller", *to, "--lang", "jp"),
            "--lang 'jp' is not known (did you mean 'ja'?); give en or ja",
        ),
        (nothing, ("smaller", *to, "--lang", "e"), "--lang 'e' is not known"),
        (no_plan, ("smaller", *to), "no plan at smaller/plan.json"),
        (broken, ("smaller", *to), "smaller/run.json is not a run record: command: "),
        (other, ("smaller", *to), "run.json removes blocks [4, 7, 8] of 12, but plan.json"),
        (old, ("smaller", "-o", "old.html"), "old.html exists; choose another -o, or pass --force"),
        (is_folder, ("smaller", "-o", "old.html", "--force"), "old.html is a folder, not a file"),
        (nothing, ("smaller", "-o", "smaller/run.json/r.html"), "is not a directory"),
    ]


@pytest.mark.parametrize(("before", "arguments", "said"), mistakes())
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, before, arguments, said
):
    monkeypatch.chdir(tmp_path)
    before(save(tmp_path / "smaller", complete(), plan()))
    was = tree(tmp_path)
    assert said in refused(capsys, 2, "report", *arguments)
    assert tree(tmp_path) == was


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_the_message_says_what_to_install(tmp_path, capsys, monkeypatch, package):
    folder = save(tmp_path / "smaller", complete(), plan())
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, 2, "report", folder, "-o", tmp_path / "r.html")
    assert said == "a report needs jinja2 and matplotlib: pip install 'sleb[report]'"


def test_force_replaces_a_report(tmp_path):
    folder = save(tmp_path / "run", complete(), plan())
    out = tmp_path / "report.html"
    out.write_text("old")
    write_report(folder, out, force=True)
    assert "clerk-1b" in out.read_text(encoding="utf-8")


def test_a_checkpoint_that_is_not_exact_is_called_so_above_all():
    for judged in (None, gate(passed=True), gate()):
        for fixed, chosen, checks in ((False, plan(), 6), (True, repaired_plan(), 7)):
            broken = verification(failed=True, repaired=fixed)
            made = page(complete(gate=judged, verification=broken), chosen)
            assert (made.verdict.tone, made.verdict.headline) == ("bad", "Not exact: do not use")
            assert f"failed: 1 of {checks}" in made.verdict.text
            assert "is not what the plan makes of the original" in made.verdict.text
    assert page().verdict.headline == "Not passed"


def test_a_real_run_can_be_reported(tiny_dir, text_file, tmp_path):
    out = tmp_path / "smaller"
    sleb.prune(
        tiny_dir, out, remove=2, windows=4, heldout=4, length=32, text=[str(text_file)], curve=True
    )
    record, chosen = RunRecord.load(out), Plan.load(out / "plan.json")
    for lang in LANGUAGES:
        source = write_report(out, tmp_path / f"{lang}.html", lang).read_text(encoding="utf-8")
        found = Seen(source)
        assert len(found.ids) == len(set(found.ids))
        assert chosen.model.weights_sha256 in found.text("provenance")
        assert len(found.rows["curve"]) == 1 + len(chosen.curve.points)
        ratio = Words(lang).interval(record.evaluation.perplexity_ratio, Words(lang).ratio)
        assert ratio.translate(INVISIBLE) in found.text("sum-quality")
        assert len(found.rows["exact"]) == 1 + len(record.verification.checks)
        say = Words(lang)
        checks = {check.name for check in record.verification.checks}
        assert checks <= {*say.tables["checks"]}
        if chosen.repair is None:
            assert found.text("sum-removed").count(say.raw("repair.none")) == 1
            continue
        plain = say.interval(record.evaluation.unrepaired.perplexity_ratio, say.ratio)
        assert found.text("texts").count(plain.translate(INVISIBLE)) >= 2
        assert "weights equal the original's, but for the repaired" in checks
        assert chosen.repair.calibration.sha256 in found.text("provenance")
        assert chosen.repair.heldout.sha256 in found.text("provenance")
