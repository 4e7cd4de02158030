"""`sleb eval --task` in the terminal: scores, and the same items before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from sleb.cli.render import _table, percent

if TYPE_CHECKING:
    from sleb.core.statistics import Flips
    from sleb.evaluation.tasks import TaskResult

__all__ = ["tasks"]


def tasks(console: Console, results: Sequence[TaskResult]) -> None:
    """A line per task; then, with a pruned model, what has changed item by item."""
    compared = any(r.pruned for r in results)
    table = _table(
        "score, 95 % intervals",
        "items",
        "metric",
        "chance",
        "dense",
        *(["pruned"] if compared else []),
    )
    table.columns[0].overflow = "fold"
    for r in results:
        table.add_row(
            r.name,
            str(r.items),
            r.metric,
            "-" if r.chance is None else f"{r.chance:.0%}",
            percent(r.dense),
            *([percent(r.pruned)] if r.pruned else []),
        )
    console.print(table)
    if compared:
        console.print()
        _flips(console, results)
    for r in results:
        if _guesses(r):
            console.print(
                f"{r.name}: the dense model is not clearly better than guessing, so what the "
                "pruned one keeps says nothing"
            )


def _flips(console: Console, results: Sequence[TaskResult]) -> None:
    table = _table("the same items", "lost", "won", "change in points", "p", "")
    table.columns[0].overflow = "fold"
    table.columns[-1].justify = "left"
    for r in results:
        f = r.flips
        if f is None:
            change = "-" if r.pruned is None else f"{100 * (r.pruned.value - r.dense.value):+.1f}"
            table.add_row(r.name, "-", "-", change, "-", "items are not just right or wrong")
            continue
        p = "< 0.001" if f.p_value < 0.001 else f"{f.p_value:.3f}"
        table.add_row(r.name, str(f.lost), str(f.won), _points(f), p, _reading(f))
    console.print(table)
    console.print(
        "lost: right before, wrong after; won: the reverse; p: McNemar's exact test, two-sided"
    )
    if any(r.flips and r.flips.within_noise for r in results):
        console.print(
            "within noise (p >= 0.05): these items cannot tell whether anything was lost or won; "
            "use more"
        )


def _points(f: Flips) -> str:
    d = f.difference
    if d.low is None or d.high is None:
        return f"{100 * d.value:+.1f}"
    return f"{100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"


def _reading(f: Flips) -> str:
    if f.within_noise:
        return "within noise" if f.lost + f.won else "nothing flipped"
    return "worse" if f.lost > f.won else "better"


def _guesses(r: TaskResult) -> bool:
    """Whether the dense model's interval reaches down to chance."""
    return r.chance is not None and r.dense.low is not None and r.dense.low <= r.chance
