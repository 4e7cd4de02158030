"""Batch size and number of CPU threads, by a short measured warm-up on this machine.

One block in the middle of the model is timed on a few sizes of batch. The measured choice must beat
the default by ``GAIN``, so that noise changes nothing, and is kept in the cache folder, so that the
same search on the same machine runs with the same batches: these decide the last bits of a score.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sleb.core.errors import InputError, ResourceError
from sleb.core.files import write_text
from sleb.core.process_group import group
from sleb.models.source import cache_dir
from sleb.models.stack import BlockStack, decoder_config
from sleb.selection.sweep import default_batch

__all__ = ["Setting", "on_threads", "running", "tune"]

logger = logging.getLogger(__name__)

GAIN = 1.1
WORTH = 2**14
"""Tokens of a search from which on a warm-up is worth its time."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Windows per forward pass, and threads that torch computes with on the CPU."""

    batch: int
    threads: int


def tune(
    stack: BlockStack, ids: Tensor, *, batch: int | None = None, threads: int | None = None
) -> Setting:
    """The fastest setting for windows like ids [N, T]; ``batch`` and ``threads`` are kept if given.
    In a job of several processes it is the first one's, for all.

    Raises:
        InputError: a number below one.
    """
    for name, given in (("batch", batch), ("threads", threads)):
        if given is not None and given < 1:
            raise InputError(f"--{name} {given} is not possible; give at least 1")
    usual = Setting(
        batch=batch or default_batch(stack, ids.shape[1]),
        threads=threads or torch.get_num_threads(),
    )
    here = group()
    if ids.numel() < WORTH or here.tp > 1:  # to time a share of a model takes all its ranks
        return Setting(**json.loads(here.broadcast_from_main(lambda: json.dumps(asdict(usual)))))
    found = here.broadcast_from_main(
        lambda: json.dumps(asdict(_tuned(stack, ids, usual, batch, threads)))
    )
    return Setting(**json.loads(found))


def _tuned(
    stack: BlockStack, ids: Tensor, usual: Setting, batch: int | None, threads: int | None
) -> Setting:
    choices = [
        Setting(batch=b, threads=t)
        for t in ([threads] if threads else _threads(stack))
        for b in ([batch] if batch else _batches(stack, usual.batch, ids))
    ]
    if len(choices) < 2:
        return usual
    path = cache_dir() / "tuning.json"
    known = _read(path)
    key = _key(stack, ids.shape[1], usual, choices)
    if key not in known:
        known[key] = asdict(_fastest(stack, ids, usual, choices))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known, indent=1) + "\n")
        except (OSError, ResourceError) as error:
            logger.warning("the measured batch size is not kept: %s", error)
    found = Setting(**known[key])
    logger.info("%d windows per pass, %d threads", found.batch, found.threads)
    return found


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, so the batch size is measured anew: %s", path, error)
        return {}


@contextmanager
def running(setting: Setting) -> Iterator[None]:
    """Compute with the setting's threads; afterwards with as many as before."""
    with on_threads(setting.threads):
        yield


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(stack: BlockStack) -> list[int]:
    """Numbers of threads worth a try: torch's own, all cores, all hardware threads. On a GPU, and
    where the environment has set it, only torch's own."""
    own = torch.get_num_threads()
    if stack.input_device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return [own]
    cores = psutil.cpu_count(logical=False) or own
    return sorted({own, cores, psutil.cpu_count() or own})


def _batches(stack: BlockStack, usual: int, ids: Tensor) -> list[int]:
    """The usual batch, and half and double as many windows, as far as there are windows. No more
    than usual on a GPU, where the usual is as many as memory is set aside for."""
    most = len(ids) if stack.input_device.type == "cpu" else min(usual, len(ids))
    return sorted({max(1, min(b, most)) for b in (usual // 2, usual, usual * 2)})


def _fastest(stack: BlockStack, ids: Tensor, usual: Setting, choices: list[Setting]) -> Setting:
    own = {setting: _seconds_per_window(stack, ids, setting) for setting in choices}
    best = min(own, key=lambda s: own[s])
    if usual in own and own[usual] < GAIN * own[best]:
        return usual
    return best


def _seconds_per_window(stack: BlockStack, ids: Tensor, setting: Setting) -> float:
    """Time of one block, the best of three runs; infinite if it does not fit in memory."""
    i = len(stack) // 2
    sample = ids[:1].repeat(setting.batch, 1)
    cuda = stack.input_device.type == "cuda"
    try:
        with running(setting), stack.holding(i):
            hidden, calls = stack.enter(sample)
            stack.run(i, hidden, calls[i])
            times = []
            for _ in range(3):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                stack.run(i, hidden, calls[i])
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return float("inf")
    return min(times) / setting.batch


def _key(stack: BlockStack, length: int, usual: Setting, choices: list[Setting]) -> str:
    """Identity of a measurement: machine, library, shape of a block, length, choices."""
    device = stack.input_device
    parts = [
        torch.cuda.get_device_name(device) if device.type == "cuda" else str(os.cpu_count()),
        torch.__version__,
        str(stack.dtype),
        [[list(p.shape) for p in stack.blocks[len(stack) // 2].parameters()]],
        decoder_config(stack.model.config).model_type,
        length,
        asdict(usual),
        [asdict(c) for c in choices],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
