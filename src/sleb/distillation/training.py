"""The training loop: distillation that can be stopped at any time, and goes on as if it was not."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sleb.calibration import Windows
from sleb.core.errors import DataError
from sleb.core.progress import Progress
from sleb.core.statistics import Values
from sleb.distillation.split_model import SplitModel, backward
from sleb.distillation.state import Progressed, load_state, save_state
from sleb.distillation.validation import measure

__all__ = ["PATIENCE", "Schedule", "Training", "interruptible", "rows_of"]

PATIENCE = 3
"""Checks without a better held-out divergence after which a run stops."""
CHECKS = 10
"""Checks in a run of full length."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``steps`` of ``batch`` windows; the learning rate rises to ``lr`` over a twentieth of them,
    and falls along a cosine to zero at the last, or when ``seconds`` are spent."""

    steps: int
    batch: int
    lr: float
    seconds: float | None = None

    def rate(self, step: int, spent: float) -> float:
        """Learning rate of a step, counted from 0, that begins after ``spent`` seconds."""
        warmup = max(1, self.steps // 20)
        done = max(step / self.steps, spent / self.seconds if self.seconds else 0.0)
        return (
            self.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, done)))
        )

    def over(self, where: Progressed) -> str | None:
        """Why a run ends here; None if it goes on."""
        if where.step >= self.steps:
            return "all steps done"
        if self.seconds and where.seconds >= self.seconds:
            return "time is up"
        if where.worse >= PATIENCE:
            return f"no better on held-out text in {PATIENCE} checks"
        return None


def rows_of(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """Which windows a step, counted from 0, is trained on: each is taken once before any is taken
    again, in a new order every time."""

    def order(turn: int) -> list[int]:
        return random.Random(f"{seed}/{turn}").sample(range(windows), windows)

    places = [divmod(k, windows) for k in range(step * batch, (step + 1) * batch)]
    orders = {turn: order(turn) for turn in {turn for turn, _ in places}}
    return [orders[turn][i] for turn, i in places]


@dataclass(kw_only=True)
class Training:
    """One run. ``trained``: the parameters, by name; ``at_once``: windows per pass, which add up
    to a step; ``settings``: what the run's state is only good for."""

    student: SplitModel
    teacher: SplitModel
    trained: Mapping[str, nn.Parameter]
    windows: Windows
    judges: Windows
    schedule: Schedule
    at_once: int
    seed: int
    settings: Mapping[str, Any]
    state: Path
    save_every: float
    progress: Progress

    def run(self, before: Values) -> tuple[Progressed, str]:
        """Train, from where an earlier run was stopped if there is its state, and leave the best
        weights in the model. ``before``: measured on the judges. Returns where the run ended, and
        why.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the state is written.
            DataError: the loss is NaN or infinite, or the state is damaged.
            InputError: the state is of other settings.
            ResourceError: the disk is full.
        """
        parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.schedule.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.where = Progressed(checks=((0, float(before[:, 2].mean())),))
        self.best = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
        if found := load_state(self.state, self.settings):
            self._restore(*found)
        every = max(1, self.schedule.steps // CHECKS)
        tokens = self.windows.ids.shape[1] * self.schedule.batch
        left = (self.schedule.steps - self.where.step) * tokens
        with interruptible() as stopped, self.progress.stage("healing", left) as tick:
            last, saved, spent = time.monotonic(), time.monotonic(), self.where.seconds
            while (reason := self.schedule.over(self.where)) is None:
                if not self._step(stopped, tick):
                    self.save()
                    raise KeyboardInterrupt
                if self.where.step % every == 0 or self.where.step == self.schedule.steps:
                    self._judge()
                self.where.seconds = spent + time.monotonic() - last
                if time.monotonic() - saved >= self.save_every:
                    self.save()
                    saved = time.monotonic()
            if self.where.checks[-1][0] != self.where.step:
                self._judge()
            if stopped():
                self.save()
                raise KeyboardInterrupt
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.grad = None
                parameter.copy_(self.best[name])
        del self.optimizer
        return self.where, reason

    def _step(self, stopped: Callable[[], bool], tick: Callable[..., None]) -> bool:
        """One step; False, with nothing changed, if the run was stopped meanwhile."""
        ids = self.windows.ids
        rows = rows_of(self.where.step, self.schedule.batch, len(ids), self.seed)
        scale = 1 / (len(rows) * ids.shape[1])
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rows), self.at_once):
            if stopped():
                return False
            batch = ids[rows[start : start + self.at_once]].to(self.student.device)
            loss = float(backward(self.student, self.teacher, batch, scale)) * scale
            if not math.isfinite(loss):
                raise DataError(
                    f"the loss of step {self.where.step + 1} is {loss}; give a lower --lr"
                    + (f", and remove {self.state}" if self.state.exists() else "")
                )
            total += loss
            tick(batch.numel(), note=self._note())
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.where.step, self.where.seconds)
        self.optimizer.step()
        self.where.step += 1
        return True

    def _note(self) -> str:
        first, (_, last) = self.where.checks[0][1], self.where.checks[-1]
        return (
            f"step {self.where.step + 1} of {self.schedule.steps}, "
            f"held-out divergence {last:.3f}, at first {first:.3f}"
        )

    def _judge(self) -> None:
        found = measure(self.student, self.teacher, self.judges, self.at_once)
        value, best = float(found[:, 2].mean()), self.where.best
        self.where.checks += ((self.where.step, value),)
        if value < best:
            self.where.best_step, self.where.worse = self.where.step, 0
            for name, parameter in self.trained.items():
                self.best[name].copy_(parameter.detach())
        else:
            self.where.worse += 1

    def save(self) -> None:
        """Write the state."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trained.items():
            tensors[f"weight/{name}"] = parameter
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}/{name}"] = value
        save_state(self.state, self.settings, self.where, tensors)

    def _restore(self, where: Progressed, tensors: dict[str, Tensor]) -> None:
        kinds = sorted({name.partition("/")[0] for name in tensors} - {"best", "weight"})
        state = {}
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.trained.items()):
                parameter.copy_(tensors[f"weight/{name}"])
                self.best[name].copy_(tensors[f"best/{name}"])
                if kinds:
                    state[i] = {kind: tensors[f"{kind}/{name}"] for kind in kinds}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.where = where


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While this is open, the first Ctrl-C or polite kill is only noted, for the function that is
    given to tell; the next one acts at once. Outside of the main thread nothing is noted."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
