"""The published search against ours, in one run: same model, tokens, dtype and threads.

    python benchmarks/search.py MODEL --windows 64 --length 256 --remove 6 -o out.json

Systems, each timed from a loaded model to the order of removal:

- published: SLEB's algorithm as published, one full forward pass for each candidate and window
  (batch 1). With --published-rounds 1 only its first round is run, and a candidate of the last,
  between which the others are interpolated; the JSON says so.
- exact: every candidate on every window, prefixes shared.
- racing: candidates that are clearly worse are given up early.

Block forwards are counted per window of tokens. Peak memory is the process's (CPU) or the
allocator's (CUDA), and is also given over the weights. --growth measures how the cost grows.
Random Llamas of larger shapes are in performance.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import asked, measure, save, setting
from plot import published_forwards
from torch import Tensor

import sleb
from sleb.models.stack import BlockStack
from sleb.selection.metrics import NLL
from sleb.selection.objective import Objective
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep

Row = dict[str, Any]


class Published:
    """One pass per candidate and window; the rest of the work is transformers' own."""

    def __init__(self, stack: BlockStack, ids: Tensor) -> None:
        self.stack, self.ids, self.passes = stack, ids.to(stack.input_device), 0

    @torch.inference_mode()
    def loss(self, removed: list[int]) -> float:
        total = 0.0
        with self.stack.bypassed(removed):
            for window in self.ids:
                logits = self.stack.model(input_ids=window[None], use_cache=False).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits.float(), window[1:]).item()
                self.passes += 1
        return total / len(self.ids)

    def run(self, candidates: list[int], n: int, rounds: int) -> list[int]:
        order: list[int] = []
        for _ in range(min(n, rounds)):
            losses = {b: self.loss([*order, b]) for b in candidates if b not in order}
            order.append(min(losses, key=lambda b: losses[b]))
        return order

    def all_rounds(self, seconds: float, candidates: list[int], n: int) -> float:
        """Seconds of all ``n`` rounds from those of the first. A pass takes less as blocks leave:
        its time in the last round is measured on one candidate, and falls evenly between."""
        first, windows = seconds / self.passes, len(self.ids)
        _, last, _ = measure(self.ids.device, lambda: self.loss(candidates[:n]))
        step = (last / windows - first) / max(1, n - 1)
        return windows * sum((len(candidates) - r) * (first + r * step) for r in range(n))


def ours(stack: BlockStack, ids: Tensor, n: int, *, exact: bool) -> tuple[list[int], int]:
    """Order of removal and block forwards."""
    sweep = Sweep(stack, ids, NLL)
    objective = Objective(sweep.scorer, len(ids), exact=exact)
    found = STRATEGIES["greedy"](objective, range(1, len(stack) - 1), n)
    return list(found.order), sweep.forwards


def timed(system: str, stack: BlockStack, ids: Tensor, n: int, rounds: int) -> Row:
    """A search by one system: seconds, block forwards, peak memory and order."""
    candidates = list(range(1, len(stack) - 1))
    row: Row = {"system": system}
    if system == "published":
        naive = Published(stack, ids)
        work = partial(naive.run, candidates, n, rounds)
        order, seconds, peak = measure(stack.input_device, work)
        forwards = published_forwards(len(stack), len(candidates), n, len(ids))
        if rounds < n:
            row["extrapolated_from"] = f"{naive.passes} passes, and {len(ids)} of the last round"
            row["seconds_run"] = round(seconds, 2)
            seconds = naive.all_rounds(seconds, candidates, n)
    else:
        work = partial(ours, stack, ids, n, exact=system == "exact")
        (order, forwards), seconds, peak = measure(stack.input_device, work)
    weights = sum(p.nbytes for p in stack.model.parameters()) / 1e9
    return row | {
        "seconds": round(seconds, 2),
        "block_forwards": forwards,
        "peak_gb": round(peak, 3),
        "peak_over_weights_gb": round(peak - weights, 3),
        "order": order,
    }


def growth(options: argparse.Namespace, whole: sleb.LoadedModel, ids: Tensor) -> list[Row]:
    """How the cost grows with windows, removals and blocks. The published algorithm is not run: its
    time is that of a pass of the same model times the number of passes. Models of fewer blocks are
    MODEL after removals."""
    rows: list[Row] = []

    def add(axis: str, stack: BlockStack, windows: int, n: int) -> None:
        row: Row = {"axis": axis, "blocks": len(stack), "windows": windows, "removed": n}
        naive = Published(stack, ids[:16])
        naive.loss([1])
        _, seconds, _ = measure(stack.input_device, lambda: naive.loss([1]))
        passes = windows * sum(len(stack) - 2 - r for r in range(n))
        row["published"] = round(passes * seconds / 16, 3)
        for name in ("exact", "racing"):
            found = timed(name, stack, ids[:windows], n, n)
            row |= {name: found["seconds"], f"{name}_order": found["order"]}
        rows.append(row)
        print(json.dumps(row), flush=True)

    ours(whole.stack, ids[:8], 1, exact=True)  # warm up
    for windows in (8, 32, 128):
        add("windows", whole.stack, windows, 6)
    for n in (1, 3, 6, 12):
        add("removed", whole.stack, 32, n)
    plan = sleb.search(whole, remove=12, windows=32, text=options.text, length=options.length)
    with tempfile.TemporaryDirectory() as folder:
        for gone in (12, 6):
            out = sleb.apply(plan, options.model, Path(folder) / str(gone), depth=gone)
            cut = sleb.load(out, dtype=options.dtype, device=options.device)
            add("blocks", cut.stack, 32, 4)
    add("blocks", whole.stack, 32, 4)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--remove", type=int, default=6)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--systems", default="racing,exact,published")
    parser.add_argument("--published-rounds", type=int, default=99)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--growth", action="store_true", help="over windows, removals and blocks")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = sleb.load(options.model, dtype=options.dtype, device=options.device)
    stack, windows = loaded.stack, 128 if options.growth else options.windows
    ids = sleb.load_windows(
        loaded.tokenizer, options.text, windows=windows, length=options.length, seed=0
    )[0].ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    BlockStack.exit(stack, stack.enter(ids[:1])[0])  # warm up
    report: Row = {
        "what": asked(options, "out", "model", "text", "growth"),
        "model": Path(options.model).name,
        "text": [Path(t).name for t in options.text] or ["default"],
        "blocks": len(stack),
        "length": options.length,
        **setting(stack.input_device, stack.dtype),
    }
    if options.growth:
        save(options.out, {**report, "seconds": growth(options, loaded, ids)})
        return
    rows = []
    for system in options.systems.split(","):
        rows.append(timed(system, stack, ids, options.remove, options.published_rounds))
        print(json.dumps(rows[-1]), flush=True)
    if slowest := next((r for r in rows if r["system"] == "published"), None):
        known = len(slowest["order"])  # of an extrapolated run, only the first rounds
        for row in rows:
            row["speedup"] = round(slowest["seconds"] / row["seconds"], 2)
            row["removals_compared"] = known
            row["same_order_as_published"] = row["order"][:known] == slowest["order"]
    save(options.out, {**report, "systems": rows})


if __name__ == "__main__":
    main()
