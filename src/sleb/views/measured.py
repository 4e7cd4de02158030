"""What was measured on the result: texts, tasks, answers, speed and transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb.views.answers import answers
from sleb.views.context import Material
from sleb.views.page import Item, Missing, Panel, Table, Text
from sleb.views.repair import by_gap, plain_only, with_and_without
from sleb.views.timing import speed

if TYPE_CHECKING:
    from sleb.evaluation.perplexity import Quality
    from sleb.evaluation.tasks import TaskResult
    from sleb.evaluation.transfer import Chosen, Transfer

__all__ = ["measured"]


def measured(m: Material) -> list[Panel]:
    """The sections about the result."""
    parts = {
        "texts": _texts(m),
        "tasks": _tasks(m),
        "answers": answers(m),
        "speed": speed(m),
        "transfer": _transfer(m),
    }
    return [
        Panel(name=name, title=m.say(f"{name}.title"), items=tuple(items))
        for name, items in parts.items()
    ]


def _texts(m: Material) -> list[Item]:
    say, e = m.say, m.record.evaluation
    if e is None:
        return [Missing(text=m.missing("evaluation")), *by_gap(m)]

    plain = e.unrepaired

    def without(q: Quality | None) -> tuple[str, ...]:
        if plain is None:
            return ()
        ratio = q.perplexity_ratio if q else None
        return (say.interval(ratio, say.ratio) if ratio else "–",)

    def row(name: str, q: Quality, plain_q: Quality | None) -> tuple[str, ...]:
        dash = "–"
        return (
            name,
            say.number(q.windows, 0),
            say.interval(q.perplexity, say.level),
            say.interval(q.pruned_perplexity, say.level) if q.pruned_perplexity else dash,
            say.interval(q.perplexity_ratio, say.ratio) if q.perplexity_ratio else dash,
            *without(plain_q),
            say.interval(q.divergence, say.nats) if q.divergence else dash,
            say.interval(q.agreement, say.percent) if q.agreement else dash,
        )

    columns = ["text", "windows", "dense", "pruned", "ratio", "divergence", "agreement"]
    if plain is not None:
        columns.insert(5, "unrepaired")
    before = plain.domains if plain is not None else {}
    rows = [row(name, q, before.get(name)) for name, q in e.domains.items()]
    if len(rows) != 1:
        rows.append(row(say("quality.all"), e, plain))
    intro = say(
        "texts.intro" if m.heldout else "texts.other",
        windows=e.windows,
        length=e.length,
        tokens=say.number(e.tokens, 0),
        source=", ".join(m.record.evaluation_text.texts) if m.record.evaluation_text else "",
    )
    return [
        Text(text=intro),
        *with_and_without(m),
        Table(
            caption=say("texts.caption"),
            columns=tuple(say(f"texts.{c}") for c in columns),
            rows=tuple(rows),
        ),
        *by_gap(m),
    ]


def _tasks(m: Material) -> list[Item]:
    say = m.say
    if not m.record.tasks:
        return [Missing(text=m.missing("tasks"))]

    def row(t: TaskResult) -> tuple[str, ...]:
        f, dash = t.flips, "–"
        return (
            t.name,
            t.metric,
            say.number(t.items, 0),
            say.percent(t.chance) if t.chance is not None else dash,
            say.interval(t.dense, say.percent),
            say.interval(t.pruned, say.percent) if t.pruned else dash,
            say.interval(f.difference, say.points) if f else dash,
            say("tasks.counts", lost=f.lost, won=f.won) if f else dash,
            say.p_value(f.p_value) if f else dash,
            say(f"reading.{'noise' if f.within_noise else 'clear'}") if f else dash,
        )

    columns = (
        *("task", "metric", "items", "chance", "dense", "pruned"),
        *("difference", "lost_won", "p", "reading"),
    )
    return [
        Text(text=say("tasks.text")),
        Table(
            caption=say("tasks.caption"),
            columns=tuple(say(f"tasks.{c}") for c in columns),
            rows=tuple(map(row, m.record.tasks)),
            words=frozenset({0, 1, 9}),
        ),
    ]


def _transfer(m: Material) -> list[Item]:
    say, t = m.say, m.record.transfer
    if t is None:
        return [Missing(text=m.missing("transfer"))]
    return [
        Text(text=say("transfer.text", windows=t.windows, length=t.length)),
        _transfer_table(m, t),
        _overlap_table(m, t),
        Text(text=say("transfer.recommended", source=_source(m, t.recommended))),
        *plain_only(m),
    ]


def _source(m: Material, name: str) -> str:
    return m.say.plain("transfer.mix") if name == "mix" else name


def _transfer_table(m: Material, t: Transfer) -> Table:
    say = m.say

    def row(plan: Chosen) -> tuple[str, ...]:
        cells = (
            say("transfer.away", increase=say.interval(found, say.nats))
            if domain in plan.away
            else say.interval(found, say.nats)
            for domain, found in zip(t.domains, plan.increase, strict=True)
        )
        return (_source(m, plan.source), say.join(map(str, plan.removed)), *cells)

    return Table(
        caption=say("transfer.caption"),
        columns=(
            say("transfer.chosen_on"),
            say("transfer.blocks"),
            *(
                say("transfer.on", domain=d, windows=n)
                for d, n in zip(t.domains, t.heldout, strict=True)
            ),
        ),
        rows=tuple(map(row, t.plans)),
        words=frozenset({0, 1}),
        note=say("transfer.note"),
    )


def _overlap_table(m: Material, t: Transfer) -> Table:
    names = tuple(_source(m, plan.source) for plan in t.plans)
    return Table(
        caption=m.say("transfer.overlap"),
        columns=(m.say("transfer.chosen_on"), *names),
        rows=tuple(
            (name, *(m.say.percent(share) for share in row))
            for name, row in zip(names, t.overlap, strict=True)
        ),
    )
