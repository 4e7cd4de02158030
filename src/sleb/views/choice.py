"""Which blocks were removed and why: the map, the candidates, similarity, and loss by depth."""

from __future__ import annotations

from math import exp, isfinite, nan

from markupsafe import Markup

from sleb.core.plan import Plan, Point, Round, Score
from sleb.views.context import Material
from sleb.views.page import (
    Block,
    BlockMap,
    Figure,
    Heat,
    Item,
    Line,
    Listing,
    Missing,
    Panel,
    Table,
    Text,
)
from sleb.views.repair import plain_only

__all__ = ["choice"]

FLOOR = 1e-4  # colours of smaller differences (nats/token) are not told apart


def choice(m: Material) -> list[Panel]:
    """The sections about the choice of blocks."""
    parts: dict[str, list[Item]] = {
        "map": [_map(m)],
        "why": _reasons(m),
        "rounds": _rounds(m),
        "similarity": _similarity(m),
        "curve": _curve(m),
    }
    return [
        Panel(name=name, title=m.say(f"{name}.title"), items=tuple(items))
        for name, items in parts.items()
    ]


def _map(m: Material) -> BlockMap:
    say, plan = m.say, m.plan
    turns = {block: i for i, block in enumerate(plan.order, 1)}

    def cell(b: int) -> Block:
        state = "removed" if b in turns else "protected" if b in plan.protected else "kept"
        label = say.plain(f"map.{state}_label", block=str(b), turn=str(turns.get(b, "")))
        return Block(number=b, state=state, label=label, turn=turns.get(b))

    blocks = tuple(cell(b) for b in range(plan.model.blocks))
    present = [s for s in ("kept", "removed", "protected") if any(b.state == s for b in blocks)]
    return BlockMap(blocks=blocks, legend=tuple((s, say(f"map.{s}")) for s in present))


def _reasons(m: Material) -> list[Item]:
    say, plan = m.say, m.plan
    if plan.of_runs:
        listed = Listing(lines=(_score(m, plan.order[0]),))
    else:
        listed = Listing(lines=tuple(_why(m, block) for block in plan.order), numbered=True)
    if not any(r.scores for r in plan.rounds):
        return [listed]
    known = plan.metric in say.tables["metrics"]
    meaning = say(f"metrics.{plan.metric}") if known else plan.metric
    about = say("why.score", meaning=meaning, unit=plan.unit)
    ordered = {s.block for s in plan.rounds[0].scores} == set(plan.order)
    if ordered and plan.strategy.split(",")[0] == "refine":
        return [Text(text=about), Text(text=say("why.refined")), listed]
    return [Text(text=about), *_finals(m), listed]


def _finals(m: Material) -> list[Text]:
    """What other set was there in the end, and why it was not taken."""
    say, finals = m.say, m.plan.finals
    if finals is None:
        return []
    best, other = finals.sets[:2]
    noise = other.excess_se is None or other.excess < 2 * other.excess_se
    return [
        Text(
            text=say(
                "why.finals",
                best=say.named("strategies", best.strategy),
                other=say.named("strategies", other.strategy),
                blocks=say.join(other.order),
                increase=say.nats(best.increase),
                instead=say.nats(other.increase),
                windows=finals.windows,
                own=finals.own,
                difference=say("why.finals_noise" if noise else "why.finals_clear"),
            )
        )
    ]


def _why(m: Material, block: int) -> Markup:
    """In plain sentences, why one block was removed."""
    said = _score(m, block)
    alike = m.record.similarity
    if alike is not None and block + 1 < len(alike):
        said += m.say("why.alike", cosine=m.say.number(alike[block][block + 1], 3))
    return said


def _score(m: Material, block: int) -> Markup:
    say, plan = m.say, m.plan
    at = _round(plan, block)
    found = plan.rounds[at] if at is not None else None
    own = next((s for s in found.scores if s.block == block), None) if found else None
    if at is None or found is None or own is None:
        return say("why.unscored", block=block)
    ranked = sorted(found.scores, key=lambda s: s.mean)
    said = say(
        "why.window" if plan.of_runs else "why.scored",
        block=block,
        last=block + len(plan.order) - 1,
        round=at + 1,
        rank=ranked.index(own) + 1,
        candidates=len(ranked),
        score=say.nats(own.mean),
    )
    if plan.baseline is not None:
        said += say("why.above", above=say.signed(own.mean - plan.baseline.mean, 4))
    return said + _rivalry(m, found, block)


def _round(plan: Plan, block: int) -> int | None:
    """The round that removed ``block``, from 0."""
    return next((i for i, r in enumerate(plan.rounds) if block in r.removed), None)


def _rivalry(m: Material, found: Round, block: int) -> Markup:
    """How close the best candidate that stayed was; said of a round's last removal."""
    rival = found.runner_up()
    last = max((s for s in found.scores if s.block in found.removed), key=lambda s: s.mean)
    if rival is None or last.block != block:
        return Markup()
    score, margin, noise = rival
    if margin >= 0:
        key = "noise" if noise else "clear"
    else:  # only an estimate can be better than what a round chose by itself
        key = "estimated" if _raced_out(score, last.windows or 0) else "overruled"
    if m.plan.of_runs:
        return m.say(f"why.run_{key}", rival=score.block, margin=m.say.nats(abs(margin)))
    said = m.say(f"why.{key}", rival=score.block, margin=m.say.nats(abs(margin)))
    later = _round(m.plan, score.block)
    return said if later is None else said + m.say("why.later", rival=score.block, round=later + 1)


def _rounds(m: Material) -> list[Item]:
    say, plan = m.say, m.plan
    scored = [r for r in plan.rounds if r.scores]
    if not scored:
        return [Missing(text=say("rounds.none"))]
    values, crosses, dots = [], [], []
    for i, r in enumerate(scored):
        best = min(s.mean for s in r.scores)
        longest = max((s.windows or 0) for s in r.scores)
        row = [nan] * plan.model.blocks
        for s in r.scores:
            row[s.block] = max(s.mean - best, FLOOR)
            if _raced_out(s, longest):
                dots.append((i, s.block))
        values.append(tuple(row))
        crosses += [(i, b) for b in r.removed if isfinite(row[b])]
    notes = say("rounds.window") if plan.of_runs else Markup()
    if dots:
        notes += say("rounds.raced", count=len(dots))
    chart = Heat(
        rows=tuple(str(i) for i in range(1, len(scored) + 1)),
        columns=tuple(map(str, range(plan.model.blocks))),
        values=tuple(values),
        row_label=say.plain("rounds.row"),
        column_label=say.plain("rounds.column"),
        unit=say.plain("rounds.unit", unit=plan.unit),
        crosses=tuple(crosses),
        dots=tuple(dots),
        log=True,
    )
    noisy = sum(bool(r.within_noise) for r in scored)
    return [
        Figure(
            name="rounds",
            title=say("rounds.chart"),
            text=say("rounds.text") + notes + say("rounds.noise", noisy=noisy, rounds=len(scored)),
            alt=say.plain("rounds.alt", rounds=str(len(scored)), blocks=str(plan.model.blocks)),
            chart=chart,
            wide=True,
        )
    ]


def _raced_out(score: Score, longest: int) -> bool:
    return score.windows is not None and score.windows < longest


def _similarity(m: Material) -> list[Item]:
    say, alike = m.say, m.record.similarity
    if not alike:
        return [Missing(text=m.missing("similarity"))]
    steps = {i: alike[i][i + 1] for i in range(len(alike) - 1) if isfinite(alike[i][i + 1])}
    if not steps:
        return [Missing(text=m.missing("similarity"))]
    names = (say.plain("similarity.embedding"), *map(str, range(len(alike) - 1)))
    low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    words = {
        "most": str(high),
        "most_value": say.number(steps[high], 3),
        "least": str(low),
        "least_value": say.number(steps[low], 3),
    }
    return [
        Figure(
            name="similarity",
            title=say("similarity.chart"),
            text=say("similarity.text", **words),
            alt=say.plain("similarity.alt", **words),
            chart=Heat(
                rows=names,
                columns=names,
                values=tuple(tuple(v if isfinite(v) else nan for v in row) for row in alike),
                row_label=say.plain("similarity.axis"),
                column_label=say.plain("similarity.axis"),
                unit=say.plain("similarity.unit"),
                square=True,
            ),
        )
    ]


def _curve(m: Material) -> list[Item]:
    say, curve = m.say, m.plan.curve
    if curve is None or not curve.points:
        return [Missing(text=m.missing("curve"))]
    points, chosen = curve.points, len(m.plan.order)
    figure = Figure(
        name="curve",
        title=say("curve.chart"),
        text=say(
            "curve.text",
            windows=curve.heldout.windows,
            length=curve.heldout.length,
            loss=say.nats(curve.baseline.mean),
        ),
        alt=say.plain(
            "curve.alt",
            first=say.nats(points[0].increase),
            last=say.nats(points[-1].increase),
            depth=str(points[-1].depth),
        ),
        chart=Line(
            x=tuple(p.depth for p in points),
            y=tuple(p.increase for p in points),
            low=tuple(p.low for p in points),
            high=tuple(p.high for p in points),
            chosen=chosen,
            chosen_label=say.plain("curve.chosen"),
            x_label=say.plain("curve.x"),
            y_label=say.plain("curve.y"),
        ),
    )
    about = plain_only(m)
    if curve.fitted is not None:
        about = [Text(text=say("curve.quick", tokens=say.number(curve.fitted, 0)))]
    return [figure, _depths(m, points, chosen), *_target(m), *about]


def _depths(m: Material, points: tuple[Point, ...], chosen: int) -> Table:
    say = m.say

    def row(p: Point) -> tuple[str, ...]:
        increase = say.nats(p.increase)
        if p.low is not None and p.high is not None:
            increase = say.raw("format.interval").format(
                value=increase, low=say.nats(p.low), high=say.nats(p.high)
            )
        return (
            say("curve.this", depth=p.depth) if p.depth == chosen else str(p.depth),
            str(p.block),
            increase,
            "–" if p.bound is None else say.nats(p.bound),
            say.ratio(exp(p.increase)),
            say.size(p.nbytes),
            say.times(p.speedup),
        )

    columns = ("depth", "block", "increase", "bound", "ratio", "size", "speedup")
    return Table(
        caption=say("curve.caption"),
        columns=tuple(say(f"curve.{c}") for c in columns),
        rows=tuple(map(row, points)),
        note=say("curve.note"),
    )


def _target(m: Material) -> list[Item]:
    say, t = m.say, m.plan.target
    if t is None:
        return []
    show = {"remove": lambda x: say.number(x, 0), "size": say.size, "speedup": say.times}.get(
        t.kind, say.nats
    )
    return [
        Text(
            text=say(
                f"curve.target_{t.kind.replace('-', '_')}",
                limit=show(t.limit),
                reached=show(t.reached),
            )
        )
    ]
