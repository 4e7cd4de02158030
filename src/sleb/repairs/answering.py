"""The model's own greedy answers to prompts, batched, and kept so that they are written once.

They are what a cut is compared with (does it say the same?) and what a repair is fitted on beside
texts: on them a small model's fit keeps 1.4 to 2.2 times as many right answers (docs/quality.md).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sleb.calibration.answers import (
    DEFAULT,
    Answers,
    AnswerSplit,
    answer_windows,
    prompt_tokens,
    prompts_of,
)
from sleb.calibration.prompts import Prompt, read_as
from sleb.calibration.split import CalibrationSplit, Writer
from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.config import MAX_PROMPTS, NEW_TOKENS, NO_PROMPTS, PromptOptions
from sleb.core.errors import InputError
from sleb.core.files import disk_errors, write_text
from sleb.core.process_group import group
from sleb.core.progress import Progress, Tick, tell
from sleb.models.decoding import Choose, capturable, decode, greedy
from sleb.models.load import LoadedModel, cuda_or_cpu
from sleb.models.source import cache_dir
from sleb.repairs.self_generated import (
    Sampler,
    at_once,
    can_generate,
    seeded,
    write,
    write_prompts,
)

OWN_PROMPTS = 2048
OWN_ANSWERS = "own answers"
SAMPLED = 7
"""Answers that are sampled to one prompt, at most."""
QUICK = ("cuda",)
"""Devices on which a model writes so many prompts and answers in seconds."""
ROOM = 1024
"""Tokens that a model has to read for the embedded prompts and its answers to them."""
TOGETHER = 256
"""Answers that are written together, at most."""


def prompt_files(model: LoadedModel, config: PromptOptions, *, embedded: bool = False) -> list[str]:
    """Files of prompts that a model is to answer: those given, or with ``embedded`` and none given
    the embedded ones, if it answers chats and reads as many tokens as these and their answers are.

    Raises:
        InputError: some are given, and every token of an answer would read all blocks.
    """
    if config.prompts == (NO_PROMPTS,):
        return []
    if config.prompts and not can_generate(model.stack):
        raise InputError(
            f"{model.source.ref} cannot answer --prompts while its blocks are not in the device's "
            "memory: leave them out, or --stream"
        )
    if config.prompts:
        return list(config.prompts)
    room = model.stack.max_length
    chats = embedded and bool(model.tokenizer.chat_template) and (room is None or room >= ROOM)
    return [DEFAULT] if chats and can_generate(model.stack) else []


def with_answers(
    model: LoadedModel,
    split: CalibrationSplit,
    config: PromptOptions,
    progress: Progress,
    *,
    embedded: bool = False,
) -> CalibrationSplit:
    """``split`` with the model's answers to prompts, see :func:`prompt_files`; as it is without
    any.

    Raises:
        InputError, DataError: see :func:`prompt_files` and
            :func:`sleb.calibration.answers.prompts_of`; there are too few, a prompt is too long, or
            needs a chat template that is not there.
    """
    specs = prompt_files(model, config, embedded=embedded)
    if not specs:
        return split
    seed = split.search.record.seed
    answers = answers_to(model, specs, config, seed=seed, progress=progress)
    return split.with_answers(AnswerSplit.of(answers, seed=seed))


def answers_to(
    model: LoadedModel,
    specs: Sequence[str],
    config: PromptOptions,
    *,
    seed: int = 0,
    most: float | None = None,
    progress: Progress,
) -> Answers:
    """The model's answers to the prompts of ``specs``. Of many, to some that are spread evenly over
    all: to so many as the config says, or else to ``most``, by default as many as a repair has.
    Raises as :func:`with_answers`."""
    kind = cuda_or_cpu(model.stack.input_device)
    new_tokens = config.new_tokens or NEW_TOKENS[kind]
    prompts = prompts_of(specs)
    n = int(min(len(prompts), config.max_prompts or most or MAX_PROMPTS[kind]))
    prompts = tuple(prompts[i * len(prompts) // n] for i in range(n))
    ids = prompt_ids(model, prompts, new_tokens)
    windows = answer_windows(ids, written(model, ids, new_tokens, progress), specs=specs, seed=seed)
    source = ", ".join(specs)
    return Answers(
        prompts=prompts,
        windows=windows,
        new_tokens=new_tokens,
        source=source,
        run_code=config.run_code,
    )


def own_answers(
    model: LoadedModel, config: PromptOptions, *, seed: int, progress: Progress
) -> Windows | None:
    """The model's answers to prompts that it writes itself: more kinds of them than are given. None
    where it answers no chats, or writes too slowly."""
    if not (model.tokenizer.chat_template and writes_fast(model)):
        return None
    texts = write_prompts(model, OWN_PROMPTS, seed, progress)
    prompts = [Prompt(id=f"own {i}", text=text, messages=None) for i, text in enumerate(texts)]
    new_tokens = config.new_tokens or NEW_TOKENS["cuda"]
    read = read_as(model.tokenizer, prompts, model.source.ref)
    ids = [one.ids for one in read if len(one.ids) <= room_for_prompt(model, new_tokens)]
    if not ids:
        return None
    answers = written(model, ids, new_tokens, progress)
    found = answer_windows(ids, answers, specs=["its own prompts"], seed=seed)
    return replace(found, names=(OWN_ANSWERS,))


def sampled_answers(
    model: LoadedModel,
    windows: Windows,
    most: int,
    new_tokens: int,
    *,
    seed: int,
    progress: Progress,
) -> Windows | None:
    """Up to ``most`` more answers to the prompts of ``windows``, as the model samples them: of what
    it would say, more than its first choice holds. At most ``SAMPLED`` to each; none where it
    writes too slowly."""
    n = min(most, SAMPLED * len(windows.ids))
    if n <= 0 or not writes_fast(model):
        return None
    prompts = [prompt.tolist() for prompt in prompt_tokens(windows)]
    asked = [prompts[i % len(prompts)] for i in range(n)]
    key = _key(model, "sampled", new_tokens, seed, asked)

    def sampled() -> list[list[int]]:
        choose = Sampler(torch.ones(1, 1, device=model.stack.input_device))
        with seeded(seed, model.stack.input_device):
            return answered(model, asked, new_tokens, progress, "sampling answers", choose)

    tokens = _cached(key, sampled, "sampled answers", progress)
    return answer_windows(asked, tokens, specs=["prompts, sampled"], seed=seed)


def writes_fast(model: LoadedModel) -> bool:
    """Whether it answers so many prompts in seconds."""
    return model.stack.input_device.type in QUICK and capturable(model.model)


def prompt_ids(model: LoadedModel, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
    """Token ids of prompts; plain text is asked as a chat's turn where there is a template.

    Raises:
        InputError: one leaves no room for an answer of ``new_tokens``.
    """
    read = [one.ids for one in read_as(model.tokenizer, prompts, model.source.ref)]
    for prompt, ids in zip(prompts, read, strict=True):
        if len(ids) > room_for_prompt(model, new_tokens):
            raise InputError(
                f"prompt '{prompt.id}' takes {len(ids)} of the {model.stack.max_length} tokens "
                f"that the model reads, and an answer of {new_tokens} does not fit; shorten it, or "
                "give --new-tokens"
            )
    return read


def room_for_prompt(model: LoadedModel, new_tokens: int) -> float:
    """Tokens of a prompt at most, so that an answer of ``new_tokens`` fits behind it."""
    return (model.stack.max_length or math.inf) - new_tokens


def written(
    model: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int, progress: Progress
) -> list[list[int]]:
    """:func:`answered`, from the cache of answers where this model has given them before.

    Raises:
        ResourceError: the disk is full.
    """
    key = _key(model, new_tokens, [*map(list, prompts)])

    def answers() -> list[list[int]]:
        return answered(model, prompts, new_tokens, progress)

    return _cached(key, answers, "answers to the prompts", progress)


def own_text(model: LoadedModel, n: int, length: int, seed: int, progress: Progress) -> Tensor:
    """Windows [n, length] that the model writes, from the same cache where it did before: see
    :func:`sleb.repairs.self_generated.write`.

    Raises:
        ResourceError: the disk is full.
    """
    key = _key(model, "own text", n, length, seed)

    def text() -> list[list[int]]:
        found: list[list[int]] = write(model, n, length, seed, progress).tolist()
        return found

    return torch.tensor(_cached(key, text, "text of the model's own", progress))


def writer(model: LoadedModel, progress: Progress) -> Writer:
    """Writes windows for a :class:`sleb.calibration.CalibrationSplit`."""
    return lambda n, length, seed: own_text(model, n, length, seed, progress)


def _cached(
    key: str, made: Callable[[], list[list[int]]], what: str, progress: Progress
) -> list[list[int]]:
    path = cache_dir() / "answers" / f"{key}.json"
    here = group()
    kept = here.broadcast_from_main(lambda: path.read_text("utf-8") if path.is_file() else "")
    if kept:
        tell(progress, f"{what}: known from before")
        found: list[list[int]] = json.loads(kept)
        return found
    tokens = made()
    if here.rank == 0:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(tokens))
    return tokens


def _key(model: LoadedModel, *asked: Any) -> str:
    """Of all that a model's tokens depend on; files of weights stand for themselves by size and
    time. ``asked``: JSON."""
    folder = model.source.path.resolve()
    shards = sorted({info.shard for info in Checkpoint.open(folder).tensors.values()})
    stats = [(folder / shard).stat() for shard in shards]
    parts = [
        str(folder),
        [(shard, s.st_size, s.st_mtime_ns) for shard, s in zip(shards, stats, strict=True)],
        [model.dtype, model.stack.input_device.type, *asked],
        [version(name) for name in ("torch", "transformers")],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@torch.inference_mode()
def answered(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    progress: Progress,
    title: str = "answering prompts",
    choose: Choose = greedy,
) -> list[list[int]]:
    """The model's answer to each prompt, greedy or as ``choose`` takes its tokens, all token ids:
    what ends it included, at most ``new_tokens``."""
    ends = model.model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts)) + new_tokens
    step = min(TOGETHER, at_once(model.stack, longest))
    answers: list[list[int]] = [[]] * len(prompts)
    with progress.stage(title, len(prompts) * new_tokens) as tick:
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            picked = [prompts[i] for i in rows]
            new = _continued(model, picked, new_tokens, ends, tick, choose)
            for i, tokens in zip(rows, new.tolist(), strict=True):
                stop = next((k for k, t in enumerate(tokens) if t in ends), len(tokens) - 1)
                answers[i] = tokens[: stop + 1]
    return answers


def _continued(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: list[int],
    tick: Tick,
    choose: Choose,
) -> Tensor:
    """Tokens [B, at most new_tokens] behind prompts, which are padded in front."""
    longest, device = max(map(len, prompts)), model.stack.input_device
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, here, prompt in zip(ids, mask, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
        here[longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    new = decode(model.model, ids, mask, new_tokens, tick, choose, tuple(ends)).cpu()
    group().from_first_(new)
    return new
