"""Read the next block while this one computes.

accelerate's hooks fetch a block's weights when it is called, and everything waits. Here a thread
fetches them before, through the same hooks' maps of weights: from the files or from memory, and on
to the GPU on a stream of its own. So two blocks are held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Reader", "offloading"]

Weights = list[dict[str, Tensor]]
"""For each hook of a block, its module's tensors by name."""


def offloading(block: nn.Module) -> list[tuple[nn.Module, Any]]:
    """A block's modules whose weights accelerate fetches when they run, each with its hook."""
    found = []
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        found += [(module, h) for h in hooks if getattr(h, "offload", False)]
    return found


class Reader:
    """Fetches blocks' weights, one block ahead.

    ``nbytes`` and ``seconds``: what was read and how long that took, whether or not something
    waited for it.
    """

    def __init__(self) -> None:
        self.nbytes, self.seconds = 0, 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[tuple[Weights, Any]]] | None = None
        self._streams: dict[torch.device, Any] = {}

    def noted(self, text: str) -> str:
        """``text``, and how fast blocks are read, if any are."""
        if not self.seconds:
            return text
        return f"{text}, blocks read at {self.nbytes / self.seconds / 1e9:.2f} GB/s"

    def start(self, i: int, hooks: Sequence[tuple[nn.Module, Any]]) -> None:
        """Begin with block ``i``."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "sleb-reader")
        self._ahead = (i, self._pool.submit(self._read, list(hooks)))

    def take(self, i: int, hooks: Sequence[tuple[nn.Module, Any]]) -> Weights:
        """Block ``i``'s weights, where its hooks compute. What was begun for another block is left.

        Raises:
            OSError: a file cannot be read.
        """
        if self._ahead is None or self._ahead[0] != i:
            self.start(i, hooks)
        assert self._ahead is not None
        weights, copied = self._ahead[1].result()
        self._ahead = None
        for device, event in copied:
            here = torch.cuda.current_stream(device)
            here.wait_event(event)
            for tensor in (t for part in weights for t in part.values()):
                if tensor.device == device:
                    tensor.record_stream(here)  # else its memory could be used again too early
        return weights

    def _read(self, hooks: Sequence[tuple[nn.Module, Any]]) -> tuple[Weights, list[Any]]:
        from accelerate.utils import named_module_tensors  # type: ignore[import-untyped]

        began, weights, devices = time.perf_counter(), [], []
        for module, hook in hooks:
            names = named_module_tensors(
                module,
                include_buffers=hook.offload_buffers,
                recurse=hook.place_submodules,
                remove_non_persistent=True,
            )
            where = torch.device(hook.execution_device)
            if where.type == "cuda":
                where = torch.device("cuda", where.index or 0)
                devices.append(where)
                if where not in self._streams:
                    self._streams[where] = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
                stream = self._streams[where]
                with torch.cuda.stream(stream):
                    part = {name: _moved(hook.weights_map[name], where) for name, _ in names}
            else:
                part = {name: hook.weights_map[name] for name, _ in names}
            self.nbytes += sum(tensor.nbytes for tensor in part.values())
            weights.append(part)
        copied = []
        for device in dict.fromkeys(devices):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._streams[device])
            copied.append((device, event))
            event.synchronize()  # of this thread: the memory copied from must last so long
        self.seconds += time.perf_counter() - began
        return weights, copied


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the GPU, to which some maps of weights read at once."""
    if tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
