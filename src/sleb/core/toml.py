"""Reading TOML that a person wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sleb.core.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # its name before it became part of Python

MAX_BYTES = 2**20
LIMITS_HINT = "a file of limits has lines such as: perplexity.max_ratio = 1.2"


def read_toml(path: str | Path, hint: str) -> dict[str, Any]:
    """The file's tables. ``hint`` ends the message if there is no file.

    Raises:
        InputError: missing, too large, not UTF-8 or not TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file at {path}; {hint}")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a settings file")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    return values


def replace_value(values: dict[str, Any], setting: str) -> None:
    """Put ``TABLE.NAME=VALUE`` into the values of a file. VALUE is written as in the file; a text
    may lack its quotes.

    Raises:
        InputError: it is no such assignment.
    """
    key, equals, text = setting.partition("=")
    *tables, name = key.strip().split(".")
    if not equals or not all((*tables, name)):
        raise InputError(f"--set {setting!r} is no setting; write for example search.remove=3")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {setting!r}: {table} is no table of the file")
    try:
        values[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[name] = text.strip()
