"""Several runs on one page: every figure that a limit could be on, with its worst case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sleb.acceptance import LIMITS
from sleb.core.plan import Plan
from sleb.core.statistics import Interval
from sleb.evaluation.agreement import RightAnswers
from sleb.record import GateRow, RunRecord
from sleb.views import proof, quality
from sleb.views.locale import DASH, Locale, names
from sleb.views.model import Facts, Item, Listing, Missing, Page, Panel, Table, Text, Verdict

Run = tuple[str, RunRecord, Plan]
"""What it is called, and what it left."""


def comparison(t: Locale, runs: Sequence[Run], digests: dict[str, str]) -> Page:
    """The page of ``runs``, in the order in which they were given; ``digests``: SHA-256 of their
    files, by name."""
    called = t.join(name for name, _, _ in runs)
    worst = [(name, quality.worst_pair(t, r.answers, r.prompts)) for name, r, _ in runs]
    return Page(
        lang=t.lang,
        title=t.plain("compare.title", runs=called),
        subtitle=t("compare.subtitle"),
        verdict=Verdict(
            tone="none",
            headline=t("compare.headline"),
            text=t("compare.text"),
            table=_figures(t, runs),
        ),
        summary=(
            Panel(name="made", title=t("compare.made"), items=(_made(t, runs),), wide=True),
            Panel(name="alike", title=t("compare.alike"), items=_alike(t, runs), wide=True),
        ),
        contents=t("page.contents"),
        sections=(
            *(
                Panel(
                    name=f"worst-{i}",
                    title=t("compare.worst", run=name),
                    items=tuple(items) or (Missing(t("compare.unknown")),),
                )
                for i, (name, items) in enumerate(worst)
            ),
            Panel(
                name="provenance",
                title=t("provenance.title"),
                items=(
                    Facts(
                        tuple(
                            (t("provenance.sha256", name=name), t.code(digest))
                            for name, digest in digests.items()
                        )
                    ),
                ),
            ),
        ),
        glossary_title=t("page.glossary"),
        glossary=tuple((key, *entry) for key, entry in t.tables["glossary"].items()),
        colophon=t("page.colophon"),
    )


def _table(t: Locale, runs: Sequence[Run], rows: Sequence[tuple[str, ...]]) -> Table:
    heads = (t("gate.limit_of"), *(name for name, _, _ in runs))
    return Table(columns=heads, rows=tuple(rows), stacked=True)


def _figures(t: Locale, runs: Sequence[Run]) -> Table:
    """Each figure with its worst case; what no run has is left out."""
    found: list[dict[tuple[str, str], GateRow]] = []
    for _, record, _ in runs:
        rows = (row for limit in LIMITS for row in limit.measured(record) if row.worst is not None)
        mine: dict[tuple[str, str], GateRow] = {}
        for row in rows:  # of several models of one record the first is its own
            mine.setdefault((row.name, row.of), row)
        found.append(mine)
    order = [limit.key for limit in LIMITS]
    keys = sorted({key for mine in found for key in mine}, key=lambda k: (order.index(k[0]), k[1]))
    speed = next((r.speed for _, r, _ in runs if r.speed), None)

    def shown(row: GateRow | None) -> str:
        if row is None or row.measured is None or row.worst is None:
            return DASH
        value = t.figure(row.measured, row.unit)
        if row.worst == row.measured:
            return value
        return t("compare.figure", value=value, worst=t.figure(row.worst, row.unit))

    figures = [
        (proof.limit_name(t, key[0], key[1], speed), *(shown(mine.get(key)) for mine in found))
        for key in keys
    ]
    judged = [record.prompts and record.prompts.right for _, record, _ in runs]
    if any(judged):
        figures.insert(0, (t("compare.right"), *(_right(t, x) if x else DASH for x in judged)))
    return _table(t, runs, figures)


def _right(t: Locale, x: RightAnswers) -> str:
    return t("compare.right_of", counts=quality.right_counts(t, x), judged=x.judged)


def _made(t: Locale, runs: Sequence[Run]) -> Table:
    """What each run is, and its gate's verdict."""

    def removed(r: RunRecord, p: Plan) -> str:
        gone = len(r.removed) - len(r.parts)
        return t("removed.of", k=gone, n=r.blocks, share=t.percent(gone / r.blocks))

    def changed(r: RunRecord, p: Plan) -> str:
        if r.healed:
            return t("healed.name")
        count = quality.changed(p.repair.gaps) if p.repair else 0
        return t("compare.repaired", count=count) if count else t("repair.none")

    def gate(r: RunRecord, p: Plan) -> str:
        counts = proof.counted(r.gate.rows) if r.gate else {}
        return t("verdict.failed_text", **counts) if counts else t("verdict.none")

    originals = names(r.model for _, r, _ in runs)
    shows: dict[str, Callable[[RunRecord, Plan], Any]] = {
        "compare.original": lambda r, p: originals[r.model],
        "removed.blocks": removed,
        "removed.which": lambda r, p: t.join(r.removed),
        "repair.name": changed,
        "removed.parameters": lambda r, p: t.large(r.parameters[1]),
        "gate.title": gate,
        "provenance.started": lambda r, p: t.moment(r.started),
    }
    rows = [(t(key), *(show(r, p) for _, r, p in runs)) for key, show in shows.items()]
    return replace(_table(t, runs, rows), words=frozenset(range(len(runs) + 1)))


def _alike(t: Locale, runs: Sequence[Run]) -> tuple[Item, ...]:
    """Which figures were measured on the same, and so can be compared: of the runs that have
    them, where these are two or more."""
    materials: dict[str, Callable[[RunRecord, Plan], object]] = {
        "model": lambda r, p: p.model.weights_sha256,
        "texts": lambda r, p: _texts(r, p) if r.evaluation else None,
        "prompts": lambda r, p: (
            (r.prompts.source, r.prompts.prompts, r.prompts.tokens) if r.prompts else None
        ),
        "answers": lambda r, p: r.answers.sha256 if r.answers else None,
        "tasks": lambda r, p: (
            tuple((x.name, x.items, x.dense.value) for x in r.tasks) if r.tasks else None
        ),
        "machine": lambda r, p: tuple(r.environment.items()) if r.speed else None,
    }
    lines = []
    for key, of in materials.items():
        seen = {name: repr(found) for name, r, p in runs if (found := of(r, p)) is not None}
        if len(seen) < 2:
            continue
        said = t(f"compare.{'same' if len({*seen.values()}) == 1 else 'other'}_{key}")
        lines.append(
            said if len(seen) == len(runs) else t("compare.of", runs=t.join(seen), said=said)
        )
    return (Listing(tuple(lines)), Text(t("compare.unpaired")))


def _texts(r: RunRecord, p: Plan) -> object:
    """What perplexity was measured on; held-out text by its hash, where the plan has that."""
    e, found = r.evaluation, r.evaluation_text
    assert e is not None
    if found and found.source == "held-out" and p.curve:
        return p.curve.heldout.sha256
    loss: Interval = e.loss
    return (found and found.texts, e.windows, e.length, loss.value)
