"""The narrow waist of the search: a set of removed blocks -> a score per calibration window.

Strategies see only this, so they are tested with toy functions and no torch. Memoization, the
journal that survives an interruption, and progress live here once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from sleb.core.files import disk_errors
from sleb.selection.racing import Race, Values

__all__ = ["DENSE", "BlockSet", "Call", "Journal", "Objective", "Replay", "Values"]

logger = logging.getLogger(__name__)

BlockSet = frozenset[int]
DENSE = BlockSet()
ScoreFunction = Callable[[Sequence[BlockSet], int, int], Values]
Call = tuple[Sequence[BlockSet], int, int]
"""Sets, and the range of windows to score them on."""


class Objective:
    """Scores block sets on ``n_windows`` windows, computing nothing twice.

    ``score(sets, start, stop)`` gives float64 [len(sets), stop - start], lower is better; it is
    called on at most ``step(len(sets))`` windows at a time, and each result is journaled before it
    is used. Fewer windows at once than ``fill(len(sets))`` take as long. ``deal`` is handed all
    calls of a step and gives each with its scores; by default they are made one after the other.
    ``enough(order)`` tells a strategy that a target is reached by removing ``order``. ``judge``
    scores sets by what is wanted in the end, where that is too dear for every candidate; by default
    it is the objective itself.
    """

    def __init__(
        self,
        score: ScoreFunction,
        n_windows: int,
        *,
        step: Callable[[int], int] | None = None,
        fill: Callable[[int], int] | None = None,
        deal: Callable[[Sequence[Call]], Iterable[tuple[Call, Values]]] | None = None,
        journal: Replay | None = None,
        note: Callable[[str], None] | None = None,
        enough: Callable[[Sequence[int]], bool] | None = None,
        exact: bool = True,
        judge: Objective | None = None,
    ) -> None:
        self.n_windows = n_windows
        self.judge = judge or self
        self.exact = exact
        self._deal = deal or (lambda calls: ((call, score(*call)) for call in calls))
        self._step = step or (lambda sets: n_windows)
        self._fill = fill
        self._journal = journal
        self._note = note or (lambda text: None)
        self.enough = enough or (lambda order: False)
        self._known: dict[BlockSet, Values] = {}
        for sets, start, values in journal.replay() if journal else ():
            self._learn(sets, start, values)

    def scores(self, sets: Sequence[BlockSet], note: str = "") -> Values:
        """Score per set and window, float64 [len(sets), n_windows]. ``note`` goes to progress."""
        self._note(note)
        return self._prefix(sets, self.n_windows)

    def best(
        self,
        sets: Sequence[BlockSet],
        k: int = 1,
        note: str = "",
        guides: Sequence[BlockSet] = (),
    ) -> Values:
        """Like :meth:`scores`, for a caller who needs only the ``k`` lowest means.

        Unless ``exact``, sets race: those that are clearly worse are given up early, and have NaN
        for the windows that they did not see. At least k sets stay to the end and have no NaN,
        but for a winner who is alone before that. ``guides`` names, per set, a similar one that may
        have been scored before. See ``racing``.

        The dense model is scored along, since every strategy asks for it in the end, and beside
        sets of few blocks it costs next to nothing.
        """
        if self.exact:
            return self.scores([*sets, DENSE], note)[:-1]
        guide = np.stack([self._of(s) for s in guides]) if guides else None
        race = Race(len(sets), self.n_windows, k, guide)
        values = np.full((len(sets), self.n_windows), np.nan)
        so_far = ""
        for windows in race.looks(self._fill):
            self._note(note + so_far)
            known = self._prefix([*(sets[i] for i in race.live), DENSE], windows)[:-1]
            values[race.live, :windows] = known
            leader, mean = race.live[int(known.mean(1).argmin())], float(known.mean(1).min())
            race.update(known)
            own = ", ".join(map(str, sorted(sets[leader] - BlockSet.intersection(*sets))))
            so_far = f", {len(race.live)} left, best so far {own} at {mean:.4f}"
        return values

    def _prefix(self, sets: Sequence[BlockSet], windows: int) -> Values:
        """Scores on the first ``windows`` windows, float64 [len(sets), windows]."""
        step = self._step(len(sets))
        calls: list[Call] = []
        for start in range(0, windows, step):
            stop = min(start + step, windows)
            unknown = [s for s in dict.fromkeys(sets) if np.isnan(self._of(s)[start:stop]).any()]
            if unknown:
                # a range may be known in part; then all of it is known up to the same window
                first = start + min(
                    int(np.isfinite(self._of(s)[start:stop]).sum()) for s in unknown
                )
                calls.append((unknown, first, stop))
        for (scored, first, _), values in self._deal(calls):
            if self._journal:
                self._journal.append(scored, first, values)
            self._learn(scored, first, values)
        return np.stack([self._of(s)[:windows] for s in sets])

    def _of(self, blocks: BlockSet) -> Values:
        return self._known.setdefault(blocks, np.full(self.n_windows, np.nan))

    def _learn(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        for blocks, row in zip(sets, values, strict=True):
            self._of(blocks)[start : start + len(row)] = row


class Replay:
    """What a journal held, for a process that does not write it."""

    def __init__(self, lines: Sequence[dict[str, object]] = ()) -> None:
        self.lines = list(lines)

    def replay(self) -> list[tuple[list[BlockSet], int, Values]]:
        """Everything scored before: sets, first window, values [sets, windows]."""
        return [
            (
                [BlockSet(s) for s in line["sets"]],  # type: ignore[attr-defined]
                int(line["start"]),  # type: ignore[call-overload]
                np.array(line["values"], dtype=np.float64),
            )
            for line in self.lines
        ]

    def append(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        """Nothing: the process that writes has it too."""


class Journal(Replay):
    """Scores on disk, one JSON line per sweep, so that a killed search goes on where it was.

    ``key`` identifies everything that the scores depend on; a journal with another key, or with a
    damaged header, is started anew. A line cut short by a crash is dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        super().__init__(self._read(key))
        self._scored = bool(self.lines)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # rewrite what was understood, so that a torn last line never precedes a new one
            self._stream = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._write({"journal": 1, "key": key})
            for line in self.lines:
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

    def append(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        """Record one result durably."""
        self._scored = True
        self._write({"sets": [sorted(s) for s in sets], "start": start, "values": values.tolist()})

    def close(self, *, done: bool) -> None:
        """Close; delete the file if the search is done, since the plan now holds the result, or
        if nothing was scored."""
        self._stream.close()
        if done or not self._scored:
            self.path.unlink(missing_ok=True)
