"""Rows of text and chat sets in the forms that people have: reading them, and what a model reads.

A row is of the first of these forms that it fits; a null is a field that is not there.

    text                                    plain text
    messages, conversations, conversation   turns of role/content (OpenAI) or from/value (ShareGPT)
    instruction, input, output              Alpaca: a user's turn and the assistant's
    question/answer, query/response, ...    likewise
    prompt, completion                      plain text and what follows it, or turns of both

Beside a chat, ``system`` is its first turn, ``history`` are pairs of turns before it, and ``tools``
are the definitions that a chat template shows. Parts of turns may be images: see
:mod:`sleb.calibration.row_images`. Needs no torch.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from sleb.calibration.row_images import COLUMNS, ImageFile, RowImages
from sleb.core.errors import DataError, InputError, did_you_mean, said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Suffixes of files of rows."""
MAX_ROW = 128 * 2**20
CHUNK = 2**20

CHATS = ("messages", "conversations", "conversation")
ANSWERS = {
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", "answer"),
    "input": ("output",),
}
FIELDS = (
    *("id", "json", "text", *CHATS, "prompt", "completion", "tools", "history"),
    *("system", "system_prompt", *ANSWERS, "output", "response", "answer", *COLUMNS),
)
"""All that :func:`parse_row` looks at, and what names a prompt."""
SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "system": "system",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Plain ``text`` with the ``completion`` that follows it, or a chat of ``messages``, each a
    turn with its role, its content, and whatever else a template may want of it. A content is one
    string, or, with images in it, a list of parts. Arguments of tool calls are objects."""

    text: str | None = None
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def asked(self) -> Row:
        """The row without its answer: no completion, no assistant's turns at the end."""
        turns = list(self.messages)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        return replace(self, completion="", messages=tuple(turns))

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """The images of all turns, in order."""
        contents = [turn["content"] for turn in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return tuple(part["image"] for part in parts if part["type"] == "image")


class Chat(str):
    """The text of a chat. ``answers``: where in it the assistant speaks, [start, stop) in
    characters; with what ends its turn, where the chat template opens and closes one alike.
    ``images`` are shown in it, and it stands in the row ``where``."""

    __slots__ = ("answers", "images", "where")
    answers: tuple[tuple[int, int], ...]
    images: tuple[ImageFile, ...]
    where: str


# -- what a row means ------------------------------------------------------------------------------


def parse_row(row: Any, where: str, folder: str | Path = "") -> Row:
    """What a row of a file or of the hub means; a string alone is its text. ``folder``: what paths
    of images are relative to.

    Raises:
        InputError: it is of no known form, or a turn of it is not; starts with ``where``.
    """
    if isinstance(row, str):
        return Row(text=row)
    row = {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}
    if isinstance(row.get("text"), str):
        return Row(text=row["text"])
    images = RowImages(row, folder, where)
    turns = _turns(row, where, images)
    if turns is None:
        prompt, completion = row.get("prompt"), row.get("completion", "")
        if isinstance(prompt, str) and isinstance(completion, str):
            return Row(text=prompt, completion=completion)
        has = f" (it has {', '.join(repr(str(k)[:40]) for k in [*row][:8])})" if row else ""
        raise InputError(
            f"{where} is of no form that sleb reads{has}; give `text`, "
            "`messages`, `conversations`, `instruction` and `output`, or `prompt` and `completion`"
        )
    system = row.get("system", row.get("system_prompt"))
    if isinstance(system, str) and system and turns[0].get("role") != "system":
        turns.insert(0, {"role": "system", "content": system})
    if shown := images.first():
        asking = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        asking["content"] = [*shown, *_parts(asking["content"])]
    return Row(messages=tuple(turns), tools=_tools(row.get("tools"), where))


def _turns(row: Mapping[str, Any], where: str, images: RowImages) -> list[dict[str, Any]] | None:
    """The turns of a chat; None if the row is none."""
    for field in CHATS:
        if field in row:
            return _chat(row[field], f"{where}: `{field}`", images)
    prompt, completion = row.get("prompt"), row.get("completion", [])
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        answered = _list(completion, f"{where}: `completion`")
        return _chat([*prompt, *answered], f"{where}: `prompt`", images)
    for asked, answers in ANSWERS.items():
        answer = next((row[name] for name in answers if isinstance(row.get(name), str)), None)
        # a task without its answer is a prompt; of other fields that would be a guess
        if isinstance(row.get(asked), str) and (answer is not None or asked == "instruction"):
            task = [row[asked], *([row.get("input")] if asked == "instruction" else [])]
            turns = _list(row.get("history"), f"{where}: `history`")
            if any(not isinstance(pair, list) or len(pair) != 2 for pair in turns):
                raise InputError(f"{where}: `history` is no list of pairs of texts; correct it")
            pairs = [*turns, ("\n".join(filter(None, task)), answer)]
            return [
                {"role": role, "content": _content(said, where, images)}
                for pair in pairs
                for role, said in zip(("user", "assistant"), pair, strict=True)
                if said is not None
            ]
    return None


def _chat(value: Any, where: str, images: RowImages) -> list[dict[str, Any]]:
    turns = _list(value, where)
    if not turns:
        raise InputError(f"{where} is no list of turns; give each its `role` and `content`")
    return [_turn(turn, f"{where}, turn {n}", images) for n, turn in enumerate(turns, 1)]


def _parsed(value: Any) -> Any:
    """``value``, or if that is a JSON text what it says, as some sets keep structures."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _list(value: Any, where: str) -> list[Any]:
    value = _parsed(value) or []
    if not isinstance(value, list):
        raise InputError(f"{where} is no list, nor the JSON text of one; correct it")
    return value


def _turn(turn: Any, where: str, images: RowImages) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is no object; give it a `role` and its `content`")
    nothing_said = not {"content", "value", "text"} & turn.keys()
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = _sharegpt(turn, where)
    if not isinstance(turn.get("role"), str):
        raise InputError(f"{where} has no `role`; say who speaks")
    if isinstance(turn.get("function_call"), dict):  # as the API had it before `tool_calls`
        turn["tool_calls"] = [turn.pop("function_call")]
    calls = _list(turn.pop("tool_calls", None), f"{where}: `tool_calls`")
    if calls:
        turn["tool_calls"] = [_call(call, where) for call in calls]
    elif nothing_said:
        raise InputError(f"{where} has no `content`; give it, or null for nothing")
    said = next((turn[key] for key in ("content", "value", "text") if key in turn), "")
    return {**turn, "content": _content(said, where, images)}


def _sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker, said = str(turn.pop("from")), turn.pop("value", "")
    if speaker not in SHAREGPT:
        raise InputError(
            f"{where} is from {speaker[:40]!a}{did_you_mean(speaker, SHAREGPT)}; known: "
            f"{', '.join(SHAREGPT)}"
        )
    call = _parsed(said) if speaker == "function_call" else None
    calls = call if isinstance(call, list) else [call] if isinstance(call, dict) else []
    spoken = {"content": "", "tool_calls": calls} if calls else {"content": said}
    return {**turn, "role": SHAREGPT[speaker], **spoken}


def _content(content: Any, where: str, images: RowImages) -> str | list[dict[str, Any]]:
    """What a turn says: a string, or all of its parts if images are among them."""
    if not isinstance(content, (str, list)):
        raise InputError(f"{where}: `content` is neither text nor a list of parts; correct it")
    parts: list[dict[str, Any]] = []
    for part in [content] if isinstance(content, str) else content:
        given = part if isinstance(part, dict) else {"text": part}
        if (image := images.of(given, where)) is not None:
            parts.append({"type": "image", "image": image})
            continue
        kind, text = str(given.get("type", "text")), given.get("text") or ""
        if not isinstance(text, str) or not kind.endswith("text"):
            raise InputError(
                f"{where} has a part of type {kind[:40]!a}, and sleb reads text and images; leave "
                "it out"
            )
        parts.extend(images.between(text, where))
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _said(turn: Mapping[str, Any]) -> str:
    """The text of a turn."""
    return "".join(part.get("text", "") for part in _parts(turn["content"])).strip()


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as chat templates take it: its function within it, arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without the name of a function; correct it")
    arguments = _parsed(function.get("arguments", {}))
    outer = {k: v for k, v in call.items() if v is not None and function is not call}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Definitions of tools: a list, or JSON text of it or in it; bare functions are wrapped."""
    tools = [_parsed(tool) for tool in _list(value, f"{where}: `tools`")]
    if not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: `tools` holds what is no object; give their definitions")
    return tuple({"type": "function", "function": t} if "name" in t else t for t in tools)


# -- what a model reads ----------------------------------------------------------------------------


def read_document(
    row: Any, tokenizer: PreTrainedTokenizerBase, where: str, folder: str | Path = ""
) -> str:
    """A row's whole text, through the chat template if it is a chat.

    A leading BOS of the template is dropped: windows get theirs, and plain text has none between
    documents.

    Raises:
        InputError: see :func:`parse_row` and :func:`render`.
    """
    parsed = parse_row(row, where, folder)
    text = render(parsed, tokenizer, where)
    if parsed.text is not None:
        return text
    chat = Chat(text.removeprefix(str(tokenizer.bos_token or "")))
    chat.images, chat.where = parsed.images, where
    opening = len(text) - len(chat)
    chat.answers = tuple((a - opening, b - opening) for a, b in _spoken(parsed, text, tokenizer))
    return chat


def _spoken(row: Row, text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where in the ``text`` of a chat the assistant speaks. Of turns that the template writes in
    another way once more has been said, what they say is looked for."""
    at = 0
    for n, turn in enumerate(row.messages):
        if turn["role"] != "assistant":
            continue
        asked, said = replace(row, messages=row.messages[:n]), _said(turn)
        before = _rendered(asked, tokenizer, generate=True)
        through = _rendered(replace(row, messages=row.messages[: n + 1]), tokenizer)
        if before and through and text.startswith(before) and text.startswith(through):
            at, end = len(before), len(through.rstrip())
            if before == _rendered(asked, tokenizer):  # the template opens no turn by itself
                at = max(at, text.find(said, at, end))
        else:
            at = text.find(said, at)
            end = at + len(said)
        if at < 0:
            return
        yield at, end
        at = end


def _rendered(row: Row, tokenizer: PreTrainedTokenizerBase, *, generate: bool = False) -> str:
    """A part of a chat; nothing where the template does not take it alone."""
    try:
        return render(row, tokenizer, "", generate=generate)
    except InputError:
        return ""


def render(
    row: Row, tokenizer: PreTrainedTokenizerBase, where: str, *, generate: bool = False
) -> str:
    """The text of a row; of a chat by the chat template, which with ``generate`` is asked to open
    the assistant's next turn.

    Templates disagree on the form of a turn's content (a string, or parts) and of a call's
    arguments (an object, or JSON text): the first pair counts that the template takes without
    losing all that is said.

    Raises:
        InputError: no template, or none that takes the chat; starts with ``where``.
    """
    if row.text is not None:
        return row.text + row.completion
    if not tokenizer.chat_template:
        raise InputError(
            f"{where} is a chat, but the model's tokenizer has no chat template; "
            "give rows of plain text"
        )
    spoken = [words for turn in row.messages if (words := _said(turn))]
    silent, wrong = None, None
    # a template that takes strings alone would write parts with images out as they are
    forms = (True, False) if row.images else (False, True)
    for parts, encoded in itertools.product(forms, (False, True)):
        turns = [_formed(turn, parts, encoded) for turn in row.messages]
        try:
            text = str(
                tokenizer.apply_chat_template(
                    turns,
                    tools=cast("Any", list(row.tools) or None),
                    tokenize=False,
                    add_generation_prompt=generate,
                )
            )
        except Exception as error:  # a template is the checkpoint's own code
            wrong = wrong or error
            continue
        if not spoken or any(words in text for words in spoken):
            return text
        silent = text if silent is None else silent
    if silent is not None:
        return silent
    assert wrong is not None
    raise InputError(
        f"{where} does not fit the tokenizer's chat template ({said(wrong)[:200]}); "
        "change its messages or remove it"
    ) from wrong


def _formed(turn: Mapping[str, Any], parts: bool, encoded: bool) -> dict[str, Any]:
    formed = dict(turn)
    if parts or isinstance(turn["content"], list):
        shown = _parts(turn["content"])
        formed["content"] = [{k: v for k, v in part.items() if k != "image"} for part in shown]
    if encoded and "tool_calls" in turn:
        formed["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in turn["tool_calls"]
        ]
    return formed


# -- files of rows ---------------------------------------------------------------------------------


def file_rows(location: str) -> Iterator[tuple[Any, str]]:
    """Each row of a file of one of ``ROW_FILES``, parsed, and where it stands, for messages. A
    .json file is a list of rows, an object with one, or rows one after the other.

    Raises:
        InputError: no such file, not UTF-8, not JSON, or a row of over ``MAX_ROW`` bytes.
        DataError: a corrupt archive or parquet file.
    """
    path = existing_file(location)
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
            yield from (_line_rows if lines else _json_rows)(cast(BinaryIO, stream), location)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a readable gzip file ({said(error)}); fetch it again"
        ) from None


def _line_rows(stream: BinaryIO, location: str) -> Iterator[tuple[Any, str]]:
    start = 0
    for number, raw in enumerate(iter(partial(stream.readline, MAX_ROW), b""), 1):
        where = f"{location} line {number}"
        if len(raw) == MAX_ROW:
            raise InputError(f"{where} is over {MAX_ROW >> 20} MiB; split it into rows")
        line = decode(raw, location, start=start)
        start += len(raw)
        if not line.strip():
            continue
        try:
            yield json.loads(line), where
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from None


def _json_rows(stream: BinaryIO, location: str) -> Iterator[tuple[Any, str]]:
    """Rows of a JSON text, read as far as they are asked for."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, more, count, ended = "", CHUNK, 0, False
    listed: bool | None = None
    while True:
        text = text.lstrip(" \t\r\n," if count else " \t\r\n")
        if listed is None and text:
            listed = text[0] == "["
            text = text[1:] if listed else text
            continue
        try:
            if listed and text.startswith("]"):
                return
            row, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            where = f"{location} row {count + 1}"
            if ended and not text and not listed:
                return
            if ended:
                raise _not_json(where, error) from None
            if len(text) > MAX_ROW:
                raise InputError(f"{where} is over {MAX_ROW >> 20} MiB; split it") from None
            raw = stream.read(more)
            try:
                text += utf8.decode(raw, not raw)
            except UnicodeDecodeError:
                raise InputError(f"{location} is not UTF-8; convert it to UTF-8") from None
            ended, more = not raw, 2 * more
            continue
        text, more, count = text[end:], CHUNK, count + 1
        lists = [v for v in row.values() if isinstance(v, list)] if isinstance(row, dict) else []
        if not listed and count == 1 and len(lists) == 1 and not {*row} & {*FIELDS}:
            yield from ((r, f"{location} row {n}") for n, r in enumerate(lists[0], 1))
            return
        yield row, f"{location} row {count}"


def _not_json(where: str, error: Exception) -> InputError:
    return InputError(f"{where} is not JSON: {getattr(error, 'msg', error)}; correct it")


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in FIELDS]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield without_nulls(row), f"{path} row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's error, not the file's
            raise
        raise DataError(
            f"{path} is not a readable parquet file: {said(error)}; fetch it again"
        ) from error


def without_nulls(value: Any) -> Any:
    """``value`` without the nulls that columns of structs are filled with where a row's object
    lacks a field that another's has; a turn that says nothing says so."""
    if isinstance(value, dict):
        said = {"content", "value"} if {"role", "from"} & value.keys() else set()
        items = ((k, v) for k, v in value.items() if v is not None or k in said)
        return {key: without_nulls(item) for key, item in items}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def existing_file(location: str) -> Path:
    """Raise InputError, with what may have been meant, unless there is such a file."""
    path = Path(location)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"no file {path}: the folder {path.parent} does not exist")
        hint = did_you_mean(path.name, os.listdir(path.parent))
        raise InputError(f"no file {path}{hint}; give the path of a file")
    return path


def decode(raw: bytes, location: str, *, start: int = 0, final: bool = True) -> str:
    """UTF-8, less a byte order mark; with ``final`` false a character cut at the end is dropped."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location} is not UTF-8: invalid byte at offset {start + error.start}; "
            "convert it to UTF-8"
        ) from None
