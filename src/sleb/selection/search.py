"""The search: which blocks can go. Ties the parts together, in four steps: prepare, choose, settle,
record."""

from __future__ import annotations

import json
import math
import platform
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sleb.calibration.answers import ANSWERS
from sleb.calibration.split import SELF_GENERATED, CalibrationSplit
from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import Checkpoint, fingerprint
from sleb.checkpoints.gguf_fields import GGUFModel
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.config import SearchConfig
from sleb.core.errors import InputError
from sleb.core.plan import (
    FinalComparison,
    Fingerprint,
    Origin,
    Plan,
    Saving,
    SimilarityGate,
    rounds_behind,
)
from sleb.core.process_group import group
from sleb.core.progress import Progress, Tick, silent
from sleb.core.statistics import Values
from sleb.core.units import block_of, canonical, parts_in
from sleb.models.compiled import CompiledStack
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack
from sleb.selection.goal import parse_bytes
from sleb.selection.metrics import METRICS, MISSED, NLL, TokenMetric
from sleb.selection.objective import Objective, ScoreCache, Scorer, ShortlistObjective
from sleb.selection.racing import baseline, rank
from sleb.selection.request import (
    above,
    candidates_for,
    check_options,
    removals,
)
from sleb.selection.resources import batch_for, on_threads
from sleb.selection.savings import default_length, measure_savings
from sleb.selection.similarity import Similarity, measure_similarity
from sleb.selection.strategies import GREEDY_OR_WINDOW, STRATEGIES, SearchResult
from sleb.selection.sweep import Sweep
from sleb.selection.targets import Costs, HeldoutEvaluation, StoppingRule

SEARCH_TOKENS = 16_384
"""Tokens that the repair of a candidate is fitted on."""
FINAL_TOKENS = 8192
"""Likewise of a set that is one of a few: they differ by more than text does."""

TEXT_TOLERANCE = 0.05
"""Nats/token that a set chosen for its answers may lose on texts, after a repair, above what the
best set does: 5 % of perplexity."""

RepairedScorer = Callable[[Sweep, Windows], Scorer]
"""Scores sets as a sweep does, each after a repair that is fitted on windows."""


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
    search = _Search(model, config, split, repaired, progress)
    cache = ScoreCache(journal, search.settings, keep=keep_journal)
    with on_threads(config.threads), cache:
        cache.tell(progress)
        evidence = search.heldout(cache, after_repair)
        decides = search.answer_evidence(cache, after_repair) or evidence
        rule = StoppingRule(search.goal, search.costs, search.candidates, decides)
        found = search.choose(cache, rule)
        order, target = rule.settle(found.order)
        tested = found.order if config.curve else found.order[: len(order) + 1]
        curve = evidence.curve(tested) if evidence else None
    saving = search.costs.saving
    finals, of_sets = search.comparison(found), search.metric.token is not None
    return Plan(
        model=search.identity,
        origin=Origin.of(model.source.path),
        removed=canonical(order),
        order=order,
        protected=search.protected,
        metric=config.chosen_by,
        unit=search.unit,
        strategy=finals.sets[0].strategy if finals else search.strategy,
        racing=of_sets and not config.exact,
        compiled=of_sets and config.compile,
        dtype=model.dtype,
        target=target,
        baseline=baseline(found.dense) if found.dense.size and not saving else None,
        rounds=rounds_behind(found.rounds, order),
        final_comparison=finals,
        similarity=search.gate,
        saving=saving,
        calibration=search.windows.record,
        split=split.hashes,
        curve=curve,
        versions=versions(),
    )


class _Search:
    """What is known before any set of blocks is scored, and the objectives that score them.

    Raises:
        InputError: too few candidates, or no windows to hold out where the target needs them.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: SearchConfig,
        split: CalibrationSplit,
        repaired: RepairedScorer,
        progress: Progress,
    ) -> None:
        self.model, self.config, self.split = model, config, split
        self.repaired, self.progress = repaired, progress
        self.goal = check_options(config)
        self.metric = METRICS[config.chosen_by]
        self.windows = self._scored()
        self.strategy = config.strategy or self.metric.strategy
        stack, n_blocks = model.stack, len(model.stack)
        self.candidates = candidates_for(
            self.goal, config.protect, n_blocks, stack.model.config, config.unit
        )
        touched = {*map(block_of, self.candidates)}
        self.protected = tuple(b for b in range(n_blocks) if b not in touched)
        for block in sorted({*map(block_of, parts_in(self.candidates))}):
            stack.parts(block)  # refuses models that have none
        if self.measures_heldout and (split.heldout is None or len(split.heldout.ids) < 2):
            raise InputError(
                "no two windows are left over to hold out, which --max-loss-increase and --curve "
                "need: give more --text, fewer --windows, a shorter --length, or a larger --heldout"
            )
        checkpoint = Checkpoint.open(model.source.path)
        with progress.stage("hashing the model", checkpoint.nbytes) as tick:
            self.identity = _identity(checkpoint, n_blocks, tick)
        self.similarity: Similarity | None = None
        self.gate: SimilarityGate | None = None
        if config.min_similarity is not None or self.metric.token is None:
            self.similarity = measure_similarity(
                model, split.search, measure="cosine", batch=config.batch, progress=progress
            )
            if config.min_similarity is not None:
                least = removals(self.goal, n_blocks)
                self.candidates, self.gate = above(
                    self.similarity, self.candidates, config.min_similarity, least
                )
        self.costs = Costs.of(checkpoint, stack, parts_in(self.candidates))
        if model.source.is_gguf:
            file = GGUFFile.open(Path(model.source.ref).expanduser())
            self.costs = self.costs.in_file(GGUFModel.of(file))
        self._weigh()
        self.batch = batch_for(stack, self.windows.ids, config.batch)
        self.stack = CompiledStack(stack.model, self.batch) if config.compile else stack
        self.stack.images = stack.images

    def _weigh(self) -> None:
        """Measure what each candidate saves, if they are weighed by that; what saves nothing is no
        candidate."""
        config = self.config
        of = config.save or ("time" if config.unit == "any" else None)
        if of is None:
            return
        stack, progress = self.model.stack, self.progress
        length = config.prompt_length or default_length(stack)
        asked = Saving(of=of, context=length, sequences=config.sequences)
        saving = measure_savings(stack, self.costs, self.candidates, asked, progress)
        self.costs = replace(self.costs, saving=saving)
        self.candidates = [unit for unit in self.candidates if saving.share([unit]) > 0]
        if len(self.candidates) < (n := removals(self.goal, len(stack))):
            raise InputError(
                f"only {len(self.candidates)} candidates save anything of --save {of}, and {n} are "
                "to be removed: remove fewer"
            )

    def _scored(self) -> Windows:
        """What blocks are chosen by.

        Raises:
            InputError: the metric is of answers, and there are none.
        """
        if not self.metric.answers:
            return self.split.search
        if self.split.answers is None:
            raise InputError(
                f"--metric {self.config.chosen_by} is measured on answers to prompts, and the "
                "model answers no chats: give --prompts"
            )
        return self.split.answers.search

    @property
    def unit(self) -> str:
        """What rounds' scores are in."""
        saving = self.costs.saving
        return f"{self.metric.unit} for each % of {saving.of}" if saving else self.metric.unit

    @property
    def measures_heldout(self) -> bool:
        """Whether the target needs windows that take no part in the choice."""
        return self.config.curve or self.goal.max_loss_increase is not None

    @property
    def settings(self) -> dict[str, Any]:
        """All that every score depends on."""
        record, config = self.windows.record, self.config
        return {
            "model": self.identity.architecture,
            "config": self.identity.config_sha256,
            "weights": self.identity.weights_sha256,
            "metric": config.chosen_by,
            "text": [source.spec for source in record.sources],
            "windows": record.windows,
            "length": record.length,
            "seed": record.seed,
            "tokens": record.sha256,
            "dtype": self.model.dtype,
            "compile": config.compile,
            "exact": config.exact,
            **versions(),
        }

    @cached_property
    def fitted(self) -> Windows:
        """What candidates' repairs are fitted on."""
        tokens = FINAL_TOKENS if self.strategy == GREEDY_OR_WINDOW else SEARCH_TOKENS
        return self.split.candidate_fit(tokens)

    def _plain(self, windows: Windows, metric: TokenMetric) -> Scorer:
        """Scores sets on windows."""
        return self._sweep(self.stack, windows, metric).scorer

    def _repaired(
        self, windows: Windows, metric: TokenMetric, fitted: Windows
    ) -> tuple[Scorer, str]:
        """Scores sets on windows after a repair, and names such scores. Blocks whose weights change
        cannot be compiled."""
        scorer = self.repaired(self._sweep(self.model.stack, windows, metric), fitted)
        return scorer, f"{metric.name} repaired {fitted.record.sha256} {windows.record.sha256}"

    def _sweep(self, stack: BlockStack, windows: Windows, metric: TokenMetric) -> Sweep:
        most = self.config.max_memory
        return Sweep(
            stack,
            windows.ids,
            metric,
            batch=self.batch,
            max_bytes=None if most is None else parse_bytes(most, "--max-memory"),
            scored=windows.scored,
        )

    def heldout(self, cache: ScoreCache, after_repair: bool) -> HeldoutEvaluation | None:
        """The evidence for a depth, if the target needs any."""
        windows = self.split.heldout
        if windows is None or not self.measures_heldout:
            return None
        repaired = after_repair and self.goal.max_loss_increase is not None
        return self._evidence(windows, NLL, cache, repaired, "measuring held-out loss")

    def answer_evidence(self, cache: ScoreCache, after_repair: bool) -> HeldoutEvaluation | None:
        """The evidence for a depth by answers, if that is the target.

        Raises:
            InputError: there are no answers.
        """
        if self.goal.keep_answers is None:
            return None
        if self.split.answers is None:
            raise InputError(
                "--keep-answers is measured on answers to prompts, and the model answers no chats: "
                "give --prompts"
            )
        windows = self.split.answers.measured.windows
        return self._evidence(windows, MISSED, cache, after_repair, "measuring answers")

    def _evidence(
        self,
        windows: Windows,
        metric: TokenMetric,
        cache: ScoreCache,
        repaired: bool,
        title: str,
    ) -> HeldoutEvaluation:
        scorer, kind, tokens = self._plain(windows, metric), "held-out", None
        if repaired:
            fitted = self.split.candidate_fit(FINAL_TOKENS)
            scorer, kind = self._repaired(windows, metric, fitted)
            tokens = fitted.ids.numel()
        losses = Objective(
            scorer,
            len(windows.ids),
            cache=cache,
            kind=f"{kind} {windows.record.sha256}",
            progress=self.progress,
            title=title,
        )
        return HeldoutEvaluation(losses, windows, self.costs, fitted=tokens)

    def choose(self, cache: ScoreCache, rule: StoppingRule) -> SearchResult:
        """Run the strategy, or rank all blocks at once if the metric does that."""
        metric, split = self.metric.token, self.split
        if metric is None:
            assert self.similarity is not None
            alike = self.similarity.per_window[:, self.candidates]
            only = rank(self.candidates, 1 - alike.T, rule.most)
            return SearchResult(order=only.removed, rounds=(only,), dense=np.zeros(0))
        objective = self._objective(self.windows, metric, cache, rule)
        if self.strategy == GREEDY_OR_WINDOW:
            last = split.final_comparison
            scorer, kind = self._repaired(last, NLL, self.fitted)
            shared: dict[str, Any] = {"cache": cache, "progress": self.progress}
            objective.final = Objective(scorer, len(last.ids), kind=kind, **shared)
            if split.answers:
                most = math.inf if self.metric.answers else TEXT_TOLERANCE
                objective.final.leaders = partial(answers_first, last, most=most)
                objective.final.kinds = {ANSWERS: last.of(ANSWERS), "texts": last.but(ANSWERS)}
            # on a CPU a second search takes minutes, and the final comparison sees answers anyway
            fast = self.stack.input_device.type == "cuda"
            if split.answers and fast and not self.metric.answers:
                answers = split.answers.search
                objective.others["answers"] = self._objective(answers, metric, cache, rule)
        return STRATEGIES[self.strategy](objective, self.candidates, rule.most)

    def _objective(
        self, windows: Windows, metric: TokenMetric, cache: ScoreCache, rule: StoppingRule
    ) -> Objective:
        """Scores sets on windows, as the metric says; other windows than the search's own have
        scores of their own."""
        kind = "" if windows is self.windows else f"{metric.name} {windows.record.sha256}"
        if not self.config.exact:
            windows = windows.take(_shuffled(windows, self.config.seed))
        n = len(windows.ids)
        shared: dict[str, Any] = {"cache": cache, "progress": self.progress, "enough": rule.enough}
        scorer = self._plain(windows, metric)
        objective = Objective(scorer, n, kind=kind, exact=self.config.exact, **shared)
        objective.saving = self.costs.saving
        if not self.metric.repaired:
            return objective
        scorer, kind = self._repaired(windows, metric, self.fitted)
        return ShortlistObjective(objective, scorer, n, kind=kind, **shared)

    def comparison(self, found: SearchResult) -> FinalComparison | None:
        """The plan's record of the sets that the strategy has compared, if it has."""
        if not found.finalists:
            return None
        last = self.split.final_comparison
        return FinalComparison(
            sets=found.finalists,
            fitted=self.fitted.ids.numel(),
            windows=len(last.ids),
            self_generated=len(last.of(SELF_GENERATED)),
            answers=len(last.of(ANSWERS)),
        )


def answers_first(windows: Windows, values: Values, *, most: float = TEXT_TOLERANCE) -> list[int]:
    """Sets, best first, by their losses [sets, windows] on texts and answers: the least loss on
    answers, of those that lose at most ``most`` nats/token more on texts than the best; then the
    others, by their loss on texts."""
    texts, said = (values[:, rows].mean(1) for rows in (windows.but(ANSWERS), windows.of(ANSWERS)))
    near = texts <= texts.min() + most
    keys = [(0, said[i]) if near[i] else (1, texts[i]) for i in range(len(values))]
    return sorted(range(len(values)), key=lambda i: keys[i])


def _identity(checkpoint: Checkpoint, n_blocks: int, tick: Tick) -> Fingerprint:
    """The model's, found once per machine; all machines must have the same."""
    here = group()
    mine = ""
    if here.local_rank == 0:
        mine = fingerprint(checkpoint, n_blocks, tick).model_dump_json()
    found = {text.decode() for text in here.exchange(mine.encode()) if text}
    ours = {json.dumps(versions()).encode()}
    if len(found) > 1 or len({*here.exchange(*ours)}) > 1:
        raise InputError(
            "the machines of this job have different weights, or different versions of sleb, torch "
            "or transformers: give all of them the same"
        )
    return Fingerprint.model_validate_json(found.pop())


@cache
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
