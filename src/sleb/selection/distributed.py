"""A sweep's calls, sharded over the ranks of a job so that each score is that of one process.

A call is a batch of windows and the sets to score on it. It goes whole to one rank. Where fewer
calls than ranks are left, several ranks share a call: each scores some *bundles* of its sets, and
repeats the prefixes that the bundles have in common. Scores are gathered after every few calls:
often enough that little is lost when the job is killed, and seldom enough that ranks hardly wait
for each other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from sleb.core.errors import DataError
from sleb.core.process_group import Group, group
from sleb.models.stack import BlockStack
from sleb.selection.objective import BlockSet, Call, Values
from sleb.selection.prefixes import block_forwards

__all__ = ["distribute"]

OFTEN_S, SELDOM_S = 2.0, 20.0
"""Scores are gathered sooner than ``SELDOM_S`` seconds after the last time, and not before
``OFTEN_S``, as far as whole calls allow."""


class Shardable(Protocol):
    """What can be sharded: see :class:`sleb.selection.sweep.Sweep`."""

    stack: BlockStack
    batch: int

    def bundles(self, sets: Sequence[BlockSet], windows: int) -> list[Sequence[BlockSet]]:
        """The parts of ``sets`` that may be scored apart."""

    def scores(
        self,
        sets: Sequence[BlockSet],
        start: int,
        stop: int,
        among: Sequence[BlockSet] | None = None,
    ) -> Tensor:
        """Scores of ``sets``, which are whole bundles of ``among``."""


def distribute(sweep: Shardable, calls: Sequence[Call]) -> Iterator[tuple[Call, Values]]:
    """Each call with its scores, float64 [sets, windows] or [sets, windows, M], in order.

    Raises:
        Lost: another process has ended.
        DataError: the ranks no longer do the same; or as :meth:`Sweep.scores`, on all ranks.
    """
    here = group()
    if not here.several:
        for call in calls:
            yield call, sweep.scores(*call).numpy()
        return
    calls = [piece for call in calls for piece in _pieces(sweep, call, here, len(calls))]
    whole, at = len(calls) - len(calls) % here.size, 0
    shares = {i: _shared(sweep, calls, i, whole, here) for i in range(len(calls))}
    turns = 1  # calls of each rank before scores are gathered
    while at < len(calls):
        some = range(at, min(at + turns * here.size, len(calls)))
        seconds, found = _gathered(sweep, [(calls[i], shares[i]) for i in some], here)
        yield from ((calls[i], values) for i, values in zip(some, found, strict=True))
        if seconds < OFTEN_S:
            turns *= 2
        elif seconds > SELDOM_S:
            turns = max(1, turns // 2)
        at = some.stop


Shares = dict[int, list[BlockSet]]
"""By rank, the sets of a call that it scores."""


def _pieces(sweep: Shardable, call: Call, here: Group, calls: int) -> Iterator[Call]:
    """A call of many batches, as where blocks are streamed, in shorter ones for all ranks."""
    sets, start, stop = call
    batches = -(-(stop - start) // sweep.batch)
    step = sweep.batch * max(1, -(-batches * calls // here.size))
    for a in range(start, stop, step):
        yield sets, a, min(a + step, stop)


def _shared(sweep: Shardable, calls: Sequence[Call], i: int, whole: int, here: Group) -> Shares:
    """Who scores what of call i. ``whole``: the number of calls that make equally many for all."""
    sets, start, stop = calls[i]
    ranks = here.size // (len(calls) - whole) if i >= whole else 1
    bundles = sweep.bundles(list(dict.fromkeys(sets)), stop - start)
    if min(ranks, len(bundles)) < 2:
        return {i % here.size: list(sets)}
    offset = (i - whole) * ranks
    cost = [block_forwards(bundle, len(sweep.stack)) + len(bundle) for bundle in bundles]
    load = dict.fromkeys(range(offset, offset + ranks), 0)
    share: Shares = {rank: [] for rank in load}
    for k in sorted(range(len(bundles)), key=lambda k: (-cost[k], k)):
        rank = min(load, key=lambda r: load[r])
        load[rank] += cost[k]
        share[rank] += bundles[k]
    return {rank: mine for rank, mine in share.items() if mine}


def _gathered(
    sweep: Shardable, work: Sequence[tuple[Call, Shares]], here: Group
) -> tuple[float, list[Values]]:
    """Do this rank's part and gather the others'. Gives the slowest one's seconds, and all scores
    of each call."""
    began = time.perf_counter()

    def own() -> list[Values]:
        return [
            sweep.scores(shares[here.rank], start, stop, among=sets).numpy()
            for (sets, start, stop), shares in work
            if here.rank in shares
        ]

    mine = here.all_or_raise(own)
    head = {
        "seconds": time.perf_counter() - began,
        "batch": sweep.batch,
        "work": hashlib.sha256(repr(work).encode()).hexdigest(),
        "tail": [list(part.shape[2:]) for part in mine][:1],
    }
    raw = b"".join(np.ascontiguousarray(part).tobytes() for part in mine)
    said = here.exchange(json.dumps(head).encode() + b"\n" + raw)
    heads, parts = [], []
    for text in said:
        line, _, rest = text.partition(b"\n")
        heads.append(json.loads(line))
        parts.append(np.frombuffer(rest, dtype=np.float64))
    if len({h["work"] for h in heads}) > 1:
        raise DataError(
            "the processes of this job no longer do the same work, so their machines or versions "
            "differ: run it on machines of one kind, with the same software"
        )
    sweep.batch = min(h["batch"] for h in heads)  # some may have run out of memory
    tail = next(tuple(h["tail"][0]) for h in heads if h["tail"])
    places = [0] * len(parts)
    found = []
    for (sets, start, stop), shares in work:
        values = np.empty((len(sets), stop - start, *tail))
        for rank, scored in shares.items():
            shape = (len(scored), *values.shape[1:])
            size = int(np.prod(shape))
            rows = parts[rank][places[rank] : places[rank] + size].reshape(shape)
            places[rank] += size
            order = {s: k for k, s in enumerate(scored)}
            for k, s in enumerate(sets):
                if s in order:
                    values[k] = rows[order[s]]
        found.append(values)
    return max(h["seconds"] for h in heads), found
