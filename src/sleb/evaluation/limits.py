"""The limits that a gate can set, by table, and how each is held against a run record.

A measured figure is judged by the end of its 95 % interval that is worse for the pruned model, so
too little evidence fails rather than passes. A limit on what was not measured fails too. Figures
without an interval (memory, size) and shares of answers are judged as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from sleb.core.errors import did_you_mean
from sleb.core.statistics import Interval

if TYPE_CHECKING:
    from sleb.evaluation.answers import Comparison
    from sleb.evaluation.tasks import TaskResult
    from sleb.record import RunRecord

__all__ = [
    "Agreement",
    "Answers",
    "Divergence",
    "GateRow",
    "Memory",
    "Perplexity",
    "Size",
    "SpeedUp",
    "Table",
    "Tasks",
]


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One limit. ``measured`` is null where nothing was measured, which fails; ``missing`` then
    says which command measures it. ``unit`` is for display (x, %, MB, nats/token, ''); figures in
    % are shares in 0..1, to be shown times 100, as :meth:`show` does."""

    name: str
    limit: float
    at_most: bool
    measured: float | None
    unit: str
    passed: bool
    missing: str = ""

    def show(self, value: float) -> str:
        """``value`` in the row's unit, for a person."""
        if self.unit == "MB":
            return f"{value:,.1f} MB"
        number = f"{100 * value if self.unit == '%' else value:,.5g}"
        return number + {"x": "x", "": ""}.get(self.unit, f" {self.unit}")

    @property
    def allowed(self) -> str:
        """The limit, in words."""
        return f"at {'most' if self.at_most else 'least'} {self.show(self.limit)}"


@dataclass(frozen=True)
class _Kind:
    """What rows of a kind share: unit, direction, and the command that measures it."""

    unit: str
    at_most: bool
    command: str = ""

    def row(self, name: str, limit: float, measured: float | None, missing: str = "") -> GateRow:
        """A row judged as it is. ``missing``: why there is no figure, if not for want of a run."""
        kept = measured is not None and (measured <= limit if self.at_most else measured >= limit)
        return GateRow(
            name=name,
            limit=limit,
            at_most=self.at_most,
            measured=measured,
            unit=self.unit,
            passed=kept,
            missing=f"{missing or 'not measured'}; {self.command}" if measured is None else "",
        )

    def bound(self, name: str, limit: float, found: Interval | None) -> GateRow:
        """A row judged by the worse end of an interval."""
        if found is None:
            return self.row(name, limit, None)
        end = found.high if self.at_most else found.low
        return self.row(name, limit, end, "measured only once, so without an interval")


RATIO = _Kind("x", True, "run: sleb eval MODEL --plan OUT/plan.json --text FILE --record OUT")
NATS = replace(RATIO, unit="nats/token")
SAME = replace(RATIO, unit="%", at_most=False)
KEPT = _Kind("%", False, "run: sleb eval MODEL --plan OUT/plan.json --task NAME --record OUT")
TIMES = _Kind("x", False, "run: sleb bench MODEL OUT --record OUT")
BYTES = replace(TIMES, unit="MB", at_most=True)
SHARE = _Kind("%", True, "run: sleb compare MODEL OUT --prompts FILE --record OUT")

# strict: a number in quotes is a mistake
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


class Table(BaseModel):
    """A table of limits: frozen, strict about names, and without NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """The table's limits, held against the record."""
        raise NotImplementedError


def _named(
    every: float | None, own: Mapping[str, float], known: Iterable[str]
) -> Iterator[tuple[str, float, str]]:
    """Each known name with its limit, then those that are not known with the reason. A name's own
    limit goes before the one for every name."""
    names = list(dict.fromkeys(known))
    for name in names:
        limit = own.get(name, every)
        if limit is not None:
            yield name, limit, ""
    for name in own:
        if name not in names:
            yield name, own[name], f"the record has no '{name}'{did_you_mean(name, names)}"


class Perplexity(Table):
    """[perplexity]: perplexity of the pruned model over the dense one's, upper bound.

    ``max_ratio`` is for all texts together and for each of them by itself, but for those that
    ``domains`` gives a limit of their own."""

    max_ratio: Positive | None = None
    domains: dict[str, Positive] = Field(default_factory=dict)

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Perplexity`."""
        whole = record.evaluation
        texts = whole.domains if whole else {}
        if self.max_ratio is not None:
            ratio = whole.perplexity_ratio if whole else None
            yield RATIO.bound("perplexity ratio, all texts", self.max_ratio, ratio)
        every = self.max_ratio if len(texts) > 1 else None  # one text is all texts
        for text, limit, missing in _named(every, self.domains, texts):
            name = f"perplexity ratio, {text}"
            if missing:
                yield RATIO.row(name, limit, None, missing)
            else:
                yield RATIO.bound(name, limit, texts[text].perplexity_ratio)


class Divergence(Table):
    """[divergence]: from the dense model's predictions (KL), nats/token, upper bound."""

    max: NotNegative | None = None

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Divergence`."""
        if self.max is not None:
            found = record.evaluation.divergence if record.evaluation else None
            yield NATS.bound("divergence", self.max, found)


class Agreement(Table):
    """[agreement]: share of tokens where both models find the same one likeliest, lower bound."""

    min: Share | None = None

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Agreement`."""
        if self.min is not None:
            found = record.evaluation.agreement if record.evaluation else None
            yield SAME.bound("agreement", self.min, found)


class Tasks(Table):
    """[tasks]: share of the dense model's score that the pruned one keeps, lower bound.

    ``min_retention`` is for every task but those in ``each``. The bound is 1 + d / s, of the lower
    bound d of the paired difference and the dense score s. The plain share would let luck decide:
    with 100 items, a few flips either way are noise."""

    min_retention: Positive | None = None
    each: dict[str, Positive] = Field(default_factory=dict)

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Tasks`."""
        tasks = record.tasks or ()
        if self.min_retention is not None and not tasks:
            yield KEPT.row("score kept", self.min_retention, None)
        names = [task.name for task in tasks]
        for name, limit, missing in _named(self.min_retention, self.each, names):
            if missing:
                yield KEPT.row(f"score kept, {name}", limit, None, missing)
            for task in tasks:
                if task.name == name:
                    yield KEPT.row(f"score kept, {name}", limit, *_kept(task))


def _kept(task: TaskResult) -> tuple[float | None, str]:
    """Lower bound of the share of the score that is kept, or None and why."""
    if task.flips is None or task.flips.difference.low is None:
        return None, "dense and pruned were not compared item by item"
    if not task.dense.value:
        return None, "the dense model scores 0, so there is nothing to keep"
    return max(0.0, 1 + task.flips.difference.low / task.dense.value), ""


class Answers(Table):
    """[answers]: shares of the pruned model's answers to the prompts of `sleb compare`, in 0..1.

    They are judged as they are, even where the dense model does no better: set the limits with its
    figures in mind. ``max_unfinished``: of answers cut off at the longest length;
    ``max_switched``: of those in another writing system than the dense model's;
    ``min_json_valid``: of prompts that ask for JSON."""

    max_repetitive: Share | None = None
    max_empty: Share | None = None
    max_unfinished: Share | None = None
    max_switched: Share | None = None
    min_json_valid: Share | None = None

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Answers`."""
        found = _shares(record.answers) if record.answers else {}
        for key, limit in self.model_dump(exclude_none=True).items():
            kind = replace(SHARE, at_most=key.startswith("max"))
            missing = "no prompt asks for JSON" if found else ""
            name = f"answers, {key[4:].replace('_', ' ')}"
            yield kind.row(name, limit, found.get(key), missing)


def _shares(both: Comparison) -> dict[str, float | None]:
    pruned = both.pruned
    return {
        "max_repetitive": pruned.repetitive.value,
        "max_empty": pruned.empty.value,
        "max_unfinished": round(1 - pruned.ended.value, 12),  # 1 - 0.7 is a little above 0.3
        "max_switched": both.switched.value,
        "min_json_valid": pruned.json_valid.value if pruned.json_valid else None,
    }


class SpeedUp(Table):
    """[speed]: times as fast as the dense model, lower bound; ``min_speedup`` for every case of
    `sleb bench` but those in ``cases``."""

    min_speedup: Positive | None = None
    cases: dict[str, Positive] = Field(default_factory=dict)

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`SpeedUp`."""
        ratios = record.speed.ratios if record.speed else ()
        if self.min_speedup is not None and not ratios:
            yield TIMES.row("speed-up", self.min_speedup, None)
        several = len({(r.path, r.runtime) for r in ratios}) > 1
        for case, limit, missing in _named(self.min_speedup, self.cases, (r.case for r in ratios)):
            if missing:
                yield TIMES.row(f"speed-up, {case}", limit, None, missing)
            for r in ratios:
                if r.case == case:
                    of = f", {r.path} with {r.runtime}" if several else ""
                    yield TIMES.bound(f"speed-up, {case}{of}", limit, r.ratio)


class Memory(Table):
    """[memory]: most memory in use while `sleb bench` ran the pruned model, MB of 10^6 bytes."""

    max_mb: Positive | None = None

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Memory`."""
        models = record.speed.models if record.speed else ()
        pruned = [model for model in models if model.blocks < models[0].blocks]
        if self.max_mb is not None:
            if not pruned:
                yield BYTES.row("memory", self.max_mb, None)
            for model in pruned:
                of = f", {model.path} with {model.runtime}" if len(pruned) > 1 else ""
                yield BYTES.row(f"memory{of}", self.max_mb, model.peak_bytes / 1e6)


class Size(Table):
    """[size]: weights of the pruned checkpoint on disk, MB of 10^6 bytes."""

    max_mb: Positive | None = None

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """See :class:`Size`."""
        if self.max_mb is not None:
            yield BYTES.row("size of the weights", self.max_mb, record.nbytes[1] / 1e6)
