"""Text to token ids: what a tokenizer puts before a text, and long texts in bounded memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**20  # characters; tokenizers need about half a kilobyte a token while they work
MARGIN = 256  # characters on both sides of a seam that must agree
TRIES = 64


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: [BOS] or none, mostly."""
    bare = _encode(tokenizer, "a")
    full = _encode(tokenizer, "a", special=True)
    starts = range(len(full) - len(bare) + 1)
    return full[: next((i for i in starts if full[i : i + len(bare)] == bare), 0)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of the whole text, without special tokens. [L] int64.

    A long text is encoded in pieces, cut only where the tokens on both sides are seen to stay the
    same; a stretch without such a place is encoded in one. Tokenizers that split text into words
    first, which nearly all do, thus give the tokens of the whole.
    """
    pieces: list[Tensor] = []
    start, near = 0, PIECE
    while len(text) - near > PIECE:
        if seam := _seam(tokenizer, text, near):
            end, resume = seam
            pieces.append(torch.tensor(_encode(tokenizer, text[start:end]), dtype=torch.int64))
            start = near = resume
        near += PIECE
    pieces.append(torch.tensor(_encode(tokenizer, text[start:]), dtype=torch.int64))
    return torch.cat(pieces)


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
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a text longer than the model's context is what is wanted here
    )
    return cast("list[int]", encoded["input_ids"])
