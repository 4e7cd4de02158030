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
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import Self

from sleb.core.errors import InputError
from sleb.core.files import write_text
from sleb.core.progress import Progress, Tick
from sleb.evaluation.answers import Comparison
from sleb.evaluation.gate import GateResult
from sleb.evaluation.perplexity import Evaluation
from sleb.evaluation.tasks import TaskResult
from sleb.evaluation.transfer import Transfer
from sleb.runtimes.bench import Speed
from sleb.runtimes.compatibility import RuntimeReport
from sleb.runtimes.speculative import Drafting
from sleb.surgery.verification import Verification

__all__ = ["RunRecord", "Stopwatch", "environment"]

MAX_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One `sleb prune`: command, timings in seconds, sizes in bytes, quality, verification; and
    what was measured on its result since, each null until then.

    The plan is not repeated here; it is plan.json in the same folder. Tuples of two are (dense,
    pruned). ``repair_note`` says what was repaired, or why nothing was. ``similarity[i][j]``: mean
    cosine of the dense model's states i and j (0 is the embedding, i + 1 the output of block i).
    ``stages``: what `sleb run` has done, and a hash of what each stage depended on.
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
    repair_note: str = ""
    similarity: tuple[tuple[float, ...], ...] | None = None
    tasks: tuple[TaskResult, ...] | None = None
    answers: Comparison | None = None
    speed: Speed | None = None
    transfer: Transfer | None = None
    gate: GateResult | None = None
    runtimes: RuntimeReport | None = None
    draft: Drafting | None = None
    stages: dict[str, str] = field(default_factory=dict)
    schema_version: int = 1

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read ``folder``/run.json.

        Raises:
            InputError: missing, too large, not JSON, another schema, or inconsistent.
        """
        path = Path(folder) / "run.json"
        if not path.is_file():
            raise InputError(f"no run record at {path}; sleb prune and sleb run write one")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a run record")
        try:
            found: Self = TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            raise InputError(f"{path} is not a run record: {where}: {first['msg']}") from None
        if found.schema_version != 1:
            raise InputError(
                f"{path} has run schema {found.schema_version}, this sleb reads 1: upgrade sleb"
            )
        return found

    @classmethod
    def update(cls, folder: str | Path, **sections: Any) -> Self:
        """Replace sections of ``folder``/run.json, and return the new record."""
        record = replace(cls.load(folder), **sections)
        record.save(Path(folder) / "run.json")
        return record


@dataclass
class Stopwatch:
    """A Progress that passes everything on to ``inner`` and keeps the seconds of each stage."""

    inner: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    started: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        """See :class:`sleb.core.progress.Progress`."""
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
