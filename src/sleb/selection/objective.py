"""The narrow waist of the search: a set of removed blocks -> a score per calibration window.

Strategies see only this, so they are tested with toy functions and no torch. Memoization, the
journal that survives an interruption, and progress live here once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sleb.files import disk_errors
from sleb.plan import Round, Score

__all__ = ["BlockSet", "Journal", "Objective", "Values", "rank"]

logger = logging.getLogger(__name__)

BlockSet = frozenset[int]
Values = NDArray[np.float64]
ScoreFunction = Callable[[Sequence[BlockSet], int, int], Values]


class Objective:
    """Scores block sets on ``n_windows`` windows, computing nothing twice.

    ``score(sets, start, stop)`` gives float64 [len(sets), stop - start], lower is better; it is
    called on at most ``step`` windows at a time, and each result is journaled before it is used.
    """

    def __init__(
        self,
        score: ScoreFunction,
        n_windows: int,
        *,
        step: int | None = None,
        journal: Journal | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.n_windows = n_windows
        self._score = score
        self._step = step or n_windows
        self._journal = journal
        self._note = note or (lambda text: None)
        self._known: dict[BlockSet, Values] = {}
        for sets, start, values in journal.replay() if journal else ():
            self._learn(sets, start, values)

    def scores(self, sets: Sequence[BlockSet], note: str = "") -> Values:
        """Score per set and window, float64 [len(sets), n_windows]. ``note`` goes to progress."""
        self._note(note)
        for start in range(0, self.n_windows, self._step):
            stop = min(start + self._step, self.n_windows)
            unknown = [s for s in dict.fromkeys(sets) if np.isnan(self._of(s)[start:stop]).any()]
            if unknown:
                values = self._score(unknown, start, stop)
                if self._journal:
                    self._journal.append(unknown, start, values)
                self._learn(unknown, start, values)
        return np.stack([self._of(s) for s in sets])

    def _of(self, blocks: BlockSet) -> Values:
        return self._known.setdefault(blocks, np.full(self.n_windows, np.nan))

    def _learn(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        for blocks, row in zip(sets, values, strict=True):
            self._of(blocks)[start : start + len(row)] = row


class Journal:
    """Scores on disk, one JSON line per sweep, so that a killed search goes on where it was.

    ``key`` identifies everything that the scores depend on; a journal with another key, or with a
    damaged header, is started anew. A line cut short by a crash is dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._lines = self._read(key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # rewrite what was understood, so that a torn last line never precedes a new one
            self._stream = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._write({"journal": 1, "key": key})
            for line in self._lines:
                self._write(line)

    def _read(self, key: str) -> list[dict[str, object]]:
        lines = []
        try:
            for raw in self.path.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(raw))
        except FileNotFoundError:
            return []
        except (ValueError, UnicodeDecodeError):
            logger.info("%s ends in a torn line, which is dropped", self.path)
        if not lines or lines[0] != {"journal": 1, "key": key}:
            return []
        return lines[1:]

    def _write(self, line: dict[str, object]) -> None:
        with disk_errors(self.path):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def replay(self) -> list[tuple[list[BlockSet], int, Values]]:
        """Everything scored before: sets, first window, values [sets, windows]."""
        return [
            (
                [BlockSet(s) for s in line["sets"]],  # type: ignore[attr-defined]
                int(line["start"]),  # type: ignore[call-overload]
                np.array(line["values"], dtype=np.float64),
            )
            for line in self._lines
        ]

    def append(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        """Record one result durably."""
        self._write({"sets": [sorted(s) for s in sets], "start": start, "values": values.tolist()})

    def close(self, *, done: bool) -> None:
        """Close; delete the file if the search is done, since the plan now holds the result."""
        self._stream.close()
        if done:
            self.path.unlink(missing_ok=True)


def rank(blocks: Sequence[int], values: Values, n_removed: int) -> Round:
    """A round's record: candidates best first, and the ``n_removed`` best of them.

    values [len(blocks), windows]. Ties go to the lower block id.
    """
    means = values.mean(1)
    order = sorted(range(len(blocks)), key=lambda i: (means[i], blocks[i]))
    best = values[order[0]]
    windows = values.shape[1]

    def error(row: Values) -> float | None:
        return round(float(row.std(ddof=1) / np.sqrt(windows)), 6) if windows > 1 else None

    scores = tuple(
        Score(
            block=blocks[i],
            mean=round(float(means[i]), 6),  # a millionth of a nat: far below any noise
            se=error(values[i]),
            excess_se=error(values[i] - best),
        )
        for i in order
    )
    return Round(removed=tuple(s.block for s in scores[:n_removed]), scores=scores)
