"""The run record: everything that a run measured, as versioned JSON beside the checkpoint.

Reports are made from this file alone, so a figure that is not here is not claimed anywhere.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sleb.exactness import Verification
from sleb.progress import Progress, Tick
from sleb.quality import Evaluation

__all__ = ["RunRecord", "Stopwatch", "environment"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One `sleb prune`: command, timings in seconds, sizes in bytes, quality, verification.

    The plan is not repeated here; it is plan.json in the same folder.
    """

    command: str
    started: str
    model: str
    removed: tuple[int, ...]
    blocks: int
    seconds: dict[str, float]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    evaluation: Evaluation | None
    evaluation_note: str
    verification: Verification
    environment: dict[str, Any]
    schema_version: int = 1

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(
            json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


@dataclass
class Stopwatch:
    """A Progress that passes everything on to ``inner`` and keeps the seconds of each stage."""

    inner: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    started: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        """See :class:`sleb.progress.Progress`."""
        return self._timed(title, total)

    @contextmanager
    def _timed(self, title: str, total: int | None) -> Iterator[Tick]:
        before = time.perf_counter()
        try:
            with self.inner.stage(title, total) as tick:
                yield tick
        finally:
            spent = time.perf_counter() - before
            self.seconds[title] = round(self.seconds.get(title, 0.0) + spent, 3)


def environment(device: str, dtype: str) -> dict[str, Any]:
    """The machine and settings that timings and rounding depend on."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
