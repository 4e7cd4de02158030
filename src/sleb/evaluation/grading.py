"""Whether an answer is right, where the row of its prompt says how to tell."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from sleb.core.errors import InputError, said
from sleb.evaluation.answer_checks import json_of
from sleb.evaluation.run_code import pass_all

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARK = re.compile(r"answer\s*(?:is|:)", re.IGNORECASE)


def gradable(run_code: bool) -> set[str]:
    """What a row may expect that can be graded: ``tests`` only where code may be run."""
    return {*_GRADERS, *(["tests"] if run_code else [])}


def check_expected(expected: Sequence[Mapping[str, Any]]) -> None:
    """Refuse, before there are answers, what none could be judged by.

    Raises:
        InputError: as :func:`are_right` for a schema.
    """
    are_right(expected, ["0"] * len(expected), gradable(False))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was ``expected`` of an answer, and whether each model's is right."""

    expected: dict[str, Any]
    dense: bool
    pruned: bool

    @property
    def lost(self) -> bool:
        """Whether the pruned model alone is wrong."""
        return self.dense and not self.pruned

    @property
    def won(self) -> bool:
        """Whether the pruned model alone is right."""
        return self.pruned and not self.dense


def judged(
    expected: Sequence[Mapping[str, Any]],
    before: Sequence[str],
    after: Sequence[str],
    known: Collection[str],
) -> list[Judged | None]:
    """Both models' answers judged by what is expected of each; None where that is nothing
    ``known``.

    Raises:
        InputError: see :func:`are_right`.
    """
    asked = [{key: wanted[key] for key in wanted if key in known} for wanted in expected]
    both = (are_right(asked, texts, known) for texts in (before, after))
    return [
        Judged(expected=wanted, dense=dense, pruned=pruned) if wanted else None
        for wanted, dense, pruned in zip(asked, *both, strict=True)
    ]


def are_right(
    expected: Sequence[Mapping[str, Any]], texts: Sequence[str], known: Collection[str]
) -> list[bool]:
    """Whether each text fulfils all that is expected of it and ``known``: see :func:`gradable`.

    ``answer``: a number (the first behind the last "Answer:", else the last one in the text) or a
    text (found in it as words); ``regex``: found anywhere; ``json_schema``: of the JSON that the
    text or its first fence is; ``tests``: Python that runs behind the code of the text.

    Raises:
        InputError: a schema is none, or refers to another; the network cannot be taken from code.
    """
    right = [
        all(_GRADERS[key](wanted[key], text) for key in wanted if key in _GRADERS)
        for wanted, text in zip(expected, texts, strict=True)
    ]
    if "tests" in known:
        rows = [i for i, wanted in enumerate(expected) if right[i] and "tests" in wanted]
        passed = pass_all([texts[i] for i in rows], [expected[i]["tests"] for i in rows])
        for i, good in zip(rows, passed, strict=True):
            right[i] = good
    return right


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
    try:
        value = json_of(text)
    except (ValueError, RecursionError):
        return False
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
        return bool(kind(schema, registry=Registry()).is_valid(value))  # which fetches nothing
    except (SchemaError, Unresolvable) as error:
        raise InputError(f"a json_schema is not possible: {said(error)[:200]}") from None


_GRADERS = {
    "answer": _answer,
    "regex": lambda wanted, text: re.search(wanted, text) is not None,
    "json_schema": _schema,
}
