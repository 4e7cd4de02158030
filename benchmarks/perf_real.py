"""Section: a small real model: search exact and by racing, repair, prompt, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from perf_core import Run
from perf_search import search
from perf_shapes import shape_of
from perf_speed import speed

import sleb
from sleb.calibration import CalibrationSplit
from sleb.repairs import given_tokens, repair

__all__ = ["real"]


def real(
    run: Run,
    row: dict[str, Any],
    path: Path,
    *,
    matmul: float | None,
    windows: int,
    length: int,
    remove: int,
    tokens: int,
    prompt: int,
    new_tokens: int,
    compiled: bool,
) -> None:
    """Losses, plans and repairs are of the model itself; texts are the built-in ones."""
    model = sleb.load(path, device=str(run.device))
    shape = shape_of(model.stack.model.config)
    row |= {"model": path.name, "blocks": len(model.stack), "dtype": model.dtype}
    split = CalibrationSplit.of(
        model.tokenizer, (), windows=windows, length=length, seed=0, heldout=16
    )
    scored = split.search
    ids = scored.ids[torch.randperm(len(scored.ids), generator=torch.Generator().manual_seed(0))]
    row["searches"] = {}
    kinds = [("exact, states kept", True, False), ("racing", False, False)]
    for name, exact, compiling in [*kinds, *([("racing, compiled", False, True)] * compiled)]:
        found: dict[str, Any] = {}
        row["searches"][name] = found
        search(
            run,
            found,
            model.stack,
            shape,
            ids,
            remove,
            exact=exact,
            compiled=compiling,
            matmul=matmul,
        )
        run.write()
    order = row["searches"]["racing"]["order"]
    row["same_order"] = order == row["searches"]["exact, states kept"]["order"]
    split = split.with_repair(given_tokens(model.stack, tokens))
    fitted, judged = split.repair_fit, split.repair_validation
    fixed, seconds, memory = run.measured(lambda: repair(model, order, fitted, judged))
    row["repair"] = {
        "removed": order,
        "tokens": fitted.ids.numel(),
        "seconds": round(seconds, 2),
        "memory": memory,
        "gaps": [
            {"removed": list(g.removed), "ridge": g.ridge, "before": g.before, "after": g.after}
            for g in fixed.record.gaps
        ],
    }
    run.write()
    row["speed"] = {}
    speed(
        run,
        row["speed"],
        model.stack.model,
        vocab=shape.vocab,
        prompt=prompt,
        new_tokens=new_tokens,
        generate=(1, 64) if run.device.type == "cuda" else (1,),
    )
