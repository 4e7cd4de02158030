"""The gate: the verdict on top of the report, and every limit with what was measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from sleb.views.context import Material
from sleb.views.locale import code
from sleb.views.page import Table, Verdict

if TYPE_CHECKING:
    from sleb.evaluation.gate import GateRow

__all__ = ["gate_table", "verdict"]

UNKNOWN = re.compile(r"the record has no '(.+?)'(?:;|$)")


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
        head, _, rest = row.name.partition(", ")
        if head == "speed-up":
            case, comma, model = rest.partition(", ")
            rest = m.case(case) + comma + model
        elif head == "answers" or rest == "all texts":
            rest = say.named("limits", rest)
        first = say.named("limits", head)
        return say.plain("format.part", head=first, rest=rest) if rest else first

    def measured(row: GateRow) -> str:
        if row.measured is not None:
            return say.measured(row.measured, row.unit)
        reason, _, command = row.missing.partition("; run: ")
        unknown = UNKNOWN.match(reason)
        if unknown:
            reason = say.plain("gate.unknown", name=unknown[1])
        reason = say.named("reasons", reason or "not measured")
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
