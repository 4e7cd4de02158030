"""Whether an answer is right, where the row of its prompt says how to tell."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from sleb.calibration.rows import first_line
from sleb.core.errors import InputError

_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARK = re.compile(r"answer\s*(?:is|:)", re.IGNORECASE)


def is_right(expected: Mapping[str, Any], text: str) -> bool | None:
    """Whether ``text`` fulfils all that is ``expected``: ``answer``, a number (the first behind the
    last "Answer:", else the last one in the text) or a text (found in it as words); ``regex``,
    found anywhere; ``json_schema``, of the JSON that the text or its first fence is. None where
    nothing is expected that is known here; ``tests`` are run by the caller, if at all.

    Raises:
        InputError: the schema is none, or refers to another.
    """
    found = [_JUDGES[key](wanted, text) for key, wanted in expected.items() if key in _JUDGES]
    return all(found) if found else None


def _answer(wanted: float | str, text: str) -> bool:
    if isinstance(wanted, str) and not _NUMBER.fullmatch(wanted.strip()):
        words = rf"(?<!\w){re.escape(_folded(wanted))}(?!\w)"
        return re.search(words, _folded(text)) is not None
    wanted = float(str(wanted).replace(",", ""))
    text = unicodedata.normalize("NFKC", text)
    marked = _MARK.split(text)
    numbers = _NUMBER.findall(marked[-1] if len(marked) > 1 else text)
    if not numbers:
        return False
    said = float(numbers[0 if len(marked) > 1 else -1].replace(",", ""))
    return math.isclose(said, wanted, rel_tol=1e-9, abs_tol=1e-6)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _schema(schema: Mapping[str, Any], text: str) -> bool:
    fenced = _FENCE.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
        return bool(kind(schema, registry=Registry()).is_valid(value))  # which fetches nothing
    except (SchemaError, Unresolvable) as error:
        raise InputError(f"a json_schema is not possible: {first_line(error)[:200]}") from None


_JUDGES = {
    "answer": _answer,
    "regex": lambda wanted, text: re.search(wanted, text) is not None,
    "json_schema": _schema,
}
