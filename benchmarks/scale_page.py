"""The page about clusters, from the figures of ``scale.py`` and the text of ``scale.md.in``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["page", "table"]

FRAME = Path(__file__).resolve().parent / "scale.md.in"
RATES = {
    "tflops": "TFLOP/s of a sweep on one GPU",
    "fetch": "GB/s at which the GPUs of one machine together fetch streamed blocks",
    "link": "GB/s of an all-reduce within a machine",
    "network": "GB/s of an all-reduce between machines, per GPU",
    "meet": "seconds that ranks take to meet after a step",
    "memory": "GB of a GPU for weights and hidden states",
}


def page(found: Mapping[str, Any]) -> str:
    """Markdown."""
    gaps = [row["simulated"] / row["measured"] - 1 for row in found["check"]]
    values = {
        "windows": str(found["windows"]),
        "length": str(found["length"]),
        "seeds": str(found["seeds"]),
        "off": f"{100 * min(gaps):+.0f} to {100 * max(gaps):+.0f} %",
        "check": _check(found),
        "models": _models(found),
        "rates": _rates(found),
        "predictions": _predictions(found),
    }
    text = FRAME.read_text()
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words, and the others numbers."""
    return "\n".join(_rows(head, rows, words))


def _rows(head: Sequence[str], rows: Iterable[Sequence[object]], words: int) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] * words + ['---:'] * (len(head) - words))} |"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _check(found: Mapping[str, Any]) -> str:
    many = f"simulated, mean of {found['seeds_check']}"
    head = ["measured in", "windows x tokens", "block forwards measured", many, "least, most"]
    return table(
        [*head, "by the formula"],
        (
            (
                row["result"],
                f"{row['windows']} x {row['length']}",
                f"{row['measured']:,}",
                f"{row['simulated']:,}",
                f"{row['least']:,}, {row['most']:,}",
                f"{row['formula']:,}",
            )
            for row in found["check"]
        ),
        words=2,
    )


def _models(found: Mapping[str, Any]) -> str:
    first, *others = found["models"][0]["left"]
    head = ["model", "blocks", "removed", "steps", "block forwards", "by the formula"]
    head += ["exact search", f"candidates left at window {first}", *map(str, others)]
    rows = []
    for row in found["models"]:
        left = [f"{c:.0f}" if c >= 10 else f"{c:.1f}" for c in row["left"].values()]
        counts = [f"{row[k]:,}" for k in ("block_forwards", "formula", "exact_block_forwards")]
        rows.append((row["model"], row["blocks"], row["removed"], row["steps"], *counts, *left))
    return table(head, rows)


def _rates(found: Mapping[str, Any]) -> str:
    rates = found["rates"]
    rows = [(label, rates["source"][k], f"{rates[k]:.3g}") for k, label in RATES.items()]
    return table(["rate", "from", "value"], rows, words=2)


def _predictions(found: Mapping[str, Any]) -> str:
    weights = {row["model"]: row["gb"] for row in found["models"]}
    head = ["model", "a model is on", "weights", "GPUs", "ranks", "predicted", "computing"]
    rows = []
    for row in found["predictions"]:
        seconds = row["seconds"]
        rows.append(
            (
                row["model"],
                "each GPU, streamed" if row["streamed"] else f"{row['group']} GPUs",
                f"{weights[row['model']]:,} GB",
                row["gpus"],
                row["replicas"],
                f"**{_time(seconds['total'])}**",
                *(_time(seconds.get(k)) for k in ("compute", "between GPUs", "fetch", "meeting")),
                f"{100 * row['busy']:.0f} %",
            )
        )
    return table([*head, "between GPUs", "fetching", "meeting", "ranks busy"], rows, words=2)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
