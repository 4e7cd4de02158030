"""Every sentence of the views, in each language, and how that language writes numbers.

Sentences are in words/LANG.toml. ``{name}`` is filled in; ``[[term|shown]]`` is a term of the
glossary, to which a page links. For a page, what is filled in is escaped, so a model's name or an
answer cannot become HTML; for a terminal and for Markdown everything is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup, escape

from sleb.core.errors import InputError, did_you_mean
from sleb.core.finding import Finding, Value
from sleb.core.printable import printable
from sleb.core.toml import read_toml
from sleb.views.model import Table

if TYPE_CHECKING:
    from sleb.core.statistics import Interval

LANGUAGES = ("en", "ja")
WHOLE = 20  # characters of a command's word that a line break does not cut
UNIT = re.compile(r"[^\d∞–]*$")
FILLED = re.compile(r"\{(\w+)\}")
ROOT = r"(?:(?:~[\w.-]*)?/|[A-Za-z]:[\\/])"
_WORD = re.compile(rf"(?<![^\s=\"'`(,]){ROOT}[^\s\"'`,;)]+")
LINK = re.compile(r"\[\[(\w+)\|(.+?)\]\]")
DASH = "–"
LONGEST = 2000  # characters of what is filled into a sentence

Row = TypeVar("Row")


def check_language(lang: str) -> None:
    """Raise InputError for a language that the report is not written in."""
    if lang not in LANGUAGES:
        hint = did_you_mean(lang, LANGUAGES)
        raise InputError(f"--lang {lang!r} is not known{hint}; give {' or '.join(LANGUAGES)}")


def names(paths: Iterable[str]) -> dict[str, str]:
    """What each path is called: its last part, or as many as tell it from the others."""
    given = {path: Path(path).parts for path in paths}

    def told(path: str, of: tuple[str, ...]) -> str:
        for n in range(1, len(of) + 1):
            if all(other[-n:] != of[-n:] for name, other in given.items() if name != path):
                return "/".join(of[-n:])
        return path

    return {path: told(path, of) for path, of in given.items()}


def unrooted(text: str) -> str:
    """``text`` with the last part alone of every absolute path, which would tell who reads it how
    the author's disk is laid out."""
    return _WORD.sub(lambda found: last_part(found[0]), text)


def last_part(path: str) -> str:
    """Of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def bounds(found: Interval) -> tuple[float, float] | None:
    """The ends of an interval that has them."""
    if found.low is None or found.high is None or isnan(found.low) or isnan(found.high):
        return None
    return found.low, found.high


def _says_nothing(ratio: float, low: float, high: float) -> bool:
    """Whether the ends of a ratio's interval are ten times as far to either side."""
    return 10 * low < ratio and high > 10 * ratio


def _shown(value: object) -> object:
    """What is filled in, unless it was made here; a name of a file may be hostile, or endless."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, LONGEST)
    return value


@cache
def _sentences(lang: str) -> dict[str, dict[str, Any]]:
    return read_toml(Path(__file__).with_name("words") / f"{lang}.toml", "install sleb again")


@cache
def _names() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Key and pattern of each name that a record has; those with nothing to fill in come first."""
    english = sorted(_sentences("en")["called"].items(), key=lambda row: FILLED.findall(row[1]))
    return tuple(
        (
            key,
            re.compile(FILLED.sub(_group, re.escape(name).replace(r"\{", "{").replace(r"\}", "}"))),
        )
        for key, name in english
    )


def _group(place: re.Match[str]) -> str:
    return f"(?P<{place[1]}>{r'[0-9]+' if place[1] == 'n' else '.+'})"


class Locale:
    """The sentences of one language, for a page (``markup``) or as plain text. Calling it gives a
    sentence by its key, ``table.name``.

    Raises:
        InputError: there is no such language.
    """

    def __init__(self, lang: str = "en", *, markup: bool = False) -> None:
        check_language(lang)
        self.lang, self.markup = lang, markup
        self.tables = _sentences(lang)

    def __call__(self, key: str, **values: object) -> str:
        """A sentence; on a page with links to the glossary."""
        if not self.markup:
            return self.plain(key, **values)
        values = {name: _shown(value) for name, value in values.items()}
        linked = LINK.sub(r'<a class="term" href="#term-\1">\2</a>', str(escape(self.raw(key))))
        return Markup(linked).format(**values)

    def plain(self, key: str, **values: object) -> str:
        """A sentence as plain text, for charts and for attributes."""
        shown = {name: _shown(value) for name, value in values.items()}
        return LINK.sub(r"\2", self.raw(key)).format(**shown)

    def raw(self, key: str) -> str:
        """A sentence as it is written in the file."""
        table, _, name = key.partition(".")
        found: str = self.tables[table][name]
        return found

    def named(self, table: str, name: str) -> str:
        """What a key of the record, such as that of a check, is called; itself if unknown."""
        return self.plain(f"{table}.{name}") if name in self.tables[table] else name

    def called(self, name: str) -> str:
        """What a record calls a row, a text or a stage, where that is in sleb's words, which are
        English there; itself if it is the user's, but for where it lies."""
        name = unrooted(name)
        for key, pattern in _names() if self.lang != "en" else ():
            if match := pattern.fullmatch(name):
                return self(f"called.{key}", **match.groupdict())
        return name

    def said(self, table: str, found: Finding, of: str = "") -> str:
        """A finding in words: the sentence of the table for ``of`` and its key together, for its
        key, or for ``of``; as it is where there is none. A dash stands for what it lacks."""
        known = self.tables[table]
        names = (f"{of}-{found.key}", found.key, of)
        name = next((name for name in names if name in known), None)
        if name is None:
            return printable(str(found), LONGEST)
        values = {word: self._value(found.values.get(word)) for word in FILLED.findall(known[name])}
        return self(f"{table}.{name}", **values)

    def _value(self, value: Value | None) -> str:
        if value is None or value == ():
            return DASH
        if isinstance(value, tuple):
            return self.join(printable(part, LONGEST) for part in value)
        if isinstance(value, float):
            return f"{value:.3g}"
        return self.count(value) if isinstance(value, int) else value

    def join(self, parts: Iterable[object]) -> str:
        """A list within a sentence."""
        comma = self.raw("format.comma")
        return Markup(comma).join(parts) if self.markup else comma.join(map(str, parts))  # type: ignore[arg-type]

    def code(self, text: str) -> str:
        """Something to type, or an exact name."""
        if not self.markup:
            return text
        word = Markup("<span>{}</span>")
        parts = (word.format(w) if len(w) <= WHOLE else escape(w) for w in text.split(" "))
        return Markup("<code>{}</code>").format(Markup(" ").join(parts))

    def table(
        self,
        name: str,
        columns: Mapping[str, Callable[[Row], str]],
        rows: Iterable[Row],
        *,
        words: Iterable[str] = (),
        bad: Callable[[Row], bool] = lambda row: False,
        caption: str | None = None,
        note: str = "",
    ) -> Table:
        """A table whose caption and headings are sentences of the table ``name``: for each column
        its key and what makes a cell of a row. ``words``: columns that are not figures, besides
        the first; ``bad``: rows to point out."""
        rows, keys = tuple(rows), list(columns)
        return Table(
            caption=self(f"{name}.caption") if caption is None else caption,
            columns=tuple(self(f"{name}.{key}") for key in keys),
            rows=tuple(tuple(cell(row) for cell in columns.values()) for row in rows),
            words=frozenset({0, *(keys.index(key) for key in words)}),
            bad=frozenset(i for i, row in enumerate(rows) if bad(row)),
            note=note,
        )

    # -- numbers ---------------------------------------------------------------------------------

    def number(self, value: float, digits: int = 2) -> str:
        """With thousands separators, a true minus sign, and never a negative zero."""
        if not isfinite(value):
            return DASH if isnan(value) else "∞" if value > 0 else "−∞"
        shown = f"{value:,.{digits}f}"
        return shown.lstrip("-") if not shown.strip("-0.,") else shown.replace("-", "−")

    def count(self, value: int) -> str:
        """A whole number."""
        return self.number(value, 0)

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

    def change(self, share: float) -> str:
        """By what share of itself a figure has changed."""
        return self._unit("percent", self.signed(100 * share, 1))

    def points(self, difference: float) -> str:
        """A difference of shares, in percentage points."""
        return self._unit("points", self.signed(100 * difference, 1))

    def times(self, ratio: float, digits: int = 2) -> str:
        """A ratio."""
        shown = self.number(ratio, digits)
        return self._unit("times", shown) if self.markup else f"{shown}x"

    def ratio(self, ratio: float) -> str:
        """A ratio of perplexities."""
        digits = 3 if ratio < 10 else 1
        return self.times(ratio, digits) if self.markup else self.number(ratio, digits)

    def nats(self, value: float) -> str:
        """A loss or a score, without its unit: four digits."""
        return self.number(value, 4 if abs(value) < 1 else 3)

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
        if not self.markup:
            for unit, scale, digits in (("B", 1e9, 3), ("M", 1e6, 1), ("k", 1e3, 1)):
                if count >= scale:
                    return f"{self.number(count / scale, digits)} {unit}"
            return self.count(count)
        for scale, digits, pattern in self.tables["format"]["large"]:
            if count >= scale:
                return str(pattern).format(value=self.number(count / scale, digits))
        return self.count(count)

    def figure(self, value: float, unit: str) -> str:
        """A figure of a gate in its unit: x, %, MB, another one, or none."""
        if unit == "%":
            return self.percent(value)
        if unit == "MB":
            return f"{self.number(value, 1)}\u00a0MB"
        shown = f"{value:,.4g}".replace("-", "−") if isfinite(value) else self.number(value)
        if unit == "x":
            return self._unit("times", shown) if self.markup else f"{shown}x"
        return f"{shown}\u00a0{unit}".rstrip()

    def interval(self, found: Interval | None, show: Callable[[float], str]) -> str:
        """A value and, where it has one, its interval; ``show`` writes one number. A dash where
        nothing was measured."""
        if found is None:
            return DASH
        shown, ends = show(found.value), bounds(found)
        if ends is None:
            return shown
        if show in (self.times, self.ratio) and _says_nothing(found.value, *ends):
            return self.raw("format.wide").format(value=shown)
        return self.between(shown, *map(show, ends))

    def between(self, shown: str, low: str, high: str) -> str:
        """A value and its interval, each written with its unit, which then is said once."""
        unit = UNIT.search(shown)[0]  # type: ignore[index]
        low, high = low.removesuffix(unit), high.removesuffix(unit)
        return self.raw("format.interval").format(value=shown, low=low, high=high)

    def moment(self, iso: str) -> str:
        """A moment of a record, in UTC; what is no date is shown as it is."""
        try:
            at = datetime.fromisoformat(iso).astimezone(timezone.utc)
        except ValueError:
            return iso
        return self.raw("format.moment").format(at=at)

    def reading(self, found: Interval, neutral: float, better: str) -> str:
        """In words, whether ``found`` can be told from ``neutral``; ``better`` is high or low."""
        if bounds(found) is None:
            return self.plain("reading.single")
        if found.holds(neutral):
            return self.plain("reading.noise")
        good = (found.value > neutral) == (better == "high")
        return self.plain("reading.better" if good else "reading.worse")

    def _unit(self, name: str, value: str) -> str:
        return self.raw(f"format.{name}").format(value=value)
