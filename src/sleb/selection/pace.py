"""How far a search is: known rounds of known work, of which racing saves an unknown share."""

from __future__ import annotations

from collections.abc import Sequence

from sleb.core.progress import Tick
from sleb.selection.objective import BlockSet
from sleb.selection.strategies import BEAM, FINALS
from sleb.selection.sweep import block_forwards

__all__ = ["ProgressEstimator", "rounds_of_work"]

FIRST_GUESS = 0.3
"""Share of a round's work that racing leaves, until a round has shown it."""


class ProgressEstimator:
    """Moves a progress bar over ``rounds`` (each the work of its exact scoring). Within a round it
    moves at the share that the rounds so far took, and waits near the end if that was too low."""

    def __init__(self, tick: Tick, rounds: Sequence[int], *, racing: bool) -> None:
        self._tick, self._rounds = tick, list(rounds)
        self._share = FIRST_GUESS if racing else 1.0
        self._turn, self._spent, self._place = 0, 0, 0
        self._note = ""

    def note(self, text: str) -> None:
        """Show ``text`` beside the bar."""
        self._note = text
        self._tick(0, note=text)

    def work(self, n: int) -> None:
        """``n`` units of work were done."""
        self._spent += n
        if self._turn < len(self._rounds):
            done = min(self._spent / self._share, 0.97 * self._rounds[self._turn])
            self._move(sum(self._rounds[: self._turn]) + int(done))

    def next_round(self) -> None:
        """A round is over."""
        if self._turn < len(self._rounds):
            self._share = min(1.0, max(0.01, self._spent / max(1, self._rounds[self._turn])))
            self._turn, self._spent = self._turn + 1, 0
            self._move(sum(self._rounds[: self._turn]))

    def no_race(self) -> None:
        """All of this round's work will be done."""
        self._share = 1.0

    def _move(self, place: int) -> None:
        self._tick(max(0, place - self._place), note=self._note)
        self._place = max(self._place, place)


def rounds_of_work(
    strategy: str, candidates: Sequence[int], n: int, blocks: int, windows: int
) -> list[int]:
    """Work of each of a strategy's rounds when all windows are scored: block forwards and heads."""

    def work(done: int) -> int:
        # which blocks are gone hardly matters, so the middle ones are taken
        start = (len(candidates) - done) // 2
        gone = BlockSet(candidates[start : start + done])
        sets = [gone | {b} for b in candidates if b not in gone]
        return windows * (block_forwards(sets, blocks) + len(sets))

    if strategy in ("one-shot", "window"):
        return [work(0)]
    rounds = [work(done) for done in range(n)]
    if strategy == FINALS:
        return [*rounds, work(0)]
    if strategy == "beam":
        return [rounds[0], *(BEAM * w for w in rounds[1:])]
    return [*rounds, n * rounds[-1]] if strategy == "refine" else rounds
