"""`sleb compare` in the terminal: both models' answers in sum, and the worst of them in full."""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sleb.cli.render import _table, bounds, percent
from sleb.evaluation.answer_checks import first_difference
from sleb.evaluation.answers import Answers, Comparison, Pair

__all__ = ["comparison"]

SHOWN = 3
ANSWER, PROMPT, BEFORE = 280, 160, 60  # characters
_FAULTS = {
    "empty": "nothing visible",
    "json": "JSON is broken",
    "repetitive": "repeats itself",
    "endless": "does not end",
    "switched": "other language",
}


def comparison(console: Console, c: Comparison) -> None:
    """`sleb compare`."""
    table = _table("answers, 95 % intervals", "dense", "pruned")
    for name, dense, pruned in zip(_ROWS, _cells(c.dense), _cells(c.pruned), strict=True):
        if dense:
            table.add_row(name, dense, pruned)
    console.print(table)
    console.print(
        f"{c.prompts} prompts, at most {c.max_new_tokens} new tokens, greedy; identical answers "
        f"{percent(c.identical)}, parting after {c.agreed_median:g} tokens (median); other "
        f"language {percent(c.switched)}"
    )
    if not c.languages:
        hint = (
            "languages are told apart by writing system alone; for more: pip install 'sleb[lang]'"
        )
        console.print(Text(hint))
    if c.seconds_per_token_ratio:
        console.print(f"time per token, dense / pruned: {bounds(c.seconds_per_token_ratio)}")
    for pair in c.worst(SHOWN):
        console.print()
        _side_by_side(console, pair)


_ROWS = ("ended by the model", "empty", "repetitive", "valid JSON", "seconds, median (9 of 10)")


def _cells(a: Answers) -> list[str]:
    return [
        percent(a.ended),
        percent(a.empty),
        percent(a.repetitive),
        percent(a.json_valid) if a.json_valid else "",
        f"{a.seconds_median:.2f} ({a.seconds_p90:.2f})",
    ]


def _side_by_side(console: Console, pair: Pair) -> None:
    said = [_FAULTS[fault] for fault in pair.faults]
    parted = f"part after {pair.agreed} tokens"
    console.print(Text.assemble((_plain(pair.id), "bold"), f": {', '.join([parted, *said])}"))
    prompt = _plain(pair.prompt)
    console.print(Text(prompt if len(prompt) <= PROMPT else f"…{prompt[-PROMPT:]}", "dim"))
    both = [_plain(answer.text) for answer in (pair.dense, pair.pruned)]
    start = max(0, first_difference(*both) - BEFORE)
    grid = Table("dense", "pruned", box=None, pad_edge=False, expand=True, header_style="bold")
    for column in grid.columns:
        column.ratio, column.overflow = 1, "fold"
    grid.add_row(*(_cut(text, start) for text in both))
    console.print(grid)


def _cut(text: str, start: int) -> Text:
    """A piece of an answer from ``start`` on; what is left out is marked."""
    if not text.strip():
        return Text("(nothing)", "dim")
    piece = text[start : start + ANSWER]
    return Text(("…" if start else "") + piece + ("…" if start + ANSWER < len(text) else ""))


def _plain(text: str) -> str:
    """On one line, and without characters that steer a terminal or turn the reading direction."""
    return "".join(" " if c.isspace() else "\ufffd" if _steers(c) else c for c in text)


def _steers(c: str) -> bool:
    # the joiners are spelling in Persian, and within emoji
    return unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\u200c\u200d"
