"""Which sets of blocks to try. A strategy sees only an Objective; see docs/extending.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sleb.core.errors import InputError
from sleb.core.plan import Finalist, Round
from sleb.core.registry import Registry
from sleb.core.statistics import Values, standard_error
from sleb.core.units import overlap
from sleb.selection.objective import DENSE, BlockSet, Objective
from sleb.selection.racing import leaders, rank, rounded

BEAM = 4
GREEDY_OR_WINDOW = "greedy-or-window"
"""The strategy that compares by the objective's ``final`` scores."""
RELINKED = "between both"
"""What a finalist is called that lies between what was found by different measures."""
EXCHANGES = 4
"""Of what can be exchanged on the way from one set to another, so many are repaired and scored."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A strategy's result: blocks in order of removal, the rounds that justify it, and the dense
    model's score per window [windows]. Where it has compared what others found, ``finalists`` are
    these, best first, and the rest is the best one's."""

    order: tuple[int, ...]
    rounds: tuple[Round, ...]
    dense: Values
    finalists: tuple[Finalist, ...] = ()


Strategy = Callable[[Objective, Sequence[int], int], SearchResult]
"""``strategy(objective, candidates, n) -> SearchResult`` with n blocks out of the candidates;
greedy and beam stop sooner if ``objective.enough`` of the blocks removed so far."""

STRATEGIES: Registry[Strategy] = Registry("strategy")


@STRATEGIES.register("greedy")
def greedy(objective: Objective, candidates: Sequence[int], n: int) -> SearchResult:
    """Remove the block whose absence costs least, re-score all others, repeat up to n times.

    Source: SLEB (2402.09025), algorithm 1.
    """
    order: list[int] = []
    tried = []
    for turn in range(1, n + 1):
        live = [b for b in candidates if not any(overlap(b, gone) for gone in order)]
        if not live:
            break
        last = f", last removed {order[-1]}" if order else ""
        saving = objective.saving
        values = objective.best(
            [BlockSet([*order, b]) for b in live],
            note=f"round {turn} of {n}, {len(live)} candidates{last}",
            guides=[BlockSet([*order[:-1], b]) for b in live] if order else (),
            saved=[100 * saving.share([b]) for b in live] if saving else (),
            above=BlockSet(order) if saving else DENSE,
        )
        tried.append((live, values))
        order += rank(live, values, 1).removed
        if objective.enough(order):
            break
    if objective.saving:  # what rounds compared is no loss of a set
        rounds = tuple(rank(live, values, 1) for live, values in tried)
        return SearchResult(order=tuple(order), rounds=rounds, dense=_dense(objective))
    return _settled(objective, order, tried, order[-1])


@STRATEGIES.register("one-shot")
def one_shot(objective: Objective, candidates: Sequence[int], n: int) -> SearchResult:
    """Score every block once, alone, and remove the n best. Source: SLEB, section 3, metric 2."""
    sets = [BlockSet([b]) for b in candidates]
    values = objective.best(sets, k=n, note=f"{len(candidates)} candidates, once")
    dense = _dense(objective)
    only = rank(candidates, values, n, dense)
    return SearchResult(order=only.removed, rounds=(only,), dense=dense)


@STRATEGIES.register("window")
def window(objective: Objective, candidates: Sequence[int], n: int) -> SearchResult:
    """The best run of n neighbouring blocks; such cuts are the easiest to repair (Gromov et al.,
    2403.17887). The recorded round names each run by its first block."""
    runs = _runs(candidates, n)
    if not runs:
        raise InputError(f"no {n} neighbouring blocks are all candidates; protect fewer")
    values = objective.best([BlockSet(run) for run in runs], note=f"{len(runs)} runs of {n}")
    starts = [run[0] for run in runs]
    (start,) = rank(starts, values, 1).removed
    return _settled(objective, range(start, start + n), [(starts, values)], start)


@STRATEGIES.register("beam")
def beam(objective: Objective, candidates: Sequence[int], n: int) -> SearchResult:
    """Greedy with the 4 best partial sets kept in each round instead of one. Never worse than
    greedy on the scored windows if greedy's sets stay in the beam; usually better."""
    paths: list[tuple[int, ...]] = [()]
    rounds: list[dict[BlockSet, Round]] = []
    for turn in range(1, n + 1):
        # a set is reached along several paths; the best-ranked parent's is kept
        grown = {
            BlockSet([*p, b]): (*p, b) for p in reversed(paths) for b in candidates if b not in p
        }
        sets = sorted(grown, key=sorted)
        values = objective.best(
            sets,
            k=min(BEAM, len(sets)),
            note=f"round {turn} of {n}, {len(sets)} sets",
            guides=[BlockSet([*grown[s][:-2], grown[s][-1]]) for s in sets] if turn > 1 else (),
        )
        rounds.append({BlockSet(p): _children(p, sets, values) for p in paths})
        paths = [grown[sets[i]] for i in leaders(values)[:BEAM]]
        if objective.enough(paths[0]):
            break
    order = paths[0]
    history = [turn[BlockSet(order[:i])] for i, turn in enumerate(rounds)]
    return SearchResult(
        order=order,
        rounds=tuple(r.choosing(b) for r, b in zip(history, order, strict=True)),
        dense=_dense(objective),
    )


@STRATEGIES.register("refine")
def refine(objective: Objective, candidates: Sequence[int], n: int) -> SearchResult:
    """Greedy, then swap one removed block for one that stayed while that lowers the score. The
    final set is put in order greedily, so that the plan has good shallower depths too."""
    start = greedy(objective, candidates, n)
    chosen = BlockSet(start.order)
    while True:
        swaps = [
            chosen - {out} | {b} for out in sorted(chosen) for b in candidates if b not in chosen
        ]
        sets = [chosen, *swaps]
        values = objective.best(sets, note=f"refining, {len(swaps)} swaps")
        best = sets[leaders(values)[0]]
        if best == chosen:
            break
        chosen = best
    if chosen == BlockSet(start.order):
        return start
    return greedy(objective, sorted(chosen), n)


@STRATEGIES.register(GREEDY_OR_WINDOW)
def greedy_or_window(objective: Objective, candidates: Sequence[int], n: int) -> SearchResult:
    """What greedy finds, or the best run of as many neighbours, by the objective and by its
    ``others``, or a set between these: the one that is best by its ``final`` scores, which with
    this strategy are losses after a repair."""
    found: dict[str, SearchResult] = {}
    for name, each in {"": objective, **objective.others}.items():
        suffix = f" on {name}" if name else ""
        chosen = found[f"greedy{suffix}"] = greedy(each, candidates, n)
        size = len(chosen.order)
        if _runs(candidates, size):
            run = window(each, candidates, size)
            # blocks may differ in size, and a run then miss the target that greedy's reach
            if objective.enough(run.order) or not objective.enough(chosen.order):
                found[f"window{suffix}"] = run
    unlike = {BlockSet(f.order): name for name, f in reversed(found.items())}
    found = {name: f for name, f in found.items() if unlike[BlockSet(f.order)] == name}
    sets = [BlockSet(f.order) for f in found.values()]
    if len(sets) == 1:
        return found["greedy"]
    final, note = objective.final, "greedy or window, each repaired"
    dense, *values = final.scores([DENSE, *sets], note)
    losses = dict(zip(found, values, strict=True))
    if objective.others and (relinked := _relinked(objective, sets)) not in sets:
        found[RELINKED] = greedy(objective, sorted(relinked), len(relinked))
        # a part of it may reach the target
        losses[RELINKED] = final.scores([BlockSet(found[RELINKED].order)], note)[0]
    names = [[*found][i] for i in final.leaders(np.array([losses[name] for name in found]))]

    def finalist(name: str) -> Finalist:
        above, increase = losses[name] - losses[names[0]], losses[name] - dense
        return Finalist(
            strategy=name,
            order=found[name].order,
            increase=round(float(increase.mean()), 6),
            by_kind={k: round(float(increase[rows].mean()), 6) for k, rows in final.kinds.items()},
            excess=round(float(above.mean()), 6),
            excess_se=rounded(standard_error(above)),
        )

    return replace(found[names[0]], finalists=tuple(map(finalist, names)))


def _relinked(objective: Objective, sets: Sequence[BlockSet]) -> BlockSet:
    """The best set on the ways from the best of ``sets`` to the others that share blocks with it,
    by final scores: a block is exchanged at a time, the best exchange first, while that helps (path
    relinking, Glover 1996). What greedy finds by one measure costs much by another, and sets
    between them little by both."""
    final, seen = objective.final, [*sets]
    wanted = objective.enough(sorted(sets[0]))

    def best() -> BlockSet:
        return seen[final.leaders(final.scores(seen, "sets between these, each repaired"))[0]]

    def exchanges(here: BlockSet, goal: BlockSet) -> list[BlockSet]:
        near = [here - {out} | {b} for out in sorted(here - goal) for b in sorted(goal - here)]
        near = [s for s in near if s not in seen and objective.enough(sorted(s)) >= wanted]
        if not near:
            return []
        plain = sum(other.scores(near).mean(1) for other in objective.others.values())
        return [near[i] for i in np.argsort(plain, kind="stable")[:EXCHANGES]]

    here = best()
    for goal in sets:
        while here & goal and (found := exchanges(here, goal)):
            seen += found
            before, here = here, best()
            if here == before:
                break
    return here


def _settled(
    objective: Objective,
    order: Sequence[int],
    tried: Sequence[tuple[Sequence[int], Values]],
    last: int,
) -> SearchResult:
    """What was found, with the final set scored on every window; ``last`` stands for it in the last
    round. ``tried``: each round's candidates and their values."""
    dense, final = objective.scores([DENSE, BlockSet(order)])
    blocks, values = tried[-1]
    values[list(blocks).index(last)] = final
    rounds = tuple(rank(blocks, values, 1, dense) for blocks, values in tried)
    return SearchResult(order=tuple(order), rounds=rounds, dense=dense)


def _runs(candidates: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """The runs of n neighbouring blocks."""
    runs = zip(*(candidates[i:] for i in range(n)), strict=False)
    return [run for run in runs if all(b == a + 1 for a, b in pairwise(run))]


def _children(path: tuple[int, ...], sets: Sequence[BlockSet], values: Values) -> Round:
    """The record of one partial set's round: its extensions by one block."""
    rows = [i for i, s in enumerate(sets) if s > BlockSet(path)]
    blocks = [next(iter(sets[i] - BlockSet(path))) for i in rows]
    best = values[rows]
    if not np.isfinite(best).all(1).any():  # every extension lost its race
        return Round(removed=(), scores=())
    return rank(blocks, best, 1)


def _dense(objective: Objective) -> Values:
    return np.asarray(objective.scores([DENSE])[0], dtype=np.float64)
