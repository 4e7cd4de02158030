"""What the benchmarks share: how work is measured, where it ran, results as JSON, tables."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sleb.core.errors import SlebError
from sleb.core.files import write_text
from sleb.core.plan import Calibration

__all__ = ["asked", "main_of", "measure", "rounded", "save", "setting", "table", "used"]


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

    def lines() -> Iterator[str]:
        yield f"| {' | '.join(head)} |"
        yield f"| {' | '.join(['---'] * words + ['---:'] * (len(head) - words))} |"
        for row in rows:
            yield f"| {' | '.join(map(str, row))} |"

    return "\n".join(lines())


def main_of(main: Callable[[], None]) -> None:
    """Run a script; errors that are the user's are one line."""
    try:
        main()
    except SlebError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
