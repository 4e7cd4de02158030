"""Where calibration text comes from: one reader per kind of text, found by suffix or prefix.

To add a kind, register a reader under a file suffix (``.csv``) or a prefix with its colon
(``s3:``)::

    @SOURCES.register(".csv")
    def read_csv(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        with open(location, newline="", encoding="utf-8") as stream:
            yield from (row["text"] for row in csv.DictReader(stream))

A reader yields documents in order, is given its location without the prefix, raises
:class:`~sleb.core.errors.InputError` for what it cannot use, and is stopped at ``MAX_BYTES``.
"""

from __future__ import annotations

import codecs
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.core.errors import DataError, InputError, did_you_mean
from sleb.core.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MAX_BYTES",
    "SOURCES",
    "Source",
    "check_sources",
    "parse_source",
    "read_documents",
    "row_text",
]

MAX_BYTES = 64 * 2**20
MAX_LINE = 2 * MAX_BYTES
DEFAULT = Path(__file__).parents[1] / "data" / "calibration.jsonl"

logger = logging.getLogger(__name__)

Reader = Callable[[str, "PreTrainedTokenizerBase"], Iterator[str]]
SOURCES: Registry[Reader] = Registry("text source")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One ``--text``, taken apart: ``[NAME=]LOCATION[@WEIGHT]``.

    ``kind`` is the reader's key in ``SOURCES``; ``location`` is what the reader gets.
    """

    spec: str
    name: str
    kind: str
    location: str
    weight: float


def parse_source(spec: str) -> Source:
    """Take a ``--text`` apart; reads nothing.

    The name is the file's stem, the hub dataset, or ``default``, unless ``NAME=`` says otherwise;
    the weight is 1. A file whose own name holds ``=`` or ``@`` is taken as it is.

    Raises:
        InputError: no reader for it, or a weight that is not a positive number.
    """
    name, location, weight = "", spec, 1.0
    if not os.path.isfile(spec):
        if named := re.fullmatch(r"([\w.-]+)=(.+)", spec):
            name, location = named.groups()
        head, _, tail = location.rpartition("@")
        if head and "/" not in tail and Path(tail).suffix not in SOURCES:
            location, weight = head, _weight(tail, spec)
    kind = _kind(location, spec)
    if kind.endswith(":"):
        location = location[len(kind) :]
        name = name or location.partition(":")[0]
    return Source(
        spec=spec, name=name or Path(location).stem, kind=kind, location=location, weight=weight
    )


def read_documents(source: Source, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The source's documents, verbatim and in order, empty rows included.

    At most the first ``MAX_BYTES`` (64 MiB of UTF-8) are read, and the last document is cut to
    fit; this is logged, and everything recorded about the source is about what was read.
    ``tokenizer`` only serves its chat template, for rows with ``messages``.

    Raises:
        InputError: missing, unreadable, not UTF-8, without text, or a row of another form.
        DataError: a corrupt file.
        ResourceError: the hub cannot be reached.
    """
    documents: list[str] = []
    room = MAX_BYTES
    try:
        for document in SOURCES[source.kind](source.location, tokenizer):
            raw = document.encode()
            if len(raw) > room:
                logger.warning("%s: only its first %d MiB are read", source.spec, MAX_BYTES >> 20)
                documents.append(raw[:room].decode(errors="ignore"))
                break
            documents.append(document)
            room -= len(raw)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source.spec} document {len(documents) + 1} is not text: it has half of a surrogate "
            "pair; remove that"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {source.spec}: {error.strerror or error}") from error
    if not any(document.strip() for document in documents):
        raise InputError(f"{source.spec} has no text; give one that is not empty")
    return documents


def row_text(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """A row's document: its ``text``, or its ``messages`` through the chat template.

    A leading BOS of the template is dropped: windows get theirs, and plain text has none between
    documents.

    Raises:
        InputError: the row has neither, or no template takes the chat; starts with ``where``.
    """
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    messages: Any = row.get("messages") if isinstance(row, dict) else None
    if not _is_chat(messages):
        raise InputError(
            f"{where} has neither a `text` string nor `messages`, a list of "
            '{"role": ..., "content": ...}; add one of them'
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"{where} is a chat, but the model's tokenizer has no chat template; "
            "give rows with `text`"
        )
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is the checkpoint's own code
        raise InputError(
            f"{where} does not fit the tokenizer's chat template ({_first_line(error)}); "
            "change its messages or remove it"
        ) from error
    return text.removeprefix(str(tokenizer.bos_token or ""))


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in messages
        )
    )


def check_sources(specs: Sequence[str]) -> None:
    """Find mistakes in ``--text`` before a model is loaded: parses all, and looks for the files.

    Raises:
        InputError: see :func:`parse_source`; or a file does not exist.
    """
    for source in map(parse_source, specs):
        if source.kind.startswith("."):
            _file(source.location)


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            f"--text {spec}: the weight '{text}' is not a positive number; write for example @2"
        )
    return weight


def _kind(location: str, spec: str) -> str:
    suffix = Path(location).suffix.lower()
    for key in (location, location.partition(":")[0] + ":", suffix):
        if key in SOURCES:
            return key
    if os.path.isdir(location):
        raise InputError(f"--text {spec} is a folder; name a file in it")
    raise InputError(
        f"--text {spec} is no text that sleb reads{did_you_mean(suffix or location, SOURCES)}; "
        f"known: {', '.join(SOURCES)}"
    )


def _file(location: str) -> Path:
    path = Path(location)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        if not path.parent.is_dir():
            raise InputError(f"no file {path}: the folder {path.parent} does not exist")
        hint = did_you_mean(path.name, os.listdir(path.parent))
        raise InputError(f"no file {path}{hint}; give the path of a text file")
    return path


def _decode(raw: bytes, location: str, *, start: int = 0, final: bool = True) -> str:
    """UTF-8, less a byte order mark; with ``final`` false a character cut at the end is dropped."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location} is not UTF-8: invalid byte at offset {start + error.start}; "
            "convert it to UTF-8"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@SOURCES.register("default")
def _read_default(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    return _read_jsonl(str(DEFAULT), tokenizer)


@SOURCES.register(".raw")
@SOURCES.register(".md")
@SOURCES.register(".txt")
def _read_txt(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with _file(location).open("rb") as stream:
        raw = stream.read(MAX_BYTES + 8)  # more than the limit by more than a cut character
    yield _decode(raw, location, final=len(raw) < MAX_BYTES + 8)


@SOURCES.register(".jsonl")
def _read_jsonl(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    start = 0
    with _file(location).open("rb") as stream:
        for number, raw in enumerate(iter(partial(stream.readline, MAX_LINE), b""), 1):
            where = f"{location} line {number}"
            if len(raw) == MAX_LINE:
                raise InputError(f"{where} is over {MAX_LINE >> 20} MiB; split it into rows")
            line = _decode(raw, location, start=start)
            start += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise InputError(f"{where} is not JSON: {reason}; correct it") from None
            yield row_text(row, tokenizer, where)


@SOURCES.register(".parquet")
def _read_parquet(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    path = _file(location)
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install 'sleb[hub]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [c for c in ("text", "messages") if c in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row_text(row, tokenizer, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's error, not the file's
            raise
        raise DataError(
            f"{path} is not a readable parquet file: {_first_line(error)}; fetch it again"
        ) from error


@SOURCES.register("hub:")
def _read_hub(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    from sleb.calibration.hub import hub_rows

    for number, row in enumerate(hub_rows(location), 1):
        yield row_text(row, tokenizer, f"hub:{location} row {number}")
