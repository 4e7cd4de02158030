"""Limits that a pruned model must keep, read from a TOML file and held against a run record.

One rule holds for every figure: it is judged by its worst case, the end of its 95 % interval that
is worse for the pruned model. A limit is kept if the worst case keeps it, not kept if the best case
does not, and else nobody can tell yet; so it is where nothing was measured. Only kept passes. A
figure that has no interval because it is exact (memory, size) is its own worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isnan, log
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails
from typing_extensions import Self

from sleb.core.errors import InputError, did_you_mean
from sleb.core.statistics import Interval, items_to_tell
from sleb.core.toml import LIMITS_HINT, read_toml
from sleb.evaluation.agreement import AnswersKept
from sleb.evaluation.answers import Comparison
from sleb.evaluation.perplexity import Quality
from sleb.evaluation.tasks import TaskResult
from sleb.record import GateResult, GateRow, RunRecord, Verdict

# strict: a number in quotes is a mistake
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


@dataclass(frozen=True)
class _Figure:
    """A figure of a record, measured on so many ``items``. ``of``: the text, task or case,
    empty for all; ``dense``: the same of the dense model, or what means no change; ``missing``: why
    there is none."""

    value: Interval | float | None
    of: str = ""
    missing: str = "not-measured"
    path: str = ""
    runtime: str = ""
    items: int = 0
    dense: float | None = None


Getter = Callable[[RunRecord], list[_Figure]]


@dataclass(frozen=True)
class Limit:
    """A key of a gate file, as ``perplexity.max_ratio``: where its figures are in a record, their
    unit, the numbers it can be, and the table beside it that holds limits by name, if any. It is
    an upper bound if it begins with max, else a lower one."""

    key: str
    figures: Getter
    unit: str
    number: Any = Positive
    by_name: str = ""

    @property
    def at_most(self) -> bool:
        """Whether it is an upper bound."""
        return self.key.partition(".")[2].startswith("max")

    def measured(self, record: RunRecord) -> tuple[GateRow, ...]:
        """What the record has of it, held against nothing."""
        figures = self.figures(record)
        alone = _alone(figures)
        return tuple(self._row(f, None) for f in figures if not (alone and f.of))

    def rows(
        self, record: RunRecord, every: float | None, own: Mapping[str, float]
    ) -> Iterator[GateRow]:
        """The limit for ``every`` figure but those that have one of their ``own``, held against
        the record; then the names that the record lacks."""
        figures = self.figures(record)
        names = list(dict.fromkeys(f.of for f in figures if f.of))
        alone = _alone(figures)
        for figure in figures:
            general = None if alone and figure.of else every
            if (limit := own.get(figure.of, general)) is not None:
                yield self._row(figure, limit)
        for name in own:
            if name not in names:
                near = next(iter(get_close_matches(name, names, 1, 0.5)), "")
                missing = "unknown-name" if names else "not-measured"
                yield replace(self._row(_Figure(None, name, missing), own[name]), near=near)

    def _row(self, figure: _Figure, limit: float | None) -> GateRow:
        found = figure.value
        if isinstance(found, float):
            found = Interval(value=found, low=found, high=found)
        if found and (found.low is None or found.high is None or isnan(found.low + found.high)):
            found = Interval(value=found.value, low=None, high=None)
        ends = (found.low, found.high) if found else (None, None)
        best, worst = ends if self.at_most else ends[::-1]
        verdict: Verdict = ""
        needed = None
        if limit is not None:
            verdict = _judged(best, worst, limit, self.at_most)
        if found and limit is not None and verdict == "unclear" and figure.items:
            needed = self._needed(found, limit, figure)
        return GateRow(
            name=self.key,
            of=figure.of,
            path=figure.path,
            runtime=figure.runtime,
            limit=limit,
            at_most=self.at_most,
            measured=found.value if found else None,
            worst=worst,
            dense=figure.dense,
            unit=self.unit,
            verdict=verdict,
            needed=needed,
            missing=figure.missing if found is None else "" if worst is not None else "no-interval",
            judged=figure.items if figure.missing == "none-right" else None,
        )

    def _needed(self, found: Interval, limit: float, figure: _Figure) -> int | None:
        """How many items would tell; the intervals of ratios narrow as logarithms."""
        if self.unit == "x" and min(limit, found.low or 0.0) > 0:
            found, limit = found.mapped(log), log(limit)
        return items_to_tell(found, limit, figure.items)


def _alone(figures: list[_Figure]) -> bool:
    """Whether one text is all texts."""
    return len({f.of for f in figures if f.of}) == 1 and any(not f.of for f in figures)


def _judged(best: float | None, worst: float | None, limit: float, at_most: bool) -> Verdict:
    if best is None or worst is None:
        return "unclear"
    if worst <= limit if at_most else worst >= limit:
        return "kept"
    return "not-kept" if (best > limit if at_most else best < limit) else "unclear"


def _ratios(record: RunRecord) -> list[_Figure]:
    """Perplexity of the pruned model over the dense one's: of all texts together, and of each."""
    whole = record.evaluation
    if whole is None:
        return [_Figure(None)]
    every: dict[str, Quality] = {"": whole, **whole.domains}
    return [
        _Figure(q.perplexity_ratio, name, items=q.windows, dense=1.0) for name, q in every.items()
    ]


def _evaluated(name: str) -> Getter:
    def figures(record: RunRecord) -> list[_Figure]:
        found = record.evaluation
        return [_Figure(getattr(found, name), items=found.windows) if found else _Figure(None)]

    return figures


def _retentions(record: RunRecord) -> list[_Figure]:
    """Share of the dense model's score that the pruned one keeps, by task: 1 + d / s, of the paired
    difference d and the dense score s."""

    def retention(task: TaskResult) -> _Figure:
        if task.flips is None:
            return _Figure(None, task.name, "not-paired")
        if not task.dense.value:
            return _Figure(None, task.name, "dense-zero")
        if task.guesses:
            return _Figure(None, task.name, "at-chance")
        kept = task.flips.difference.mapped(lambda d: max(0.0, 1 + d / task.dense.value))
        return _Figure(kept, task.name, items=task.items, dense=1.0)

    return [*map(retention, record.tasks or ())] or [_Figure(None)]


def _answered(share: Callable[[Comparison], Interval | None]) -> Getter:
    """A share of the pruned model's answers to the prompts of `sleb compare`."""

    def figures(record: RunRecord) -> list[_Figure]:
        both = record.answers
        if both is None:
            return [_Figure(None)]
        return [_Figure(share(both), missing="no-json-prompt", items=both.prompts)]

    return figures


def _of_answers(figure: Callable[[AnswersKept], Interval | None]) -> Getter:
    """What the pruned model keeps of the dense one's answers to prompts."""

    def figures(record: RunRecord) -> list[_Figure]:
        kept = record.prompts
        return [_Figure(figure(kept), items=kept.prompts, dense=1.0) if kept else _Figure(None)]

    return figures


def _right(record: RunRecord) -> list[_Figure]:
    """Share of the dense model's right answers that are kept, where rows tell what is right."""
    right = record.prompts.right if record.prompts else None
    if right and right.kept is None:
        return [_Figure(None, missing="none-right", items=right.judged)]
    return _of_answers(lambda kept: kept.right.kept if kept.right else None)(record)


def _unfinished(both: Comparison) -> Interval:
    return both.pruned.ended.mapped(lambda x: round(1 - x, 12))  # 1 - 0.7 is a little above 0.3


def _speedups(record: RunRecord) -> list[_Figure]:
    """Times as fast as the dense model, by case of `sleb bench`."""
    if record.speed is None or not record.speed.ratios:
        return [_Figure(None)]
    ratios = record.speed.ratios
    several = len({(r.path, r.runtime) for r in ratios}) > 1
    runs = {
        (model.path, model.runtime, run.case): len(run.seconds)
        for model in record.speed.models
        for run in model.runs
    }
    return [
        _Figure(
            r.ratio,
            r.case,
            "",
            *((r.path, r.runtime) if several else ("", "")),
            items=runs.get((r.path, r.runtime, r.case), 0),
            dense=1.0,
        )
        for r in ratios
    ]


def _memory(record: RunRecord) -> list[_Figure]:
    """Most memory in use while `sleb bench` ran each pruned model, MB of 10^6 bytes."""
    models = record.speed.models if record.speed else ()
    pruned = [model for model in models if model.blocks < models[0].blocks]
    named = [(m, (m.path, m.runtime) if len(pruned) > 1 else ("", "")) for m in pruned]
    dense = {m.runtime: m.peak_bytes / 1e6 for m in models if m.path == models[0].path}
    return [
        _Figure(m.peak_bytes / 1e6, "", "", *model, dense=dense.get(m.runtime))
        for m, model in named
    ] or [_Figure(None)]


def _drafts(name: str, counted: str) -> Getter:
    """A figure of each pruned model as a draft of the dense one, of what is ``counted``."""

    def figures(record: RunRecord) -> list[_Figure]:
        drafts = record.draft.drafts if record.draft else ()
        items = getattr(record.draft, counted, 0)
        named = [(d, d.path if len(drafts) > 1 else "") for d in drafts]
        found = [_Figure(getattr(d, name), "", "", p, items=items) for d, p in named]
        return found or [_Figure(None)]

    return figures


def _deviations(record: RunRecord) -> list[_Figure]:
    """Mean deviation of log-probabilities from those of transformers, by runtime."""
    verdicts = record.runtimes.verdicts if record.runtimes else ()
    return [_Figure(v.pruned, v.runtime) for v in verdicts] or [_Figure(None)]


def _size(record: RunRecord) -> list[_Figure]:
    dense, pruned = record.nbytes
    return [_Figure(pruned / 1e6, dense=dense / 1e6)]


LIMITS = (
    Limit("answers.min_right", _right, "%", Share),
    Limit("answers.min_agreement", _of_answers(lambda kept: kept.agreement), "%", Share),
    Limit("answers.max_repetitive", _answered(lambda a: a.pruned.repetitive), "%", Share),
    Limit("answers.max_empty", _answered(lambda a: a.pruned.empty), "%", Share),
    Limit("answers.max_unfinished", _answered(_unfinished), "%", Share),
    Limit("answers.max_switched", _answered(lambda a: a.switched), "%", Share),
    Limit("answers.min_json_valid", _answered(lambda a: a.pruned.json_valid), "%", Share),
    Limit("tasks.min_retention", _retentions, "%", by_name="each"),
    Limit("perplexity.max_ratio", _ratios, "x", by_name="domains"),
    Limit("divergence.max", _evaluated("divergence"), "nats/token", NotNegative),
    Limit("agreement.min", _evaluated("agreement"), "%", Share),
    Limit("speed.min_speedup", _speedups, "x", by_name="cases"),
    Limit("draft.min_speedup", _drafts("ratio", "runs"), "x"),
    Limit("draft.min_acceptance", _drafts("acceptance", "prompts"), "%", Share),
    Limit("runtimes.max_deviation", _deviations, "nats/token", NotNegative, by_name="each"),
    Limit("memory.max_mb", _memory, "MB"),
    Limit("size.max_mb", _size, "MB"),
)
"""Every limit, in the order of the tables of a gate file."""


def ungated(record: RunRecord, keys: Collection[str]) -> tuple[GateRow, ...]:
    """What the record has of the limits ``keys`` and its gate does not limit."""

    def place(row: GateRow) -> tuple[str, ...]:
        return row.name, row.of, row.path, row.runtime

    gated = {*map(place, record.gate.rows)} if record.gate else set()
    rows = (row for limit in LIMITS if limit.key in keys for row in limit.measured(record))
    return tuple(row for row in rows if row.measured is not None and place(row) not in gated)


def _form() -> type[BaseModel]:
    """The form of a gate file: frozen, strict about names, and without NaN or infinity."""
    config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    tables: dict[str, dict[str, Any]] = {}
    for limit in LIMITS:
        table, _, key = limit.key.partition(".")
        fields = tables.setdefault(table, {})
        fields[key] = (limit.number | None, None)
        if limit.by_name:
            fields[limit.by_name] = (dict[str, limit.number], Field(default_factory=dict))  # type: ignore[name-defined]
    made = {name: create_model(name, __config__=config, **f) for name, f in tables.items()}
    whole: Any = {name: (kind, Field(default_factory=kind)) for name, kind in made.items()}
    return create_model("gate", __config__=config, **whole)


_FORM = _form()


@dataclass(frozen=True)
class Gate:
    """Every limit that a file sets, by table."""

    tables: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a gate file.

        Raises:
            InputError: missing, too large, not TOML, without a limit, or with a wrong one.
        """
        return cls.parse(read_toml(path, LIMITS_HINT), str(path))

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Check limits that were read before. ``where`` is the file, and the table if there is one.

        Raises:
            InputError: no limit, or a wrong one.
        """
        try:
            gate = _FORM.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{where}: {_mistake(error.errors()[0])}") from None
        tables = gate.model_dump(exclude_defaults=True)
        if not tables:
            raise InputError(f"{where} sets no limit; set one, such as perplexity.max_ratio = 1.2")
        return cls(tables)

    def check(self, record: RunRecord) -> GateResult:
        """Hold every limit against what the record has."""
        rows: list[GateRow] = []
        for limit in LIMITS:
            table, _, key = limit.key.partition(".")
            given = self.tables.get(table, {})
            rows += limit.rows(record, given.get(key), given.get(limit.by_name, {}))
        return GateResult(rows=tuple(rows))


def _mistake(error: ErrorDetails) -> str:
    """The first thing that is wrong, and where."""
    *tables, key = (str(part)[:60] for part in error["loc"])
    table = f"[{'.'.join(tables)}] " if tables else ""
    if error["type"] == "extra_forbidden":
        form = _FORM.model_fields[tables[0]].annotation if tables else _FORM
        known = form.model_fields  # type: ignore[union-attr]
        lead = f"{table}has no limit" if tables else "there is no table"
        return f"{lead} '{key}'{did_you_mean(key, known)}; known: {', '.join(known)}"
    if error["type"] in ("model_type", "dict_type"):
        return f"{table}{key} is a table of limits; write [{'.'.join([*tables, key])}] above them"
    given = repr(error["input"])[:40]
    return f"{table}{key} = {given} is not possible: {error['msg'].lower()}"
