"""The search as users call it: with a model to load, text to read, and scores after a repair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sleb.calibration.split import CalibrationSplit
from sleb.config import LoadOptions, SearchConfig, takes
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.models.load import LoadedModel, load
from sleb.repairs.answering import prompt_files, with_answers, writer
from sleb.repairs.scoring import repaired_scorer
from sleb.repairs.self_generated import can_generate
from sleb.selection.goal import Goal
from sleb.selection.metrics import METRICS
from sleb.selection.request import check_options, check_request
from sleb.selection.search import find_blocks
from sleb.selection.strategies import GREEDY_OR_WINDOW

C = TypeVar("C", bound=SearchConfig)


def with_metric(model: LoadedModel, config: C, *, to_heal: bool = False) -> C:
    """``config`` with its metric. By default that is SLEB's, and answers where a choice by texts
    costs most of these and the model gives any: for parts of blocks (docs/units.md), and for a cut
    that is ``to_heal``, which gives back what texts lose more by it (docs/heal.md), unless the
    target is a limit on the loss of texts."""
    by_answers = config.unit != "block" or (to_heal and config.max_loss_increase is None)
    if config.metric is None and by_answers and prompt_files(model, config, embedded=True):
        return config.replaced({"metric": "answers"})
    return config


def split_of(model: LoadedModel, config: SearchConfig, heldout: int) -> CalibrationSplit:
    """The windows of the texts that ``config`` names, of which so many are held out."""
    return CalibrationSplit.of(
        model.tokenizer,
        config.text,
        windows=config.windows,
        length=config.length,
        seed=config.seed,
        heldout=heldout,
        loss_on=config.loss_on,
        images=model.stack.images,
    )


def texts_of(model: LoadedModel, config: C, goal: Goal) -> tuple[C, CalibrationSplit]:
    """``config`` with its metric, and the windows that a search reads by it."""
    config = with_metric(model, config)
    measures_heldout = config.curve or goal.max_loss_increase is not None
    return config, split_of(model, config, config.heldout if measures_heldout else 0)


@takes(SearchConfig)
def search(
    model: LoadedModel | str | Path,
    config: SearchConfig,
    *,
    split: CalibrationSplit | None = None,
    after_repair: bool = False,
    journal: str | Path | None = None,
    keep_journal: bool = False,
    foretell: Callable[[LoadedModel, CalibrationSplit, SearchConfig], None] = lambda *_: None,
    progress: Progress = silent,
) -> Plan:
    """Find the blocks whose removal costs least, and return the plan.

    Args:
        model: a loaded model, or anything that :func:`sleb.load` takes.
        config: the options, which may also be given as keywords: see
            :class:`sleb.config.SearchConfig`. Exactly one target is given: ``remove``,
            ``max_loss_increase``, ``keep_answers``, ``speedup`` or ``size`` (with ``curve`` none
            means half of the blocks). The result is a function of the inputs and the seed.
        split: windows that were chosen before, in place of ``text``, ``windows``, ``heldout`` and
            ``prompts``.
        after_repair: with one of these two limits, hold it with cuts that were each repaired
            quickly, on text beside what is scored, as :func:`sleb.prune` will repair the result.
        journal: file that keeps finished scores, so that the same call resumes after a crash.
        keep_journal: leave it when the search is done, for a caller who is not done.
        foretell: is given the model, the texts and the options, before the work begins.
        progress: receives the stages.

    Raises:
        VerificationFailed: nothing can be removed within the limit.
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    goal = check_options(config)
    if not isinstance(model, LoadedModel):
        check_request(model, config, progress)
        model = load(model, **dict(config.part(LoadOptions)), progress=progress)
    if split is None:
        config, split = texts_of(model, config, goal)
        foretell(model, split, config)
        of_answers = METRICS[config.chosen_by].answers or goal.keep_answers is not None
        split = with_answers(model, split, config, progress, embedded=of_answers)
    strategy = config.strategy or METRICS[config.chosen_by].strategy
    if strategy == GREEDY_OR_WINDOW and split.generated is None and can_generate(model.stack):
        split = split.with_self_generated(writer(model, progress), compare=True)
    plan = find_blocks(
        model,
        config,
        split,
        repaired=repaired_scorer,
        after_repair=after_repair,
        journal=journal,
        keep_journal=keep_journal,
        progress=progress,
    )
    return plan.seeing(split.answers.seen) if split.answers else plan
