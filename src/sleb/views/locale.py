"""Every sentence of the report, in each language, and how that language writes numbers.

Sentences are in words/LANG.toml. ``{name}`` is filled in; ``[[term|shown]]`` links to a term of the
glossary. What is filled in is escaped, so a model's name or an answer cannot become HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from sleb.core.errors import InputError, did_you_mean
from sleb.core.toml import read_toml

if TYPE_CHECKING:
    from sleb.core.statistics import Interval

__all__ = ["LANGUAGES", "Words", "bounds", "check_language", "code"]

LANGUAGES = ("en", "ja")
WHOLE = 20  # characters of a command's word that a line break does not cut
UNIT = re.compile(r"[^\d∞–]*$")
LINK = re.compile(r"\[\[([a-z-]+)\|([^\]]+)\]\]")


def check_language(lang: str) -> None:
    """Raise InputError for a language that the report is not written in."""
    if lang not in LANGUAGES:
        hint = did_you_mean(lang, LANGUAGES)
        raise InputError(f"--lang {lang!r} is not known{hint}; give {' or '.join(LANGUAGES)}")


def code(text: str) -> Markup:
    """Something to type, or an exact name."""
    word = Markup("<span>{}</span>")
    parts = (word.format(w) if len(w) <= WHOLE else escape(w) for w in text.split(" "))
    return Markup("<code>{}</code>").format(Markup(" ").join(parts))


def bounds(found: Interval) -> tuple[float, float] | None:
    """The ends of an interval that has them."""
    if found.low is None or found.high is None or isnan(found.low) or isnan(found.high):
        return None
    return found.low, found.high


class Words:
    """The sentences of one language. Calling it gives a sentence by its key, ``table.name``.

    Raises:
        InputError: there is no such language.
    """

    def __init__(self, lang: str) -> None:
        check_language(lang)
        self.lang = lang
        path = Path(__file__).with_name("words") / f"{lang}.toml"
        self.tables = read_toml(path, "install sleb again")

    def __call__(self, key: str, **values: Any) -> Markup:
        """A sentence as HTML, with links to the glossary."""
        linked = LINK.sub(r'<a class="term" href="#term-\1">\2</a>', str(escape(self.raw(key))))
        return Markup(linked).format(**values)

    def plain(self, key: str, **values: str) -> str:
        """A sentence as plain text, for charts and for attributes."""
        return LINK.sub(r"\2", self.raw(key)).format(**values)

    def raw(self, key: str) -> str:
        """A sentence as it is written in the file."""
        table, _, name = key.partition(".")
        found: str = self.tables[table][name]
        return found

    def named(self, table: str, name: str) -> str:
        """What a name of the record, such as that of a check, is called; itself if unknown."""
        return str(self.tables[table].get(name, name))

    def join(self, parts: Iterable[object]) -> Markup:
        """A list within a sentence."""
        return Markup(self.raw("format.comma")).join(parts)  # type: ignore[arg-type]

    # -- numbers ---------------------------------------------------------------------------------

    def number(self, value: float, digits: int = 2) -> str:
        """With thousands separators, a true minus sign, and never a negative zero."""
        if not isfinite(value):
            return "–" if isnan(value) else "∞" if value > 0 else "−∞"
        shown = f"{value:,.{digits}f}"
        return shown.lstrip("-") if not shown.strip("-0.,") else shown.replace("-", "−")

    def signed(self, value: float, digits: int = 2) -> str:
        """A difference, with its sign."""
        shown = self.number(value, digits)
        return f"+{shown}" if value > 0 and shown.strip("0.,∞") else shown

    def level(self, value: float) -> str:
        """A perplexity: as many digits as mean something."""
        return self.number(value, 2 if value < 100 else 1 if value < 1000 else 0)

    def percent(self, share: float) -> str:
        """A share in 0..1."""
        return self._unit("percent", self.number(100 * share, 1))

    def points(self, difference: float) -> str:
        """A difference of shares, in percentage points."""
        return self._unit("points", self.signed(100 * difference, 1))

    def times(self, ratio: float, digits: int = 2) -> str:
        """A ratio."""
        return self._unit("times", self.number(ratio, digits))

    def ratio(self, ratio: float) -> str:
        """A ratio of perplexities, in which the third digit may matter."""
        return self.times(ratio, 3 if ratio < 10 else 1)

    def nats(self, value: float) -> str:
        """A loss or a score, without its unit."""
        return self.number(value, 4)

    def seconds(self, value: float) -> str:
        """A duration."""
        if value < 1:
            return self._unit("milliseconds", self.number(1000 * value, 1 if value < 0.1 else 0))
        return self._unit("seconds", self.number(value, 2 if value < 100 else 0))

    def size(self, nbytes: float) -> str:
        """Bytes, in the units of disks (1 MB is a million)."""
        for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
            if abs(nbytes) >= scale:
                return f"{self.number(nbytes / scale, digits)}\u00a0{unit}"
        return f"{self.number(nbytes, 0)}\u00a0B"

    def large(self, count: int) -> str:
        """A large count, such as that of parameters."""
        for scale, digits, pattern in self.tables["format"]["large"]:
            if count >= scale:
                return str(pattern).format(value=self.number(count / scale, digits))
        return self.number(count, 0)

    def measured(self, value: float, unit: str) -> str:
        """A figure of a gate in its unit: x, %, MB, another one, or none."""
        if unit == "%":
            return self.percent(value)
        if unit == "MB":
            return f"{self.number(value, 1)}\u00a0MB"
        shown = f"{value:,.5g}".replace("-", "−")
        return self._unit("times", shown) if unit == "x" else f"{shown}\u00a0{unit}".rstrip()

    def interval(self, found: Interval, show: Callable[[float], str]) -> str:
        """A value and, where it has one, its interval; ``show`` writes one number."""
        shown, ends = show(found.value), bounds(found)
        if ends is None:
            return shown
        unit = UNIT.search(shown)[0]  # type: ignore[index]
        low, high = (show(end).removesuffix(unit) for end in ends)  # the unit is said once
        return self.raw("format.interval").format(value=shown, low=low, high=high)

    def p_value(self, p: float) -> str:
        """A p-value."""
        return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"

    def moment(self, iso: str) -> str:
        """A moment of a record, in UTC; what is no date is shown as it is."""
        try:
            at = datetime.fromisoformat(iso).astimezone(timezone.utc)
        except ValueError:
            return iso
        return self.raw("format.moment").format(at=at)

    def _unit(self, name: str, value: str) -> str:
        return self.raw(f"format.{name}").format(value=value)
