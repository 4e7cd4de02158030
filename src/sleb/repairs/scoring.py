"""Choosing blocks by what the model loses after their gap is repaired.

The best blocks to remove are others then: a run of neighbours is easy to make up for. To fit every
candidate would cost too much, so each round's candidates are first ranked by plain loss, and only
the ``SHORTLIST`` best are fitted, on text of their own, and scored. Or a search takes no notice of
repairs, and only the sets that it ends with are fitted and scored, on text that the model has
written as well: what a repair does to other kinds of text shows there (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleb.calibration import Windows
from sleb.core.errors import InputError
from sleb.core.plan import FinalComparison, Finalist
from sleb.core.progress import Progress
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack
from sleb.repairs.data import repair_windows
from sleb.repairs.regression import Regression, gaps
from sleb.repairs.residual_writers import ResidualWriters
from sleb.repairs.self_generated import can_generate, write
from sleb.selection.objective import DENSE, BlockSet, Objective, Scorer, Values
from sleb.selection.sweep import Sweep

__all__ = [
    "FINAL_TOKENS",
    "SEARCH_TOKENS",
    "SHORTLIST",
    "RepairedObjective",
    "RepairedScores",
    "Repairs",
    "fitting",
    "self_generated_validation",
]

SHORTLIST = 8
SEARCH_TOKENS = 16_384
FINAL_TOKENS = 8192
"""What the repair of a set sees that is one of a few: they differ by more than text does."""
OWN_JUDGES = (8, 32)
"""Windows of the model's own text that judge these: half as many as of the given, within this."""
RIDGE = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Repairs:
    """What it takes to score sets after their repair: the stack, whose blocks are not compiled;
    windows [N, T] to fit on; and windows [M, T] that score what a search ends with, first those
    that were ``given``."""

    stack: BlockStack
    fitted: Tensor
    judging: Tensor
    given: int

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        text: Sequence[str],
        scored: Windows,
        aside: Windows | None,
        progress: Progress,
        *,
        finals: bool = False,
        own: Callable[[], Tensor] | None = None,
    ) -> Repairs:
        """``scored`` are a search's windows, ``aside`` are left out. With ``finals`` only a few
        sets will be scored: less is fitted on, and what the model writes judges them too, which
        ``own()`` gives [N, T] if another has a use for it as well.

        Raises:
            InputError: no text is left over to fit on.
        """
        fitted = fitting(model, text, scored, aside, FINAL_TOKENS if finals else SEARCH_TOKENS)
        judging = scored.ids
        if finals and can_generate(model.stack):
            seed = scored.record.seed + 1  # what it writes for the seed itself may be fitted on
            n, length = self_generated_validation(scored), scored.record.length
            written = own() if own else write(model, n, length, seed, progress)
            judging = torch.cat((judging, written))
        return cls(stack=model.stack, fitted=fitted, judging=judging, given=len(scored.ids))

    def record(self, sets: tuple[Finalist, ...]) -> FinalComparison:
        """The plan's record of ``sets`` that were compared."""
        windows = len(self.judging)
        return FinalComparison(
            sets=sets,
            fitted=self.fitted.numel(),
            windows=windows,
            self_generated=windows - self.given,
        )


def self_generated_validation(scored: Windows) -> int:
    """How many windows of its own text a model is to write, to judge by beside ``scored``."""
    least, most = OWN_JUDGES
    return min(most, max(least, len(scored.ids) // 2))


def fitting(
    model: LoadedModel,
    text: Sequence[str],
    scored: Windows,
    aside: Windows | None,
    tokens: int,
) -> Tensor:
    """Windows [N, T] that candidates' repairs are fitted on, about ``tokens`` tokens: none that
    scores them.

    Raises:
        InputError: no text is left over.
    """
    length, n = scored.record.length, len(scored.ids)
    fitted, _ = repair_windows(
        model.tokenizer,
        text,
        scored=scored,
        aside=aside,
        tokens=tokens + n * length,
        own=False,
        length=length,
        seed=scored.record.seed,
    )
    if len(fitted.ids) == n:
        raise InputError(
            "no text is left over to fit repairs on: give more --text, or fewer --windows"
        )
    return fitted.ids[n:]


class RepairedScores:
    """Scores sets of blocks as a Sweep does, each after a repair fitted on ``ids`` [N, T].

    Blocks that are fetched when they run are read once to fit a set, up to where its last gap ends,
    and once to score it."""

    def __init__(self, sweep: Sweep, ids: Tensor) -> None:
        self.sweep, self.ids = sweep, ids
        self._tick: Callable[[int], None] = lambda n: None
        self._branches: dict[int, ResidualWriters] = {}

    def values(self, sets: Sequence[BlockSet], start: int, stop: int) -> Values:
        """See :meth:`Sweep.values`."""
        rows = [self._row(blocks, start, stop) for blocks in sets]
        return np.concatenate(rows)

    @property
    def scorer(self) -> Scorer:
        """What an :class:`Objective` needs to score so."""
        return Scorer(
            values=self.values,
            work=self._work,
            on_work=self._on_work,
            note=self.sweep.stack.reader.noted,
        )

    def _work(self, sets: Sequence[BlockSet]) -> int:
        """About how many block forwards it takes to fit and score sets, for each scored window."""
        n = len(self.sweep.ids)
        return len(sets) * (2 * len(self.ids) + n) * len(self.sweep.stack) // n

    def _on_work(self, tick: Callable[[int], None]) -> None:
        self._tick = tick
        self.sweep.on_work(tick)

    def _row(self, blocks: BlockSet, start: int, stop: int) -> Values:
        stack = self.sweep.stack
        if blocks == DENSE:
            return self.sweep.values([blocks], start, stop)
        fitter = Regression(stack, blocks, self.ids, self.sweep.batch, self._branches)
        try:
            for gap in gaps(blocks, len(stack)):
                fitter.fit(gap, (RIDGE,), lambda: True, lambda i, name, new: new, self._tick)
            return self.sweep.values([blocks], start, stop)
        finally:
            fitter.restore()


class RepairedObjective(Objective):
    """Ranks by ``plain``, and scores the best of them anew; the rest have NaN everywhere."""

    def __init__(self, plain: Objective, scores: RepairedScores, **options: Any) -> None:
        super().__init__(scores.scorer, plain.n_windows, **options)
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
