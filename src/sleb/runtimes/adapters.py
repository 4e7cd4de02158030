"""Runtimes that `sleb bench` times: transformers and, where they are installed, vLLM and llama.cpp.

An engine loads one model when it is made, and prepares cases: what :meth:`Engine.prepare` returns
does the work that is timed, and comes back when the device has finished it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sleb.core.errors import DataError, InputError

if TYPE_CHECKING:
    from sleb.runtimes.bench import Case

__all__ = ["MODULES", "Engine", "Settings", "engine", "installed", "tokens"]

MODULES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp"}
LOOK_EVERY_S = 0.001
VLLM_SHARE = 0.9  # of a GPU's memory, its own default


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an engine is made with. ``path``: a checkpoint folder or a .gguf file. ``longest``:
    tokens of the longest sequence; ``widest``: sequences at once; ``models``: how many share the
    device."""

    runtime: str
    path: str
    device: str
    dtype: str
    threads: int | None
    blocks: int
    vocabulary: int
    longest: int
    widest: int
    models: int
    trust_remote_code: bool = False


class Engine(Protocol):
    """One loaded model."""

    kept: int | None
    """Blocks that run when a case is shortened; None if this runtime cannot bypass blocks."""

    def __init__(self, settings: Settings) -> None:
        """Load the model, which is timed."""
        ...

    @staticmethod
    def imports(settings: Settings) -> None:
        """What a process does once, whatever the model: neither timed nor counted as memory."""
        ...

    def prepare(self, case: Case, shortened: bool) -> Callable[[], None]:
        """The work of a case."""
        ...

    def used(self) -> int | None:
        """Bytes in use at this moment; None: as the process has them."""
        ...


def installed() -> tuple[str, ...]:
    """The runtimes that can be imported here; transformers is the first."""
    return tuple(name for name, module in MODULES.items() if find_spec(module) is not None)


def engine(runtime: str) -> type[Engine]:
    """The class that runs models in ``runtime``, a key of ``MODULES``."""
    known: dict[str, type[Engine]] = {
        "transformers": _Transformers,
        "vllm": _VLLM,
        "llama.cpp": _LlamaCpp,
    }
    return known[runtime]


def tokens(case: Case, vocabulary: int) -> list[list[int]]:
    """Random ids [batch, prompt tokens] below ``vocabulary``; the same for every model."""
    shape = (case.batch, case.prompt_tokens)
    ids: list[list[int]] = np.random.default_rng(0).integers(0, vocabulary, shape).tolist()
    return ids


class _Transformers:
    """transformers' own forward pass and generation: greedy, with a cache, never ended early."""

    def __init__(self, settings: Settings) -> None:
        from transformers import GenerationConfig

        from sleb.models.load import load

        s = settings
        loaded = load(s.path, dtype=s.dtype, device=s.device, trust_remote_code=s.trust_remote_code)
        self.vocabulary, self.stack = s.vocabulary, loaded.stack
        self.model: Any = loaded.model
        # the model's own would end at its end token, or sample
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        stays = _needed(self.stack)
        self.bypassed = set(range(len(self.stack))) - stays
        self.kept = len(stays) if self.bypassed else None

    @staticmethod
    def imports(settings: Settings) -> None:
        """The model's own code, and torch's first product of matrices."""
        from pathlib import Path

        import torch

        from sleb.models.load import DTYPES, empty_model, load_config

        remote = settings.trust_remote_code
        empty_model(
            load_config(Path(settings.path), trust_remote_code=remote), trust_remote_code=remote
        )
        square = torch.ones(
            (64, 64), dtype=DTYPES[settings.dtype], device=torch.device(settings.device)
        )
        (square @ square).sum().item()

    def prepare(self, case: Case, shortened: bool) -> Callable[[], None]:
        """See :class:`Engine`. A prompt is read as before generating: it fills a cache, and only
        the last position's logits are computed, where the model has that option."""
        import inspect

        import torch

        device = self.stack.input_device
        ids = torch.tensor(tokens(case, self.vocabulary), device=device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        call = self.model
        if case.new_tokens:
            call = self.model.generate
            given |= {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
            given |= {"do_sample": False, "num_beams": 1}
        elif "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            given["logits_to_keep"] = 1
        wait = None if device.type == "cpu" else getattr(torch, device.type).synchronize

        def work() -> None:
            with torch.inference_mode(), self.stack.bypassed(self.bypassed if shortened else ()):
                made = call(**given, use_cache=True)
            if wait:
                wait()
            if case.new_tokens and made.shape[1] != case.prompt_tokens + case.new_tokens:
                raise DataError(
                    f"{self.stack.name} ended after {made.shape[1] - case.prompt_tokens} of "
                    f"{case.new_tokens} tokens, so it cannot be timed"
                )

        return work

    def used(self) -> int | None:
        """See :class:`Engine`."""
        return None


def _needed(stack: Any) -> set[int]:
    """The blocks that generation with a cache needs: transformers takes positions and masks from
    the first, some models also from the last, of each kind."""
    from sleb.models.stack import decoder_config

    n = len(stack)
    kinds = list(getattr(decoder_config(stack.model.config), "layer_types", None) or ["all"] * n)
    first = {kinds.index(kind) for kind in kinds}
    return first | {n - 1 - kinds[::-1].index(kind) for kind in kinds}


class _VLLM:
    """vLLM, with token ids in and out and no reuse of prompts that it has read before."""

    kept: int | None = None

    def __init__(self, settings: Settings) -> None:
        s = settings
        on_gpu = s.device.startswith("cuda")
        self.vocabulary = s.vocabulary
        self.llm = import_module("vllm").LLM(
            model=s.path,
            dtype=s.dtype,
            max_model_len=s.longest,
            max_num_seqs=s.widest,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=not on_gpu,
            trust_remote_code=s.trust_remote_code,
            **({"gpu_memory_utilization": VLLM_SHARE / s.models} if on_gpu else {}),
        )

    @staticmethod
    def imports(settings: Settings) -> None:
        """See :class:`Engine`. The engine is to run in this process, whose memory is measured.

        Raises:
            InputError: a device that vLLM would not take.
        """
        if settings.device not in ("cpu", "cuda", "cuda:0"):
            raise InputError("it takes the first GPU, or the CPU: use --device cuda or cpu")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import_module("vllm")

    def prepare(self, case: Case, shortened: bool) -> Callable[[], None]:
        """See :class:`Engine`. vLLM always gives a token, so a prompt costs one."""
        new = max(1, case.new_tokens)
        asked = import_module("vllm").SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in tokens(case, self.vocabulary)]

        def work() -> None:
            for answer in self.llm.generate(prompts, asked, use_tqdm=False):
                if (made := len(answer.outputs[0].token_ids)) != new:
                    raise DataError(f"vllm ended after {made} of {new} tokens")

        return work

    def used(self) -> int | None:
        """See :class:`Engine`."""
        return None


class _LlamaCpp:
    """llama.cpp through llama-cpp-python, one sequence at a time."""

    kept: int | None = None

    def __init__(self, settings: Settings) -> None:
        s = settings
        self.vocabulary, self.on_gpu = s.vocabulary, s.device.startswith("cuda")
        self.llm = import_module("llama_cpp").Llama(
            model_path=s.path,
            n_ctx=s.longest,
            n_gpu_layers=0 if s.device == "cpu" else -1,
            n_threads=s.threads,
            n_threads_batch=s.threads,
            seed=0,
            verbose=False,
        )
        facts = self.llm.metadata
        blocks = int(facts[f"{facts['general.architecture']}.block_count"])
        if blocks != s.blocks:
            raise InputError(f"{s.path} has {blocks} blocks and the checkpoint {s.blocks}")

    @staticmethod
    def imports(settings: Settings) -> None:
        """See :class:`Engine`.

        Raises:
            InputError: a GPU is asked for, and llama.cpp was built without.
        """
        llama_cpp = import_module("llama_cpp")
        if settings.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise InputError("this build computes on the CPU only: use --device cpu")

    def prepare(self, case: Case, shortened: bool) -> Callable[[], None]:
        """See :class:`Engine`."""
        (prompt,) = tokens(case, self.vocabulary)

        def work() -> None:
            self.llm.reset()
            self.llm.eval(prompt)
            for i in range(case.new_tokens):
                token = self.llm.sample(temp=0.0)
                if i + 1 < case.new_tokens:  # the last one is not read
                    self.llm.eval([token])

        return work

    def used(self) -> int | None:
        """See :class:`Engine`: on a GPU, all that is taken of its memory."""
        if not self.on_gpu:
            return None
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free


class Meter:
    """The most memory in use while something runs, in bytes beyond what the process held before
    the model was loaded. On a GPU, as torch's allocator counts it, without the context of CUDA;
    else resident memory, looked at every millisecond."""

    def __init__(self, device: str) -> None:
        import psutil

        self.cuda = device if device.startswith("cuda") else None
        self.process = psutil.Process()
        gc.collect()
        self.base = self.process.memory_info().rss

    @contextlib.contextmanager
    def watching(self, used: Callable[[], int | None]) -> Iterator[list[int]]:
        """Fills the list that it gives with one number at the end."""
        seen: list[int] = []
        own = used()
        if self.cuda and own is None:
            import torch

            torch.cuda.reset_peak_memory_stats(self.cuda)
            yield seen
            seen.append(int(torch.cuda.max_memory_allocated(self.cuda)))
            return
        most, done = 0, threading.Event()

        def look() -> None:
            nonlocal most
            while True:
                now = used()
                if now is None:
                    now = self.process.memory_info().rss - self.base
                most = max(most, now)
                if done.wait(LOOK_EVERY_S):
                    return

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield seen
        finally:
            done.set()
            watcher.join()
            seen.append(most)
