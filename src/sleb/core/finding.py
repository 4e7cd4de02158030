"""What was found, as a key and figures. Sentences are made of it by ``sleb.views`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """``key`` says what it is, ``values`` are its figures and names. As text it is these in a row,
    for the message of an error."""

    key: str
    values: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{name} {_plain(value)}" for name, value in self.values.items()]
        return ": ".join([self.key, *([", ".join(parts)] if parts else [])])


def finding(key: str, **values: Value) -> Finding:
    """A :class:`Finding` of that key."""
    return Finding(key, values)


def _plain(value: Value) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
