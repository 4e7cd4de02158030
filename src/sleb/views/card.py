"""The model card that travels with a pruned checkpoint, made only from the plan and the record."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sleb.core.card import cut_card, rebuilt
from sleb.core.plan import Plan
from sleb.core.printable import printable
from sleb.record import RunRecord
from sleb.views.locale import ROOT, Locale, last_part, unrooted
from sleb.views.model import Item, Listing, Text
from sleb.views.quality import prompts_told, warning
from sleb.views.results import evaluated_on, items, sizes
from sleb.views.terminal import markdown

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


_ARGUMENT = re.compile(rf"(^|=){ROOT}.+", re.DOTALL)


def _published(command: str) -> str:
    """The same of a command, whose arguments may have spaces."""
    try:
        given = shlex.split(command)
    except ValueError:  # a record of others, in which it is no command
        return unrooted(command)
    words = [_ARGUMENT.sub(lambda found: found[1] + last_part(found[0]), word) for word in given]
    return command if words == given else shlex.join(words)


def model_card(plan: Plan, record: RunRecord, source: Path, *, kept: bool = False) -> str:
    """README.md with metadata. ``source`` is the original's folder: its licence is carried over.
    ``kept``: the checkpoint has a side-car to restore the original from."""
    found, out = results(record), Path(record.verification.checkpoint).absolute()
    return cut_card(
        plan,
        source,
        model=record.model,
        command=_published(record.command),
        measured=[*map(unrooted, markdown(_measured(Locale("en"), record)))],
        kept=rebuilt(kept, gguf=record.file_nbytes is not None),
        results={"model_name": printable(out.name), "eval_results": found} if found else None,
    )


def results(r: RunRecord) -> list[EvalResult]:
    """What was measured, as the model-index of a hub lists it: perplexity by text, what is kept of
    the original's answers, and tasks. Texts and prompts are the user's own."""
    from huggingface_hub import EvalResult

    def one(of: str, metric: str, value: float, name: str) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=printable(unrooted(of)),
            dataset_config=printable(unrooted(of)),  # by which a hub tells them apart
            metric_type=printable(metric),
            metric_value=round(value, 4),
            metric_name=name,
        )

    found = []
    for text, q in r.evaluation.domains.items() if r.evaluation else ():
        if q.pruned_perplexity:
            dense = f"perplexity (the original's: {round(q.perplexity.value, 4)})"
            found.append(one(text, "perplexity", q.pruned_perplexity.value, dense))
    if k := r.prompts:
        same = "share of the tokens of the original's answers that are kept"
        found.append(one(f"prompts: {k.source}", "agreement", k.agreement.value, same))
    for task in r.tasks or ():
        if task.pruned:
            dense = f"{task.metric} (the original's: {round(task.dense.value, 4)})"
            found.append(one(task.name, task.metric, task.pruned.value, printable(dense)))
    return found


def _measured(t: Locale, r: RunRecord) -> Iterator[Item]:
    """All that the record has of the result."""
    yield sizes(t, r)
    if r.prompts:
        yield Text(prompts_told(t, r.prompts))
        yield from warning(t, r.prompts)
    elif r.unasked:
        yield Text(t.said("unasked", r.unasked))
    e = r.evaluation
    if e and e.perplexity_ratio:
        yield Text(
            f"Perplexity is on {evaluated_on(r)}, computed in {r.environment['dtype']}, the ratio "
            "paired. It says nothing about other texts or tasks: measure yours before you rely on "
            "this model."
        )
    else:
        yield Text(f"Quality was not measured: {evaluated_on(r)}.")
    for found in (r.healed, r.tasks, r.speed, r.draft, r.runtimes):
        if found:
            yield from items(found)
    yield Text("Checks passed when it was written:")
    yield Listing(
        tuple(
            f"{t.named('checks', check.key)}: {t.said('found', check.found, check.key)}"
            for check in r.verification.checks
        )
    )
