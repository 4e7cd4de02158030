"""Page one: what a manager needs to decide, each figure with its uncertainty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from sleb.core.statistics import Interval
from sleb.views.context import Material
from sleb.views.locale import bounds
from sleb.views.page import Facts, Item, Listing, Missing, Panel, Table, Text
from sleb.views.repair import in_short

if TYPE_CHECKING:
    from sleb.evaluation.tasks import TaskResult
    from sleb.runtimes.bench import Ratio

__all__ = ["SERVERS", "servers", "summary"]

SERVERS = 10  # the example's load, as a number of servers that it now keeps busy
ROWS = 5  # rows of a table that page one has room for


def summary(m: Material) -> tuple[Panel, ...]:
    """The panels of page one, in the order in which they are read."""
    parts: dict[str, list[Item]] = {
        "removed": _removed(m),
        "quality": _quality(m),
        "saved": _saved(m),
        "servers": servers(m),
        "untested": [_untested(m)],
        "rollback": [_rollback(m)],
    }
    return tuple(
        Panel(name=f"sum-{name}", title=m.say(f"summary.{name}"), items=tuple(items))
        for name, items in parts.items()
    )


def _removed(m: Material) -> list[Item]:
    say, r = m.say, m.record
    passed = sum(check.passed for check in r.verification.checks)

    def change(before: float, after: float, shown: tuple[str, str]) -> Markup:
        return say(
            "removed.change",
            before=shown[0],
            after=shown[1],
            share=say.percent((after - before) / before if before else 0.0),
        )

    rows = (
        (
            say("removed.blocks"),
            say(
                "removed.of",
                k=len(r.removed),
                n=r.blocks,
                share=say.percent(len(r.removed) / r.blocks),
            ),
        ),
        (say("removed.which"), say.join(map(str, r.removed))),
        (say("repair.name"), in_short(m)),
        (
            say("removed.parameters"),
            change(*r.parameters, (say.large(r.parameters[0]), say.large(r.parameters[1]))),
        ),
        (
            say("removed.size"),
            change(*r.nbytes, (say.size(r.nbytes[0]), say.size(r.nbytes[1]))),
        ),
        (
            say("removed.exact"),
            say("removed.checks", passed=passed, total=len(r.verification.checks)),
        ),
    )
    return [Facts(rows=rows)]


def _quality(m: Material) -> list[Item]:
    items: list[Item] = []
    e = m.record.evaluation
    if e is None or e.perplexity_ratio is None:
        items.append(Missing(text=m.missing("evaluation")))
    else:
        items.append(_texts(m, {m.say("quality.all"): e.perplexity_ratio}))
        named = {name: q.perplexity_ratio for name, q in e.domains.items() if q.perplexity_ratio}
        if len(named) > 1:
            items[-1] = _texts(m, {**named, m.say("quality.all"): e.perplexity_ratio})
    tasks = [t for t in m.record.tasks or () if t.pruned is not None]
    items.append(_tasks(m, tasks) if tasks else Missing(text=m.missing("tasks")))
    return items


def _texts(m: Material, ratios: dict[str, Interval]) -> Table:
    say = m.say
    shown = list(ratios.items())
    if len(shown) > ROWS:  # the worst texts, and all together
        *texts, together = shown
        shown = [*sorted(texts, key=lambda t: -t[1].value)[: ROWS - 1], together]
    left_out = len(ratios) - len(shown)
    return Table(
        caption=say("quality.caption" if m.heldout else "quality.caption_other"),
        columns=(say("quality.text"), say("quality.ratio"), say("quality.reading")),
        rows=tuple(
            (name, say.interval(ratio, say.ratio), m.reading(ratio, 1.0, "low"))
            for name, ratio in shown
        ),
        words=frozenset({0, 2}),
        note=say("quality.more", count=left_out) if left_out else "",
    )


def _tasks(m: Material, tasks: list[TaskResult]) -> Table:
    say = m.say

    def row(t: TaskResult) -> tuple[str, ...]:
        assert t.pruned is not None
        scores = say(
            "tasks.from_to", dense=say.percent(t.dense.value), pruned=say.percent(t.pruned.value)
        )
        if t.flips is None:
            return (t.name, scores, "", say.plain("reading.unpaired"))
        f = t.flips
        result = say.plain(
            "reading.noise"
            if f.within_noise
            else "reading.worse"
            if f.lost > f.won
            else "reading.better"
        )
        flips = say("tasks.flips", lost=f.lost, won=f.won, items=f.items)
        return (t.name, scores, flips, result)

    worst = sorted(tasks, key=lambda t: t.flips.difference.value if t.flips else 0.0)[:ROWS]
    left_out = len(tasks) - len(worst)
    return Table(
        caption=say("tasks.short_caption"),
        columns=tuple(say(f"tasks.{c}") for c in ("task", "score", "flipped", "reading")),
        rows=tuple(row(t) for t in worst),
        words=frozenset({0, 3}),
        note=say("quality.more", count=left_out) if left_out else "",
    )


def _saved(m: Material) -> list[Item]:
    say, ratios = m.say, m.ratios
    if not ratios:
        return [Missing(text=m.missing("speed"))]
    rows = [
        (
            _label(m, r),
            say.interval(r.ratio, say.times),
            m.reading(r.ratio, 1.0, "high"),
        )
        for r in ratios[:ROWS]
    ]
    items: list[Item] = [
        Table(
            caption=say("saved.caption"),
            columns=(say("saved.case"), say("saved.ratio"), say("saved.reading")),
            rows=tuple(rows),
            words=frozenset({0, 2}),
            note=say("saved.more", count=len(ratios) - ROWS) if len(ratios) > ROWS else "",
        )
    ]
    dense, pruned = m.measured(ratios[0].runtime), m.measured(ratios[0].runtime, ratios[0].path)
    if dense and pruned and dense.peak_bytes:
        items.append(
            Text(
                text=say(
                    "saved.memory",
                    before=say.size(dense.peak_bytes),
                    after=say.size(pruned.peak_bytes),
                    share=say.percent(pruned.peak_bytes / dense.peak_bytes - 1),
                    runtime=ratios[0].runtime,
                )
            )
        )
    return items


def _label(m: Material, ratio: Ratio) -> str:
    speed = m.record.speed
    several = speed is not None and len({r.runtime for r in speed.ratios}) > 1
    name = m.case(ratio.case)
    return m.say.plain("saved.under", case=name, runtime=ratio.runtime) if several else name


def servers(m: Material) -> list[Item]:
    """What the measured ratio of one case means for a load that keeps SERVERS servers busy.

    The case is the one that generates most tokens at once, which is how servers work.
    """
    say, speed = m.say, m.record.speed
    sizes = (
        {c.name: (c.new_tokens > 1, c.batch, c.new_tokens) for c in speed.cases} if speed else {}
    )
    known = [r for r in m.ratios if r.case in sizes and r.ratio.value > 0]
    if not known:
        return [Missing(text=say("servers.none"))]
    chosen = max(known, key=lambda r: sizes[r.case])
    dense = m.measured(chosen.runtime)
    run = next((x for x in dense.runs if x.case == chosen.case), None) if dense else None
    if run is None:
        return [Missing(text=say("servers.none"))]

    def needed(ratio: float) -> str:
        return say.number(SERVERS / ratio, 1)

    found = chosen.ratio  # the larger the ratio, the fewer servers: bounds change places
    ends = bounds(found)
    if ends is not None and ends[0] <= 0:
        ends = None
    text = say(
        "servers.interval" if ends else "servers.value",
        load=say.number(SERVERS * run.tokens_per_second, 0),
        each=say.number(run.tokens_per_second, 1),
        now=SERVERS,
        then=needed(found.value),
        **({"low": needed(ends[1]), "high": needed(ends[0])} if ends else {}),
    )
    noise = ends is not None and ends[0] <= 1 <= ends[1]
    lines = [text] + ([say("servers.noise")] if noise else [])
    assert speed is not None
    assumption = say(
        "servers.assumption", case=m.case(chosen.case), runtime=chosen.runtime, device=speed.device
    )
    return [*(Text(text=line) for line in lines), Text(text=assumption)]


def _untested(m: Material) -> Listing:
    r, say = m.record, m.say
    sections = {
        "evaluation": r.evaluation,
        "tasks": r.tasks,
        "answers": r.answers,
        "speed": r.speed,
        "transfer": r.transfer,
    }
    lines = [m.missing(name) for name, found in sections.items() if not found]
    lines += [say("untested.skipped", what=what) for what in (r.speed.skipped if r.speed else ())]
    return Listing(lines=(*lines, say("untested.other")))


def _rollback(m: Material) -> Listing:
    say, depth = m.say, len(m.plan.order)
    lines = [say("rollback.unchanged", model=m.record.model)]
    if depth > 1:
        lines.append(say("rollback.shallower", most=depth - 1, command=m.command("apply")))
        lines += [say("rollback.unrepaired")] if m.repaired else []
    return Listing(lines=tuple(lines))
