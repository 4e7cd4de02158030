"""A pruned model as the draft of its dense parent: speculative decoding through transformers.

The draft proposes some tokens, one at a time; the dense model reads them in one pass, keeps those
that it would have chosen itself, and adds one of its own (Leviathan et al., arXiv 2211.17192;
assisted generation in transformers). Greedy answers are the dense model's, whatever the draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Interval, Values
from sleb.evaluation.prompts import Prompt, read_alike
from sleb.models.load import LoadedModel, load
from sleb.models.source import quiet_transformers
from sleb.runtimes.bench_models import subjects
from sleb.runtimes.bench_runs import median_ratio
from sleb.selection.resources import on_threads

__all__ = ["Draft", "Drafting", "Tally", "acceptance", "draft"]

PROMPTS, PROMPT_TOKENS = 8, 64
"""What is drafted for without prompts of one's own: beginnings of embedded text."""
Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """One prompt with a draft: tokens that it ``proposed``, and how many were ``accepted``."""

    proposed: int
    accepted: int


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One pruned model as draft. ``acceptance``: share of its tokens that the dense model would
    have chosen too, with an interval over prompts. ``ratio``: how many times as fast as without a
    draft, median over rounds. ``ceiling``: the ratio if every token were accepted and nothing but
    blocks took time. ``identical``: prompts whose answer is the dense model's, token for token."""

    path: str
    blocks: int
    tallies: tuple[Tally, ...]
    acceptance: Interval
    seconds: tuple[float, ...]
    tokens_per_second: float
    ratio: Interval
    ceiling: float
    identical: int

    @property
    def says(self) -> str:
        """Whether it pays, in words."""
        if self.ratio.low is None or self.ratio.high is None:
            return "too few rounds to tell whether it pays"
        if self.ratio.low > 1:
            return "it pays"
        if self.ratio.high < 1:
            return "it does not pay: generation is slower with it"
        return "no difference that these rounds can tell"


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


def draft(
    model: str | Path,
    outs: Sequence[str | Path],
    prompts: Sequence[Prompt] = (),
    *,
    new_tokens: int = 64,
    draft_tokens: int = 4,
    runs: int = 6,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Drafting:
    """Generate greedily with ``model`` alone and with each of ``outs`` as its draft, in turn.

    All are in memory at once, in this process. A round that is not timed counts the tokens that
    are accepted; then there are ``runs`` rounds in which every prompt is answered by each, every
    other round in reverse order. ``draft_tokens`` is constant, and the draft never stops early.

    Raises:
        InputError: no ``outs``, numbers below 1, or see :func:`sleb.runtimes.bench_models.subjects`
            and :func:`sleb.evaluation.prompts.read_alike`.
        UnsupportedModel: transformers cannot take tokens back in models of this kind.
        DataError, ResourceError: see :func:`sleb.load`.
    """
    if not outs:
        raise InputError("--draft needs a pruned checkpoint: sleb bench MODEL OUT --draft")
    numbers = {"runs": runs, "draft-tokens": draft_tokens, "new-tokens": new_tokens}
    for name, given in {**numbers, "threads": threads}.items():
        if given is not None and given < 1:
            raise InputError(f"--{name} {given} is not possible; give at least 1")
    known = subjects(model, outs, trust_remote_code=trust_remote_code, progress=progress)
    longest = known[0].longest
    if longest is not None and not prompts and new_tokens + PROMPT_TOKENS > longest:
        raise InputError(
            f"--new-tokens {new_tokens} and prompts of {PROMPT_TOKENS} are more than the {longest} "
            f"tokens that {model} reads"
        )
    asked = _read(known[0].ref, outs, prompts, new_tokens, trust_remote_code, progress)

    def loaded(ref: str | Path) -> LoadedModel:
        options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        return load(ref, **options, progress=progress)  # type: ignore[arg-type]

    with on_threads(threads or torch.get_num_threads()):
        dense, drafts = loaded(model), [loaded(out) for out in outs]
        if not asked:
            asked = _beginnings(dense)
        writers: list[LoadedModel | None] = [None, *drafts]
        work = _Work(dense, new_tokens, draft_tokens)
        with progress.stage("drafting", (1 + runs) * len(writers) * len(asked)) as tick:
            answers, tallies = [], []
            for writer in writers:
                counted = [work.count(ids, writer, lambda: tick(1)) for ids in asked]
                answers.append([answer for answer, _ in counted])
                tallies.append(tuple(tally for _, tally in counted))
            seconds = np.zeros((len(writers), runs))
            for run in range(runs):
                order = list(enumerate(writers))
                for i, writer in order if run % 2 == 0 else reversed(order):
                    seconds[i, run] = sum(work.time(ids, writer) for ids in asked)
                    tick(len(asked))
        return Drafting(
            model=str(model),
            blocks=known[0].blocks,
            device=str(dense.stack.input_device),
            dtype=dense.dtype,
            threads=torch.get_num_threads(),
            prompts=len(asked),
            tokens=_tokens(answers[0]),
            draft_tokens=draft_tokens,
            runs=runs,
            seconds=tuple(seconds[0].tolist()),
            tokens_per_second=_tokens(answers[0]) / float(np.median(seconds[0])),
            drafts=tuple(
                Draft(
                    path=one.ref,
                    blocks=one.blocks,
                    tallies=tallies[i],
                    acceptance=acceptance(tallies[i]),
                    seconds=tuple(seconds[i].tolist()),
                    tokens_per_second=_tokens(answers[i]) / float(np.median(seconds[i])),
                    ratio=median_ratio(seconds[0], seconds[i]),
                    ceiling=(draft_tokens + 1) / (1 + draft_tokens * one.blocks / known[0].blocks),
                    identical=sum(a == b for a, b in zip(answers[0], answers[i], strict=True)),
                )
                for i, one in enumerate(known[1:], 1)
            ),
        )


def acceptance(tallies: Sequence[Tally]) -> Interval:
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


def _tokens(answers: Sequence[Ids]) -> int:
    return sum(map(len, answers))


def _read(
    dense: str,
    outs: Sequence[str | Path],
    prompts: Sequence[Prompt],
    new_tokens: int,
    trust_remote_code: bool,
    progress: Progress,
) -> list[Ids]:
    """The prompts' ids; the tokenizers are compared also without any."""
    found: list[Ids] = []
    for out in outs:
        read = read_alike(
            (dense, out),
            prompts,
            max_new_tokens=new_tokens,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        found = [one.ids for one in read]
    return found


def _beginnings(dense: LoadedModel) -> list[Ids]:
    from sleb.calibration import load_windows

    windows, _ = load_windows(dense.tokenizer, (), windows=PROMPTS, length=PROMPT_TOKENS, seed=0)
    found: list[Ids] = windows.ids.tolist()
    return found


class _Work:
    """Greedy answers of one dense model, alone or with a draft."""

    def __init__(self, dense: LoadedModel, new_tokens: int, draft_tokens: int) -> None:
        from transformers import GenerationConfig

        self.dense: Any = dense.model
        self.device = dense.stack.input_device
        own: Any = self.dense.generation_config
        # its own might sample, or punish repetition; what a call leaves out comes from there
        ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id or 0}
        self.dense.generation_config = GenerationConfig(
            **ends, max_new_tokens=new_tokens, do_sample=False
        )
        self.drafts = GenerationConfig(
            **ends,
            num_assistant_tokens=draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self.name = dense.stack.name

    @torch.inference_mode()
    def answer(self, ids: Ids, writer: LoadedModel | None) -> Ids:
        """New tokens after ``ids``.

        Raises:
            UnsupportedModel: transformers refuses to draft for this kind of model.
        """
        given = torch.tensor([ids], device=self.device)
        more: dict[str, Any] = {}
        if writer:
            assistant: Any = writer.model
            assistant.generation_config = self.drafts
            more["assistant_model"] = assistant
        try:
            with quiet_transformers():
                made = self.dense.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    **more,
                )
        except (ValueError, NotImplementedError) as error:
            if not writer:
                raise
            said = " ".join(str(error).split())[:200]
            raise UnsupportedModel(f"transformers cannot draft for {self.name}: {said}") from None
        found: Ids = made[0, len(ids) :].tolist()
        return found

    def time(self, ids: Ids, writer: LoadedModel | None) -> float:
        """Seconds of an answer."""
        wait: Callable[[], Any] = lambda: None  # noqa: E731
        if self.device.type != "cpu":
            wait = getattr(torch, self.device.type).synchronize
        wait()
        start = time.perf_counter()
        self.answer(ids, writer)
        wait()
        return time.perf_counter() - start

    def count(
        self, ids: Ids, writer: LoadedModel | None, done: Callable[[], None]
    ) -> tuple[Ids, Tally]:
        """An answer, and what became of the tokens drafted for it: a pass of the dense model reads
        the drafted tokens at the end of its input, and one is accepted if it and all before it are
        the likeliest by this pass's own logits."""
        proposed = accepted = 0
        cached = len(ids)  # tokens before the drafted ones: the prompt first, later one

        def look(_: Any, __: Any, given: dict[str, Any], made: Any) -> None:
            nonlocal proposed, accepted, cached
            tokens = given["input_ids"][0]
            drafted, cached = len(tokens) - cached, 1
            if drafted:
                chosen = made.logits[0, -drafted - 1 : -1].argmax(-1)
                proposed += drafted
                accepted += int((tokens[-drafted:] == chosen).cumprod(0).sum())

        hook = self.dense.register_forward_hook(look, with_kwargs=True)
        try:
            answer = self.answer(ids, writer)
        finally:
            hook.remove()
        done()
        return answer, Tally(proposed=proposed, accepted=accepted)
