"""Limits that a pruned model must keep, read from a TOML file and held against a run record.

What each limit means, and how it is judged, is in ``limits``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

from sleb.core.errors import InputError, VerificationFailed, did_you_mean
from sleb.core.toml import read_toml
from sleb.evaluation.limits import (
    Agreement,
    Answers,
    Divergence,
    GateRow,
    Memory,
    Perplexity,
    Size,
    SpeedUp,
    Table,
    Tasks,
)

if TYPE_CHECKING:
    from sleb.record import RunRecord

__all__ = ["Gate", "GateResult", "GateRow"]


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Every limit of a gate."""

    rows: tuple[GateRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return all(row.passed for row in self.rows)

    def require(self) -> None:
        """Raise VerificationFailed, naming the first limit that failed, and how many did."""
        failed = [row for row in self.rows if not row.passed]
        if failed:
            row = failed[0]
            found = row.missing if row.measured is None else row.show(row.measured)
            allowed = "" if row.measured is None else f", allowed is {row.allowed}"
            raise VerificationFailed(
                f"the gate failed: {row.name}: {found}{allowed} "
                f"({len(failed)} of {len(self.rows)} limits failed)"
            )


class Gate(Table):
    """Every limit that a file sets."""

    perplexity: Perplexity = Perplexity()
    divergence: Divergence = Divergence()
    agreement: Agreement = Agreement()
    tasks: Tasks = Tasks()
    answers: Answers = Answers()
    speed: SpeedUp = SpeedUp()
    memory: Memory = Memory()
    size: Size = Size()

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
            gate = cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{where}: {_mistake(error.errors()[0])}") from None
        if not gate.model_dump(exclude_defaults=True):
            raise InputError(f"{where} sets no limit; set one, such as perplexity.max_ratio = 1.2")
        return gate

    def rows(self, record: RunRecord) -> Iterator[GateRow]:
        """Every limit, in the order of the tables."""
        for name in type(self).model_fields:
            yield from getattr(self, name).rows(record)

    def check(self, record: RunRecord) -> GateResult:
        """Hold every limit against what the record has."""
        return GateResult(rows=tuple(self.rows(record)))


def _mistake(error: ErrorDetails) -> str:
    """The first thing that is wrong, and where."""
    *tables, key = (str(part)[:60] for part in error["loc"])
    table = f"[{'.'.join(tables)}] " if tables else ""
    if error["type"] == "extra_forbidden":
        known = (getattr(Gate(), tables[0]) if tables else Gate()).__class__.model_fields
        lead = f"{table}has no limit" if tables else "there is no table"
        return f"{lead} '{key}'{did_you_mean(key, known)}; known: {', '.join(known)}"
    if error["type"] in ("model_type", "dict_type"):
        return f"{table}{key} is a table of limits; write [{'.'.join([*tables, key])}] above them"
    given = repr(error["input"])[:40]
    return f"{table}{key} = {given} is not possible: {error['msg'].lower()}"
