"""Which weights are trained, and the loop: it can be stopped at any time, and goes on as if it was
not."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint
from sleb.core.errors import DataError, InputError, ResourceError, UnsupportedModel
from sleb.core.files import staged_files
from sleb.core.progress import Progress
from sleb.distillation.loss import SplitModel, backward_kl, validate
from sleb.distillation.record import Reason
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix

PATIENCE = 3
"""Checks without a better validation divergence after which a run stops."""
CHECKS = 10
"""Checks in a run of full length."""
KEY = "sleb.heal"


class Student:
    """``model``, loaded from ``checkpoint``, with what is to be trained set to require gradients.

    Without ``rank`` that is every weight of the blocks, and of the decoder's norms outside of them.
    The embedding and the head stay, tied or not, and so do towers for images. With ``rank``,
    low-rank adapters (LoRA, 2106.09685) of all linear layers of the blocks are trained instead, and
    merged at the end.

    Raises:
        UnsupportedModel: a weight is quantized, or stored under a name that is not its own.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, *, rank: int | None, seed: int
    ) -> None:
        self.model, self.checkpoint = model, checkpoint
        stack = BlockStack(model)
        prefix = block_prefix(checkpoint, stack)
        parts = {name: p for name, p in model.named_parameters() if _trained(name, p, stack)}
        self.stored = {name: self._stored(name, p, stack.path, prefix) for name, p in parts.items()}
        self._adapted: Any = None
        if rank is None:
            model.requires_grad_(False)
            for parameter in parts.values():
                parameter.requires_grad_(True)
        else:
            self._adapted = _adapters(model, stack, rank, seed)
        self.trained: dict[str, nn.Parameter] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }

    @property
    def count(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.trained.values())

    def _stored(self, name: str, parameter: Tensor, path: str, prefix: str) -> str:
        """The parameter's name in the checkpoint, whose modules may have other parents."""
        there, here = (p.rstrip(".").rpartition(".")[0] for p in (prefix, path))
        rest = name.removeprefix(here).lstrip(".") if here else name
        candidates = (name, f"{there}.{rest}" if there else rest)
        known = next((c for c in candidates if c in self.checkpoint.tensors), None)
        if known is None:
            raise UnsupportedModel(
                f"{name} has another name in {self.checkpoint.path}, so it cannot be healed"
            )
        info = self.checkpoint.tensors[known]
        if info.dtype not in TORCH_DTYPES or info.shape != tuple(parameter.shape):
            raise UnsupportedModel(
                f"{known} is stored as {info.dtype} {list(info.shape)}: heal a model before it is "
                "quantized"
            )
        return known

    def finish(self) -> dict[str, Tensor]:
        """Merge adapters, round the weights to what they are stored as, in place, and return them
        by their names in the checkpoint. Nothing can be trained after that."""
        if self._adapted is not None:
            device = BlockStack(self.model).input_device
            self.model.to("cpu", torch.float32)  # sums in float32, and where there is room
            self._adapted.merge_and_unload()
            self.model.to(device)
        found = {}
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, known in self.stored.items():
                dtype = getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[known].dtype])
                rounded = parameters[name].to(dtype)
                parameters[name].copy_(rounded)
                found[known] = rounded.cpu()
        return found


def _trained(name: str, parameter: Tensor, stack: BlockStack) -> bool:
    if name.startswith(f"{stack.path}."):
        if not parameter.is_floating_point():
            raise UnsupportedModel(f"{name} is quantized: heal a model before it is quantized")
        return True
    config: Any = stack.model.config
    if decoder_config(config) is not config and not name.startswith(
        f"{stack.path.rpartition('.')[0]}."
    ):
        return False  # of a tower beside the decoder
    ends = (stack.model.get_input_embeddings(), stack.model.get_output_embeddings())  # type: ignore[operator]
    fixed = {id(p) for module in ends if module is not None for p in module.parameters()}
    return parameter.dim() == 1 and id(parameter) not in fixed


def check_adapters() -> None:
    """Raise InputError unless LoRA is installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("--lora needs PEFT; install it with: pip install 'sleb[heal]'") from None


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
def recomputed(stack: BlockStack, wanted: bool) -> Iterator[None]:
    """Activation checkpointing, while this is open: a block keeps only its input for the backward
    pass, and runs twice. (transformers' own needs training mode, and so dropout.)"""
    before = {block: vars(block).get("forward") for block in stack.blocks if wanted}
    try:
        for block in before:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        yield
    finally:
        for block, old in before.items():
            del block.forward
            if old is not None:
                block.forward = old


@dataclass(kw_only=True)
class TrainingState:
    """Where a run is. ``seconds``: spent in training so far. ``checks``: (step, validation
    divergence in nats/token). ``worse``: checks since the best one."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    worse: int = 0
    checks: tuple[tuple[int, float], ...] = ()

    def checked(self, value: float) -> bool:
        """Note a validation divergence at this step; whether it is the lowest so far."""
        better = value < min(known for _, known in self.checks)
        self.checks += ((self.step, value),)
        self.worse = 0 if better else self.worse + 1
        if better:
            self.best_step = self.step
        return better

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
                where.checks = tuple((step, value) for step, value in where.checks)
                return where, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it to start anew") from None


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

    def over(self, where: TrainingState) -> Reason | None:
        """Why a run ends here; None if it goes on."""
        if where.step >= self.steps:
            return "steps"
        if self.seconds and where.seconds >= self.seconds:
            return "time"
        return "no-gain" if where.worse >= PATIENCE else None


def rows_of(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """Which windows a step, counted from 0, is trained on: each is taken once before any is taken
    again, in a new order every time."""
    taken = range(step * batch, (step + 1) * batch)
    return [_order(k // windows, windows, seed)[k % windows] for k in taken]


@functools.lru_cache(maxsize=4)
def _order(turn: int, windows: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{turn}").sample(range(windows), windows)


@dataclass(kw_only=True)
class Training:
    """One run. ``split``: the student's model; ``at_once``: windows per pass, which add up to a
    step; ``settings``: what the state in ``path`` is only good for."""

    student: Student
    split: SplitModel
    teacher: SplitModel
    windows: Windows
    validation: Windows
    schedule: Schedule
    at_once: int
    seed: int
    settings: Mapping[str, Any]
    path: Path

    def run(self, before: float, save_every: float, progress: Progress) -> Reason:
        """Train, from where an earlier run was stopped if there is its state, and leave the best
        weights in the model; why it ended. ``before``: validation divergence of the start.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the state is written.
            DataError: the loss is NaN or infinite, or the state is damaged.
            InputError: the state is of other settings.
            ResourceError: the disk is full.
        """
        self.trained = self.student.trained
        self.optimizer = torch.optim.AdamW(
            [*self.trained.values()], lr=self.schedule.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.where = TrainingState(checks=((0, before),))
        self.best = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
        if found := TrainingState.load(self.path, self.settings):
            self._restore(*found)
        tokens = self.windows.ids.shape[1] * self.schedule.batch
        left = (self.schedule.steps - self.where.step) * tokens
        with interruptible() as stopped, progress.stage("healing", left) as tick:
            reason = self._steps(stopped, tick, save_every)
            if reason is None or stopped():
                self.save()
                raise KeyboardInterrupt
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.grad = None
                parameter.copy_(self.best[name])
        del self.optimizer
        return reason

    def release(self) -> None:
        """Let go of the model, whose memory is needed for the one that is written."""
        del self.student, self.split, self.trained, self.best
        gc.collect()

    def _steps(
        self, stopped: Callable[[], bool], tick: Callable[..., None], save_every: float
    ) -> Reason | None:
        """All steps up to the end of the run, for the reason given; None if it was stopped."""
        every = max(1, self.schedule.steps // CHECKS)
        start, saved, spent = time.monotonic(), time.monotonic(), self.where.seconds
        while (reason := self.schedule.over(self.where)) is None:
            if not self._step(stopped, tick):
                return None
            if self.where.step % every == 0 or self.where.step == self.schedule.steps:
                self._validate()
            self.where.seconds = spent + time.monotonic() - start
            if time.monotonic() - saved >= save_every:
                self.save()
                saved = time.monotonic()
        if self.where.checks[-1][0] != self.where.step:
            self._validate()
        return reason

    def _step(self, stopped: Callable[[], bool], tick: Callable[..., None]) -> bool:
        """One step; False, with nothing changed, if the run was stopped meanwhile."""
        ids = self.windows.ids
        rows = rows_of(self.where.step, self.schedule.batch, len(ids), self.seed)
        scale = 1 / (len(rows) * ids.shape[1])
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rows), self.at_once):
            if stopped():
                return False
            batch = ids[rows[start : start + self.at_once]].to(self.split.device)
            loss = float(backward_kl(self.split, self.teacher, batch, scale)) * scale
            if not math.isfinite(loss):
                raise DataError(
                    f"the loss of step {self.where.step + 1} is {loss}; give a lower --lr"
                    + (f", and remove {self.path}" if self.path.exists() else "")
                )
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

    def _validate(self) -> None:
        found = validate(self.split, self.teacher, self.validation, self.at_once)
        if self.where.checked(float(found[:, 2].mean())):
            for name, parameter in self.trained.items():
                self.best[name].copy_(parameter.detach())

    def save(self) -> None:
        """Write the state."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.trained.items():
            tensors[f"weight/{name}"] = parameter
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}/{name}"] = value
        self.where.save(self.path, self.settings, tensors)

    @torch.no_grad()
    def _restore(self, where: TrainingState, tensors: dict[str, Tensor]) -> None:
        self.where = where
        moments = sorted({name.partition("/")[0] for name in tensors} - {"best", "weight"})
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[f"weight/{name}"])
            self.best[name].copy_(tensors[f"best/{name}"])
            for kind in moments:
                value = tensors[f"{kind}/{name}"]
                # AdamW counts its steps on the CPU
                self.optimizer.state[parameter][kind] = (
                    value if kind == "step" else value.to(parameter.device)
                )


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
