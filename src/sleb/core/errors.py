"""What can go wrong, as one small tree. The command line turns each branch into an exit code.

    SlebError                    1   (never raised itself)
    ├── InputError               2   a path, option, text or plan that cannot be used as given
    ├── VerificationFailed       3   a checkpoint did not pass its gates
    ├── UnsupportedModel         4   the model cannot be cut exactly; the message says why
    ├── DataError                5   a file is corrupt, or a computation gave NaN or inf
    └── ResourceError            6   disk full, out of memory, hub not reachable

Ctrl-C ends with 130. Any other exception is a bug and ends with 1 and a traceback.
Every message is one line: what is wrong, where, and what to do next. What it quotes from files is
made visible (:mod:`sleb.core.printable`), and a very long message loses its middle.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sleb.core.printable import LONGEST_MESSAGE, printable

if TYPE_CHECKING:  # runtimes in interpreters of their own have this module, and no pydantic
    from pydantic import ValidationError

Kinds = type[Exception] | tuple[type[Exception], ...]


SHELL: ContextVar[bool] = ContextVar("shell", default=False)
"""Whether messages are for somebody who types commands. Else options have Python's names."""


class SlebError(Exception):
    """Base of all errors that a user can cause or meet. ``exit_code`` is the process status."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = re.sub(r"\s*\n\s*", " ", message.strip())  # other libraries write paragraphs
        super().__init__(printable(line, LONGEST_MESSAGE, ending=400))


class InputError(SlebError):
    """Something the user gave cannot be used as it is."""

    exit_code = 2


class VerificationFailed(SlebError):
    """A gate did not pass; nothing that depends on it was written."""

    exit_code = 3


class UnsupportedModel(SlebError):
    """The model's structure or configuration cannot be cut exactly."""

    exit_code = 4


class DataError(SlebError):
    """Corrupt or truncated file, or a NaN or infinite result."""

    exit_code = 5


class ResourceError(SlebError):
    """The machine or the network could not provide what was needed."""

    exit_code = 6


SAID = "\0"
"""In a message of :func:`map_exceptions`: what the other library says."""


@contextmanager
def map_exceptions(*table: tuple[Kinds, type[SlebError], str]) -> Iterator[None]:
    """Turn the exceptions of other libraries into one line and an exit code: by the first row of
    ``table`` whose types fit, into an error of its class with its message, in which :data:`SAID` is
    replaced by what the exception says.

    Errors of this module go through as they are; so does a want of memory, which callers deal with.
    """
    try:
        yield
    except (SlebError, MemoryError):
        raise
    except Exception as error:
        for kinds, kind, message in table:
            if isinstance(error, kinds) and not out_of_memory(error):
                raise kind(message.replace(SAID, said(error))) from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is about memory; torch raises several, some of which only say so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("allocate memory", "out of memory"))


def said(error: BaseException) -> str:
    """What another library's error says, on one line: its first, and the second if the first
    announces it; its type if it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:400]


def first_mistake(error: ValidationError) -> str:
    """Where pydantic found the first thing wrong in a file, and what."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word, `` (did you mean 'cosine'?)``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def changes(now: Mapping[str, Any], was: Mapping[str, Any]) -> list[str]:
    """What differs between settings, as ``seed: 1, was 0``. Values are JSON's; of those that are
    SHA-256, only that the content differs."""

    def shown(settings: Mapping[str, Any], name: str) -> str:
        value = settings.get(name)
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return value if isinstance(value, str) else "none" if value is None else json.dumps(value)

    found = []
    for name in dict.fromkeys([*now, *was]):
        new, old = shown(now, name), shown(was, name)
        if new != old:
            hashed = all(re.fullmatch("[0-9a-f]{64}", value) for value in (new, old))
            found.append(f"{name}: other content" if hashed else f"{name}: {new}, was {old}")
    return found
