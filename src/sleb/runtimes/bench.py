"""Speed and memory, dense and pruned in turn within one run, against what is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sleb.core.errors import InputError
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Interval

__all__ = ["Case", "Measured", "Ratio", "Runs", "Speed", "bench"]


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
    """One model under one runtime (transformers, vllm, llama.cpp). Bytes; ``load_seconds`` with
    files in the page cache and libraries imported; ``peak_bytes`` while it ran, weights included.

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
    """How many times as fast a pruned model is as the first one: median over interleaved runs with
    its 95 % interval, which needs six of them. ``ideal``: blocks / (blocks - removed).
    ``possible``: what the measured time of one block, and of everything else, allows."""

    path: str
    runtime: str
    case: str
    ratio: Interval
    ideal: float
    possible: float | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A whole bench: the first of ``models`` is the dense one."""

    device: str
    dtype: str
    threads: int
    cases: tuple[Case, ...]
    models: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[str, ...] = ()  # what was not run, with the reason, in words


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


def bench(
    model: str | Path,
    outs: Sequence[str | Path] = (),
    *,
    runs: int = 6,
    quick: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Speed:
    """Time ``model`` and each of ``outs`` on every case, in turn.

    Each model is in a process of its own, and all are resident at once if memory allows. For each
    case there is a round that is not timed, in which memory is measured, and then ``runs`` rounds
    in which each model runs once, every other round in reverse order. Prompts are random tokens,
    the same for every model; generation is greedy and ends at its length alone.

    A ratio is the median over rounds of dense seconds / pruned seconds. Its interval is that of the
    quantile test (from order statistics), which holds whatever the distribution; it needs six runs.
    What is possible comes from the dense model, run as well with nearly all of its blocks bypassed:
    the difference gives the time of one block, on average, and the rest is what no cut can save.

    With vLLM or llama.cpp installed the same goes through these, where they can be used.

    Raises:
        InputError: see :func:`sleb.runtimes.bench_models.subjects`; an option is not possible; or
            no case fits the length that the models read.
        UnsupportedModel, DataError: see :func:`sleb.load`.
        ResourceError: a model does not fit in memory, or none of the cases do.
    """
    from sleb.models.load import pick_device, pick_dtype
    from sleb.runtimes.adapters import installed
    from sleb.runtimes.bench_models import subjects
    from sleb.runtimes.bench_runs import Bench, fitting

    for name, given in (("runs", runs), ("threads", threads)):
        if given is not None and given < 1:
            raise InputError(f"--{name} {given} is not possible; give at least 1")
    target = pick_device(device)
    models = subjects(model, outs, trust_remote_code=trust_remote_code, progress=progress)
    computed = str(pick_dtype(dtype, models[0].config, target)).removeprefix("torch.")
    cases, skipped = fitting(QUICK if quick else FULL, models)
    work = Bench(
        models=models,
        runs=runs,
        device=str(target),
        dtype=computed,
        threads=threads,
        trust_remote_code=trust_remote_code,
        note=skipped.append,
        progress=progress,
    )
    main, *others = (work.under(runtime, cases) for runtime in installed())
    assert main is not None  # transformers raises where others are passed over
    parts = [main, *(part for part in others if part)]
    return Speed(
        device=main.device,
        dtype=computed,
        threads=main.threads,
        cases=tuple(case for case in cases if any(case in part.cases for part in parts)),
        models=tuple(m for part in parts for m in part.models),
        ratios=tuple(r for part in parts for r in part.ratios),
        skipped=tuple(skipped),
    )
