"""Section: prompt latency and generation, dense against cut, taking turns within one process.

What a cut could reach at best comes from models of other depths than those judged: a line through
the times of all blocks, half and a quarter of them gives the time of one block and of everything
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from perf_core import OutOfTime, Run, shortened

__all__ = ["REFERENCE", "cuts", "speed"]

REFERENCE = {"10%": 1.12, "20%": 1.26}
"""Speed-ups that SLEB's paper gives for these shares of blocks removed."""


def cuts(blocks: int) -> dict[str, frozenset[int]]:
    """Blocks without which a model of so many is cut by 10 and 20 %, rounded up, spread evenly."""
    found = {}
    for name, share in (("10%", 0.1), ("20%", 0.2)):
        n = int(np.ceil(share * blocks - 1e-9))
        found[name] = frozenset(int(i) for i in np.linspace(1, blocks - 2, n).round())
    return found


def speed(
    run: Run,
    row: dict[str, Any],
    model: Any,
    *,
    vocab: int,
    prompt: int = 2048,
    start: int = 64,
    new_tokens: int = 128,
    batches: Sequence[int] = (1, 16, 64),
    generate: Sequence[int] = (1, 16, 64),
) -> None:
    """Dense, 10 % and 20 % fewer blocks, and the depths of the line, sharing their weights."""
    n = model.config.num_hidden_layers
    models = {"dense": model}
    for name, gone in cuts(n).items():
        models[name] = shortened(model, gone)
    for name, depth in (("half", n // 2), ("quarter", max(1, n // 4))):
        models[name] = shortened(model, frozenset(range(depth, n)))
    row["blocks"] = {name: m.config.num_hidden_layers for name, m in models.items()}
    row["cases"] = {}
    device = run.device

    def add(
        name: str,
        need: float,
        work: Callable[[Any], Any],
        rounds: int,
        batch: int,
        warm_up: int = 1,
    ) -> None:
        if run.left < need:
            row["cases"][name] = {"skipped": f"{run.left:.0f} s of the budget left"}
            return
        case: dict[str, Any] = {"batch": batch}
        row["cases"][name] = case
        try:
            case |= _compared(run, models, work, rounds, warm_up)
        except OutOfTime as error:
            case["stopped"] = str(error)
        except torch.OutOfMemoryError as error:
            case["error"] = str(error)[:300]
        run.write()

    with torch.inference_mode():
        for batch in (1, 8):
            ids = torch.randint(0, vocab, (batch, prompt), device=device)

            def read(m: Any, ids: torch.Tensor = ids) -> Any:
                return m(input_ids=ids, use_cache=True, logits_to_keep=1).logits

            add(f"prompt, batch {batch}", 8, read, 12 if batch == 1 else 6, batch)
        for kind in ("graph", "generate"):
            for batch in generate if kind == "generate" else batches:
                ids = torch.randint(0, vocab, (batch, start), device=device)
                if kind == "generate":

                    def write(m: Any, ids: torch.Tensor = ids) -> Any:
                        return generated(m, ids, new_tokens)

                    for m in models.values():  # a whole warm-up would take as long as it all
                        generated(m, ids, 2)
                    add(f"generate {new_tokens}, batch {batch}", 25, write, 2, batch, warm_up=0)
                else:
                    try:
                        _graphs(run, row, models, ids, new_tokens)
                    except OutOfTime as error:
                        row["cases"][f"decode from a CUDA graph, batch {batch}"] = {
                            "skipped": str(error)
                        }
                    except Exception as error:  # of any type: an extra of its own
                        name = f"decode from a CUDA graph, batch {batch}"
                        row["cases"][name] = {"error": f"{type(error).__name__}: {error}"[:600]}
                    run.free()
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


def _compared(
    run: Run, models: Mapping[str, Any], work: Callable[[Any], Any], rounds: int, warm_up: int
) -> dict[str, Any]:
    """Seconds of each model, in turns (A B C, C B A, ...), and each cut against the line."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-warm_up, rounds):
        for name in list(models) if turn % 2 else reversed(list(models)):
            run.check(1)
            _, seconds = run.timed(lambda m=models[name]: work(m))
            if turn >= 0:
                times[name].append(seconds)
    return against_line(times, {name: m.config.num_hidden_layers for name, m in models.items()})


def against_line(times: Mapping[str, Sequence[float]], blocks: Mapping[str, int]) -> dict[str, Any]:
    """Medians, the line through the depths that are not judged, and each cut's speed-up: measured,
    at best (everything else of the line and the kept blocks), and how far the one is from the
    other."""
    middle = {name: median(t) for name, t in times.items()}
    line = [name for name in ("dense", "half", "quarter") if name in middle]
    per_block, rest = np.polyfit([blocks[m] for m in line], [middle[m] for m in line], 1)
    out: dict[str, Any] = {
        "seconds": {name: [round(t, 6) for t in ts] for name, ts in times.items()},
        "median_ms": {name: round(1e3 * t, 3) for name, t in middle.items()},
        "block_ms": round(1e3 * float(per_block), 4),
        "rest_ms": round(1e3 * float(rest), 4),
        "cuts": {},
    }
    for name in ("10%", "20%"):
        ideal = float(rest + per_block * blocks[name])
        out["cuts"][name] = {
            "kept_blocks": blocks[name],
            "speedup": round(middle["dense"] / middle[name], 4),
            "speedup_at_best": round(middle["dense"] / ideal, 4),
            "blocks_over_blocks": round(blocks["dense"] / blocks[name], 4),
            "over_ideal": round(middle[name] / ideal - 1, 4),
            "paper": REFERENCE[name],
        }
    return out


def _graphs(
    run: Run,
    row: dict[str, Any],
    models: Mapping[str, Any],
    ids: torch.Tensor,
    new_tokens: int,
) -> None:
    """One step of generation with a static cache, replayed from a CUDA graph: what is left when the
    CPU does not hold the GPU back. A step reads the whole cache, as it would at the last token.
    Without a GPU the step is simply called."""
    from transformers import StaticCache

    run.check(12 if run.device.type == "cuda" else 0)
    batch, start = ids.shape
    room, many = start + new_tokens, min(32, new_tokens // 4)
    place = torch.full((batch, 1), start, device=run.device)
    # additive: every place of the cache may be seen
    mask = torch.zeros((batch, 1, 1, room), dtype=torch.bfloat16, device=run.device)
    steps: dict[str, Callable[[], Any]] = {}
    caches = {}
    for label, model in models.items():
        cache = StaticCache(config=model.config, max_cache_len=room)
        caches[label] = cache

        def step(m: Any = model, c: Any = cache) -> Any:
            found = m(
                input_ids=ids[:, :1],
                attention_mask=mask,
                position_ids=place,
                past_key_values=c,
                use_cache=True,
            )
            return found.logits.argmax(-1)

        steps[label] = _captured(step, cache) if run.device.type == "cuda" else step
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(6):
        for label in list(steps) if turn % 2 else reversed(list(steps)):
            run.check(1)
            _rewind(caches[label], start)
            _, seconds = run.timed(lambda s=steps[label]: [s() for _ in range(many)])
            if turn:
                times[label].append(seconds / many)
    blocks = {label: m.config.num_hidden_layers for label, m in models.items()}
    found = {"batch": batch, "cache_tokens": room, **against_line(times, blocks)}
    found["tokens_per_second"] = {
        label: round(batch / median(ts), 1) for label, ts in times.items()
    }
    row["cases"][f"decode from a CUDA graph, batch {batch}"] = found
    run.write()


def _rewind(cache: Any, tokens: int) -> None:
    """Let the cache believe that it holds so many tokens."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.cumulative_length.fill_(tokens)


def _captured(step: Callable[[], Any], cache: Any) -> Callable[[], Any]:
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
