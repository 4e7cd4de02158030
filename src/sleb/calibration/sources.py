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

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sleb.calibration.hub import hub_rows
from sleb.calibration.rows import (
    ROW_FILES,
    Chat,
    decode,
    existing_file,
    file_rows,
    read_document,
    without_nulls,
)
from sleb.core.errors import InputError, did_you_mean
from sleb.core.memory import PREFIX, rows_of
from sleb.core.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BYTES = 64 * 2**20
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
        spec=spec,
        name=name or (Path(location).name[: -len(kind)] if kind.startswith(".") else kind),
        kind=kind,
        location=location,
        weight=weight,
    )


def read_documents(source: Source, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The source's documents, verbatim and in order, empty rows included.

    At most the first ``MAX_BYTES`` (64 MiB of UTF-8, and of images that are in the rows) are read,
    and the last document is cut to fit; this is logged, and everything recorded about the source is
    about what was read.
    ``tokenizer`` only serves its chat template, for rows that are chats.

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
            shown = document.images if isinstance(document, Chat) else ()
            size = len(raw) + sum(len(image) for image in shown if isinstance(image, bytes))
            if size > room:
                logger.warning("%s: only its first %d MiB are read", source.spec, MAX_BYTES >> 20)
                documents += [] if shown else [raw[:room].decode(errors="ignore")]
                break
            documents.append(document)
            room -= size
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


def check_sources(specs: Sequence[str]) -> None:
    """Find mistakes in ``--text`` before a model is loaded: parses all, and looks for the files.

    Raises:
        InputError: see :func:`parse_source`; or a file does not exist.
    """
    for source in map(parse_source, specs):
        if source.kind.startswith("."):
            existing_file(source.location)


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
    twice = "".join(Path(location).suffixes[-2:]).lower()
    for key in (location, location.partition(":")[0] + ":", twice, suffix):
        if key in SOURCES:
            return key
    if os.path.isdir(location):
        raise InputError(f"--text {spec} is a folder; name a file in it")
    raise InputError(
        f"--text {spec} is no text that sleb reads{did_you_mean(suffix or location, SOURCES)}; "
        f"known: {', '.join(SOURCES)}"
    )


def _read_rows(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for row, where in file_rows(location):
        yield read_document(row, tokenizer, where, Path(location).parent)


for _suffix in ROW_FILES:
    SOURCES.register(_suffix)(_read_rows)


@SOURCES.register("default")
def _read_default(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    return _read_rows(str(DEFAULT), tokenizer)


@SOURCES.register(".raw")
@SOURCES.register(".md")
@SOURCES.register(".txt")
def _read_txt(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with existing_file(location).open("rb") as stream:
        raw = stream.read(MAX_BYTES + 8)  # more than the limit by more than a cut character
    yield decode(raw, location, final=len(raw) < MAX_BYTES + 8)


@SOURCES.register(PREFIX)
def _read_memory(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, row in enumerate(rows_of(location), 1):
        yield read_document(row, tokenizer, f"text {number}")


@SOURCES.register("hub:")
def _read_hub(location: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, row in enumerate(hub_rows(location), 1):
        yield read_document(without_nulls(row), tokenizer, f"hub:{location} row {number}")
