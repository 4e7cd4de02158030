"""Proof and provenance: verification, the gate's limits, and where every figure comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sleb.core.plan import Calibration, Plan
from sleb.record import COMMANDS, GateRow, RunRecord
from sleb.runtimes.bench import Speed
from sleb.surgery.gates import Check
from sleb.surgery.verification import Verification
from sleb.views.locale import Locale
from sleb.views.model import Facts, Item, Table, Text
from sleb.views.speed import case

Columns = dict[str, Callable[[Any], str]]


def verification(t: Locale, v: Verification, repaired: int = 0) -> list[Item]:
    """A line per check; on a page also what they show of a cut with ``repaired`` matrices."""

    def name(check: Check) -> str:
        return t.named("checks", check.key)

    def measured(check: Check) -> str:
        return t.said("found", check.found, check.key)

    def limit(check: Check) -> str:
        return t.said("must", check.found, check.key)

    if not t.markup:
        rows = tuple(
            (
                "pass" if c.passed else "FAIL",
                name(c),
                measured(c) if c.passed else f"{measured(c)}; must be {limit(c)}",
            )
            for c in v.checks
        )
        bad = frozenset(i for i, c in enumerate(v.checks) if not c.passed)
        heads = ("", "gate", "measured")
        return [Table(columns=heads, rows=rows, words=frozenset(range(3)), bad=bad)]
    columns: Columns = {
        "check": name,
        "result": lambda c: t("exact.passed" if c.passed else "exact.failed"),
        "measured": measured,
        "limit": limit,
    }
    words = ["result", "measured", "limit"]
    note = t("exact.note_repaired") if repaired else ""
    table = t.table("exact", columns, v.checks, words=words, bad=lambda c: not c.passed, note=note)
    return [Text(t("exact.repaired" if repaired else "exact.text", count=repaired)), table]


def gate(t: Locale, rows: Sequence[GateRow]) -> list[Item]:
    """Every limit on a terminal, and then why figures are missing."""
    lacking: dict[str, list[str]] = {}
    for row in rows:
        if row.missing:
            command = COMMANDS.get(row.name.partition(".")[0], "")
            why = _missing(t, row, command)
            lacking.setdefault(why, []).append(_limit_name(t, row, None))
    kept = sum(row.passed for row in rows)
    items: list[Item] = [gate_table(t, rows, short=True)]
    items += [Text(f"{'; '.join(names)}: {why}") for why, names in lacking.items()]
    verdict = f"gate: {kept} of {len(rows)} limits kept"
    return [*items, Text(f"{verdict}; of a 95 % interval the worse end counts")]


def gate_table(
    t: Locale,
    rows: Sequence[GateRow],
    *,
    speed: Speed | None = None,
    fill: Callable[[str], str] = str,
    told: bool = True,
    short: bool = False,
) -> Table:
    """Limits, what was measured, and, if ``told``, whether it is kept. ``speed`` has the cases,
    ``fill`` puts names into a command. ``short``: nothing of commands and notes."""

    def measured(row: GateRow) -> str:
        if row.measured is not None:
            return t.figure(row.measured, row.unit)
        if short:
            return "-"
        command = COMMANDS.get(row.name.partition(".")[0], "")
        return _missing(t, row, fill(command) if command else "")

    def allowed(row: GateRow) -> str:
        bound = "gate.at_most" if row.at_most else "gate.at_least"
        return t(bound, value=t.figure(row.limit, row.unit))

    columns: Columns = {
        "limit_of": lambda row: _limit_name(t, row, speed),
        "measured": measured,
        "limit": allowed,
    }
    if told:
        columns["kept"] = lambda row: t("gate.yes" if row.passed else "gate.no")
    plain = short or all(row.measured is not None for row in rows)  # else there are commands
    words = [*columns][3:] if plain else [*columns][1:]
    note = "" if short else t("gate.note")
    return t.table("gate", columns, rows, words=words, bad=lambda row: not row.passed, note=note)


def _limit_name(t: Locale, row: GateRow, speed: Speed | None) -> str:
    rest = case(t, speed, row.of) if row.name.startswith("speed.") else row.of
    if not row.of and row.name == "perplexity.max_ratio":
        rest = t.plain("limits.all")
    if row.path:
        of = f"{rest}, {row.path}" if rest else row.path
        rest = t.plain("saved.under", case=of, runtime=row.runtime) if row.runtime else of
    first = t.named("limits", row.name)
    return t.plain("format.part", head=first, rest=rest) if rest else first


def _missing(t: Locale, row: GateRow, command: str) -> str:
    reason = t(f"reasons.{row.missing or 'not-measured'}", name=row.of)
    if row.near:
        reason += t("reasons.near", name=row.near)
    return t("gate.missing", reason=reason, command=command) if command else reason


def provenance(
    t: Locale, record: RunRecord, plan: Plan, digests: Mapping[str, str]
) -> tuple[Item, ...]:
    """Command, versions, texts, identity of the model, machine, timings and hashes."""

    def facts(rows: Mapping[str, str]) -> Facts:
        return Facts(tuple((t(f"provenance.{key}"), value) for key, value in rows.items()))

    run = {
        "command": t.code(record.command),
        "started": t.moment(record.started),
        "model": t.code(record.model),
        "checkpoint": t.code(record.verification.checkpoint),
    }
    files = [
        (t("provenance.sha256", name=name), t.code(digest)) for name, digest in digests.items()
    ]
    model = {
        "architecture": f"{plan.model.architecture} ({plan.model.model_type})",
        "blocks": str(plan.model.blocks),
        "weights_sha256": t.code(plan.model.weights_sha256),
        "config_sha256": t.code(plan.model.config_sha256),
    }
    items: list[Item] = [Facts((*facts(run).rows, *files)), facts(_search(t, plan))]
    heldout, repair = plan.curve.heldout if plan.curve else None, plan.repair
    for key, found in (
        ("scored", plan.calibration),
        ("heldout", heldout),
        ("fitted", repair.calibration if repair else None),
        ("judged", repair.heldout if repair else None),
    ):
        if found is not None:
            items.append(_texts(t, key, found))
    if record.answers is not None:
        items.append(facts({"prompts": t.code(record.answers.sha256)}))
    machine = ((t.named("environment", k), str(v)) for k, v in record.environment.items())
    items += [facts(model), Facts((*plan.versions.items(), *machine))]
    return (*items, _timings(t, record.seconds))


def _search(t: Locale, p: Plan) -> dict[str, str]:
    rows = {
        "metric": t("provenance.metric_unit", metric=p.metric, unit=p.unit),
        "strategy": p.strategy_label,
        "dtype": p.dtype,
        "order": t.join(p.order),
        "protected": t.join(p.protected) or "–",
    }
    if p.baseline is not None:
        rows["baseline"] = f"{t.nats(p.baseline.mean)} {p.unit}"
    if p.similarity is not None:
        limit, blocks = t.number(p.similarity.threshold, 4), len(p.similarity.candidates)
        rows["similarity"] = t("provenance.threshold", limit=limit, candidates=blocks)
    return rows


def _texts(t: Locale, key: str, found: Calibration) -> Table:
    columns: Columns = {
        "text_spec": lambda s: s.spec,
        "text_sha256": lambda s: t.code(s.sha256),
        "text_documents": lambda s: t.count(s.documents),
        "text_tokens": lambda s: t.count(s.tokens),
        "text_windows": lambda s: t.count(s.windows),
    }
    of = {"windows": found.windows, "length": found.length, "seed": found.seed}
    return t.table(
        "provenance",
        columns,
        found.sources,
        words=["text_sha256"],
        caption=t(f"provenance.{key}"),
        note=t("provenance.windows_of", **of, sha256=t.code(found.sha256)),
    )


def _timings(t: Locale, seconds: Mapping[str, float]) -> Table:
    rows = [*seconds.items(), (t("provenance.total"), sum(seconds.values()))]
    columns: Columns = {"stage": lambda row: row[0], "seconds": lambda row: t.seconds(row[1])}
    return t.table("provenance", columns, rows, caption=t("provenance.timings"))
