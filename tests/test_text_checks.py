"""What a text shows: repetition, language, JSON, emptiness."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb.evaluation import answer_checks as text_checks
from sleb.evaluation.answer_checks import (
    first_difference,
    is_empty,
    is_json,
    language,
    repetition,
    script,
    switched,
    tells_languages,
)

TOKENS = st.lists(st.integers(0, 3), max_size=40)


@given(TOKENS)
def test_repetition_counts_what_was_there_before(tokens):
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert 0 <= repetition(tokens) < 1
    assert repetition(tokens) == pytest.approx(again / len(grams) if grams else 0)


def test_a_loop_repeats_and_a_count_does_not():
    assert repetition(range(100)) == 0
    assert repetition([5] * 103) == pytest.approx(0.99)
    assert repetition([1, 2, 3]) == 0


@given(TOKENS, TOKENS, TOKENS)
def test_texts_part_where_their_common_start_ends(start, a, b):
    n = first_difference(start + a, start + b)
    assert n == first_difference(start + b, start + a) >= len(start)
    assert (start + a)[:n] == (start + b)[:n]
    assert (start + a)[n : n + 1] != (start + b)[n : n + 1] or start + a == start + b


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Hello, Größe!", "Latin"),
        ("ＦＵＬＬ", "Latin"),
        ("Привет, world and", "Latin"),
        ("Привет, мир, ok", "Cyrillic"),
        ("東京", "Han"),
        ("今天天气很好", "Han"),
        ("今日は天気がいい", "Japanese"),
        ("ﾃｽﾄ", "Japanese"),
        ("データベース", "Japanese"),
        ("富士山は日本一高い山です。Mt. Fuji", "Japanese"),
        ("中文中文中文中文中文の", "Han"),
        ("안녕하세요", "Hangul"),
        ("नमस्ते", "Devanagari"),
        ("", ""),
        ("42 + 1 = 43 😀", ""),
    ],
)
def test_the_script_is_that_of_most_letters(text, name):
    assert script(text) == name


@given(st.text(), st.text())
def test_a_text_is_never_switched_against_itself(a, b):
    assert not switched(a, a)
    assert switched(a, b) == switched(b, a)
    assert script(a) == script(a + " 12!")


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("富士山です。", "Mount Fuji.", True),
        ("富士山です。", "富士山", False),
        ("富士山はとても高いです。", "日本最高的山是富士山非常非常高", True),
        ("Yes.", "", False),
        ("Yes.", "42!", False),
    ],
)
def test_switched_is_another_writing_system(before, after, changed):
    assert switched(before, after) is changed


GERMAN = (
    "Vielen Dank für Ihre Bestellung. Ihr Paket kommt voraussichtlich am Donnerstag bei Ihnen an."
)
ENGLISH = "Thank you very much for your order. We expect your parcel to be with you on Thursday."


def test_another_language_is_a_switch_where_it_is_sure():
    pytest.importorskip("py3langid")
    assert tells_languages()
    assert [language(text) for text in (GERMAN, ENGLISH)] == ["de", "en"]
    assert switched(GERMAN, ENGLISH)
    assert not switched(ENGLISH, "We thank you for the order, and the parcel will come on Friday.")
    for unclear in ("Ja.", "Oslo, Bergen, Trondheim", "import numpy as np", "{'a': 1}", ""):
        assert language(unclear) == ""
        assert not switched(unclear, ENGLISH)


def test_without_the_extra_scripts_alone_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    text_checks._identifier.cache_clear()
    try:
        assert not tells_languages()
        assert language(GERMAN) == ""
        assert not switched(GERMAN, ENGLISH)
        assert switched(GERMAN, "Ваша посылка")
    finally:
        text_checks._identifier.cache_clear()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_json_is_found_bare_and_in_a_fence(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert is_json(text)
    assert is_json(f"Here you are:\n```json\n{text}\n```\nAnything else?")
    assert is_json(f"```\n{text}\n```")
    assert not is_json(f"{text} and more")
    assert not is_json(f"```json\n{text},\n```")
    assert not is_json("[" + text)


@pytest.mark.parametrize("text", ["", "NaN", "[Infinity]", "{'a': 1}", "[" * 10**6, "```json\n{"])
def test_what_only_looks_like_json_is_not(text):
    assert not is_json(text)


@given(st.text(), st.text())
def test_text_is_empty_if_nothing_in_it_shows(a, b):
    assert is_empty(a + b) == (is_empty(a) and is_empty(b))


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u200d", "\x00\x1b", "\u3000\u00a0"])
def test_blanks_and_controls_do_not_show(text):
    assert is_empty(text)


@pytest.mark.parametrize("text", ["x", ".", "\ufffd", "😀", "。"])
def test_signs_do_show(text):
    assert not is_empty(text)
