"""Text to token ids: what a tokenizer puts before a text, and long texts in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sleb.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**16  # characters
TOGETHER = (
    16  # pieces: as many cores; tokenizers need about half a kilobyte a token while they work
)
MARGIN = 256  # characters on both sides of a seam that must agree
TRIES = 64


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: [BOS] or none, mostly."""
    bare = _encode(tokenizer, "a")
    full = _encode(tokenizer, "a", special=True)
    starts = range(len(full) - len(bare) + 1)
    return full[: next((i for i in starts if full[i : i + len(bare)] == bare), 0)]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that are no text: those with a role, and all that are marked so, among
    which are the ends of turns that many tokenizers name nowhere else."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *marked}


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of the whole text, without special tokens. [L] int64.

    A long text is encoded in pieces, cut only where the tokens on both sides are seen to stay the
    same; a stretch without such a place is encoded in one. Tokenizers that split text into words
    first, which nearly all do, thus give the tokens of the whole.
    """
    pieces = _pieces(tokenizer, text)
    parts = []
    while some := [text[a:b] for a, b in islice(pieces, TOGETHER)]:
        parts += [torch.tensor(ids, dtype=torch.int64) for ids in _encoded(tokenizer, some)]
    return torch.cat(parts)


def token_starts(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Where each token of :func:`encode_text` begins, in characters. [L] int64.

    Raises:
        InputError: the tokenizer does not tell.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell which tokens an assistant says: give "
            "--loss-on all"
        )
    starts = []
    for a, b in _pieces(tokenizer, text):
        encoded = tokenizer(
            text[a:b], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts.append(torch.tensor([a + start for start, _ in encoded["offset_mapping"]]))
    return torch.cat(starts)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[int, int]]:
    """Parts of a text that can be encoded by themselves: [start, stop) in characters."""
    start, near = 0, PIECE
    while len(text) - near > PIECE:
        if seam := _seam(tokenizer, text, near):
            end, resume = seam
            yield start, end
            start = near = resume
        near += PIECE
    yield start, len(text)


def _seam(tokenizer: PreTrainedTokenizerBase, text: str, near: int) -> tuple[int, int] | None:
    """Where a piece can end, and where the next one starts, soon after ``near``.

    That is before white space, or on both sides of a space that the tokenizer by itself puts
    before whatever it is given.
    """
    window = text[near : near + TRIES * MARGIN]
    for _, space in zip(range(TRIES), re.finditer(r"(?<=\S)\s", window), strict=False):
        at = near + space.start()
        whole = _encode(tokenizer, text[at - MARGIN : at + MARGIN])
        left = _encode(tokenizer, text[at - MARGIN : at])
        for resume in (at, at + 1):
            if left + _encode(tokenizer, text[resume : at + MARGIN]) == whole:
                return at, resume
    return None


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return _encoded(tokenizer, [text], special=special)[0]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = False
) -> list[list[int]]:
    """The ids of each text, encoded side by side where the tokenizer can."""
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a text longer than the model's context is what is wanted here
    )
    return cast("list[list[int]]", encoded["input_ids"])
