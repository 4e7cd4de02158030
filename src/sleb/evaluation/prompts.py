"""Prompts of the user's own: read from a file, and turned into a model's tokens."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.calibration.rows import (
    FIELDS,
    ROW_FILES,
    Row,
    decode,
    existing_file,
    file_rows,
    parse_row,
    render,
)
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError
from sleb.core.progress import Progress, silent
from sleb.models.load import load_config, load_tokenizer
from sleb.models.source import quiet_transformers, resolve
from sleb.models.stack import decoder_config

MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a file of prompts: plain ``text``, or the turns of a chat with its ``tools``, an
    ``id``, and whether ``json`` is wanted."""

    id: str
    text: str | None
    messages: tuple[dict[str, Any], ...] | None
    json: bool = False
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Read:
    """A prompt as a model reads it: its text, through the chat template if it is a chat, and its
    token ids."""

    text: str
    ids: list[int]


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Read prompts from a file of rows, or from a .txt file, a plain prompt a line.

    A row is a string alone, or of any form of :mod:`sleb.calibration.rows`; an answer that it has
    is left out. Where wanted it has an ``id`` (else it is ``line 7``), and ``"json": true`` if the
    answer has to be JSON.

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
    if asked.text is None and not asked.messages:
        raise InputError(f"{where}: no turn asks for anything; give a user's, or remove the row")
    prompt = Prompt(
        id=name,
        text=asked.text,
        messages=asked.messages or None,
        json=wants_json,
        tools=asked.tools,
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
    assistant's next turn.

    Raises:
        InputError: a chat, and no chat template, or none that takes it; a prompt without tokens.
    """
    read = []
    with quiet_transformers():
        for prompt in prompts:
            row = Row(text=prompt.text, messages=prompt.messages or (), tools=prompt.tools)
            text = render(row, tokenizer, f"{ref}: prompt '{prompt.id}'", generate=True)
            # a template writes the special tokens itself
            ids = tokenizer(text, add_special_tokens=prompt.text is not None).input_ids
            if not ids:
                raise InputError(f"prompt '{prompt.id}' has no tokens in {ref}; remove it")
            read.append(Read(text=text, ids=ids))
    return read


def read_alike(
    refs: tuple[str | Path, str | Path],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[Read]:
    """The prompts as both models read them. Loads no weights, so mistakes in either model and in
    any prompt are found before the first answer.

    Raises:
        InputError: see :func:`read_as`; the tokenizers differ, or a prompt with its answer is
            longer than a model reads.
        UnsupportedModel, DataError, ResourceError: not a model, or a corrupt one.
    """
    folders = [resolve(ref, progress).path for ref in refs]
    for folder in folders:
        Checkpoint.open(folder)
    configs = [load_config(path, trust_remote_code=trust_remote_code) for path in folders]
    tokenizers = [load_tokenizer(path, trust_remote_code=trust_remote_code) for path in folders]
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if ours != theirs:
        raise InputError(
            f"{refs[0]} and {refs[1]} have different tokenizers (of {len(ours)} and {len(theirs)} "
            "tokens); give a checkpoint that was made from this model"
        )
    read, again = (
        read_as(*each) for each in zip(tokenizers, (prompts, prompts), refs, strict=True)
    )
    limits = [getattr(decoder_config(c), "max_position_embeddings", None) for c in configs]
    room = min((limit for limit in limits if limit), default=None)
    for prompt, one, other in zip(prompts, read, again, strict=True):
        if one != other:
            raise InputError(
                f"{refs[0]} and {refs[1]} read prompt '{prompt.id}' differently; give both the "
                "same chat template and tokenizer settings"
            )
        if room is not None and len(one.ids) + max_new_tokens > room:
            raise InputError(
                f"prompt '{prompt.id}' takes {len(one.ids)} of the {room} tokens that the model "
                f"reads, and --new-tokens {max_new_tokens} do not fit; shorten it, or lower that"
            )
    return read
