"""Zero-shot tasks, dense and pruned on the same items: the harness's own and the user's JSONL.

All scoring is lm-evaluation-harness's (extra ``eval``); a user's JSONL becomes a task of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sleb.config import EvalConfig, takes
from sleb.core.errors import InputError
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Flips, Interval, flips, interval, proportion
from sleb.evaluation.questions import Questions, read_questions
from sleb.models.load import LoadedModel
from sleb.selection.sweep import Patch

if TYPE_CHECKING:
    from sleb.evaluation.lm_eval import Scores


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task's score, in 0..1, of the dense and of the pruned model.

    ``metric`` is the harness's name for it (acc, acc_norm, exact_match); ``chance`` is the score of
    guessing, where the number of choices is known. ``flips`` compares item by item; null where an
    item's score is not just 0 or 1.
    """

    name: str
    metric: str
    items: int
    chance: float | None
    dense: Interval
    pruned: Interval | None = None
    flips: Flips | None = None

    @property
    def retention(self) -> float | None:
        """Pruned score over dense score; null if there is none."""
        if self.pruned is None or not self.dense.value:
            return None
        return self.pruned.value / self.dense.value

    @property
    def guesses(self) -> bool:
        """Whether the dense model is not clearly better than guessing, which leaves nothing to
        keep."""
        low = self.dense.low
        return self.chance is not None and low is not None and low <= self.chance


def check_tasks(
    tasks: Sequence[str], *, folder: str | Path | None = None
) -> tuple[list[Questions], list[str]]:
    """Find mistakes before a model is loaded: reads the .jsonl files, and looks the names up.

    Returns what was read, and the names of the other tasks.

    Raises:
        InputError: see :func:`run_tasks`.
    """
    if not tasks:
        raise InputError("no task to score; name at least one")
    # the cheap mistakes first: looking a name up can take half a minute
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-evaluation-harness: pip install lm-eval")
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"no folder of tasks at {folder}; give the one that has the .yaml files")
    questions = [read_questions(task) for task in tasks if task.endswith(".jsonl")]
    names = [task for task in tasks if not task.endswith(".jsonl")]
    every = [*(q.name for q in questions), *names]
    for name in every:
        if every.count(name) > 1:
            raise InputError(f"two tasks are named '{name}'; rename a file, or leave one out")
    if names:
        from sleb.evaluation.lm_eval import find_names

        find_names(names, folder)
    return questions, names


@takes(EvalConfig)
def run_tasks(
    model: LoadedModel,
    config: EvalConfig,
    *,
    removed: Collection[int] = (),
    patch: Patch | None = None,
    progress: Progress = silent,
) -> tuple[TaskResult, ...]:
    """Score ``model``, and side by side with ``removed`` blocks bypassed, on each ``task``.

    ``task`` are paths of .jsonl files (see docs/tasks.md), or names of tasks, groups or tags, which
    are looked up in ``tasks_folder`` and then among the harness's own; a group or tag gives a
    result for each of its tasks. Where a task has more than ``limit`` items, a sample is drawn by
    ``seed``, the same for both models; few-shot examples are those that the harness draws by
    default. ``batch`` is in requests, by default what fits, up to 16 on a CPU and 64 on a GPU. The
    second score is taken under ``patch``, as a repair. The unit of progress is a request, of which
    an item with four choices has four.

    The metric is acc_norm if the task has it, else acc, else exact_match, else the first one that
    is a mean of scores per item, of which more is better. With several filters, the first counts.
    Log-probabilities are taken in float32 whatever the model's dtype.

    Raises:
        InputError: no task, an unknown one, or two of one name; lm-evaluation-harness is missing; a
            file or definition that cannot be used; a task that runs generated code without
            ``run_code``, needs images, or has no score per item in 0..1; an item that is longer
            than the model reads.
        ResourceError: data of a task cannot be fetched; out of memory.
        DataError: a log-probability is NaN.
    """
    questions, names = check_tasks(config.task, folder=config.tasks_folder)
    from sleb.evaluation.lm_eval import Harness

    code = config.run_code
    harness = Harness(model, batch=config.batch, run_code=code, progress=progress)
    folder, limit, seed = config.tasks_folder, config.limit, config.seed
    scored = []
    for task in harness.load(questions, names, folder, limit=limit, seed=seed):
        dense = harness.score(task)
        pruned = harness.score(task, removed, patch) if removed else None
        scored.append(_result(task.name, task.metric, dense, pruned))
    return tuple(scored)


def _result(name: str, metric: str, dense: Scores, pruned: Scores | None) -> TaskResult:
    binary = all(set(s.values) <= {0.0, 1.0} for s in (dense, pruned) if s)

    def averaged(scores: Scores) -> Interval:
        if binary:
            return proportion(int(sum(scores.values)), len(scores.values))
        return interval(np.array(scores.values))

    compared = None
    if pruned and binary:
        compared = flips([v == 1 for v in dense.values], [v == 1 for v in pruned.values])
    return TaskResult(
        name=name,
        metric=metric,
        items=len(dense.values),
        chance=dense.chance,
        dense=averaged(dense),
        pruned=averaged(pruned) if pruned else None,
        flips=compared,
    )
