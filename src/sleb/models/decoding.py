"""Writing many texts at once from a static cache, on a GPU by a captured CUDA graph.

A decoding step of a small model is a few hundred kernels of microseconds each, and Python takes
longer to launch them than the GPU to run them. A static cache has fixed addresses, so a step can be
captured once for a batch and replayed; transformers' own ``generate`` reaches that by torch.compile
alone, which takes longer to compile than all answers to be written.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sleb.core.progress import Tick
from sleb.models.heads import likeliest, plain_head
from sleb.models.stack import decoder_config, shadowed

WARM_UP = 3
"""Steps before the capture, so that kernels have been chosen and memory is there."""
CHECK = 16
"""Steps between looks at whether all have ended, each of which waits for the GPU."""
GROUPED = "sleb-grouped"
FILLED = 32
"""A CPU attends to whole parts of so many tokens of the cache, as far as it is filled."""

Choose = Callable[[Tensor], Tensor]
"""From logits [B, V] the next tokens [B]. One with ``of(head, given [B, D])`` finds them from what
a plain head is given, see :mod:`sleb.models.heads`."""


def capturable(network: Any) -> bool:
    """Whether a step of the model has no part that depends on values: all layers attend to all
    that came before, from a static cache, and no weights are fetched. Such a step is faster on a
    CPU too, where a cache that grows is copied at each."""
    config = decoder_config(network.config)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and bool(getattr(network, "_can_compile_fullgraph", False))
        and "position_ids" in inspect.signature(network.forward).parameters
        and not any(p.device.type == "meta" for p in network.parameters())
    )


class _Greedy:
    """The most probable token of each row."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def of(self, head: nn.Linear, given: Tensor) -> Tensor:
        return likeliest(head, given)


greedy: Choose = _Greedy()


@torch.inference_mode()
def decode(
    network: Any,
    ids: Tensor,
    mask: Tensor,
    new_tokens: int,
    tick: Tick,
    choose: Choose = greedy,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Tokens [B, new_tokens] behind prompts [B, S], padded in front where ``mask`` [B, S] is 0.
    What is behind the first of ``ends`` in a row means nothing, and may be missing where all rows
    have ended. ``tick`` hears of every token. By transformers' own loop where the model is not
    :func:`capturable`; where it is, ``choose`` must be on a GPU too.
    """
    if not capturable(network):
        return _generated(network, ids, mask, new_tokens, tick, choose, ends)
    with writing(network, ids, mask, new_tokens, choose, ends) as (run, written, ended, done):
        batch, steps = len(ids), new_tokens - 1
        tick(batch * (1 + done))
        for i in range(done, steps):
            run()
            tick(batch)
            if ends and i % CHECK == 0 and bool(ended.all()):
                tick(batch * (steps - i - 1))
                break
    return written


def _generated(
    network: Any,
    ids: Tensor,
    mask: Tensor,
    new_tokens: int,
    tick: Tick,
    choose: Choose,
    ends: tuple[int, ...],
) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList

    told = 0

    def chosen(_: Tensor, scores: Tensor) -> Tensor:
        nonlocal told
        told += len(scores)
        tick(len(scores))
        return torch.full_like(scores, float("-inf")).scatter(1, choose(scores)[:, None], 0.0)

    none = int(decoder_config(network.config).vocab_size)  # else the model's own would end a row
    out: Tensor = network.generate(
        ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([chosen]),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=[*ends] or none,
            pad_token_id=ends[0] if ends else 0,
        ),
    )
    tick(len(ids) * new_tokens - told)
    return out[:, ids.shape[1] :]


@contextlib.contextmanager
def writing(
    network: Any,
    ids: Tensor,
    mask: Tensor,
    new_tokens: int,
    choose: Choose = greedy,
    ends: tuple[int, ...] = (),
) -> Iterator[tuple[Callable[[], None], Tensor, Tensor, int]]:
    """A step that writes a token of each row; all tokens [B, new_tokens], the first of them there
    already; which rows have ended [B]; and how many steps have run. See :func:`decode`."""
    from transformers import StaticCache

    (batch, start), device = ids.shape, ids.device
    total, filled = start + new_tokens, start
    of = getattr(choose, "of", None)
    head = plain_head(network) if of else None
    cache = StaticCache(config=network.config, max_cache_len=total)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = network(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    token = choose(first.logits[:, -1])[:, None].clone()
    written: Tensor = token.repeat(1, new_tokens)
    seen = torch.zeros((batch, 1, 1, total), dtype=torch.bool, device=device)
    seen[:, 0, 0, :start] = mask.bool()
    at, turn = (torch.tensor([i], device=device) for i in (start, 1))
    place = positions[:, -1:] + 1
    stops = torch.tensor(ends, dtype=token.dtype, device=device)
    ended = (token == stops).any(1)

    def step() -> None:
        nonlocal filled
        filled += 1
        seen.index_fill_(3, at, True)
        out = network(
            input_ids=token,
            attention_mask=seen,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        )
        last = out.logits[:, -1]
        token.copy_((of(head, last) if of and head else choose(last))[:, None])
        written.index_copy_(1, turn, token)
        ended.logical_or_((token == stops).any(1))
        for counter in (at, turn, place):
            counter.add_(1)

    def until() -> int:
        return total if device.type == "cuda" else -(-filled // FILLED) * FILLED

    done, run = 0, step
    given_back: dict[nn.Module, Any] = {head: lambda given: given} if head else {}
    with _grouped_attention(network, until), shadowed(given_back):
        if device.type == "cuda":
            done = min(WARM_UP, new_tokens - 1)
            run = _captured(step, done, device)
        yield run, written, ended, done


def _captured(step: Callable[[], None], warm: int, device: torch.device) -> Callable[[], None]:
    """A graph of ``step``, which has run ``warm`` times before."""
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(warm):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


@contextlib.contextmanager
def _grouped_attention(network: Any, until: Callable[[], int]) -> Iterator[None]:
    """Attention of one token a row reads a head's keys and values once for all query heads that
    share them, and none behind ``until()``. (With a mask, transformers repeats them in memory,
    several gigabytes a step.)"""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if network.config._attn_implementation != "sdpa":
        yield
        return

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        others = (more.get(name) for name in ("softcap", "s_aux", "position_bias"))
        mask = attention_mask
        if mask is None or mask.dtype != torch.bool or query.shape[2] > 1 or any(others):
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                module, query, key, value, mask, scaling=scaling, **more
            )
        batch, heads, _, width = query.shape
        end = until()
        key, value, mask = key[:, :, :end], value[:, :, :end], mask[..., :end]
        shared = query.view(batch, key.shape[1], heads // key.shape[1], width)
        scores = shared @ key.transpose(2, 3) * (scaling or width**-0.5)
        scores = scores.masked_fill(~mask, float("-inf"))
        share = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return (share @ value).view(batch, 1, heads, -1), None

    AttentionInterface.register(GROUPED, attend)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    network.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")
