"""Prompts of the user's own: read from a file, and turned into a model's tokens."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sleb.calibration.rows import (
    ANSWERS,
    FIELDS,
    ROW_FILES,
    Row,
    decode,
    existing_file,
    file_rows,
    parse_row,
    render,
)
from sleb.core.errors import InputError

MAX_BYTES = 64 * 2**20
EXPECTED: dict[str, Any] = {
    "answer": (int, float, str),
    "regex": str,
    "json_schema": dict,
    "tests": str,
}
"""Fields of a row that say how to tell a right answer, and their types."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a file of prompts: plain ``text``, or the turns of a chat with its ``tools``, an
    ``id``, whether ``json`` is wanted, and what is ``expected`` of a right answer: see
    :mod:`sleb.evaluation.grading`. ``file``: where it is from, of several."""

    id: str
    text: str | None
    messages: tuple[dict[str, Any], ...] | None
    json: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    expected: dict[str, Any] = field(default_factory=dict)
    file: str = ""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """What was said, as (role, text); a plain text has no role."""
        if self.messages is None:
            return (("", self.text or ""),)
        return tuple((str(turn.get("role", "")), _said(turn)) for turn in self.messages)


def _said(turn: dict[str, Any]) -> str:
    """A turn as text: what is none of it, such as an image or a call of a tool, by its name."""
    content, calls = turn.get("content"), turn.get("tool_calls")
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    texts = [str(part.get("text", f"[{part.get('type')}]")) for part in parts]
    return "\n".join([*texts, *([json.dumps(calls, ensure_ascii=False)] if calls else [])]).strip()


@dataclass(frozen=True, kw_only=True)
class Read:
    """A prompt as a model reads it: its text, through the chat template if it is a chat, and its
    token ids."""

    text: str
    ids: list[int]


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Read prompts from a file of rows, or from a .txt file, a plain prompt a line.

    A row is a string alone, or of any form of :mod:`sleb.calibration.rows`; an answer that it has
    is left out. Where wanted it has an ``id`` (else it is ``line 7``), ``"json": true`` if the
    answer has to be JSON, and how to tell a right one: ``answer`` (a number or a text), ``regex``,
    ``json_schema`` or ``tests`` (Python). In rows of question and answer, the answer is the text
    that was left out.

    Raises:
        InputError: no such file, not UTF-8, no prompts, a row of another form, or an id used twice.
        DataError: a corrupt file.
    """
    prompts: dict[str, Prompt] = {}
    for found, where in _rows(Path(path)):
        row = found if isinstance(found, dict) else {}
        name = str(where.removeprefix(f"{path} ") if row.get("id") is None else row["id"])
        if name in prompts:
            raise InputError(f"{where}: id '{name}' was there before; give each its own")
        prompts[name] = _prompt(name, parse_row(found, where).asked, row, where)
    if not prompts:
        raise InputError(f"{path} has no prompts; give at least one")
    return tuple(prompts.values())


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    name = path.name.lower()
    if not name.endswith((*ROW_FILES, ".txt")):
        raise InputError(
            f"{path} is no file of prompts; give a {', '.join(ROW_FILES)} or .txt file"
        )
    if existing_file(str(path)).stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB; give fewer prompts")
    if not name.endswith(".txt"):
        return file_rows(str(path))
    lines = decode(path.read_bytes(), str(path)).split("\n")
    return ((line.strip(), f"{path} line {n}") for n, line in enumerate(lines, 1) if line.strip())


def _expected(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What a row says of a right answer.

    Raises:
        InputError: it is no number, text, expression, schema or code.
    """
    reference = {asked for asked, answers in ANSWERS.items() if "answer" in answers} & row.keys()
    wanted = {k: row[k] for k in EXPECTED if row.get(k) is not None}
    if reference:
        wanted.pop("answer", None)
    for key, value in wanted.items():
        if not isinstance(value, EXPECTED[key]) or isinstance(value, bool):
            raise InputError(f"{where}: `{key}` is not possible; see the documentation of prompts")
    if "regex" in wanted:
        try:
            re.compile(wanted["regex"])
        except re.error as error:
            raise InputError(f"{where}: `regex` is none ({error}); correct it") from None
    return wanted


def _prompt(name: str, asked: Row, row: dict[str, Any], where: str) -> Prompt:
    wants_json = row.get("json") or False
    if not isinstance(row.get("id", ""), (str, int, type(None))) or not isinstance(
        wants_json, bool
    ):
        raise InputError(f"{where}: `id` is a text or a number, and `json` true or false")
    # other fields are a data set's own, but this one would be missed
    for key in {*map(str, row)} - {*FIELDS}:
        if difflib.get_close_matches(key, ["json"], cutoff=0.75):
            raise InputError(f"{where}: there is no `{key}`; did you mean `json`?")
    if asked.text is not None and not asked.text.strip():
        raise InputError(f"{where}: the prompt is empty; write one or remove the row")
    if asked.images:
        raise InputError(f"{where} shows an image, and prompts are text alone; remove the row")
    if asked.text is None and not asked.messages:
        raise InputError(f"{where}: no turn asks for anything; give a user's, or remove the row")
    prompt = Prompt(
        id=name,
        text=asked.text,
        messages=asked.messages or None,
        json=wants_json or "json_schema" in row,
        tools=asked.tools,
        expected=_expected(row, where),
    )
    try:
        json.dumps(vars(prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: not text: it has half of a surrogate pair; remove that"
        ) from None
    return prompt


def read_as(tokenizer: Any, prompts: Sequence[Prompt], ref: str | Path) -> list[Read]:
    """Each prompt as the model ``ref`` with this ``tokenizer`` reads it; a chat is asked for the
    assistant's next turn, and plain text is a user's turn where there is a chat template.

    Raises:
        InputError: a chat, and no chat template, or none that takes it; a prompt without tokens.
    """
    read = []
    for prompt in prompts:
        if prompt.text is not None and tokenizer.chat_template:
            turns = ({"role": "user", "content": prompt.text},)
            prompt = replace(prompt, text=None, messages=turns)
        row = Row(text=prompt.text, messages=prompt.messages or (), tools=prompt.tools)
        text = render(row, tokenizer, f"{ref}: prompt '{prompt.id}'", generate=True)
        # a template writes the special tokens itself; its warnings of length are not ours
        special = prompt.text is not None
        ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        if not ids:
            raise InputError(f"prompt '{prompt.id}' has no tokens in {ref}; remove it")
        read.append(Read(text=text, ids=ids))
    return read
