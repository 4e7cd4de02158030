"""What the benchmarks share: how work is measured, and where it ran."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["measure", "setting"]


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
