"""`sleb demo`: the whole path on a small real model, with a line of text before and after."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sleb.core.files import check_demo
from sleb.core.progress import Progress, silent
from sleb.models.load import LoadedModel, load
from sleb.models.source import quiet_transformers
from sleb.pipeline import Pruned, prune

PROMPT = "The most important thing about the ocean is"
FETCHED = ".venv/share/SmolLM2-135M-Instruct.Q4_1.gguf"
ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WINDOWS, HELDOUT, LENGTH, REPAIR = 8, 16, 128, 32_000
PROMPTS, ANSWER = 24, 32  # prompts, and tokens of each answer


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A small model pruned: ``texts`` are what the original and the pruned model write after
    ``prompt``; ``speedup`` is the ratio of their times for a prompt of 256 tokens; ``searched``
    and ``measured`` count tokens."""

    model: str
    pruned: Pruned
    prompt: str
    texts: tuple[str, str]
    speedup: float
    searched: int = WINDOWS * LENGTH
    measured: int = HELDOUT * LENGTH


def demo(
    model: str | None = None, out: str | Path = "sleb-demo", *, progress: Progress = silent
) -> Demo:
    """Prune ``model``, by default SmolLM2-135M-Instruct, by 20 % into ``out``, replacing an earlier
    demo's result. Where ``make demo`` has not fetched that, it comes from the hub.

    Raises:
        InputError: there is no such model, or ``out`` is something else.
        ResourceError: the hub cannot be reached.
    """
    model, out = model or (FETCHED if Path(FETCHED).exists() else ON_HUB), Path(out)
    check_demo(out)
    options: dict[str, Any] = {
        "remove": "20%",
        "windows": WINDOWS,
        "length": LENGTH,
        "repair_tokens": REPAIR,
        "max_prompts": PROMPTS,
        "new_tokens": ANSWER,
    }
    flags = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    done = prune(
        model,
        out,
        **options,
        heldout=HELDOUT,
        force=True,
        command=shlex.join(["sleb", "prune", model, *flags, "-o", str(out)]),
        progress=progress,
    )
    original, pruned = load(model, progress=progress), load(out, progress=progress)
    with progress.stage("generating and timing", None):
        texts = (_continue(original), _continue(pruned))
        ratio = _speed_ratio(original, pruned)
    return Demo(model=model, pruned=done, prompt=PROMPT, texts=texts, speedup=ratio)


def _continue(loaded: LoadedModel) -> str:
    """Twenty greedy tokens after the prompt, on one line."""
    tokenizer = loaded.tokenizer
    ids = tokenizer(PROMPT, return_tensors="pt").to(loaded.stack.input_device)
    with quiet_transformers():
        made = loaded.model.generate(**ids, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
        text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def _speed_ratio(original: LoadedModel, pruned: LoadedModel) -> float:
    """Prompt time of the original over the pruned model's: medians of interleaved runs."""
    ids = torch.zeros((1, 256), dtype=torch.long)
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for turn in range(8):
            for loaded, spent in zip((original, pruned), seconds, strict=True):
                start = time.perf_counter()
                # one position's logits, as when a prompt is read before generating
                loaded.model(ids.to(loaded.stack.input_device), logits_to_keep=1)
                if turn:  # the first pair warms up
                    spent.append(time.perf_counter() - start)
    return median(seconds[0]) / median(seconds[1])
