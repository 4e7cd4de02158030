"""Windows by role, for the tests of the search and of repairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sleb.calibration.split import CalibrationSplit
from sleb.calibration.windows import Windows
from sleb.repairs.scoring import RepairedScores

__all__ = ["fit_windows", "split_of", "stopped_at", "toy"]


def split_of(
    tokenizer: Any,
    text: Sequence[str],
    *,
    windows: int | None = None,
    length: int = 32,
    seed: int = 0,
    heldout: int = 0,
) -> CalibrationSplit:
    """Windows to search on, and held-out ones."""
    return CalibrationSplit.of(
        tokenizer, text, windows=windows, length=length, seed=seed, heldout=heldout
    )


def fit_windows(
    tokenizer: Any, text: Sequence[str], tokens: int, *, length: int = 32
) -> tuple[Windows, Windows]:
    """Windows of given text to fit a repair on, and others to validate it."""
    split = split_of(tokenizer, text, length=length).with_repair(tokens, beside_search=True)
    assert split.repair_given is not None
    assert split.repair_validation is not None
    return split.repair_given, split.repair_validation


def toy(weights, pairs=None):
    """A score with interactions: the sum of the removed blocks' weights, plus pair terms."""

    def score(sets, start, stop):
        rows = []
        for s in sets:
            value = sum(weights[b] for b in s)
            value += sum(v for pair, v in (pairs or {}).items() if set(pair) <= s)
            rows.append([value + 0.01 * w for w in range(start, stop)])
        return np.array(rows)

    return score


def stopped_at(monkeypatch, n) -> list:
    """Repairs are stopped at the n-th; the sets of all that are asked for."""
    real, calls = RepairedScores._row, []

    def row(self, blocks, start, stop):
        calls.append(blocks)
        if len(calls) == n:
            raise KeyboardInterrupt
        return real(self, blocks, start, stop)

    monkeypatch.setattr(RepairedScores, "_row", row)
    return calls
