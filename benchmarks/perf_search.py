"""Sections: the machine, one block, the search of a random Llama, the repair of its cut; and the
same of a small real model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perf_core import OutOfTime, Run, Shape, Size, best_seconds, shape_of
from perf_speed import speed
from race_model import Losses, Spread

import sleb
from sleb.calibration import CalibrationSplit
from sleb.core.process_group import group
from sleb.models.compiled import CompiledStack
from sleb.models.stack import BlockStack
from sleb.repairs import RIDGES, given_tokens
from sleb.repairs import repair as fit_repair
from sleb.repairs.regression import Regression, gaps
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet, Call, Objective
from sleb.selection.resources import default_batch
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep, block_forwards, distribute

__all__ = ["block", "machine", "real", "repair", "search"]


def machine(run: Run, row: dict[str, Any]) -> None:
    """A large matrix product, copies within the device, and copies to it."""
    n = 8192 if run.device.type == "cuda" else 512
    a = torch.randn((n, n), device=run.device, dtype=torch.bfloat16)
    b = torch.randn((n, n), device=run.device, dtype=torch.bfloat16)
    # long enough that the clock settles where sustained work leaves it
    inner = 50 if run.device.type == "cuda" else 2
    times = []
    torch.mm(a, b)
    for _ in range(5):
        _, seconds = run.timed(lambda: [torch.mm(a, b) for _ in range(inner)])
        times.append(seconds / inner)
    row["matmul_n"] = n
    row["matmul_tflops"] = round(2 * n**3 / float(np.median(times)) / 1e12, 2)
    row["matmul_tflops_each"] = [round(2 * n**3 / t / 1e12, 2) for t in times]
    size = 2**30 if run.device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = best_seconds(run, lambda: target.copy_(source), inner=5)
    row["copy_gb_per_s"] = round(2 * size / seconds / 1e9, 1)  # read and written
    if run.device.type == "cuda":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        seconds = best_seconds(run, lambda: target.copy_(host, non_blocking=True), inner=2)
        row["pinned_to_device_gb_per_s"] = round(size / seconds / 1e9, 2)
        pageable = torch.empty(size, dtype=torch.uint8).fill_(1)
        seconds = best_seconds(run, lambda: target.copy_(pageable), repeats=3)
        row["pageable_to_device_gb_per_s"] = round(size / seconds / 1e9, 2)


def block(run: Run, row: dict[str, Any], stack: BlockStack, shape: Shape, length: int) -> None:
    """Where one block's time goes: batches of several sizes, its products and its attention alone,
    and the head with the loss."""
    i = len(stack) // 2
    flops = shape.block_flops(length)
    usual = default_batch(stack, length)
    row["default_batch"] = usual
    row["windows"] = {}
    ids = torch.randint(0, shape.vocab, (2 * usual, length))
    inner = 4 if run.device.type == "cuda" else 1

    def rate(seconds: float, work: float) -> dict[str, float]:
        return {"ms": round(1e3 * seconds, 3), "tflops": round(work / seconds / 1e12, 1)}

    with torch.inference_mode():
        for batch in sorted({1, max(1, usual // 2), usual, 2 * usual}):
            run.check(5)
            hidden, calls = stack.enter(ids[:batch])
            seconds = best_seconds(
                run, lambda h=hidden, c=calls: stack.run(i, h, c[i]), repeats=4, inner=inner
            )
            row["windows"][str(batch)] = rate(seconds, batch * flops)
        fused = CompiledStack(stack.model, usual)
        row["compiled"] = {"compile_seconds": round(_compile(run, fused, ids[:usual]), 2)}
        hidden, calls = stack.enter(ids[:usual])
        seconds = best_seconds(run, lambda: fused.run(i, hidden, calls[i]), repeats=4, inner=inner)
        row["compiled"] |= rate(seconds, usual * flops)
        eager, compiled = stack.run(i, hidden, calls[i]), fused.run(i, hidden, calls[i])
        row["compiled"]["largest_difference"] = (eager - compiled).abs().max().item()
        for name, inputs in (("products", 0), ("attention", 1)):
            seconds = best_seconds(
                run, _parts(stack, shape, hidden)[inputs], repeats=4, inner=inner
            )
            work = usual * (2 * shape.block_parameters * length)
            row[name] = rate(seconds, usual * flops - work if inputs else work)
        sweep = Sweep(stack, ids[:usual], NLL, batch=usual)
        seconds = best_seconds(
            run, lambda: sweep._score(hidden, None, ids[:usual]), repeats=3, inner=1
        )
        row["head_and_loss"] = rate(seconds, usual * shape.head_flops(length))


def _parts(
    stack: BlockStack, shape: Shape, hidden: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The linear layers of a block on inputs of their width, and its attention, alone."""
    linear = [m for m in stack.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    wide = hidden.new_empty((*hidden.shape[:2], shape.inner)).normal_()

    def products() -> None:
        for layer in linear:
            layer(wide if layer.in_features == shape.inner else hidden)

    size = shape.width // shape.heads
    q = hidden.new_empty((len(hidden), shape.heads, hidden.shape[1], size)).normal_()
    k = hidden.new_empty((len(hidden), shape.kv_heads, hidden.shape[1], size)).normal_()
    many = shape.heads != shape.kv_heads

    def attention() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=many
        )

    return products, attention


class Work:
    """What a search asked of its sweep, and how long that took."""

    def __init__(self, run: Run, sweep: Sweep, values: Callable[..., Any] | None) -> None:
        self.run, self.sweep, self._values = run, sweep, values
        self.calls: list[dict[str, Any]] = []
        self.units = 0
        sweep.on_work(self._count)

    def _count(self, n: int) -> None:
        self.units += n

    @property
    def heads(self) -> int:
        """Windows that went through the output head, per set; of this process."""
        return self.units // group().size - self.sweep.forwards

    def distribute(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Any]]:
        """As ``dealing.deal``, which makes the calls; with the losses drawn, if there are any."""
        forwards, began = self.sweep.forwards, time.perf_counter()
        for call, found in distribute(self.sweep, calls):
            sets, start, stop = call
            self.calls.append(
                {
                    "sets": len(sets),
                    "windows": [start, stop],
                    "removed": max(len(s) for s in sets),
                    "block_forwards": self.sweep.forwards - forwards,
                    "seconds": round(time.perf_counter() - began, 3),
                }
            )
            yield call, found if self._values is None else self._values(sets, start, stop)
            if not group().several:  # ranks must stop together
                self.run.check(1)
            forwards, began = self.sweep.forwards, time.perf_counter()


def search(
    run: Run,
    row: dict[str, Any],
    stack: BlockStack,
    shape: Shape,
    ids: torch.Tensor,
    remove: int,
    *,
    exact: bool = False,
    rounds: int | None = None,
    spread: Spread | None = None,
    compiled: bool = False,
    max_bytes: int | None = None,
) -> None:
    """A search as ``sleb search`` runs it: Sweep, Objective, greedy. ``seconds`` are
    without those that compiling took.

    With ``spread`` the model is scored, and the race is told losses drawn from it instead: random
    weights make all blocks alike. With ``rounds`` only so many rounds are run, and ``row`` says how
    the rest was extrapolated.
    """
    n, length = len(stack), ids.shape[1]
    candidates = list(range(1, n - 1))
    batch = default_batch(stack, length)
    if compiled:
        torch.compiler.reset()  # else another section's graphs are used
        stack = CompiledStack(stack.model, batch)
        few = ids.repeat(-(-batch // len(ids)), 1)[:batch]
        row["compile_seconds"] = round(_compile(run, stack, few), 2)
    sweep = Sweep(stack, ids, NLL, batch=batch, max_bytes=max_bytes)
    drawn = Losses(spread, n, len(ids)) if spread else None
    work = Work(run, sweep, drawn)
    scorer = replace(sweep.scorer, distribute=work.distribute, on_work=lambda tick: None)
    objective = Objective(scorer, len(ids), exact=exact)
    row |= {
        "blocks": n,
        "windows": len(ids),
        "length": length,
        "removed": remove,
        "batch": batch,
        "exact": exact,
        "compiled": compiled,
        "race_decided_by": "losses drawn from a real model's spread" if drawn else "own losses",
    }
    started = time.perf_counter()
    try:
        found, seconds, memory = run.measured(
            lambda: STRATEGIES["greedy"](objective, candidates, rounds or remove)
        )
        row["order"] = list(found.order)
    except OutOfTime as error:
        row["stopped"] = str(error)
        run.sync()
        seconds, memory = time.perf_counter() - started, {}
    flops = sweep.forwards * shape.block_flops(length) + work.heads * shape.head_flops(length)
    row |= {
        "seconds": round(seconds, 2),
        "block_forwards": sweep.forwards,
        "heads": work.heads,
        "petaflop": round(flops / 1e15, 3),
        "tflops": round(flops / seconds / 1e12, 2),
        "share_of_matmul": round(flops / seconds / 1e12 / run.matmul, 3) if run.matmul else None,
        "windows_times_candidates": sum(
            c["sets"] * (c["windows"][1] - c["windows"][0]) for c in work.calls
        ),
        "windows_times_candidates_exact": len(ids)
        * sum(len(candidates) - r for r in range(remove)),
        "memory": memory,
        "calls": work.calls,
    }
    if rounds and rounds < remove and "stopped" not in row:
        _extrapolate(row, n, candidates, remove, rounds, len(ids), seconds, sweep.forwards)


def _compile(run: Run, stack: BlockStack, ids: torch.Tensor) -> float:
    """Seconds of the first full batch through a block, which compiles it."""
    hidden, calls = stack.enter(ids)
    return run.timed(lambda: stack.run(1, hidden, calls[1]))[1]


def _extrapolate(
    row: dict[str, Any],
    n: int,
    candidates: Sequence[int],
    remove: int,
    rounds: int,
    windows: int,
    seconds: float,
    forwards: int,
) -> None:
    """Time of all rounds from that of the first ones, by block forwards and heads."""
    work = []
    for done in range(remove):
        start = (len(candidates) - done) // 2  # which blocks are gone hardly matters
        gone = BlockSet(candidates[start : start + done])
        sets = [gone | {b} for b in candidates if b not in gone]
        work.append(windows * (block_forwards(sets, n) + len(sets)))
    row["extrapolated_seconds"] = round(seconds * sum(work) / sum(work[:rounds]), 1)
    row["extrapolated_by"] = (
        f"{rounds} of {remove} rounds on {windows} windows; the rest by block forwards and heads"
    )


def repair(
    run: Run,
    row: dict[str, Any],
    stack: BlockStack,
    removed: Sequence[int],
    tokens: int,
    length: int,
    vocab: int,
) -> None:
    """The fit of every gap of a cut as ``sleb prune`` makes it, and the loss on 16 held-out windows
    after each. Every first fit is accepted: of random weights the loss tells nothing."""
    ids = torch.randint(0, vocab, (-(-tokens // length), length))
    aside = torch.randint(0, vocab, (16 if run.device.type == "cuda" else 2, length))
    sweep = Sweep(stack, aside, NLL)
    cut = gaps(removed, len(stack))

    def accept() -> bool:
        run.check(1)
        sweep.values([BlockSet(removed)], 0, len(aside))
        return True

    def fit() -> None:
        fitter = Regression(
            stack, removed, ids, sweep.batch, rounded=lambda b, p, new: new.to(stack.dtype)
        )
        try:
            for gap in cut:
                fitter.fit(gap, RIDGES, accept)
        finally:
            fitter.restore()

    _, seconds, memory = run.measured(fit)
    row |= {
        "removed": list(removed),
        "gaps": [{"removed": list(g.removed), "fitted_blocks": list(g.blocks)} for g in cut],
        "tokens": ids.numel(),
        "seconds": round(seconds, 2),
        "memory": memory,
    }


def real(run: Run, row: dict[str, Any], path: Path, size: Size) -> None:
    """Losses, plans and repairs are of the model itself; texts are the built-in ones."""
    windows, length, remove = size.real
    cuda = run.device.type == "cuda"
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
    for name, exact, compiling in [*kinds, *([("racing, compiled", False, True)] * cuda)]:
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
        )
        run.write()
    order = row["searches"]["racing"]["order"]
    row["same_order"] = order == row["searches"]["exact, states kept"]["order"]
    split = split.with_repair(given_tokens(model.stack, size.repair_tokens))
    fitted, judged = split.repair_fit, split.repair_validation
    fixed, seconds, memory = run.measured(lambda: fit_repair(model, order, fitted, judged))
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
        prompt=size.prompt,
        new_tokens=size.new_tokens,
        generate=(1, 64) if cuda else (1,),
    )
