"""A user's own questions: a .jsonl file, checked line by line, and the harness's task made of it.

The forms of a row are in docs/tasks.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from sleb.calibration.rows import file_rows
from sleb.core.errors import InputError, did_you_mean

IGNORED = (r"^\s+", r"[\s.。]+$")
"""What does not count in an answer: space around it, and full stops at its end."""
_HINT = (
    'a row is {"question": ..., "choices": [...], "answer": 0} '
    'or {"question": ..., "answer": "..."}'
)


class Question(BaseModel):
    """One row, checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str | int | None = None
    context: str | None = None
    question: str | None = None
    prompt: str | None = None
    choices: list[str] | None = None
    answer: int | str | list[str]

    @property
    def text(self) -> str:
        """All that the model reads before the answer."""
        if self.prompt is not None:
            return self.prompt
        context = f"{self.context.strip()}\n\n" if self.context and self.context.strip() else ""
        return f"{context}Question: {(self.question or '').strip()}\nAnswer:"

    @property
    def answers(self) -> tuple[str, ...]:
        """The right choice alone, or every text that is accepted."""
        if self.choices is not None and isinstance(self.answer, int):
            return (self.choices[self.answer],)
        return tuple(self.answer) if isinstance(self.answer, list) else (str(self.answer),)

    @property
    def kind(self) -> str:
        """What all rows of a file must have in common."""
        answer = "answers in words" if self.choices is None else "choices"
        return f"{answer} after a {'question' if self.prompt is None else 'prompt'}"

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if (self.question is None) == (self.prompt is None):
            raise ValueError("give either `question` or `prompt`")
        if not (self.question or self.prompt or "").strip():
            raise ValueError("the question is empty; write one or remove the row")
        if self.prompt is not None and self.context is not None:
            raise ValueError("a `prompt` is read as it is; put the `context` into it")
        self._check_words() if self.choices is None else self._check_choices(self.choices)
        return self

    def _check_choices(self, choices: Sequence[str]) -> None:
        if len(choices) < 2 or len({*choices}) < len(choices) or not all(map(str.strip, choices)):
            raise ValueError("`choices` are two or more different texts, none of them empty")
        if isinstance(self.answer, list):
            raise ValueError("one choice is right: `answer` is its number, counted from 0")
        if isinstance(self.answer, str) and self.answer not in choices:
            raise ValueError(f"`answer` {self.answer!r} is none of the choices; give its number")
        if isinstance(self.answer, int) and not 0 <= self.answer < len(choices):
            raise ValueError(f"`answer` {self.answer} is not between 0 and {len(choices) - 1}")

    def _check_words(self) -> None:
        if isinstance(self.answer, int):
            raise ValueError(f'without choices to count, write `answer` as "{self.answer}"')
        if not self.answers:
            raise ValueError("`answer` accepts nothing; give at least one text")
        for answer in self.answers:
            if not re.sub("|".join(IGNORED), "", answer):
                raise ValueError(f"`answer` {answer!r} has nothing to compare; write it out")
            if len(answer.strip().splitlines()) > 1:
                raise ValueError(
                    "`answer` has several lines, and a model's is read to the end of its first "
                    "line; ask for something shorter"
                )


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A file of questions of one kind, by their ids or lines."""

    name: str
    items: dict[str, Question]

    def answer_tokens(self, tokenizer: Any) -> int:
        """The most that is written of an answer in words: clearly more than any accepted one has;
        0 where there are choices."""
        answers = [answer for q in self.items.values() if not q.choices for answer in q.answers]
        longest = map(
            len, tokenizer(answers, add_special_tokens=False).input_ids if answers else ()
        )
        return 2 * max(longest) + 8 if answers else 0

    def task(self, tokenizer: Any) -> dict[str, Any]:
        """The task's definition in the terms of lm-evaluation-harness.

        Choices get its two accuracies. An answer in words is generated greedily up to the end of
        the line, or until it is clearly longer than all accepted ones in this ``tokenizer``.
        """
        first = next(iter(self.items.values()))
        choices = [choice for item in self.items.values() for choice in item.choices or ()]
        # a space that every choice begins with is made the delimiter: acc_norm is by characters of
        # the choice, and the harness does not count a delimiter
        spaced = first.prompt is not None and all(c.startswith(" ") for c in choices)
        rows = [_row(where, item, int(spaced)) for where, item in self.items.items()]

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
            "target_delimiter": " " if spaced or first.prompt is None or not choices else "",
            "num_fewshot": 0,
        }
        mean = {"aggregation": "mean", "higher_is_better": True}
        if choices:
            return shared | {
                "output_type": "multiple_choice",
                "doc_to_choice": "choices",
                "metric_list": [{"metric": name, **mean} for name in ("acc", "acc_norm")],
            }
        exact = {"ignore_case": True, "regexes_to_ignore": list(IGNORED)}
        return shared | {
            "output_type": "generate_until",
            # a cut-off answer must not match, and other tokens may spell the same text
            "generation_kwargs": {
                "until": ["\n"],
                "max_gen_toks": self.answer_tokens(tokenizer),
                "do_sample": False,
            },
            "metric_list": [{"metric": "exact_match", **mean, **exact}],
        }


def _row(where: str, item: Question, skipped: int) -> dict[str, Any]:
    """A row of the harness's data set; of choices without so many characters at their start."""
    if item.choices is None:
        return {"where": where, "text": item.text, "answer": list(item.answers)}
    choices = [choice[skipped:] for choice in item.choices]
    answer = item.choices.index(item.answers[0])
    return {"where": where, "text": item.text, "choices": choices, "answer": answer}


def read_questions(path: str | Path) -> Questions:
    """Read questions from a .jsonl file, a row a line; blank lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, no questions, a row of another form or of another kind
            than the first, an answer that is impossible, or an id used twice.
    """
    items: dict[str, Question] = {}
    kind = None
    for found, at in file_rows(str(path)):
        item = _checked(found, at)
        kind = kind or item.kind
        if item.kind != kind:
            raise InputError(f"{at}: {item.kind}, and rows before are {kind}; make a file of each")
        where = at.removeprefix(f"{path} ") if item.id is None else str(item.id)
        if where in items:
            raise InputError(f"{at}: id '{where}' was there before; give each its own")
        items[where] = item
    if not items:
        raise InputError(f"{path} has no questions; {_HINT}")
    return Questions(name=Path(path).stem, items=items)


def _checked(row: Any, at: str) -> Question:
    try:
        json.dumps(row, ensure_ascii=False).encode()
        return Question.model_validate(row)
    except UnicodeEncodeError:
        raise InputError(
            f"{at} is not text: it has half of a surrogate pair; remove that"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        said = f"`{field}`: {first['msg'].lower()}" if field else first["msg"].partition(", ")[2]
        if first["type"] == "model_type":
            said = "not an object"
        elif field == "answer" and first["type"] != "missing":
            said = "`answer` is the number of a choice, a text, or a list of texts"
        elif first["type"] == "extra_forbidden":
            said = f"there is no `{field}`{did_you_mean(field, Question.model_fields)}"
        raise InputError(f"{at}: {said}; {_HINT}") from None
