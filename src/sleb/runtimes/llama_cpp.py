"""llama.cpp through llama-cpp-python: a .gguf file in its own types, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from sleb.core.errors import InputError
from sleb.runtimes.base import Prompts, Runtime, Settings


class LlamaCpp(Runtime):
    """One context. ``settings.dtype`` is not used."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        self.on_gpu = s.device.startswith("cuda")
        self.llama = import_module("llama_cpp").Llama(
            model_path=s.path,
            n_ctx=s.length,
            n_gpu_layers=0 if s.device == "cpu" else -1,
            n_threads=s.threads,
            n_threads_batch=s.threads,
            logits_all=s.purpose == "score",
            seed=0,
            verbose=False,
        )
        if s.blocks is not None:
            facts = self.llama.metadata
            blocks = int(facts[f"{facts['general.architecture']}.block_count"])
            if blocks != s.blocks:
                raise InputError(f"{s.path} has {blocks} blocks and the checkpoint {s.blocks}")

    @staticmethod
    def prepare(settings: Settings) -> None:
        """See :class:`Runtime`."""
        llama_cpp = import_module("llama_cpp")
        if settings.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise InputError("this build computes on the CPU only: use --device cpu")

    def work(self, prompts: Prompts, new_tokens: int, fewest: bool) -> Callable[[], None]:
        """See :class:`Runtime`."""
        (prompt,) = prompts

        def work() -> None:
            self.llama.reset()
            self.llama.eval(prompt)
            for i in range(new_tokens):
                token = self.llama.sample(temp=0.0)
                if i + 1 < new_tokens:  # the last one is not read
                    self.llama.eval([token])

        return work

    def logprobs(self, ids: list[int]) -> list[float]:
        """See :class:`Runtime`."""
        import numpy as np

        self.llama.eval(ids)
        logits = np.array(self.llama.scores[: len(ids) - 1], dtype=np.float64)
        highest = logits.max(axis=1, keepdims=True)
        total = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
        found: list[float] = (logits[np.arange(len(ids) - 1), ids[1:]] - total).tolist()
        return found

    def memory(self) -> int | None:
        """See :class:`Runtime`: on a GPU, all that is taken of its memory."""
        if not self.on_gpu:
            return None
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free
