"""The report as a file: complete, self-contained, valid, harmless, and the same every time."""

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest

import sleb
from cli_tools import refused, run, tree
from report_plan import bare_plan, plan, repaired_plan
from report_tools import (
    EVIL,
    INVISIBLE,
    PANELS,
    SECTIONS,
    Seen,
    big,
    complete,
    healed,
    hostile,
    html,
    page,
    put,
    repaired,
    save,
    seen,
    sparse,
)
from sleb.core.plan import Plan
from sleb.record import RunRecord
from sleb.views.charts import THEME, draw
from sleb.views.html import LONGEST, START, split
from sleb.views.locale import LANGUAGES, Locale
from sleb.views.model import Bars, Dots, Heat, Line
from sleb.views.report import write_report

NAN = float("nan")
IMAGE = '"><img src=x onerror=alert(1)>'


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_page_has_every_part_in_order(lang):
    found = seen(lang=lang, charts=True)
    parts = [i for i in found.ids if i in {*SECTIONS, *(f"sum-{p}" for p in PANELS), "summary"}]
    assert parts == ["summary", *(f"sum-{p}" for p in PANELS), *SECTIONS]
    assert [h for h in found.links if h.removeprefix("#") in SECTIONS] == [
        f"#{name}" for name in SECTIONS
    ]
    charts = [tag for tag, named in found.tags if tag == "svg" and named.get("role") == "img"]
    assert len(charts) == 5
    assert all(len(found.text(name)) > 30 for name in SECTIONS)
    assert dict(found.tags[0][1])["lang"] == lang


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_healed_model_s_page_shows_how_it_went(lang):
    found = seen(healed(), lang=lang, charts=True)
    assert "healed" in found.ids
    charts = [tag for tag, named in found.tags if tag == "svg" and named.get("role") == "img"]
    assert len(charts) == 6
    assert "6,000" in found.text("healed")
    assert "healed" not in seen(lang=lang).ids


@pytest.mark.parametrize(
    "made",
    [
        (complete(), plan(), "ja"),
        (repaired(), repaired_plan(), "en"),
        (sparse(), bare_plan(), "ja"),
        (*hostile(), "en"),
    ],
    ids=["full", "repaired", "bare", "hostile"],
)
def test_ids_are_unique_links_lead_somewhere_and_nothing_runs_or_is_fetched(made):
    source = html(*made, charts=True)
    found = Seen(source)
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") for link in found.links)
    inside = re.findall(r'(?:href="#|url\(#)([^")]+)', source)
    labels = {named.get("aria-labelledby") for _, named in found.tags} - {None}
    assert {*inside} | labels <= {*found.ids}
    assert not re.search(r"https?:|//[a-z]|@import", source.replace("xmlns", ""))
    for tag, named in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "img")
        assert not any(name.startswith("on") for name in named)
        for name in ("src", "href"):
            assert (named.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    policy = next(n["content"] for _, n in found.tags if n.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


@pytest.mark.parametrize("lang", LANGUAGES)
def test_html_in_names_and_texts_is_text(lang):
    evil = Seen(html(*hostile(), lang))
    assert {tag for tag, _ in evil.tags} == {tag for tag, _ in seen(lang=lang).tags}
    for place in set(SECTIONS) - {"map", "rounds", "similarity", "curve"} | {"summary"}:
        assert EVIL in evil.text(place) or IMAGE in evil.text(place), place
    assert f"</p>{IMAGE}" in evil.text("answers")


def test_a_large_run_makes_a_page_below_5_megabytes_with_all_answers():
    record, chosen = big()
    source = html(record, chosen, charts=True)
    assert len(source.encode()) < 5_000_000
    found = Seen(source)
    assert found.text("map").count("79") == 1
    assert found.text("answers").count("show the rest") == 2 * 200


def test_a_long_answer_is_whole_up_to_a_limit():
    text = "".join(f"{i} " for i in range(5000))
    start, rest = split(text, "[{characters} more]")
    assert len(start) <= START
    assert (start + rest).partition("\n[")[0] == text[:LONGEST]
    assert rest.endswith(f"[{len(text) - LONGEST:,} more]")
    assert split("short", "") == ("short", "")
    shown = seen(put(complete(), "answers.pairs.4.pruned.text", text)).text("answers")
    assert "… show the rest …" in shown


def test_the_same_record_gives_the_same_bytes_wherever_and_by_command(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    record = complete(removed=(8, 4, 7))  # in another order than the plan's
    here, elsewhere = (save(tmp_path / name, record, plan()) for name in ("run", "elsewhere"))
    for lang in LANGUAGES:
        ran = run(capsys, "report", here.name, "-o", f"cli.{lang}.html", "--lang", lang)
        assert (ran.code, ran.err) == (0, "")
        assert f"cli.{lang}.html" in ran.out
        ours = write_report([elsewhere], tmp_path / "lib.html", lang, force=True)
        assert (tmp_path / f"cli.{lang}.html").read_bytes() == ours.read_bytes()
    assert "合格" in ours.read_text(encoding="utf-8")
    assert run(capsys, "report", here.name, elsewhere.name, "-o", "both.html").code == 0
    assert "Runs compared: run, elsewhere" in Path("both.html").read_text(encoding="utf-8")


MISTAKES = {  # arguments: what to do before, and the nouns that matter
    "elsewhere -o report.html": (None, "no run record", "elsewhere/run.json"),
    "smaller -o report.html --lang jp": (None, "'jp'", "'ja'"),
    "smaller -o report.html": (lambda f: (f / "plan.json").unlink(), "smaller/plan.json"),
    "smaller  -o report.html": (lambda f: (f / "run.json").write_text("{}"), "smaller/run.json"),
    "smaller -o  report.html": (
        lambda f: plan(removed=(4, 7), order=(7, 4)).save(f / "plan.json"), "same run"),
    "smaller   -o report.html": (lambda f: complete(blocks=13).save(f / "run.json"), "of 13"),
    "smaller -o old": (lambda f: (f.parent / "old").write_text(""), "old exists", "--force"),
    "smaller -o old --force": (lambda f: (f.parent / "old").mkdir(), "old", "folder"),
    "smaller -o smaller/run.json/r.html": (None, "not a directory"),
    "smaller smaller -o report.html": (None, "given twice"),
    "smaller elsewhere -o report.html": (None, "no run record", "elsewhere/run.json"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    before, *nouns = MISTAKES[arguments]
    folder = save(tmp_path / "smaller", complete(), plan())
    if before:
        before(folder)
    was = tree(tmp_path)
    said = refused(capsys, 2, "report", *arguments.split())
    assert all(noun in said for noun in nouns), said
    assert tree(tmp_path) == was


def test_a_real_run_can_be_reported(tiny_dir, text_file, tmp_path):
    out, text = tmp_path / "smaller", [str(text_file)]
    sleb.prune(tiny_dir, out, remove=2, windows=4, heldout=4, length=32, text=text, curve=True)
    record, chosen = RunRecord.load(out), Plan.load(out / "plan.json")
    for lang in LANGUAGES:
        found = Seen(write_report([out], tmp_path / f"{lang}.html", lang).read_text("utf-8"))
        t = Locale(lang, markup=True)
        assert len(found.rows["curve"]) == 1 + len(chosen.curve.points)
        ratio = t.interval(record.evaluation.perplexity_ratio, t.ratio)
        assert ratio.translate(INVISIBLE) in found.text("texts")
        words = {*t.tables["checks"].values()}
        assert {row[0] for row in found.rows["exact"][1:]} <= words  # each has a key
        assert len(found.rows["exact"]) == 1 + len(record.verification.checks)
        assert chosen.model.weights_sha256 in found.text("provenance")
        repair = chosen.repair
        if repair is not None:
            assert repair.calibration.sha256 in found.text("provenance")
            assert repair.heldout.sha256 in found.text("provenance")


CHARTS = {i.name: i.chart for s in page().sections for i in s.items if i.kind == "figure"}


class Texts(HTMLParser):
    def __init__(self, svg):
        super().__init__()
        self.found = set()
        self.feed(str(svg))

    def handle_data(self, data):
        self.found.add(data.strip().replace("\u00a0", " "))


def texts(svg) -> set[str]:
    return Texts(svg).found


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_one_small_element_with_text_whatever_the_users_settings(name):
    svg = str(draw(CHARTS[name], name, 'what "it" <shows>'))
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    assert 'aria-label="what &#34;it&#34; &lt;shows&gt;"' in svg
    assert not {*re.findall("#[0-9a-f]{6}", svg)} & {*THEME}  # those follow the page
    assert not re.search(r"<style|<metadata|<!DOCTYPE|<\?xml|font-family|xlink|http", svg)
    assert not re.search(r"<svg[^>]* (width|height)=", svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert all(i.startswith(f"{name}-") for i in ids)
    assert {*re.findall(r'(?:href="#|url\(#)([^")]+)', svg)} <= {*ids}
    assert len(svg) < 60_000
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert str(draw(CHARTS[name], name, 'what "it" <shows>')) == svg


IMAGE_AT = r'<image[^>]*transform="matrix\((\S+) 0 0 (\S+) (\S+) (\S+)\)"'
BOX = r'<path d="M(\S+) ([^h]+)h([^v]+)v([^H]+)H[^"]*"><title>'


def test_a_cell_says_what_it_is_to_a_pointer():
    for name in ("rounds", "similarity"):
        chart = CHARTS[name]
        svg = str(draw(chart, name, ""))
        titles = re.findall(r"<title>([^<]*)</title>", svg)
        wide, high, left, top = map(float, re.search(IMAGE_AT, svg).groups())
        boxes = [[*map(float, box)] for box in re.findall(BOX, svg)]
        places = [(i, j) for i, row in enumerate(chart.values) for j, v in enumerate(row) if v == v]
        for (i, j), box in zip(places, boxes, strict=True):  # each lies over its cell
            expected = [left + j * wide, top + i * high, wide, high]
            assert box == pytest.approx(expected, abs=0.2)
        known = [
            f"{chart.row_label} {row}, {chart.column_label} {column}: "
            for row, values in zip(chart.rows, chart.values, strict=True)
            for column, value in zip(chart.columns, values, strict=True)
            if value == value
        ]
        assert [title[: title.index(": ") + 2] for title in titles] == known
        assert all(float(title.partition(": ")[2].replace("−", "-")) < 9 for title in titles)


def test_the_best_candidate_of_a_round_costs_nothing_more():
    titles = re.findall(r"<title>([^<]*)</title>", str(draw(CHARTS["rounds"], "a", "")))
    best = [title.partition(":")[0] for title in titles if title.endswith(": 0")]
    crosses = [(str(i + 1), str(j)) for i, j in CHARTS["rounds"].crosses]
    assert best == [f"round {i}, block {j}" for i, j in crosses]


def test_labels_are_those_of_the_page():
    for name, shown in {
        "rounds": {"round", "block", "nats/token above best", "1", "2", "3", "11"},
        "curve": {"this model", "blocks removed", "loss increase, nats/token"},
        "memory": {"2.40 GB", "2.52 GB", "peak to expect"},
    }.items():
        assert shown <= texts(draw(CHARTS[name], "a", ""))


LINE = {"x": (1, 2, 3), "y": (0.1, 0.2, 0.4), "low": (0.05, 0.1, 0.3), "high": (0.15, 0.3, 0.5)}
LINE |= {"chosen": (3, 0.3, 0.25, 0.35), "chosen_label": "here", "x_label": "x", "y_label": "y"}
HEAT = {"row_label": "r", "column_label": "c", "unit": "u", "columns": ("0",), "rows": ("1",)}
DOTS = {"rows": ("$a_1 <b>",), "measured": "m", "label": "l", "low": (None,), "high": (None,)}
BARS = {"groups": ("日本",), "mark_label": "k", "label": "MB", "shown": (("0 B",),)}


@pytest.mark.parametrize(
    ("chart", "shown"),
    [
        (Line(**LINE), "here"),
        (Line(**{**LINE, "low": (None,) * 3, "high": (None,) * 3, "chosen": None}), "x"),
        (Line(**{**LINE, "x": (1,), "y": (0.1,), "low": (0.0,), "high": (0.2,)}), "y"),
        (Line(**{**LINE, "chosen": (3, 0.3, None, None), "below": True}), "here"),
        (Heat(**HEAT, values=((0.5,),)), "u"),
        (Heat(**HEAT, values=((1e-4,),), log=True, crosses=((0, 0),), dots=((0, 0),)), "c"),
        (Heat(**HEAT, values=((1.0,),), square=True), "r"),
        (Dots(**DOTS, values=(1.2,), references=(("i", (None,)), ("p", (1.3,)))), "$a_1 <b>"),
        (Bars(**BARS, series=(("w", (0.0,)),), marks=((None,),)), "日本"),
        (Bars(**BARS, series=(("w", (5e6,)),), marks=((9e6,),)), "k"),
    ],
)
def test_charts_of_little_are_drawn(chart, shown):
    assert shown in texts(draw(chart, "x", ""))
