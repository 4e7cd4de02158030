"""Prompts of the user's own: read from a file, and turned into a model's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError
from sleb.core.jsonl import numbered_lines
from sleb.core.progress import Progress, silent
from sleb.models.load import load_config, load_tokenizer
from sleb.models.source import quiet_transformers, resolve
from sleb.models.stack import decoder_config

__all__ = ["Prompt", "Read", "read_alike", "read_as", "read_prompts"]

MAX_BYTES = 64 * 2**20
_HINT = 'a row is {"prompt": ...} or {"messages": [...]}, with "id" and "json" if wanted'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A line of prompts.jsonl: ``prompt`` (plain text) or ``messages`` (chat), an ``id``, and
    whether ``json`` is wanted."""

    id: str
    text: str | None
    messages: tuple[dict[str, str], ...] | None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Read:
    """A prompt as a model reads it: its text, through the chat template if it is a chat, and its
    token ids."""

    text: str
    ids: list[int]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Turn(_Strict):
    role: str
    content: str


class _Row(_Strict):
    id: str | int | None = None
    prompt: str | None = None
    messages: list[_Turn] | None = Field(default=None, min_length=1)
    wants_json: bool = Field(default=False, alias="json")


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Read prompts from a .jsonl file, a row a line, or from a .txt file, a plain prompt a line.

    A row is ``{"prompt": "..."}`` or ``{"messages": [{"role": "user", "content": "..."}]}``, where
    wanted with an ``id`` (else it is ``line 7``) and with ``"json": true`` if the answer has to be
    JSON; or it is a string alone. Blank lines are passed over.

    Raises:
        InputError: no such file, not UTF-8, no prompts, a row of another form, or an id used twice.
    """
    path = Path(path)
    prompts: dict[str, Prompt] = {}
    for number, line in _lines(path):
        row = _row(line, f"{path}:{number}") if path.suffix == ".jsonl" else _Row(prompt=line)
        name = f"line {number}" if row.id is None else str(row.id)
        if name in prompts:
            raise InputError(f"{path}:{number}: id '{name}' was there before; give each its own")
        turns = row.messages and tuple(turn.model_dump() for turn in row.messages)
        prompts[name] = Prompt(
            id=name, text=row.prompt, messages=turns or None, json=row.wants_json
        )
    if not prompts:
        raise InputError(f"{path} has no prompts; give at least one")
    return tuple(prompts.values())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"{path} is no file of prompts; give a .jsonl or .txt file")
    return numbered_lines(path, "prompts", ".jsonl or .txt", MAX_BYTES)


def _row(line: str, where: str) -> _Row:
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()
        row = _Row.model_validate({"prompt": found} if isinstance(found, str) else found)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise InputError(f"{where}: {field}{first['msg']}; {_HINT}") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: not text: it has half of a surrogate pair; remove that"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise InputError(f"{where}: not JSON ({reason}); {_HINT}") from None
    if (row.prompt is None) == (row.messages is None):
        both = "both `prompt` and" if row.messages else "neither `prompt` nor"
        raise InputError(f"{where}: it has {both} `messages`; {_HINT}")
    if row.prompt is not None and not row.prompt.strip():
        raise InputError(f"{where}: the prompt is empty; write one or remove the row")
    return row


def read_as(tokenizer: Any, prompts: Sequence[Prompt], ref: str | Path) -> list[Read]:
    """Each prompt as the model ``ref`` with this ``tokenizer`` reads it; a chat is asked for the
    assistant's next turn.

    Raises:
        InputError: a chat, and no chat template, or none that takes it; a prompt without tokens.
    """
    read = []
    with quiet_transformers():
        for prompt in prompts:
            text = prompt.text if prompt.text is not None else _rendered(tokenizer, prompt, ref)
            # a template writes the special tokens itself
            ids = tokenizer(text, add_special_tokens=prompt.text is not None).input_ids
            if not ids:
                raise InputError(f"prompt '{prompt.id}' has no tokens in {ref}; remove it")
            read.append(Read(text=text, ids=ids))
    return read


def _rendered(tokenizer: Any, prompt: Prompt, ref: str | Path) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"prompt '{prompt.id}' is a chat, but the tokenizer of {ref} has no chat template; "
            "give rows with `prompt`"
        )
    turns = [dict(turn) for turn in prompt.messages or ()]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is the checkpoint's own code
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"prompt '{prompt.id}' does not fit the chat template of {ref} ({reason[:200]}); "
            "change its messages or remove it"
        ) from error


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
