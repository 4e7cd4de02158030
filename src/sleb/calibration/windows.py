"""Cutting text into windows of token ids: which are scored, and which are held out."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sleb.calibration.images import Images, row_key
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
    first. Behind a window's last one there may be padding. Where an image is, there are negative
    numbers in place of ids: see :mod:`sleb.calibration.images`.
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
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window, without padding."""
        if self.scored is None:
            return [self.ids.shape[1]] * len(self.ids)
        return [int(n) for n in unpadded(self.scored).sum(1)]

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
        ids, scored = _together([(self.ids, self.scored), (other.ids, other.scored)])
        return self._with(ids, self.source + other.source, scored)

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


def _together(several: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Ids [N, T] and what is scored of all, padded to the widest; None where all is scored."""
    wide = max(ids.shape[1] for ids, _ in several)
    every = all(scored is None and ids.shape[1] == wide for ids, scored in several)
    rows, marks = [], []
    for ids, scored in several:
        missing = (0, wide - ids.shape[1])
        if scored is None:
            scored = torch.ones_like(ids, dtype=torch.bool)
        rows.append(pad(ids, missing))
        marks.append(pad(scored, missing))
    return torch.cat(rows), None if every else torch.cat(marks)


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

    def cut(self, pick: Sequence[int], opening: Tensor, body: int) -> tuple[Tensor, Tensor | None]:
        """Windows [N, T], each ``opening`` and ``body`` tokens, and which of these count."""
        rows = self.rows[torch.tensor(pick, dtype=torch.int64)]
        ids = self.tokens.unfold(0, body, body)[rows]
        scored = None
        if self.scored is not None:
            scored = _opened(torch.zeros_like(opening) > 0, self.scored.unfold(0, body, body)[rows])
        return _opened(opening, ids), scored


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """A source of rows with images: each that has something to score is a window."""

    source: Source
    sha256: str
    documents: int
    tokens: Tensor  # [L] int64, of all rows, without what stands for images
    rows: Sequence[str]
    images: Images
    tokenizer: PreTrainedTokenizerBase
    loss_on: LossOn

    @property
    def windows(self) -> int:
        """How many windows it has."""
        return len(self.rows)

    def cut(self, pick: Sequence[int], opening: Tensor, body: int) -> tuple[Tensor, Tensor | None]:
        """Windows [N, T], the rest of shorter ones padding, and which tokens count."""
        found = [self._window(self.rows[i], opening) for i in pick]
        ids = pad_sequence([row for row, _ in found] or [opening], batch_first=True)[: len(pick)]
        scored = pad_sequence([row for _, row in found] or [opening > 0], batch_first=True)
        return ids, scored[: len(pick)]

    def _window(self, row: str, opening: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(row, Chat) and row.images:
            ids, said = self.images.read(row)
        else:
            tokens, said = encode_text(self.tokenizer, row), torch.zeros_like(opening) > 0
            starts = token_starts(self.tokenizer, row)
            ids, said = torch.cat((opening, tokens)), torch.cat((said, _answered([row], starts)))
        scored = said if self.loss_on == "answers" else ids >= 0
        scored[0] = False  # nothing predicts it
        if not scored.any():
            raise InputError(f"{self.source.spec} has a row in which nothing is to be scored")
        return ids, scored


def _opened(opening: Tensor, rows: Tensor) -> Tensor:
    return torch.cat((opening.to(rows.dtype).expand(len(rows), -1), rows), dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Sources read and tokenized, from which windows of ``length`` are taken in a seeded order."""

    texts: tuple[_Text | _Rows, ...]
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
        images: Images | None = None,
    ) -> Texts:
        """Read and tokenize; see :func:`load_windows`."""
        opening = opening_tokens(tokenizer)
        if length < (shortest := max(2, len(opening) + 1)):
            raise InputError(f"--length {length} is too short; give at least {shortest}")
        sources = [parse_source(spec) for spec in specs or ("default",)]
        read = partial(_text, tokenizer, opening=opening, length=length, loss_on=loss_on)
        texts = tuple(read(source, images=images) for source in sources)
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
        opening = torch.tensor(self.opening, dtype=torch.int64)
        body = self.length - len(opening)
        cut = [text.cut(pick, opening, body) for text, pick in zip(self.texts, picks, strict=True)]
        ids, scored = _together(cut)
        if scored is not None:
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
                length=ids.shape[1],
                seed=self.seed,
                sha256=digest(ids, scored),
            ),
            scored=scored,
        )


def load_windows(
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[str],
    *,
    windows: int | Literal["all"] | None,
    length: int,
    seed: int,
    heldout: int = 0,
    loss_on: LossOn = "all",
    images: Images | None = None,
) -> tuple[Windows, Windows | None]:
    """Windows to score, and up to ``heldout`` others that share no token of the text with them.

    A source's documents are joined by a blank line and tokenized as a whole; windows are its
    consecutive slices. Each begins with the tokens that the tokenizer itself puts before a text
    (BOS, where it does), which count towards ``length``. A seeded choice picks among more windows
    than are wanted; the chosen stay in text order, and asking for more adds to them. Sources
    share by weight, every one with at least one window.

    Of a source with images in it, each row is a window, whatever its length; images are not scored.

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
        images: what reads rows with images, of the loaded model that they are for.

    Raises:
        UnsupportedModel: there are images, and they cannot go into the model.
        InputError: bad numbers, text that is unusable, too short or given twice, or two sources of
            one name.
        DataError: a corrupt file.
        ResourceError: the hub cannot be reached.
    """
    _check_numbers(windows, heldout)
    texts = Texts.read(tokenizer, specs, length=length, seed=seed, loss_on=loss_on, images=images)
    return texts.windows(windows, heldout)


def _check_numbers(windows: int | str | None, heldout: int) -> None:
    if isinstance(windows, int) and windows < 1:
        raise InputError(f"--windows {windows} scores nothing; give at least 1")
    if heldout < 0:
        raise InputError(f"{heldout} held-out windows are not possible; give 0 or more")


def _text(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    *,
    opening: list[int],
    length: int,
    loss_on: LossOn,
    images: Images | None,
) -> _Text | _Rows:
    documents = read_documents(source, tokenizer)
    text = "\n\n".join(documents)
    tokens = encode_text(tokenizer, text)
    shown = [document for document in documents if isinstance(document, Chat) and document.images]
    if shown:
        return _rows(tokenizer, source, documents, tokens, loss_on, images)
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


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    documents: Sequence[str],
    tokens: Tensor,
    loss_on: LossOn,
    images: Images | None,
) -> _Rows:
    """A source with images in it.

    Raises:
        InputError: images are not read here, or there is nothing to score.
    """
    if images is None:
        raise InputError(
            f"{source.spec} has rows with images, and here only text is read: leave them out"
        )
    _ = images.processor  # says why not before rows are looked at
    said = [d for d in documents if d.strip() and (not isinstance(d, Chat) or d.answers)]
    rows = said if loss_on == "answers" else [d for d in documents if d.strip()]
    if not rows:
        raise InputError(
            f"{source.spec} has no row in which an assistant speaks: give --loss-on all"
        )
    found = hashlib.sha256("\n\n".join(documents).encode())
    for document in documents:
        if isinstance(document, Chat) and document.images:
            found.update(str(row_key(document)).encode())
    return _Rows(
        source=source,
        sha256=found.hexdigest(),
        documents=len(documents),
        tokens=tokens,
        rows=rows,
        images=images,
        tokenizer=tokenizer,
        loss_on=loss_on,
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


def _check_distinct(texts: Sequence[_Text | _Rows]) -> None:
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


def _shares(texts: Sequence[_Text | _Rows], total: int) -> list[int]:
    """``total`` windows by weight, rounded by largest remainder; earlier sources win ties."""
    weights = [Fraction(text.source.weight) for text in texts]
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _scoring_shares(
    texts: Sequence[_Text | _Rows], wanted: int | Literal["all"] | None, length: int
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


def _fits(texts: Sequence[_Text | _Rows], shares: list[int]) -> bool:
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
