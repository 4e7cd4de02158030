"""Prompt latency and generation, dense against cut, taking turns within one process.

What a cut could reach at best comes from models of other depths than those judged: a line through
the times of all blocks, half and a quarter of them gives the time of one block and of everything
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Run
from shapes import Size, shortened

__all__ = ["against_line", "generated", "latency"]

REFERENCE = {"10%": 1.12, "20%": 1.26}
"""Speed-ups that SLEB's paper gives for these shares of blocks removed."""

Seconds = dict[str, list[float]]
"""Of every turn, by model."""


def removed(blocks: int) -> dict[str, frozenset[int]]:
    """What is left out of so many blocks: 10 and 20 %, rounded up and spread evenly; and for the
    line the last half and three quarters."""
    found = {}
    for name, share in (("10%", 0.1), ("20%", 0.2)):
        n = int(np.ceil(share * blocks - 1e-9))
        found[name] = frozenset(int(i) for i in np.linspace(1, blocks - 2, n).round())
    for name, depth in (("half", blocks // 2), ("quarter", max(1, blocks // 4))):
        found[name] = frozenset(range(depth, blocks))
    return found


def latency(
    run: Run,
    row: dict[str, Any],
    model: Any,
    vocab: int,
    size: Size,
    batches: Sequence[int],
    generate: Sequence[int],
) -> None:
    """Prompts of ``size.prompt`` tokens, single steps from a CUDA graph, and whole generations that
    begin with ``size.start`` tokens. The models share their weights."""
    start, new_tokens = size.start, size.new_tokens
    models = {"dense": model}
    for name, gone in removed(model.config.num_hidden_layers).items():
        models[name] = shortened(model, gone)
    row["blocks"] = {name: m.config.num_hidden_layers for name, m in models.items()}
    row["cases"] = {}

    def add(
        name: str, batch: int, tokens: int, need: float, work: Callable[[torch.Tensor], Seconds]
    ) -> None:
        ids = torch.randint(0, vocab, (batch, tokens), device=run.device)
        case = row["cases"][name] = {"batch": batch}
        run.attempt(case, lambda: case.update(against_line(work(ids), row["blocks"])), need)

    def prompted(ids: torch.Tensor) -> Seconds:
        works = {
            name: partial(m, input_ids=ids, use_cache=True, logits_to_keep=1)
            for name, m in models.items()
        }
        return taking_turns(run.timed, works, rounds=12 if len(ids) == 1 else 6)

    def written(ids: torch.Tensor) -> Seconds:
        for m in models.values():  # a whole warm-up would take as long as it all
            generated(m, ids, 2)
        works = {name: partial(generated, m, ids, new_tokens) for name, m in models.items()}
        return taking_turns(run.timed, works, rounds=2, warm_up=0)

    with torch.inference_mode():
        for batch in (1, 8):
            add(f"prompt, batch {batch}", batch, size.prompt, 8, prompted)
        for batch in batches:
            name = f"decode from a CUDA graph, batch {batch}"
            add(name, batch, start, 12, lambda ids: _steps(run, models, ids, new_tokens))
        for batch in generate:
            add(f"generate {new_tokens}, batch {batch}", batch, start, 25, written)
    row["paper_reference"] = REFERENCE


def generated(model: Any, ids: torch.Tensor, new_tokens: int) -> Any:
    """Greedy generation of exactly so many tokens, with transformers' default cache."""
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def taking_turns(
    timed: Callable[[Callable[[], Any]], Sequence[Any]],
    works: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 1,
    before: Callable[[str], None] = lambda name: None,
) -> Seconds:
    """Seconds of each work in the order A B C, C B A, ..., by ``timed``, which gives a result and
    seconds; ``before`` is not timed."""
    seconds: Seconds = {name: [] for name in works}
    for turn in range(-warm_up, rounds):
        for name in list(works) if turn % 2 else reversed(works):
            before(name)
            took = timed(works[name])[1]
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def against_line(times: Mapping[str, Sequence[float]], blocks: Mapping[str, int]) -> dict[str, Any]:
    """Medians, the line through the depths that are not judged, and each cut's speed-up: measured,
    at best (everything else of the line and the kept blocks), and how far the one is from the
    other."""
    middle = {name: median(t) for name, t in times.items()}
    line = ("dense", "half", "quarter")
    per_block, rest = np.polyfit([blocks[m] for m in line], [middle[m] for m in line], 1)
    cuts = {}
    for name in REFERENCE:
        ideal = float(rest + per_block * blocks[name])
        cuts[name] = {
            "kept_blocks": blocks[name],
            "speedup": round(middle["dense"] / middle[name], 4),
            "speedup_at_best": round(middle["dense"] / ideal, 4),
            "over_ideal": round(middle[name] / ideal - 1, 4),
        }
    return {
        "seconds": {name: [round(t, 6) for t in ts] for name, ts in times.items()},
        "median_ms": {name: round(1e3 * t, 3) for name, t in middle.items()},
        "block_ms": round(1e3 * float(per_block), 4),
        "rest_ms": round(1e3 * float(rest), 4),
        "cuts": cuts,
    }


def _steps(run: Run, models: Mapping[str, Any], ids: torch.Tensor, new_tokens: int) -> Seconds:
    """One step of generation with a static cache, replayed from a CUDA graph: what is left when the
    CPU does not hold the GPU back. A step reads the whole cache, as it would at the last token.
    Without a GPU the step is simply called."""
    from transformers import StaticCache

    batch, start = ids.shape
    room, many = start + new_tokens, min(32, new_tokens // 4)
    place = torch.full((batch, 1), start, device=run.device)
    # additive: every place of the cache may be seen
    mask = torch.zeros((batch, 1, 1, room), dtype=torch.bfloat16, device=run.device)
    caches = {name: StaticCache(config=m.config, max_cache_len=room) for name, m in models.items()}

    def step(name: str) -> Any:
        found = models[name](
            input_ids=ids[:, :1],
            attention_mask=mask,
            position_ids=place,
            past_key_values=caches[name],
            use_cache=True,
        )
        return found.logits.argmax(-1)

    def rewind(name: str) -> None:
        """Let the cache believe that it holds what was there at the start."""
        for layer in caches[name].layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(start)

    steps = {name: partial(step, name) for name in models}
    if run.device.type == "cuda":
        steps = {name: _captured(work) for name, work in steps.items()}
    works = {name: lambda s=work: [s() for _ in range(many)] for name, work in steps.items()}
    seconds = taking_turns(run.timed, works, rounds=5, before=rewind)
    return {name: [s / many for s in took] for name, took in seconds.items()}


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
