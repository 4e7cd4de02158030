"""What can be removed: whole blocks, and the attention or the MLP of one alone.

A unit is an int, so that sets of units are sets of ints: block i is i, and its parts are numbers
beyond all blocks that know how they are called, ``12.attention`` and ``12.mlp``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from sleb.core.errors import InputError

MAX_BLOCKS = 10_000
ATTENTION, MLP = "attention", "mlp"
PARTS = ("", ATTENTION, MLP)


class Unit(int):
    """A part of a block; its text is its name."""

    @classmethod
    def of(cls, block: int, part: str) -> Unit:
        """The attention or the MLP of a block."""
        return cls(PARTS.index(part) * MAX_BLOCKS + block)

    def __str__(self) -> str:
        return f"{block_of(self)}.{part_of(self)}"

    __repr__ = __str__


def block_of(unit: int) -> int:
    """The block that a unit is, or is a part of."""
    return int(unit) % MAX_BLOCKS


def part_of(unit: int) -> str:
    """``attention`` or ``mlp``; empty for a whole block."""
    return PARTS[int(unit) // MAX_BLOCKS]


def parts_of(block: int) -> tuple[Unit, Unit]:
    """Both parts of a block."""
    return Unit.of(block, ATTENTION), Unit.of(block, MLP)


def whole(units: Collection[int], block: int) -> bool:
    """Whether nothing of a block is left without ``units``."""
    return block in units or all(part in units for part in parts_of(block))


def canonical(units: Iterable[int]) -> tuple[int, ...]:
    """Units sorted, with a block in place of both its parts."""
    gone = {*units}
    blocks = {b for b in map(block_of, gone) if whole(gone, b)}
    return tuple(sorted(blocks | {u for u in gone if block_of(u) not in blocks}))


def parts_in(units: Iterable[int]) -> tuple[int, ...]:
    """Those of ``units`` that are not whole blocks."""
    return tuple(unit for unit in units if part_of(unit))


def overlap(one: int, other: int) -> bool:
    """Whether one unit holds the other."""
    same = block_of(one) == block_of(other)
    return same and (one == other or not part_of(one) or not part_of(other))


def parse_unit(text: int | str) -> int:
    """A unit by its name, or as it is.

    Raises:
        InputError: no such name.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d{1,4})(?:\.(attention|mlp))?", text)
    if not match:
        raise InputError(f"'{text}' is not a unit; write for example 12, 12.attention or 12.mlp")
    return Unit.of(int(match[1]), match[2]) if match[2] else int(match[1])


def named(value: Any) -> Any:
    """Plain data of a record with the names of parts in place of their numbers."""
    if isinstance(value, dict):
        return {key: named(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [named(item) for item in value]
    return str(value) if isinstance(value, Unit) else value


def _read(value: Any) -> Any:
    """A name of a part as its number; a number that stands for itself is a block."""
    if isinstance(value, str) and "." in value:
        try:
            return parse_unit(value)
        except InputError as error:
            raise ValueError(error) from None
    if isinstance(value, int) and not isinstance(value, Unit) and value >= MAX_BLOCKS:
        raise ValueError(f"{value} is no block")
    return value


def _named(number: int) -> int:
    return Unit(number) if number >= MAX_BLOCKS else number


def _written(number: int) -> int | str:
    return str(number) if isinstance(number, Unit) else number


UnitId = Annotated[
    int,
    Field(ge=0, lt=len(PARTS) * MAX_BLOCKS),
    BeforeValidator(_read),
    AfterValidator(_named),
    PlainSerializer(_written, when_used="json"),
]
"""A unit in a file: a block is a number, a part its name."""
