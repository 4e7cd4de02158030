"""Greedy decoding of many prompts at once on a GPU, by a captured CUDA graph.

A decoding step of a small model is a few hundred kernels of microseconds each, and Python takes
longer to launch them than the GPU to run them. A static cache has fixed addresses, so a step can be
captured once for a batch and replayed; transformers' own ``generate`` reaches that by torch.compile
alone, which takes longer to compile than all answers to be written.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sleb.core.progress import Tick
from sleb.models.stack import decoder_config

WARM_UP = 3
"""Steps before the capture, so that kernels have been chosen and memory is there."""
CHECK = 16
"""Steps between looks at whether all have ended, each of which waits for the GPU."""


def capturable(network: Any, device: torch.device) -> bool:
    """Whether a step of the model has no part that depends on values: all layers attend to all
    that came before, from a static cache."""
    config = decoder_config(network.config)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        device.type == "cuda"
        and kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and bool(getattr(network, "_can_compile_fullgraph", False))
        and "position_ids" in inspect.signature(network.forward).parameters
    )


@torch.inference_mode()
def greedy(
    network: Any, ids: Tensor, mask: Tensor, new_tokens: int, ends: list[int], tick: Tick
) -> Tensor:
    """Greedy tokens [B, new_tokens] behind prompts [B, S], padded in front where ``mask`` [B, S] is
    0. What is behind the first of ``ends`` in a row means nothing. ``tick`` hears of every token.

    The model must be :func:`capturable`.
    """
    from transformers import StaticCache

    (batch, start), device = ids.shape, ids.device
    total = start + new_tokens
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
    token: Tensor = first.logits[:, -1:].argmax(-1)
    written: Tensor = token.repeat(1, new_tokens)
    seen = torch.zeros((batch, 1, 1, total), dtype=torch.bool, device=device)
    seen[:, 0, 0, :start] = mask.bool()
    at, turn = (torch.tensor([i], device=device) for i in (start, 1))
    place = positions[:, -1:] + 1
    stops = torch.tensor(ends, dtype=token.dtype, device=device)
    ended = (token == stops).any(1)

    def step() -> None:
        seen.index_fill_(3, at, True)
        out = network(
            input_ids=token,
            attention_mask=seen,
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        )
        token.copy_(out.logits[:, -1:].argmax(-1))
        written.index_copy_(1, turn, token)
        ended.logical_or_((token == stops).any(1))
        for counter in (at, turn, place):
            counter.add_(1)

    steps = new_tokens - 1
    warm = min(WARM_UP, steps)
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(warm):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    tick(batch * (1 + warm))
    if steps == warm:
        return written
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for done in range(warm, steps):
        graph.replay()
        tick(batch)
        if done % CHECK == 0 and bool(ended.all()):
            tick(batch * (steps - done - 1))
            break
    return written
