"""From a run's record and plan to a page: page one for who decides, then a section per subject.

It is made from run.json and plan.json alone, so a figure that was not recorded cannot be in it.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf
from pathlib import Path

from sleb.acceptance import LIMITS, ungated
from sleb.calibration.answers import DEFAULT
from sleb.core.errors import InputError
from sleb.core.files import record_path, writable_target, write_text
from sleb.core.plan import Plan
from sleb.evaluation.tasks import TaskResult
from sleb.record import GateRow, RunRecord
from sleb.runtimes.bench import Ratio
from sleb.surgery.gguf_cut import plan_beside
from sleb.views import proof, quality, selection, speed
from sleb.views.compare import comparison
from sleb.views.html import render
from sleb.views.locale import Locale, names
from sleb.views.model import Facts, Item, Listing, Missing, Page, Panel, Table, Text, Verdict

GLANCE = {
    *("answers.min_agreement", "answers.min_right", "perplexity.max_ratio", "speed.min_speedup"),
    *("memory.max_mb", "size.max_mb"),
}
"""Limits whose figures are on page one also where the gate does not set them."""
LINE = "answers.min_right = 0.9"
"""Of a gate file."""
OF_WHOLE_BLOCKS = ("draft", "runtimes")
"""What is measured of results that have whole blocks alone."""


def write_report(runs: Sequence[Path], out: Path, lang: str = "en", force: bool = False) -> Path:
    """Write the report of the folder in ``runs``, or of several folders side by side, to ``out``;
    give ``out`` back.

    ``lang`` is en or ja. The same records give the same bytes.

    Raises:
        InputError: no such language, ``out`` exists and ``force`` is not given, a run is given
            twice, or run.json and plan.json of one cannot be used.
        ResourceError: the disk is full.
    """
    writable_target(out, force=force, folder=False)
    t = Locale(lang, markup=True)
    called = names(map(str, runs))
    if len(called) < len(runs):
        raise InputError("a run is given twice; a comparison needs different ones")
    found: list[Report] = []
    digests: dict[str, str] = {}
    for run in runs:
        record, plan = RunRecord.load(run), Plan.load(plan_path(run))
        named = Path(called[str(run)])
        sums = {
            place(named): hashlib.sha256(place(run).read_bytes()).hexdigest()
            for place in (record_path, plan_path)
        }
        short = {path.name: digest for path, digest in sums.items()}
        found.append(Report(record=record, plan=plan, t=t, digests=short))
        digests |= {path.as_posix(): digest for path, digest in sums.items()}
    if len(found) == 1:
        page = found[0].page
    else:
        each = zip(called.values(), found, strict=True)
        page = comparison(t, [(name, one.record, one.plan) for name, one in each], digests)
    write_text(out, render(page))
    return out


def plan_path(run: Path) -> Path:
    """Where the plan of a result is: in a checkpoint's folder, or beside a GGUF file."""
    return plan_beside(run) if run.suffix == ".gguf" else run / "plan.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run's record and plan, SHA-256 of their files by name, and the language to say it in.

    Raises:
        InputError: record and plan are not of the same run.
    """

    record: RunRecord
    plan: Plan
    t: Locale
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        of_record = (self.record.blocks, tuple(sorted(self.record.removed)))
        if of_record != (self.plan.model.blocks, self.plan.removed):
            raise InputError(
                f"run.json removes blocks {list(self.record.removed)} of {self.record.blocks}, but "
                f"plan.json beside it {list(self.plan.removed)} of {self.plan.model.blocks}: they "
                "are not of the same run"
            )

    @property
    def page(self) -> Page:
        """The whole page, in the order in which it is read."""
        t, r = self.t, self.record
        return Page(
            lang=t.lang,
            title=t.plain("page.title", model=self._model),
            subtitle=t(
                "page.subtitle",
                k=len(r.removed) - len(r.parts),
                n=r.blocks,
                started=t.moment(r.started),
                model=self._model,
            ),
            verdict=self._verdict(),
            summary=self._panels(
                "sum-{}",
                "summary.{}",
                {
                    "worst": lambda: quality.worst_pair(t, r.answers, r.prompts),
                    "removed": self._removed,
                    "quality": self._quality,
                    "servers": lambda: speed.servers(t, r.speed, self._ratios),
                    "untested": self._untested,
                    "rollback": self._rollback,
                },
            ),
            contents=t("page.contents"),
            sections=self._sections(),
            glossary_title=t("page.glossary"),
            glossary=tuple((key, *entry) for key, entry in t.tables["glossary"].items()),
            colophon=t("page.colophon"),
        )

    def _panels(
        self, name: str, title: str, parts: dict[str, Callable[[], list[Item]]]
    ) -> tuple[Panel, ...]:
        """Of those parts that have something to say."""
        return tuple(
            Panel(
                name=name.format(key),
                title=self.t(title.format(key)),
                items=tuple(items),
                wide=key == "worst",
            )
            for key, make in parts.items()
            if (items := make())
        )

    # -- what several parts need ------------------------------------------------------------------

    @property
    def _model(self) -> str:
        """What the original is called."""
        return Path(self.record.model).name or self.record.model

    @property
    def _out(self) -> str:
        return self.record.verification.checkpoint

    @property
    def _gguf(self) -> bool:
        """Whether the result is a GGUF file."""
        return self._out.endswith(".gguf")

    @property
    def _plan(self) -> str:
        return str(plan_path(Path(self._out)))

    def _command(self, key: str) -> str:
        """A command of this run, ready to be typed; ``key`` is in the table ``commands``."""
        words = {"model": self.record.model, "out": self._out, "plan": self._plan}
        quoted = {name: shlex.quote(word) for name, word in words.items()}
        quoted["other"] = "OTHER.gguf" if self._gguf else "OTHER"
        quoted["plain"] = " --no-repair" if self.plan.repair else ""
        return self.t.code(self.t.plain(f"commands.{key}", **quoted))

    def _fill(self, command: str) -> str:
        """A command with this run's model and folder in the places of MODEL and OUT."""
        known = {"MODEL": self.record.model, "OUT": self._out, "OUT/plan.json": self._plan}
        words = (shlex.quote(known[word]) if word in known else word for word in command.split())
        return self.t.code(" ".join(words))

    def _unmeasured(self, key: str, text: str = "missing.text") -> str:
        """That something was not measured, and the command that measures it."""
        if key == "kept" and self.record.unasked and not self.record.prompts:
            return self.t.said("unasked", self.record.unasked)
        if self.record.parts and (key in OF_WHOLE_BLOCKS or (key == "speed" and self._gguf)):
            return self.t("missing.parts", what=self.t(f"unmeasured.{key}"))
        return self.t(text, what=self.t(f"unmeasured.{key}"), command=self._command(key))

    def _missing(self, key: str) -> list[Item]:
        return [Missing(self._unmeasured(key))]

    @property
    def _unasked(self) -> tuple[str, ...]:
        """What of answers to the user's own prompts was not measured; both models' own texts are
        not compared where one is a file."""
        r = self.record
        if r.answers:
            return ()
        if r.prompts is None or r.prompts.source.split(", ") == [DEFAULT]:
            return ("kept",)
        return () if self._gguf else ("compared",)

    @property
    def _own_limits(self) -> dict[str, str]:
        """How limits are set: a line of their file, and the command that reads it."""
        return {"line": self.t.code(LINE), "command": self._command("gate")}

    @property
    def _paired(self) -> list[TaskResult]:
        return [task for task in self.record.tasks or () if task.pruned is not None]

    @property
    def _repaired(self) -> int:
        """How many matrices around the gaps are not the original's."""
        return quality.changed(self.plan.repair.gaps) if self.plan.repair else 0

    @property
    def _plain_only(self) -> list[Item]:
        """That the figures above are of cuts without repair, where this one has one."""
        return [Text(self.t("repair.without"))] if self._repaired else []

    @property
    def _heldout(self) -> bool:
        seen = self.record.evaluation_text
        return seen is not None and seen.source == "held-out"

    @property
    def _ratios(self) -> tuple[Ratio, ...]:
        return speed.ratios(self.record.speed, self._out)

    # -- page one --------------------------------------------------------------------------------

    def _verdict(self) -> Verdict:
        """Whether the gate's limits are kept, and every figure that matters as a bar: against its
        limit, or, where there is none, as it is."""
        t, gate, checks = self.t, self.record.gate, self.record.verification.checks
        failed = sum(not check.passed for check in checks)
        counts = proof.counted(gate.rows if gate else ())
        if failed:
            tone, key, counts = "bad", "inexact", {"failed": failed, "total": len(checks)}
        elif gate is None:
            tone, key = "none", "none"
        elif gate.passed:
            tone, key = "good", "passed"
        else:
            tone, key = ("bad", "failed") if counts["not_kept"] else ("unclear", "unclear")
        sentence = "failed" if key == "unclear" else key
        text = t(f"verdict.{sentence}_text", **self._own_limits, **counts)
        if key == "none":  # then nothing else on this page says so
            for item in quality.warning(t, self.record.prompts):
                text += " " + item.text
        return Verdict(tone=tone, headline=t(f"verdict.{key}"), text=text, table=self._glance())

    def _glance(self) -> Table:
        r, out = self.record, Path(self._out)
        others = (row for row in ungated(r, GLANCE) if not row.path or Path(row.path) == out)
        rows = sorted((*(r.gate.rows if r.gate else ()), *others), key=_place)
        shown = [row for _, same in groupby(rows, lambda row: row.name) for row in _worst(same)]
        note = self.t("gate.legend")
        if len(shown) < len(rows):
            note += self.t("gate.more", count=len(rows) - len(shown))
        return proof.gate_table(
            self.t, shown, speed=r.speed, fill=self._fill, note=note, file_nbytes=r.file_nbytes
        )

    def _removed(self) -> list[Item]:
        t, r, repair = self.t, self.record, self.plan.repair
        passed = sum(check.passed for check in r.verification.checks)
        gone = len(r.removed) - len(r.parts)

        def change(pair: tuple[int, int], shown: Iterable[str]) -> str:
            (before, after), (first, then) = pair, shown
            share = t.change((after - before) / before if before else 0.0)
            return t("removed.change", before=first, after=then, share=share)

        repaired = t("repair.none")
        if repair and self._repaired:
            done = sum(gap.ridge is not None for gap in repair.gaps)
            repaired = t("repair.done", count=self._repaired, done=done, gaps=len(repair.gaps))
        trained = {}
        if h := r.healed:
            told = t("healed.done", count=t.large(h.trained_parameters), tokens=t.large(h.tokens))
            trained["healed.name"] = told
        rows = {
            "removed.blocks": t("removed.of", k=gone, n=r.blocks, share=t.percent(gone / r.blocks)),
            "removed.which": t.join(r.removed),
            "repair.name": repaired,
            **trained,
            "removed.parameters": change(r.parameters, map(t.large, r.parameters)),
            "removed.size": change(
                (r.file_nbytes or r.nbytes[0], r.nbytes[1]), proof.on_disk(t, r)
            ),
            "removed.exact": t("removed.checks", passed=passed, total=len(r.verification.checks)),
        }
        return [Facts(tuple((t(key), value) for key, value in rows.items()))]

    def _quality(self) -> list[Item]:
        t = self.t
        kept, tasks = self.record.prompts, self._paired
        return [
            *(quality.answers_kept(t, kept) if kept else []),
            *([quality.worst_tasks(t, tasks)] if tasks else []),
        ]

    def _untested(self) -> list[Item]:
        """The one place of page one that names what was not measured."""
        r = self.record
        lacking = [
            *([] if r.evaluation and r.evaluation.perplexity_ratio else ["evaluation"]),
            *self._unasked,
            *([] if self._paired else ["tasks"]),
            *(name for name in ("speed", "transfer") if not getattr(r, name)),
        ]
        lines = [self._unmeasured(key, "untested.text") for key in lacking]
        lines += [speed.skipped(self.t, what) for what in (r.speed.skipped if r.speed else ())]
        return [Listing((*lines, self.t("untested.other")))]

    def _rollback(self) -> list[Item]:
        t, depth, kept = self.t, len(self.plan.order), self.record.kept
        lines = [t("rollback.unchanged", model=self._model)]
        if kept:
            key = "restore" if self.record.file_nbytes is None else "restore_folder"
            lines.append(t(f"rollback.{key}", command=self._command("restore")))
        if depth > 1:
            loaded = self.record.parts and not self._gguf  # no folder is written without parts
            command = self._command("restore_part" if kept else "apply")
            if loaded:
                paths = f"{self.record.model!r}, plan={self._plan!r}"
                command = t.code(f"sleb.load({paths}, depth=D)")
            lines.append(t("rollback.shallower", most=depth - 1, command=command))
            lines += [t("rollback.unrepaired")] if self._repaired and not loaded else []
        return [Listing(tuple(lines))]

    # -- the sections ----------------------------------------------------------------------------

    def _sections(self) -> tuple[Panel, ...]:
        t, r, plan, healed = self.t, self.record, self.plan, self.record.healed

        def shown(key: str, value: object, items: Callable[[], list[Item]]) -> list[Item]:
            return items() if value else self._missing(key)

        def alike() -> list[Item]:
            figure = selection.similarity(t, r.similarity)
            return [figure] if figure else self._missing("similarity")

        return self._panels(
            "{}",
            "{}.title",
            {
                "map": lambda: [selection.block_map(t, plan)],
                "why": lambda: selection.reasons(t, plan, r.similarity),
                "rounds": lambda: [selection.candidates(t, plan)],
                "similarity": alike,
                "curve": self._curve,
                **({"healed": lambda: [quality.healing(t, healed)]} if healed else {}),
                "texts": self._texts,
                "tasks": lambda: shown("tasks", r.tasks, lambda: quality.tasks(t, r.tasks or ())),
                "answers": lambda: [
                    *(quality.answers(t, r.answers) if r.answers else ()),
                    *(item for key in self._unasked for item in self._missing(key)),
                    *quality.examples(t, r.prompts),
                ],
                "speed": lambda: speed.speed(t, r.speed) if r.speed else self._missing("speed"),
                "draft": lambda: speed.drafting(t, r.draft) if r.draft else self._missing("draft"),
                "transfer": lambda: (
                    [*quality.transfer(t, r.transfer), *self._plain_only]
                    if r.transfer
                    else self._missing("transfer")
                ),
                "exact": lambda: proof.verification(t, r.verification, self._repaired),
                "runtimes": lambda: (
                    speed.runtimes(t, r.runtimes) if r.runtimes else self._missing("runtimes")
                ),
                "gate": self._gate,
                "provenance": lambda: [*proof.provenance(t, r, plan, self.digests)],
            },
        )

    def _curve(self) -> list[Item]:
        c = self.plan.curve
        if c is None or not c.points:
            return self._missing("curve")
        e, heldout = self.record.evaluation, c.heldout
        same = self._heldout and e and (e.windows, e.length) == (heldout.windows, heldout.length)
        this = e.loss_increase if same and e else None
        changed = "healed" if self.record.healed else "repaired" if self._repaired else ""
        # a plan of `sleb search` has the sizes of the file, of which a folder was made
        given = self.record.file_nbytes is not None
        chosen = len(self.plan.order)
        gguf = given and any(
            p.nbytes < self.record.nbytes[1] for p in c.points if p.depth == chosen
        )
        items = selection.curve(self.t, c, chosen, this, changed, gguf=gguf)
        about = [] if c.fitted is not None else self._plain_only
        if about and this:
            about = [Text(self.t("curve.without"))]
        return [*items, *selection.target(self.t, self.plan), *about]

    def _texts(self) -> list[Item]:
        t, e, repair = self.t, self.record.evaluation, self.plan.repair
        gaps: list[Item] = [quality.by_gap(t, repair)] if repair else []
        if e is None:
            return [*self._missing("evaluation"), *gaps]
        seen = self.record.evaluation_text
        source = (seen.note or t.join(names(seen.texts).values())) if seen else ""
        intro = t(
            "texts.intro" if self._heldout else "texts.other",
            windows=e.windows,
            length=e.length,
            tokens=t.count(e.tokens),
            source=source,
        )
        items: list[Item] = [Text(intro)]
        if seen and seen.shared:
            items.append(Text(t("texts.shared", count=seen.shared)))
        plain = e.unrepaired.perplexity_ratio if e.unrepaired else None
        if plain and e.perplexity_ratio:
            both = {"repaired": e.perplexity_ratio, "plain": plain}
            shown = {key: t.interval(ratio, t.ratio) for key, ratio in both.items()}
            items.append(Text(t("repair.ratios", **shown)))
        return [*items, quality.by_text(t, e), *gaps]

    def _gate(self) -> list[Item]:
        t, gate = self.t, self.record.gate
        if gate is None:
            return [Missing(t("verdict.none_text", **self._own_limits))]
        note = t("gate.note")
        table = proof.gate_table(
            t,
            gate.rows,
            speed=self.record.speed,
            fill=self._fill,
            note=note,
            file_nbytes=self.record.file_nbytes,
        )
        return [Text(t("gate.text")), table]


def _place(row: GateRow) -> int:
    """Where a row stands: quality, time, memory, as in a gate file."""
    return [limit.key for limit in LIMITS].index(row.name)


def _worst(rows: Iterable[GateRow]) -> list[GateRow]:
    """The rows of one limit that page one has room for: those that keep it least, as they were."""
    found = [*rows]
    order = {"not-kept": 0, "unclear": 1}

    def badness(row: GateRow) -> tuple[int, float]:
        worst = inf if row.worst is None else row.worst if row.at_most else -row.worst
        return order.get(row.verdict, 2), -worst

    kept = sorted(found, key=badness)[: quality.ROWS]
    return [row for row in found if row in kept]
