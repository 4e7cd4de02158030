"""Proof and provenance: exactness, the gate's limits, and where every figure comes from."""

from __future__ import annotations

from markupsafe import Markup

from sleb.views.context import Material
from sleb.views.limits import gate_table
from sleb.views.locale import code
from sleb.views.page import Facts, Item, Missing, Panel, Table, Text
from sleb.views.repair import changed

__all__ = ["proof", "provenance"]


def proof(m: Material) -> list[Panel]:
    """The sections on exactness and on limits."""
    return [
        Panel(name="exact", title=m.say("exact.title"), items=tuple(_exact(m))),
        Panel(name="gate", title=m.say("gate.title"), items=tuple(_gate(m))),
    ]


def _exact(m: Material) -> list[Item]:
    say, checks = m.say, m.record.verification.checks
    notes = ("note", "note_repaired") if m.repaired else ("note",)
    return [
        Text(text=say("exact.repaired" if m.repaired else "exact.text", count=changed(m))),
        Table(
            caption=say("exact.caption"),
            columns=tuple(say(f"exact.{c}") for c in ("check", "result", "measured", "limit")),
            rows=tuple(
                (
                    say.named("checks", check.name),
                    say("exact.passed" if check.passed else "exact.failed"),
                    check.measured,
                    check.limit,
                )
                for check in checks
            ),
            words=frozenset(range(4)),
            bad=frozenset(i for i, check in enumerate(checks) if not check.passed),
            note=Markup(" ").join(say(f"exact.{n}") for n in notes if say.raw(f"exact.{n}")),
        ),
    ]


def _gate(m: Material) -> list[Item]:
    gate = m.record.gate
    if gate is None:
        return [Missing(text=m.say("verdict.none_text", command=m.command("gate")))]
    return [Text(text=m.say("gate.text")), gate_table(m, gate.rows)]


def provenance(m: Material) -> Panel:
    """Command, versions, texts, identity of the model, machine, timings and hashes."""
    items: list[Item] = [_run(m), _search(m)]
    items += _texts(m)
    items += [_identity(m), _environment(m), _timings(m)]
    return Panel(name="provenance", title=m.say("provenance.title"), items=tuple(items))


def _run(m: Material) -> Facts:
    say, r = m.say, m.record
    rows = [
        (say("provenance.command"), code(r.command)),
        (say("provenance.started"), say.moment(r.started)),
        (say("provenance.model"), code(r.model)),
        (say("provenance.checkpoint"), code(r.verification.checkpoint)),
    ]
    rows += [
        (say("provenance.sha256", name=name), code(value)) for name, value in m.digests.items()
    ]
    return Facts(rows=tuple(rows))


def _search(m: Material) -> Facts:
    say, p = m.say, m.plan
    rows = [
        (say("provenance.metric"), say("provenance.metric_unit", metric=p.metric, unit=p.unit)),
        (say("provenance.strategy"), p.strategy),
        (say("provenance.dtype"), p.dtype),
        (say("provenance.order"), say.join(map(str, p.order))),
        (say("provenance.protected"), say.join(map(str, p.protected)) or "–"),
    ]
    if p.baseline is not None:
        rows.append((say("provenance.baseline"), f"{say.nats(p.baseline.mean)} {p.unit}"))
    if p.similarity is not None:
        limit = say.number(p.similarity.threshold, 4)
        candidates = len(p.similarity.candidates)
        threshold = say("provenance.threshold", limit=limit, candidates=candidates)
        rows.append((say("provenance.similarity"), threshold))
    return Facts(rows=tuple(rows))


def _texts(m: Material) -> list[Item]:
    say = m.say
    items: list[Item] = []
    heldout = m.plan.curve.heldout if m.plan.curve else None
    repair = m.plan.repair
    for key, found in (
        ("scored", m.plan.calibration),
        ("heldout", heldout),
        ("fitted", repair.calibration if repair else None),
        ("judged", repair.heldout if repair else None),
    ):
        if found is None:
            continue
        columns = ("spec", "sha256", "documents", "tokens", "windows")
        items.append(
            Table(
                caption=say(f"provenance.{key}"),
                columns=tuple(say(f"provenance.text_{c}") for c in columns),
                rows=tuple(
                    (
                        s.spec,
                        code(s.sha256),
                        say.number(s.documents, 0),
                        say.number(s.tokens, 0),
                        say.number(s.windows, 0),
                    )
                    for s in found.sources
                ),
                words=frozenset({0, 1}),
                note=say(
                    "provenance.windows_of",
                    windows=found.windows,
                    length=found.length,
                    seed=found.seed,
                    sha256=code(found.sha256),
                ),
            )
        )
    if m.record.answers is not None:
        digest = code(m.record.answers.sha256)
        items.append(Facts(rows=((say("provenance.prompts"), digest),)))
    return items


def _identity(m: Material) -> Facts:
    say, f = m.say, m.plan.model
    return Facts(
        rows=(
            (say("provenance.architecture"), f"{f.architecture} ({f.model_type})"),
            (say("provenance.blocks"), str(f.blocks)),
            (say("provenance.weights_sha256"), code(f.weights_sha256)),
            (say("provenance.config_sha256"), code(f.config_sha256)),
        )
    )


def _environment(m: Material) -> Facts:
    say = m.say
    versions = [(name, version) for name, version in m.plan.versions.items()]
    machine = [
        (say.named("environment", name), str(value)) for name, value in m.record.environment.items()
    ]
    return Facts(rows=(*versions, *machine))


def _timings(m: Material) -> Table:
    say, seconds = m.say, m.record.seconds
    rows = [(name, say.seconds(value)) for name, value in seconds.items()]
    rows.append((say("provenance.total"), say.seconds(sum(seconds.values()))))
    return Table(
        caption=say("provenance.timings"),
        columns=(say("provenance.stage"), say("provenance.seconds")),
        rows=tuple(rows),
    )
