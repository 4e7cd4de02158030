"""How blocks run while they are trained: compiled, or once more for the backward pass; and how fast
that is."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sleb.models.stack import BlockStack


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


def of_any_length() -> AbstractContextManager[None]:
    """While this is open, attention runs by kernels that take any shape as it comes. cuDNN's, which
    torch prefers on an H200, is planned anew for each shape, a tenth of a second forward and
    backward (torch 2.11); and the windows of passes are of all lengths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    every = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel([*every])


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
