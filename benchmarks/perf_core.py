"""How a section of the performance benchmark measures: device, clock, memory, budget."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sleb.core.process_group import group

__all__ = ["OutOfTime", "Run", "best_seconds"]


class OutOfTime(Exception):
    """A section has used up the time that was left."""


class Run:
    """One call of the benchmark: its device, its end, and its results, written after each section.

    A section that fails is recorded with its error, and the next one runs.
    """

    def __init__(self, out: Path, budget: float, device: torch.device, about: dict[str, Any]):
        self.out, self.device = out, device
        self.started = time.perf_counter()
        self.budget = budget
        self.results: dict[str, Any] = {"about": about, "sections": {}}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.perf_counter() - self.started)

    def check(self, need: float = 0.0) -> None:
        """Raise OutOfTime if less than ``need`` seconds are left."""
        if self.left < need:
            raise OutOfTime(f"{self.left:.0f} s left, {need:.0f} s needed")

    def section(self, name: str, work: Callable[[dict[str, Any]], None], need: float) -> None:
        """Run ``work``, which fills a dict as it goes, if ``need`` seconds are left."""
        row: dict[str, Any] = {}
        self.results["sections"][name] = row
        started = time.perf_counter()
        if self.left < need:
            row["skipped"] = f"{self.left:.0f} s of the budget left, about {need:.0f} s needed"
        else:
            try:
                work(row)
            except OutOfTime as error:
                row["stopped"] = str(error)
            except Exception as error:  # of any type: the next section must run
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                row["traceback"] = traceback.format_exc()[-4000:]
        row["section_seconds"] = round(time.perf_counter() - started, 2)
        self.write()
        self.free()
        if not group().is_main:
            return
        shown = {k: v for k, v in row.items() if not isinstance(v, list) or len(v) < 8}
        print(f"[{self.left:.0f} s left] {name}: {json.dumps(shown)[:1500]}", flush=True)

    def write(self) -> None:
        if not group().is_main:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        new = self.out.with_suffix(".tmp")
        new.write_text(json.dumps(self.results, indent=1) + "\n")
        new.replace(self.out)

    def free(self) -> None:
        import gc

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds, the device's work included."""
        self.sync()
        start = time.perf_counter()
        result = work()
        self.sync()
        return result, time.perf_counter() - start

    def measured(self, work: Callable[[], Any]) -> tuple[Any, float, dict[str, float]]:
        """Result, seconds, and on a GPU the allocator's peak in GB, in all and above what was held
        before."""
        if self.device.type != "cuda":
            return *self.timed(work), {}
        self.free()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result, seconds = self.timed(work)
        peak = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
        return (
            result,
            seconds,
            {
                "held_before_gb": round(held / 1e9, 3),
                "peak_gb": round(peak / 1e9, 3),
                "peak_over_held_gb": round((peak - held) / 1e9, 3),
                "reserved_peak_gb": round(reserved / 1e9, 3),
            },
        )


def best_seconds(run: Run, work: Callable[[], Any], *, repeats: int = 5, inner: int = 1) -> float:
    """Seconds of one call: the best of ``repeats`` timings of ``inner`` calls, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        _, seconds = run.timed(lambda: [work() for _ in range(inner)])
        times.append(seconds / inner)
    return min(times)
