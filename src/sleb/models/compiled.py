"""Blocks run through torch.compile, which fuses what lies between their matrix products.

On a GPU the norms, rotations and gates of a block are bound by memory, and in eager mode take a
good part of its time. To compile takes tens of seconds, so it pays for long searches alone. Fused
kernels round otherwise: scores are those of eager mode to rounding, and not to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sleb.core.errors import SAID, InputError, ResourceError, map_exceptions
from sleb.models.stack import BlockStack, Call


class CompiledStack(BlockStack):
    """A stack whose full batches, of ``windows`` windows, run compiled; others run as they are.

    One graph of one shape serves all blocks of a kind, since weights are arguments of it. More
    shapes would take longer to compile than they save.

    Raises:
        UnsupportedModel: see :func:`sleb.models.stack.find_blocks`.
        InputError: blocks are streamed from disk: their weights come and go.
    """

    def __init__(self, model: nn.Module, windows: int) -> None:
        super().__init__(model)
        if self.streamed:
            raise InputError("streamed blocks cannot be compiled: leave out --compile or --stream")
        self.windows = windows
        self._forward: Callable[..., Any] = torch.compile(_forward, dynamic=False)

    @torch.inference_mode()
    def run(self, i: int, hidden: Tensor, call: Call) -> Tensor:
        """Block ``i`` alone; see :meth:`BlockStack.run`.

        Raises:
            ResourceError: torch cannot compile here, for want of a compiler for example.
        """
        if len(hidden) != self.windows or i not in self.used:
            return super().run(i, hidden, call)
        from torch._dynamo.exc import BackendCompilerFailed

        why = f"{self.name}: its blocks do not compile here: {SAID}; leave out --compile"
        with map_exceptions((BackendCompilerFailed, ResourceError, why)):
            out = self._forward(self.blocks[i], hidden, call.args, call.kwargs)
        return self.skip(out if isinstance(out, Tensor) else out[0], call)


def _forward(block: nn.Module, hidden: Tensor, args: Any, kwargs: Any) -> Any:
    return block(hidden, *args, **kwargs)
