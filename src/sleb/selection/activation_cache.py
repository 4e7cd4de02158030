"""Hidden states that one round of a search leaves for the next.

A round over R + {b}, for all b, computes for each b what enters block m without R and b. If the
round removes m, the next one needs exactly these states for every b below m. Which block a round
will remove shows long before its end, so states are kept at the block that is ahead; a wrong guess
costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sleb.selection.objective import BlockSet

__all__ = ["ActivationCache", "States"]

States = Mapping[tuple[int, BlockSet], Tensor]
"""What enters block i without some blocks below it: (i, those blocks) -> [B, T, D]."""


class ActivationCache:
    """States by range of windows, at most ``max_bytes`` in all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._states: dict[tuple[int, int], dict[tuple[int, BlockSet], Tensor]] = {}
        self._sums: dict[BlockSet, float] = {}

    def __bool__(self) -> bool:
        """Whether it holds any."""
        return any(self._states.values())

    def of(self, windows: tuple[int, int]) -> States:
        """What is kept for the windows from, to."""
        return self._states.get(windows, {})

    def learn(self, sets: Sequence[BlockSet], scores: Tensor) -> None:
        """Scores [sets, further windows], to tell which set is ahead."""
        sums = scores.sum(1).tolist() if self.max_bytes else [0.0] * len(sets)
        for blocks, value in zip(sets, sums, strict=True):
            self._sums[blocks] = self._sums.get(blocks, 0.0) + value

    def place(self, sets: Sequence[BlockSet]) -> int | None:
        """The block before which the next round will want the states of these sets: the one that
        sets the best of them apart."""
        if not self.max_bytes:
            return None
        guess = {s: value for s in sets if (value := self._score(s)) is not None}
        if not guess:
            return None
        best = min(guess, key=lambda s: guess[s])
        return min(best - BlockSet.intersection(*sets), default=None)

    def put(self, windows: tuple[int, int], states: States) -> None:
        """Keep these, in place of what was kept for the same windows, as far as there is room."""
        mine: dict[tuple[int, BlockSet], Tensor] = {}
        self._states[windows] = mine
        room = self.max_bytes - sum(x.nbytes for p in self._states.values() for x in p.values())
        for key, state in states.items():
            room -= state.nbytes
            if room < 0:
                break
            mine[key] = state

    def _score(self, blocks: BlockSet) -> float | None:
        """Of this set or, before its first windows, of the worst set with one block fewer."""
        if blocks in self._sums:
            return self._sums[blocks]
        fewer = [self._sums[s] for b in blocks if (s := blocks - {b}) in self._sums]
        return max(fewer, default=None)
