"""Choosing blocks by what the model loses after their gap is repaired.

The best blocks to remove are others then: a run of neighbours is easy to make up for. To fit every
candidate would cost too much, so each round's candidates are first ranked by plain loss, and only
the ``SHORTLIST`` best are fitted, on text of their own, and scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sleb.repair.fit import Fitter, gaps
from sleb.repair.maps import Branches
from sleb.selection.objective import DENSE, BlockSet, Objective, Values
from sleb.selection.sweep import Sweep

__all__ = ["SEARCH_TOKENS", "SHORTLIST", "RepairedObjective", "RepairedScores"]

SHORTLIST = 8
SEARCH_TOKENS = 16_384
RIDGE = 0.1


class RepairedScores:
    """Scores sets of blocks as a Sweep does, each after a repair fitted on ``ids`` [N, T].

    Blocks that are fetched when they run are read once to fit a set, up to where its last gap ends,
    and once to score it."""

    def __init__(self, sweep: Sweep, ids: Tensor) -> None:
        self.sweep, self.ids = sweep, ids
        self._branches: dict[int, Branches] = {}

    def values(self, sets: Sequence[BlockSet], start: int, stop: int) -> Values:
        """See :meth:`Sweep.values`."""
        rows = [self._row(blocks, start, stop) for blocks in sets]
        return np.concatenate(rows)

    def _row(self, blocks: BlockSet, start: int, stop: int) -> Values:
        stack = self.sweep.stack
        if blocks == DENSE:
            return self.sweep.values([blocks], start, stop)
        fitter = Fitter(stack, blocks, self.ids, self.sweep.batch, self._branches)
        try:
            for gap in gaps(blocks, len(stack)):
                fitter.fit(gap, (RIDGE,), lambda: True, lambda i, name, new: new, lambda n: None)
            return self.sweep.values([blocks], start, stop)
        finally:
            fitter.restore()


class RepairedObjective(Objective):
    """Ranks by ``plain``, and scores the best of them anew; the rest have NaN everywhere."""

    def __init__(self, plain: Objective, scores: RepairedScores, **options: Any) -> None:
        super().__init__(scores.values, plain.n_windows, **options)
        self.plain = plain

    def best(
        self,
        sets: Sequence[BlockSet],
        k: int = 1,
        note: str = "",
        guides: Sequence[BlockSet] = (),
    ) -> Values:
        """See :meth:`Objective.best`."""
        few = min(len(sets), max(k, SHORTLIST))
        plain = self.plain.best(sets, k=few, note=f"{note}, by plain loss", guides=guides)
        means = np.where(np.isfinite(plain).all(1), plain.mean(1), np.inf)
        chosen = np.argsort(means, kind="stable")[:few]
        values = np.full(plain.shape, np.nan)
        values[chosen] = self.scores([sets[i] for i in chosen], f"{note}, {few} of them repaired")
        return values
