"""What a search is to reach, as the user says it. Needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from sleb.core.errors import InputError

__all__ = ["Goal", "parse_bytes"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One target as the user gave it; exactly one may be given."""

    remove: int | str | None = None
    max_loss_increase: float | None = None
    speedup: float | None = None
    size: int | str | None = None

    def __post_init__(self) -> None:
        given = [f"--{k.replace('_', '-')}" for k, v in vars(self).items() if v is not None]
        if len(given) != 1:
            choice = "--remove, --max-loss-increase, --speedup or --size"
            raise InputError(
                f"{' and '.join(given)} are two targets: give one of {choice}"
                if given
                else f"no target: give one of {choice}, for example --remove 20%"
            )
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < math.inf:
            raise InputError(
                f"--max-loss-increase {self.max_loss_increase} is not possible; give nats/token "
                "above 0, for example 0.1 (10.5 % more perplexity)"
            )
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise InputError(f"--speedup {self.speedup} is not possible; give for example 1.25")
        if self.size is not None:
            parse_bytes(self.size, "--size")

    @classmethod
    def choose(cls, *, curve: bool, **targets: Any) -> Goal:
        """The goal that was given; for a curve without one, to remove half of the blocks."""
        if curve and all(value is None for value in targets.values()):
            return cls(remove="50%")
        return cls(**targets)


def parse_bytes(text: int | str, option: str) -> int:
    """Bytes of ``"100MB"``, ``"1.5 GiB"`` or a plain number of bytes.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]i?)?B?", str(text).strip(), re.IGNORECASE
    )
    if not match or float(match[1]) <= 0:
        raise InputError(f"{option} {text!r} is not a size; write for example 100MB or 1.5GiB")
    unit = (match[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** ("KMGT".index(unit[0]) + 1 if unit else 0))
