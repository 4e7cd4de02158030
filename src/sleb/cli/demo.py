"""`sleb demo`: the whole path on a small real model, with a line of text before and after."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from sleb.cli import render
from sleb.errors import InputError
from sleb.progress import Progress

__all__ = ["run"]

PROMPT = "The most important thing about the ocean is"
FETCHED = ".venv/share/SmolLM2-135M-Instruct.Q4_1.gguf"


def run(model: str | None, out: Path, progress: Progress) -> int:
    """Prune ``model`` by 20 % into ``out``, replacing an earlier demo's result."""
    from sleb.models.load import load
    from sleb.pipeline import prune

    model = model or os.environ.get("SLEB_DEMO_MODEL") or FETCHED
    if not Path(model).exists():
        raise InputError(f"no model at {model}: run `make demo`, or give one with --model")
    if out.exists() and not (out / "run.json").is_file():
        raise InputError(f"{out} exists and is not from an earlier demo; choose another -o")
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)

    console.print(f"Pruning {Path(model).name} by 20 %: a real model with 30 blocks.\n")
    before = _continue(load(model, progress=progress))
    done = prune(
        model,
        out,
        remove="20%",
        windows=8,
        length=128,
        heldout=16,
        force=True,
        command="sleb demo",
        progress=progress,
    )
    after = _continue(load(out, progress=progress))
    render.plan(console, done.plan)
    console.print()
    render.verification(console, done.record.verification)
    console.print()
    render.record(console, done.record)
    console.print(f"\n{PROMPT} …")
    console.print(f"  original: {before}")
    console.print(f"  pruned:   {after}")
    console.print(
        "\nThis is a small sample (1,024 tokens to search, 2,048 to measure), chosen to finish in "
        "minutes:\nthe intervals show how little it pins down. For real use, give text of your own "
        "job with --text\nand more --windows. Nothing was repaired or trained: six blocks are "
        "simply gone."
    )
    console.print(f"\nThe checkpoint is in {out}: it loads with plain transformers, without sleb.")
    return 0


def _continue(loaded: Any) -> str:
    """Twenty greedy tokens after the prompt, on one line."""
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").to(loaded.stack.input_device)
    made = loaded.model.generate(**ids, max_new_tokens=20, do_sample=False)
    new = made[0, ids["input_ids"].shape[1] :]
    return " ".join(loaded.tokenizer.decode(new, skip_special_tokens=True).split())
