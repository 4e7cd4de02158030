"""Speed and memory, dense and pruned in turn within one run, against what Amdahl's law allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import psutil
from scipy import stats

from sleb.checkpoints.checkpoint import Checkpoint, plan_alone
from sleb.checkpoints.cut import Cut
from sleb.checkpoints.depth_fields import refuse_unsupported
from sleb.config import BenchConfig, takes
from sleb.core.errors import InputError, ResourceError, SlebError, UnsupportedModel
from sleb.core.plan import Plan
from sleb.core.printable import paragraphs
from sleb.core.progress import Progress, Tick, silent
from sleb.core.statistics import Interval
from sleb.models.load import DTYPES, load_config, pick_device, pick_dtype
from sleb.models.source import called, resolve
from sleb.models.stack import decoder_config
from sleb.runtimes.base import Prompts, Settings, installed
from sleb.runtimes.worker import Failed, OutOfMemory, Run, Worker

T = TypeVar("T")
_DEFAULTS = BenchConfig()


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model: ``ref`` as the user wrote it, the folder to load, stored elements and bytes of
    weights. ``longest``: tokens that it reads, None without a limit. ``gguf``: see
    :func:`gguf_file`. ``plan``: of parts of blocks, by which it is made of the dense model while
    that is loaded; elements and bytes are then the dense model's."""

    ref: str
    path: Path
    config: Any
    blocks: int
    parameters: int
    nbytes: int
    vocabulary: int
    longest: int | None
    gguf: Path | None
    plan: Path | None = None

    def settings(self, config: BenchConfig, runtime: str = "transformers", **more: Any) -> Settings:
        """How it is loaded, with a ``config`` that is :func:`resolved`."""
        return Settings(
            runtime=runtime,
            path=str((runtime == "llama.cpp" and self.gguf) or self.path),
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            blocks=self.blocks,
            plan=str(self.plan.absolute()) if self.plan else None,
            trust_remote_code=config.trust_remote_code,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: ``new_tokens`` = 0 reads a prompt, 1 is the time to the first token."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Seconds of a case on one model: median, quartiles, and every run in order."""

    case: str
    median: float
    low: float
    high: float
    seconds: tuple[float, ...]
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model under one runtime (transformers, vllm, llama.cpp). Bytes; ``file_bytes`` of a GGUF
    file, or of the weights in a folder; ``load_seconds`` with files in the page cache and libraries
    imported; ``peak_bytes`` while it ran, weights included.

    The peak is over all cases. On the CPU it is the resident memory of the model's own process
    beyond what that held before the model was loaded, looked at every millisecond; on a GPU what
    torch's allocator gave out, so the context of CUDA comes on top."""

    path: str
    runtime: str
    blocks: int
    parameters: int
    file_bytes: int
    peak_bytes: int
    load_seconds: float
    runs: tuple[Runs, ...]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast a pruned model is as the first one: median over paired runs with its
    95 % interval, which needs six of them. ``ideal``: blocks / (blocks - removed). ``possible``:
    the bound of :func:`amdahl_bound`. Neither is known where parts of blocks go."""

    path: str
    runtime: str
    case: str
    ratio: Interval
    ideal: float | None
    possible: float | None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was not run, or not as planned. ``reason``: a key of the views' words, or ``note`` of an
    older record, whose sentence is in ``detail``. The rest is what that is about: ``models`` that
    lack something and ``others`` that do not; tokens ``asked`` for and ``used``, and a ``limit`` of
    them; a library's own words."""

    reason: str
    runtime: str = "transformers"
    cases: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    asked: int = 0
    used: int = 0
    limit: int = 0
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A whole bench: the first of ``models`` is the dense one."""

    device: str
    dtype: str
    threads: int
    cases: tuple[Case, ...]
    models: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[Skipped, ...] = ()

    def __str__(self) -> str:
        """How many times as fast each pruned model is, by case."""
        first = f"speed on {self.device}, {self.dtype}, {self.threads} threads"
        found: dict[str, list[str]] = {f"{m.path} ({m.runtime})": [] for m in self.models}
        for r in self.ratios:
            found[f"{r.path} ({r.runtime})"].append(f"{r.case} {r.ratio.value:.3g}x")
        rows = (f"{name}: {', '.join(said)}" for name, said in found.items() if said)
        return paragraphs([first, *rows])


FULL = (
    Case(name="prompt", batch=1, prompt_tokens=2048, new_tokens=0),
    Case(name="first-token", batch=1, prompt_tokens=512, new_tokens=1),
    *(
        Case(name=f"generate-{n}", batch=n, prompt_tokens=64, new_tokens=128)
        for n in (1, 8, 32, 64)
    ),
)
QUICK = (
    Case(name="prompt", batch=1, prompt_tokens=256, new_tokens=0),
    Case(name="first-token", batch=1, prompt_tokens=64, new_tokens=1),
    *(Case(name=f"generate-{n}", batch=n, prompt_tokens=32, new_tokens=16) for n in (1, 4)),
)
WARM_UP = 1  # rounds; memory is measured in it, as watching costs time


@takes(BenchConfig)
def bench(
    model: str | Path,
    outs: Sequence[str | Path] = (),
    config: BenchConfig = _DEFAULTS,
    *,
    progress: Progress = silent,
) -> Speed:
    """Time ``model`` and each of ``outs`` on every case, in turn.

    Each model is in a process of its own, and all are resident at once if memory allows. For each
    case there is a round that is not timed, in which memory is measured, and then ``runs`` rounds
    in which each model runs once, every other round in reverse order. Prompts are random tokens,
    the same for every model; generation is greedy and ends at its length alone.

    A ratio is the median over rounds of dense seconds / pruned seconds. Its interval is that of the
    quantile test (from order statistics), which holds whatever the distribution; it needs six runs.
    The bound of Amdahl's law comes from the dense model, run as well with nearly all of its blocks
    bypassed: the difference gives the time of one block, on average, and the rest is overhead that
    no cut can save.

    With vLLM or llama.cpp installed the same goes through these, where they can be used.

    Raises:
        InputError: see :func:`bench_models`; an option is not possible; or no case fits the length
            that the models read.
        UnsupportedModel, DataError: see :func:`sleb.load`.
        ResourceError: a model does not fit in memory, or none of the cases do.
    """
    if config.draft:
        raise InputError("--draft times drafts and nothing else: from Python, use draft()")
    trust = config.trust_remote_code
    models = bench_models(model, outs, trust_remote_code=trust, progress=progress)
    config = resolved(config, models[0])
    cases, skipped = fitting(QUICK if config.quick else FULL, models)
    found = []
    for runtime in installed():
        measuring = Bench(
            models=models, runtime=runtime, config=config, note=skipped.append, progress=progress
        )
        found += [timed] if (timed := measuring.run(cases)) else []
    return Speed(
        device=found[0].device,
        dtype=config.dtype,
        threads=found[0].threads,
        cases=tuple(case for case in cases if any(case in one.cases for one in found)),
        models=tuple(m for one in found for m in one.models),
        ratios=tuple(r for one in found for r in one.ratios),
        skipped=tuple(skipped),
    )


# -- models and cases ------------------------------------------------------------------------------


def bench_models(
    model: str | Path, outs: Sequence[str | Path], *, trust_remote_code: bool, progress: Progress
) -> list[BenchModel]:
    """MODEL and each OUT, from configs and file headers.

    Raises:
        InputError: a model is not there, or given twice; an OUT is not MODEL with fewer blocks.
        UnsupportedModel, DataError, ResourceError: see :func:`sleb.load`.
    """
    refs = [str(ref) for ref in (model, *outs)]
    for i, ref in enumerate(refs):
        if ref in refs[:i]:
            raise InputError(f"{ref} is given twice; give each model once, the dense one first")
    dense, pruned = _bench_model(refs[0], trust_remote_code, progress), []
    for ref in refs[1:]:
        if plan := plan_alone(ref):
            pruned.append(replace(dense, ref=ref, plan=plan, blocks=_left(plan), gguf=None))
        else:
            pruned.append(_bench_model(ref, trust_remote_code, progress))
            _check(dense, pruned[-1])
    return [dense, *pruned]


def _left(plan: Path) -> int:
    """Blocks that stay, whole or in part."""
    return len(Cut.of(Plan.load(plan), parts=True).kept)


def _bench_model(ref: str, trust_remote_code: bool, progress: Progress) -> BenchModel:
    path = resolve(ref, progress).path
    checkpoint = Checkpoint.open(path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    text = decoder_config(config)
    refuse_unsupported(text.to_dict(), text.num_hidden_layers)
    return BenchModel(
        ref=ref,
        path=path,
        config=config,
        blocks=text.num_hidden_layers,
        parameters=sum(info.numel for info in checkpoint.tensors.values()),
        nbytes=checkpoint.nbytes,
        vocabulary=text.vocab_size,
        longest=getattr(text, "max_position_embeddings", None),
        gguf=gguf_file(ref, path),
    )


def resolved(config: BenchConfig, model: BenchModel) -> BenchConfig:
    """``config`` with a device and a dtype in place of auto: those of ``model`` are for all.

    Raises:
        InputError: see :func:`sleb.load`.
    """
    device = pick_device(config.device)
    dtype = str(pick_dtype(config.dtype, model.config, device)).removeprefix("torch.")
    return config.replaced({"device": str(device), "dtype": dtype})


def gguf_file(ref: str | Path, folder: Path) -> Path | None:
    """The .gguf file that the model ``ref`` is, or that has its folder's name and lies beside it,
    or the only one in ``folder``, where its checkpoint is."""
    path = Path(ref).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    beside = path.with_name(path.name + ".gguf")
    if beside.is_file():
        return beside
    inside = sorted(folder.glob("*.gguf"))
    return inside[0] if len(inside) == 1 else None


def _check(dense: BenchModel, pruned: BenchModel) -> None:
    """Refuse what is no pruned ``dense``: its ratio would say nothing about blocks."""
    ours, theirs = (decoder_config(one.config) for one in (dense, pruned))
    for name in ("model_type", "vocab_size", "hidden_size"):
        if (old := getattr(ours, name, None)) != (new := getattr(theirs, name, None)):
            raise InputError(
                f"{pruned.ref} is not {dense.ref} with blocks removed: its {name} is {new}, not "
                f"{old}"
            )
    if pruned.blocks >= dense.blocks:
        raise InputError(
            f"{pruned.ref} has {pruned.blocks} blocks and {dense.ref} {dense.blocks}; give the "
            "dense model first, and then what was made of it"
        )


def fitting(
    cases: Sequence[Case], models: Sequence[BenchModel]
) -> tuple[list[Case], list[Skipped]]:
    """The cases that every model has room for, prompts shortened where need be, and what was
    changed or left out.

    Raises:
        InputError: none is left.
    """
    limits = {m.longest: m.ref for m in models if m.longest is not None}
    if not limits:
        return list(cases), []
    most = min(limits)
    reads = limits[most]
    fit, skipped = [], []
    for case in cases:
        room = most - max(1, case.new_tokens)
        about = Skipped(reason="too-long", cases=(case.name,), models=(reads,), limit=most)
        if room < 1:
            skipped.append(replace(about, asked=case.new_tokens))
        elif room < case.prompt_tokens:
            fit.append(replace(case, prompt_tokens=room))
            skipped.append(replace(about, reason="shortened", asked=case.prompt_tokens, used=room))
        else:
            fit.append(case)
    if not fit:
        raise InputError(f"{reads} reads only {most} tokens; there is no case for it")
    return fit, skipped


def random_prompts(case: Case, vocabulary: int) -> Prompts:
    """Random ids [batch, prompt tokens] below ``vocabulary``; the same for every model."""
    shape = (case.batch, case.prompt_tokens)
    ids: Prompts = np.random.default_rng(0).integers(0, vocabulary, shape).tolist()
    return ids


# -- statistics ------------------------------------------------------------------------------------


def median_ratio(dense: Sequence[float], pruned: Sequence[float]) -> Interval:
    """Median over rounds of dense / pruned seconds, with its 95 % interval by the quantile test
    (scipy): order statistics, whatever the distribution. Fewer than six rounds give none, as even
    their extremes enclose the median too seldom."""
    ratios = np.array(dense) / np.array(pruned)
    found = stats.quantile_test(ratios, q=0, p=0.5).confidence_interval(0.95)
    low, high = (None if isnan(bound) else float(bound) for bound in (found.low, found.high))
    return Interval(value=float(np.median(ratios)), low=low, high=high)


def amdahl_bound(
    dense: Sequence[float], fewest: Sequence[float], *, blocks: int, ran: int, removed: int
) -> float | None:
    """How many times as fast a model gets at most when ``removed`` of ``blocks`` equal blocks go
    (Amdahl's law), from seconds per round with all of them and with the ``fewest``, of which
    ``ran``. The overhead stays, and takes no less than no time, so the bound is at most
    blocks / (blocks - removed). None if fewer blocks took no less time."""
    share = float(np.median(np.array(fewest) / np.array(dense)))  # paired, as ratios are
    if not 0 < share < 1:
        return None
    block = (1 - share) / (blocks - ran)
    overhead = max(0.0, 1 - blocks * block)
    return (overhead + blocks * block) / (overhead + (blocks - removed) * block)


def _runs(case: Case, seconds: tuple[float, ...]) -> Runs:
    low, median, high = (float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    rate = case.batch * (case.new_tokens or case.prompt_tokens) / median
    return Runs(
        case=case.name, median=median, low=low, high=high, seconds=seconds, tokens_per_second=rate
    )


def _seconds(runs: Sequence[Run]) -> tuple[float, ...]:
    """Of each round but the first, which warms up."""
    return tuple(run.seconds for run in runs[WARM_UP:])


# -- paired measurement ----------------------------------------------------------------------------


class Turn(NamedTuple):
    """What runs in each round: model number ``model``, whole or with its ``fewest`` blocks."""

    model: int
    fewest: bool = False


def there_and_back(turns: Sequence[T], number: int) -> list[T]:
    """The turns of round ``number``: every other round goes backwards, so that a steady drift of
    the machine cancels (A B, B A, ...)."""
    return list(turns if number % 2 == 0 else reversed(turns))


def _effort(case: Case) -> int:
    """Roughly how long a case takes, in steps of generation, for the progress bar alone."""
    return 1 + case.new_tokens + case.batch * (case.prompt_tokens + case.new_tokens) // 16


@dataclass(kw_only=True)
class Bench:
    """The models, the first one dense, and the runtime that they run in. ``config`` says where and
    how often, ``note`` is told what is not run; ``workers``, whose attributes stay, and ``runs`` by
    the name of a case are what was found."""

    models: Sequence[BenchModel]
    runtime: str
    config: BenchConfig
    note: Callable[[Skipped], None]
    progress: Progress
    workers: dict[int, Worker] = field(default_factory=dict)
    runs: dict[str, dict[Turn, list[Run]]] = field(default_factory=lambda: defaultdict(dict))

    def run(self, cases: Sequence[Case]) -> Speed | None:
        """Time all models; None if the runtime cannot be used, which is noted. transformers always
        can, so there an error is raised.

        Raises:
            ResourceError: a model does not fit in memory, or no case does.
            SlebError: as :func:`sleb.load`.
        """
        if self.runtime != "transformers" and (
            planned := tuple(m.ref for m in self.models if m.plan)
        ):
            self._skip(reason="plan-alone", models=planned)
            return None
        if self.runtime == "llama.cpp":
            if lacking := tuple(m.ref for m in self.models if m.gguf is None):
                self._skip(reason="no-gguf", models=lacking)
                return None
            if wide := tuple(case.name for case in cases if case.batch > 1):
                self._skip(reason="one-sequence", cases=wide)
            cases = [case for case in cases if case.batch == 1]
        try:
            return self._speed(cases)
        except (Failed, SlebError) as error:
            if self.runtime == "transformers":
                raise
            self._skip(reason="unusable", detail=str(error))
            return None

    def _skip(self, **fields: Any) -> None:
        self.note(Skipped(runtime=self.runtime, **fields))

    def _speed(self, cases: Sequence[Case]) -> Speed:
        everyone = range(len(self.models))
        try:
            if not self._fit_together():
                raise OutOfMemory
            self._time(everyone, cases)
        except OutOfMemory:
            if len(everyone) == 1:
                raise
            self._skip(reason="apart")
            self.runs.clear()
            for i in everyone:
                self._time([i], cases)
        timed = [case for case in cases if all(Turn(i) in self.runs[case.name] for i in everyone)]
        if not timed:
            raise ResourceError(
                "no case fits in memory; try --quick, --dtype bfloat16 or fewer models at a time"
            )
        return Speed(
            device=self.workers[0].device,
            dtype=self.config.dtype,
            threads=self.workers[0].threads,
            cases=tuple(timed),
            models=tuple(self._measured(i, timed) for i in everyone),
            ratios=tuple(self._ratio(i, case) for i in everyone[1:] for case in timed),
        )

    def _fit_together(self) -> bool:
        """Whether memory has room for all weights at once: a system without any left would end a
        process of its own choice. A GPU says so itself."""
        if self.config.device != "cpu" or len(self.models) == 1:
            return True
        needed = sum(m.parameters for m in self.models) * DTYPES[self.config.dtype].itemsize
        return bool(needed < psutil.virtual_memory().available)

    def _time(self, members: Sequence[int], cases: Sequence[Case]) -> None:
        """Load some of the models, time them in turn, and let go of them."""
        needs = {
            "length": max(case.prompt_tokens + max(1, case.new_tokens) for case in cases),
            "batch": max(case.batch for case in cases),
            "models": len(members),
        }
        with ExitStack() as stack:
            for i in members:
                model = self.models[i]
                with self.progress.stage(f"loading {called(model.ref)} ({self.runtime})", None):
                    self.workers[i] = stack.enter_context(Worker(model.ref))
                    self.workers[i].load(model.settings(self.config, self.runtime, **needs))
            turns = [Turn(i) for i in members]
            if members[0] == 0 and len(self.models) > 1 and self.workers[0].fewest_blocks:
                turns.append(Turn(0, fewest=True))
            total = sum(map(_effort, cases)) * len(turns) * (WARM_UP + self.config.runs)
            with self.progress.stage(f"timing with {self.runtime}", total) as tick:
                for case in cases:
                    self.runs[case.name] |= self._paired(turns, case, tick)

    def _paired(self, turns: list[Turn], case: Case, tick: Tick) -> dict[Turn, list[Run]]:
        """A case once per turn in each round, after a round to warm up, in which memory is watched.

        A case for which memory ends is left out for all models, and one with the fewest blocks that
        does not run is left out alone.
        """
        turns, runs = list(turns), dict[Turn, list[Run]]()
        prompts, rounds = random_prompts(case, self.models[0].vocabulary), self.config.runs
        for number in range(WARM_UP + rounds):
            lacking = set()
            for turn in there_and_back(turns, number):
                worker, fewest = self.workers[turn.model], turn.fewest
                watched = number < WARM_UP and not fewest
                try:
                    run = worker.work(prompts, case.new_tokens, fewest=fewest, watched=watched)
                    runs.setdefault(turn, []).append(run)
                except (OutOfMemory, Failed, InputError, UnsupportedModel) as error:
                    if fewest:
                        turns.remove(turn)
                        runs.pop(turn, None)
                        self._skip(reason="no-bound", cases=(case.name,), detail=str(error))
                    elif isinstance(error, OutOfMemory):
                        lacking.add(turn.model)
                    else:
                        raise
                tick(_effort(case), f"{case.name}, {worker.name}")
            if lacking:
                models = {turn.model: self.models[turn.model].ref for turn in turns}
                out, fit = (
                    tuple(ref for i, ref in models.items() if (i in lacking) is x)
                    for x in (True, False)
                )
                self._skip(reason="out-of-memory", cases=(case.name,), models=out, others=fit)
                tick(_effort(case) * len(turns) * (WARM_UP + rounds - number - 1))
                return {}
        return runs

    def _measured(self, i: int, cases: Sequence[Case]) -> Measured:
        model, runs = self.models[i], [self.runs[case.name][Turn(i)] for case in cases]
        file = model.gguf if self.runtime == "llama.cpp" or model.ref.endswith(".gguf") else None
        parameters, nbytes = model.parameters, model.nbytes
        if model.plan and (left := self.workers[i].parameters):
            dense = self.workers[0].parameters or left
            parameters, nbytes = (round(n * left / dense) for n in (parameters, nbytes))
        return Measured(
            path=model.ref,
            runtime=self.runtime,
            blocks=model.blocks,
            parameters=parameters,
            file_bytes=file.stat().st_size if file else nbytes,
            peak_bytes=max(run.peak for timed in runs for run in timed),
            load_seconds=self.workers[i].load_seconds,
            runs=tuple(map(_runs, cases, map(_seconds, runs))),
        )

    def _ratio(self, i: int, case: Case) -> Ratio:
        dense, pruned = self.models[0], self.models[i]
        seconds = {turn: _seconds(runs) for turn, runs in self.runs[case.name].items()}
        whole, fewest, bound = seconds[Turn(0)], seconds.get(Turn(0, fewest=True)), None
        if fewest and not pruned.plan and (ran := self.workers[0].fewest_blocks):
            removed = dense.blocks - pruned.blocks
            bound = amdahl_bound(whole, fewest, blocks=dense.blocks, ran=ran, removed=removed)
        return Ratio(
            path=pruned.ref,
            runtime=self.runtime,
            case=case.name,
            ratio=median_ratio(whole, seconds[Turn(i)]),
            ideal=None if pruned.plan else dense.blocks / pruned.blocks,
            possible=bound,
        )
