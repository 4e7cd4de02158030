"""The card of a cut that was made by restoring."""

from __future__ import annotations

from pathlib import Path

from sleb.core.plan import Plan
from sleb.surgery.card import cut_card

__all__ = ["shallow_card"]


def shallow_card(used: Plan, source: Path) -> str:
    """README.md of a cut by ``used`` that was restored from a deeper one; ``source`` holds the
    original's own card."""
    how = (
        f"Written by `sleb restore --depth {len(used.removed)}` from a deeper cut and what it had "
        "kept of the original."
    )
    return cut_card(used, source, how=how, kept=True)
