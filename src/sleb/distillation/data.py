"""Which windows a model is healed on, and which judge it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleb.calibration import Windows, load_windows
from sleb.core.errors import InputError

__all__ = ["JUDGES", "heal_windows"]

JUDGES = 32


def heal_windows(
    tokenizer: Any,
    text: Sequence[str],
    *,
    batch: int,
    wanted: int,
    judges: int,
    length: int,
    seed: int,
) -> tuple[Windows, Windows]:
    """Up to ``wanted`` windows to train on, by the weights of the texts as far as each goes; and
    about ``judges`` others, spread evenly over every text, at most a quarter of it.

    Raises:
        InputError: not a whole step of ``batch`` windows is left to train on.
    """
    first, more = load_windows(
        tokenizer, text, windows=None, length=length, seed=seed, heldout=wanted + judges
    )
    pool = first + more if more is not None else first
    texts = [[i for i, s in enumerate(pool.source) if s == k] for k in range(len(pool.names))]
    each = max(1, judges // len(texts))
    held = {i for rows in texts for i in _spread(rows, min(each, max(1, len(rows) // 4)))}
    rest = [i for i in range(len(pool.ids)) if i not in held]
    rest = _spread(rest, min(len(rest), wanted))
    if len(rest) < batch:
        raise InputError(
            f"{len(rest)} windows of {length} tokens are left to train on, and a step takes "
            f"{batch}: give more --text, a shorter --length, or a smaller --batch"
        )
    return pool.take(rest), pool.take(sorted(held))


def _spread(rows: Sequence[int], n: int) -> list[int]:
    return [rows[(2 * k + 1) * len(rows) // (2 * n)] for k in range(n)]
