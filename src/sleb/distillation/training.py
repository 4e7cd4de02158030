"""Which weights are trained, and the loop: it can be stopped at any time, and goes on as if it was
not."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from operator import le
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint
from sleb.config import Optimizer
from sleb.core.errors import DataError, InputError, ResourceError, UnsupportedModel
from sleb.core.files import staged_files
from sleb.core.progress import Progress
from sleb.distillation.loss import Batch, Remembered, SplitModel, Validation, backward_kl
from sleb.distillation.mix import Mix
from sleb.distillation.record import Reason
from sleb.models.stack import BlockStack
from sleb.models.stored_names import block_prefix, pieces

CHECKS = 10
"""Checks in a run of full length."""
PATIENCE = 2
"""Checks without a better validation divergence after which the best weights are taken up again;
one is enough if it is worse than the start."""
LOWER, LOWERED = 3, 6
"""By what the rate is divided then, and how often before the run ends."""
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates of the range test, each for a step: from what changes next to nothing to what
wrecks any model."""
WARMUP = 20
"""The rate rises over one part in so many."""
TEST = 10
"""A range test takes one token in so many of a run's."""
PROBED = 4
"""A range test validates on one window in so many."""
WORSE = 1.5
"""A range test ends at a divergence of so many times the start's."""
SAVING = 20
"""At most one part in so many of a run is spent on writing its state, at BYTES_PER_SECOND."""
BYTES_PER_SECOND = 1e9
COMPILING, LARGE_GPU = 90.0, 3e14
"""Compiling pays in a run of more seconds, at so many operations a second."""
KEPT = 8
"""Of the memory that is left on a GPU, one part in so many holds what the dense model made of
windows that are gone through again."""
GRAPHS = 32
"""Of the blocks of both models, at most: with gradients and without, for each kind of block. The
limit of torch, 8, would leave some as they are."""
KEY = "sleb.heal"

logger = logging.getLogger(__name__)


class Student:
    """``model``, loaded from ``checkpoint``, with what is to be trained set to require gradients.

    Without ``rank`` that is every weight of the blocks. What stands before and behind them stays,
    and so do towers for images. With ``rank``, low-rank adapters (LoRA, 2106.09685) of all linear
    layers of the blocks are trained instead, and merged at the end.

    ``trained``: what the optimizer changes, float32. Where the model computes in another dtype
    these are copies, which gather the gradients of its parameters (mixed precision, 1710.03740);
    :meth:`rounded` hands what they became back to the model. Without ``copies`` it changes the
    model's own, in their dtype.

    Raises:
        UnsupportedModel: a weight is quantized, or stored under a name that is not its own.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        rank: int | None,
        seed: int,
        copies: bool = True,
    ) -> None:
        self.model, self.checkpoint, self.rank = model, checkpoint, rank
        stack = BlockStack(model)
        prefix = block_prefix(checkpoint, stack)
        parts = {name: p for name, p in model.named_parameters() if _trained(name, p, stack)}
        there, here = (p.rstrip(".").rpartition(".")[0] for p in (prefix, stack.path))
        self._homes = (f"{here}." if here else "", f"{there}." if there else "")
        self.stored = {name: self._stored(name, p) for name, p in parts.items()}
        self._adapted: Any = None
        if rank is None:
            model.requires_grad_(False)
            for parameter in parts.values():
                parameter.requires_grad_(True)
        else:
            self._adapted = _adapters(model, stack, rank, seed)
        self._computing = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained = dict(self._computing)
        if copies:
            self.trained = {name: self._master(name, p) for name, p in self._computing.items()}

    def _master(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """The float32 copy of a parameter, in full precision; itself, if it is of float32."""
        if parameter.dtype == torch.float32:
            return parameter
        stored = parameter.detach()
        if len(self.stored.get(name, ())) == 1:  # whose precision may be more
            stored = self.checkpoint.tensor(self.stored[name][0])
        master = nn.Parameter(stored.to(parameter.device, torch.float32, copy=True))

        def gather(computed: Tensor) -> None:
            assert computed.grad is not None
            if master.grad is None:
                master.grad = computed.grad.float()
            else:
                master.grad += computed.grad
            computed.grad = None

        parameter.register_post_accumulate_grad_hook(gather)  # type: ignore[no-untyped-call]
        return master

    @torch.no_grad()
    def rounded(self) -> None:
        """Give the model the trained weights, in its own dtype."""
        for name, parameter in self._computing.items():
            if (master := self.trained[name]) is not parameter:
                parameter.copy_(master)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Set all that is trained."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        self.rounded()

    @property
    def count(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.trained.values())

    def _pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A parameter's tensor by names in the checkpoint, whose modules may have other parents."""
        here, there = self._homes
        for known in (name, there + name.removeprefix(here)):
            if known in self.checkpoint.tensors:
                return {known: tensor}
        return pieces(self.model, name, tensor)

    def _stored(self, name: str, parameter: Tensor) -> tuple[str, ...]:
        """The names of a parameter's pieces."""
        found = self._pieces(name, parameter.detach().to("meta"))
        for known, piece in found.items():
            if known not in self.checkpoint.tensors:
                raise UnsupportedModel(
                    f"{name} has another name in {self.checkpoint.path}, so it cannot be healed"
                )
            info = self.checkpoint.tensors[known]
            if info.dtype not in TORCH_DTYPES or info.shape != tuple(piece.shape):
                raise UnsupportedModel(
                    f"{known} is stored as {info.dtype} {list(info.shape)}: heal a model before it "
                    "is quantized"
                )
        return tuple(found)

    def finish(self) -> dict[str, Tensor]:
        """Merge adapters, round the weights to what they are stored as, in place, and return them
        by their names in the checkpoint. Nothing can be trained after that."""
        if self._adapted is not None:
            device = BlockStack(self.model).input_device
            self.model.to("cpu", torch.float32)  # sums in float32, and where there is room
            self._adapted.merge_and_unload()
            self.model.to(device)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, (known, *_) in self.stored.items():
                dtype = getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[known].dtype])
                rounded = self.trained.get(name, parameters[name]).to(dtype)
                parameters[name].copy_(rounded)
                stored = self._pieces(name, rounded.cpu())
                found |= {each: piece.contiguous() for each, piece in stored.items()}
        return found


def _trained(name: str, parameter: Tensor, stack: BlockStack) -> bool:
    if not name.startswith(f"{stack.path}."):
        return False
    if not parameter.is_floating_point():
        raise UnsupportedModel(f"{name} is quantized: heal a model before it is quantized")
    return True


def check_installed(lora: int | None, optimizer: Optimizer) -> None:
    """Raise InputError unless what these need is installed."""
    needed = {"peft": lora and "--lora", "torchao": optimizer != "adamw" and "--optimizer"}
    for package, option in needed.items():
        if option and not find_spec(package):
            raise InputError(f"{option} needs {package}; install it with: pip install {package}")


def _adapters(model: nn.Module, stack: BlockStack, rank: int, seed: int) -> Any:
    """PEFT's wrapper of ``model``, whose linear layers it replaces in place."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = [
        f"{stack.path}.{name}"
        for name, module in stack.blocks.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextlib.contextmanager
def forwards(
    stacks: Sequence[BlockStack], wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While this is open, each block's forward is what ``wrapped`` makes of it."""
    blocks = [block for stack in stacks for block in stack.blocks]
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = wrapped(block.forward)
        yield
    finally:
        for block, old in zip(blocks, before, strict=True):
            del block.forward
            if old is not None:
                block.forward = old


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Activation checkpointing: a block keeps only its input for the backward pass, and runs twice.
    (transformers' own needs training mode, and so dropout.)"""
    return functools.partial(recompute, forward, use_reentrant=False)


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose norms, rotations and gates are fused, which are half of a block's time on a
    GPU. One graph for shapes of any size serves all blocks of a kind; a window alone would need
    another, so it runs as it is."""
    fused = fuse(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        alone = bool(args) and isinstance(args[0], Tensor) and len(args[0]) == 1
        return (forward if alone else fused)(*args, **kwargs)

    return run


fuse = functools.partial(torch.compile, dynamic=True)


@contextlib.contextmanager
def differentiable(embeddings: nn.Module) -> Iterator[None]:
    """While this is open, the input of the first block has a gradient as that of the others has,
    so that one graph serves them all."""

    def mark(_: nn.Module, given: object, out: Tensor) -> Tensor:
        return out.requires_grad_() if torch.is_grad_enabled() else out

    handle = embeddings.register_forward_hook(mark)
    try:
        yield
    finally:
        handle.remove()


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is. ``seconds``: spent in training so far, ``stepping``: in steps alone. ``lr``:
    the highest learning rate, 0 until it is known; ``rates``: what the range test found, (rate,
    validation divergence after a step with it). ``checks``: (step, validation divergence of each
    kind of window, nats/token).
    ``worse``: checks since the best one, ``lowered``: how often the rate was lowered."""

    step: int = 0
    seconds: float = 0.0
    stepping: float = 0.0
    lr: float = 0.0
    rates: tuple[tuple[float, float], ...] = ()
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
        try:
            with safe_open(path, framework="pt") as file:
                saved = json.loads((file.metadata() or {})[KEY])
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
                return where, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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


@dataclass(kw_only=True)
class Training:
    """One run. ``split``: the student's model; ``at_once``: tokens of a pass, of which half are
    taken wherever memory does not suffice; ``validation``: windows by kind; ``lr``: the highest
    learning rate, or None to find it; ``settings``: what the state in ``path`` is only good for."""

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
        self.validations = [
            Validation(self.teacher, windows, self.at_once) for windows in self.validation.values()
        ]
        self._anew()
        self.best = self._snapshot()
        self.known = Remembered(self.teacher, self.mix.windows, self._room())
        if found := TrainingState.load(self.path, self.settings):
            self._restore(*found)
        else:
            self.where.checks = ((0, self._divergences(self.validations)),)
            if not all(map(math.isfinite, self.where.checks[0][1])):
                raise DataError("a loss is NaN or infinite on held-out text; try --dtype float32")
        with interruptible() as stopped:
            if not self.where.lr and not self._find_rate(stopped, progress):
                raise KeyboardInterrupt
            with progress.stage("healing", self._left()) as tick:
                reason = self._steps(stopped, self._timed(tick), save_every)
            if reason is None or stopped():
                self.save()
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
        return round(seconds - self.where.seconds) if seconds else 0

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
    def compiling(self) -> bool:
        """Whether to compile takes less time than it saves."""
        steps = self.schedule.steps or math.inf
        seconds = steps * self.step_operations / LARGE_GPU
        plain = "forward" not in vars(self.split.stack.blocks[0]) and self.student.rank is None
        most = self.schedule.seconds or math.inf
        return plain and self.split.device.type == "cuda" and min(seconds, most) > COMPILING

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
        how: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
        weights = [*self.trained.values()]
        self.fused = weights[0].device.type == "cuda"
        if self.settings["optimizer"] == "adamw":
            self.optimizer = torch.optim.AdamW(weights, fused=self.fused or None, **how)
            return
        from torchao.optim import AdamW8bit

        rounding = weights[0].dtype == torch.bfloat16
        self.optimizer = AdamW8bit(weights, bf16_stochastic_round=rounding, **how)

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
            where.seconds = spent + time.monotonic() - start
            due = int(CHECKS * schedule.done(where.step, where.seconds)) > int(CHECKS * done)
            save = time.monotonic() - saved >= every
            if due or save or where.step == schedule.steps:
                if self.fused:
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

    def _find_rate(self, stopped: Callable[[], bool], progress: Progress) -> bool:
        """A range test (1506.01186): steps from the start with rates that rise, up to where the
        divergence does; the best one is the run's. False, with nothing changed, if it was stopped.
        """
        if self.lr is not None:
            self.where.lr = self.lr
            return True
        begun, seconds = time.monotonic(), self.schedule.seconds
        total = (self.schedule.steps or 0) * self.mix.step_tokens
        steps = self.mix.smaller(0 if seconds else total / TEST / len(RATES))
        probes = [
            Validation(self.teacher, w.take(range(0, len(w.ids), PROBED)), self.at_once)
            for w in self.validation.values()
        ]
        with progress.stage("finding a learning rate", len(RATES)) as tick:
            found = [(0.0, mean(self._divergences(probes)))]
            for turn, rate in enumerate(RATES):
                stepping = time.monotonic()
                if not self._step(steps, turn, rate, stopped, lambda *_, **__: None):
                    return False
                if seconds and not turn:  # now it is known how large a step may be
                    if self.fused:
                        torch.cuda.synchronize()
                    fast = steps.step_tokens / (time.monotonic() - stepping)
                    steps = self.mix.smaller(fast * seconds / (2 * TEST * len(RATES)))
                found.append((rate, mean(self._divergences(probes))))
                tick(1, note=f"{rate:g}: {found[-1][1]:.4f}")
                if not found[-1][1] < WORSE * found[0][1]:
                    break
        self.student.take(self.best)
        self._anew()
        where = self.where
        where.rates = tuple(pair for pair in found if math.isfinite(pair[1]))
        where.lr = min(where.rates[1:], key=lambda pair: pair[1], default=RATES)[0]
        where.seconds += time.monotonic() - begun
        return True

    def _step(
        self,
        mix: Mix,
        step: int,
        rate: float,
        stopped: Callable[[], bool],
        tick: Callable[..., None],
    ) -> bool:
        """One step; False, with nothing changed, if the run was stopped meanwhile. Nothing in it
        waits for a GPU."""
        while not self._gradients(mix, step, stopped, tick):
            if stopped():
                return False
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.optimizer.step()
        self.student.rounded()
        return True

    def _gradients(
        self, mix: Mix, step: int, stopped: Callable[[], bool], tick: Callable[..., None]
    ) -> bool:
        """The gradients of one step; False if it was stopped, or memory did not suffice and passes
        are now half as large."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for rows, weights in mix.step(step, self.at_once):
                if stopped():
                    return False
                batch = Batch.of(mix.windows, rows, self.split.device, weights)
                backward_kl(self.split, self.teacher, batch, self.known(rows, batch))
                tick(batch.tokens, note=self._note())
            return True
        except torch.OutOfMemoryError:
            if self.at_once < 2 * max(mix.lengths):
                raise
        self.at_once //= 2  # here, where nothing holds what the pass had made
        self.known.forget()
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return False

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
        """Of each kind, nats/token."""
        return tuple(float(validation(self.split)[:, 2].mean()) for validation in validations)

    def _check(self) -> None:
        """Validate; keep what is better, and where the run is lost go back to that."""
        if self.where.checked(self._divergences(self.validations)):
            for name, parameter in self.trained.items():
                self.best[name].copy_(parameter.detach())
        elif self.where.lost:
            self.student.take(self.best)
            self._anew()
            self.where.lowered, self.where.worse = self.where.lowered + 1, 0

    def save(self) -> None:
        """Write the state."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trained.items():
            tensors[f"weight/{name}"] = parameter
            if self.settings["optimizer"] == "adamw":  # states of 8 bits begin anew
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
                here = kind == "step" and not self.fused
                self.optimizer.state[parameter][kind] = (
                    value if here else value.to(parameter.device)
                )


def product_teraflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of the product of two large matrices: what there is to be reached."""
    size, times = (8192, 20) if device.type == "cuda" else (1024, 4)
    a = torch.randn(size, size, device=device, dtype=dtype)
    for turn in range(times + 1):
        if turn <= 1:  # the first is to warm up
            float((a @ a)[0, 0])
            begun = time.monotonic()
            continue
        out = a @ a
    float(out[0, 0])
    return (times - 1) * 2 * size**3 / (time.monotonic() - begun) / 1e12


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
