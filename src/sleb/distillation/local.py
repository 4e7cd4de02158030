"""Local first: blocks beside gaps learn to end where the dense model's hidden states do.

A cut disturbs what the blocks beside it are given, and the others hardly. So a run may begin with
these alone: what enters them and what they should make of it is kept of some windows, and gone
through several times, which takes a small part of a whole model's step (FitNets, 1412.6550, with
the cut's own layer map).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor, nn

from sleb.config import Optimizer
from sleb.core.progress import Tick
from sleb.distillation.loss import Batch, Reached, SplitModel, distance, outputs, run_until
from sleb.distillation.mix import Mix
from sleb.distillation.student import Student, optimizer_of, step_at

PART = 16
"""One token in so many of a run's is kept for it."""
TURNS = 8
"""How often what is kept is gone through."""
JUDGING = 8
"""One pass in so many judges, and is not trained on."""
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""Each is tried for a turn, up to the first that is worse than the one before."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Blocks ``first`` to ``last`` of a cut, all beside gaps, which should end where block
    ``target`` of the dense model does."""

    first: int
    last: int
    target: int


def segments(kept: Sequence[int], blocks: int) -> list[Segment]:
    """Of a cut that keeps the blocks ``kept`` of so many: the blocks before and behind each gap, in
    one segment where gaps share them."""
    edges = [-1, *kept, blocks]
    found: list[tuple[int, int]] = []
    for i in range(len(edges) - 1):
        if edges[i + 1] - edges[i] == 1:
            continue
        first, last = max(0, i - 1), min(i, len(kept) - 1)
        if found and found[-1][1] >= first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return [Segment(first=a, last=b, target=edges[b + 2] - 1) for a, b in found]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Of one pass: what the segment's blocks are called with, what they should make of it
    [B, T, D], and which tokens are none of the padding [B, T]."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    target: Tensor
    read: Tensor


class Local:
    """The training of one segment of ``student``, whose model is ``split``."""

    def __init__(
        self,
        segment: Segment,
        student: Student,
        split: SplitModel,
        teacher: SplitModel,
        optimizer: Optimizer,
    ) -> None:
        self.segment, self.student, self.split, self.teacher = segment, student, split, teacher
        numbers = range(segment.first, segment.last + 1)
        self.blocks = [split.stack.blocks[i] for i in numbers]
        homes = tuple(f"{split.stack.path}.{i}." for i in numbers)
        self.weights = {
            name: weight
            for name, weight in student.trained.items()
            if name[name.find(split.stack.path) :].startswith(homes)
        }
        self.kind = optimizer

    @torch.no_grad()
    def keep(self, mix: Mix, step: int, tokens: int) -> list[Kept]:
        """What the passes of one step of ``mix`` give, of at most ``tokens`` each."""
        found = []
        for rows, _ in mix.step(step, tokens, self.split.device.type):
            ids = Batch.of(mix.windows, rows, self.split.device).ids
            used = torch.tensor([mix.lengths[row] for row in rows])
            read = torch.arange(ids.shape[1])[None] < used[:, None]
            target = self.segment.target
            with outputs(self.teacher.stack, [target], end=True) as dense:
                run_until(self.teacher.model, ids)
            calls = self._calls(ids)
            found.append(Kept(calls=calls, target=dense[target], read=read.to(ids.device)))
        return found

    def _calls(self, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            if len(calls) == len(self.blocks):
                raise Reached

        handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in self.blocks]
        try:
            run_until(self.split.model, ids)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def loss(self, kept: Kept) -> Tensor:
        """Mean distance of its tokens."""
        (args, kwargs), *_ = kept.calls
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden.detach().requires_grad_()  # as where all blocks are trained
        for block, (args, kwargs) in zip(self.blocks, kept.calls, strict=True):
            if args:
                out = block(hidden, *args[1:], **kwargs)
            else:
                out = block(**{**kwargs, "hidden_states": hidden})
            hidden = out if isinstance(out, Tensor) else out[0]
        return distance(hidden, kept.target)[kept.read].mean()

    @torch.no_grad()
    def judged(self, judging: Sequence[Kept]) -> float:
        """Mean of the passes' losses."""
        return mean(float(self.loss(kept)) for kept in judging)

    def train(self, passes: Sequence[Kept], stopped: Callable[[], bool], tick: Tick) -> None:
        """At each of ``RATES`` for a turn through ``passes``, then at the best for ``TURNS``. What
        is worse than before, or was stopped, is undone."""
        judging, training = passes[::JUDGING], [p for i, p in enumerate(passes) if i % JUDGING]
        if not training:
            return
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        start, best, found = self.judged(judging), 0.0, math.inf
        for rate in RATES:
            self._turns(training, rate, 1, stopped, tick)
            tried = self.judged(judging)
            self.student.take(before)
            if not tried < min(start, found):
                break
            best, found = rate, tried
        if best:
            self._turns(training, best, TURNS, stopped, tick)
            if stopped() or not self.judged(judging) < start:
                self.student.take(before)

    def _turns(
        self,
        training: Sequence[Kept],
        rate: float,
        count: int,
        stopped: Callable[[], bool],
        tick: Tick,
    ) -> None:
        """So many times through ``training``; the rate rises over a tenth, and falls to zero."""
        optimizer, total = optimizer_of(self.weights.values(), self.kind), count * len(training)
        for done in range(total):
            if stopped():
                break
            self.loss(training[done % len(training)]).backward()  # type: ignore[no-untyped-call]
            along = min(1.0, 10 * (done + 1) / total, 2 * (1 - done / total))
            step_at(optimizer, rate * along)
            self.student.rounded()
            optimizer.zero_grad(set_to_none=True)
            tick(1)
