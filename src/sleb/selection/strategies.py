"""Which sets of blocks to try. A strategy sees only an Objective; see docs/extending.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sleb.plan import Round
from sleb.registry import Registry
from sleb.selection.objective import BlockSet, Objective, Values, rank

__all__ = ["STRATEGIES", "Found", "Strategy"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A strategy's result: blocks in order of removal, the rounds that justify it, and the dense
    model's score per window [windows]."""

    order: tuple[int, ...]
    rounds: tuple[Round, ...]
    dense: Values


Strategy = Callable[[Objective, Sequence[int], int], Found]
"""``strategy(objective, candidates, n) -> Found`` with n blocks out of the candidates."""

STRATEGIES: Registry[Strategy] = Registry("strategy")


@STRATEGIES.register("greedy")
def greedy(objective: Objective, candidates: Sequence[int], n: int) -> Found:
    """Remove the block whose absence costs least, re-score all others, repeat n times.

    Source: SLEB (2402.09025), algorithm 1.
    """
    order: list[int] = []
    rounds = []
    for turn in range(1, n + 1):
        live = [b for b in candidates if b not in order]
        # the current model is asked for too: in the first round it is the dense one, computed in
        # the same sweep, and afterwards it is known
        sets = [BlockSet(order), *(BlockSet([*order, b]) for b in live)]
        last = f", last removed {order[-1]}" if order else ""
        values = objective.scores(sets, note=f"round {turn} of {n}, {len(live)} candidates{last}")
        rounds.append(rank(live, values[1:], 1))
        order += rounds[-1].removed
    return Found(order=tuple(order), rounds=tuple(rounds), dense=_dense(objective))


@STRATEGIES.register("one-shot")
def one_shot(objective: Objective, candidates: Sequence[int], n: int) -> Found:
    """Score every block once, alone, and remove the n best. Source: SLEB, section 3, metric 2."""
    sets = [BlockSet(), *(BlockSet([b]) for b in candidates)]
    values = objective.scores(sets, note=f"{len(candidates)} candidates, once")
    only = rank(candidates, values[1:], n)
    return Found(order=only.removed, rounds=(only,), dense=_dense(objective))


def _dense(objective: Objective) -> Values:
    return np.asarray(objective.scores([BlockSet()])[0], dtype=np.float64)
