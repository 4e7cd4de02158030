"""The gate: the verdict on top of the report, and every limit with what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from markupsafe import Markup

from sleb.record import COMMANDS, GateRow
from sleb.views.context import Material
from sleb.views.locale import code
from sleb.views.page import Table, Verdict

__all__ = ["gate_table", "verdict"]


def verdict(m: Material) -> Verdict:
    """Whether the gate's limits are kept, with the rows that are not."""
    say, gate, checks = m.say, m.record.gate, m.record.verification.checks
    broken = [check for check in checks if not check.passed]
    rows = [row for row in gate.rows if not row.passed] if gate else []
    if broken:
        tone, key = "bad", "inexact"
        text = say("verdict.inexact_text", failed=len(broken), total=len(checks))
    elif gate is None:
        tone, key = "none", "none"
        text = say("verdict.none_text", command=m.command("gate"))
    else:
        tone, key = ("good", "passed") if gate.passed else ("bad", "failed")
        text = say(f"verdict.{key}_text", failed=len(rows), total=len(gate.rows))
    table = gate_table(m, rows, told=False) if rows else None
    return Verdict(tone=tone, headline=say(f"verdict.{key}"), text=text, table=table)


def gate_table(m: Material, rows: Sequence[GateRow], told: bool = True) -> Table:
    """Limits, what was measured, and, if ``told``, whether it is kept."""
    say = m.say

    def name(row: GateRow) -> str:
        rest = m.case(row.of) if row.name.startswith("speed.") else row.of
        if not row.of and row.name == "perplexity.max_ratio":
            rest = say.plain("limits.all")
        first = say.named("limits", row.name)
        if row.path:
            rest = say.plain("saved.under", case=rest or row.path, runtime=row.runtime)
        return say.plain("format.part", head=first, rest=rest) if rest else first

    def measured(row: GateRow) -> str:
        if row.measured is not None:
            return say.measured(row.measured, row.unit)
        reason = say(f"reasons.{row.missing or 'not-measured'}", name=row.of)
        command = COMMANDS.get(row.name.partition(".")[0], "")
        return (
            say("gate.missing", reason=reason, command=_filled(m, command)) if command else reason
        )

    def cells(row: GateRow) -> tuple[str, ...]:
        bound = "gate.at_most" if row.at_most else "gate.at_least"
        allowed = say(bound, value=say.measured(row.limit, row.unit))
        kept = say("gate.yes" if row.passed else "gate.no")
        return (name(row), measured(row), allowed, kept)[:columns]

    columns = 4 if told else 3
    plain = all(row.measured is not None for row in rows)  # a command is not aligned as a figure is
    return Table(
        caption=say("gate.caption"),
        columns=tuple(say(f"gate.{c}") for c in ("limit_of", "measured", "limit", "kept"))[
            :columns
        ],
        rows=tuple(map(cells, rows)),
        words=frozenset({0, 3} if plain else range(4)),
        bad=frozenset(i for i, row in enumerate(rows) if not row.passed),
        note=say("gate.note"),
    )


def _filled(m: Material, command: str) -> Markup:
    """A command with this run's model and folder in the places of MODEL and OUT."""
    out = m.record.verification.checkpoint
    known = {"MODEL": m.record.model, "OUT": out, "OUT/plan.json": f"{out}/plan.json"}
    words = (shlex.quote(known[word]) if word in known else word for word in command.split())
    return code(" ".join(words))
