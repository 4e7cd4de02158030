"""Self-generated calibration text: what the model writes itself, to fit a repair on beside the
user's.

A fit on a few kinds of text alone forgets the others. What a language model samples resembles all
that it was trained on, so some of it in the fit keeps more of that, and costs nothing on the user's
own text (docs/quality.md has the figures). Related: data-free calibration of quantizers (LLM-QAT,
2305.17888, section 3.1) and of pruning (self-calibration, 2410.17170).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sleb.calibration.split import SHARE, joined
from sleb.calibration.tokens import opening_tokens, special_tokens
from sleb.calibration.windows import Windows
from sleb.core.errors import DataError, InputError
from sleb.core.process_group import group
from sleb.core.progress import Progress, Tick
from sleb.models.decoding import decode
from sleb.models.heads import drawn, room_for, sampled
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack, decoder_config
from sleb.selection.resources import room_bytes

PIECE = 512
"""Tokens that are written in one go. Longer windows are put together from several, as windows of
the user's text are of documents: all begin at once, and there are few steps to wait for."""
HOT = 1.3
"""The temperature of every third piece, 1 that of the others: it strays further from what the model
has read most, into other scripts for one (docs/quality.md)."""
CACHE = 2**30
"""Bytes of keys and values that are held at most, where that is not a GPU."""
PROMPT_TOKENS = 128
"""Tokens of a prompt that the model writes itself, at most."""


def can_generate(stack: BlockStack) -> bool:
    """Whether the model writes at a bearable speed. Where blocks are offloaded, every token
    would read all of them."""
    return not stack.streamed


def with_self_generated(model: LoadedModel, windows: Windows, progress: Progress) -> Windows:
    """``windows`` and behind them half as many that the model has written.

    Raises:
        InputError: it cannot write.
        DataError: what it predicts is NaN or infinite.
    """
    if not can_generate(model.stack):
        raise InputError(
            f"{model.source.ref} cannot write text to fit on, since every token would read all "
            "blocks that are not in the device's memory: leave out self_generated=True"
        )
    n = len(windows.ids) // (SHARE - 1)
    record = windows.record
    return joined(windows, write(model, n, record.length, record.seed, progress)) if n else windows


@torch.inference_mode()
def write(model: LoadedModel, n: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Samples [n, length] on the CPU, each with what the tokenizer puts before a text. Every other
    piece begins with a random word, as those that begin alike are of few kinds, and every third is
    sampled at a higher temperature."""
    device = model.stack.input_device
    opening = opening_tokens(model.tokenizer)
    room = length - len(opening)
    piece = min(room, PIECE)
    pieces = -(-n * room // piece)
    heat = torch.ones(pieces, 1, device=device)
    heat[2::3] = HOT
    stage = progress.stage("writing text", pieces * (piece - 1))
    with stage as tick, seeded(seed, device):
        parts, starts = [], _starts(model, opening, pieces, seed).to(device)
        together = at_once(model.stack, piece)
        for prompts, heats in zip(
            torch.split(starts, together), torch.split(heat, together), strict=True
        ):
            parts.append(_continued(model, prompts, heats, piece, tick)[:, -piece:].cpu())
    text = torch.cat(parts).flatten()[: n * room].view(n, room)
    ids = torch.cat((torch.tensor(opening, dtype=text.dtype).expand(n, -1), text), 1)
    group().from_first_(ids)
    return ids


def _starts(model: LoadedModel, opening: list[int], n: int, seed: int) -> Tensor:
    """What each piece begins with [n, S]: the same, but for the last token, the first of its text.
    Half of these are sampled after the beginning of a text, if the tokenizer knows one.

    Raises:
        DataError: what it predicts is NaN or infinite.
    """
    tokenizer, network = model.tokenizer, model.model
    draw = random.Random(f"own {seed}")
    special = special_tokens(tokenizer)
    words = [t for t in range(len(tokenizer)) if t not in special]
    begin = opening or [first for first in (tokenizer.bos_token_id,) if first is not None]
    firsts = torch.tensor([draw.choice(words) for _ in range(n)])
    ids = torch.tensor([begin or words[:1]], device=model.stack.input_device)
    logits = network(input_ids=ids, use_cache=False).logits[0, -1].float()
    share = logits[torch.tensor(words, device=logits.device)].softmax(0)
    if share.isnan().any():
        raise DataError(
            f"{model.source.ref} cannot write text to fit on, since its scores of the next token "
            "are NaN or infinite: try --dtype float32, or --no-repair"
        )
    if begin:
        sampled = torch.multinomial(share, len(firsts[::2]), replacement=True).cpu()
        firsts[::2] = torch.tensor(words)[sampled]
    return torch.cat((torch.tensor(begin, dtype=firsts.dtype).expand(n, -1), firsts[:, None]), 1)


def _continued(model: LoadedModel, prompts: Tensor, heat: Tensor, piece: int, tick: Tick) -> Tensor:
    """Prompts [B, S] and behind them ``piece`` - 1 tokens, sampled at temperatures ``heat``
    [B, 1]; none ends its text."""
    network: Any = model.model
    ends = network.generation_config.eos_token_id
    never = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=prompts.device)
    choose = Sampler(heat, never.long())
    new = decode(network, prompts, torch.ones_like(prompts), piece - 1, tick, choose)
    return torch.cat((prompts, new), 1)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While this is open, random numbers are those of ``seed``; then they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Sampler:
    """Samples tokens at temperatures ``heat`` [B, 1] or [1, 1], none of those in ``never``."""

    def __init__(self, heat: Tensor, never: Tensor | None = None) -> None:
        none = torch.empty(0, dtype=torch.long, device=heat.device)
        self._heat, self._never = heat, none if never is None else never
        self._room: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """From logits [B, V] the next tokens [B]."""
        share = (logits.float() / self._heat).index_fill(1, self._never, float("-inf")).softmax(-1)
        if share.device.type == "cpu":  # one random number a row; a GPU adds up in any order
            return drawn(share, torch.rand(len(share), 1))
        # the largest of p / Exp(1) is a sample of p, without a look at the values
        return (share / torch.empty_like(share).exponential_()).argmax(-1)

    def of(self, head: nn.Linear, given: Tensor) -> Tensor:
        """See :class:`sleb.models.decoding.Choose`."""
        if self._room is None or len(self._room) != len(given):
            self._room = room_for(head, len(given))
        return sampled(head, given, self._heat, self._never.tolist(), self._room)


@torch.inference_mode()
def write_prompts(model: LoadedModel, n: int, seed: int, progress: Progress) -> list[str]:
    """Up to ``n`` prompts that a model of chats writes itself, as what a user would say: sampled
    behind what its template puts before a user's turn (Magpie, 2406.08464, section 2)."""
    tokenizer, device, mark = model.tokenizer, model.stack.input_device, "USER"
    turn = [{"role": "user", "content": mark}]
    before, _, _ = tokenizer.apply_chat_template(turn, tokenize=False).partition(mark)
    opening = tokenizer(before, add_special_tokens=False).input_ids
    if not opening:
        return []
    ends = tuple(special_tokens(tokenizer))
    ids = torch.tensor([opening], device=device).expand(n, -1)
    choose, tokens = Sampler(torch.ones(1, 1, device=device)), PROMPT_TOKENS
    stage = progress.stage("writing prompts", n * tokens)
    with stage as tick, seeded(seed, device):
        new = decode(model.model, ids, torch.ones_like(ids), tokens, tick, choose, ends)
    group().from_first_(new)
    found = dict.fromkeys(
        tokenizer.decode(row[:stop]).strip()
        for row in new.tolist()
        if (stop := next((k for k, token in enumerate(row) if token in ends), 0))
    )
    return [text for text in found if text]


def at_once(stack: BlockStack, length: int) -> int:
    """Sequences to write together: with another number, other tokens are sampled."""
    config = decoder_config(stack.model.config)
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = getattr(config, "num_key_value_heads", None) or heads
    wide = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    each = 2 * length * shared * wide * len(stack) * stack.dtype.itemsize // group().tp
    room = room_bytes(stack) if stack.input_device.type == "cuda" else CACHE
    return max(1, room // max(1, each))
