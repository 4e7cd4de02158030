"""Text that the model writes itself, to fit a repair on beside the user's.

A fit on a few kinds of text alone forgets the others. What a language model samples resembles all
that it was trained on, so some of it in the fit keeps more of that, and costs nothing on the user's
own text (docs/quality.md has the figures). Related: data-free calibration of quantizers (LLM-QAT,
2305.17888, section 3.1) and of pruning (self-calibration, 2410.17170).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sleb.models.load import LoadedModel
from sleb.parallel import group
from sleb.plan import SourceRecord
from sleb.progress import Progress
from sleb.text import Windows
from sleb.text.tokens import opening_tokens
from sleb.text.windows import recount

__all__ = ["OWN", "SHARE", "with_own"]

OWN = "the model's own text"
SHARE = 3
"""One window in so many is the model's own."""
AT_ONCE = 32  # sequences; the cache of a 7B model takes half a megabyte a token


def with_own(model: LoadedModel, windows: Windows, progress: Progress) -> Windows:
    """``windows`` and behind them half as many that the model has written."""
    n = len(windows.ids) // (SHARE - 1)
    if not n:
        return windows
    ids = _written(model, n, windows.record.length, windows.record.seed, progress)
    source = SourceRecord(
        spec=OWN,
        sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        documents=n,
        tokens=ids.numel(),
        windows=n,
    )
    record = windows.record.model_copy(update={"sources": (*windows.record.sources, source)})
    every, sources = torch.cat((windows.ids, ids)), windows.source + (len(windows.names),) * n
    return replace(
        windows,
        ids=every,
        source=sources,
        names=(*windows.names, OWN),
        record=recount(record, every, sources),
    )


@torch.inference_mode()
def _written(model: LoadedModel, n: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Samples at temperature 1, [n, length] on the CPU. Every other one begins with a random word,
    as those that begin alike are of few kinds."""
    from transformers import GenerationConfig

    network: Any = model.model
    device = model.stack.input_device
    draw = random.Random(f"own {seed}")
    opening = opening_tokens(model.tokenizer)
    special = set(model.tokenizer.all_special_ids)
    words = [t for t in range(len(model.tokenizer)) if t not in special]
    plain = opening or [first for first in (model.tokenizer.bos_token_id,) if first is not None]
    starts = [plain if plain and i % 2 == 0 else [*opening, draw.choice(words)] for i in range(n)]
    parts: list[Tensor] = [torch.empty((0, length), dtype=torch.int64)]
    devices = [device] if device.type == "cuda" else []
    with progress.stage("writing text to fit on", n) as tick, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for size in sorted({len(s) for s in starts}):
            alike = torch.tensor([s for s in starts if len(s) == size], device=device)
            for part in torch.split(alike, AT_ONCE):
                sampled = network.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    generation_config=GenerationConfig(
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        max_new_tokens=length - size,
                        min_new_tokens=length - size,
                        eos_token_id=network.generation_config.eos_token_id,
                        pad_token_id=0,
                    ),
                )
                parts.append(sampled.cpu())
                tick(len(part))
    ids = torch.cat(parts)
    group().from_first_(ids)
    return ids
