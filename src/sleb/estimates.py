"""What a run will take, before it begins: counted in tokens that go through the whole model, and
timed on the model itself for a moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb.calibration.answers import SEARCH as ANSWERS_SEARCHED
from sleb.calibration.answers import prompts_of
from sleb.calibration.split import GENERATED_VALIDATION, CalibrationSplit
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.gguf_fields import GGUFModel
from sleb.config import (
    HEAL_PROMPTS,
    HEAL_TOKENS,
    MAX_PROMPTS,
    NEW_TOKENS,
    NO_PROMPTS,
    HealConfig,
    PruneConfig,
    SearchConfig,
)
from sleb.core.errors import InputError
from sleb.core.plan import blocks_to_remove
from sleb.core.progress import Estimate, Phase, Progress, tell
from sleb.distillation.mix import SHORTEST, STEPS
from sleb.evaluation.questions import Questions
from sleb.models.load import LoadedModel, cuda_or_cpu
from sleb.models.stack import BlockStack, decoder_config
from sleb.repairs.answering import prompt_files
from sleb.repairs.regression import REACH
from sleb.repairs.self_generated import PIECE, at_once, can_generate
from sleb.runtimes.bench import Case
from sleb.selection.goal import Goal
from sleb.selection.metrics import METRICS
from sleb.selection.request import strategy_before_repair
from sleb.selection.resources import default_batch
from sleb.selection.search import FINAL_TOKENS
from sleb.selection.strategies import GREEDY_OR_WINDOW
from sleb.selection.targets import Costs

TEXT, SEARCH, REPAIR, MEASURE, WRITE = "text", "search", "repair", "measure", "write and check"
"""The phases of `sleb prune`."""
HEALING = "healing"
TIMED, TIMES, ENOUGH_S = 1024, 4, 1.0
"""Tokens of a batch that is timed, how often at most, and seconds after which once is enough."""
LONG_S = 3600.0
"""A run that takes longer on a CPU is told how to be shorter."""

# How much work a phase is, in tokens that go through all blocks or through the head, follows from
# how it is done; what depends on the model is about what SmolLM2-135M and tiny models need.
RACE = 1.6
"""Of the windows a candidate is scored on this share over the root of their number: most are given
up early, and sooner the more windows there are."""
EXACT = 0.8
"""The same where all candidates are scored on all windows, as what they share is computed once."""
FITTED_BLOCK = 7.0
"""What a re-fitted block costs in passes through one: two for each ridge, one to three of which are
tried, and the sums of products."""
CHARACTERS, TEMPLATE = 4, 20
"""Of a prompt: characters of a token, and tokens of what a chat template puts around it."""
CHECKS, GENERATED = 600, 72
"""Tokens that the checks of a result read in a batch, and passes in which they generate alone."""
TRAINED, RATE, VALIDATED = 4.0, 1.1, 1.5
"""Of a token that is trained on: passes through a model, one through the dense one and three
through the cut, there and back; how many times that with the search for a learning rate; and
passes of checks on windows set aside."""
ROOM = 600_000_000
"""Bytes of a process that has loaded what it needs."""
CHECKED_S = 1.0
"""To check a result however small."""
STARTED_S = 5.0
"""Until a process has imported torch."""
LOADED = 4e8
"""Bytes a second at which a checkpoint is hashed, written and loaded to be checked."""


@dataclass(frozen=True)
class Speed:
    """Seconds per token on this machine: through all ``blocks`` and through the ``head``, in a
    batch; and ``written``, in a batch and ``alone``."""

    blocks: float
    head: float
    written: float
    alone: float

    @property
    def read(self) -> float:
        """Through the whole model."""
        return self.blocks + self.head

    @classmethod
    @torch.inference_mode()
    def of(cls, model: LoadedModel, length: int) -> Speed:
        """On the model itself, with windows of ``length``.

        Raises:
            InputError: its blocks are read from disk, and would be several times.
        """
        stack = model.stack
        if stack.streamed:
            raise InputError(
                "a model whose blocks are read from disk is not timed: leave out --stream"
            )
        vocabulary = int(decoder_config(stack.model.config).vocab_size)
        length = min(length, stack.max_length or length)

        def ids(rows: int, columns: int) -> Tensor:
            drawn = torch.Generator().manual_seed(0)
            return torch.randint(vocabulary, (rows, columns), generator=drawn)

        def through(hidden: Tensor, calls: list[Any]) -> Tensor:
            for i, call in enumerate(calls):
                hidden = stack.run(i, hidden, call)
            return hidden

        one = ids(1, length)
        hidden, calls = stack.enter(one)
        first = _best(stack, lambda: through(hidden, calls), 2)
        rows = max(1, min(TIMED // length, default_batch(stack, length), int(ENOUGH_S / first)))
        batch, calls = stack.enter(ids(rows, length))
        blocks = _best(stack, lambda: through(batch, calls)) if rows > 1 else first
        head = _best(stack, lambda: stack.exit(batch).float().log_softmax(-1))
        together = max(1, min(at_once(stack, PIECE), 128))
        device = stack.input_device
        written, alone = (
            _best(stack, partial(model.model, input_ids=new)) / len(new)
            for new in (ids(together, 1).to(device), ids(1, 1).to(device))
        )
        tokens = rows * length
        return cls(blocks / tokens, head / tokens, written, alone)


def _best(stack: BlockStack, work: Callable[[], Any], times: int = TIMES) -> float:
    """Seconds that ``work`` takes: the best of a few times, as others may use the machine for a
    moment."""
    device, best, spent = stack.input_device, math.inf, 0.0
    for _ in range(times):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if spent > ENOUGH_S and times == TIMES:
            break
    return best


def foretell(
    progress: Progress, model: LoadedModel, length: int, estimate: Callable[[Speed], Estimate]
) -> None:
    """Time ``model`` with windows of ``length``, and tell ``progress`` what follows from that. One
    whose blocks are read from disk is not timed, as they would be read several times."""
    if model.stack.streamed:
        return
    with progress.stage("estimating", None):
        speed = Speed.of(model, length)
    tell(progress, estimate(speed))


@dataclass(frozen=True)
class _Work:
    """What a run has to do, in numbers: ``removed`` of ``n`` blocks; tokens of texts by role, of
    which ``own`` are written by the model; and ``asked`` prompts, whose windows are ``row`` tokens
    long, with at most ``answer`` tokens of an answer. ``compares``: sets that the search ends with
    are compared after quick repairs. ``strategy``: empty where a metric of profiles reads texts
    once."""

    n: int
    removed: int
    windows: int
    search: int
    heldout: int
    fitted: int
    validation: int
    own: int
    compared: int
    asked: int
    answer: int
    row: int
    strategy: str
    compares: bool

    @property
    def gaps(self) -> int:
        """Where runs of neighbours are compared one mostly wins, and is one gap; else a cut of
        several blocks is taken to have two."""
        return 1 if self.compares else min(2, self.removed)

    @property
    def fit(self) -> float:
        """Passes of a fit over its tokens: the dense model up to behind the last gap, the cut one
        from the first on, and the blocks beside gaps, some of which are re-fitted. Gaps are taken
        to be in the middle."""
        beside = min(self.n - self.removed, (1 + REACH) * self.gaps)
        return min(1.0, 0.6 + beside / self.n) + 0.2 + FITTED_BLOCK * beside / self.n

    def writing(self, speed: Speed) -> float:
        """Seconds: text of its own, and answers to prompts, which it reads first."""
        asked = self.asked * (self.answer * speed.written + (self.row - self.answer) * speed.blocks)
        return speed.written * (self.own + self.compared) + asked

    def searching(self, speed: Speed, exact: bool) -> float:
        """Seconds: a candidate's windows go through half of the blocks, and through the head."""
        if not self.strategy:
            return self.search * speed.blocks
        candidates = max(1, self.n - 2)
        runs = max(0, candidates - self.removed + 1)
        greedy = sum(candidates - turn for turn in range(self.removed))
        sets = {"one-shot": candidates, "window": runs}.get(self.strategy, greedy)
        share = EXACT if exact else min(EXACT, RACE / max(1, self.windows) ** 0.5)
        each = share * self.search * (speed.blocks / 2 + speed.head)
        if not self.compares:
            return sets * each
        sets += runs
        scored = self.search + self.compared + self.asked // 6 * self.row
        fitted = min(FINAL_TOKENS, self.fitted + self.own or self.search)
        compared = 2 * self.fit * fitted * speed.blocks + 3 * scored * speed.read
        return sets * each + compared

    def repairing(self, speed: Speed) -> float:
        """Seconds: a fit, and after it a look at each gap whether it stays."""
        answers = (self.asked - self.asked // 3 - self.asked // 8) * self.row
        judged = self.validation + self.asked // 8 * self.row
        tokens = self.fitted + self.own + answers
        looks = 1 + 1.5 * self.gaps
        return self.fit * tokens * speed.blocks + looks * judged * speed.read

    def measuring(self, speed: Speed) -> float:
        """Seconds: dense, cut and repaired; and the cut answers most of what it is measured on."""
        answers = self.asked // 3
        read = 3 * self.heldout + 4 * answers * self.row
        return read * speed.read + answers * self.answer * speed.written


def estimate(
    model: LoadedModel,
    speed: Speed,
    split: CalibrationSplit,
    goal: Goal,
    config: PruneConfig,
    gguf: GGUFModel | None = None,
    heal: HealConfig | None = None,
) -> Estimate:
    """What :func:`sleb.prune` of a loaded model will take from now on, and to ``heal`` the cut; a
    search races, so how long it takes depends on the model, too."""
    n = len(model.stack)
    kind = cuda_or_cpu(model.stack.input_device)
    before = strategy_before_repair(goal, config) if split.repair_given else config.strategy
    work = _work(model, split, goal, config, before)
    nbytes = Checkpoint.open(model.source.path).nbytes
    phases = {
        TEXT: work.writing(speed),
        SEARCH: work.searching(speed, config.exact),
        REPAIR: work.repairing(speed),
        MEASURE: work.measuring(speed),
        WRITE: speed.read * CHECKS + speed.alone * GENERATED + 3 * nbytes / LOADED + CHECKED_S,
    }
    if not work.fitted:
        del phases[REPAIR]
    left = on_disk(model, gguf, work.removed, keep=config.keep)
    found = Estimate(
        phases=tuple(Phase(name=name, seconds=seconds) for name, seconds in phases.items()),
        memory=_memory(model, config.length),
        disk=left,
        device=named(kind),
        shorter=_shorter(phases, kind),
    )
    if heal is None:
        return found
    blocks = n - work.removed if config.unit == "block" else n
    then = estimate_healing(model, speed, heal, left, blocks)
    return replace(
        found,
        phases=found.phases + then.phases,
        shorter=_shorter(phases | {HEALING: then.seconds}, kind),
        memory=max(found.memory, then.memory),
        disk=left + then.disk,
    )


def on_disk(model: LoadedModel, gguf: GGUFModel | None, removed: int, *, keep: bool) -> int:
    """Bytes of the result without so many blocks, which are taken to be of the mean size: of the
    file ``gguf``, or of a folder. ``keep``: what a folder's cut removes is kept in it."""
    checkpoint = Checkpoint.open(model.source.path)
    costs = Costs.of(checkpoint, model.stack)
    if gguf is not None:
        costs = costs.in_file(gguf)
    elif keep:
        return checkpoint.nbytes
    return costs.total - sum(costs.blocks) * removed // len(model.stack)


def estimate_search(
    model: LoadedModel, speed: Speed, split: CalibrationSplit, goal: Goal, config: SearchConfig
) -> Estimate:
    """What :func:`sleb.search` of a loaded model will take from now on."""
    kind = cuda_or_cpu(model.stack.input_device)
    of_answers = METRICS[config.chosen_by].answers or goal.keep_answers is not None
    work = _work(model, split, goal, config, config.strategy, embedded=of_answers)
    seconds = {TEXT: work.writing(speed), SEARCH: work.searching(speed, config.exact)}
    if config.curve:
        seconds[MEASURE] = work.removed * work.heldout * speed.read
    phases = {name: took for name, took in seconds.items() if took}
    return Estimate(
        phases=tuple(Phase(name=name, seconds=took) for name, took in phases.items()),
        memory=_memory(model, config.length),
        disk=0,
        device=named(kind),
        shorter=_shorter(phases, kind),
    )


def estimate_reading(model: LoadedModel, speed: Speed, tokens: int, times: int) -> Estimate:
    """What it takes to read ``tokens`` so many ``times``, as `sleb eval` does with each model."""
    return Estimate(
        phases=(Phase(name=MEASURE, seconds=times * tokens * speed.read),),
        memory=_memory(model, TIMED),
        disk=0,
        device=named(cuda_or_cpu(model.stack.input_device)),
    )


def estimate_healing(
    model: LoadedModel, speed: Speed, config: HealConfig, nbytes: int, blocks: int
) -> Estimate:
    """What :func:`sleb.heal` takes of a cut of ``nbytes``, with so many ``blocks`` of the loaded
    model's. Disk: the result, and its state while a new one replaces it."""
    stack, network = model.stack, model.stack.model
    kind, small = cuda_or_cpu(stack.input_device), config.optimizer == "adamw-8bit"
    dense = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() for p in stack.blocks.parameters()) * blocks // len(stack)
    trained = 0 if config.lora else trained
    best, state = (2, 4) if small else (4, 16)
    seconds = healing(speed, config, kind)
    return Estimate(
        phases=(Phase(name=HEALING, seconds=seconds),),
        shorter=_shorter({HEALING: seconds}, kind),
        memory=dense + nbytes + trained * ((6 if small else 16) + best) + ROOM,
        disk=nbytes + 2 * state * trained,
        device=named(kind),
    )


def named(kind: str) -> str:
    """A kind of device, in words."""
    return "a GPU" if kind == "cuda" else "this CPU"


def comparing(speed: Speed, prompts: int, answer: int) -> float:
    """Seconds for both models to answer prompts one by one, as `sleb compare` does."""
    return 2 * prompts * answer * speed.alone


def scoring(speed: Speed, questions: Questions, limit: int | None, tokenizer: Any) -> float:
    """Seconds to score both models on questions, as `sleb eval --task` does: each choice is
    read behind its question, and an answer in words written."""
    items = [*questions.items.values()][:limit]
    texts = [q.text + choice for q in items for choice in q.choices or ("",)]
    read = sum(map(len, tokenizer(texts).input_ids))
    written = len(items) * questions.answer_tokens(tokenizer)
    return 2 * (read * speed.read + written * speed.written)


def healing(speed: Speed, config: HealConfig, kind: str) -> float:
    """Seconds of `sleb heal` on a ``kind`` of device: the dense model writes, then the cut is
    trained."""
    tokens = heal_tokens(speed, config, kind)
    training = tokens * speed.read * _passes(config)
    if config.minutes is not None:
        most = 60 * config.minutes
        training = most if config.tokens is None else min(training, most)
    asked = 0 if config.prompts == (NO_PROMPTS,) else config.max_prompts or HEAL_PROMPTS[kind]
    own = tokens // (6 if asked else 3)
    return training + speed.written * (own + asked * (config.new_tokens or NEW_TOKENS[kind]))


def heal_tokens(speed: Speed, config: HealConfig, kind: str) -> int:
    """Tokens to train on: as asked for, or the default. On a CPU, where the model's own text takes
    longer than to train on it, no more than the minutes allow, as a power of two, so that the next
    call finds that text in the cache; but enough for STEPS of the smallest windows."""
    if config.tokens or config.minutes is None or kind != "cpu":
        return config.tokens or HEAL_TOKENS[kind]
    allowed = max(1, int(60 * config.minutes / (speed.read * _passes(config))))
    return min(HEAL_TOKENS[kind], max(STEPS * SHORTEST, 1 << allowed.bit_length() - 1))


def _passes(config: HealConfig) -> float:
    """Through the whole model, for a token that is trained on."""
    return (1.0 if config.lr else RATE) * (TRAINED + config.recompute) + VALIDATED


def timing(speed: Speed, cases: Sequence[Case], runs: int, nbytes: int) -> float:
    """Seconds to time both models, as `sleb bench` does, each in a process that loads it."""
    once = (
        c.batch * c.prompt_tokens * speed.blocks
        + c.new_tokens * max(speed.alone, c.batch * speed.written)
        for c in cases
    )
    return 2 * ((runs + 1) * sum(once) + STARTED_S + nbytes / LOADED)


def _work(
    model: LoadedModel,
    split: CalibrationSplit,
    goal: Goal,
    config: SearchConfig,
    strategy: str | None,
    *,
    embedded: bool = True,
) -> _Work:
    """``strategy``: None for the metric's own. ``embedded``: see :func:`prompt_files`."""
    n, kind = len(model.stack), cuda_or_cpu(model.stack.input_device)
    removed = blocks_to_remove(goal.remove, n) if goal.remove is not None else max(1, n // 4)
    fitted = 0 if split.repair_given is None else split.repair_given.tokens
    judging = 0 if split.repair_validation is None else split.repair_validation.tokens
    metric = METRICS[config.chosen_by]
    strategy = strategy or metric.strategy
    compares = strategy == GREEDY_OR_WINDOW
    can_write = can_generate(model.stack)
    windows = len(split.search.ids)
    least, most = GENERATED_VALIDATION
    compared = min(most, max(least, windows // 2)) * config.length
    specs = prompt_files(model, config, embedded=embedded)
    prompts = prompts_of(specs) if specs else ()
    answer = config.new_tokens or NEW_TOKENS[kind]
    texts = [sum(len(said) for _, said in prompt.turns) for prompt in prompts]
    mean = sum(texts) // CHARACTERS // max(1, len(texts))
    asked = min(len(prompts), config.max_prompts or MAX_PROMPTS[kind])
    row = mean + TEMPLATE + answer
    scored, tokens = windows, split.search.tokens
    if metric.answers:
        scored = min(ANSWERS_SEARCHED, asked // 6)
        tokens = scored * row
    return _Work(
        n=n,
        removed=removed,
        windows=scored,
        search=tokens,
        heldout=0 if split.heldout is None else split.heldout.tokens,
        fitted=fitted,
        validation=judging,
        own=fitted // 2 if can_write else 0,
        compared=compared if can_write and (fitted or compares) else 0,
        asked=asked,
        answer=answer,
        row=row,
        strategy=strategy if metric.token else "",
        compares=compares and removed > 1,
    )


def _memory(model: LoadedModel, length: int) -> int:
    """Of the process, or on the GPU: weights, the states of a batch, its logits, and what a fit
    sums."""
    config = decoder_config(model.stack.model.config)
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    weights = sum(p.numel() * p.element_size() for p in model.stack.model.parameters())
    tokens = max(TIMED, length)
    states = tokens * width * len(model.stack) * 4
    logits = 2 * tokens * int(config.vocab_size) * 4  # and their logarithms, when they are timed
    return weights + 3 * inner * inner * 8 + states + logits + ROOM


def _shorter(phases: dict[str, float], kind: str) -> tuple[str, ...]:
    """What to lower, the longest phase first, where it takes hours on a CPU."""
    if kind != "cpu" or sum(phases.values()) <= LONG_S:
        return ()
    by = {
        TEXT: "--prompts none, or fewer --max-prompts and --repair-tokens",
        SEARCH: "fewer --windows, or --metric cosine",
        REPAIR: "fewer --repair-tokens",
        MEASURE: "fewer --heldout",
        HEALING: "sleb heal with few --minutes",
    }
    long = sorted((name for name in phases if name in by), key=lambda name: -phases[name])
    return tuple(by[name] for name in long[:2])
