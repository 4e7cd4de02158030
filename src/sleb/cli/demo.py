"""`sleb demo`: the whole path on a small real model, with a line of text before and after."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from statistics import median

from rich.console import Console

from sleb.cli import show
from sleb.core.errors import InputError
from sleb.core.progress import Progress
from sleb.models.load import LoadedModel
from sleb.models.source import quiet_transformers

__all__ = ["run"]

PROMPT = "The most important thing about the ocean is"
FETCHED = ".venv/share/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, HELDOUT, LENGTH, REPAIR = 8, 16, 128, 32_000


def run(model: str | None, out: Path, progress: Progress) -> int:
    """Prune ``model`` by 20 % into ``out``, replacing an earlier demo's result."""
    from sleb.models.load import load
    from sleb.pipeline import prune

    model = model or FETCHED
    if not Path(model).exists():
        raise InputError(f"no model at {model}: run `make demo`, or give one with --model")
    if out.exists() and not (out / "run.json").is_file():
        raise InputError(f"{out} exists and is not from an earlier demo; choose another -o")
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)

    console.print(f"Pruning {Path(model).name} by 20 %.\n")
    options = ["--remove", "20%", "--windows", str(WINDOWS), "--length", str(LENGTH)]
    options += ["--repair-tokens", str(REPAIR)]
    done = prune(
        model,
        out,
        remove="20%",
        windows=WINDOWS,
        length=LENGTH,
        heldout=HELDOUT,
        repair_tokens=REPAIR,
        force=True,
        command=shlex.join(["sleb", "prune", model, *options, "-o", str(out)]),
        progress=progress,
    )
    original, pruned = load(model, progress=progress), load(out, progress=progress)
    with progress.stage("generating and timing", None):
        texts = [_continue(m) for m in (original, pruned)]
        ratio = _speed_ratio(original, pruned)

    show.show((done.plan, done.record.verification, done.record))
    console.print(f"a prompt of 256 tokens: {ratio:.2f}x as fast here (median of 7 pairs of runs)")
    console.print(f"\n{PROMPT} …")
    console.print(f"  original: {texts[0]}", soft_wrap=True)
    console.print(f"  pruned:   {texts[1]}", soft_wrap=True)
    console.print(
        f"\nA small sample, chosen to finish in minutes: {WINDOWS * LENGTH:,} tokens to search, "
        f"{HELDOUT * LENGTH:,} to measure. The intervals\nshow how little it pins down. For real "
        "use, give text of your own job with --text and more\n--windows. Nothing was trained."
    )
    console.print(f"\nThe checkpoint is in {out}: plain transformers loads it, without sleb.")
    return 0


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
    import torch

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
