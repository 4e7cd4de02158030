"""The model card that travels with a pruned checkpoint, made only from the plan and the record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sleb.core.card import cut_card
from sleb.core.plan import Plan
from sleb.record import RunRecord
from sleb.views.locale import Locale
from sleb.views.model import Item, Listing, Text
from sleb.views.quality import prompt_words, warning
from sleb.views.results import evaluated_on, items, sizes
from sleb.views.terminal import markdown


def model_card(plan: Plan, record: RunRecord, source: Path, *, kept: bool = False) -> str:
    """README.md with metadata. ``source`` is the original's folder: its licence is carried over.
    ``kept``: the checkpoint has a side-car to restore the original from."""
    return cut_card(
        plan,
        source,
        model=record.model,
        command=record.command,
        measured=markdown(_measured(Locale("en"), record)),
        kept=kept,
    )


def _measured(t: Locale, r: RunRecord) -> Iterator[Item]:
    """All that the record has of the result."""
    yield sizes(t, r)
    if r.prompts:
        yield Text(t("kept.text", **prompt_words(t, r.prompts)))
        yield from warning(t, r.prompts)
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
