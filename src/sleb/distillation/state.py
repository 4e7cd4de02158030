"""Where a run is, the file it goes on from, and when it ends."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import le
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sleb.core.errors import DataError, InputError, ResourceError
from sleb.core.files import staged_files
from sleb.distillation.record import Reason

PATIENCE = 2
"""Checks without a better validation divergence after which the best weights are taken up again;
one is enough if it is worse than the start."""
LOWER, LOWERED = 3, 6
"""By what the rate is divided then, and how often before the run ends."""
WARMUP = 20
"""The rate rises over one part in so many."""
KEY = "sleb.heal"


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is. ``seconds``: spent in training so far, ``stepping``: in steps alone. ``lr``:
    the highest learning rate, 0 until it is known; ``rates``: what the range test found, (rate,
    validation divergence after a step with it), ``trials``: the same of short runs. ``checks``:
    (step, validation divergence of each kind of window, nats/token).
    ``worse``: checks since the best one, ``lowered``: how often the rate was lowered."""

    step: int = 0
    seconds: float = 0.0
    stepping: float = 0.0
    lr: float = 0.0
    rates: tuple[tuple[float, float], ...] = ()
    trials: tuple[tuple[float, float], ...] = ()
    best_step: int = 0
    worse: int = 0
    lowered: int = 0
    checks: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def checked(self, found: tuple[float, ...]) -> bool:
        """Note validation divergences at this step; whether they are the best so far: the lowest
        mean of the kinds, and no kind worse than at the start."""
        start = self.checks[0][1]
        lowest = min(mean(known) for step, known in self.checks if step in (0, self.best_step))
        better = mean(found) < lowest and all(map(le, found, start))
        self.checks += ((self.step, found),)
        self.worse = 0 if better else self.worse + 1
        if better:
            self.best_step = self.step
        return better

    @property
    def gained(self) -> bool:
        """Whether there is something better than the start."""
        return self.best_step > 0 or [step for step, _ in self.checks].count(0) > 1

    @property
    def lost(self) -> bool:
        """Whether the best weights are to be taken up again."""
        start, last = mean(self.checks[0][1]), mean(self.checks[-1][1])
        return self.worse >= PATIENCE or (self.worse > 0 and not last < start)

    def save(self, path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, position and settings into one safetensors file, atomically.

        Raises:
            ResourceError: the disk is full.
        """
        from safetensors.torch import save_file

        for left in path.parent.glob(f".{path.name}.part-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        text = json.dumps({"settings": settings, "progressed": asdict(self)})
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with staged_files(path, force=True) as (part,):
                save_file(flat, part, metadata={KEY: text})
        except SafetensorError as error:
            raise ResourceError(
                f"cannot write {path} ({error}); free some space and repeat the command"
            ) from None

    @staticmethod
    def tokens(path: Path) -> int | None:
        """Of the run whose state this is; None if there is none.

        Raises:
            DataError: it is damaged.
        """
        if not path.is_file():
            return None
        with _opened(path) as (_, saved):
            return int(saved["settings"]["tokens"])

    @classmethod
    def load(
        cls, path: Path, settings: Mapping[str, Any]
    ) -> tuple[TrainingState, dict[str, Tensor]] | None:
        """What :meth:`save` wrote for the same settings; None if there is nothing.

        Raises:
            InputError: it is of a run with other settings.
            DataError: it is damaged.
        """
        if not path.is_file():
            return None
        with _opened(path) as (file, saved):
            now = json.loads(json.dumps(settings))  # so that tuples compare with lists
            for name in {**now, **saved["settings"]}:
                old, new = saved["settings"][name], now.get(name)
                if old != new:
                    raise InputError(
                        f"{path} is of a run with other settings ({name} was {old}, now "
                        f"{new}); repeat that run's command to finish it, or remove the file "
                        "to start anew"
                    )
            where = cls(**saved["progressed"])
            where.checks = tuple((step, tuple(found)) for step, found in where.checks)
            where.rates = tuple((rate, found) for rate, found in where.rates)
            where.trials = tuple((rate, found) for rate, found in where.trials)
            return where, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file of a state, and what it says of its run.

    Raises:
        DataError: it is damaged, also where that is only found out in the context.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {})[KEY])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it to start anew") from None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``steps``, or ``seconds``, or what is over first; the learning rate rises to its highest over
    a twentieth of the run, and falls along a cosine to zero at the end."""

    steps: int | None = None
    seconds: float | None = None

    def share(self, step: int, spent: float) -> float:
        """Of the highest learning rate at a step, counted from 0, that begins after ``spent``
        seconds."""
        done = min(1.0, self.done(step, spent))
        rising = WARMUP * done + (1 / max(1, self.steps // WARMUP) if self.steps else 0.0)
        return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * done))

    def done(self, step: int, spent: float) -> float:
        """How much of the run is behind it, 1 at its end."""
        steps = step / self.steps if self.steps else 0.0
        return max(steps, spent / self.seconds if self.seconds else 0.0)

    def over(self, where: TrainingState) -> Reason | None:
        """Why a run ends here; None if it goes on."""
        if self.steps and where.step >= self.steps:
            return "steps"
        if self.seconds and where.seconds >= self.seconds:
            return "time"
        return "no-gain" if where.lowered > LOWERED else None
