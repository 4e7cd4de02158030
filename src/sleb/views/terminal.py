"""Items as text: for a terminal, through rich, and as Markdown for model cards.

All text is drawn through :func:`sleb.core.printable.printable`, as it may come from files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text as Words

from sleb.core.printable import printable, printable_json
from sleb.core.units import named
from sleb.evaluation.answer_checks import first_difference
from sleb.views.model import Facts, Item, Listing, Missing, SideBySide, Table, Text

ANSWER, PROMPT, BEFORE = 280, 160, 60  # characters of what is shown of an answer or a prompt
LONGEST = 4000  # characters of one cell or sentence
LAYOUT = str.maketrans({"\n": " ", "\t": " ", "\u00a0": " ", "\u2060": None})


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly; rich would exit with 1."""
        raise BrokenPipeError


def console() -> Console:
    """On stdout; without markup, since names of models and folders may hold brackets."""
    width = None if sys.stdout.isatty() else 100
    return _Console(width=width, highlight=False, markup=False, emoji=False)


def write_json(value: Any) -> None:
    """Print a result on stdout as JSON."""
    text = json.dumps(_as_json(value), ensure_ascii=False, indent=1)
    sys.stdout.write(printable_json(text) + "\n")


def _as_json(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _as_json(asdict(value))
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else named(value)


def draw(items: Iterable[Item], out: Console) -> None:
    """Print the items, with an empty line before each table but the first item. Charts and the
    map of blocks are for a page alone."""
    for i, item in enumerate(items):
        if isinstance(item, (Text, Missing)):
            _sentence(item.text, out)
        elif isinstance(item, Listing):
            for line in item.lines:
                _sentence(f"- {line}", out)
        elif isinstance(item, (Table, Facts)):
            if i:
                out.print()
            _table(item, out)
        elif isinstance(item, SideBySide):
            out.print()
            _side_by_side(item, out)


def _sentence(text: str, out: Console) -> None:
    """A long path is not broken, so that it can be copied."""
    words = _visible(text)
    out.print(words, soft_wrap=any(len(word) > out.width // 2 for word in words.plain.split()))


def _table(item: Table | Facts, out: Console) -> None:
    if isinstance(item, Facts):
        grid = Grid(box=None, pad_edge=False, show_header=False)
        grid.add_column(overflow="fold")
        grid.add_column(overflow="fold")
        for name, value in item.rows:
            grid.add_row(_visible(name), _visible(value))
        out.print(grid)
        return
    title = Words(_plain(item.caption), "italic") if item.caption else None
    grid = Grid(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    widths = _widths(item, out.width)
    for i, name in enumerate(item.columns):
        word = i in item.words
        side: Any = "left" if word else "right"
        grid.add_column(_visible(name), justify=side, overflow="fold", width=widths.get(i))
    for i, row in enumerate(item.rows):
        grid.add_row(*map(_visible, row), style="red" if i in item.bad else None)
    out.print(grid)
    if item.note:
        _sentence(item.note, out)


def _widths(item: Table, room: int) -> dict[int, int]:
    """Widths of the columns of figures in a table that is too wide, by column: headings wrap, and
    figures do not. None where even that does not fit."""

    def wide(text: str) -> int:
        return cell_len(_plain(text))

    columns = [[row[i] for row in item.rows] for i in range(len(item.columns))]
    full = [max(map(wide, (n, *c))) for n, c in zip(item.columns, columns, strict=True)]
    least = {
        i: max(map(wide, (*name.split(), *columns[i])), default=0)
        for i, name in enumerate(item.columns)
        if i not in item.words
    }
    gaps = 2 * (len(full) - 1)
    needed = sum(least.values()) + sum(min(10, full[i]) for i in item.words if i < len(full))
    return least if needed + gaps <= room < sum(full) + gaps else {}


def _side_by_side(pair: SideBySide, out: Console) -> None:
    out.print(Words.assemble((_plain(pair.title), "bold"), f": {_plain(pair.note)}"))
    prompt = _plain("\n".join(turn.text for turn in pair.prompt))
    out.print(Words(prompt if len(prompt) <= PROMPT else f"…{prompt[-PROMPT:]}", "dim"))
    both = [_plain(answer.text) for answer in (pair.dense, pair.pruned)]
    start = max(0, first_difference(*both) - BEFORE)
    names = (pair.dense.name, pair.pruned.name)
    grid = Grid(*names, box=None, pad_edge=False, expand=True, header_style="bold")
    for column in grid.columns:
        column.ratio, column.overflow = 1, "fold"
    grid.add_row(*(_cut(text, start, pair.nothing) for text in both))
    remarks = ("; ".join(answer.remarks) for answer in (pair.dense, pair.pruned))
    grid.add_row(*(Words(_plain(said), "dim") for said in remarks))
    out.print(grid)


def _cut(text: str, start: int, nothing: str) -> Words:
    """A piece of an answer from ``start`` on; what is left out is marked."""
    if not text.strip():
        return Words(nothing, "dim")
    piece = text[start : start + ANSWER]
    return Words(("…" if start else "") + piece + ("…" if start + ANSWER < len(text) else ""))


def _visible(text: str) -> Words:
    return Words(_plain(text))


def _plain(text: str) -> str:
    """On one line, and without characters that steer a terminal or turn the reading direction."""
    return printable(text.translate(LAYOUT), LONGEST)


def markdown(items: Iterable[Item]) -> list[str]:
    """The items as lines of Markdown, each followed by an empty one. Charts, and what belongs to
    charts, are left out."""
    lines: list[str] = []
    for item in items:
        if isinstance(item, (Text, Missing)):
            lines += [_plain(item.text), ""]
        elif isinstance(item, Listing):
            lines += [*(f"- {_plain(line)}" for line in item.lines), ""]
        elif isinstance(item, Facts):
            lines += ["| | |", "| --- | --- |", *map(_row, item.rows), ""]
        elif isinstance(item, Table):
            rules = (":---" if i in item.words else "---:" for i in range(len(item.columns)))
            caption = [_plain(item.caption), ""] if item.caption else []
            rule = f"| {' | '.join(rules)} |"
            lines += [*caption, _row(item.columns), rule, *map(_row, item.rows), ""]
            lines += [_plain(item.note), ""] if item.note else []
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"
