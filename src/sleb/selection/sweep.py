"""Score many sets of removed blocks in one walk over the model.

Sets that agree on the blocks below ``i`` have the same hidden state there. The walk keeps one
stream per distinct *prefix* of the sets and runs each block once per live stream, so a prefix is
computed once and a block's weights are touched once per batch of windows, whatever the number of
sets. A greedy round over n live blocks costs about n²/2 block forwards instead of n².

A stream goes through the model's own code, as in a separate full pass, so scores are those of
separate passes; where batches differ, to rounding.

What one round computes below the block that it removes, the next one needs again. Those states are
kept, where memory allows, so that the next round starts from them. Kept and computed states are the
same to the bit, since this is done only where a stream is alone in a call: a search that was killed
and goes on without them comes to the same scores.

Where blocks are streamed from disk, a walk takes as many batches of windows as ``max_bytes`` of
hidden states allow, and each block is read once for all of them. More windows take more walks: to
read the blocks again costs less than to write hidden states to disk and read them back, since for
every block each stream would have to come and go.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType

import psutil
import torch
from torch import Tensor

from sleb.errors import DataError, ResourceError, UnsupportedModel
from sleb.metrics import TokenMetric
from sleb.models.stack import BlockStack, decoder_config
from sleb.selection.kept import Kept, States
from sleb.selection.objective import DENSE, BlockSet, Values

__all__ = ["Patch", "Sweep", "block_forwards"]

logger = logging.getLogger(__name__)

Patch = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the model's blocks have other weights, as of a repair."""


class Part:
    """A batch of windows on its way through the blocks: one stream [B, T, D] per distinct set of
    blocks that were skipped so far. ids [B, T]."""

    def __init__(self, stack: BlockStack, ids: Tensor) -> None:
        self.stack, self.ids = stack, ids
        hidden, calls = stack.enter(ids)
        self.streams = {DENSE: hidden}
        self.left: States = {}
        self._calls = {1: calls}  # what the blocks are handed, by number of streams in a batch

    def advance(
        self, i: int, runs: Sequence[BlockSet], skips: Collection[BlockSet], most: int
    ) -> None:
        """Take the streams in ``runs`` through block i, at most ``most`` in one call, and those in
        ``skips`` past it; drop all others."""
        after = {prefix | {i}: self.streams[prefix] for prefix in skips}
        for group in _groups(runs, most):
            if len(group) not in self._calls:
                self._calls[len(group)] = self.stack.enter(self.ids.repeat(len(group), 1))[1]
            # pop() frees a stream as soon as nothing else needs it
            parts = [self.streams[p] if p in skips else self.streams.pop(p) for p in group]
            merged = parts[0] if len(parts) == 1 else torch.cat(parts)
            out = self.stack.run(i, merged, self._calls[len(group)][i])
            after.update(zip(group, torch.split(out, len(self.ids)), strict=True))
        self.streams = after


class Sweep:
    """Scores block sets on windows of tokens. ids [N, T].

    ``forwards`` counts block forwards of one window, the unit of the search's work. ``keep`` is for
    searches that score in rounds, all windows in each: see ``kept``. All sets but the dense
    one are computed under ``patch``.
    """

    def __init__(
        self,
        stack: BlockStack,
        ids: Tensor,
        metric: TokenMetric,
        *,
        batch: int | None = None,
        max_bytes: int | None = None,
        keep: bool = False,
        patch: Patch | None = None,
    ) -> None:
        self.stack, self.ids, self.metric = stack, ids, metric
        self.batch = batch or default_batch(stack, ids.shape[1])
        self.max_bytes = max_bytes or _free_bytes(stack.input_device) // 2
        self._kept = Kept(self.max_bytes // 2 if keep and not stack.streamed else 0)
        self._patch = patch
        self.forwards = 0
        self._tick: Callable[[int], None] = lambda n: None
        self._checked = False

    def on_work(self, tick: Callable[[int], None]) -> None:
        """Call ``tick(n)`` after every n units of work: a block forward or a head, of a window."""
        self._tick = tick

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

    def scores(self, sets: Sequence[BlockSet], start: int, stop: int) -> Tensor:
        """Mean score per set and window, float64 [len(sets), stop - start], in the metric's unit;
        [.., .., M] for a metric of M values.

        Raises:
            DataError: a score is NaN or infinite; the message names the set and the window.
            ResourceError: a single window does not fit in memory. (Otherwise running out of
                memory halves the batch and goes on.)
        """
        parts: list[Tensor] = []
        while start < stop:
            end = min(start + self.step(len(sets)), stop)
            try:
                parts.append(self._walk_scores(sets, start, end))
            except torch.OutOfMemoryError:
                if self._kept:
                    self._kept = Kept(0)
                elif self.batch > 1:
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
        """:meth:`scores` as an Objective wants them."""
        return self.scores(sets, start, stop).numpy()

    @torch.inference_mode()
    def _walk_scores(self, sets: Sequence[BlockSet], start: int, stop: int) -> Tensor:
        wanted = list(dict.fromkeys([*sets, *([DENSE] if self.metric.needs_dense else [])]))
        # more windows take two calls, fewer share one: only so are sums rounded as without
        keeps = 2 * (stop - start) > self.batch >= stop - start
        kept, windows = self._kept if keeps else Kept(0), (start, stop)
        if self._patch is None:
            parts = self.walk(wanted, self.ids[start:stop], kept.of(windows), kept.place(sets))
            kept.put(windows, parts[0].left)
        else:
            parts = self._walk_patched(wanted, self.ids[start:stop])
        if not self._checked:
            self._check(parts[0].streams, parts[0].ids)
        columns = []
        while parts:
            part = parts.pop(0)  # its memory is needed for the logits
            dense = part.streams.get(DENSE) if self.metric.needs_dense else None
            merged = torch.cat([part.streams.pop(s) for s in wanted])
            scored = self._score(merged, dense, part.ids)
            columns.append(scored[[wanted.index(s) for s in sets]])
            self._tick(len(wanted) * len(part.ids))
        out = torch.cat(columns, dim=1)
        if not torch.isfinite(out).all():
            worst = tuple((~torch.isfinite(out)).nonzero()[0].tolist())
            row, column = worst[:2]
            raise DataError(
                f"{self.metric.name} is {out[worst].item()} with blocks {sorted(sets[row])} "
                f"removed, on window {start + column}: try --dtype float32, and check that the "
                "model itself is sound with: sleb eval"
            )
        kept.learn(sets, out)
        return out

    def walk(
        self,
        sets: Sequence[BlockSet],
        ids: Tensor,
        have: States = MappingProxyType({}),
        place: int | None = None,
    ) -> list[Part]:
        """Hidden states after the last block, per set. ids [W, T] -> parts of at most ``batch``
        windows, in order. What stands in ``have`` is not computed; each part's ``left`` gets what
        enters block ``place``."""
        parts = [Part(self.stack, part) for part in torch.split(ids, self.batch)]
        needed = _needed(sets, len(self.stack), have)
        for i in range(len(self.stack)):
            wanted = {p for p in needed[i + 1] if (i + 1, p) not in have}
            runs = sorted({p for p in wanted if i not in p}, key=sorted)
            skips = {_below(p, i) for p in wanted if i in p}
            with self.stack.holding(i) if runs else contextlib.nullcontext():
                for part in parts:
                    part.streams |= {p: have[i, p] for p in needed[i] if (i, p) in have}
                    if i == place:
                        part.left = {(i, p): state for p, state in part.streams.items()}
                    part.advance(i, runs, skips, most=max(1, self.batch // len(part.ids)))
                    self.forwards += len(runs) * len(part.ids)
                    self._tick(len(runs) * len(part.ids))
        return parts

    def _walk_patched(self, sets: Sequence[BlockSet], ids: Tensor) -> list[Part]:
        """:meth:`walk` with other weights for the dense model than for the rest."""
        assert self._patch is not None
        parts = self.walk([DENSE], ids) if DENSE in sets else []
        with self._patch():
            others = self.walk([s for s in sets if s != DENSE], ids)
        for part, dense in zip(others, parts, strict=False):
            part.streams = {**dense.streams, **part.streams}
        return others

    def _score(self, hidden: Tensor, dense: Tensor | None, ids: Tensor) -> Tensor:
        """Mean over the T-1 predicted tokens of each window. hidden [S*B, T, D] of S streams,
        dense [B, T, D], ids [B, T] -> float64 [S, B] or [S, B, M] on the CPU."""
        batch, predicted = len(ids), ids.shape[1] - 1
        vocab = int(decoder_config(self.stack.model.config).vocab_size)
        rows = max(1, _logit_bytes(self.stack) // (4 * vocab))
        # whole windows at a time, or slices of one window: never more positions than it has,
        # so that learned position tables are long enough
        high, wide = max(1, rows // predicted), min(rows, predicted)
        following = ids[:, 1:].to(hidden.device)
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
        means = values.double().mean(1)
        return means.view(-1, batch, *means.shape[1:]).cpu()

    def _check(self, final: dict[BlockSet, Tensor], ids: Tensor) -> None:
        """Once per model: the walk must agree with the model's own forward pass."""
        removed, hidden = next(iter(final.items()))
        with self.stack.bypassed(removed):
            own = self.stack.model(input_ids=ids[:1].to(self.stack.input_device), use_cache=False)
        walked = self.stack.exit(hidden[:1]).float()
        scale = own.logits.float().abs().max().item()
        gap = (walked - own.logits.float()).abs().max().item()
        if gap > max(scale, 1e-6) * (1e-3 if self.stack.dtype == torch.float32 else 0.1):
            raise UnsupportedModel(
                f"{self.stack.name}: running its blocks one by one differs from its own forward "
                f"pass by {gap:.3g}; its blocks exchange more than the hidden state"
            )
        self._checked = True


def _groups(items: Sequence[BlockSet], most: int) -> Iterator[Sequence[BlockSet]]:
    """Cut into groups of a power of two, at most ``most``: few sizes, so few things to prepare."""
    start = 0
    while start < len(items):
        size = 1 << (min(most, len(items) - start).bit_length() - 1)
        yield items[start : start + size]
        start += size


def _needed(sets: Sequence[BlockSet], n_blocks: int, have: States) -> list[set[BlockSet]]:
    """The streams before each block, and after the last, that lead to the sets, from the start or
    from a state in ``have``."""
    needed = [set(sets)]
    for i in reversed(range(n_blocks)):
        needed.append({_below(p, i) for p in needed[-1] if (i + 1, p) not in have})
    return needed[::-1]


def _below(blocks: BlockSet, i: int) -> BlockSet:
    return BlockSet(b for b in blocks if b < i)


def default_batch(stack: BlockStack, length: int) -> int:
    """Windows per batch: enough tokens to fill the device, with one stream per block in at most
    2 GiB on a GPU (there are never more streams than candidates)."""
    if stack.input_device.type != "cuda":
        return max(1, 1_024 // length)
    width = int(decoder_config(stack.model.config).hidden_size)
    tokens = min(65_536, 2**31 // (2 * width * len(stack)))
    return max(1, tokens // length)


def _free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _logit_bytes(stack: BlockStack) -> int:
    """Budget for one chunk of float32 logits; bounds the head's memory for any vocabulary."""
    return 2**30 if stack.input_device.type == "cuda" else 2**26


def block_forwards(sets: Sequence[BlockSet], n_blocks: int) -> int:
    """Block forwards that one sweep over ``sets`` takes for a window with nothing kept, without
    running it."""
    return sum(len({_below(s, i) for s in sets if i not in s}) for i in range(n_blocks))
