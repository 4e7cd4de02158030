"""What a machine has room for: windows per batch, memory budgets, CPU threads.

All are fixed by the model and the machine, and nothing is timed: the batch decides the last bits of
a score. Where a batch does not fit after all, a sweep halves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from sleb.calibration.images import with_images
from sleb.core.process_group import group
from sleb.models.stack import BlockStack, decoder_config


def default_batch(stack: BlockStack, length: int) -> int:
    """Windows per batch: enough tokens to fill the device, with one activation per block in at most
    2 GiB on a GPU (there are never more prefixes than candidates)."""
    if stack.input_device.type != "cuda":
        return max(1, 1_024 // length)
    width = int(decoder_config(stack.model.config).hidden_size)
    tokens = min(65_536, 2**31 // (2 * width * len(stack)))
    return max(1, tokens // length)


def batch_for(stack: BlockStack, ids: Tensor, batch: int | None = None) -> int:
    """``batch`` windows of ids [N, T] at once, by default see above; one where some have images."""
    return 1 if with_images(ids) else batch or default_batch(stack, ids.shape[1])


def room_bytes(stack: BlockStack) -> int:
    """Memory of a GPU that one thing of a kind may take: an eighth of it, which is the same in
    every run, or if there is less, a quarter of what is free."""
    total = torch.cuda.get_device_properties(stack.input_device).total_memory
    return min(total // 8, free_bytes(stack) // 4)


def free_bytes(stack: BlockStack) -> int:
    """Memory that is free now on the fullest device of the blocks, for each process that uses
    it."""
    devices = {stack.device(i) for i in range(len(stack))}
    gpus = [torch.cuda.mem_get_info(d)[0] for d in devices if d.type == "cuda"]
    main = [int(psutil.virtual_memory().available) // group().local_size]
    return min(gpus or main)


def busy_tokens(stack: BlockStack) -> int:
    """Tokens of a call of a block that keep the device busy: on a GPU about half a millisecond's
    work of a large one, next to which the time to start it is nothing."""
    if stack.input_device.type != "cuda":
        return 1_024
    return 2**38 // max(1, sum(p.numel() for p in stack.blocks[0].parameters()))


def logit_bytes(stack: BlockStack) -> int:
    """Budget for one chunk of float32 logits; bounds the head's memory for any vocabulary."""
    return 2**30 if stack.input_device.type == "cuda" else 2**26


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """Compute with so many CPU threads, by default torch's own choice; afterwards with as many as
    before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
