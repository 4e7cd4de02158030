"""The repair of the cut: what was re-fitted, on which text, and what it gained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from sleb.views.context import Material
from sleb.views.page import Item, Table, Text

if TYPE_CHECKING:
    from sleb.core.plan import RepairedGap

__all__ = ["by_gap", "changed", "in_short", "plain_only", "with_and_without"]


def changed(m: Material, gap: RepairedGap | None = None) -> int:
    """How many matrices are not the original's, in all or around one gap. A matrix and the bias
    beside it count once."""
    found = (gap,) if gap else m.plan.repair.gaps if m.plan.repair else ()
    return len({tensor.name.rpartition(".")[0] for g in found for tensor in g.tensors})


def in_short(m: Material) -> Markup:
    """What was repaired, as a fact."""
    repair = m.plan.repair
    if repair is None or not m.repaired:
        return m.say("repair.none")
    done = sum(gap.ridge is not None for gap in repair.gaps)
    return m.say("repair.done", count=changed(m), done=done, gaps=len(repair.gaps))


def with_and_without(m: Material) -> list[Item]:
    """The ratio of perplexities with and without the repair, where both were measured."""
    say, e = m.say, m.record.evaluation
    plain = e.unrepaired.perplexity_ratio if e and e.unrepaired else None
    if e is None or plain is None or e.perplexity_ratio is None:
        return []
    ratios = {
        "repaired": say.interval(e.perplexity_ratio, say.ratio),
        "plain": say.interval(plain, say.ratio),
    }
    return [Text(text=say("repair.ratios", **ratios))]


def plain_only(m: Material) -> list[Item]:
    """That the figures above are of cuts without repair, where this one has one."""
    return [Text(text=m.say("repair.without"))] if m.repaired else []


def by_gap(m: Material) -> list[Item]:
    """A row per gap, with the loss on the windows that judged its fit, by text."""
    say, repair = m.say, m.plan.repair
    if repair is None:
        return []
    texts = list(dict.fromkeys(name for gap in repair.gaps for name in gap.before))

    def loss(gap: RepairedGap, text: str) -> str:
        if text not in gap.before or text not in gap.after:
            return "–"
        before, after = say.nats(gap.before[text]), say.nats(gap.after[text])
        return say("repair.change", before=before, after=after)

    rows = tuple(
        (
            say.join(map(str, gap.removed)),
            say.number(changed(m, gap), 0),
            say("repair.refused") if gap.ridge is None else f"{gap.ridge:g}",
            *(loss(gap, text) for text in texts),
        )
        for gap in repair.gaps
    )
    return [
        Table(
            caption=say("repair.caption"),
            columns=(*(say(f"repair.{c}") for c in ("gap", "matrices", "ridge")), *texts),
            rows=rows,
            note=say("repair.note", windows=repair.heldout.windows, length=repair.heldout.length),
        )
    ]
