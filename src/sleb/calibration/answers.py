"""The dense model's own answers to prompts, as windows, and which of them play which role.

Mean loss on texts says little of whether a long answer stays right, since that fails at its first
wrong token (docs/quality.md). So blocks are chosen, repairs fitted and results measured on answers
too: each is a window of its own, prompt and answer, of which the answer's tokens are scored.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sleb.calibration.prompts import Prompt, read_prompts
from sleb.calibration.windows import Windows, digest, written_source
from sleb.config import DEFAULT_PROMPTS, NO_PROMPTS
from sleb.core.errors import InputError
from sleb.core.plan import ANSWERS_TO, Calibration

ANSWERS = "answers"
"""The name of answers among the texts that they stand beside."""
DEFAULT = DEFAULT_PROMPTS
LEAST = 12
"""Prompts that there have to be, for every role to get one."""
MEASURED, SEARCH, VALIDATION = 96, 32, 32
"""Answers of these roles, at most; a fit gets the rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The model's answers to ``prompts`` of ``source``, of at most ``new_tokens`` tokens; a window
    each. ``run_code``: code in them may be run, to see whether it is right."""

    prompts: tuple[Prompt, ...]
    windows: Windows
    new_tokens: int
    source: str
    run_code: bool = False

    def without(self, seen: Collection[str]) -> Answers | None:
        """Those to prompts that are not among ``seen``, see :func:`prompt_hashes`; None if there
        are none."""
        rows = [i for i, known in enumerate(prompt_hashes(self.windows)) if known not in seen]
        return self.take(rows) if rows else None

    def take(self, rows: Sequence[int]) -> Answers:
        """The answers ``rows``."""
        prompts = tuple(self.prompts[i] for i in rows)
        return replace(self, prompts=prompts, windows=self.windows.take(rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerSplit:
    """Answers by role: blocks are chosen by ``search``, a repair is fitted on these and on ``fit``,
    ``validation`` decides whether it stays, and the result is ``measured`` on the rest. ``files``:
    where the prompts of ``search``, and then those of ``fit``, are from."""

    search: Windows
    fit: Windows
    files: tuple[str, ...]
    validation: Windows
    measured: Answers

    @classmethod
    def of(cls, answers: Answers, *, seed: int) -> AnswerSplit:
        """Give out answers in a seeded order.

        Raises:
            InputError: there are too few for every role.
        """
        n = len(answers.prompts)
        _enough(n, answers.source)
        order = random.Random(f"answers {seed}").sample(range(n), n)
        sizes = (min(MEASURED, n // 3), min(SEARCH, n // 6), min(VALIDATION, n // 8))
        starts = [0, sizes[0], sizes[0] + sizes[1], sum(sizes), n]
        measured, search, validation, fit = (sorted(order[a:b]) for a, b in pairwise(starts))
        return cls(
            search=answers.windows.take(search),
            fit=answers.windows.take(fit),
            files=tuple(answers.prompts[i].file for i in (*search, *fit)),
            validation=answers.windows.take(validation),
            measured=answers.take(measured),
        )

    @property
    def seen(self) -> list[str]:
        """The prompts of all roles but ``measured``."""
        return prompt_hashes(self.search + self.fit + self.validation)


def prompt_hashes(windows: Windows) -> list[str]:
    """What tells prompts apart, of windows of answers: 12 hex digits of the SHA-256 of each one's
    token ids, as the model reads it."""
    prompts = (prompt.numpy().astype("<i8").tobytes() for prompt in prompt_tokens(windows))
    return [hashlib.sha256(prompt).hexdigest()[:12] for prompt in prompts]


def prompt_tokens(windows: Windows) -> list[Tensor]:
    """Token ids of the prompts, of windows of answers."""
    assert windows.scored is not None
    starts = windows.scored.int().argmax(1).tolist()
    return [row[:start] for row, start in zip(windows.ids, starts, strict=True)]


def prompts_of(specs: Sequence[str]) -> tuple[Prompt, ...]:
    """The prompts of all files; the embedded ones for ``DEFAULT``, nothing for ``NO_PROMPTS``.
    Ids are unique among all.

    Raises:
        InputError, DataError: see :func:`sleb.calibration.prompts.read_prompts`; a file is given
            twice.
    """
    found: dict[str, Prompt] = {}
    for spec in specs if tuple(specs) != (NO_PROMPTS,) else ():
        if spec == DEFAULT:
            with resources.as_file(resources.files("sleb.data") / "prompts.jsonl") as path:
                rows = read_prompts(path)
        else:
            rows = read_prompts(spec)
        for row in rows:
            name = row.id if len(specs) == 1 else f"{spec}: {row.id}"
            if name in found:
                raise InputError(f"--prompts {spec} is given twice; give it once")
            found[name] = replace(row, file=spec)
    return tuple(found.values())


def check_prompts(specs: Sequence[str], most: int | None) -> None:
    """Refuse ``--prompts``, and ``most`` of them as ``--max-prompts``, before a model is loaded.

    Raises:
        InputError, DataError: see :func:`prompts_of`; they are too few for every role.
    """
    prompts = prompts_of(specs)
    if tuple(specs) == (NO_PROMPTS,):
        return
    if specs:
        _enough(len(prompts), f"--prompts {', '.join(specs)}")
    if most is not None:
        _enough(most, "--max-prompts")


def _enough(n: int, given: str) -> None:
    if n < LEAST:
        raise InputError(
            f"{given}: {n} prompts are too few to choose, repair and measure on; give at least "
            f"{LEAST}, better a hundred"
        )


def answer_windows(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    specs: Sequence[str],
    seed: int,
) -> Windows:
    """A window of each prompt and its answer, both token ids, padded behind to the longest."""
    rows = [torch.tensor([*p, *a]) for p, a in zip(prompts, answers, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt, answer in zip(scored, prompts, answers, strict=True):
        row[len(prompt) : len(prompt) + len(answer)] = True
    source = written_source(f"{ANSWERS_TO}{', '.join(specs)}", ids, sum(map(len, rows)))
    record = Calibration(
        sources=(source,),
        windows=len(ids),
        length=ids.shape[1],
        seed=seed,
        sha256=digest(ids, scored),
    )
    return Windows(ids=ids, source=(0,) * len(ids), names=(ANSWERS,), record=record, scored=scored)
