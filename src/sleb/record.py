"""The run record: everything that a run measured, as versioned JSON beside the checkpoint.

Reports are made from this file alone, so a figure that is not here is not claimed anywhere.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import Self

from sleb.core.errors import InputError, VerificationFailed, first_mistake
from sleb.core.files import existing_record, record_path, write_text
from sleb.core.finding import Finding, finding
from sleb.core.printable import paragraphs
from sleb.core.progress import Begins, Estimate, Progress, Tick, tell
from sleb.core.statistics import MOST, about
from sleb.core.units import UnitId, named, parts_in
from sleb.distillation.record import Healed
from sleb.evaluation.agreement import AnswersKept
from sleb.evaluation.answers import Comparison
from sleb.evaluation.perplexity import Evaluation
from sleb.evaluation.tasks import TaskResult
from sleb.evaluation.transfer import Transfer
from sleb.runtimes.bench import Speed
from sleb.runtimes.compatibility import RuntimeReport
from sleb.runtimes.speculative import Drafting
from sleb.surgery.gguf_repair import Stored
from sleb.surgery.verification import Verification

Verdict = Literal["kept", "not-kept", "unclear", ""]
MAX_BYTES = 256 * 2**20
SCHEMA = 3

COMMANDS = {
    "perplexity": "sleb eval MODEL --plan OUT/plan.json --text FILE --record OUT",
    "tasks": "sleb eval MODEL --plan OUT/plan.json --task NAME --record OUT",
    "answers": "sleb compare MODEL OUT --prompts FILE --record OUT",
    "speed": "sleb bench MODEL OUT --record OUT",
    "draft": "sleb bench MODEL OUT --draft --record OUT",
    "runtimes": "sleb verify OUT --model MODEL --runtime NAME",
}
COMMANDS |= dict.fromkeys(("divergence", "agreement"), COMMANDS["perplexity"])
COMMANDS |= {"memory": COMMANDS["speed"]}
COMMANDS |= dict.fromkeys(
    ("answers.min_agreement", "answers.min_right"),
    "sleb eval MODEL --plan OUT/plan.json --prompts FILE --record OUT",
)
"""The command that measures what a limit, or a table of limits, is about."""

COUNTED = {
    "tasks": "questions",
    "answers": "prompts",
    "draft": "prompts",
    "draft.min_speedup": "runs",
    "speed": "runs",
}
"""What figures are measured on, by limit or by table; else on windows."""

BETWEEN = "between these"
"""What a run's seconds call the time outside of all stages."""


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """What perplexity was measured on: ``windows`` of ``length`` tokens, held out of the texts that
    chose the blocks, or given for it (the ``texts``, as they were named). ``shared``: held-out
    windows with a long run of tokens that was chosen by or fitted on too. ``note``: a sentence of
    an older record from which none of this could be read."""

    windows: int
    length: int
    source: Literal["held-out", "given"]
    texts: tuple[str, ...] = ()
    shared: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RepairStatus:
    """What became of the repair: ``tensors`` re-fitted around ``gaps`` of ``gaps_total`` gaps, on
    ``tokens`` tokens, some of them ``self_generated`` text and ``answers`` to so many prompts,
    validated on other windows.
    ``why`` it was not possible. ``note``: see EvaluationText."""

    status: Literal["repaired", "not-asked", "not-possible", "no-gain"]
    why: Finding | None = None
    tensors: int = 0
    gaps: int = 0
    gaps_total: int = 0
    tokens: int = 0
    self_generated: bool = False
    answers: int = 0
    validation_windows: int = 0
    note: str = ""

    @classmethod
    def impossible(cls, error: Exception) -> Self:
        """What became of a repair that ended in ``error``."""
        return cls(status="not-possible", why=finding("error", error=str(error)))


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One limit. ``name``: its key in the gate file, as ``perplexity.max_ratio``; ``of``: the text,
    task or case that it is held against, empty for all together; ``path`` and ``runtime``: the
    model, where there are several.

    ``measured``, and ``worst``, the end of its 95 % interval that is worse for the pruned model;
    ``dense``: the dense model's, or what means no change. ``verdict``: kept by the worst case, not
    kept by the best case either, or unclear; then about ``needed`` windows, items, prompts or runs
    would tell. Where there is no figure or no interval, ``missing`` is ``not-measured``,
    ``no-interval``, ``not-paired``, ``dense-zero``, ``at-chance``, ``none-right`` (or too few, of
    ``judged`` answers of the dense model), ``no-json-prompt`` or ``unknown-name``, of which
    ``near`` is a name that the record has. ``unit``: x, %, MB, nats/token; figures in % are shares
    in 0..1. Without a ``limit`` there is no verdict; no gate has such a row."""

    name: str
    of: str = ""
    path: str = ""
    runtime: str = ""
    limit: float | None
    at_most: bool
    measured: float | None
    worst: float | None
    dense: float | None = None
    unit: str
    verdict: Verdict
    needed: int | None = None
    missing: str = ""
    near: str = ""
    judged: int | None = None

    @property
    def measured_by(self) -> str:
        """The command that would measure it; empty if every run does, or if there is nothing of the
        dense model's to keep, as no other measurement of the same would tell more."""
        if self.missing in ("dense-zero", "at-chance", "none-right"):
            return ""
        return COMMANDS.get(self.name) or COMMANDS.get(self.name.partition(".")[0], "")

    @property
    def counted(self) -> str:
        """What it is measured on; see COUNTED."""
        return COUNTED.get(self.name) or COUNTED.get(self.name.partition(".")[0], "windows")

    @property
    def title(self) -> str:
        """Its key in the gate file, and what it is held against."""
        return f"{self.name}, {self.of}" if self.of else self.name

    @property
    def told(self) -> str:
        """Its figures, written as in a terminal's tables; if it is unclear, what would tell."""
        bound = "allowed at most" if self.at_most else "allowed at least"
        known = {"measured": self.measured, "at worst": self.worst, bound: self.limit}
        figures = [f"{what} {self._shown(x)}" for what, x in known.items() if x is not None]
        said = [", ".join(figures)] if self.measured is not None else []
        return "; ".join([*said, self._next] if self.verdict == "unclear" else said)

    @property
    def _next(self) -> str:
        """What would tell."""
        if self.needed is not None:
            if self.needed > MOST:
                return "too close to the limit for measurements of this kind"
            return f"about {about(self.needed):,} {self.counted} would tell"
        why = self.missing.replace("-", " ") or "no number of measurements would tell"
        if self.missing == "none-right":
            why = f"the original had too few right of {self.judged}"
        if self.missing == "at-chance":
            why = "the original is not clearly better than guessing"
        return f"{why}; run: {self.measured_by}" if self.measured_by and self.missing else why

    def _shown(self, x: float) -> str:
        shown = {"%": f"{100 * x:,.1f} %", "MB": f"{x:,.1f} MB", "x": f"{x:,.4g}x"}
        return shown.get(self.unit) or f"{x:,.4g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Every limit of a gate with what was measured."""

    rows: tuple[GateRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return all(row.verdict == "kept" for row in self.rows)

    def of(self, verdict: Verdict) -> tuple[GateRow, ...]:
        """The rows with this verdict."""
        return tuple(row for row in self.rows if row.verdict == verdict)

    def require(self) -> None:
        """Raise VerificationFailed, naming the first limit that is not kept, or cannot be told to
        be, and how many there are."""
        if self.passed:
            return
        broken, unclear = self.of("not-kept"), self.of("unclear")
        counts = f"{len(broken)} not kept, {len(unclear)} cannot be told yet"
        others = len(broken or unclear) - 1
        more = f"; and {others} more" if others else ""
        of = f"{more} (of {len(self.rows)} limits {counts})"
        if broken:
            raise VerificationFailed(
                f"a limit is not kept: {broken[0].title}: {broken[0].told}{of}"
            )
        row = unclear[0]
        raise VerificationFailed(
            f"it cannot be told yet whether {row.title} is kept: {row.told}{of}"
        )


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One `sleb prune`: command, timings in seconds, sizes in bytes, quality, verification; and
    what was measured on its result since, each null until then.

    The plan is not repeated here; it is plan.json in the same folder. Tuples of two are (dense,
    pruned). ``evaluation_text`` is null where no text was left to measure on, ``repair`` in records
    from before there was one. ``prompts``: how much of the dense model's answers the result keeps;
    ``unasked``: why that was not measured, where prompts were given; ``answers``: both models'
    texts, from `sleb compare`. ``similarity[i][j]``: mean cosine of the dense model's states i and
    j (0 is the embedding, i + 1 the output of block i).
    ``file_nbytes``: of the GGUF file that a folder was made from, whose weights ``nbytes`` are.
    ``kept``: the folder holds what `sleb restore` needs.
    ``requantized``: of a GGUF file, the repaired tensors, which were quantized again.
    ``healed``: what a training after the cut did, of which all else here is the result.
    ``stages``: what `sleb run` has done, and a hash of what each stage depended on; ``settings``:
    what the cut did, by name.
    """

    command: str
    started: str
    model: str
    removed: tuple[UnitId, ...]
    blocks: int
    seconds: dict[str, float]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    file_nbytes: int | None = None
    kept: bool = False
    evaluation: Evaluation | None
    evaluation_text: EvaluationText | None
    verification: Verification
    environment: dict[str, Any]
    repair: RepairStatus | None = None
    similarity: tuple[tuple[float, ...], ...] | None = None
    tasks: tuple[TaskResult, ...] | None = None
    answers: Comparison | None = None
    prompts: AnswersKept | None = None
    unasked: Finding | None = None
    speed: Speed | None = None
    transfer: Transfer | None = None
    gate: GateResult | None = None
    runtimes: RuntimeReport | None = None
    draft: Drafting | None = None
    healed: Healed | None = None
    requantized: tuple[Stored, ...] = ()
    stages: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA

    def __str__(self) -> str:
        """What fits a screen."""
        gone = ", ".join(map(str, self.removed))
        return paragraphs([f"{self.model} without {gone}", *self.quality])

    @property
    def quality(self) -> list[str]:
        """What was measured of the result's quality, in lines that fit a screen."""
        lines = [str(self.evaluation)] if self.evaluation else []
        if kept := self.prompts:
            lines.append(f"{kept.agreement.value:.1%} of the tokens of answers are kept")
        return lines

    @property
    def parts(self) -> tuple[int, ...]:
        """Of what is removed, the attention or MLP of blocks that stay."""
        return parts_in(self.removed)

    def to_json(self) -> str:
        """As it is stored."""
        found = json.dumps(
            named(asdict(self)),
            indent=1,
            ensure_ascii=False,
            default=lambda m: m.model_dump(mode="json"),
        )
        return found + "\n"

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read ``folder``/run.json, or what lies beside a GGUF file.

        Raises:
            InputError: missing, too large, not JSON, another schema, or inconsistent.
        """
        path = existing_record(Path(folder))
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a run record")
        try:
            given = from_json(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} is not a run record: file: {error}") from None
        version = given.get("schema_version", 1) if isinstance(given, dict) else 1
        if isinstance(version, int) and version > SCHEMA:
            raise InputError(
                f"{path} has run schema {version}, this sleb reads {SCHEMA}: upgrade sleb"
            )
        try:
            found: Self = TypeAdapter(cls).validate_python(upgrade(given))
        except ValidationError as error:
            raise InputError(f"{path} is not a run record: {first_mistake(error)}") from None
        return found

    @classmethod
    def update(cls, folder: str | Path, **sections: Any) -> Self:
        """Replace sections of ``folder``/run.json, and return the new record."""
        record = replace(cls.load(folder), **sections)
        record.save(record_path(Path(folder)))
        return record


@dataclass
class Stopwatch:
    """A Progress that passes everything on to ``inner`` and keeps the seconds of each stage."""

    inner: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=lambda: time.perf_counter())
    started: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    @property
    def accounted(self) -> dict[str, float]:
        """Seconds of each stage, and what was between stages, up to now."""
        between = time.perf_counter() - self.begun - sum(self.seconds.values())
        return {**self.seconds, BETWEEN: round(between, 3)}

    def tell(self, what: Estimate | Begins | str) -> None:
        """See :func:`sleb.core.progress.tell`."""
        tell(self.inner, what)

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        """See :class:`sleb.core.progress.Progress`."""
        before = time.perf_counter()
        try:
            with self.inner.stage(title, total) as tick:
                yield tick
        finally:
            spent = time.perf_counter() - before
            self.seconds[title] = round(self.seconds.get(title, 0.0) + spent, 3)


def environment(device: str, dtype: str) -> dict[str, Any]:
    """The machine and settings that timings and rounding depend on."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


# -- records of earlier schemas: the first held sentences ----------------------------------------

_CHECKS = {
    "config.json keeps the original's fields": "config-kept",
    "files match SHA256SUMS": "checksums",
    "repaired tensors": "repaired-tensors",
    "depth-dependent config fields": "depth-fields",
    "clean reload": "clean-reload",
    "number of blocks": "blocks",
    "weights equal the original's": "weights",
    "weights equal the original's, but for the repaired": "weights-but-repaired",
    "logits equal the original with blocks bypassed": "logits",
    "generation with cache equals without": "generation",
}
_LIMITS = {
    "perplexity ratio": "perplexity.max_ratio",
    "divergence": "divergence.max",
    "agreement": "agreement.min",
    "score kept": "tasks.min_retention",
    "speed-up": "speed.min_speedup",
    "memory": "memory.max_mb",
    "size of the weights": "size.max_mb",
    "answers, repetitive": "answers.max_repetitive",
    "answers, empty": "answers.max_empty",
    "answers, unfinished": "answers.max_unfinished",
    "answers, switched": "answers.max_switched",
    "answers, json valid": "answers.min_json_valid",
}
_MISSING = {
    "measured only once": "no-interval",
    "dense and pruned were not compared": "not-paired",
    "the dense model scores 0": "dense-zero",
    "no prompt asks for JSON": "no-json-prompt",
    "the record has no": "unknown-name",
}


def upgrade(record: Any) -> Any:
    """A run record of any schema, as JSON gives it, in this one's form; what is no record, and what
    has another form than it ever had, is left as it is, for the validation to find."""
    if not isinstance(record, dict) or record.get("schema_version", 1) not in (1, 2, SCHEMA):
        return record
    new, changed = {**record, "schema_version": SCHEMA}, _SENTENCES
    if record.get("schema_version", 1) == 1:
        text, repair = str(new.pop("evaluation_note", "")), str(new.pop("repair_note", ""))
        new["evaluation_text"] = _evaluation_text(text)
        new["repair"] = _repair_status(repair) if repair else None
        changed = (*_SENTENCES, *_NAMES)
    changed = (*changed, *_ROWS)
    status = new.get("repair")
    if isinstance(status, dict) and "reason" in status:  # a message, until there were findings
        rest = {name: value for name, value in status.items() if name != "reason"}
        new["repair"] = {**rest, "why": _error(status["reason"]) if status["reason"] else None}
    for section, rows, kind, change in changed:
        found = new.get(section)
        if isinstance(found, dict) and isinstance(found.get(rows), list):
            now = [change(row) if isinstance(row, kind) else row for row in found[rows]]
            new[section] = {**found, rows: now}
    return new


def _evaluation_text(note: str) -> dict[str, Any] | None:
    if not note or note.startswith("no text was left over"):
        return None
    found = re.fullmatch(r"(\d+) (held-out )?windows of (\d+) tokens from (.*)", note, re.DOTALL)
    if not found:
        return {"windows": 0, "length": 0, "source": "given", "note": note}
    texts = [] if found[2] else found[4].split(", ")
    source = "held-out" if found[2] else "given"
    return {"windows": int(found[1]), "length": int(found[3]), "source": source, "texts": texts}


def _error(message: str) -> dict[str, Any]:
    return {"key": "error", "values": {"error": message}}


def _repair_status(note: str) -> dict[str, Any]:
    if note == "not asked for":
        return {"status": "not-asked"}
    if note.startswith("not possible: "):
        return {"status": "not-possible", "why": _error(note.removeprefix("not possible: "))}
    if note.startswith("no fit was better"):
        return {"status": "no-gain"}
    form = (
        r"(\d+) matrices around (\d+) of (\d+) gaps, fitted on ([\d,]+) tokens(.*) on (\d+) other"
    )
    found = re.match(form, note, re.DOTALL)
    if not found:
        return {"status": "repaired", "note": note}
    names = ("tensors", "gaps", "gaps_total", "tokens")
    counts = {name: int(found[i].replace(",", "")) for i, name in enumerate(names, 1)}
    return {
        "status": "repaired",
        **counts,
        "self_generated": "the model's own text" in found[5],
        "validation_windows": int(found[6]),
    }


def _check(row: dict[str, Any]) -> dict[str, Any]:
    if "measured" not in row:
        return row
    key = row.get("key") or _CHECKS.get(str(row.get("name", "")), "")
    found = _note(row["measured"], must=str(row.get("limit", "")))
    return {"key": key, "passed": row.get("passed"), "found": found}


def _note(sentence: Any, **more: str) -> dict[str, Any]:
    return {"key": "note", "values": {"note": str(sentence), **more}}


def _gate_row(row: dict[str, Any]) -> dict[str, Any]:
    name, _, of = str(row.get("name", "")).partition(", ")
    if name == "answers":
        name, of = f"answers, {of}", ""
    new = {**row, "name": _LIMITS.get(name, name), "of": "" if of == "all texts" else of}
    if (
        of
        and name in ("speed-up", "memory")
        and (found := re.fullmatch(r"(?:(.*?), )?(.*) with ([\w.-]+)", of))
    ):
        new |= {"of": found[1] or "", "path": found[2], "runtime": found[3]}
    if missing := str(row.get("missing", "")):
        keys = (key for start, key in _MISSING.items() if missing.startswith(start))
        new["missing"] = next(keys, "not-measured")
        near = re.search(r"did you mean '([^']*)'", missing)
        new["near"] = near[1] if near else ""
    return new


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a gate until schema 2, which had the worst case alone."""
    if "passed" not in row:
        return row
    verdict = "kept" if row["passed"] else "unclear" if row.get("missing") else "not-kept"
    return {**row, "measured": None, "worst": row.get("measured"), "verdict": verdict}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    new = {**row, "runtime": str(row.get("runtime", "")).replace("llama-cpp", "llama.cpp")}
    if isinstance(why := row.get("why"), str):
        new["why"] = _note(why) if why else None
    return new


def _skipped(sentence: str) -> dict[str, Any]:
    return {"reason": "note", "detail": sentence}


_Changes = tuple[tuple[str, str, type, Callable[[Any], dict[str, Any]]], ...]
_SENTENCES: _Changes = (
    ("verification", "checks", dict, _check),
    ("runtimes", "verdicts", dict, _verdict),
)
_NAMES: _Changes = (("gate", "rows", dict, _gate_row), ("speed", "skipped", str, _skipped))
_ROWS: _Changes = (("gate", "rows", dict, _judged),)
"""Sections, their lists, and how an entry becomes one of today: where it held sentences, and by the
names of schema 1."""
