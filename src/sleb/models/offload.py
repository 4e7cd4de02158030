"""Read the next block while this one computes.

accelerate's hooks fetch a block's weights when it is called, and everything waits. Here a thread
fetches them before, through the same hooks' maps of weights: from the files or from memory, and on
to the GPU on a stream of its own. So two blocks are held at a time.
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sleb.models.shard_reader import Files

Weights = list[dict[str, Tensor]]
"""For each hook of a block, its module's tensors by name."""


def offloading(block: nn.Module) -> list[tuple[nn.Module, Any]]:
    """A block's modules whose weights accelerate fetches when they run, each with its hook."""
    found = []
    for module in block.modules():
        found += [(module, h) for h in _hooks(module) if getattr(h, "offload", False)]
    return found


def fetcher(block: nn.Module, path: str) -> tuple[nn.Module, Any, str] | None:
    """The module and the hook that fetch a parameter of a block when it runs, whether or not it is
    in place now, and its name there; None for one that is never fetched."""
    parts = path.split(".")
    for n in range(len(parts) - 1, -1, -1):
        module = block.get_submodule(".".join(parts[:n]))
        for hook in _hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                return module, hook, ".".join(parts[n:])
    return None


def fetch(module: nn.Module, hook: Any, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` in place as the hook would, and have it leave them there."""
    own = hook.weights_map
    hook.weights_map = ChainMap(weights, own)
    try:
        hook.pre_forward(module)
    finally:
        hook.weights_map = own
    hook.offload = False


def misshapen(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Of the tensors that stay in files: name, shape there and shape in ``model``, where these
    differ. transformers compares those alone that it loads."""
    files = Files()
    for path, module in model.named_modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False):
                for name, tensor in _fetched(module, hook):
                    place = files.stored(hook.weights_map, name)
                    if place is not None and place.info.shape != tensor.shape:
                        yield f"{path}.{name}", place.info.shape, tuple(tensor.shape)


def _fetched(module: nn.Module, hook: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a hook fetches for its module, by name."""
    from accelerate.utils import named_module_tensors  # type: ignore[import-untyped]

    found: Iterator[tuple[str, Tensor]] = named_module_tensors(
        module,
        include_buffers=hook.offload_buffers,
        recurse=hook.place_submodules,
        remove_non_persistent=True,
    )
    return found


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))


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
        self._files = Files()

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

    def forget(self, i: int) -> None:
        """Block ``i``'s weights are no longer what may have been read ahead."""
        if self._ahead is not None and self._ahead[0] == i:
            self._ahead = None

    def _read(self, hooks: Sequence[tuple[nn.Module, Any]]) -> tuple[Weights, list[Any]]:
        began, weights, devices = time.perf_counter(), [], []
        for module, hook in hooks:
            names = [name for name, _ in _fetched(module, hook)]
            where = torch.device(hook.execution_device)
            if where.type == "cuda":
                where = torch.device("cuda", where.index or 0)
                devices.append(where)
                if where not in self._streams:
                    self._streams[where] = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
                with torch.cuda.stream(self._streams[where]):
                    part = self._moved(hook.weights_map, names, where)
            else:
                part = {name: hook.weights_map[name] for name in names}
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

    def _moved(self, weights: Any, names: list[str], device: torch.device) -> dict[str, Tensor]:
        """On a GPU, through pinned memory: what is in files is read into it."""
        places = {n: p for n in names if (p := self._files.stored(weights, n)) is not None}
        read = dict(zip(places, self._files.read(places.values(), pinned=True), strict=True))
        part = {}
        for name in names:
            tensor = read[name] if name in read else weights[name]
            if tensor.device.type == "cpu" and not tensor.is_pinned():
                tensor = tensor.pin_memory()
            part[name] = tensor.to(device, non_blocking=True)
            if name in places:
                part[name] = part[name].to(places[name].dtype)
        return part
