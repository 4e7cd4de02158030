"""How the cost of a search grows with windows, removals and blocks.

    python benchmarks/growth.py MODEL --text c4.txt -o benchmarks/results/growth.json

Exact and racing are run. The published algorithm is not: its time is the measured time of a pass of
the same model times the number of passes. Models of fewer blocks are MODEL after removals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import measure
from search import Published, ours

import sleb
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack


def seconds_per_pass(loaded: LoadedModel, ids: torch.Tensor) -> float:
    naive = Published(loaded.stack, ids[:16].to(loaded.stack.input_device))
    naive.loss([1])
    start = time.perf_counter()
    naive.loss([1])
    return (time.perf_counter() - start) / 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()

    def load(ref: str | Path) -> LoadedModel:
        return sleb.load(ref, dtype=options.dtype, device=options.device)

    whole = load(options.model)
    ids = sleb.load_windows(
        whole.tokenizer, options.text, windows=128, length=options.length, seed=0
    )[0].ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    rows: list[dict[str, Any]] = []

    def add(axis: str, loaded: LoadedModel, windows: int, n: int) -> None:
        stack, device = loaded.stack, loaded.stack.input_device
        candidates = list(range(1, len(stack) - 1))
        row: dict[str, Any] = {
            "axis": axis,
            "blocks": len(stack),
            "windows": windows,
            "removed": n,
        }
        passes = windows * sum(len(candidates) - r for r in range(n))
        row["published"] = round(passes * seconds_per_pass(loaded, ids), 3)
        for name in ("exact", "racing"):
            (order, _), seconds, _ = measure(
                device, lambda e=name == "exact": ours(stack, ids[:windows], candidates, n, e)
            )
            row[name] = round(seconds, 3)
            row[f"{name}_order"] = order
        rows.append(row)
        print(json.dumps(row), flush=True)

    BlockStack.exit(whole.stack, whole.stack.enter(ids[:1])[0])  # warm up
    ours(whole.stack, ids[:8], list(range(1, len(whole.stack) - 1)), 1, True)
    for windows in (8, 32, 128):
        add("windows", whole, windows, 6)
    for n in (1, 3, 6, 12):
        add("removed", whole, 32, n)
    plan = sleb.search(whole, remove=12, windows=32, text=options.text, length=options.length)
    with tempfile.TemporaryDirectory() as folder:
        for gone in (12, 6):
            sleb.apply(plan, options.model, Path(folder) / str(gone), depth=gone)
            add("blocks", load(Path(folder) / str(gone)), 32, 4)
    add("blocks", whole, 32, 4)
    device = whole.stack.input_device
    report = {
        "model": Path(options.model).name,
        "length": options.length,
        "dtype": whole.dtype,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "seconds": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
