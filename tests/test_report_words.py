"""Both languages say the same things, in words that the page explains, with their own numbers."""

from __future__ import annotations

import re
import string
from pathlib import Path
from unittest.mock import patch

import pytest
from sleb.evaluation.gate import Gate
from typer.main import get_command

from report_plan import bare_plan, plan, repaired_plan, run_plan
from report_record import complete, gate, repaired, sparse, verification
from report_tools import html, page, put, seen
from sleb.cli.main import app
from sleb.core.errors import InputError
from sleb.core.plan import SimilarityGate, Target
from sleb.core.statistics import Interval
from sleb.evaluation import limits
from sleb.selection.metrics import METRICS
from sleb.selection.strategies import GREEDY_OR_WINDOW
from sleb.surgery import verification as gates
from sleb.views.locale import LANGUAGES, LINK, Words, bounds

EN, JA = (Words(lang) for lang in LANGUAGES)


def sentences(words):
    for table, entries in words.tables.items():
        for key, value in entries.items():
            for i, text in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(text, str):
                    yield f"{table}.{key}.{i}", text


def fields(text):
    return sorted(
        {name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(text) if name}
    )


def test_both_languages_have_the_same_keys_in_the_same_order():
    keys = [[(t, [*entries]) for t, entries in words.tables.items()] for words in (EN, JA)]
    assert keys[0] == keys[1]


def test_both_languages_fill_in_the_same_things():
    japanese = dict(sentences(JA))
    for key, text in sentences(EN):
        assert fields(text) == fields(japanese[key]), key


@pytest.mark.parametrize("words", [EN, JA], ids=LANGUAGES)
def test_every_linked_term_is_in_the_glossary_and_every_term_is_linked(words):
    linked = {m[1] for _, text in sentences(words) for m in LINK.finditer(text)}
    assert linked == {*words.tables["glossary"]}
    assert not [key for key, text in sentences(words) if "[[" in LINK.sub("", text)]


@pytest.mark.parametrize("words", [EN, JA], ids=LANGUAGES)
def test_sentences_are_written_out_and_spaced_as_the_language_is(words):
    for key, text in sentences(words):
        table, name, _ = key.split(".")
        assert "  " not in text
        assert text or key == "exact.note.0"
        if table == "commands" or (table, name) == ("format", "comma"):
            continue
        joined = table in ("why", "rounds", "answers") and words is EN
        assert text == text.strip() or joined, key
        plain = LINK.sub(r"\2", text)
        if words is EN:
            assert not re.search(r"[\u3000-\u9fff]", plain), key
        elif re.search(r"[A-Za-z]{3,} [a-z]{2,} ", re.sub(r"\{.*?\}|sleb \w+", "", plain)):
            raise AssertionError(f"{key} looks like English")


def variety():
    """Records and plans that between them have the report say all that it can."""
    full, chosen = complete(), plan()
    alone = Interval(value=1.5, low=None, high=None)
    first = chosen.rounds[0]
    worse = put(chosen, "rounds.0.scores.0.mean", 2.95)
    runtimes = put(full.speed, "ratios.0.runtime", "vllm")
    many = put(full.speed, "ratios", full.speed.ratios * 2)
    texts = dict.fromkeys("abcdefg", full.evaluation.domains["mail"])
    same = tuple(p for p in full.answers.pairs if p.identical)
    gated = put(gate(), "rows.3.missing", "the record has no 'x'; run: sleb bench MODEL OUT")
    chosen_by = SimilarityGate(measure="cosine", threshold=0.9, candidates=(4, 7, 8))
    won = put(put(full, "tasks.0.flips.won", 90), "tasks.1.flips", None)
    long = put(full, "answers.pairs.4.pruned.text", "word " * 9000)
    targets = {"remove": 3, "speedup": 1.2, "size": 2e9}
    yield from [(full, chosen), (sparse(), bare_plan()), (full, worse), (long, chosen)]
    yield repaired(), repaired_plan()
    yield repaired(), put(repaired_plan(), "curve.fitted", 8192)
    yield full, put(worse, "rounds.0.scores.1.windows", 9)
    yield full, put(chosen, "rounds.0.scores.1.block", 4)
    yield full, plan(similarity=chosen_by)
    for kind, limit in targets.items():
        yield full, plan(target=Target(kind=kind, limit=limit, reached=limit))
    whole = complete(removed=(7, 8, 9))
    for scores in (
        first.scores,
        put(worse, "rounds.0.scores.1.windows", 9).rounds[0].scores,
        worse.rounds[0].scores,
        put(chosen, "rounds.0.scores.1.excess_se", 1.0).rounds[0].scores,
    ):
        rounds = (put(first, "scores", scores),)
        yield whole, run_plan(rounds)
    yield whole, run_plan((first,), excess=0.001)
    ordered = tuple(s for s in first.scores if s.block == 7)
    only = plan(
        order=(7,), removed=(7,), strategy="refine", rounds=(put(first, "scores", ordered),)
    )
    yield complete(removed=(7,)), only
    for other in (
        complete(gate=gate(passed=True)),
        complete(gate=gated, verification=verification(failed=True)),
        complete(speed=runtimes),
        complete(speed=many),
        put(full, "evaluation.domains", texts),
        put(full, "answers.pairs", same),
        put(full, "answers.languages", False),
        put(full, "speed.ratios.3.ratio", alone),
        put(full, "speed.ratios.3.ratio", Interval(value=0.9, low=0.8, high=1.1)),
        put(full, "started", "2026"),
        put(full, "evaluation_note", "3 windows from a.txt"),
        won,
    ):
        yield other, chosen


def test_every_sentence_is_said_sometimes_and_none_is_missing():
    said = set()

    def raw(self, key):
        said.add(key)
        return plain(self, key)

    plain = Words.raw
    with patch.object(Words, "raw", raw):
        for record, chosen in variety():
            page(record, chosen)
    by_name = {"limits", "reasons", "checks", "environment", "metrics", "strategies", "glossary"}
    known = {f"{t}.{k}" for t, found in EN.tables.items() if t not in by_name for k in found}
    assert known - said == {"format.large"}


@pytest.mark.parametrize("words", [EN, JA], ids=LANGUAGES)
def test_names_of_the_record_have_words(words):
    """What the library can write into a record is told in the reader's language."""
    assert {*METRICS} == {*words.tables["metrics"]}
    assert {*words.tables["strategies"]} == set(GREEDY_OR_WINDOW.split("-or-"))
    checks = Path(gates.__file__).read_text()
    for name in words.tables["checks"]:
        assert f'"{name}"' in checks
    assert {c.name for r in (complete(), repaired()) for c in r.verification.checks} == {
        *words.tables["checks"]
    }
    source = Path(limits.__file__).read_text()
    for reason in words.tables["reasons"]:
        assert reason in source
    rows = [*Gate.parse(EVERY_LIMIT, "gate").check(sparse()).rows]
    rows += Gate.parse(EVERY_LIMIT, "gate").check(complete()).rows
    for row in rows:
        head, _, rest = row.name.partition(", ")
        assert head in words.tables["limits"]
        assert head != "answers" or rest in words.tables["limits"]
        missing = row.missing.partition("; run: ")[0]
        assert not missing or missing in words.tables["reasons"]


EVERY_LIMIT = {
    "perplexity": {"max_ratio": 1.2},
    "divergence": {"max": 0.1},
    "agreement": {"min": 0.9},
    "tasks": {"min_retention": 0.9},
    "answers": {
        **{f"max_{name}": 0.1 for name in ("repetitive", "empty", "unfinished", "switched")},
        "min_json_valid": 0.9,
    },
    "speed": {"min_speedup": 1.1},
    "memory": {"max_mb": 100},
    "size": {"max_mb": 100},
}


@pytest.mark.parametrize("key", [*EN.tables["commands"]])
def test_commands_on_the_page_exist(key):
    verb, *arguments = EN.raw(f"commands.{key}").removeprefix("sleb ").split()
    command = get_command(app).commands[verb]
    options = {o for p in command.params for o in p.opts}
    assert {a for a in arguments if a.startswith("-")} <= options
    assert EN.raw(f"commands.{key}") == JA.raw(f"commands.{key}")


MORNING = ("2026-11-24 03:07 UTC", "2026年11月24日 03:07（UTC）")
SPAN = Interval(value=0.5, low=0.4, high=0.6)


@pytest.mark.parametrize(
    ("shown", "english", "japanese"),
    [
        (lambda w: w.number(1234.5, 1), "1,234.5", "1,234.5"),
        (lambda w: w.number(-0.0001, 2), "0.00", "0.00"),
        (lambda w: w.number(-3, 0), "−3", "−3"),
        (lambda w: w.signed(0.25, 2), "+0.25", "+0.25"),
        (lambda w: w.signed(0.001, 2), "0.00", "0.00"),
        (lambda w: w.level(18.174), "18.17", "18.17"),
        (lambda w: w.level(181.74), "181.7", "181.7"),
        (lambda w: w.level(18174.1), "18,174", "18,174"),
        (lambda w: w.percent(0.1234), "12.3 %", "12.3%"),
        (lambda w: w.points(-0.0725), "−7.2 points", "−7.2ポイント"),
        (lambda w: w.times(1.255), "1.25×", "1.25倍"),
        (lambda w: w.ratio(1.0449), "1.045×", "1.045倍"),
        (lambda w: w.seconds(0.0123), "12.3 ms", "12.3ミリ秒"),
        (lambda w: w.seconds(0.285), "285 ms", "285ミリ秒"),
        (lambda w: w.seconds(3.456), "3.46 s", "3.46秒"),
        (lambda w: w.seconds(412.5), "412 s", "412秒"),
        (lambda w: w.size(2_400_000_000), "2.40 GB", "2.40 GB"),
        (lambda w: w.size(1_000), "1.0 kB", "1.0 kB"),
        (lambda w: w.size(999), "999 B", "999 B"),
        (lambda w: w.large(1_200_000_000), "1.20 billion", "12.00億"),
        (lambda w: w.large(134_500_000), "134.5 million", "1.34億"),
        (lambda w: w.large(95_000), "95,000", "10万"),
        (lambda w: w.p_value(0.0004), "p < 0.001", "p < 0.001"),
        (lambda w: w.p_value(0.05), "p = 0.050", "p = 0.050"),
        (lambda w: w.measured(0.93, "%"), "93.0 %", "93.0%"),
        (lambda w: w.measured(1.25, "x"), "1.25×", "1.25倍"),
        (lambda w: w.measured(512.25, "MB"), "512.2 MB", "512.2 MB"),
        (lambda w: w.measured(0.0812, "nats/token"), "0.0812 nats/token", "0.0812 nats/token"),
        (
            lambda w: w.moment("2026-11-24T03:37:22+00:00"),
            "2026-11-24 03:37 UTC",
            "2026年11月24日 03:37（UTC）",
        ),
        (
            lambda w: w.moment("2026-11-24T03:37:22+09:00"),
            "2026-11-23 18:37 UTC",
            "2026年11月23日 18:37（UTC）",
        ),
        (lambda w: w.moment("yesterday"), "yesterday", "yesterday"),
        (lambda w: w.interval(SPAN, w.percent), "50.0 % (40.0 to 60.0)", "50.0%（40.0〜60.0）"),
        (lambda w: w.interval(SPAN, w.seconds), "500 ms (400 to 600)", "500ミリ秒（400〜600）"),
        (
            lambda w: w.interval(SPAN, w.nats),
            "0.5000 (0.4000 to 0.6000)",
            "0.5000（0.4000〜0.6000）",
        ),
        (lambda w: w.join(["a", "b"]), "a, b", "a、b"),
    ],
)
def test_numbers_are_written_as_the_language_writes_them(shown, english, japanese):
    for words, expected in ((EN, english), (JA, japanese)):
        assert shown(words).replace("\u00a0", " ").replace("\u2060", "") == expected


def test_units_that_differ_within_an_interval_are_all_said():
    wide = Interval(value=1.25, low=0.5, high=2.0)
    assert EN.interval(wide, EN.seconds) == "1.25\u00a0s (500\u00a0ms\u00a0to\u00a02.00)"
    assert bounds(wide) == (0.5, 2.0)
    assert bounds(Interval(value=1.0, low=1.0, high=float("nan"))) is None


def test_what_is_filled_in_is_escaped_and_cannot_link_or_name_fields():
    shown = EN("page.subtitle", k=1, n=2, started="{n}", model="[[block|x]]<b>{k}")
    assert "[[block|x]]&lt;b&gt;{k}" in shown
    assert "Run started {n}." in shown
    assert EN.plain("map.kept_label", block="{turn}<b>") == "block {turn}<b>: kept"


def test_an_unknown_language_is_refused():
    with pytest.raises(InputError, match="give en or ja"):
        Words("de")


@pytest.mark.parametrize(
    ("record", "chosen"),
    [(complete(), plan()), (repaired(), repaired_plan()), (sparse(), plan())],
    ids=["full", "repaired", "bare"],
)
def test_the_japanese_page_has_no_english_sentence_of_ours(record, chosen):
    """What remains in English comes from the record: names, commands, checks' figures."""
    japanese = html(record, chosen, lang="ja")
    for key, text in sentences(EN):
        plain = LINK.sub(r"\2", text).strip()
        if len(plain) > 15 and "{" not in plain and key.split(".")[0] != "commands":
            assert plain not in japanese, key


def test_the_japanese_page_says_the_verdict_and_the_figures():
    found = seen(lang="ja")
    assert "不合格" in found.text("summary")
    assert "設定した基準4件のうち2件を満たしていません。" in found.text("summary")
    assert "1.105倍（1.087〜1.123）" in found.text("sum-quality")
    assert "毎秒4,000トークンの負荷では" in found.text("sum-servers")
    assert "ブロック4は、ラウンド2の候補9個のうち1位でした（スコア2.9800）。" in found.text("why")
