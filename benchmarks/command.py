"""A command of sleb as end_to_end.py times it: nothing but the command is imported."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["STATS"]

STATS = "SLEB_BENCH_STATS"
"""Variable that names the file to which a command adds what only it knows."""


def main(arguments: list[str]) -> None:
    """Be the command."""
    code: Any = 0
    told: dict[str, Any] = {}
    try:
        if arguments[0] == "load":
            import sleb

            sleb.load(arguments[1])
        elif arguments[0] == "fit":
            told = fit(*arguments[1:])
        else:
            from sleb.cli.main import main as command

            code = command(arguments)
    except SystemExit as ended:
        code = ended.code
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        told["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    Path(os.environ[STATS]).write_text(json.dumps(told))
    sys.exit(code)


def fit(model: str, removed: str, tokens: str, *texts: str) -> dict[str, Any]:
    """A repair alone, on so many tokens of text."""
    import sleb

    try:
        from sleb.repairs import repair
    except ImportError:  # before 0.2
        from sleb.repair import repair  # type: ignore[import-not-found,no-redef]
    loaded, length = sleb.load(model), 256
    n = int(tokens) // length
    windows, heldout = sleb.load_windows(
        loaded.tokenizer, texts, windows=n, heldout=16, length=length, seed=0
    )
    assert heldout
    own = {"own", "self_generated"} & inspect.signature(repair).parameters.keys()
    start = time.perf_counter()
    blocks: Any = [int(b) for b in removed.split(",")]
    alone: Any = dict.fromkeys(own, False)
    found = repair(loaded, blocks, windows, heldout, **alone)
    seconds = round(time.perf_counter() - start, 1)
    return {"phases": {"repairing": seconds}, "kept": [gap.ridge for gap in found.record.gaps]}


if __name__ == "__main__":
    main(sys.argv[1:])
