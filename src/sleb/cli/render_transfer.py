"""`sleb transfer` and the gate, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sleb.cli.render import _blocks, _table

if TYPE_CHECKING:
    from sleb.core.statistics import Interval
    from sleb.record import GateResult
    from sleb.evaluation.transfer import Chosen, Transfer

__all__ = ["gate", "transfer"]


def transfer(console: Console, t: Transfer) -> None:
    """`sleb transfer`: what each choice of blocks costs on each text, and which one to use."""
    costs = _table(
        "blocks chosen on", *t.domains, title="increase of loss on held-out text, nats/token"
    )
    for plan in t.plans:
        cells = [
            _cost(cost) + (" *" if name in plan.away else "  ")
            for name, cost in zip(t.domains, plan.increase, strict=True)
        ]
        costs.add_row(plan.source, *cells)
    console.print(costs)
    held = ", ".join(f"{n} of {name}" for name, n in zip(t.domains, t.heldout, strict=True))
    console.print(
        f"± 95 % interval, paired; chosen on {t.windows} windows of {t.length} tokens each, "
        f"measured on {held}"
    )
    console.print()
    names = [plan.source for plan in t.plans]
    shared = _table("blocks chosen on", *names, "blocks", title="blocks in common (Jaccard)")
    shared.columns[-1].justify = "left"
    for plan, row in zip(t.plans, t.overlap, strict=True):
        shared.add_row(plan.source, *(f"{share:.0%}" for share in row), _blocks(plan.removed))
    console.print(shared)
    console.print()
    for plan in t.plans:
        if plan.away:
            console.print(f"* {_warning(t, plan)}")
    best = next(plan for plan in t.plans if plan.source == t.recommended)
    console.print(f"recommended: the blocks chosen on {best.source}: {_blocks(best.removed)}")


def _cost(cost: Interval) -> str:
    if cost.high is None:
        return f"{cost.value:.4f}"
    return f"{cost.value:.4f} ± {cost.high - cost.value:.4f}"


def _warning(t: Transfer, plan: Chosen) -> str:
    home = {chosen.source: chosen for chosen in t.plans}
    worse = []
    for i, name in enumerate(t.domains):
        if name in plan.away:
            own, other = home[name].increase[i].value, plan.increase[i].value
            worse.append(f"{name} ({other:.4f}, against {own:.4f} with the blocks chosen there)")
    return f"blocks chosen on {plan.source} cost clearly more on {', '.join(worse)}"


def gate(console: Console, g: GateResult) -> None:
    """A gate: a line per limit, then why figures are missing."""
    table = _table("limit", "measured", "allowed", "")
    table.columns[0].overflow = "fold"
    for row in g.rows:
        mark = Text("passed", "green") if row.passed else Text("FAILED", "red")
        name = ", ".join(filter(None, (row.name, row.of, row.path, row.runtime)))
        measured = "-" if row.measured is None else f"{row.measured:,.5g} {row.unit}"
        allowed = f"at {'most' if row.at_most else 'least'} {row.limit:,.5g} {row.unit}"
        table.add_row(name, measured, allowed, mark)
    console.print(table)
    for row in g.rows:
        if row.missing:
            console.print(f"{row.name}: {row.missing.replace('-', ' ')}")
    kept = sum(row.passed for row in g.rows)
    console.print(
        f"gate: {kept} of {len(g.rows)} limits kept; of a 95 % interval the worse end counts"
    )
