"""The training loop: it can be stopped at any time, and goes on as if it was not."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor

from sleb.calibration.windows import Windows
from sleb.core.errors import DataError
from sleb.core.process_group import group
from sleb.core.progress import Progress
from sleb.distillation.computing import compiled, differentiable, forwards
from sleb.distillation.local import PART, Local, Segment
from sleb.distillation.loss import (
    ActivationCache,
    Batch,
    HiddenLoss,
    SplitModel,
    Validation,
    backward_kl,
)
from sleb.distillation.mix import Mix
from sleb.distillation.record import Reason
from sleb.distillation.state import LOWER, Schedule, TrainingState
from sleb.distillation.student import Student, optimizer_of, step_at

CHECKS = 10
"""Checks in a run of full length."""
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates of the range test, each for a step: from what changes next to nothing to what
wrecks any model."""
TRIALS, TRIED = 3, 4
"""Short runs with a rate at most, and steps that one has at least to tell anything."""
GAINING = 0.5
"""Of what the best short run gains, what a higher rate has to gain."""
FIRST = 10 * (1 + TRIALS)
"""Of a run, single steps of the range test take one part in so many, and so does each short run."""
PROBED = 4
"""A range test validates on one window in so many."""
WORSE = 1.5
"""A range test ends at a divergence of so many times the start's."""
SAVING = 20
"""At most one part in so many of a run is spent on writing its state, at BYTES_PER_SECOND."""
BYTES_PER_SECOND = 1e9
COMPILING, LARGE_GPU = 45.0, 3e14
"""Compiling pays in a run of more seconds, at so many operations a second."""
KEPT = 8
"""Of the memory that is left on a GPU, one part in so many holds what the dense model made of
windows that are gone through again."""
GRAPHS = 32
"""Of the blocks of both models, at most: with gradients and without, for each kind of block. The
limit of torch, 8, would leave some as they are."""

DONE, STOPPED, FULL = range(3)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """One run. ``split``: the student's model; ``at_once``: tokens of a pass, of which half are
    taken wherever memory does not suffice; ``validation``: windows by kind; ``lr``: the highest
    learning rate, or None to find it; ``settings``: what the state in ``path`` is only good for;
    ``segments``: the blocks beside gaps, where these are trained first."""

    student: Student
    split: SplitModel
    teacher: SplitModel
    mix: Mix
    at_once: int
    validation: Mapping[str, Windows]
    schedule: Schedule
    lr: float | None
    settings: Mapping[str, Any]
    path: Path
    segments: Sequence[Segment] = ()
    hidden: HiddenLoss | None = None
    quickest: float = field(default=math.inf, init=False)
    """Seconds of the quickest step of a range test, which is smaller than those of the run."""

    def run(self, save_every: float, progress: Progress) -> Reason:
        """Train, from where an earlier run was stopped if there is its state, and leave the best
        weights in the model; why it ended.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the state is written.
            DataError: a divergence is NaN at the start, or the state is damaged.
            InputError: the state is of other settings.
            ResourceError: the disk is full.
        """
        self.trained = self.student.trained
        with contextlib.ExitStack() as while_running:
            begun = time.monotonic()
            self.compiled = self.compiling and self._compile(while_running, progress)
            self.where = TrainingState(seconds=time.monotonic() - begun)
            return self._run(save_every, progress)

    def _run(self, save_every: float, progress: Progress) -> Reason:
        with progress.stage("validating the start", None):
            self.validations = [
                Validation(self.teacher, windows, self.at_once)
                for windows in self.validation.values()
            ]
            self._anew()
            self.best = self._snapshot()
            self.activations = ActivationCache(self.teacher, self.mix.windows, self._room())
            found = TrainingState.load(self.path, self.settings)
            if found:
                self._restore(*found)
            else:
                self.where.checks = ((0, self._divergences(self.validations)),)
                if not all(map(math.isfinite, self.where.checks[0][1])):
                    raise DataError(
                        "a loss is NaN or infinite on held-out text; try --dtype float32"
                    )
        with interruptible() as stopped:
            if self.segments and not found and not self._local(stopped, progress):
                raise KeyboardInterrupt
            if not self.where.lr and not self._find_rate(stopped, progress):
                raise KeyboardInterrupt
            with progress.stage("healing", self._left()) as tick:
                reason = self._steps(stopped, self._timed(tick), save_every)
            stop = any(_agreed(reason is None or stopped()))
            # what comes after it takes minutes and may be stopped too; a run of less than lies
            # between two states is repeated in less time than a person needs to see it stopped
            if stop or self.where.seconds >= save_every:
                with progress.stage("saving the training", None):
                    self.save(ended=reason is not None)
            if reason is None or any(_agreed(stop or stopped())):
                raise KeyboardInterrupt
        for parameter in self.trained.values():
            parameter.grad = None
        self.student.take(self.best)
        del self.optimizer
        return reason

    def _left(self) -> int:
        """Units of progress: tokens, or seconds of a run that has no other end."""
        steps, seconds = self.schedule.steps, self.schedule.seconds
        if steps:
            return (steps - self.where.step) * self.mix.step_tokens
        return max(0, round(seconds - self.where.seconds)) if seconds else 0

    def _timed(self, tick: Callable[..., None]) -> Callable[..., None]:
        """``tick`` in the units of :meth:`_left`."""
        if self.schedule.steps:
            return tick
        last = time.monotonic()

        def seconds(_: int, note: str = "") -> None:
            nonlocal last
            passed = int(time.monotonic() - last)
            last += passed
            tick(passed, note=note)

        return seconds

    @property
    def device(self) -> str:
        """The type of device that is trained on."""
        return self.split.device.type

    @property
    def on_gpu(self) -> bool:
        """Whether work is done apart from this process."""
        return self.device == "cuda"

    @property
    def compiling(self) -> bool:
        """Whether to compile takes less time than it saves."""
        steps = self.schedule.steps or math.inf
        seconds = steps * self.step_operations / LARGE_GPU
        plain = "forward" not in vars(self.split.stack.blocks[0]) and self.student.rank is None
        most = self.schedule.seconds or math.inf
        return plain and self.on_gpu and min(seconds, most) > COMPILING

    def _compile(self, while_running: contextlib.ExitStack, progress: Progress) -> bool:
        """Run blocks compiled from here on; False, and as they are, where that fails."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            with progress.stage("compiling blocks", None), contextlib.ExitStack() as trial:
                trial.enter_context(torch._dynamo.config.patch(recompile_limit=GRAPHS))
                trial.enter_context(differentiable(self.split.model.get_input_embeddings()))  # type: ignore[operator]
                trial.enter_context(forwards([self.split.stack, self.teacher.stack], compiled))
                some = range(min(2, len(self.mix.windows.ids)))
                backward_kl(
                    self.split, self.teacher, Batch.of(self.mix.windows, some, self.split.device)
                )
                while_running.enter_context(trial.pop_all())
        except TorchDynamoException as error:
            logger.warning("blocks do not compile here, and run as they are: %s", error)
            return False
        finally:
            for parameter in self.trained.values():
                parameter.grad = None
        return True

    def release(self) -> None:
        """Let go of the model, whose memory is needed for the one that is written."""
        del self.student, self.split, self.trained, self.best, self.validations
        gc.collect()

    def _anew(self) -> None:
        """An optimizer that has seen nothing."""
        self.optimizer = optimizer_of(self.trained.values(), self.settings["optimizer"])

    def _snapshot(self) -> dict[str, Tensor]:
        """A copy of all that is trained, where it was if there is plenty of memory."""
        device, nbytes = next(iter(self.trained.values())).device, 4 * self.student.count
        roomy = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 8 * nbytes
        place = device if roomy else torch.device("cpu")
        return {name: p.detach().to(place, copy=True) for name, p in self.trained.items()}

    def _room(self) -> int:
        """Bytes for what the dense model made of windows. None on a CPU, where it would round
        otherwise after a stop, with other windows in the pass."""
        device = self.split.device
        return torch.cuda.mem_get_info(device)[0] // KEPT if device.type == "cuda" else 0

    def _steps(
        self, stopped: Callable[[], bool], tick: Callable[..., None], save_every: float
    ) -> Reason | None:
        """All steps up to the end of the run, for the reason given; None if it was stopped."""
        where, schedule = self.where, self.schedule
        start = saved = begun = time.monotonic()
        spent = where.seconds
        every = max(save_every, SAVING * 16 * self.student.count / BYTES_PER_SECOND)
        while (reason := schedule.over(where)) is None:
            done = schedule.done(where.step, where.seconds)
            rate = where.lr / LOWER**where.lowered * schedule.share(where.step, where.seconds)
            if not self._step(self.mix, where.step, rate, stopped, tick):
                where.stepping += time.monotonic() - begun
                return None
            where.step += 1
            (where.seconds,) = _agreed(spent + time.monotonic() - start)
            due = int(CHECKS * schedule.done(where.step, where.seconds)) > int(CHECKS * done)
            save = time.monotonic() - saved >= every
            if due or save or where.step == schedule.steps:
                if self.on_gpu:
                    torch.cuda.synchronize()
                where.stepping += time.monotonic() - begun
                if due or where.step == schedule.steps:
                    self._check()
                if save:
                    self.save()
                    saved = time.monotonic()
                begun = time.monotonic()
        if where.checks[-1][0] != where.step:
            self._check()
        return reason

    def _local(self, stopped: Callable[[], bool], progress: Progress) -> bool:
        """Train the segments, one behind the other. It stays, as a second check at the start, if it
        makes the whole better. False, with nothing changed, if it was stopped."""
        begun, mix = time.monotonic(), self.mix.smaller(math.inf)
        steps = math.ceil(mix.total / PART / mix.step_tokens)
        with progress.stage("training blocks beside gaps", None) as tick:
            for segment in self.segments:
                local = Local(
                    segment, self.student, self.split, self.teacher, self.settings["optimizer"]
                )
                kept = [k for step in range(steps) for k in local.keep(mix, step, self.at_once)]
                local.train(kept, stopped, tick)
        self._together()
        start, found = self.where.checks[0][1], self._divergences(self.validations)
        ended = any(_agreed(stopped()))
        if not ended and self.where.checked(found):
            self._keep()
        else:
            self.where.checks = ((0, start),)
            self.student.take(self.best)
        self.where.worse = 0
        self.where.seconds += time.monotonic() - begun
        return not ended

    def _find_rate(self, stopped: Callable[[], bool], progress: Progress) -> bool:
        """A range test (1506.01186): steps from the start with rates that rise, up to where the
        divergence does. A first step of Adam is larger than later ones, so it finds too low a rate
        for a long run: short runs go on from above it, to higher or lower rates while these are
        better. What a rate loses to noise a short run has less time to take back, so the highest is
        taken that gains ``GAINING`` of the best. False, with nothing changed, if it was stopped."""
        if self.lr is not None:
            self.where.lr = self.lr
            return True
        begun, where = time.monotonic(), self.where
        with progress.stage("finding a learning rate", len(RATES) + TRIALS) as tick:
            probes = [
                Validation(self.teacher, w.take(range(0, len(w.ids), PROBED)), self.at_once)
                for w in self.validation.values()
            ]
            start = mean(self._divergences(probes))
            half = (self.schedule.seconds or math.inf) / 2
            until = begun + half - where.seconds
            if not self._range_test(probes, start, until, stopped, tick):
                return False
            self._again()
            if not self._short_runs(probes, stopped, tick):
                return False
        least = min((found for _, found in where.trials), default=math.inf)
        if least < start:
            enough = start - GAINING * (start - least)
            where.lr = max(rate for rate, found in where.trials if found <= enough)
        where.seconds += time.monotonic() - begun
        return True

    def _again(self) -> None:
        """From the best weights, with an optimizer that has seen nothing."""
        self.student.take(self.best)
        self._anew()

    def _range_test(
        self,
        probes: Sequence[Validation],
        start: float,
        until: float,
        stopped: Callable[[], bool],
        tick: Callable[..., None],
    ) -> bool:
        """A step with each of ``RATES``, or with as many of them as take half of the run's time,
        noted in ``where.rates``, the best in ``where.lr``; False if it was stopped. ``until``: when
        that half is over."""
        seconds = self.schedule.seconds
        total = (self.schedule.steps or 0) * self.mix.step_tokens
        steps = self.mix.smaller(0 if seconds else total / FIRST / len(RATES))
        left: tuple[float, ...] = RATES
        found, cut = [(0.0, start)], False
        while left and not cut:
            rate, left = left[0], left[1:]
            begun = time.monotonic()
            if not self._step(steps, len(found) - 1, rate, stopped, lambda *_, **__: None):
                return False
            if seconds and len(found) == 1 and self.on_gpu:
                torch.cuda.synchronize()
            (spent,) = _agreed(time.monotonic() - begun)
            self.quickest = min(self.quickest, spent)
            if seconds and len(found) == 1:  # now it is known how large a step may be
                fast = steps.step_tokens / spent
                steps = self.mix.smaller(fast * seconds / (FIRST * len(RATES)))
            found.append((rate, mean(self._divergences(probes))))
            tick(1, note=f"{rate:g}: {found[-1][1]:.4f}")
            if not found[-1][1] < WORSE * start:
                break
            if len(found) > 2 or not self.on_gpu:  # the first there takes memory
                now = time.monotonic()
                more, once = _agreed(until - now, now - begun)
                cut = bool(left) and more < once
                if more < once * len(left):  # spread over what is left
                    left = left[_stride(len(left), more / once) - 1 :]
        finite = [pair for pair in found if math.isfinite(pair[1])]
        self.where.rates = tuple(finite)
        best = min(finite[1:], key=lambda pair: pair[1], default=RATES)[0]
        if cut and best == finite[-1][0]:  # it still fell: the best may be above
            best = RATES[RATES.index(best) + 1]
        self.where.lr = best
        return True

    def _short_runs(
        self, probes: Sequence[Validation], stopped: Callable[[], bool], tick: Callable[..., None]
    ) -> bool:
        """Runs at the rate above the one found and at neighbours of the best, noted in
        ``where.trials``; none where one would be of too few steps. False if it was stopped."""
        mix = self.mix.smaller(math.inf)

        def step(turn: int, rate: float) -> bool:
            return self._step(mix, turn, rate, stopped, lambda *_, **__: None)

        steps = math.inf if self.schedule.steps is None else self.schedule.steps // FIRST
        if (seconds := self.schedule.seconds) and steps >= TRIED:
            if TRIED * self.quickest > seconds / FIRST:  # nor do steps of this size fit
                return True
            for turn in range(1 + self.on_gpu):  # the first there takes memory, and compiles
                begun = time.monotonic()
                if not step(turn, self.where.lr):
                    return False
                if self.on_gpu:
                    torch.cuda.synchronize()
            (spent,) = _agreed(time.monotonic() - begun)
            steps = min(steps, seconds // (FIRST * spent))
            self._again()
        if steps < TRIED:
            return True
        count, tried, rate = int(steps), dict[float, float](), self.where.lr * LOWER
        short = Schedule(steps=count)
        while rate not in tried and len(tried) < TRIALS:
            if not all(step(turn, rate * short.share(turn, 0.0)) for turn in range(count)):
                return False
            found = mean(self._divergences(probes))
            self._again()
            tried[rate] = found if math.isfinite(found) else math.inf
            tick(1, note=f"{rate:g}: {found:.4f}")
            best = min(tried, key=tried.__getitem__)
            rate = best * LOWER if best == max(tried) else best / LOWER
        self.where.trials = tuple(pair for pair in tried.items() if math.isfinite(pair[1]))
        return True

    def _step(
        self,
        mix: Mix,
        step: int,
        rate: float,
        stopped: Callable[[], bool],
        tick: Callable[..., None],
    ) -> bool:
        """One step, for which each process has a part of the passes; False, with nothing changed,
        if the run was stopped meanwhile. In one process nothing in it waits for a GPU."""
        while (outcome := max(_agreed(self._gradients(mix, step, stopped, tick)))) == FULL:
            if self.at_once < 2 * max(mix.lengths):
                raise torch.OutOfMemoryError
            self.at_once //= 2  # here, where nothing holds what the pass had made
            self.activations.forget()
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        if outcome == STOPPED:
            return False
        if group().size > 1:
            group().sum_(*map(_gradient, self.trained.values()))
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        step_at(self.optimizer, rate)
        self.student.rounded()
        return True

    def _gradients(
        self, mix: Mix, step: int, stopped: Callable[[], bool], tick: Callable[..., None]
    ) -> int:
        """This process's part of the gradients of one step: DONE, STOPPED, or FULL where memory did
        not suffice."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for rows, weights in self._mine(mix, step):
                if stopped():
                    return STOPPED
                batch = Batch.of(mix.windows, rows, self.split.device, weights)
                known = None if self.hidden else self.activations(rows, batch)
                backward_kl(self.split, self.teacher, batch, known, self.hidden)
                tick(batch.tokens * group().size, note=self._note())  # the others do as much
        except torch.OutOfMemoryError:
            return FULL
        return DONE

    def _mine(self, mix: Mix, step: int) -> list[tuple[list[int], list[float]]]:
        """The passes of a step that this process does: as many tokens as any other."""
        here = group()
        if here.size == 1:
            return [*mix.step(step, self.at_once, self.device)]
        most = min(self.at_once, max(max(mix.lengths), mix.step_tokens // here.size))

        def taken(rows: Sequence[int]) -> int:
            return len(rows) * max(mix.lengths[row] for row in rows)

        given = [0] * here.size
        mine = []
        for each in sorted(mix.step(step, most, self.device), key=lambda each: -taken(each[0])):
            rank = given.index(min(given))
            given[rank] += taken(each[0])
            if rank == here.rank:
                mine.append(each)
        return mine

    @property
    def step_operations(self) -> float:
        """Of a step: products of weights alone, 2 an element and token forward, twice that
        backward. The dense model and the head have no gradient of their weights, nor have blocks
        beside adapters."""
        blocks, dense = (
            sum(p.numel() for p in model.stack.blocks.parameters() if p.dim() > 1)
            for model in (self.split, self.teacher)
        )
        head = sum(p.numel() for p in self.split.head.parameters() if p.dim() > 1)
        trained = 6 if self.student.rank is None else 4
        step = self.mix.step_tokens * (trained * blocks + 2 * dense)
        return float(step + self.mix.step_scored * (4 + 2) * head)

    @property
    def teraflops(self) -> float:
        """Achieved in steps."""
        return self.where.step * self.step_operations / max(self.where.stepping, 1e-9) / 1e12

    def _note(self) -> str:
        where = self.where
        first, last = mean(where.checks[0][1]), mean(where.checks[-1][1])
        of = f" of {self.schedule.steps}" if self.schedule.steps else ""
        return f"step {where.step + 1}{of}, held-out divergence {last:.3f}, at first {first:.3f}"

    def _divergences(self, validations: Sequence[Validation]) -> tuple[float, ...]:
        """Of each kind, nats/token; the same in all processes."""
        found = [float(validation(self.split)[:, 2].mean()) for validation in validations]
        group().from_first_(shared := torch.tensor(found, dtype=torch.float64))
        return tuple(shared.tolist())

    def _together(self) -> None:
        """All processes go on with the weights of the first."""
        for parameter in self.trained.values():
            group().from_first_(parameter.detach())
        self.student.rounded()

    def _keep(self) -> None:
        """These weights are the best ones."""
        for name, parameter in self.trained.items():
            self.best[name].copy_(parameter.detach())

    def _check(self) -> None:
        """Validate; keep what is better, and where the run is lost go back to that."""
        if group().size > 1:
            self._together()
        if self.where.checked(self._divergences(self.validations)):
            self._keep()
        elif self.where.lost:
            self._again()
            self.where.lowered, self.where.worse = self.where.lowered + 1, 0

    def save(self, *, ended: bool = False) -> None:
        """Write the state, if this is the process that writes; of a run that has ``ended`` a
        quarter of it, the best weights."""
        if not group().is_main:
            return
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in () if ended else self.trained.items():
            tensors[f"weight/{name}"] = parameter
            if self.settings["optimizer"] != "adamw-8bit":  # states of 8 bits begin anew
                for kind, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{kind}/{name}"] = value
        self.where.save(self.path, self.settings, tensors)

    @torch.no_grad()
    def _restore(self, where: TrainingState, tensors: dict[str, Tensor]) -> None:
        self.where = where
        self.student.take(
            {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}
        )
        moments = sorted({name.partition("/")[0] for name in tensors} - {"best", "weight"})
        for name, parameter in self.trained.items():
            self.best[name].copy_(tensors[f"best/{name}"])
            for kind in moments:
                value = tensors[f"{kind}/{name}"]
                # AdamW counts its steps on the CPU, unless it is fused
                here = kind == "step" and not self.on_gpu
                self.optimizer.state[parameter][kind] = (
                    value if here else value.to(parameter.device)
                )


def _stride(rates: int, turns: float) -> int:
    """So many rates on in a range test that has time for ``turns`` more: so that these go through
    all, but not more than half of the way in one."""
    return min(math.ceil(rates / max(1.0, turns // 1)), -(-rates // 2))


def _agreed(*mine: float) -> list[float]:
    """The largest of each over all processes."""
    found = group().exchange(json.dumps(mine).encode())
    return [max(each) for each in zip(*map(json.loads, found), strict=True)]


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:  # this process had no pass
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


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
