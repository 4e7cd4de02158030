"""What every result is shown as: plain values, which a renderer draws for its medium.

Text is what a :class:`~sleb.views.locale.Locale` made for the medium: Markup (safe HTML) or a plain
string. Charts hold numbers and plain labels; :mod:`sleb.views.charts` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A grid of numbers as colours: ``values[row][column]``, NaN where there is none.

    ``crosses`` and ``dots`` are cells (row, column) to mark. ``log``: colours follow the logarithm;
    values must then not be negative. ``square``: rows and columns count the same things.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    row_label: str
    column_label: str
    unit: str
    crosses: tuple[tuple[int, int], ...] = ()
    dots: tuple[tuple[int, int], ...] = ()
    log: bool = False
    square: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A value by depth, with its interval where there is one. ``chosen`` is marked: its x, y, and
    the ends of its interval if it has one. ``below``: it lies, with its label, below the line."""

    x: tuple[int, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    chosen: tuple[float, float, float | None, float | None] | None
    chosen_label: str
    below: bool = False
    x_label: str
    y_label: str


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A value with its interval per row, from 1 outwards, and reference marks beside it.

    ``references``: a name, and a value per row or None.
    """

    rows: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    measured: str
    references: tuple[tuple[str, tuple[float | None, ...]], ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Groups of horizontal bars from 0: ``series`` is a name and a value per group; ``shown`` has
    the text beside each bar. ``marks``: a value per group and series to point out, or None."""

    groups: tuple[str, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    shown: tuple[tuple[str, ...], ...]
    marks: tuple[tuple[float | None, ...], ...]
    mark_label: str
    label: str


Chart = Heat | Line | Dots | Bars


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Listing:
    """Sentences, one below the other."""

    kind: ClassVar[str] = "listing"
    lines: tuple[str, ...]
    numbered: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and what goes with them."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Meter:
    """A bar in 0..1 of its width: up to ``value`` or ``worst``, thin between both, with marks at
    ``limit`` and at ``dense``. ``tone``: kept, not-kept, unclear or empty."""

    value: float
    worst: float
    limit: float | None
    dense: float | None
    tone: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of a row is its header. ``words``: columns that are not figures.
    ``bad``: rows to point out. ``meters``: a bar below each row's name, or None. ``stacked``: where
    there is no room, a row's cells stand below its name. ``note``: a line below."""

    kind: ClassVar[str] = "table"
    caption: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset({0})
    bad: frozenset[int] = frozenset()
    meters: tuple[Meter | None, ...] = ()
    stacked: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with a ``title`` above and a ``text`` below; ``alt`` is for who cannot see it."""

    kind: ClassVar[str] = "figure"
    name: str
    title: str
    text: str
    alt: str
    chart: Chart
    wide: bool = False


@dataclass(frozen=True)
class Missing:
    """Something that was not measured, and how to measure it."""

    kind: ClassVar[str] = "missing"
    text: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """A cell of the map. ``state``: kept, protected or removed. ``label`` is for who cannot see
    it; ``turn`` is the place in the order of removal, from 1."""

    number: int
    state: str
    label: str
    turn: int | None = None


@dataclass(frozen=True, kw_only=True)
class BlockMap:
    """All blocks in order, with a legend of states and their names."""

    kind: ClassVar[str] = "blocks"
    blocks: tuple[Block, ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A turn of a prompt, or an answer, as it is, with remarks about it."""

    name: str
    text: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """A prompt, by its turns, with both answers. ``more`` opens what is too long, ``nothing``
    stands for an empty text, and ``cut`` for what is far too long, with its length in the place of
    {characters}."""

    kind: ClassVar[str] = "answers"
    title: str
    prompt: tuple[Answered, ...]
    dense: Answered
    pruned: Answered
    note: str
    more: str
    nothing: str
    cut: str


@dataclass(frozen=True)
class Folded:
    """What a click opens."""

    kind: ClassVar[str] = "folded"
    title: str
    item: SideBySide


Item = Text | Listing | Facts | Table | Figure | Missing | BlockMap | SideBySide | Folded


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A heading with what is below it; ``name`` is the target of links to it. ``wide``: across page
    one."""

    name: str
    title: str
    items: tuple[Item, ...]
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's, on top of the report, with the first page's picture. ``tone``: good, bad, unclear
    or none."""

    tone: str
    headline: str
    text: str
    table: Table


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report: ``summary`` is page one, ``sections`` are the rest."""

    lang: str
    title: str
    subtitle: str
    verdict: Verdict
    summary: tuple[Panel, ...]
    contents: str
    sections: tuple[Panel, ...]
    glossary_title: str
    glossary: tuple[tuple[str, str, str], ...]
    colophon: str
