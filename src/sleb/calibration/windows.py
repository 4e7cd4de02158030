"""Cutting text into windows of token ids: which are scored, and which are held out."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from sleb.calibration.rows import Chat
from sleb.calibration.sources import Source, parse_source, read_documents
from sleb.calibration.tokens import encode_text, opening_tokens, token_starts
from sleb.config import LossOn
from sleb.core.errors import InputError
from sleb.core.plan import Calibration, SourceRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_WINDOWS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """N windows of T token ids. ``source`` gives each window's index into ``names``.

    ``scored`` [N, T] says which tokens count, as the prediction of a model; by default all but the
    first. Behind a window's last one there may be padding.
    """

    ids: Tensor  # [N, T] int64
    source: tuple[int, ...]
    names: tuple[str, ...]
    record: Calibration
    scored: Tensor | None = None

    @classmethod
    def given(cls, ids: Windows | Tensor, name: str = "windows") -> Windows:
        """Token ids [N, T] of a program's own as windows; what are windows, as they are.

        Raises:
            InputError: the tensor has another form.
        """
        if isinstance(ids, Windows):
            return ids
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2 or not len(ids):
            raise InputError(
                f"a tensor of windows is of token ids [windows, tokens], not {list(ids.shape)} "
                f"{ids.dtype}"
            )
        ids = ids.detach().cpu().long()
        record = Calibration(
            sources=(written_source(name, ids, ids.numel()),),
            windows=len(ids),
            length=ids.shape[1],
            seed=0,
            sha256=digest(ids, None),
        )
        return cls(ids=ids, source=(0,) * len(ids), names=(name,), record=record)

    def take(self, rows: Sequence[int]) -> Windows:
        """Some of the windows, in the order of ``rows``."""
        source = tuple(self.source[row] for row in rows)
        scored = None if self.scored is None else self.scored[list(rows)]
        return self._with(self.ids[list(rows)], source, scored)

    @property
    def tokens(self) -> int:
        """Tokens of all windows, without padding."""
        return self.ids.numel() if self.scored is None else int(unpadded(self.scored).sum())

    @property
    def counts(self) -> Tensor:
        """How many predicted tokens of each window are scored [N]."""
        if self.scored is None:
            return torch.full((len(self.ids),), self.ids.shape[1] - 1)
        return self.scored[:, 1:].sum(1)

    def of(self, name: str) -> list[int]:
        """The windows of one source, by its name."""
        wanted = self.names.index(name) if name in self.names else -1
        return [i for i, k in enumerate(self.source) if k == wanted]

    def but(self, name: str) -> list[int]:
        """The windows of all other sources."""
        return sorted({*range(len(self.ids))} - {*self.of(name)})

    def __add__(self, other: Windows) -> Windows:
        """These and then the windows of ``other``, which are from the same sources."""
        (ids, scored), (more, too) = _as_wide(self, other)
        both = None if scored is None or too is None else torch.cat((scored, too))
        return self._with(torch.cat((ids, more)), self.source + other.source, both)

    def beside(self, other: Windows) -> Windows:
        """These and then the windows of ``other``, which are from other sources."""
        records = self.record.sources + other.record.sources
        shifted = tuple(k + len(self.names) for k in other.source)
        names = self.names + other.names
        record = self.record.model_copy(update={"sources": records})
        moved = replace(other, source=shifted, names=names, record=record)
        return replace(self, names=names, record=record) + moved

    def _with(self, ids: Tensor, source: tuple[int, ...], scored: Tensor | None) -> Windows:
        record = recount(self.record, ids, source, scored)
        return replace(self, ids=ids, source=source, scored=scored, record=record)


def _as_wide(*several: Windows) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Ids and what is scored of each, padded to the widest; None where all is scored of all."""
    wide = max(w.ids.shape[1] for w in several)
    every = all(w.scored is None and w.ids.shape[1] == wide for w in several)
    for w in several:
        missing = wide - w.ids.shape[1]
        scored = torch.ones_like(w.ids, dtype=torch.bool) if w.scored is None else w.scored
        yield pad(w.ids, (0, missing)), None if every else pad(scored, (0, missing))


def unpadded(scored: Tensor) -> Tensor:
    """Which tokens [N, T] are none of the padding behind the last one that is scored."""
    return scored.flip(1).cumsum(1).flip(1) > 0


def used_length(scored: Tensor) -> int:
    """How many tokens of windows hold all that is scored. scored [N, T]."""
    return int(scored.any(0).nonzero().max()) + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """A source as one run of tokens, which of them count (None for all), and which of the windows
    that fit into it have any that does."""

    source: Source
    sha256: str
    documents: int
    tokens: Tensor  # [L] int64
    scored: Tensor | None  # [L]
    rows: Tensor  # [windows] int64

    @property
    def windows(self) -> int:
        """How many windows it has."""
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Sources read and tokenized, from which windows of ``length`` are taken in a seeded order."""

    texts: tuple[_Text, ...]
    opening: tuple[int, ...]
    length: int
    seed: int

    @classmethod
    def read(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        specs: Sequence[str],
        *,
        length: int,
        seed: int,
        loss_on: LossOn = "all",
    ) -> Texts:
        """Read and tokenize; see :func:`load_windows`."""
        opening = opening_tokens(tokenizer)
        if length < (shortest := max(2, len(opening) + 1)):
            raise InputError(f"--length {length} is too short; give at least {shortest}")
        sources = [parse_source(spec) for spec in specs or ("default",)]
        texts = tuple(_text(tokenizer, source, opening, length, loss_on) for source in sources)
        _check_distinct(texts)
        return cls(texts=texts, opening=tuple(opening), length=length, seed=seed)

    def windows(
        self, windows: int | Literal["all"] | None, heldout: int
    ) -> tuple[Windows, Windows | None]:
        """Windows to score, and up to ``heldout`` others; see :func:`load_windows`."""
        _check_numbers(windows, heldout)
        shares = _scoring_shares(self.texts, windows, self.length)
        orders = [
            random.Random(str(self.seed)).sample(range(text.windows), text.windows)
            for text in self.texts
        ]
        scored = [sorted(order[:n]) for order, n in zip(orders, shares, strict=True)]
        others = [
            sorted(order[n : n + k])
            for order, n, k in zip(orders, shares, _shares(self.texts, heldout), strict=True)
        ]
        return self._cut(scored), self._cut(others) if any(others) else None

    def _cut(self, picks: list[list[int]]) -> Windows:
        ids = self._rows([text.tokens for text in self.texts], picks, torch.tensor(self.opening))
        scored = None
        if any(text.scored is not None for text in self.texts):
            marks = [
                torch.ones_like(text.tokens, dtype=torch.bool)
                if text.scored is None
                else text.scored
                for text in self.texts
            ]
            scored = self._rows(marks, picks, torch.zeros(len(self.opening)))
            scored[:, 0] = False  # nothing predicts it
        records = tuple(
            SourceRecord(
                spec=text.source.spec,
                sha256=text.sha256,
                documents=text.documents,
                tokens=len(text.tokens),
                windows=len(pick),
            )
            for text, pick in zip(self.texts, picks, strict=True)
        )
        return Windows(
            ids=ids,
            source=tuple(i for i, pick in enumerate(picks) for _ in pick),
            names=tuple(text.source.name for text in self.texts),
            record=Calibration(
                sources=records,
                windows=len(ids),
                length=self.length,
                seed=self.seed,
                sha256=digest(ids, scored),
            ),
            scored=scored,
        )

    def _rows(self, of: list[Tensor], picks: list[list[int]], opening: Tensor) -> Tensor:
        """Windows [N, T] of what each text has per token, each begun with ``opening``."""
        body = self.length - len(opening)
        rows = torch.cat(
            [
                row.unfold(0, body, body)[text.rows[torch.tensor(pick, dtype=torch.int64)]]
                for row, text, pick in zip(of, self.texts, picks, strict=True)
            ]
        )
        return torch.cat((opening.to(rows.dtype).expand(len(rows), -1), rows), dim=1)


def load_windows(
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[str],
    *,
    windows: int | Literal["all"] | None,
    length: int,
    seed: int,
    heldout: int = 0,
    loss_on: LossOn = "all",
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
        loss_on: with ``"answers"`` only what assistants say in chats is scored of them, and windows
            without such a token are none.

    Raises:
        InputError: bad numbers, text that is unusable, too short or given twice, or two sources of
            one name.
        DataError: a corrupt file.
        ResourceError: the hub cannot be reached.
    """
    _check_numbers(windows, heldout)
    texts = Texts.read(tokenizer, specs, length=length, seed=seed, loss_on=loss_on)
    return texts.windows(windows, heldout)


def _check_numbers(windows: int | str | None, heldout: int) -> None:
    if isinstance(windows, int) and windows < 1:
        raise InputError(f"--windows {windows} scores nothing; give at least 1")
    if heldout < 0:
        raise InputError(f"{heldout} held-out windows are not possible; give 0 or more")


def _text(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    opening: list[int],
    length: int,
    loss_on: LossOn,
) -> _Text:
    documents = read_documents(source, tokenizer)
    text = "\n\n".join(documents)
    tokens = encode_text(tokenizer, text)
    body = length - len(opening)
    scored, rows = None, torch.arange(len(tokens) // body)
    if loss_on == "answers" and any(isinstance(document, Chat) for document in documents):
        scored = _answered(documents, token_starts(tokenizer, text))
        if len(rows):
            predicted = scored.unfold(0, body, body)[:, 0 if opening else 1 :]
            rows = predicted.any(1).nonzero().flatten()
            if not len(rows):
                raise InputError(
                    f"{source.spec} has no window in which an assistant speaks: give --loss-on all"
                )
    if not len(rows):
        raise InputError(
            f"{source.spec} has {len(tokens)} tokens, too short for one window of {length}; "
            f"give more text or a shorter --length (at most {len(tokens) + len(opening)})"
        )
    return _Text(
        source=source,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        documents=len(documents),
        tokens=tokens,
        scored=scored,
        rows=rows,
    )


def _answered(documents: Sequence[str], starts: Tensor) -> Tensor:
    """Which tokens, that begin at ``starts`` [L] in the joined documents, an assistant says, or are
    of a document that is no chat. [L]"""
    scored, at = torch.zeros(len(starts), dtype=torch.bool), 0
    for document in documents:
        spans = document.answers if isinstance(document, Chat) else [(0, len(document) + 2)]
        for a, b in spans:
            first, last = torch.searchsorted(starts, torch.tensor([at + a, at + b])).tolist()
            scored[first:last] = True
        at += len(document) + 2  # the blank line
    return scored


def _check_distinct(texts: Sequence[_Text]) -> None:
    """One text under two sources would be held out and scored at once."""
    for i, text in enumerate(texts):
        for other in texts[:i]:
            if text.sha256 == other.sha256:
                raise InputError(
                    f"{other.source.spec} and {text.source.spec} are the same text; "
                    "give it once, with @2 for twice the weight"
                )
            if text.source.name == other.source.name:
                raise InputError(
                    f"{other.source.spec} and {text.source.spec} are both named "
                    f"'{text.source.name}'; name one, as in NAME={text.source.spec}"
                )


def _shares(texts: Sequence[_Text], total: int) -> list[int]:
    """``total`` windows by weight, rounded by largest remainder; earlier sources win ties."""
    weights = [Fraction(text.source.weight) for text in texts]
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _scoring_shares(
    texts: Sequence[_Text], wanted: int | Literal["all"] | None, length: int
) -> list[int]:
    if wanted == "all":
        return [text.windows for text in texts]
    held = sum(text.windows for text in texts)
    total = min(DEFAULT_WINDOWS, held) if wanted is None else wanted
    candidates = (_shares(texts, n) for n in range(min(total, held), 0, -1))
    best = next((shares for shares in candidates if _fits(texts, shares)), None)
    if best and (wanted is None or sum(best) == wanted):
        return best
    advice = f"use --windows {sum(best)}" if best else "change the weights"
    for text, share in zip(texts, _shares(texts, total), strict=True):
        if share > text.windows:
            raise InputError(
                f"{text.source.spec} holds {text.windows} windows of {length} tokens, but "
                f"{share} are wanted from it; {advice}, a shorter --length, or more text"
            )
    unused = texts[_shares(texts, total).index(0)].source.spec
    raise InputError(f"--windows {total} leaves none for {unused}; raise --windows or its @weight")


def _fits(texts: Sequence[_Text], shares: list[int]) -> bool:
    return all(0 < n <= s.windows for s, n in zip(texts, shares, strict=True))


def written_source(spec: str, ids: Tensor, tokens: int) -> SourceRecord:
    """The record of windows [N, T] that a model has written, of so many tokens without padding."""
    return SourceRecord(
        spec=spec,
        sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        documents=len(ids),
        tokens=tokens,
        windows=len(ids),
    )


def recount(
    record: Calibration, ids: Tensor, source: tuple[int, ...], scored: Tensor | None = None
) -> Calibration:
    """The record of other windows from the same sources."""
    counted = tuple(
        known.model_copy(update={"windows": source.count(i)})
        for i, known in enumerate(record.sources)
    )
    changed = {"sources": counted, "windows": len(ids), "sha256": digest(ids, scored)}
    return record.model_copy(update=changed)


def digest(ids: Tensor, scored: Tensor | None = None) -> str:
    """SHA-256 over the ids as little-endian int64, row by row, and then N and T likewise; before
    them, where not all is scored, a byte a token."""
    raw = b"" if scored is None else scored.numpy().tobytes()
    raw += ids.numpy().astype("<i8").tobytes()
    return hashlib.sha256(raw + struct.pack("<2q", *ids.shape)).hexdigest()
