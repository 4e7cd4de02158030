"""What a run will take, before it begins: counted in tokens that go through the whole model, and
timed on the model itself for a moment."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sleb.calibration.answers import prompts_of
from sleb.calibration.split import CalibrationSplit
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.config import MAX_PROMPTS, NEW_TOKENS, PruneConfig
from sleb.core.plan import blocks_to_remove
from sleb.core.progress import Estimate, Phase
from sleb.models.load import LoadedModel
from sleb.models.stack import decoder_config
from sleb.repairs.answering import prompt_files
from sleb.repairs.self_generated import PIECE, at_once, can_generate
from sleb.selection.goal import Goal

TEXT, SEARCH, REPAIR, MEASURE, WRITE = "text", "search", "repair", "measure", "write and check"
"""The phases of `sleb prune`."""
TIMED, TIMES = 128, 4  # tokens of the pass that is timed, and how often
LONG_S = 3600.0
"""A run that takes longer on a CPU is told how to be shorter."""

# In passes of the whole model: rough, from docs/performance.md and a few runs of small models.
RACE = 1.6
"""A candidate costs half a pass over the windows, times this over the root of their number: most
are given up early, and sooner the more windows there are."""
EXACT = 0.8
"""The same where all candidates are scored on all windows, as what they share is computed once."""
FINALS = 3.0
"""A search that compares sets after quick repairs, and goes by answers too, over one that does
not."""
FIT = 4.0
"""Passes of a repair over what it is fitted on: dense and cut, sums of products, and checks."""
CHECKS = 600  # tokens that are read and written by the checks of a result


@dataclass(frozen=True)
class _Speed:
    """Seconds per token: read in a batch, and written in one."""

    read: float
    written: float


@torch.inference_mode()
def _timed(model: LoadedModel, length: int) -> _Speed:
    """On the model itself: the best of a few times, as others may use the machine for a moment."""
    device = model.stack.input_device
    vocabulary = int(decoder_config(model.stack.model.config).vocab_size)
    together = max(1, min(at_once(model.stack, PIECE), TIMED))
    spent = []
    for shape in ((1, min(length, TIMED)), (together, 1)):
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
        best = math.inf
        for _ in range(TIMES):
            start = time.perf_counter()
            model.model(input_ids=ids.to(device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        spent.append(best / ids.numel())
    return _Speed(*spent)


def estimate(
    model: LoadedModel, split: CalibrationSplit, goal: Goal, config: PruneConfig, out: Path
) -> Estimate:
    """What :func:`sleb.prune` of a loaded model will take from now on. It is timed for a second or
    two of a small model; a search races, so how long it takes depends on the model, too."""
    n, length = len(model.stack), config.length
    speed = _timed(model, length)
    kind = "cuda" if model.stack.input_device.type == "cuda" else "cpu"
    removed = blocks_to_remove(goal.remove, n) if goal.remove is not None else max(1, n // 4)
    fitted = 0 if split.repair_given is None else split.repair_given.tokens
    writes = can_generate(model.stack)
    own = fitted // 2 if writes else 0
    asked, answer = 0, config.new_tokens or NEW_TOKENS[kind]
    if specs := prompt_files(model, config, embedded=True):
        asked = min(len(prompts_of(specs)), config.max_prompts or MAX_PROMPTS[kind])
    candidates = max(1, n - 2)
    sets = sum(candidates - turn for turn in range(removed))
    windows = len(split.search.ids)
    share = EXACT if config.exact else min(EXACT, RACE / windows**0.5)
    passes = share * sets / 2 * (FINALS if fitted else 1)
    answers = asked * (answer + length // 2)
    measured = 0 if split.heldout is None else 3 * split.heldout.tokens
    phases = {
        TEXT: speed.written * (own + asked * answer),
        SEARCH: speed.read * passes * (split.search.tokens + answers // 6),
        REPAIR: speed.read * FIT * (fitted + own + answers),
        MEASURE: speed.read * (measured + answers),
        WRITE: speed.read * CHECKS,
    }
    if not fitted:
        del phases[REPAIR]
    total = sum(phases.values())
    nbytes = Checkpoint.open(model.source.path).nbytes
    left = nbytes if config.keep else nbytes * (n - removed) // n
    if out.suffix == ".gguf":
        left = Path(model.source.ref).expanduser().stat().st_size * (n - removed) // n
    return Estimate(
        phases=tuple(Phase(name=name, seconds=seconds) for name, seconds in phases.items()),
        memory=_memory(model, length),
        disk=left,
        device="a GPU" if kind == "cuda" else "this CPU",
        shorter=_shorter(phases) if kind == "cpu" and total > LONG_S else (),
    )


def _memory(model: LoadedModel, length: int) -> int:
    """Of the process, or on the GPU: weights, the states of a batch, and what a fit sums."""
    config = decoder_config(model.stack.model.config)
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    weights = sum(p.numel() * p.element_size() for p in model.stack.model.parameters())
    states = 1024 * width * len(model.stack) * 4
    return weights + 3 * inner * inner * 8 + states + 600_000_000


def _shorter(phases: dict[str, float]) -> tuple[str, ...]:
    """What to lower, the longest phase first."""
    by = {
        TEXT: "--prompts none, or fewer --max-prompts and --repair-tokens",
        SEARCH: "fewer --windows, or --metric cosine",
        REPAIR: "fewer --repair-tokens",
        MEASURE: "fewer --heldout",
    }
    long = sorted((name for name in phases if name in by), key=lambda name: -phases[name])
    return tuple(by[name] for name in long[:2])
