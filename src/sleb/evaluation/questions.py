"""A user's own questions: a .jsonl file, checked line by line, and the harness's task made of it.

The forms of a row are in docs/tasks.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sleb.core.errors import InputError, did_you_mean
from sleb.core.jsonl import numbered_lines

__all__ = ["Question", "Questions", "read_questions"]

MAX_BYTES = 64 * 2**20
IGNORED = (r"^\s+", r"[\s.。]+$")
"""What does not count in an answer: space around it, and full stops at its end."""
_HINT = (
    'a row is {"question": ..., "choices": [...], "answer": 0} '
    'or {"question": ..., "answer": "..."}'
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item. ``text`` is all that the model reads before the answer. With ``choices``,
    ``answers`` is the right one alone; else every text that is accepted. ``where``: its id, or its
    line."""

    where: str
    text: str
    choices: tuple[str, ...] | None
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A file of questions of one kind. ``delimiter`` stands between text and choice."""

    name: str
    path: Path
    delimiter: str
    items: tuple[Question, ...]

    def task(self, tokenizer: Any) -> dict[str, Any]:
        """The task's definition in the terms of lm-evaluation-harness.

        Choices get its two accuracies. An answer in words is generated greedily up to the end of
        the line, or until it is clearly longer than all accepted ones in this ``tokenizer``.
        """
        choose = self.items[0].choices is not None
        rows = [_chosen(item) if item.choices else _written(item) for item in self.items]

        def dataset(**_: Any) -> Any:
            from datasets import Dataset

            return {"test": Dataset.from_list(rows)}

        shared = {
            "task": self.name,
            "custom_dataset": dataset,
            "test_split": "test",
            # names of columns, which the harness takes as they are; templates it would interpret
            "doc_to_text": "text",
            "doc_to_target": "answer",
            "target_delimiter": self.delimiter,
            "num_fewshot": 0,
        }
        mean = {"aggregation": "mean", "higher_is_better": True}
        if choose:
            return shared | {
                "output_type": "multiple_choice",
                "doc_to_choice": "choices",
                "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
            }
        answers = [answer for item in self.items for answer in item.answers]
        longest = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids)
        exact = {"ignore_case": True, "regexes_to_ignore": list(IGNORED)}
        return shared | {
            "output_type": "generate_until",
            # a cut-off answer must not match, and other tokens may spell the same text
            "generation_kwargs": {
                "until": ["\n"],
                "max_gen_toks": 2 * longest + 8,
                "do_sample": False,
            },
            "metric_list": [{"metric": "exact_match", **mean, **exact}],
        }


def _chosen(item: Question) -> dict[str, Any]:
    choices = list(item.choices or ())
    answer = choices.index(item.answers[0])
    return {"where": item.where, "text": item.text, "choices": choices, "answer": answer}


def _written(item: Question) -> dict[str, Any]:
    return {"where": item.where, "text": item.text, "answer": list(item.answers)}


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | int | None = None
    context: str | None = None
    question: str | None = None
    prompt: str | None = None
    choices: list[str] | None = None
    answer: int | str | list[str] = Field()


def read_questions(path: str | Path) -> Questions:
    """Read questions from a .jsonl file, a row a line; blank lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, no questions, a row of another form or of another kind
            than the first, an answer that is impossible, or an id used twice.
    """
    path = Path(path)
    items: dict[str, Question] = {}
    kind: tuple[bool, bool] | None = None
    for number, line in numbered_lines(path, "questions", ".jsonl", MAX_BYTES):
        at = f"{path}:{number}"
        row = _row(line, at)
        own = (row.choices is not None, row.prompt is not None)
        kind = kind or own
        if own != kind:
            raise InputError(
                f"{at}: {_kind(own)}, and the rows before are {_kind(kind)}; make a file of each"
            )
        where = f"line {number}" if row.id is None else str(row.id)
        if where in items:
            raise InputError(f"{at}: id '{where}' was there before; give each its own")
        items[where] = Question(
            where=where,
            text=_text(row, at),
            choices=None if row.choices is None else tuple(row.choices),
            answers=_answers(row, at),
        )
    if kind is None:
        raise InputError(f"{path} has no questions; {_HINT}")
    delimiter, found = _spaced(items.values()) if kind == (True, True) else (" ", items.values())
    return Questions(name=path.stem, path=path, delimiter=delimiter, items=tuple(found))


def _spaced(items: Collection[Question]) -> tuple[str, Iterable[Question]]:
    """A space that every choice begins with, made the delimiter: acc_norm is by characters of the
    choice, and the harness does not count a delimiter."""
    if not all(c.startswith(" ") for item in items for c in item.choices or ()):
        return "", items
    return " ", (
        replace(
            item,
            choices=tuple(c[1:] for c in item.choices or ()),
            answers=tuple(a[1:] for a in item.answers),
        )
        for item in items
    )


def _row(line: str, at: str) -> _Row:
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()
        return _Row.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{at}: {_mistake(error)}; {_HINT}") from None
    except UnicodeEncodeError:
        raise InputError(f"{at}: not text: it has half of a surrogate pair; remove that") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{at}: not JSON ({getattr(error, 'msg', error)}); {_HINT}") from None


def _mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return "not an object"
    field = str(first["loc"][0])
    if field == "answer" and first["type"] != "missing":
        return "`answer` is the number of a choice, a text, or a list of texts"
    if first["type"] == "extra_forbidden":
        return f"there is no `{field}`{did_you_mean(field, _Row.model_fields)}"
    return f"`{field}`: {first['msg'].lower()}"


def _kind(kind: tuple[bool, bool]) -> str:
    choose, prompt = kind
    answer = "choices" if choose else "answers in words"
    return f"{answer} after a {'prompt' if prompt else 'question'}"


def _text(row: _Row, at: str) -> str:
    if (row.question is None) == (row.prompt is None):
        both = "neither `question` nor" if row.question is None else "both `question` and"
        raise InputError(f"{at}: it has {both} `prompt`; {_HINT}")
    if row.prompt is not None:
        if row.context is not None:
            raise InputError(f"{at}: a `prompt` is read as it is; put the `context` into it")
        if not row.prompt.strip():
            raise InputError(f"{at}: the prompt is empty; write one or remove the row")
        return row.prompt
    question = (row.question or "").strip()
    if not question:
        raise InputError(f"{at}: the question is empty; write one or remove the row")
    context = f"{row.context.strip()}\n\n" if row.context and row.context.strip() else ""
    return f"{context}Question: {question}\nAnswer:"


def _answers(row: _Row, at: str) -> tuple[str, ...]:
    if row.choices is not None:
        return (_choice(row.choices, row.answer, at),)
    if isinstance(row.answer, int):
        raise InputError(
            f'{at}: answer {row.answer} is a number, and there are no choices to count: write "'
            f'{row.answer}" for an answer in words'
        )
    answers = (row.answer,) if isinstance(row.answer, str) else tuple(row.answer)
    if not answers:
        raise InputError(f"{at}: no answer is accepted; give at least one")
    for answer in answers:
        if not _counting(answer):
            raise InputError(f"{at}: answer {answer!r} has nothing to compare; write it out")
        if len(answer.strip().splitlines()) > 1:
            raise InputError(
                f"{at}: an accepted answer has several lines, and a model's is read to the end of "
                "its first line; ask for something shorter"
            )
    return answers


def _choice(choices: Sequence[str], answer: int | str | list[str], at: str) -> str:
    if len(choices) < 2:
        raise InputError(f"{at}: {len(choices)} choices; give at least 2")
    for i, choice in enumerate(choices):
        if not choice.strip():
            raise InputError(f"{at}: choice {i} is empty; write one or remove it")
        if choice in choices[:i]:
            raise InputError(f"{at}: two choices are {choice!r}; make them differ")
    if isinstance(answer, list):
        raise InputError(f"{at}: one choice is right; give its number, counted from 0")
    if isinstance(answer, str):
        if answer not in choices:
            raise InputError(
                f"{at}: answer {answer!r} is none of the choices; give its number, from 0"
            )
        return answer
    if not 0 <= answer < len(choices):
        raise InputError(
            f"{at}: answer {answer} is out of range: choices are counted from 0 to "
            f"{len(choices) - 1}"
        )
    return choices[answer]


def _counting(answer: str) -> str:
    for ignored in IGNORED:
        answer = re.sub(ignored, "", answer)
    return answer
