"""Proof and provenance: verification, the gate's limits, and where every figure comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from sleb.core.plan import ANSWERS_TO, Calibration, Plan
from sleb.core.statistics import MOST, about
from sleb.record import GateRow, RunRecord
from sleb.runtimes.bench import Speed
from sleb.surgery.gates import Check
from sleb.surgery.verification import Verification
from sleb.views.locale import DASH, Locale, names
from sleb.views.model import Facts, Item, Meter, Table, Text
from sleb.views.speed import case, pruned_in_memory

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
        heads = ("", "check", "measured")
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


def gate(t: Locale, rows: Sequence[GateRow], speed: Speed | None = None) -> list[Item]:
    """Every limit on a terminal, and then what would tell of those that cannot be told; ``speed``
    has the cases."""
    lacking: dict[str, list[str]] = {}
    called = names(row.path for row in rows if row.path)
    for row in rows:
        if why := _open(t, row, row.measured_by):
            lacking.setdefault(why, []).append(_limit_name(t, row, speed, called))
    items: list[Item] = [gate_table(t, rows, speed=speed, short=True)]
    items += [Text(f"{'; '.join(names)}: {why}") for why, names in lacking.items()]
    counts = counted(rows)
    key = "passed" if counts["kept"] == len(rows) else "failed"
    return [*items, Text(t(f"verdict.{key}_text", **counts))]


def counted(rows: Sequence[GateRow]) -> dict[str, int]:
    """How many limits there are, and how many have which verdict."""
    verdicts = [row.verdict for row in rows]
    names = ("kept", "not-kept", "unclear")
    found = {name.replace("-", "_"): verdicts.count(name) for name in names}  # type: ignore[arg-type]
    return {"total": len(rows), **found}


def gate_table(
    t: Locale,
    rows: Sequence[GateRow],
    *,
    speed: Speed | None = None,
    fill: Callable[[str], str] = str,
    short: bool = False,
    note: str = "",
    file_nbytes: int | None = None,
) -> Table:
    """What was measured, its worst case, the limit, and whether it is kept. ``speed`` has the
    cases, ``fill`` puts names into a command. ``short``: nothing of what would tell.
    ``file_nbytes``: of the GGUF file that was given, beside whose size that of a folder stands."""
    if file_nbytes is not None:
        given = file_nbytes / 1e6
        rows = [replace(r, dense=given) if r.name == "size.max_mb" else r for r in rows]

    def measured(row: GateRow) -> str:
        if row.measured is None:
            return DASH
        shown = t.figure(row.measured, row.unit)
        if row.unit == "MB" and row.dense is not None:
            return t("gate.of", value=shown, dense=t.figure(row.dense, row.unit))
        return shown

    def named(row: GateRow) -> str:
        name = _limit_name(t, row, speed, called)
        if row.name != "size.max_mb" or file_nbytes is None or row.measured is None:
            return name
        key = "larger" if row.measured > file_nbytes / 1e6 else "not_larger"
        return t(f"gate.{key}", name=name, size=t.size(file_nbytes))

    def allowed(row: GateRow) -> str:
        bound = "gate.at_most" if row.at_most else "gate.at_least"
        return "" if row.limit is None else t(bound, value=t.figure(row.limit, row.unit))

    def verdict(row: GateRow) -> str:
        if not row.verdict:
            return ""
        said = t(f"gate.{row.verdict.replace('-', '_')}")
        command = row.measured_by and fill(row.measured_by)
        why = "" if short else _open(t, row, command)
        return t("gate.open", verdict=said, why=why) if why else said

    called = names(row.path for row in rows if row.path)
    columns: Columns = {
        "limit_of": named,
        "measured": measured,
        "worst": lambda row: DASH if row.worst is None else t.figure(row.worst, row.unit),
        "limit": allowed,
        "verdict": verdict,
    }
    table = t.table("gate", columns, rows, words=["verdict"], bad=lambda r: r.verdict == "not-kept")
    meters = tuple(map(_meter, rows)) if t.markup else ()
    return replace(table, note=note, meters=meters, stacked=True)


def _meter(row: GateRow) -> Meter | None:
    """A row as a bar. Shares are of 1, a ratio of perplexities begins where nothing is lost, and
    what has a dense figure has room for it."""
    if row.measured is None or row.worst is None:
        return None
    marks = [row.measured, row.worst, row.limit, row.dense]
    known = [x for x in marks if x is not None]
    first = 1.0 if row.unit == "x" and row.at_most else 0.0
    width = 1.0 if row.unit == "%" else 1.04 * (max(known) - first)
    if not (all(map(isfinite, known)) and width > 0):
        return None
    value, worst, limit, dense = (
        None if x is None else min(1.0, max(0.0, (x - first) / width)) for x in marks
    )
    assert value is not None
    assert worst is not None
    return Meter(value=value, worst=worst, limit=limit, dense=dense, tone=row.verdict)


def _limit_name(t: Locale, row: GateRow, speed: Speed | None, called: Mapping[str, str]) -> str:
    model, runtime = called.get(row.path, ""), row.runtime
    if speed and row.name == "memory.max_mb":
        runtime = pruned_in_memory(t, speed, row.path, row.runtime) or runtime
    if model and runtime:
        model = t.plain("saved.under", case=model, runtime=runtime)
    model = model or runtime
    return limit_name(t, row.name, row.of, speed, model)


def limit_name(t: Locale, key: str, of: str, speed: Speed | None, model: str = "") -> str:
    """A limit, and the text, task, case or model that it is held against."""
    rest = case(t, speed, of) if key.startswith("speed.") else of
    if not of and key == "perplexity.max_ratio":
        rest = t.plain("limits.all")
    rest = f"{rest}, {model}" if rest and model else rest or model
    first = t.named("limits", key)
    return t.plain("format.part", head=first, rest=rest) if rest else first


def _open(t: Locale, row: GateRow, command: str) -> str:
    """What would tell whether a limit is kept, where that cannot be told; else nothing."""
    if row.verdict != "unclear":
        return ""
    if row.needed is not None:
        return needed(t, row.needed, row.counted)
    if not row.missing:
        return t("gate.never")
    reason = t(f"reasons.{row.missing}", name=row.of, judged=row.judged)
    if row.near:
        reason += t("reasons.near", name=row.near)
    return t("gate.missing", reason=reason, command=command) if command else reason


def needed(t: Locale, count: int, kind: str) -> str:
    """How many measurements would tell, or that nobody makes so many; ``kind``: see
    :data:`sleb.record.COUNTED`."""
    if count > MOST:
        return t("gate.beyond")
    return t("gate.needed", count=t(f"counted.{kind}", count=t.count(about(count))))


def on_disk(t: Locale, r: RunRecord) -> tuple[str, str]:
    """Sizes of what was given and of the result; a GGUF file is no folder of 16-bit weights."""
    if r.file_nbytes is None:
        return t.size(r.nbytes[0]), t.size(r.nbytes[1])
    return (
        t("removed.as_file", size=t.size(r.file_nbytes)),
        t("removed.in_16_bits", size=t.size(r.nbytes[1])),
    )


def provenance(
    t: Locale, record: RunRecord, plan: Plan, digests: Mapping[str, str]
) -> tuple[Item, ...]:
    """Command, versions, texts, identity of the model, machine, timings and hashes."""

    def facts(rows: Mapping[str, str]) -> Facts:
        return Facts(tuple((t(f"provenance.{key}"), value) for key, value in rows.items()))

    run = {
        "command": t.code(record.command),
        "started": t.moment(record.started),
        "model": t.code(_name(record.model)),
        "checkpoint": t.code(_name(record.verification.checkpoint)),
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
    if record.prompts is not None:
        finals, fitted = plan.final_comparison, record.repair.answers if record.repair else 0
        compared = finals.answers if finals else _answers(plan.calibration)
        by_role = {
            "compared": compared,
            "fitted": max(0, fitted - compared),  # a fit has those that chose the blocks too
            "judged": _answers(repair.heldout if repair else None),
            "measured": record.prompts.prompts,
        }
        items.append(facts({"asked": t("provenance.roles", **by_role)}))
    machine = ((t.named("environment", k), str(v)) for k, v in record.environment.items())
    items += [facts(model), Facts((*plan.versions.items(), *machine))]
    return (*items, _timings(t, record.seconds))


def _name(model: str) -> str:
    """A folder or file by its name; what is no absolute path, such as a hub id, as it is."""
    path = Path(model)
    return path.name if path.is_absolute() else model


def _answers(found: Calibration | None) -> int:
    """How many of the windows are answers to prompts."""
    sources = found.sources if found else ()
    return sum(s.windows for s in sources if s.spec.startswith(ANSWERS_TO))


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
        "text_spec": lambda s: t.called(s.spec),
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
    columns: Columns = {
        "stage": lambda row: t.called(row[0]),
        "seconds": lambda row: t.seconds(row[1]),
    }
    return t.table("provenance", columns, rows, caption=t("provenance.timings"))
