"""The published search against ours, in one run: same model, tokens, dtype and threads.

    python benchmarks/search.py MODEL --windows 64 --length 256 --remove 6 -o out.json

Systems, each timed from a loaded model to the order of removal:

- published: SLEB's algorithm as published, one full forward pass for each candidate and window
  (batch 1). With --published-rounds 1 only its first round is run, and a candidate of the last,
  between which the others are interpolated; the JSON says so.
- exact: every candidate on every window, prefixes shared.
- racing: candidates that are clearly worse are given up early.

Block forwards are counted per window of tokens. Peak memory is the process's (CPU) or the
allocator's (CUDA), and is also given over the weights. A random Llama of the 7B shape, for time
only: --shape 7b in place of MODEL. On it racing replays the --schedule of a real model's race.
--growth measures instead how the cost grows.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import asked, measure, save, setting
from plot import published_forwards
from shapes import SHAPES, random_llama
from torch import Tensor

import sleb
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet, Objective, Scorer
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep


class Published:
    """One pass per candidate and window; the rest of the work is transformers' own."""

    def __init__(self, stack: BlockStack, ids: Tensor) -> None:
        self.stack, self.ids, self.forwards, self.passes = stack, ids, 0, 0

    @torch.inference_mode()
    def loss(self, removed: list[int]) -> float:
        total = 0.0
        with self.stack.bypassed(removed):
            for window in self.ids:
                logits = self.stack.model(input_ids=window[None], use_cache=False).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits.float(), window[1:]).item()
                self.forwards += len(self.stack) - len(removed)
                self.passes += 1
        return total / len(self.ids)

    def run(self, candidates: list[int], n: int, rounds: int) -> list[int]:
        order: list[int] = []
        for _ in range(min(n, rounds)):
            losses = {b: self.loss([*order, b]) for b in candidates if b not in order}
            order.append(min(losses, key=lambda b: losses[b]))
        return order


def ours(
    stack: BlockStack,
    ids: Tensor,
    candidates: list[int],
    n: int,
    exact: bool,
    calls: list[Any] | None = None,
) -> tuple[list[int], int]:
    """Order of removal and block forwards; ``calls`` collects what the sweep was asked for."""
    sweep = Sweep(stack, ids, NLL)

    def score(sets: Any, start: int, stop: int) -> Any:
        if calls is not None:
            calls.append([[sorted(s) for s in sets], start, stop])
        return sweep.values(sets, start, stop)

    scorer = Scorer(values=score, step=sweep.step, fill=sweep.fill)
    objective = Objective(scorer, len(ids), exact=exact)
    found = STRATEGIES["greedy"](objective, candidates, n)
    return list(found.order), sweep.forwards


def replay(stack: BlockStack, ids: Tensor, calls: list[Any]) -> tuple[list[int], int]:
    """Do the work of a race that was run on another model: random weights make all blocks alike,
    so that a race on them would drop none."""
    sweep = Sweep(stack, ids, NLL)
    for sets, start, stop in calls:
        sweep.scores([BlockSet(s) for s in sets], start, stop)
    return [], sweep.forwards


def extrapolated(naive: Published, seconds: float, candidates: list[int], n: int) -> float:
    """Seconds of all ``n`` rounds from those of the first. A pass takes less as blocks leave: its
    time in the last round is measured on one candidate, and between the two it falls evenly."""
    first, windows = seconds / naive.passes, len(naive.ids)
    _, last, _ = measure(naive.ids.device, lambda: naive.loss(candidates[:n]))
    step = (last / windows - first) / max(1, n - 1)
    return windows * sum((len(candidates) - r) * (first + r * step) for r in range(n))


def seconds_per_pass(loaded: LoadedModel, ids: torch.Tensor) -> float:
    naive = Published(loaded.stack, ids[:16].to(loaded.stack.input_device))
    naive.loss([1])
    start = time.perf_counter()
    naive.loss([1])
    return (time.perf_counter() - start) / 16


def growth(options: argparse.Namespace) -> None:
    """How the cost grows with windows, removals and blocks. The published algorithm is not run: its
    time is that of a pass of the same model times the number of passes. Models of fewer blocks are
    MODEL after removals."""

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
        row: dict[str, Any] = {"axis": axis, "blocks": len(stack), "windows": windows, "removed": n}
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
    save(options.out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", choices=["7b", "13b"])
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--remove", type=int, default=6)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--schedule", type=Path, help="racing writes it; a --shape replays it")
    parser.add_argument("--systems", default="racing,exact,published")
    parser.add_argument("--published-rounds", type=int, default=99)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--growth", action="store_true", help="over windows, removals and blocks")
    options = parser.parse_args()
    if options.growth:
        return growth(options)

    if options.shape:
        device = torch.device("cuda" if options.device == "auto" else options.device)
        stack = BlockStack(random_llama(SHAPES[options.shape], device))
        ids = torch.randint(0, 32000, (options.windows, options.length))
    else:
        loaded = sleb.load(options.model, dtype=options.dtype, device=options.device)
        stack, device = loaded.stack, loaded.stack.input_device
        ids = sleb.load_windows(
            loaded.tokenizer, options.text, windows=options.windows, length=options.length, seed=0
        )[0].ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    if options.threads:
        torch.set_num_threads(options.threads)
    n_blocks = len(stack)
    candidates = list(range(1, n_blocks - 1))
    BlockStack.exit(stack, stack.enter(ids[:1])[0])  # warm up
    weights = sum(p.nbytes for p in stack.model.parameters()) / 1e9

    rows: list[dict[str, Any]] = []
    for system in options.systems.split(","):
        row: dict[str, Any] = {"system": system}
        if system == "published":
            naive = Published(stack, ids.to(device))
            run = functools.partial(naive.run, candidates, options.remove, options.published_rounds)
            order, seconds, peak = measure(device, run)
            forwards = published_forwards(n_blocks, len(candidates), options.remove, len(ids))
            if naive.forwards < forwards:
                row["extrapolated_from"] = (
                    f"{naive.passes} passes, and {len(ids)} of the last round"
                )
                row["seconds_run"] = round(seconds, 2)
                seconds = extrapolated(naive, seconds, candidates, options.remove)
        elif system == "racing" and options.shape:
            calls = json.loads(options.schedule.read_text())
            work = functools.partial(replay, stack, ids, calls)
            (order, forwards), seconds, peak = measure(device, work)
            row["system"] = "racing, replayed"
        else:
            calls = []
            exact = system == "exact"
            work = functools.partial(ours, stack, ids, candidates, options.remove, exact, calls)
            (order, forwards), seconds, peak = measure(device, work)
            if system == "racing" and options.schedule:
                options.schedule.write_text(json.dumps(calls) + "\n")
        row |= {
            "seconds": round(seconds, 2),
            "block_forwards": forwards,
            "peak_gb": round(peak, 3),
            "peak_over_weights_gb": round(peak - weights, 3),
            "order": order,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)

    slowest = next((r for r in rows if r["system"] == "published"), None)
    for row in rows:
        if slowest:
            row["speedup"] = round(slowest["seconds"] / row["seconds"], 2)
            known = len(slowest["order"])  # of an extrapolated run, only the first rounds
            row["removals_compared"] = known
            row["same_order_as_published"] = row["order"][:known] == slowest["order"]
    report = {
        "what": asked(options, "out", "model", "text", "schedule"),
        "model": options.shape or Path(options.model).name,
        "text": [Path(t).name for t in options.text] or ["default"],
        "blocks": n_blocks,
        **setting(device, stack.dtype),
        "systems": rows,
    }
    save(options.out, report)


if __name__ == "__main__":
    main()
