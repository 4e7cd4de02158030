"""What can be told of an answer from its tokens or its text alone."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # control, format, spaces and separators
_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)

# First words of Unicode names that are not those of a writing system; Kana is made of two.
_KANA = dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "Kana")
_SYSTEMS = {**_KANA, "CJK": "Han", "IDEOGRAPHIC": "Han"}

SHORT = 10  # letters: fewer kanji may be a Japanese answer without kana
# At this confidence 3 of 9,600 pieces of English were taken for another language (30 to 300
# characters; as they are, shuffled, looped or mangled), and of those of 120 characters as they are,
# 82 % were told.
SURE = 0.95


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of ``tokens`` that were there before, 0..1; 0 if there are none.

    Welleck et al., Neural Text Generation with Unlikelihood Training (2020): seq-rep-n.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def script(text: str) -> str:
    """The writing system of most letters: Latin, Cyrillic, Han, Japanese, Hangul, ...; empty if
    there are no letters.

    It is the first word of a letter's Unicode name, after width and style are folded (NFKC). Kana
    with Han are Japanese, if the kana are at least a tenth of both.
    """
    names = (
        unicodedata.name(c, "").partition(" ")[0]
        for c in unicodedata.normalize("NFKC", text)
        if unicodedata.category(c).startswith("L")
    )
    counts = Counter(_SYSTEMS.get(name, name.capitalize()) for name in names if name)
    kana, han = counts["Kana"], counts["Han"]
    if kana and 9 * kana >= han:
        counts["Japanese"] = kana + han
        del counts["Kana"], counts["Han"]
    return max(counts, key=lambda name: counts[name]) if counts.total() else ""


def language(text: str) -> str:
    """The language that ``text`` is surely in (ISO 639 code, by py3langid); empty where that is not
    clear, as in short text, lists of names or code, or where py3langid is not installed."""
    identifier = _identifier()
    code = identifier.classify(text)[0] if identifier else ""
    return "" if code in ("und", "zxx") else str(code)  # undetermined, not a language


def tells_languages() -> bool:
    """Whether languages are told apart: this needs the extra ``lang``."""
    return _identifier() is not None


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid import langid
    except ImportError:
        return None
    return langid.LanguageIdentifier.from_model_file(
        langid.MODEL_FILE, norm_probs=True, min_confidence=SURE
    )


def switched(before: str, after: str) -> bool:
    """Whether ``after`` is in another writing system than ``before``, or surely in another language
    (see :func:`language`). Text without letters is in none, and a few Han letters may be Japanese.
    """
    a, b = script(before), script(after)
    if not a or not b:
        return False
    if a == b:
        known = {language(before), language(after)} - {""}
        return len(known) > 1
    if {a, b} == {"Han", "Japanese"}:
        han = before if a == "Han" else after
        return sum(c.isalpha() for c in han) >= SHORT
    return True


def json_of(text: str) -> Any:
    """The one JSON value (RFC 8259) that ``text``, or what is within its first ``` fence, is.

    Raises:
        ValueError, RecursionError: it is none.
    """
    fenced = _FENCE.search(text)
    return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)


def is_json(text: str) -> bool:
    """Whether ``text``, or what is within its first ``` fence, is one JSON value (RFC 8259)."""
    try:
        json_of(text)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def is_empty(text: str) -> bool:
    """Whether ``text`` has no visible character."""
    return all(unicodedata.category(c) in _INVISIBLE for c in text)


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens (or characters) ``a`` and ``b`` have in common before they part."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
