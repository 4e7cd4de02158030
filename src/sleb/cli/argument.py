"""A parameter of a verb, as it is declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Of every command's context."""


@dataclass(frozen=True)
class Argument:
    """A parameter of a verb that is none of its configuration: by position, or with a ``flag``.
    Without a ``default`` it must be given. ``group`` is its heading in the help."""

    name: str
    help: str
    flag: str = ""
    metavar: str | None = None
    type: Any = str
    default: Any = ...
    group: str | None = None
    choices: tuple[str, ...] = ()
