"""Which blocks were removed and why: the map, the candidates, similarity, and loss by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, isfinite, nan
from typing import Any

from sleb.core.plan import Curve, FinalComparison, Finalist, Plan, Point, Round, Score
from sleb.core.statistics import Interval
from sleb.core.units import UnitId, block_of, parts_in
from sleb.views.locale import DASH, Locale
from sleb.views.model import (
    Block,
    BlockMap,
    Figure,
    Heat,
    Item,
    Line,
    Listing,
    Missing,
    Table,
    Text,
)

Similarity = tuple[tuple[float, ...], ...]


def plan_table(t: Locale, p: Plan) -> list[Item]:
    """The removals in order, with the margin to the best candidate that stayed."""
    more = len(p.order) - 1 if p.of_runs else 0

    def named(block: int) -> str:
        return f"blocks {block} to {block + more}" if more else f"block {block}"

    rows = []
    for r in p.rounds:
        rival = r.runner_up()
        for block in r.removed:
            own = next(s for s in r.scores if s.block == block)
            margin, noise = "-", ""
            if rival is not None and block == r.removed[-1]:
                margin = f"{t.nats(rival[1])} ({named(rival[0].block)})"
                noise = "within noise" if rival[2] else ""
            error = "-" if own.se is None else t.nats(own.se)
            rows.append((named(block), t.nats(own.mean), error, margin, noise))
    heads = ("removed", p.metric, "± se", "margin to the next", "")
    dense = f"; dense {t.nats(p.baseline.mean)}" if p.baseline else ""
    stay = p.model.blocks - len(p.removed) + len(p.parts)
    removed = f"removed {called(t, p.removed)}; {stay} of {p.model.blocks} blocks stay"
    items: list[Item] = [
        Table(columns=heads, rows=tuple(rows)),
        Text(f"{p.metric} in {p.unit}{dense}; {removed}"),
    ]
    if p.final_comparison:
        items.append(Text(_compared(t, p.final_comparison)))
    if c := p.calibration:
        items.append(Text(f"measured on {c.windows} windows of {c.length} tokens, {p.dtype}"))
    return items


def called(t: Locale, units: Sequence[UnitId]) -> str:
    """Blocks, or parts of them, by number: so that the number of one is not read as a count."""
    noun = "" if parts_in(units) else "block " if len(units) == 1 else "blocks "
    return noun + t.join(units)


def _compared(t: Locale, f: FinalComparison) -> str:
    best, other = f.sets[:2]
    if best.by_kind:

        def costs(one: Finalist) -> str:
            on = " and ".join(f"{t.nats(loss)} on {kind}" for kind, loss in one.by_kind.items())
            return f"{one.strategy} {t.join(one.order)} costs {on}"

        return f"after a quick repair {costs(best)}, {costs(other)} (nats/token)"
    doubt = "" if other.excess_se is None else f" ± {t.nats(other.excess_se)}"
    own = f", {f.self_generated} of them the model's own text" if f.self_generated else ""
    return (
        f"after a quick repair {best.strategy} {t.join(best.order)} costs {t.nats(best.increase)} "
        f"nats/token, {other.strategy} {t.join(other.order)} costs {t.nats(other.increase)} "
        f"({t.nats(other.excess)}{doubt} more), on {f.windows} windows{own}"
    )


def block_map(t: Locale, plan: Plan) -> BlockMap:
    """All blocks, and what became of them; those of a run have no order."""
    removed = "removed_together" if plan.of_runs else "removed"
    turns = {block_of(unit): i for i, unit in enumerate(plan.order, 1)}

    def cell(b: int) -> Block:
        state = "removed" if b in turns else "protected" if b in plan.protected else "kept"
        unit = str(plan.order[turns[b] - 1]) if b in turns else b
        key = removed if b in turns else state
        label = t.plain(f"map.{key}_label", block=unit, turn=turns.get(b, ""))
        turn = None if plan.of_runs else turns.get(b)
        return Block(number=b, state=state, label=label, turn=turn)

    blocks = tuple(cell(b) for b in range(plan.model.blocks))
    present = [s for s in ("kept", "removed", "protected") if any(b.state == s for b in blocks)]
    words = {"removed": removed}
    return BlockMap(blocks=blocks, legend=tuple((s, t(f"map.{words.get(s, s)}")) for s in present))


def reasons(t: Locale, plan: Plan, alike: Similarity | None) -> list[Item]:
    """In plain sentences, why each block was removed."""

    def why(block: int) -> str:
        said = _score(t, plan, block)
        if alike is not None and block + 1 < len(alike):
            said += t("why.alike", cosine=t.number(alike[block][block + 1], 3))
        return said

    if plan.of_runs:
        listed = Listing((_score(t, plan, plan.order[0]),))
    else:
        listed = Listing(tuple(map(why, plan.order)), numbered=True)
    if not any(r.scores for r in plan.rounds):
        return [listed]
    known = plan.metric in t.tables["metrics"]
    meaning = t(f"metrics.{plan.metric}") if known else plan.metric
    items: list[Item] = [Text(t("why.score", meaning=meaning, unit=plan.unit))]
    ordered = {s.block for s in plan.rounds[0].scores} == set(plan.order)
    if ordered and plan.strategy == "refine":
        items.append(Text(t("why.refined")))
    elif plan.final_comparison:
        items.append(Text(_finals(t, plan.final_comparison)))
    return [*items, listed]


def _finals(t: Locale, finals: FinalComparison) -> str:
    """What other set was there in the end, and why it was not taken."""
    best, other = finals.sets[:2]
    if best.by_kind:
        return t(
            "why.finals_answers",
            sets=len(finals.sets),
            best=t.named("strategies", best.strategy),
            other=t.named("strategies", other.strategy),
            blocks=t.join(other.order),
            answers=t.nats(best.by_kind["answers"]),
            texts=t.nats(best.by_kind["texts"]),
            answers_instead=t.nats(other.by_kind["answers"]),
            texts_instead=t.nats(other.by_kind["texts"]),
        )
    noise = other.excess_se is None or other.excess < 2 * other.excess_se
    return t(
        "why.finals",
        best=t.named("strategies", best.strategy),
        other=t.named("strategies", other.strategy),
        blocks=t.join(other.order),
        increase=t.nats(best.increase),
        instead=t.nats(other.increase),
        windows=finals.windows,
        own=finals.self_generated,
        difference=t("why.finals_noise" if noise else "why.finals_clear"),
    )


def _score(t: Locale, plan: Plan, block: int) -> str:
    at = _round(plan, block)
    found = plan.rounds[at] if at is not None else None
    own = next((s for s in found.scores if s.block == block), None) if found else None
    if at is None or found is None or own is None:
        return t("why.unscored", block=block)
    ranked = sorted(found.scores, key=lambda s: s.mean)
    said = t(
        "why.window" if plan.of_runs else "why.scored",
        block=block,
        last=block + len(plan.order) - 1,
        round=at + 1,
        rank=ranked.index(own) + 1,
        candidates=len(ranked),
        score=t.nats(own.mean),
    )
    if plan.baseline is not None:
        said += t("why.above", above=t.signed(own.mean - plan.baseline.mean, 4))
    return said + _rivalry(t, plan, found, block)


def _round(plan: Plan, block: int) -> int | None:
    """The round that removed ``block``, from 0."""
    return next((i for i, r in enumerate(plan.rounds) if block in r.removed), None)


def _rivalry(t: Locale, plan: Plan, found: Round, block: int) -> str:
    """How close the best candidate that stayed was; said of a round's last removal."""
    rival = found.runner_up()
    last = max((s for s in found.scores if s.block in found.removed), key=lambda s: s.mean)
    if rival is None or last.block != block:
        return ""
    score, margin, noise = rival
    if margin >= 0:
        key = "noise" if noise else "clear"
    else:  # only an estimate can be better than what a round chose by itself
        key = "estimated" if _raced_out(score, last.windows or 0) else "overruled"
    key = f"run_{key}" if plan.of_runs else key
    said = t(f"why.{key}", rival=score.block, margin=t.nats(abs(margin)))
    later = None if plan.of_runs else _round(plan, score.block)
    return said if later is None else said + t("why.later", rival=score.block, round=later + 1)


def _raced_out(score: Score, longest: int) -> bool:
    return score.windows is not None and score.windows < longest


def candidates(t: Locale, plan: Plan) -> Item:
    """What each candidate would have cost, round by round."""
    scored = [r for r in plan.rounds if r.scores]
    if not scored:
        return Missing(t("rounds.none"))
    values, crosses, dots = [], [], []
    for i, r in enumerate(scored):
        best = min(s.mean for s in r.scores)
        longest = max((s.windows or 0) for s in r.scores)
        row = [nan] * plan.model.blocks
        for s in r.scores:
            block = block_of(s.block)  # of several units of a block the best is shown
            row[block] = min(s.mean - best, row[block])  # the first, beside nan
            if _raced_out(s, longest):
                dots.append((i, block))
        values.append(tuple(row))
        crosses += [(i, b) for b in map(block_of, r.removed) if isfinite(row[b])]
    noisy = sum(bool(r.within_noise) for r in scored)
    text = t("rounds.text")
    if plan.of_runs:
        text += t("rounds.window")
    if dots:
        text += t("rounds.raced", count=len(dots))
    return Figure(
        name="rounds",
        title=t("rounds.chart"),
        text=text + t("rounds.noise", noisy=noisy, rounds=len(scored)),
        alt=t.plain("rounds.alt", rounds=len(scored), blocks=plan.model.blocks),
        chart=Heat(
            rows=tuple(str(i) for i in range(1, len(scored) + 1)),
            columns=tuple(map(str, range(plan.model.blocks))),
            values=tuple(values),
            row_label=t.plain("rounds.row"),
            column_label=t.plain("rounds.column"),
            unit=t.plain("rounds.unit", unit=plan.unit),
            crosses=tuple(crosses),
            dots=tuple(dots),
            log=True,
        ),
        wide=True,
    )


def similarity(t: Locale, alike: Similarity | None) -> Figure | None:
    """How alike the states after blocks are; None where nothing was measured."""
    steps = {i: row[i + 1] for i, row in enumerate((alike or ())[:-1]) if isfinite(row[i + 1])}
    if not alike or not steps:
        return None
    names = (t.plain("similarity.embedding"), *map(str, range(len(alike) - 1)))
    low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    words = {
        "most": high,
        "most_value": t.number(steps[high], 3),
        "least": low,
        "least_value": t.number(steps[low], 3),
    }
    return Figure(
        name="similarity",
        title=t("similarity.chart"),
        text=t("similarity.text", **words),
        alt=t.plain("similarity.alt", **words),
        chart=Heat(
            rows=names,
            columns=names,
            values=tuple(tuple(v if isfinite(v) else nan for v in row) for row in alike),
            row_label=t.plain("similarity.axis"),
            column_label=t.plain("similarity.axis"),
            unit=t.plain("similarity.unit"),
            square=True,
        ),
    )


def curve(
    t: Locale,
    c: Curve,
    chosen: int,
    this: Interval | None = None,
    changed: str = "",
    *,
    gguf: bool = False,
) -> list[Item]:
    """Loss, size and speed by depth, of which ``chosen`` is this model's. ``this``: its own
    increase on the same windows; where it was ``changed``, repaired or healed, it is no cut of the
    curve. ``gguf``: sizes are those of a GGUF file, and the result is a folder."""
    heldout = {"windows": c.heldout.windows, "length": c.heldout.length}
    loss = t.nats(c.baseline.mean)
    ends = {"first": t.nats(c.points[0].increase), "last": t.nats(c.points[-1].increase)}
    at = next((p for p in c.points if p.depth == chosen), None)
    if at and this is None and not changed:
        this = Interval(value=at.increase, low=at.low, high=at.high)
    figure = Figure(
        name="curve",
        title=t("curve.chart"),
        text=t("curve.text", **heldout, loss=loss),
        alt=t.plain("curve.alt", **ends, depth=c.points[-1].depth),
        chart=Line(
            x=tuple(p.depth for p in c.points),
            y=tuple(p.increase for p in c.points),
            low=tuple(p.low for p in c.points),
            high=tuple(p.high for p in c.points),
            chosen=(chosen, this.value, this.low, this.high) if at and this else None,
            chosen_label=t.plain(f"curve.{changed or 'chosen'}"),
            below=bool(at and this and this.value < at.increase),
            x_label=t.plain("curve.x"),
            y_label=t.plain("curve.y"),
        ),
    )
    about: list[Item] = [figure]
    if not t.markup:
        windows = f"{heldout['windows']} held-out windows of {heldout['length']} tokens"
        about = [Text(f"on {windows}; dense {loss} nats/token")]
        if len(c.points) > chosen:
            about.append(Text("* beyond the target: not in the plan"))
    if c.fitted is not None:
        about.append(Text(t("curve.quick", tokens=t.count(c.fitted))))
    first = 1 if t.markup else 0  # the chart stands above the table
    own = None
    if at and this and changed:
        moved: dict[str, Any] = {
            "increase": this.value,
            "low": this.low,
            "high": this.high,
            "bound": None,
        }
        own = at.model_copy(update=moved)
    return [*about[:first], _depths(t, c, chosen, own, changed, gguf), *about[first:]]


def _depths(t: Locale, c: Curve, chosen: int, own: Point | None, changed: str, gguf: bool) -> Table:
    """A row per depth, and this model's ``own`` where it is not the cut of its depth."""

    def increase(p: Point) -> str:
        if p.low is None or p.high is None:
            return t.nats(p.increase)
        return t.between(t.nats(p.increase), t.nats(p.low), t.nats(p.high))

    def depth(p: Point) -> str:
        if p is own:
            return t("curve.own", depth=p.depth, model=t(f"curve.{changed}"))
        if p.depth == chosen and own is None:
            return t("curve.this", depth=p.depth)
        return f"{p.depth} *" if p.depth > chosen and not t.markup else str(p.depth)

    columns: dict[str, Callable[[Any], str]] = {
        "depth": depth,
        "block": lambda p: str(p.block),
        "increase": increase,
        "bound": lambda p: DASH if p.bound is None else t.nats(p.bound),
        "ratio": lambda p: t.ratio(exp(p.increase)),
        "file" if gguf else "size": lambda p: t.size(p.nbytes),
        "speedup": lambda p: t.times(p.speedup),
    }
    rows = [row for p in c.points for row in ((p, own) if own and p.depth == chosen else (p,))]
    return t.table("curve", columns, rows, note=t("curve.note"))


def target(t: Locale, plan: Plan) -> list[Item]:
    """What was asked for, and what was reached."""
    if plan.target is None:
        return []
    shows: dict[str, Callable[[float], str]] = {
        "remove": lambda x: t.number(x, 0),
        "size": t.size,
        "speedup": t.times,
        "keep-answers": t.percent,
    }
    show, kind = shows.get(plan.target.kind, t.nats), plan.target.kind.replace("-", "_")
    ends = {"limit": show(plan.target.limit), "reached": show(plan.target.reached)}
    return [Text(t(f"curve.target_{kind}", **ends))]
