"""What a cut learns from: texts, with some that the dense model writes itself, and its answers.

Texts alone bring back little of the right answers, which fail at their first wrong token, and
answers alone forget the texts. So both are in every step, with the same weight; and so are, where
it writes fast, answers to prompts that the dense model writes itself, which are of more kinds.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sleb.calibration.answers import ANSWERS, VALIDATION, Answers, AnswerSplit
from sleb.calibration.split import SHARE, CalibrationSplit, joined
from sleb.calibration.windows import Windows
from sleb.config import HEAL_BATCH, HEAL_PROMPTS, HealConfig
from sleb.core.errors import InputError
from sleb.core.progress import Progress
from sleb.distillation.loss import passes
from sleb.models.load import LoadedModel, cuda_or_cpu
from sleb.repairs.answering import (
    OWN_ANSWERS,
    answers_to,
    own_answers,
    own_text,
    prompt_files,
    sampled_answers,
)
from sleb.repairs.self_generated import can_generate

TEXTS = "texts"
LENGTH, SHORTEST = 1024, 128
"""Tokens per window, of a long and of a short run."""
WINDOWS = 100
"""Windows that a run has at least, by which those of a short run are shorter."""
STEPS = 32
"""Steps that a run has at least, by which those of a short run are smaller."""
HELDOUT = 32
PASSES = 4
"""How often a run goes through the answers to its own prompts, at most."""
ENOUGH = 1536
"""Answers to the prompts of a file, below which more are sampled where that is fast."""
OWN = 256
"""Windows that the dense model writes itself, at most: it writes more slowly than it reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """Windows to train on, by kind, of which a step takes ``tokens`` tokens, a run ``total``.
    ``parts``: how much of the tokens each kind is, beside the others; by default all alike."""

    kinds: dict[str, Windows]
    tokens: int
    total: int
    seed: int
    parts: Mapping[str, float] = field(default_factory=dict)

    def step(
        self, step: int, at_once: int, device: str = "cpu"
    ) -> Iterator[tuple[list[int], list[float]]]:
        """Passes of a step, counted from 0, of at most ``at_once`` tokens, padding included: which
        of ``windows``, and what each of their tokens counts, so that a step's loss is the mean of
        the kinds' means per token, by their shares."""
        taken: dict[int, float] = {}
        rows, first = [], 0
        for name, windows in self.kinds.items():
            picked = rows_of(step, self.rows[name], len(windows.ids), self.seed)
            each = self.shares[name] / sum(self._scored[name][row] for row in picked)
            rows += [first + row for row in picked]
            taken |= {first + row: each for row in picked}
            first += len(windows.ids)
        for group in passes(self.lengths, rows, at_once, device):
            yield group, [taken[row] for row in group]

    @functools.cached_property
    def windows(self) -> Windows:
        """Those of all kinds."""
        return functools.reduce(Windows.beside, self.kinds.values())

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each of ``windows``."""
        return [*itertools.chain.from_iterable(self._lengths.values())]

    @functools.cached_property
    def shares(self) -> dict[str, float]:
        """Of the tokens, by kind: by ``parts``, but for ``PASSES``; of answers as many to the
        prompts of each file."""
        groups: dict[str, dict[str, int]] = defaultdict(dict)
        for name, used in self._lengths.items():
            groups[group_of(name)][name] = sum(used)
        parts = {group: self.parts.get(group, 1.0) for group in groups}
        each = {group: part / sum(parts.values()) for group, part in parts.items()}
        most = PASSES * sum(groups.get(OWN_ANSWERS, {}).values()) / self.total
        if len(each) > 1 and each.get(OWN_ANSWERS, 0.0) > most:
            more = (1 - most) / (1 - each[OWN_ANSWERS])
            each = {n: most if n == OWN_ANSWERS else more * part for n, part in each.items()}
        return {
            name: found / self.total
            for group, tokens in groups.items()
            for name, found in evenly(tokens, each[group] * self.total).items()
        }

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Windows of each kind in a step."""
        return {
            name: max(1, round(self.shares[name] * self.tokens * len(used) / sum(used)))
            for name, used in self._lengths.items()
        }

    @property
    def step_tokens(self) -> int:
        """Tokens that a step reads, on average."""
        means = {name: sum(used) / len(used) for name, used in self._lengths.items()}
        return round(sum(n * means[name] for name, n in self.rows.items()))

    @property
    def step_scored(self) -> int:
        """Tokens of a step that are learned, on average."""
        means = {name: sum(found) / len(found) for name, found in self._scored.items()}
        return round(sum(n * means[name] for name, n in self.rows.items()))

    def turns(self, steps: int) -> dict[str, float]:
        """How often the windows of each kind are gone through in so many steps."""
        return {
            name: round(steps * n / len(self.kinds[name].ids), 3) for name, n in self.rows.items()
        }

    def smaller(self, tokens: float) -> Mix:
        """The same in steps of so many tokens, at most as now, in another order."""
        return replace(self, tokens=int(min(self.tokens, tokens)), seed=self.seed + 1)

    @functools.cached_property
    def _lengths(self) -> dict[str, list[int]]:
        return {name: windows.lengths for name, windows in self.kinds.items()}

    @functools.cached_property
    def _scored(self) -> dict[str, list[int]]:
        return {name: windows.counts.tolist() for name, windows in self.kinds.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What there is to learn from, and what it is judged by; both by kind. ``measured``: answers
    that have no part in either."""

    train: dict[str, Windows]
    validation: dict[str, Windows]
    measured: Answers | None

    @classmethod
    def of(
        cls,
        dense: LoadedModel,
        config: HealConfig,
        tokens: int,
        length: int,
        progress: Progress,
    ) -> Material:
        """Read the texts, and let the dense model answer the prompts and write, for ``tokens``
        tokens to train on, of texts in windows of ``length``. It writes half as much as is given,
        or what that lacks.

        Raises:
            InputError, DataError: see :func:`heal_windows` and
                :func:`sleb.repairs.answering.with_answers`.
        """
        specs = prompt_files(dense, config, embedded=True)
        share = 2 if specs else 1
        wanted = -(-tokens // (share * length))
        texts, validation = heal_windows(dense.tokenizer, config, wanted=wanted, length=length)
        given = len(texts.ids)
        on = cuda_or_cpu(dense.stack.input_device)
        own = min(OWN, max(given // (SHARE - 1), wanted - given))
        if own and can_generate(dense.stack):
            texts = joined(texts, own_text(dense, own, length, config.seed, progress))
        train, held = {TEXTS: texts}, {TEXTS: validation}
        if not specs:
            return cls(train=train, validation=held, measured=None)
        seed = config.seed
        answers = answers_to(
            dense, specs, config, seed=seed, most=HEAL_PROMPTS[on], progress=progress
        )
        split = AnswerSplit.of(answers, seed=seed)
        for kind, answered in by_file(split).items():
            more = sampled_answers(
                dense,
                answered,
                ENOUGH - len(answered.ids),
                answers.new_tokens,
                seed=seed,
                progress=progress,
            )
            train[kind] = answered.beside(more) if more else answered
        held[ANSWERS] = split.validation
        others = own_answers(dense, config, seed=seed, progress=progress)
        rows = range(len(others.ids) if others else 0)
        if others and (kept := min(VALIDATION, len(rows) // 2)):
            held[OWN_ANSWERS], train[OWN_ANSWERS] = (
                others.take(rows[:kept]),
                others.take(rows[kept:]),
            )
        return cls(train=train, validation=held, measured=split.measured)

    def mix(self, config: HealConfig, tokens: int, length: int) -> Mix:
        """The training windows in steps."""
        batch = config.batch or max(1, min(HEAL_BATCH, tokens // (length * STEPS)))
        return Mix(kinds=self.train, tokens=batch * length, total=tokens, seed=config.seed)


def group_of(kind: str) -> str:
    """Texts, answers or own answers, where kinds are named by the files of prompts too."""
    return kind.partition(": ")[0]


def by_file(split: AnswerSplit) -> dict[str, Windows]:
    """The answers that are learned from, by the file that the prompt is from, as kinds; one kind,
    if there is one file."""
    learned = split.search + split.fit
    if len({*split.files}) == 1:
        return {ANSWERS: learned}
    rows: dict[str, list[int]] = defaultdict(list)
    for row, file in enumerate(split.files):
        rows[Path(file).name].append(row)
    return {f"{ANSWERS}: {name}": learned.take(picked) for name, picked in rows.items()}


def evenly(tokens: Mapping[str, int], wanted: float) -> dict[str, float]:
    """``wanted`` tokens of parts that have so many: as many of each, but none ``PASSES`` times
    while another is less often gone through."""
    most = max(PASSES, wanted / sum(tokens.values()))
    found, left = {}, wanted
    for i, name in enumerate(sorted(tokens, key=tokens.__getitem__)):
        found[name] = min(most * tokens[name], left / (len(tokens) - i))
        left -= found[name]
    return found


def window_length(dense: LoadedModel, tokens: int, length: int | None) -> int:
    """Tokens per window: ``length``, or as the model and a run of ``tokens`` allow.

    Raises:
        InputError: the model does not read so many.
    """
    longest = dense.stack.max_length
    if length is None:
        few = 1 << max(1, tokens // WINDOWS).bit_length() - 1
        length = min(LENGTH, max(SHORTEST, few), longest or LENGTH)
    if longest and length > longest:
        raise InputError(
            f"windows of {length} tokens are longer than the {longest} that {dense.stack.name} "
            f"reads: use --length {longest}"
        )
    return length


def heal_windows(
    tokenizer: Any, config: HealConfig, *, wanted: int, length: int
) -> tuple[Windows, Windows]:
    """Up to ``wanted`` windows to train on, by the weights of the texts as far as each goes; and
    about ``heldout`` others to validate on, spread evenly over every text, at most a quarter of it.

    Raises:
        InputError: not one window is left to train on.
    """
    heldout = config.heldout or min(HELDOUT, max(1, wanted // 8))
    split = CalibrationSplit.of(
        tokenizer,
        config.text,
        windows=None,
        length=length,
        seed=config.seed,
        heldout=wanted + heldout,
        loss_on=config.loss_on,
    )
    windows, validation = split.healing(wanted, heldout)
    if not len(windows.ids):
        raise InputError(
            f"no window of {length} tokens is left to train on: give more --text, or a shorter "
            "--length"
        )
    return windows, validation


def rows_of(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """Which windows a step, counted from 0, is trained on: each is taken once before any is taken
    again, in a new order every time."""
    taken = range(step * batch, (step + 1) * batch)
    return [_order(k // windows, windows, seed)[k % windows] for k in taken]


@functools.lru_cache(maxsize=8)
def _order(turn: int, windows: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{turn}").sample(range(windows), windows)
