"""Limits that a pruned model must keep, read from a TOML file and held against a run record.

A measured figure is judged by the end of its 95 % interval that is worse for the pruned model, so
too little evidence fails rather than passes. A limit on what was not measured fails too. Figures
without an interval (memory, size) and shares of answers are judged as they are, even where the
dense model does no better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails
from typing_extensions import Self

from sleb.core.errors import InputError, did_you_mean
from sleb.core.statistics import Interval
from sleb.core.toml import read_toml
from sleb.evaluation.agreement import AnswersKept
from sleb.evaluation.answers import Comparison
from sleb.evaluation.tasks import TaskResult
from sleb.record import GateResult, GateRow, RunRecord

# strict: a number in quotes is a mistake
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


@dataclass(frozen=True)
class _Figure:
    """A figure of a record. ``of``: the text, task or case, empty for all; ``missing``: why there
    is none."""

    value: Interval | float | None
    of: str = ""
    missing: str = "not-measured"
    path: str = ""
    runtime: str = ""


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

    def rows(
        self, record: RunRecord, every: float | None, own: Mapping[str, float]
    ) -> Iterator[GateRow]:
        """The limit for ``every`` figure but those that have one of their ``own``, held against
        the record; then the names that the record lacks."""
        figures = self.figures(record)
        names = list(dict.fromkeys(f.of for f in figures if f.of))
        alone = len(names) == 1 and any(not f.of for f in figures)  # one text is all texts
        for figure in figures:
            general = None if alone and figure.of else every
            if (limit := own.get(figure.of, general)) is not None:
                yield self._row(figure, limit)
        for name in own:
            if name not in names:
                near = next(iter(get_close_matches(name, names, 1, 0.5)), "")
                missing = "unknown-name" if names else "not-measured"
                yield replace(self._row(_Figure(None, name, missing), own[name]), near=near)

    def _row(self, figure: _Figure, limit: float) -> GateRow:
        value, missing = figure.value, figure.missing
        if isinstance(value, Interval):
            value, missing = value.high if self.at_most else value.low, "no-interval"
        kept = value is not None and (value <= limit if self.at_most else value >= limit)
        return GateRow(
            name=self.key,
            of=figure.of,
            path=figure.path,
            runtime=figure.runtime,
            limit=limit,
            at_most=self.at_most,
            measured=value,
            unit=self.unit,
            passed=kept,
            missing=missing if value is None else "",
        )


def _ratios(record: RunRecord) -> list[_Figure]:
    """Perplexity of the pruned model over the dense one's: of all texts together, and of each."""
    whole = record.evaluation
    if whole is None:
        return [_Figure(None)]
    texts = [_Figure(text.perplexity_ratio, name) for name, text in whole.domains.items()]
    return [_Figure(whole.perplexity_ratio), *texts]


def _evaluated(name: str) -> Getter:
    return lambda record: [_Figure(getattr(record.evaluation, name, None))]


def _retentions(record: RunRecord) -> list[_Figure]:
    """Share of the dense model's score that the pruned one keeps, by task: 1 + d / s, of the lower
    bound d of the paired difference and the dense score s. The plain share would let luck decide:
    with 100 items, a few flips either way are noise."""

    def retention(task: TaskResult) -> _Figure:
        if task.flips is None or task.flips.difference.low is None:
            return _Figure(None, task.name, "not-paired")
        if not task.dense.value:
            return _Figure(None, task.name, "dense-zero")
        return _Figure(max(0.0, 1 + task.flips.difference.low / task.dense.value), task.name)

    return [*map(retention, record.tasks or ())] or [_Figure(None)]


def _answered(share: Callable[[Comparison], float | None]) -> Getter:
    """A share of the pruned model's answers to the prompts of `sleb compare`."""

    def figures(record: RunRecord) -> list[_Figure]:
        both = record.answers
        return [_Figure(share(both), missing="no-json-prompt") if both else _Figure(None)]

    return figures


def _of_answers(figure: Callable[[AnswersKept], Interval | None]) -> Getter:
    """What the pruned model keeps of the dense one's answers to prompts."""

    def figures(record: RunRecord) -> list[_Figure]:
        return [_Figure(figure(record.prompts) if record.prompts else None)]

    return figures


def _unfinished(both: Comparison) -> float:
    return round(1 - both.pruned.ended.value, 12)  # 1 - 0.7 is a little above 0.3


def _json_valid(both: Comparison) -> float | None:
    return both.pruned.json_valid.value if both.pruned.json_valid else None


def _speedups(record: RunRecord) -> list[_Figure]:
    """Times as fast as the dense model, by case of `sleb bench`."""
    ratios = record.speed.ratios if record.speed else ()
    several = len({(r.path, r.runtime) for r in ratios}) > 1
    named = [(r, (r.path, r.runtime) if several else ("", "")) for r in ratios]
    return [_Figure(r.ratio, r.case, "", *model) for r, model in named] or [_Figure(None)]


def _memory(record: RunRecord) -> list[_Figure]:
    """Most memory in use while `sleb bench` ran each pruned model, MB of 10^6 bytes."""
    models = record.speed.models if record.speed else ()
    pruned = [model for model in models if model.blocks < models[0].blocks]
    named = [(m, (m.path, m.runtime) if len(pruned) > 1 else ("", "")) for m in pruned]
    return [_Figure(m.peak_bytes / 1e6, "", "", *model) for m, model in named] or [_Figure(None)]


def _drafts(name: str) -> Getter:
    """A figure of each pruned model as a draft of the dense one."""

    def figures(record: RunRecord) -> list[_Figure]:
        drafts = record.draft.drafts if record.draft else ()
        paths = [d.path if len(drafts) > 1 else "" for d in drafts]
        found = [_Figure(getattr(d, name), "", "", p) for d, p in zip(drafts, paths, strict=True)]
        return found or [_Figure(None)]

    return figures


def _deviations(record: RunRecord) -> list[_Figure]:
    """Mean deviation of log-probabilities from those of transformers, by runtime."""
    verdicts = record.runtimes.verdicts if record.runtimes else ()
    return [_Figure(v.pruned, v.runtime) for v in verdicts] or [_Figure(None)]


LIMITS = (
    Limit("perplexity.max_ratio", _ratios, "x", by_name="domains"),
    Limit("divergence.max", _evaluated("divergence"), "nats/token", NotNegative),
    Limit("agreement.min", _evaluated("agreement"), "%", Share),
    Limit("tasks.min_retention", _retentions, "%", by_name="each"),
    Limit("answers.min_agreement", _of_answers(lambda kept: kept.agreement), "%", Share),
    Limit(
        "answers.min_right",
        _of_answers(lambda kept: kept.right.kept if kept.right else None),
        "%",
        Share,
    ),
    Limit("answers.max_repetitive", _answered(lambda a: a.pruned.repetitive.value), "%", Share),
    Limit("answers.max_empty", _answered(lambda a: a.pruned.empty.value), "%", Share),
    Limit("answers.max_unfinished", _answered(_unfinished), "%", Share),
    Limit("answers.max_switched", _answered(lambda a: a.switched.value), "%", Share),
    Limit("answers.min_json_valid", _answered(_json_valid), "%", Share),
    Limit("speed.min_speedup", _speedups, "x", by_name="cases"),
    Limit("draft.min_speedup", _drafts("ratio"), "x"),
    Limit("draft.min_acceptance", _drafts("acceptance"), "%", Share),
    Limit("runtimes.max_deviation", _deviations, "nats/token", NotNegative, by_name="each"),
    Limit("memory.max_mb", _memory, "MB"),
    Limit("size.max_mb", lambda record: [_Figure(record.nbytes[1] / 1e6)], "MB"),
)
"""Every limit, in the order of the tables of a gate file."""


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
        hint = "a gate file holds limits, such as: perplexity.max_ratio = 1.2"
        return cls.parse(read_toml(path, hint), str(path))

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
