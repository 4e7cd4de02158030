"""The search: which blocks can go. Ties the parts together, in four steps: prepare, choose, settle,
record."""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import Tensor

from sleb.calibration import Windows
from sleb.calibration.split import CalibrationSplit
from sleb.calibration.windows import digest
from sleb.checkpoints.checkpoint import Checkpoint, fingerprint
from sleb.config import SearchConfig
from sleb.core.errors import InputError
from sleb.core.plan import (
    FinalComparison,
    Fingerprint,
    Plan,
    SimilarityGate,
    rounds_behind,
)
from sleb.core.process_group import group
from sleb.core.progress import Progress, Tick, silent
from sleb.models.compiled import CompiledStack
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack
from sleb.selection.metrics import METRICS, NLL, Metric, TokenMetric
from sleb.selection.objective import Objective, Scorer, ShortlistObjective
from sleb.selection.racing import baseline, rank
from sleb.selection.request import (
    Goal,
    above,
    candidates_for,
    check_options,
    parse_bytes,
    removals,
)
from sleb.selection.resources import default_batch, on_threads
from sleb.selection.score_cache import ScoreCache
from sleb.selection.similarity import Similarity, measure_similarity
from sleb.selection.strategies import FINALS, STRATEGIES, SearchResult
from sleb.selection.sweep import Sweep
from sleb.selection.targets import Costs, HeldoutEvaluation, StoppingRule

__all__ = ["FINAL_TOKENS", "SEARCH_TOKENS", "RepairedScorer", "find_blocks", "versions"]

SEARCH_TOKENS = 16_384
"""Tokens that the repair of a candidate is fitted on."""
FINAL_TOKENS = 8192
"""Likewise of a set that is one of a few: they differ by more than text does."""

RepairedScorer = Callable[[Sweep, Tensor], Scorer]
"""Scores sets as a sweep does, each after a repair that is fitted on windows [N, T]."""


def find_blocks(
    model: LoadedModel,
    config: SearchConfig,
    split: CalibrationSplit,
    *,
    repaired: RepairedScorer,
    after_repair: bool = False,
    journal: str | Path | None = None,
    keep_journal: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Find the blocks whose removal costs least, and return the plan; see :func:`sleb.search`."""
    task = _prepare(model, config, split, progress)
    with (
        on_threads(config.threads),
        ScoreCache(journal, task.key, keep=keep_journal) as cache,
    ):
        search = _Search(task, repaired, cache, progress)
        evidence = search.heldout(after_repair)
        rule = StoppingRule(task.goal, task.costs, task.candidates, evidence)
        found = search.choose(rule)
        order, target = rule.settle(found.order)
        tested = found.order if config.curve else found.order[: len(order) + 1]
        curve = evidence.curve(tested) if evidence else None
    finals = search.comparison(found)
    scores_sets = task.metric.token is not None
    return Plan(
        model=task.identity,
        removed=tuple(sorted(order)),
        order=order,
        protected=task.protected,
        metric=config.metric,
        unit=task.metric.unit,
        strategy=finals.sets[0].strategy if finals else task.strategy,
        racing=scores_sets and not config.exact,
        compiled=scores_sets and config.compile,
        dtype=model.dtype,
        target=target,
        baseline=baseline(found.dense) if found.dense.size else None,
        rounds=rounds_behind(found.rounds, order),
        final_comparison=finals,
        similarity=task.gate,
        calibration=split.search.record,
        split=split.hashes,
        curve=curve,
        versions=versions(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """What is to be searched, with all that is known before any set of blocks is scored. ``stack``
    runs the candidates; it may be compiled."""

    model: LoadedModel
    stack: BlockStack
    config: SearchConfig
    split: CalibrationSplit
    goal: Goal
    metric: Metric
    strategy: str
    candidates: Sequence[int]
    protected: tuple[int, ...]
    similarity: Similarity | None
    gate: SimilarityGate | None
    costs: Costs
    identity: Fingerprint
    batch: int

    @property
    def measures_heldout(self) -> bool:
        """Whether the target needs windows that took no part in the choice."""
        return self.config.curve or self.goal.max_loss_increase is not None

    @property
    def key(self) -> str:
        """Identity of all that every score depends on."""
        record, config = self.split.search.record, self.config
        how = self.model.dtype + (", compiled" if config.compile else "")
        parts = [
            self.identity.model_dump(),
            record.sha256,
            record.seed,
            config.metric,
            how,
        ]
        parts += [config.exact, versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def sweep(self, stack: BlockStack, ids: Tensor, metric: TokenMetric) -> Sweep:
        """Scores sets on windows [N, T]."""
        most = self.config.max_memory
        most_bytes = None if most is None else parse_bytes(most, "--max-memory")
        return Sweep(stack, ids, metric, batch=self.batch, max_bytes=most_bytes)


def _prepare(
    model: LoadedModel,
    config: SearchConfig,
    split: CalibrationSplit,
    progress: Progress,
) -> _Task:
    """Measure what the choice of candidates needs.

    Raises:
        InputError: too few candidates, or no windows to hold out where the target needs them.
    """
    goal = check_options(config)
    metric = METRICS[config.metric]
    n_blocks = len(model.stack)
    candidates = candidates_for(goal, config.protect, n_blocks, model.stack.model.config)
    protected = tuple(b for b in range(n_blocks) if b not in candidates)
    heldout = 0 if split.heldout is None else len(split.heldout.ids)
    if (config.curve or goal.max_loss_increase is not None) and heldout < 2:
        raise InputError(
            "no two windows are left over to hold out, which --max-loss-increase and --curve "
            "need: give more --text, fewer --windows, a shorter --length, or a larger --heldout"
        )
    checkpoint = Checkpoint.open(model.source.path)
    with progress.stage("hashing the model", checkpoint.nbytes) as tick:
        identity = _identity(checkpoint, n_blocks, tick)
    similarity, gate = None, None
    if config.min_similarity is not None or metric.token is None:
        similarity = measure_similarity(
            model, split.search, measure="cosine", batch=config.batch, progress=progress
        )
        if config.min_similarity is not None:
            least = removals(goal, n_blocks)
            candidates, gate = above(similarity, candidates, config.min_similarity, least)
    batch = config.batch or default_batch(model.stack, split.search.ids.shape[1])
    stack = CompiledStack(model.stack.model, batch) if config.compile else model.stack
    return _Task(
        model=model,
        stack=stack,
        config=config,
        split=split,
        goal=goal,
        metric=metric,
        strategy=config.strategy or metric.strategy,
        candidates=candidates,
        protected=protected,
        similarity=similarity,
        gate=gate,
        costs=Costs.of(checkpoint, model.stack),
        identity=identity,
        batch=batch,
    )


@dataclass(frozen=True)
class _Search:
    """The objectives of a task. Those after a repair are of the model's own stack, since blocks
    whose weights change cannot be compiled."""

    task: _Task
    repaired: RepairedScorer
    cache: ScoreCache
    progress: Progress

    def heldout(self, after_repair: bool) -> HeldoutEvaluation | None:
        """The evidence for a depth, if the target needs any."""
        task, windows = self.task, self.task.split.heldout
        if windows is None or not task.measures_heldout:
            return None
        title, n = "measuring held-out loss", len(windows.ids)
        if not after_repair or task.goal.max_loss_increase is None:
            scorer = task.sweep(task.stack, windows.ids, NLL).scorer
            plain = Objective(scorer, n, progress=self.progress, title=title)
            return HeldoutEvaluation(plain, windows, task.costs)
        ids = task.split.candidate_fit(FINAL_TOKENS).ids
        scorer = self.repaired(task.sweep(task.model.stack, windows.ids, NLL), ids)
        scores = self.cache.of(f"held-out, repaired: {digest(ids)} {digest(windows.ids)}")
        losses = Objective(scorer, n, cache=scores, progress=self.progress, title=title)
        return HeldoutEvaluation(losses, windows, task.costs, fitted=ids.numel())

    def choose(self, rule: StoppingRule) -> SearchResult:
        """Run the strategy, or rank all blocks at once if the metric does that."""
        task, config = self.task, self.task.config
        if task.metric.token is None:
            assert task.similarity is not None
            alike = task.similarity.per_window[:, task.candidates]
            only = rank(task.candidates, 1 - alike.T, rule.most)
            return SearchResult(order=only.removed, rounds=(only,), dense=np.zeros(0))
        search = task.split.search
        ids = search.ids if config.exact else search.ids[_shuffled(search, config.seed)]
        objective = Objective(
            task.sweep(task.stack, ids, task.metric.token).scorer,
            len(ids),
            cache=self.cache.of("plain"),
            progress=self.progress,
            enough=rule.enough,
            exact=config.exact,
        )
        if task.metric.repaired:
            sweep, fitted = (
                task.sweep(task.model.stack, ids, task.metric.token),
                self.fitted,
            )
            objective = ShortlistObjective(
                objective,
                self.repaired(sweep, fitted),
                cache=self.cache.of(f"repaired: {digest(fitted)}"),
                progress=self.progress,
                enough=rule.enough,
            )
        if task.strategy == FINALS:
            ids, fitted = task.split.final_comparison, self.fitted
            objective.judge = Objective(
                self.repaired(task.sweep(task.model.stack, ids, NLL), fitted),
                len(ids),
                cache=self.cache.of(f"final: {digest(fitted)} {digest(ids)}"),
                progress=self.progress,
            )
        return STRATEGIES[task.strategy](objective, task.candidates, rule.most)

    @cached_property
    def fitted(self) -> Tensor:
        """Windows [N, T] that candidates' repairs are fitted on."""
        tokens = FINAL_TOKENS if self.task.strategy == FINALS else SEARCH_TOKENS
        return self.task.split.candidate_fit(tokens).ids

    def comparison(self, found: SearchResult) -> FinalComparison | None:
        """The plan's record of the sets that the strategy has compared, if it has."""
        if not found.finalists:
            return None
        windows = len(self.task.split.final_comparison)
        return FinalComparison(
            sets=found.finalists,
            fitted=self.fitted.numel(),
            windows=windows,
            self_generated=windows - len(self.task.split.search.ids),
        )


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
