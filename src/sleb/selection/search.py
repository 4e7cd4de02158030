"""Search: which blocks can go. Ties the parts together; the parts are in their own modules."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sleb.calibration import Windows, load_windows
from sleb.calibration.windows import digest
from sleb.checkpoints.checkpoint import Checkpoint, fingerprint
from sleb.core.errors import InputError
from sleb.core.plan import (
    Calibration,
    Fingerprint,
    Plan,
    blocks_to_remove,
    rounds_behind,
)
from sleb.core.process_group import group
from sleb.core.progress import Progress, Tick, silent
from sleb.models.compiled import CompiledStack
from sleb.models.load import LoadedModel, load
from sleb.selection.goal import Goal, parse_bytes
from sleb.selection.metrics import METRICS, NLL
from sleb.selection.objective import Objective
from sleb.selection.racing import baseline, rank
from sleb.selection.request import above, candidates_for, check_choice, check_request
from sleb.selection.resources import default_batch, on_threads
from sleb.selection.score_cache import ScoreCache
from sleb.selection.similarity import measure_similarity
from sleb.selection.strategies import FINALS, STRATEGIES, SearchResult
from sleb.selection.sweep import Sweep
from sleb.selection.targets import Costs, HeldoutEvaluation, StoppingRule

if TYPE_CHECKING:
    from torch import Tensor

    from sleb.repairs.scoring import Repairs

__all__ = ["DEFAULT_HELDOUT", "DEFAULT_LENGTH", "DEFAULT_PROTECT", "search"]

DEFAULT_LENGTH = 256
DEFAULT_HELDOUT = 16
DEFAULT_PROTECT = "0,-1"
HELDOUT = "measuring held-out loss"


def search(
    model: LoadedModel | str | Path,
    *,
    remove: int | str | None = None,
    max_loss_increase: float | None = None,
    speedup: float | None = None,
    size: int | str | None = None,
    curve: bool = False,
    after_repair: bool = False,
    metric: str = "loss",
    strategy: str | None = None,
    exact: bool = False,
    text: Sequence[str] = (),
    windows: Windows | int | None = None,
    heldout: Windows | int | None = DEFAULT_HELDOUT,
    own: Callable[[], Tensor] | None = None,
    length: int = DEFAULT_LENGTH,
    protect: str = DEFAULT_PROTECT,
    min_similarity: float | str | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    batch: int | None = None,
    threads: int | None = None,
    stream: bool = False,
    device_map: str | None = None,
    tp: int = 1,
    max_memory: int | str | None = None,
    compile: bool = False,
    trust_remote_code: bool = False,
    journal: str | Path | None = None,
    keep_journal: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Find the blocks whose removal costs least, and return the plan.

    Args:
        model: a loaded model, or anything that :func:`sleb.load` takes.
        remove: number of blocks, or a percentage such as ``"20%"`` (rounded up). This and the next
            three are targets; exactly one is given (with ``curve`` none means half of the blocks).
        max_loss_increase: remove as many blocks as keep the 95 % upper bound of the loss increase
            on held-out windows within so many nats/token.
        speedup: remove blocks until generation is estimated to be so many times as fast; see
            :class:`sleb.core.plan.Point`.
        size: remove blocks until the weights take at most so many bytes, or ``"100MB"``.
        curve: measure every depth on held-out windows, for the plan's ``curve``.
        after_repair: with ``max_loss_increase``, hold the limit with cuts that were each repaired
            quickly, on text beside what is scored, as :func:`sleb.prune` will repair the result.
        metric: ``loss`` (SLEB's: re-scored after each removal), ``one-shot-loss``, ``cosine``,
            ``kl`` or ``repaired-loss``; see ``sleb.selection.metrics``.
        strategy: ``greedy``, ``one-shot``, ``window``, ``beam``, ``refine`` or
            ``greedy-or-window``; by default the metric's own. See ``sleb.selection.strategies``.
        exact: score every candidate on every window, as published. Otherwise candidates race: one
            that is clearly worse on part of the windows is not scored on the rest.
        text: calibration texts; none is the embedded default. See ``sleb.calibration``.
        windows: number of windows, or windows that were loaded before.
        heldout: number of further windows that are set aside, or windows that were.
        own: gives windows [N, T] that the model has written, to judge by beside the given where
            that is done (``greedy-or-window``); by default they are written then.
        length: tokens per window.
        protect: blocks that stay, ``"0,-1"`` by default as in the paper.
        min_similarity: only blocks whose output is at least this similar (cosine) to their input
            are candidates; ``auto`` picks the threshold (see :meth:`Similarity.auto_threshold`).
        seed: choice of windows. The result is a function of the inputs and the seed.
        batch: windows per forward pass; see ``sleb.selection.resources``.
        threads: CPU threads; by default torch's own choice.
        stream: leave blocks on disk and read each once per walk; see :func:`sleb.load`.
        device_map: place the model on several devices; likewise.
        tp: processes that hold one model together; likewise.
        max_memory: with ``stream``, bytes of hidden states to hold, or ``"8GB"``; by default half
            of what is free.
        compile: run blocks through torch.compile, which on a GPU pays for long searches; see
            ``sleb.models.compiled``.
        journal: file that keeps finished scores, so that the same call resumes after a crash.
        keep_journal: leave it when the search is done, for a caller who is not done.

    Raises:
        VerificationFailed: nothing can be removed within ``max_loss_increase``.
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    goal = Goal.choose(
        remove=remove, max_loss_increase=max_loss_increase, speedup=speedup, size=size, curve=curve
    )
    chosen = METRICS[metric]
    named = strategy or chosen.strategy
    check_choice(goal, metric, strategy, min_similarity)
    if compile and stream:
        raise InputError("streamed blocks cannot be compiled: leave out --compile or --stream")
    most_bytes = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
    if not isinstance(model, LoadedModel):
        check_request(
            model,
            goal=goal,
            protect=protect,
            text=text,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        model = load(
            model,
            dtype=dtype,
            device=device,
            stream=stream,
            device_map=device_map,
            tp=tp,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    stack, n_blocks = model.stack, len(model.stack)
    candidates = candidates_for(goal, protect, n_blocks, stack.model.config)
    protected = tuple(b for b in range(n_blocks) if b not in candidates)
    measures_aside = curve or goal.max_loss_increase is not None
    aside = heldout if isinstance(heldout, Windows) else None
    if not isinstance(windows, Windows):
        wanted = heldout if isinstance(heldout, int) and measures_aside else 0
        windows, further = load_windows(
            model.tokenizer, text, windows=windows, length=length, seed=seed, heldout=wanted
        )
        aside = aside or further
    if measures_aside and (aside is None or len(aside.ids) < 2):
        raise InputError(
            "no two windows are left over to hold out, which --max-loss-increase and --curve "
            "need: give more --text, fewer --windows, a shorter --length, or a larger --heldout"
        )

    checkpoint = Checkpoint.open(model.source.path)
    with progress.stage("hashing the model", checkpoint.nbytes) as tick:
        identity = _identity(checkpoint, n_blocks, tick)
    similarity, gate = None, None
    if min_similarity is not None or chosen.token is None:
        similarity = measure_similarity(
            model, windows, measure="cosine", batch=batch, progress=progress
        )
    if similarity is not None and min_similarity is not None:
        least = 1 if goal.remove is None else blocks_to_remove(goal.remove, n_blocks)
        candidates, gate = above(similarity, candidates, min_similarity, least)

    costs = Costs.of(checkpoint, stack)
    batch = batch or default_batch(stack, windows.ids.shape[1])
    if compile:
        stack = CompiledStack(stack.model, batch)
    sweeping = functools.partial(Sweep, stack, batch=batch, max_bytes=most_bytes)
    how = model.dtype + (", compiled" if compile else "")
    key = _key(identity, windows.record, metric, how, exact)
    evidence, finals = None, None
    with on_threads(threads), ScoreCache(journal, key, keep=keep_journal) as cache:
        if aside is not None and measures_aside:
            if after_repair and goal.max_loss_increase is not None:
                from sleb.repairs.scoring import FINAL_TOKENS, RepairedScores, fitting

                ids = fitting(model, text, windows, aside, FINAL_TOKENS)
                held = Sweep(  # of nothing that is compiled
                    model.stack, aside.ids, NLL, batch=batch, max_bytes=most_bytes
                )
                kept = cache.of(f"heldout {digest(ids)} {digest(aside.ids)}")
                losses = Objective(
                    RepairedScores(held, ids).scorer,
                    len(aside.ids),
                    cache=kept,
                    progress=progress,
                    title=HELDOUT,
                )
                evidence = HeldoutEvaluation(losses, aside, costs, fitted=ids.numel())
            else:
                losses = Objective(
                    sweeping(aside.ids, NLL).scorer,
                    len(aside.ids),
                    progress=progress,
                    title=HELDOUT,
                )
                evidence = HeldoutEvaluation(losses, aside, costs)
        aim = StoppingRule(goal, costs, candidates, evidence)
        if chosen.token is None:
            assert similarity is not None
            only = rank(candidates, 1 - similarity.per_window[:, candidates].T, aim.most)
            found = SearchResult(order=only.removed, rounds=(only,), dense=np.zeros(0))
        else:
            ids = windows.ids if exact else windows.ids[_shuffled(windows, seed)]
            sweep = sweeping(ids, chosen.token)
            repairs = None
            if chosen.repaired or named == FINALS:
                from sleb.repairs.scoring import Repairs

                repairs = Repairs.of(
                    model, text, windows, aside, progress, finals=named == FINALS, own=own
                )
            every = repairs if chosen.repaired else None
            last = repairs if named == FINALS else None
            found = _Search(sweep, named, candidates, aim, exact, every, last).run(cache, progress)
            if repairs and found.finalists:
                named = found.finalists[0].strategy
                finals = repairs.record(found.finalists)
        order, target = aim.settle(found.order)
        tested = found.order if curve else found.order[: len(order) + 1]
        points = evidence.curve(tested) if evidence else None
    return Plan(
        model=identity,
        removed=tuple(sorted(order)),
        order=order,
        protected=protected,
        metric=metric,
        unit=chosen.unit,
        strategy=named,
        racing=chosen.token is not None and not exact,
        compiled=chosen.token is not None and compile,
        dtype=model.dtype,
        target=target,
        baseline=baseline(found.dense) if found.dense.size else None,
        rounds=rounds_behind(found.rounds, order),
        final_comparison=finals,
        similarity=gate,
        calibration=windows.record,
        curve=points,
        versions=versions(),
    )


@dataclass(frozen=True)
class _Search:
    """A strategy over a sweep. What it takes to score sets after their repair is given if that is
    to be done, for every candidate, or for those that the strategy ends with (``finals``)."""

    sweep: Sweep
    strategy: str
    candidates: Sequence[int]
    aim: StoppingRule
    exact: bool
    every: Repairs | None
    finals: Repairs | None

    def run(self, cache: ScoreCache, progress: Progress) -> SearchResult:
        """Find blocks."""
        sweep, aim = self.sweep, self.aim
        objective = Objective(
            sweep.scorer,
            len(sweep.ids),
            cache=cache.of("loss"),
            progress=progress,
            enough=aim.enough,
            exact=self.exact,
        )
        if self.every:
            objective = self._repaired(self.every, objective, cache, progress)
        if self.finals:
            objective.judge = self._judge(self.finals, cache, progress)
        return STRATEGIES[self.strategy](objective, self.candidates, aim.most)

    def _repaired(
        self, repairs: Repairs, plain: Objective, cache: ScoreCache, progress: Progress
    ) -> Objective:
        from sleb.repairs.scoring import RepairedObjective, RepairedScores

        sweep = self.sweep
        other = Sweep(repairs.stack, sweep.ids, sweep.metric, batch=sweep.batch)
        return RepairedObjective(
            plain,
            RepairedScores(other, repairs.fitted),
            cache=cache.of(f"repaired {digest(repairs.fitted)}"),
            progress=progress,
            enough=self.aim.enough,
        )

    def _judge(self, repairs: Repairs, cache: ScoreCache, progress: Progress) -> Objective:
        """Scores what a strategy ends with: the loss after a repair, on the given text and the
        model's own."""
        from sleb.repairs.scoring import RepairedScores

        ids = repairs.judging
        other = Sweep(repairs.stack, ids, NLL, batch=self.sweep.batch)
        kept = cache.of(f"final {digest(repairs.fitted)} {digest(ids)}")
        scores = RepairedScores(other, repairs.fitted)
        return Objective(scores.scorer, len(ids), cache=kept, progress=progress)


def _identity(checkpoint: Checkpoint, n_blocks: int, tick: Tick) -> Fingerprint:
    """The model's, found once per machine; all machines must have the same."""
    here = group()
    mine = ""
    if here.local_rank == 0:
        mine = fingerprint(checkpoint, n_blocks, tick).model_dump_json()
    said = {text.decode() for text in here.exchange(mine.encode()) if text}
    ours = {json.dumps(versions()).encode()}
    if len(said) > 1 or len({*here.exchange(*ours)}) > 1:
        raise InputError(
            "the machines of this job have different weights, or different versions of sleb, torch "
            "or transformers: give all of them the same"
        )
    return Fingerprint.model_validate_json(said.pop())


def versions() -> dict[str, str]:
    """Versions of what the scores depend on."""
    packages = {name: version(name) for name in ("sleb", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}


def _shuffled(windows: Windows, seed: int) -> list[int]:
    """An order of the windows in which every prefix is a random sample that holds about each
    source's share: windows are shuffled within their source, and sources interleaved."""
    place = random.Random(f"order {seed}")
    total = {s: windows.source.count(s) for s in set(windows.source)}
    turns = {s: iter(place.sample(range(n), n)) for s, n in total.items()}
    keys = [((next(turns[s]) + place.random()) / total[s], i) for i, s in enumerate(windows.source)]
    return [i for _, i in sorted(keys)]


def _key(
    identity: Fingerprint, calibration: Calibration, metric: str, dtype: str, exact: bool
) -> str:
    parts = [identity.model_dump(), calibration.sha256, calibration.seed, metric, dtype, exact]
    parts.append(versions())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
