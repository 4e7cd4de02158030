"""Stand-ins for the tests of `sleb bench`: settings, models, and a worker without a process."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from sleb.core.progress import silent
from sleb.runtimes.adapters import Settings
from sleb.runtimes.bench import Case
from sleb.runtimes.bench_models import BenchModel
from sleb.runtimes.bench_runs import Bench
from sleb.runtimes.worker import OutOfMemory, Run

CPU = {"dtype": "float32", "device": "cpu", "threads": 1}
PROMPT = Case(name="prompt", batch=1, prompt_tokens=16, new_tokens=0)
WRITE = Case(name="generate-2", batch=2, prompt_tokens=8, new_tokens=12)
ALONE = Case(name="generate-1", batch=1, prompt_tokens=8, new_tokens=3)


def settings(path: Path, **changes) -> Settings:
    given = {
        "runtime": "transformers",
        "path": str(path),
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "blocks": 6,
        "vocabulary": 259,
        "longest": 64,
        "widest": 4,
        "models": 1,
    }
    return Settings(**{**given, **changes})


class Fake:
    """A worker whose seconds follow from its blocks; it writes down who ran when."""

    log: ClassVar[list[tuple[str, str, bool, bool]]] = []
    out_of: ClassVar[dict[str, set[str]]] = {}
    at_load: int | None = None  # as many fit in memory at once
    live = 0

    def __init__(self, name: str, given: Settings) -> None:
        if Fake.at_load is not None and Fake.live >= Fake.at_load:
            raise OutOfMemory(f"{name}: out of memory")
        Fake.live += 1
        self.name, self.given = name, given
        self.load_seconds, self.kept, self.threads, self.device = 0.5, 2, 3, given.device
        self.turn = 0

    def run(self, case: Case, *, shortened: bool = False, watched: bool = False) -> Run:
        Fake.log.append((self.name, case.name, shortened, watched))
        if case.name in Fake.out_of.get(self.name, ()):
            raise OutOfMemory(f"{self.name}: out of memory")
        self.turn += not shortened
        blocks = self.kept if shortened else self.given.blocks
        # 1 s for all else, half a second a block; the first run is as slow as first runs are
        slow = 100.0 if watched else 1.0
        return Run(seconds=(1 + blocks / 2) * slow, peak=1000 * blocks if watched else 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        Fake.live -= 1


def subject(ref: str, blocks: int, **changes) -> BenchModel:
    given = {"parameters": 10 * blocks, "nbytes": 20 * blocks, "vocabulary": 259, "longest": 256}
    given |= {"path": Path(ref), "config": None, "gguf": None}
    return BenchModel(ref=ref, blocks=blocks, **{**given, **changes})


def bench_of(*models: BenchModel, runs: int = 6, note=None, **changes) -> Bench:
    given = {"device": "cpu", "dtype": "float32", "threads": 1, "trust_remote_code": False}
    given |= {"progress": silent, "note": note or (lambda said: pytest.fail(said))}
    return Bench(models=models, runs=runs, **{**given, **changes})


MODELS = (subject("dense", 10), subject("pruned", 8))
