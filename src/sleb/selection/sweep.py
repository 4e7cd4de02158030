"""Score many sets of removed blocks in one walk over the model, by prefix sharing.

Sets that agree on the blocks below ``i`` have the same hidden state there. The walk keeps one
activation per distinct *prefix* of the sets and runs each block once per live prefix, so what sets
share is computed once, and a block's weights are touched once per batch of windows, whatever the
number of sets. A greedy round over n live blocks costs about n²/2 block forwards instead of n².

Activations go through the model's own code, as in a separate full pass, so scores are those of
separate passes; where batches differ, to rounding.

Prefixes share a forward call only within a *bundle*, a part of the sets that depends on nothing but
the sets and the batch; what several bundles need is computed alone. So bundles can be sharded over
processes, and every score is the same to the bit. A call, which is a batch of windows and the sets
to score on it, goes whole to one rank; where fewer calls than ranks are left, several share one,
each with some of its bundles. Scores are gathered after every few calls: often enough that little
is lost when the job is killed, and seldom enough that ranks hardly wait for each other.

Where blocks are offloaded to disk, a walk takes as many batches of windows as ``max_bytes`` of
activations allow, and each block is read once for all of them. More windows take more walks: to
read the blocks again costs less than to spill activations to disk and read them back, since for
every block each prefix would have to come and go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from sleb.calibration.images import with_images
from sleb.calibration.windows import used_length
from sleb.core.errors import DataError, ResourceError, UnsupportedModel
from sleb.core.process_group import Group, group
from sleb.core.statistics import Values
from sleb.core.units import block_of, whole
from sleb.models.stack import BlockStack, decoder_config
from sleb.selection.metrics import TokenMetric
from sleb.selection.objective import DENSE, BlockSet, Call, Scorer
from sleb.selection.resources import batch_for, busy_tokens, free_bytes, logit_bytes

logger = logging.getLogger(__name__)

BUNDLES = 8
"""Parts of a call's sets that can go to different processes, where calls are large enough. More
would have each process repeat more of what all sets share."""
OFTEN_S, SELDOM_S = 2.0, 20.0
"""Scores are gathered sooner than ``SELDOM_S`` seconds after the last time, and not before
``OFTEN_S``, as far as whole calls allow."""

Patch = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the model's blocks have other weights, as of a repair."""


class Part:
    """A batch of windows on its way through the blocks: one activation [B, T, D] per prefix, the
    set of blocks that were skipped so far. ids [B, T]."""

    def __init__(self, stack: BlockStack, ids: Tensor) -> None:
        self.stack, self.ids = stack, ids
        hidden, calls = stack.enter(ids)
        self.hidden = {DENSE: hidden}
        self._calls = {1: calls}  # what the blocks are handed, by number of prefixes in a batch

    def advance(
        self,
        i: int,
        runs: Sequence[Sequence[BlockSet]],
        skips: Collection[BlockSet],
        most: int,
    ) -> None:
        """Take the prefixes through block i that become each of ``runs``, which leave out the same
        parts of it, at most ``most`` in one call, and those past it that become ``skips``; drop all
        others."""
        stack, call = self.stack, self._calls[1][i]
        after = {prefix: stack.skip(self.hidden[below(prefix, i)], call) for prefix in skips}
        uses = Counter(below(prefix, i) for together in runs for prefix in together)
        for share in chain.from_iterable(groups(together, most) for together in runs):
            if len(share) not in self._calls:
                self._calls[len(share)] = self.stack.enter(self.ids.repeat(len(share), 1))[1]
            merged = self._merged([self._taken(below(prefix, i), uses) for prefix in share], i)
            with self.stack.bypassed([u for u in share[0] if block_of(u) == i]):
                out = self.stack.run(i, merged, self._calls[len(share)][i])
            after.update(zip(share, torch.split(out, len(self.ids)), strict=True))
        self.hidden = after

    def _taken(self, prefix: BlockSet, uses: Counter[BlockSet]) -> Tensor:
        """An activation, which is freed as soon as nothing else needs it."""
        uses[prefix] -= 1
        return self.hidden[prefix] if uses[prefix] else self.hidden.pop(prefix)

    def _merged(self, parts: Sequence[Tensor], i: int) -> Tensor:
        """One batch of several, where block i is: some may not have run on the device before."""
        if len(parts) == 1:
            return parts[0]
        here = self.stack.device(i)
        return torch.cat([part.to(here) for part in parts])


class Sweep:
    """Scores block sets on windows of tokens. ids [N, T].

    ``forwards`` counts block forwards of one window, the unit of the search's work. All sets but
    the dense one are computed under ``patch``. Of tokens [N, T] only those that are ``scored``
    count, by default all; no window has the last of these before its second token.
    """

    def __init__(
        self,
        stack: BlockStack,
        ids: Tensor,
        metric: TokenMetric,
        *,
        batch: int | None = None,
        max_bytes: int | None = None,
        patch: Patch | None = None,
        scored: Tensor | None = None,
    ) -> None:
        if scored is None and with_images(ids):
            raise ValueError("places of images are not scored: say which tokens are")
        self.stack, self.ids, self.metric, self.scored = stack, ids, metric, scored
        self.batch = batch_for(stack, ids, batch)
        self.max_bytes = max_bytes or free_bytes(stack) // 2
        if stack.streamed:  # decides how windows are sharded
            self.max_bytes = min(map(int, group().exchange(b"%d" % self.max_bytes)))
        self._patch = patch
        self.forwards = 0
        self._tick: Callable[[int], None] = lambda n: None

    @property
    def scorer(self) -> Scorer:
        """What an :class:`Objective` needs to score by this sweep."""
        return Scorer(
            values=self.values,
            step=self.step,
            fill=self.fill,
            distribute=partial(distribute, self),
            work=self.work,
            on_work=self.on_work,
            note=self.stack.reader.noted,
        )

    def work(self, sets: Sequence[BlockSet]) -> int:
        """Block forwards and heads that one sweep over ``sets`` takes for a window."""
        return block_forwards(sets, len(self.stack)) + len(sets)

    def on_work(self, tick: Callable[[int], None]) -> None:
        """Call ``tick(n)`` after every n units of work: a block forward or a head, of a window.
        What other ranks do meanwhile is counted as much as what is done here."""
        self._tick = (lambda n: tick(n * group().size)) if group().several else tick

    def step(self, sets: int) -> int:
        """Windows that one walk takes with so many sets.

        Raises:
            ResourceError: the hidden states of one window are more than ``max_bytes``.
        """
        if not self.stack.streamed:
            return self.batch
        width = int(decoder_config(self.stack.model.config).hidden_size)
        # one more stream for what runs ahead of all sets, one for the dense model, one in the works
        need = (sets + 3) * self.ids.shape[1] * width * self.stack.dtype.itemsize
        if need > self.max_bytes:
            raise ResourceError(
                f"the hidden states of one window for {sets} sets take {need / 1e6:.0f} MB, and "
                f"{self.max_bytes / 1e6:.0f} MB are allowed: raise --max-memory, or use a shorter "
                "--length"
            )
        windows = self.max_bytes // need
        return int(windows if windows < self.batch else windows - windows % self.batch)

    def fill(self, sets: int) -> int:
        """Windows of so many sets that make one full batch."""
        return max(1, self.batch // sets)

    def bundles(self, sets: Sequence[BlockSet], windows: int) -> list[Sequence[BlockSet]]:
        """The parts of ``sets`` that may share calls on so many windows: about ``BUNDLES``, unless
        a call would be too small for the device to be busy."""
        tokens = self.ids.shape[1] * max(1, min(windows, self.batch))
        full = min(busy_tokens(self.stack), self.ids.shape[1] * self.batch)
        size = max(math.ceil(len(sets) / BUNDLES), math.ceil(full / tokens))
        return [sets[a : a + size] for a in range(0, len(sets), size)]

    def scores(
        self,
        sets: Sequence[BlockSet],
        start: int,
        stop: int,
        among: Sequence[BlockSet] | None = None,
    ) -> Tensor:
        """Mean score per set and window, float64 [len(sets), stop - start], in the metric's unit;
        [.., .., M] for a metric of M values. If other processes score the rest of ``among``, all
        of ``sets`` are whole bundles of it, and scores are those of ``scores(among, ..)``.

        Raises:
            DataError: a score is NaN or infinite; the message names the set and the window.
            ResourceError: a single window does not fit in memory. (Otherwise running out of
                memory halves the batch and goes on.)
        """
        parts: list[Tensor] = []
        while start < stop:
            end = min(start + self.step(len(sets)), stop)
            try:
                parts.append(self._walk_scores(sets, among or sets, start, end))
            except torch.OutOfMemoryError:
                if self.batch > 1:
                    self.batch //= 2
                    self.max_bytes //= 2
                    logger.info("out of memory: going on with %d windows per batch", self.batch)
                else:
                    raise ResourceError(
                        f"out of memory with one window of {self.ids.shape[1]} tokens: "
                        "use a shorter --length, or --dtype bfloat16"
                    ) from None
                torch.cuda.empty_cache()
                continue
            start = end
        return torch.cat(parts, dim=1)

    def values(self, sets: Sequence[BlockSet], start: int, stop: int) -> Values:
        """:meth:`scores`, as the ranks of the job find them together."""
        step = self.step(len(sets))
        calls = [(sets, a, min(a + step, stop)) for a in range(start, stop, step)]
        return np.concatenate([values for _, values in distribute(self, calls)], axis=1)

    @torch.inference_mode()
    def _walk_scores(
        self, sets: Sequence[BlockSet], among: Sequence[BlockSet], start: int, stop: int
    ) -> Tensor:
        wanted = list(dict.fromkeys([*sets, *([DENSE] if self.metric.needs_dense else [])]))
        bundles = self.bundles(list(dict.fromkeys(among)), stop - start)
        # every process needs the dense model for such a metric, so no bundle may have it to itself
        users = [*bundles, [DENSE]] if self.metric.needs_dense else bundles
        ids, counted = self.ids[start:stop], None
        if self.scored is not None:  # what is behind all that counts need not be computed
            counted = self.scored[start:stop]
            ids = ids[:, : (length := used_length(counted))]
            counted = counted[:, 1:length]
        if self._patch is None:
            parts = self.walk(wanted, ids, users)
        else:
            parts = self._walk_patched(wanted, ids, users)
        if with_images(parts[0].ids) not in self.stack.checked:
            self._check(parts[0].hidden, parts[0].ids)
        columns = []
        which = iter(torch.split(counted, self.batch) if counted is not None else ())
        while parts:
            part = parts.pop(0)  # its memory is needed for the logits
            dense = part.hidden.get(DENSE) if self.metric.needs_dense else None
            mask = next(which, None)
            scored: dict[BlockSet, Tensor] = {}
            for bundle in bundles:
                if mine := [s for s in bundle if s in sets]:
                    last = self.stack.device(len(self.stack) - 1)
                    merged = torch.cat([part.hidden.pop(s).to(last) for s in mine])
                    found = self._score(merged, dense, part.ids, mask)
                    scored.update(zip(mine, found, strict=True))
            columns.append(torch.stack([scored[s] for s in sets]))
            self._tick(len(scored) * len(part.ids))
        out = torch.cat(columns, dim=1)
        if not torch.isfinite(out).all():
            worst = tuple((~torch.isfinite(out)).nonzero()[0].tolist())
            row, column = worst[:2]
            raise DataError(
                f"{self.metric.name} is {out[worst].item()} with blocks {sorted(sets[row])} "
                f"removed, on window {start + column}: try --dtype float32, and check that the "
                "model itself is sound with: sleb eval"
            )
        return out

    def walk(
        self,
        sets: Sequence[BlockSet],
        ids: Tensor,
        bundles: Sequence[Sequence[BlockSet]] | None = None,
    ) -> list[Part]:
        """Hidden states after the last block, per set. ids [W, T] -> parts of at most ``batch``
        windows, in order. ``bundles``: see :meth:`bundles`; by default all sets are one."""
        parts = [Part(self.stack, part) for part in torch.split(ids, self.batch)]
        before = needed(sets, len(self.stack))
        users = [needed(bundle, len(self.stack)) for bundle in bundles or [sets]]
        busy = [i for i in range(len(self.stack)) if any(not whole(p, i) for p in before[i + 1])]
        following = dict(pairwise(busy))
        for i in range(len(self.stack)):
            wanted = before[i + 1]
            runs = sharing({p for p in wanted if not whole(p, i)}, [u[i + 1] for u in users], i)
            skips = {p for p in wanted if whole(p, i)}
            with self.stack.holding(i, following.get(i)) if runs else contextlib.nullcontext():
                for part in parts:
                    part.advance(i, runs, skips, most=max(1, self.batch // len(part.ids)))
                    done = sum(map(len, runs)) * len(part.ids)
                    self.forwards += done
                    self._tick(done)
        return parts

    def _walk_patched(
        self, sets: Sequence[BlockSet], ids: Tensor, bundles: Sequence[Sequence[BlockSet]]
    ) -> list[Part]:
        """:meth:`walk` with other weights for the dense model than for the rest."""
        assert self._patch is not None
        parts = self.walk([DENSE], ids) if DENSE in sets else []
        with self._patch():
            others = self.walk([s for s in sets if s != DENSE], ids, bundles)
        for part, dense in zip(others, parts, strict=False):
            part.hidden = {**dense.hidden, **part.hidden}
        return others

    def _score(
        self, hidden: Tensor, dense: Tensor | None, ids: Tensor, scored: Tensor | None
    ) -> Tensor:
        """Mean over the T-1 predicted tokens of each window, or what else the metric makes of them.
        hidden [S*B, T, D] of S sets, dense [B, T, D], ids [B, T], scored [B, T-1] -> float64 [S, B]
        or [S, B, M] on the CPU."""
        if self.metric.of and hidden.device.type == "cpu" and self.stack.plain_head:
            return self._score_by_head(hidden, dense, ids, scored)
        batch, predicted = len(ids), ids.shape[1] - 1
        vocab = int(decoder_config(self.stack.model.config).vocab_size)
        rows = max(1, logit_bytes(self.stack) // (4 * vocab))
        # whole windows at a time, or slices of one window: never more positions than it has,
        # so that learned position tables are long enough
        high, wide = max(1, rows // predicted), min(rows, predicted)
        following = ids[:, 1:].clamp_min(0).to(hidden.device)  # no place of an image is scored
        values: Tensor | None = None
        for a in range(0, len(hidden), high):
            window = torch.arange(a, min(a + high, len(hidden)), device=hidden.device) % batch
            for p in range(0, predicted, wide):
                here = slice(p, min(p + wide, predicted))
                targets = following[window, here]
                logits = self.stack.exit(hidden[a : a + high, here]).flatten(0, 1)
                base = None
                if dense is not None:
                    base = self.stack.exit(dense[window, here]).flatten(0, 1)
                found = self.metric.tokens(logits, targets.flatten().to(logits.device), base)
                found = found.view(*targets.shape, *found.shape[1:]).to(hidden.device)
                if values is None:
                    values = found.new_empty((len(hidden), predicted, *found.shape[2:]))
                values[a : a + high, here] = found
        assert values is not None
        if scored is not None:
            scored = scored.to(values.device).repeat(len(hidden) // batch, 1)
        found = self.metric.reduced(values, scored)
        return found.view(-1, batch, *found.shape[1:]).cpu()

    def _score_by_head(
        self, hidden: Tensor, dense: Tensor | None, ids: Tensor, scored: Tensor | None
    ) -> Tensor:
        """:meth:`_score` without logits, and only of positions that are scored."""
        head, of, batch = self.stack.plain_head, self.metric.of, len(ids)
        assert head is not None
        assert of is not None
        which = torch.ones_like(ids[:, 1:], dtype=torch.bool) if scored is None else scored
        given = self.stack.before_head(hidden)
        given = given.view(-1, batch, *given.shape[1:])[:, :, :-1][:, which]
        base = None if dense is None else self.stack.before_head(dense)[:, :-1][which]
        found = of(head, given, ids[:, 1:][which], base)
        values = found.new_zeros((*found.shape[:1], *which.shape, *found.shape[2:]))
        values[:, which] = found
        means = [self.metric.reduced(each, scored) for each in values]
        return torch.stack(means)

    def _check(self, final: dict[BlockSet, Tensor], ids: Tensor) -> None:
        """Once per model: the walk must agree with the model's own forward pass. Where blocks are
        streamed, that reads all of them once more."""
        removed, hidden = next(iter(final.items()))
        with self.stack.bypassed(removed):
            own = self.stack.model(**self.stack.inputs(ids[:1]), use_cache=False)
        walked, own = self.stack.exit(hidden[:1]).float(), own.logits.float()
        gap = (walked - own).abs().max().item()
        off, most = gap / max(own.abs().max().item(), 1e-6), 1e-3
        if self.stack.dtype != torch.float32:
            # where an early block is gone, rounding in another batch moves single logits far: in
            # SmolLM2 all together 3 %, and one block more or less at least 50 %
            off, most = float((walked - own).norm() / own.norm().clamp_min(1e-6)), 0.2
        if off > most:
            raise UnsupportedModel(
                f"{self.stack.name}: running its blocks one by one differs from its own forward "
                f"pass by {gap:.3g}; its blocks exchange more than the hidden state"
            )
        if seen := with_images(ids):
            with self.stack.bypassed(removed):
                self._check_order(ids[:1], own)
        self.stack.checked.add(seen)

    def _check_order(self, ids: Tensor, own: Tensor) -> None:
        """With images a model may look at a text from both ends, as PaliGemma does at a prompt:
        then it has seen the answers that it is scored on. ids [1, T], with the logits ``own``."""
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % 3  # it is scored, and so a text's
        found = self.stack.model(**self.stack.inputs(other), use_cache=False).logits.float()
        gap = (found - own)[:, :-1].norm() / own.norm().clamp_min(1e-6)
        if gap > (1e-3 if self.stack.dtype == torch.float32 else 0.02):  # experts' batches differ
            raise UnsupportedModel(
                f"{self.stack.name} has seen the end of a text with images before it predicts it, "
                "so its loss says nothing: leave out rows with images"
            )


# -- several processes -------------------------------------------------------------------------


def distribute(sweep: Sweep, calls: Sequence[Call]) -> Iterator[tuple[Call, Values]]:
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


def _pieces(sweep: Sweep, call: Call, here: Group, calls: int) -> Iterator[Call]:
    """A call of many batches, as where blocks are streamed, in shorter ones for all ranks."""
    sets, start, stop = call
    batches = -(-(stop - start) // sweep.batch)
    step = sweep.batch * max(1, -(-batches * calls // here.size))
    for a in range(start, stop, step):
        yield sets, a, min(a + step, stop)


def _shared(sweep: Sweep, calls: Sequence[Call], i: int, whole: int, here: Group) -> Shares:
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
    sweep: Sweep, work: Sequence[tuple[Call, Shares]], here: Group
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
        "shapes": [part.shape for part in mine],
    }
    raw = b"".join(part.tobytes() for part in mine)
    heads, parts = [], []  # of every rank; parts in the order of its calls
    for text in here.exchange(json.dumps(head).encode() + b"\n" + raw):
        line, _, rest = text.partition(b"\n")
        heads.append(json.loads(line))
        ends = np.cumsum([math.prod(shape) for shape in heads[-1]["shapes"]], dtype=int)
        rows = np.split(np.frombuffer(rest, dtype=np.float64), ends[:-1])
        parts.append(iter([r.reshape(s) for r, s in zip(rows, heads[-1]["shapes"], strict=False)]))
    if len({head["work"] for head in heads}) > 1:
        raise DataError(
            "the processes of this job no longer do the same work, so their machines or versions "
            "differ: run it on machines of one kind, with the same software"
        )
    sweep.batch = min(head["batch"] for head in heads)  # some may have run out of memory
    values = []
    for (sets, _, _), shares in work:
        found: dict[BlockSet, Values] = {}
        for rank, scored in shares.items():
            found |= zip(scored, next(parts[rank]), strict=True)
        values.append(np.stack([found[s] for s in sets]))
    return max(head["seconds"] for head in heads), values


# -- prefixes -----------------------------------------------------------------------------------


def groups(items: Sequence[BlockSet], most: int) -> Iterator[Sequence[BlockSet]]:
    """Cut into groups of a power of two, at most ``most``: few sizes, so few things to prepare."""
    start = 0
    while start < len(items):
        size = 1 << (min(most, len(items) - start).bit_length() - 1)
        yield items[start : start + size]
        start += size


def sharing(
    runs: Collection[BlockSet], users: Sequence[Collection[BlockSet]], i: int
) -> list[list[BlockSet]]:
    """``runs`` by what they leave out of block i and by the only one of ``users`` that needs them,
    those that several need alone, in an order of their own."""
    found: dict[tuple[tuple[int, ...], ...], list[BlockSet]] = {}
    for p in sorted(runs, key=sorted):
        by = [k for k, those in enumerate(users) if p in those]
        parts = tuple(sorted(u for u in p if block_of(u) == i))
        user = (by[0],) if len(by) == 1 else (-1, *sorted(p))
        found.setdefault((parts, user), []).append(p)
    return [found[key] for key in sorted(found)]


def needed(sets: Sequence[BlockSet], n_blocks: int) -> list[set[BlockSet]]:
    """The prefixes before each block, and after the last, that lead to the sets."""
    found = [set(sets)]
    for i in reversed(range(n_blocks)):
        found.append({below(p, i) for p in found[-1]})
    return found[::-1]


def below(blocks: BlockSet, i: int) -> BlockSet:
    """Those before block i."""
    return BlockSet(b for b in blocks if block_of(b) < i)


def block_forwards(sets: Sequence[BlockSet], n_blocks: int) -> int:
    """Block forwards that one sweep over ``sets`` takes for a window, without running it."""
    return sum(len({below(s, i + 1) for s in sets if not whole(s, i)}) for i in range(n_blocks))
