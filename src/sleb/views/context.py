"""What a report is made from, and the few figures that several of its parts need."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from sleb.core.errors import InputError
from sleb.core.plan import Plan
from sleb.views.locale import Words, bounds, code

if TYPE_CHECKING:
    from sleb.core.statistics import Interval
    from sleb.record import RunRecord
    from sleb.runtimes.bench import Case, Measured, Ratio

__all__ = ["Material"]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A run's record and plan, SHA-256 of their files by name, and the language to say it in.

    Raises:
        InputError: record and plan are not of the same run.
    """

    record: RunRecord
    plan: Plan
    say: Words
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
    def model(self) -> str:
        """The original's short name."""
        return Path(self.record.model).name or self.record.model

    def command(self, key: str) -> Markup:
        """A command of this run, ready to be typed; ``key`` is in the table ``commands``."""
        out = self.record.verification.checkpoint
        return code(
            self.say.plain(
                f"commands.{key}",
                model=shlex.quote(self.record.model),
                out=shlex.quote(out),
                plan=shlex.quote(str(Path(out) / "plan.json")),
            )
        )

    @property
    def heldout(self) -> bool:
        """Whether the evaluation is on what was set aside of the texts that chose the blocks."""
        seen = self.record.evaluation_text
        return seen is not None and seen.source == "held-out"

    @property
    def repaired(self) -> bool:
        """Whether matrices around the gaps are not the original's."""
        return self.plan.repair is not None and bool(self.plan.repair.tensors)

    def missing(self, key: str) -> Markup:
        """That something was not measured, and the command that measures it."""
        return self.say(f"missing.{key}", command=self.command(key))

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """How many times as fast: this checkpoint's, or all if none is named as this one is."""
        found = self.record.speed.ratios if self.record.speed else ()
        here = Path(self.record.verification.checkpoint)
        return tuple(r for r in found if Path(r.path) == here) or found

    def measured(self, runtime: str, path: str | None = None) -> Measured | None:
        """A timed model under ``runtime``: the dense one, or the one at ``path``."""
        speed = self.record.speed
        if speed is None or not speed.models:
            return None
        wanted = path or speed.models[0].path
        return next((m for m in speed.models if (m.path, m.runtime) == (wanted, runtime)), None)

    def case(self, name: str) -> str:
        """What a timed case is, in words."""
        speed = self.record.speed
        found: Case | None = (
            next((c for c in speed.cases if c.name == name), None) if speed else None
        )
        if found is None:
            return name
        kind = {0: "prompt", 1: "first"}.get(found.new_tokens, "generate")
        return self.say.plain(
            f"cases.{kind}",
            batch=self.say.number(found.batch, 0),
            prompt=self.say.number(found.prompt_tokens, 0),
            new=self.say.number(found.new_tokens, 0),
        )

    def reading(self, found: Interval, neutral: float, better: str) -> str:
        """In words, whether ``found`` can be told from ``neutral``; ``better`` is high or low."""
        ends = bounds(found)
        if ends is None:
            return self.say.plain("reading.single")
        if ends[0] <= neutral <= ends[1]:
            return self.say.plain("reading.noise")
        good = (found.value > neutral) == (better == "high")
        return self.say.plain("reading.better" if good else "reading.worse")
