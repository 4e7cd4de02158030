"""From timed turns to medians, ratios, and the ratio that is physically possible."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isnan

import numpy as np
import psutil
from scipy import stats

from sleb.core.errors import InputError, ResourceError, SlebError
from sleb.core.progress import Progress
from sleb.core.statistics import Interval
from sleb.models.load import DTYPES
from sleb.runtimes.adapters import Settings
from sleb.runtimes.bench import Case, Measured, Ratio, Runs
from sleb.runtimes.bench_models import BenchModel
from sleb.runtimes.paired import WARM_UP, Entry, Timed, interleaved, work
from sleb.runtimes.worker import Failed, OutOfMemory, Worker

__all__ = ["Bench", "Part", "fitting", "median_ratio", "possible"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one runtime gave."""

    device: str
    threads: int
    cases: tuple[Case, ...]
    models: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]


def fitting(cases: Sequence[Case], models: Sequence[BenchModel]) -> tuple[list[Case], list[str]]:
    """The cases that every model has room for, prompts shortened where need be, and what was
    changed or left out, in words.

    Raises:
        InputError: none is left.
    """
    limits = {m.longest: m.ref for m in models if m.longest is not None}
    if not limits:
        return list(cases), []
    most = min(limits)
    kept, notes = [], []
    for case in cases:
        room = most - max(1, case.new_tokens)
        if room < 1:
            notes.append(
                f"{case.name}: {case.new_tokens} new tokens are more than the {most} that "
                f"{limits[most]} reads"
            )
        elif room < case.prompt_tokens:
            kept.append(replace(case, prompt_tokens=room))
            notes.append(
                f"{case.name}: prompts of {case.prompt_tokens} tokens, shortened to {room}, as "
                f"{limits[most]} reads {most}"
            )
        else:
            kept.append(case)
    if not kept:
        raise InputError(f"{limits[most]} reads only {most} tokens; there is no case for it")
    return kept, notes


def median_ratio(dense: Sequence[float], pruned: Sequence[float]) -> Interval:
    """Median over rounds of dense / pruned seconds, with its 95 % interval by the quantile test
    (scipy): order statistics, whatever the distribution. Fewer than six rounds give none, as even
    their extremes enclose the median too seldom."""
    ratios = np.array(dense) / np.array(pruned)
    found = stats.quantile_test(ratios, q=0, p=0.5).confidence_interval(0.95)
    low, high = (None if isnan(bound) else float(bound) for bound in (found.low, found.high))
    return Interval(value=float(np.median(ratios)), low=low, high=high)


def possible(
    dense: Sequence[float],
    shortened: Sequence[float],
    *,
    blocks: int,
    kept: int,
    removed: int,
) -> float | None:
    """How many times as fast a model gets at most when ``removed`` of ``blocks`` equal blocks go,
    from seconds per round with all of them and with ``kept``. Everything else stays, and takes no
    less than no time, so it is at most blocks / (blocks - removed). None if fewer blocks took no
    less time."""
    share = float(np.median(np.array(shortened) / np.array(dense)))  # paired, as ratios are
    if not 0 < share < 1:
        return None
    block = (1 - share) / (blocks - kept)
    rest = max(0.0, 1 - blocks * block)
    return (rest + blocks * block) / (rest + (blocks - removed) * block)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The models, the first one dense, and how to run them; ``note`` is told what is not."""

    models: Sequence[BenchModel]
    runs: int
    device: str
    dtype: str
    threads: int | None
    trust_remote_code: bool
    note: Callable[[str], None]
    progress: Progress

    def under(self, runtime: str, cases: Sequence[Case]) -> Part | None:
        """Time all models in ``runtime``; None if it cannot be used, which is noted. transformers
        always can, so there an error is raised.

        Raises:
            ResourceError: a model does not fit in memory, or no case does.
            SlebError: as :func:`sleb.load`.
        """
        if runtime == "transformers":
            return self._part(runtime, cases)
        if runtime == "llama.cpp":
            if lacking := [m.ref for m in self.models if m.gguf is None]:
                self.note(f"llama.cpp: there is no .gguf file of {', '.join(lacking)}")
                return None
            if wide := [case.name for case in cases if case.batch > 1]:
                self.note(f"llama.cpp: {', '.join(wide)}: it runs one sequence at a time here")
            cases = [case for case in cases if case.batch == 1]
        try:
            return self._part(runtime, cases)
        except (Failed, SlebError) as error:
            self.note(f"{runtime}: installed, but cannot be used: {error}")
            return None

    def _part(self, runtime: str, cases: Sequence[Case]) -> Part:
        found = _Found()
        everyone = list(range(len(self.models)))
        try:
            if not self._fit_together():
                raise OutOfMemory
            self._group(runtime, everyone, cases, found)
        except OutOfMemory:
            if len(everyone) == 1:
                raise
            self.note(
                f"{runtime}: the models do not fit in memory together and were timed one after "
                "the other, so a machine that changes its pace shows in the ratios"
            )
            found = _Found()
            for i in everyone:
                self._group(runtime, [i], cases, found)
        kept = tuple(c for c in cases if all((i, False, c.name) in found.timed for i in everyone))
        if not kept:
            raise ResourceError(
                "no case fits in memory; try --quick, --dtype bfloat16 or fewer models at a time"
            )
        return Part(
            device=found.workers[0].device,
            threads=found.workers[0].threads,
            cases=kept,
            models=tuple(self._measured(runtime, i, kept, found) for i in everyone),
            ratios=tuple(
                self._ratio(runtime, i, case, found) for i in everyone[1:] for case in kept
            ),
        )

    def _fit_together(self) -> bool:
        """Whether memory has room for all weights at once: a system without any left would end a
        process of its own choice. A GPU says so itself."""
        if self.device != "cpu" or len(self.models) == 1:
            return True
        needed = sum(m.parameters for m in self.models) * DTYPES[self.dtype].itemsize
        return bool(needed < psutil.virtual_memory().available)

    def _group(
        self, runtime: str, members: list[int], cases: Sequence[Case], found: _Found
    ) -> None:
        """Load some of the models, time them in turn, and let go of them."""
        with ExitStack() as stack:
            entries = []
            for i in members:
                with self.progress.stage(f"loading {self.models[i].ref} ({runtime})", None):
                    settings = self._settings(runtime, i, len(members), cases)
                    worker = stack.enter_context(Worker(self.models[i].ref, settings))
                found.workers[i] = worker
                entries.append(Entry(model=i, worker=worker))
            if members[0] == 0 and len(self.models) > 1 and found.workers[0].kept is not None:
                entries.append(Entry(model=0, worker=found.workers[0], shortened=True))
            rounds = WARM_UP + self.runs
            total = sum(map(work, cases)) * len(entries) * rounds
            with self.progress.stage(f"timing with {runtime}", total) as tick:
                for case in cases:
                    timed = interleaved(entries, case, self.runs, tick, self._noting(runtime))
                    found.timed.update({(*key, case.name): one for key, one in timed.items()})
        gc.collect()

    def _noting(self, runtime: str) -> Callable[[str], None]:
        return lambda said: self.note(said if runtime == "transformers" else f"{runtime}: {said}")

    def _settings(self, runtime: str, i: int, together: int, cases: Sequence[Case]) -> Settings:
        model = self.models[i]
        path = model.gguf if runtime == "llama.cpp" and model.gguf else model.path
        return Settings(
            runtime=runtime,
            path=str(path),
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            blocks=model.blocks,
            vocabulary=model.vocabulary,
            longest=max(case.prompt_tokens + max(1, case.new_tokens) for case in cases),
            widest=max(case.batch for case in cases),
            models=together,
            trust_remote_code=self.trust_remote_code,
        )

    def _measured(self, runtime: str, i: int, cases: Sequence[Case], found: _Found) -> Measured:
        model = self.models[i]
        timed = {case.name: found.timed[i, False, case.name] for case in cases}
        of_file = runtime == "llama.cpp" and model.gguf
        return Measured(
            path=model.ref,
            runtime=runtime,
            blocks=model.blocks,
            parameters=model.parameters,
            file_bytes=of_file.stat().st_size if of_file else model.nbytes,
            peak_bytes=max(one.peak for one in timed.values()),
            load_seconds=found.workers[i].load_seconds,
            runs=tuple(_runs(case, timed[case.name]) for case in cases),
        )

    def _ratio(self, runtime: str, i: int, case: Case, found: _Found) -> Ratio:
        dense, pruned = self.models[0], self.models[i]
        whole = found.timed[0, False, case.name].seconds
        shortened = found.timed.get((0, True, case.name))
        kept = found.workers[0].kept
        return Ratio(
            path=pruned.ref,
            runtime=runtime,
            case=case.name,
            ratio=median_ratio(whole, found.timed[i, False, case.name].seconds),
            ideal=dense.blocks / pruned.blocks,
            possible=None
            if shortened is None or kept is None
            else possible(
                whole,
                shortened.seconds,
                blocks=dense.blocks,
                kept=kept,
                removed=dense.blocks - pruned.blocks,
            ),
        )


class _Found:
    """What was timed, by (model, shortened, case), and each model's worker, which has ended."""

    def __init__(self) -> None:
        self.timed: dict[tuple[int, bool, str], Timed] = {}
        self.workers: dict[int, Worker] = {}


def _runs(case: Case, timed: Timed) -> Runs:
    low, median, high = (float(q) for q in np.quantile(timed.seconds, (0.25, 0.5, 0.75)))
    return Runs(
        case=case.name,
        median=median,
        low=low,
        high=high,
        seconds=timed.seconds,
        tokens_per_second=case.batch * (case.new_tokens or case.prompt_tokens) / median,
    )
