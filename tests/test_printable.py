"""Text from files is shown only through one function: hostile text behind every door."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_tools import run
from sleb.core.errors import SlebError
from sleb.core.printable import LONGEST_MESSAGE, printable, printable_json

FORBIDDEN = set(map(chr, [*range(32), *range(127, 160), *range(0xD800, 0xE000)]))
FORBIDDEN |= set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FORBIDDEN |= set("\u2028\u2029\u200b\ufeff")
ESCAPES = "\x1b[2J\x1b[31mPASSED\x1b]0;owned\x07"
HOSTILE = {
    "escapes": ESCAPES,
    "carriage return": "good\rpassed",
    "lines": "a\nsleb: all gates passed\n",
    "bidi": "\u202egate\u2066",
    "separators": "a\u2028b\u0085c\x9b31m",
    "long": "x" * 2**20,
}
# what a path, or an argument of a process, can hold
NAMES = {**HOSTILE, "long": "x" * 200}
hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
hostile_name = pytest.mark.parametrize("text", NAMES.values(), ids=NAMES)


def harmless(text: str, longest: int = 12_000) -> None:
    """No character that a terminal obeys, but for the ends of lines, which are not very long."""
    for line in text.split("\n"):
        assert not FORBIDDEN & set(line), ascii(line[:300])
        assert len(line) <= longest
    assert "\nsleb: all gates" not in text


def one_line(capsys, *arguments, longest: int = 2 * LONGEST_MESSAGE) -> str:
    """Run what must fail as a mistake does: with one harmless line."""
    ran = run(capsys, *arguments)
    assert 2 <= ran.code <= 6, ran.err[:500]
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1
    harmless(ran.err, longest)
    return ran.err


# -- the function --------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=())) | st.binary().map(lambda b: b.decode("latin")))
def test_what_is_printable_is_harmless_and_short(text):
    shown = printable(text, 50)
    assert not FORBIDDEN & set(shown)
    assert len(shown) <= 50
    shown.encode()
    assert printable(shown, 50) == shown
    if len(text) <= 50 and not FORBIDDEN & set(text) and text.isprintable():
        assert shown == text


@given(st.recursive(st.text(st.characters(exclude_categories=())), lambda s: st.lists(s)))
def test_printable_json_is_the_same_json(value):
    text = printable_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value
    assert not (FORBIDDEN - {"\n"}) & set(text)


def test_controls_are_shown_as_escapes_and_the_end_is_kept_where_asked():
    assert printable("a\x1b[1m\u202e\U000e0041") == "a\\x1b[1m\\u202e\\U000e0041"
    assert printable("日本 été ‌") == "日本 été ‌"
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\x0d"
    assert printable("abcdefgh" * 9, 10, ending=3) == "abcdef…fgh"
    assert printable("x" * 999, None) == "x" * 999


@hostile
def test_every_error_is_one_harmless_line(text):
    message = str(SlebError(f"no {text} here; try another"))
    harmless(message, LONGEST_MESSAGE)
    assert "\n" not in message
    assert message.endswith("try another")
