"""Scores of sets of blocks after their gaps are repaired.

The best blocks to remove are others then: a run of neighbours is easy to make up for. A search can
fit the best of each round's candidates (``repaired-loss``), or take no notice of repairs and fit
only the sets that it ends with (``greedy-or-window``), which are scored on text that the model has
written as well: what a repair does to other kinds of text shows there (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from sleb.calibration.windows import Windows
from sleb.core.process_group import group
from sleb.core.statistics import Values
from sleb.models.stack import decoder_config
from sleb.repairs.regression import Regression, gaps
from sleb.repairs.residual_writers import ResidualWriters
from sleb.selection.objective import DENSE, BlockSet, Scorer
from sleb.selection.resources import free_bytes
from sleb.selection.sweep import Sweep

RIDGE = 0.1


def repaired_scorer(sweep: Sweep, windows: Windows) -> Scorer:
    """Scores sets by ``sweep``, each after a repair that is fitted on ``windows``."""
    scores = RepairedScores(sweep, windows.ids, windows.scored)
    return Scorer(
        values=scores.values,
        work=scores.work,
        on_work=scores.on_work,
        note=sweep.stack.reader.noted,
    )


class RepairedScores:
    """Scores sets of blocks as a Sweep does, each after a repair fitted on ``ids`` [N, T]; see
    :class:`sleb.repairs.regression.Regression` for what is ``scored``.

    Blocks that are offloaded are read once to fit a set, up to where its last gap ends, and once to
    score it."""

    def __init__(self, sweep: Sweep, ids: Tensor, scored: Tensor | None = None) -> None:
        self.sweep, self.ids, self.scored = sweep, ids, scored
        self._tick: Callable[[int], None] = lambda n: None
        self._writers: dict[tuple[int, ...], ResidualWriters] = {}
        self._remembers = self._has_room()
        self._dense: dict[int, dict[int, list[Tensor]]] = {}  # by the windows of a batch

    def _has_room(self) -> bool:
        """Whether the dense model's streams behind all blocks may stay for the next set."""
        stack = self.sweep.stack
        width = int(decoder_config(stack.model.config).hidden_size)
        need = self.ids.numel() * width * stack.dtype.itemsize * len(stack) // group().size
        fits = not stack.streamed and need <= free_bytes(stack) // 8
        return group().exchange(b"%d" % fits).count(b"1") == group().size

    def values(self, sets: Sequence[BlockSet], start: int, stop: int) -> Values:
        """See :meth:`Sweep.values`."""
        return np.concatenate([self._row(blocks, start, stop) for blocks in sets])

    def work(self, sets: Sequence[BlockSet]) -> int:
        """About how many block forwards it takes to fit and score sets, for each scored window."""
        n = len(self.sweep.ids)
        return len(sets) * (2 * len(self.ids) + n) * len(self.sweep.stack) // n

    def on_work(self, tick: Callable[[int], None]) -> None:
        """See :meth:`Sweep.on_work`."""
        self._tick = tick
        self.sweep.on_work(tick)

    def _row(self, blocks: BlockSet, start: int, stop: int) -> Values:
        stack = self.sweep.stack
        if blocks == DENSE:
            return self.sweep.values([blocks], start, stop)
        batch = self.sweep.batch
        if self._remembers and batch not in self._dense:  # it is halved where memory ends
            self._dense = {batch: {}}
        fitter = Regression(
            stack,
            blocks,
            self.ids,
            batch,
            self._writers,
            scored=self.scored,
            dense=self._dense.get(batch),
        )
        fitter.tick = self._tick
        try:
            for gap in gaps(blocks, len(stack)):
                fitter.fit(gap, (RIDGE,))
            return self.sweep.values([blocks], start, stop)
        finally:
            fitter.restore()
