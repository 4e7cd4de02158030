"""Files that a person wrote, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sleb.core.errors import InputError

__all__ = ["numbered_lines"]


def numbered_lines(path: Path, kind: str, forms: str, max_bytes: int) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1. ``kind`` is what they are, and ``forms``
    what files of them may be, for messages.

    Raises:
        InputError: no such file, one of more than ``max_bytes``, not UTF-8, or not readable.
    """
    if not path.is_file():
        raise InputError(f"no file of {kind} at {path}; give a {forms} file")
    if path.stat().st_size > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes >> 20} MiB; give fewer {kind}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: invalid byte at offset {error.start}; convert it to UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()
