"""Texts of a program's own: each has a name that stands for it where a file's would."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from sleb.core.errors import InputError

PREFIX = "memory:"
_FILE = re.compile(r".*\.(txt|md|raw|json|jsonl|parquet)(\.gz)?(@[\d.]+)?", re.IGNORECASE)
_KEPT: dict[str, list[Any]] = {}


def as_specs(given: Any) -> tuple[str, ...]:
    """What ``text`` may be: names as on the command line; or a text, texts, chats (lists of turns,
    or rows with ``messages``) or a ``datasets.Dataset``, for which there is one name then.

    A string is a text if it holds white space and is no file. An empty tuple is the default, an
    embedded sample.

    Raises:
        InputError: it is none of these, or another empty collection.
    """
    if given is None:
        return ()
    if isinstance(given, (str, os.PathLike)):
        given = [given]
    if not isinstance(given, Iterable):
        raise InputError(
            "text is a file, a text, several of these, chats or a dataset, and no "
            f"{type(given).__name__}"
        )
    items = list(given)
    if not items and given != ():
        raise InputError("text is empty; give some, or leave it out for the embedded sample")
    names = [os.fspath(item) for item in items if _is_name(item)]
    if len(names) == len(items):
        return tuple(names)
    if names:
        raise InputError(f"text has names of files ({names[0]}) and texts: give one kind of them")
    return (kept(items),)


def _is_name(item: Any) -> bool:
    if isinstance(item, os.PathLike):
        return True
    if not isinstance(item, str):
        return False
    return not re.search(r"\s", item) or bool(_FILE.fullmatch(item)) or os.path.isfile(item)


def kept(rows: Iterable[Any]) -> str:
    """The name of these texts, chats or rows, as long as the process lives.

    Raises:
        InputError: a row is none of these.
    """
    found = []
    for row in rows:
        if isinstance(row, (list, tuple)):
            row = {"messages": list(row)}
        if not isinstance(row, (str, dict)):
            raise InputError(
                f"a text is a string, a chat or a row of a dataset, and no {type(row).__name__}"
            )
        found.append(row)
    text = json.dumps(found, ensure_ascii=False, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
    _KEPT[name] = found
    return f"{PREFIX}{name}"


def rows_of(name: str) -> list[Any]:
    """What is kept by a name, without its prefix.

    Raises:
        InputError: nothing is.
    """
    if name not in _KEPT:
        raise InputError(
            f"{PREFIX}{name} stood for texts of another process: give these texts again"
        )
    return _KEPT[name]
