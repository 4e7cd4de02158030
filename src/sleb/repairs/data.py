"""Which windows of the user's text a repair is fitted on, and which judge it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleb.calibration import Windows, load_windows
from sleb.core.errors import InputError
from sleb.core.process_group import group
from sleb.models.stack import BlockStack, decoder_config
from sleb.repairs.self_generated import SHARE
from sleb.selection.resources import room_bytes

__all__ = ["JUDGES", "default_tokens", "repair_windows"]

TOKENS = {"cuda": 400_000, "cpu": 100_000}
"""What a fit sees by default, in all: the more, the better (docs/quality.md), and the longer."""
STREAMS = 6
"""Hidden states that a fit holds of each token, at most."""
JUDGES = 32


def default_tokens(stack: BlockStack) -> int:
    """How many tokens a repair is to see: many on a GPU, as long as their hidden states fit
    there; and not where blocks are fetched when they run."""
    least = TOKENS["cpu"]
    if stack.input_device.type != "cuda" or stack.streamed:
        return least
    each = STREAMS * int(decoder_config(stack.model.config).hidden_size) * stack.dtype.itemsize
    room = room_bytes(stack) // each
    room = min(int(found) for found in group().exchange(str(room).encode()))
    return max(least, min(TOKENS["cuda"], room))


def repair_windows(
    tokenizer: Any,
    text: Sequence[str],
    *,
    scored: Windows | None = None,
    aside: Windows | None = None,
    tokens: int,
    own: bool = True,
    length: int,
    seed: int,
) -> tuple[Windows, Windows]:
    """Windows to fit on, and ``JUDGES`` others, at least one of each text, that decide whether a
    fit stays. Neither shares a window with ``aside``, which measures the result. What the search
    has ``scored`` is fitted on too. The fit is to see about ``tokens`` tokens; with ``own`` that
    counts those that :func:`sleb.repairs.self_generated.with_self_generated` adds.

    Raises:
        InputError: the text is too short for both.
    """
    used, kept = (0 if w is None else len(w.ids) for w in (scored, aside))
    if own:
        tokens -= tokens // SHARE
    first, more = load_windows(
        tokenizer,
        text,
        windows=used or None,
        length=length,
        seed=seed,
        heldout=kept + JUDGES + max(0, tokens // length - used),
    )
    taken = set() if aside is None else set(map(tuple, aside.ids.tolist()))
    free = (
        []
        if more is None
        else [i for i, w in enumerate(more.ids.tolist()) if tuple(w) not in taken]
    )
    if more is None or not free:
        raise InputError(
            "no text is left over to judge a repair by: give more --text, or fewer --windows"
        )
    texts = [[i for i in free if more.source[i] == s] for s in range(len(more.names))]
    each = max(1, JUDGES // len(texts))
    # evenly spread over each text, which is in order; at most a third of it, so that most is fitted
    judges = [i for rows in texts for i in _spread(rows, min(each, max(1, len(rows) // 3)))]
    fitted = sorted(set(free) - set(judges))
    return (scored or first) + more.take(fitted), more.take(judges)


def _spread(rows: Sequence[int], n: int) -> list[int]:
    return [rows[(2 * k + 1) * len(rows) // (2 * n)] for k in range(n)] if rows else []
