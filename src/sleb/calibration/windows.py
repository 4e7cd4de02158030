"""Cutting text into windows of token ids: which are scored, and which are held out."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sleb.calibration.sources import Source, parse_source, read_documents
from sleb.calibration.tokens import encode_text, opening_tokens
from sleb.core.errors import InputError
from sleb.core.plan import Calibration, SourceRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_WINDOWS", "Windows", "digest", "load_windows", "recount"]

DEFAULT_WINDOWS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """N windows of T token ids. ``source`` gives each window's index into ``names``."""

    ids: Tensor  # [N, T] int64
    source: tuple[int, ...]
    names: tuple[str, ...]
    record: Calibration

    def take(self, rows: Sequence[int]) -> Windows:
        """Some of the windows, in the order of ``rows``."""
        source = tuple(self.source[row] for row in rows)
        return replace(
            self,
            ids=self.ids[list(rows)],
            source=source,
            record=recount(self.record, self.ids[list(rows)], source),
        )

    def __add__(self, other: Windows) -> Windows:
        """These and then the windows of ``other``, which are from the same sources."""
        ids, source = torch.cat((self.ids, other.ids)), self.source + other.source
        return replace(self, ids=ids, source=source, record=recount(self.record, ids, source))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stream:
    """A source's text as one run of tokens, and how many windows fit into it."""

    source: Source
    sha256: str
    documents: int
    tokens: Tensor  # [L] int64
    windows: int


def load_windows(
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[str],
    *,
    windows: int | Literal["all"] | None,
    length: int,
    seed: int,
    heldout: int = 0,
) -> tuple[Windows, Windows | None]:
    """Windows to score, and up to ``heldout`` others that share no token of the text with them.

    A source's documents are joined by a blank line and tokenized as a whole; windows are its
    consecutive slices. Each begins with the tokens that the tokenizer itself puts before a text
    (BOS, where it does), which count towards ``length``. A seeded choice picks among more windows
    than are wanted; the chosen stay in text order, and asking for more adds to them. Sources
    share by weight, every one with at least one window.

    Args:
        tokenizer: the model's own.
        specs: values of ``--text``; the embedded text if there is none.
        windows: how many to score over all sources. ``"all"``: every window of every source,
            whatever the weights. None: all that keep to the weights, at most ``DEFAULT_WINDOWS``.
        length: tokens a window, T.
        seed: of the choice.
        heldout: how many others are wanted. There may be fewer, and None if there are none.

    Raises:
        InputError: bad numbers, text that is unusable, too short or given twice, or two sources of
            one name.
        DataError: a corrupt file.
        ResourceError: the hub cannot be reached.
    """
    opening = opening_tokens(tokenizer)
    _check_numbers(windows, length, heldout, shortest=max(2, len(opening) + 1))
    streams = [
        _stream(tokenizer, parse_source(spec), opening, length) for spec in specs or ("default",)
    ]
    _check_distinct(streams)
    shares = _scoring_shares(streams, windows, length)
    orders = [random.Random(str(seed)).sample(range(s.windows), s.windows) for s in streams]
    scored = [sorted(order[:n]) for order, n in zip(orders, shares, strict=True)]
    others = [
        sorted(order[n : n + k])
        for order, n, k in zip(orders, shares, _shares(streams, heldout), strict=True)
    ]
    return (
        _cut(streams, scored, opening, length, seed),
        _cut(streams, others, opening, length, seed) if any(others) else None,
    )


def _check_numbers(windows: int | str | None, length: int, heldout: int, *, shortest: int) -> None:
    if length < shortest:
        raise InputError(f"--length {length} is too short; give at least {shortest}")
    if isinstance(windows, int) and windows < 1:
        raise InputError(f"--windows {windows} scores nothing; give at least 1")
    if heldout < 0:
        raise InputError(f"{heldout} held-out windows are not possible; give 0 or more")


def _stream(
    tokenizer: PreTrainedTokenizerBase, source: Source, opening: list[int], length: int
) -> _Stream:
    documents = read_documents(source, tokenizer)
    text = "\n\n".join(documents)
    tokens = encode_text(tokenizer, text)
    windows = len(tokens) // (length - len(opening))
    if not windows:
        raise InputError(
            f"{source.spec} has {len(tokens)} tokens, too short for one window of {length}; "
            f"give more text or a shorter --length (at most {len(tokens) + len(opening)})"
        )
    return _Stream(
        source=source,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        documents=len(documents),
        tokens=tokens,
        windows=windows,
    )


def _check_distinct(streams: list[_Stream]) -> None:
    """One text under two sources would be held out and scored at once."""
    for i, stream in enumerate(streams):
        for other in streams[:i]:
            if stream.sha256 == other.sha256:
                raise InputError(
                    f"{other.source.spec} and {stream.source.spec} are the same text; "
                    "give it once, with @2 for twice the weight"
                )
            if stream.source.name == other.source.name:
                raise InputError(
                    f"{other.source.spec} and {stream.source.spec} are both named "
                    f"'{stream.source.name}'; name one, as in NAME={stream.source.spec}"
                )


def _shares(streams: list[_Stream], total: int) -> list[int]:
    """``total`` windows by weight, rounded by largest remainder; earlier sources win ties."""
    weights = [Fraction(stream.source.weight) for stream in streams]
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _scoring_shares(
    streams: list[_Stream], wanted: int | Literal["all"] | None, length: int
) -> list[int]:
    if wanted == "all":
        return [stream.windows for stream in streams]
    held = sum(stream.windows for stream in streams)
    total = min(DEFAULT_WINDOWS, held) if wanted is None else wanted
    candidates = (_shares(streams, n) for n in range(min(total, held), 0, -1))
    best = next((shares for shares in candidates if _fits(streams, shares)), None)
    if best and (wanted is None or sum(best) == wanted):
        return best
    advice = f"use --windows {sum(best)}" if best else "change the weights"
    for stream, share in zip(streams, _shares(streams, total), strict=True):
        if share > stream.windows:
            raise InputError(
                f"{stream.source.spec} holds {stream.windows} windows of {length} tokens, but "
                f"{share} are wanted from it; {advice}, a shorter --length, or more text"
            )
    unused = streams[_shares(streams, total).index(0)].source.spec
    raise InputError(f"--windows {total} leaves none for {unused}; raise --windows or its @weight")


def _fits(streams: list[_Stream], shares: list[int]) -> bool:
    return all(0 < n <= s.windows for s, n in zip(streams, shares, strict=True))


def _cut(
    streams: list[_Stream], picks: list[list[int]], opening: list[int], length: int, seed: int
) -> Windows:
    body = length - len(opening)
    rows = torch.cat(
        [
            stream.tokens.unfold(0, body, body)[torch.tensor(pick, dtype=torch.int64)]
            for stream, pick in zip(streams, picks, strict=True)
        ]
    )
    start = torch.tensor(opening, dtype=torch.int64).expand(len(rows), -1)
    ids = torch.cat((start, rows), dim=1)
    records = tuple(
        SourceRecord(
            spec=stream.source.spec,
            sha256=stream.sha256,
            documents=stream.documents,
            tokens=len(stream.tokens),
            windows=len(pick),
        )
        for stream, pick in zip(streams, picks, strict=True)
    )
    return Windows(
        ids=ids,
        source=tuple(i for i, pick in enumerate(picks) for _ in pick),
        names=tuple(stream.source.name for stream in streams),
        record=Calibration(
            sources=records, windows=len(ids), length=length, seed=seed, sha256=digest(ids)
        ),
    )


def recount(record: Calibration, ids: Tensor, source: tuple[int, ...]) -> Calibration:
    """The record of other windows from the same sources."""
    counted = tuple(
        known.model_copy(update={"windows": source.count(i)})
        for i, known in enumerate(record.sources)
    )
    changed = {"sources": counted, "windows": len(ids), "sha256": digest(ids)}
    return record.model_copy(update=changed)


def digest(ids: Tensor) -> str:
    """SHA-256 over the ids as little-endian int64, row by row, and then N and T likewise."""
    raw = ids.numpy().astype("<i8").tobytes()
    return hashlib.sha256(raw + struct.pack("<2q", *ids.shape)).hexdigest()
