"""A pruned model as the draft of its dense parent: speculative decoding through transformers.

The draft proposes some tokens, one at a time; the dense model reads them in one pass, keeps those
that it would have chosen itself, and adds one of its own (Leviathan et al., arXiv 2211.17192;
assisted generation in transformers). Greedy answers are the dense model's, whatever the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sleb.calibration.prompts import Prompt
from sleb.calibration.windows import load_windows
from sleb.config import BenchConfig, takes
from sleb.core.errors import InputError
from sleb.core.printable import paragraphs
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Interval, Values
from sleb.evaluation.prompts import read_alike
from sleb.models.load import load_tokenizer
from sleb.models.source import called
from sleb.runtimes.base import Prompts
from sleb.runtimes.bench import (
    BenchModel,
    bench_models,
    median_ratio,
    resolved,
    there_and_back,
)
from sleb.runtimes.worker import Worker

PROMPTS, PROMPT_TOKENS = 8, 64
"""What is drafted for without prompts of one's own: beginnings of embedded text."""
_DEFAULTS = BenchConfig()


@dataclass(frozen=True, kw_only=True)
class Tally:
    """One prompt with a draft: tokens that it ``proposed``, and how many were ``accepted``."""

    proposed: int
    accepted: int


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One pruned model as draft. ``acceptance``: the acceptance rate, the share of its tokens that
    the dense model would have chosen too, with an interval over prompts. ``ratio``: how many times
    as fast as without a draft, median over rounds. ``ceiling``: the ratio if every token were
    accepted and nothing but blocks took time. ``identical``: prompts whose answer is the dense
    model's, token for token."""

    path: str
    blocks: int
    tallies: tuple[Tally, ...]
    acceptance: Interval
    seconds: tuple[float, ...]
    tokens_per_second: float
    ratio: Interval
    ceiling: float
    identical: int


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """All drafts of one dense model. ``seconds``: of each round without a draft, over all prompts;
    ``tokens``: new tokens in a round; ``draft_tokens``: drafted before each pass."""

    model: str
    blocks: int
    device: str
    dtype: str
    threads: int
    prompts: int
    tokens: int
    draft_tokens: int
    runs: int
    seconds: tuple[float, ...]
    tokens_per_second: float
    drafts: tuple[Draft, ...]

    def __str__(self) -> str:
        """Of each draft, what is accepted and how many times as fast it makes the model."""
        return paragraphs(
            f"{d.path} as draft: {d.acceptance.value:.1%} accepted, {d.ratio.value:.3g}x as fast"
            for d in self.drafts
        )


@takes(BenchConfig)
def draft(
    model: str | Path,
    outs: Sequence[str | Path],
    prompts: Sequence[Prompt] = (),
    config: BenchConfig = _DEFAULTS,
    *,
    new_tokens: int | None = None,
    progress: Progress = silent,
) -> Drafting:
    """Generate greedily with ``model`` alone and with each of ``outs`` as its draft, in turn.

    All are in memory at once, in one process of their own. A round that is not timed counts the
    tokens that are accepted; then there are ``runs`` rounds in which every prompt is answered by
    each, every other round in reverse order. ``draft_tokens`` is constant, and the draft never
    stops early. ``new_tokens`` are 64, or 16 with ``quick``.

    Raises:
        InputError: no ``outs``, an option that is not possible, or see
            :func:`sleb.runtimes.bench.bench_models` and
            :func:`sleb.evaluation.prompts.read_alike`.
        UnsupportedModel: transformers cannot take tokens back in models of this kind.
        DataError, ResourceError: see :func:`sleb.load`.
    """
    if not outs:
        raise InputError("--draft needs a pruned checkpoint: sleb bench MODEL OUT --draft")
    new_tokens = (16 if config.quick else 64) if new_tokens is None else new_tokens
    if new_tokens < 1:
        raise InputError(f"--new-tokens {new_tokens} is not possible; give at least 1")
    trust = config.trust_remote_code
    models = bench_models(model, outs, trust_remote_code=trust, progress=progress)
    config = resolved(config, models[0])
    asked = _read(models, prompts, new_tokens, trust, progress)
    writers = [None, *range(len(outs))]
    rounds = []
    with Worker(models[0].ref) as worker:
        with progress.stage(f"loading {called(models[0].ref)} and drafts", None):
            worker.load(models[0].settings(config, purpose="draft"))
            for one in models[1:]:
                settings = asdict(one.settings(config, purpose="draft"))
                given = {"settings": settings, "draft_tokens": config.draft_tokens}
                worker.ask("add_draft", given)
        with progress.stage("drafting", (1 + config.runs) * len(writers) * len(asked)) as tick:

            def generated(draft: int | None, counted: bool = False) -> list[dict[str, Any]]:
                given = {"new_tokens": new_tokens, "draft": draft, "counted": counted}
                found = []
                for ids in asked:
                    found.append(worker.ask("generate", {"ids": ids, **given}))
                    tick(1)
                return found

            counted = [generated(writer, counted=True) for writer in writers]
            for number in range(config.runs):
                took = {
                    writer: sum(one["seconds"] for one in generated(writer))
                    for writer in there_and_back(writers, number)
                }
                rounds.append([took[writer] for writer in writers])
    return _drafting(models, config, worker, counted, np.array(rounds).T)


def _read(
    models: Sequence[BenchModel],
    prompts: Sequence[Prompt],
    new_tokens: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Prompts:
    """The prompts' ids, or beginnings of embedded text; the tokenizers are compared in any case."""
    dense = models[0]
    if not prompts and dense.longest is not None and new_tokens + PROMPT_TOKENS > dense.longest:
        raise InputError(
            f"--new-tokens {new_tokens} and prompts of {PROMPT_TOKENS} are more than the "
            f"{dense.longest} tokens that {dense.ref} reads"
        )
    ids: Prompts = []
    for other in models[1:]:
        read = read_alike(
            (dense.ref, other.ref),
            prompts,
            max_new_tokens=new_tokens,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        ids = [one.ids for one in read]
    if not ids:
        tokenizer = load_tokenizer(dense.path, trust_remote_code=trust_remote_code)
        windows, _ = load_windows(tokenizer, (), windows=PROMPTS, length=PROMPT_TOKENS, seed=0)
        ids = windows.ids.tolist()
    return ids


def _drafting(
    models: Sequence[BenchModel],
    config: BenchConfig,
    worker: Worker,
    counted: list[list[dict[str, Any]]],
    seconds: Values,
) -> Drafting:
    """From what each writer generated, and its seconds [writers, rounds]; the first is alone."""
    answers = [[one["tokens"] for one in found] for found in counted]
    tokens = [sum(map(len, found)) for found in answers]
    rates = [n / float(np.median(took)) for n, took in zip(tokens, seconds, strict=True)]
    drafts = []
    for i, model in enumerate(models[1:], 1):
        fields = ("proposed", "accepted")
        tallies = tuple(Tally(**{name: one[name] for name in fields}) for one in counted[i])
        k, cost = config.draft_tokens, model.blocks / models[0].blocks
        drafts.append(
            Draft(
                path=model.ref,
                blocks=model.blocks,
                tallies=tallies,
                acceptance=acceptance_rate(tallies),
                seconds=tuple(seconds[i].tolist()),
                tokens_per_second=rates[i],
                ratio=median_ratio(seconds[0], seconds[i]),
                ceiling=(k + 1) / (1 + k * cost),
                identical=sum(a == b for a, b in zip(answers[0], answers[i], strict=True)),
            )
        )
    return Drafting(
        model=models[0].ref,
        blocks=models[0].blocks,
        device=worker.device,
        dtype=config.dtype,
        threads=worker.threads,
        prompts=len(answers[0]),
        tokens=tokens[0],
        draft_tokens=config.draft_tokens,
        runs=config.runs,
        seconds=tuple(seconds[0].tolist()),
        tokens_per_second=rates[0],
        drafts=tuple(drafts),
    )


def acceptance_rate(tallies: Sequence[Tally]) -> Interval:
    """Accepted over proposed tokens with a 95 % interval over prompts (Student's t of the
    linearized ratio: tokens of one answer are not independent, answers are). Bounds are null with
    one prompt; nothing proposed counts as nothing accepted."""
    proposed: Values = np.array([tally.proposed for tally in tallies], dtype=np.float64)
    accepted: Values = np.array([tally.accepted for tally in tallies], dtype=np.float64)
    n, total = len(tallies), proposed.sum()
    share = float(accepted.sum() / total) if total else 0.0
    if n < 2 or not total:
        return Interval(value=share, low=None, high=None)
    rest = accepted - share * proposed
    error = float(np.sqrt(n / (n - 1) * (rest**2).sum()) / total)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Interval(value=share, low=max(0.0, share - half), high=min(1.0, share + half))
