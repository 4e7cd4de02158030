"""What the benchmarks share: how work is measured, where it ran, results as JSON, tables."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sleb.core.errors import SlebError
from sleb.core.files import write_text
from sleb.core.plan import Calibration
from sleb.core.process_group import group

__all__ = [
    "RESULTS",
    "Run",
    "asked",
    "main_of",
    "measure",
    "rounded",
    "save",
    "setting",
    "table",
    "used",
]

RESULTS = Path(__file__).resolve().parent / "results"


def measure(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and peak memory in GB so far (CPU) or of this work (CUDA)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return result, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return result, time.perf_counter() - start, peak


class Run:
    """A benchmark in sections: its device, its budget of seconds, and its results, written after
    each section. What fails is recorded with its error, and the next section runs."""

    def __init__(self, out: Path, budget: float, device: torch.device, about: dict[str, Any]):
        self.out, self.device = out, device
        self.end = time.perf_counter() + budget
        self.results: dict[str, Any] = {"about": about, "sections": {}}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.perf_counter()

    @property
    def matmul(self) -> float | None:
        """TFLOP/s of a large matrix product, where that section has run."""
        found: float | None = self.results["sections"].get("machine", {}).get("matmul_tflops")
        return found

    def attempt(self, row: dict[str, Any], work: Callable[[], None], need: float) -> None:
        """Do ``work``, which fills ``row``, if ``need`` seconds are left."""
        if self.left < need:
            row["skipped"] = f"{self.left:.0f} s of the budget left, about {need:.0f} s needed"
        else:
            try:
                work()
            except Exception as error:  # of any type: what comes next must run
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                row["traceback"] = traceback.format_exc()[-4000:]
        self.write()
        self.free()

    def section(self, name: str, work: Callable[[dict[str, Any]], None], need: float) -> None:
        """A section of the results."""
        row = self.results["sections"][name] = {}
        self.attempt(row, lambda: work(row), need)
        if group().is_main:
            print(f"[{self.left:.0f} s left] {name}: {json.dumps(row)[:1500]}", flush=True)

    def write(self) -> None:
        if group().is_main:
            save(self.out, self.results)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds, the device's work included."""
        return measure(self.device, work)[:2]

    def seconds(self, work: Callable[[], Any], *, repeats: int = 5, inner: int = 1) -> list[float]:
        """Of one call: ``repeats`` timings of ``inner`` calls, after a warm-up."""
        work()
        calls = range(inner)
        return [self.timed(lambda: [work() for _ in calls])[1] / inner for _ in range(repeats)]

    def measured(self, work: Callable[[], Any]) -> tuple[Any, float, dict[str, float]]:
        """Result, seconds, and on a GPU the allocator's peak in GB, in all and above what was held
        before."""
        self.free()
        held = torch.cuda.memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        result, seconds, peak = measure(self.device, work)
        if self.device.type != "cuda":
            return result, seconds, {}
        found = {"held_before_gb": held, "peak_gb": peak, "peak_over_held_gb": peak - held}
        return result, seconds, {name: round(gb, 3) for name, gb in found.items()}


def setting(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what a measurement ran."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def asked(options: argparse.Namespace, *without: str) -> dict[str, Any]:
    """The options of a run for its result, less those that name paths."""
    return {k: v for k, v in vars(options).items() if k not in without}


def used(record: Calibration) -> dict[str, Any]:
    """What was used of which text, without where the texts lie."""
    sources = [
        {"name": Path(s.spec).stem, **s.model_dump(mode="json", exclude={"spec"})}
        for s in record.sources
    ]
    return {"windows": record.windows, "length": record.length, "sources": sources}


def rounded(value: Any) -> Any:
    """Six figures are more than any of these means."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save(path: Path, report: Any) -> None:
    """Write a result, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A Markdown table whose first ``words`` columns are words, and the others numbers."""
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ruler, *rows))


def main_of(main: Callable[[], None]) -> None:
    """Run a script; errors that are the user's are one line."""
    try:
        main()
    except SlebError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
