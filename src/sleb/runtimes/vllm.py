"""vLLM, with token ids in and out and no reuse of prompts that it has read before."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sleb.core.errors import DataError, InputError
from sleb.runtimes.base import Prompts, Runtime, Settings

MEMORY_SHARE = 0.9  # of a GPU, its own default


class VLLM(Runtime):
    """The engine in this process, whose memory is measured and which it ends with."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        on_gpu, scores = s.device.startswith("cuda"), s.purpose == "score"
        if scores:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; one sequence takes less
        self.vllm = _import()
        self.engine = self.vllm.LLM(
            model=s.path,
            dtype=s.dtype,
            max_model_len=s.length,
            max_num_seqs=s.batch,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=scores or not on_gpu,
            trust_remote_code=s.trust_remote_code,
            **({"gpu_memory_utilization": MEMORY_SHARE / s.models} if on_gpu else {}),
        )

    @staticmethod
    def prepare(settings: Settings) -> None:
        """See :class:`Runtime`."""
        if settings.device not in ("cpu", "cuda", "cuda:0"):
            raise InputError("it takes the first GPU, or the CPU: use --device cuda or cpu")
        _import()

    def work(self, prompts: Prompts, new_tokens: int, fewest: bool) -> Callable[[], None]:
        """See :class:`Runtime`. vLLM always gives a token, so a prompt costs one."""
        new_tokens = max(1, new_tokens)

        def work() -> None:
            for answer in self._generate(prompts, max_tokens=new_tokens, ignore_eos=True):
                if (made := len(answer.outputs[0].token_ids)) != new_tokens:
                    raise DataError(f"vllm ended after {made} of {new_tokens} tokens")

        return work

    def logprobs(self, ids: list[int]) -> list[float]:
        """See :class:`Runtime`."""
        (answer,) = self._generate([ids], max_tokens=1, prompt_logprobs=0)
        pairs = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
        return [found[token].logprob for token, found in pairs]

    def _generate(self, prompts: Prompts, **options: Any) -> Any:
        sampling = self.vllm.SamplingParams(temperature=0.0, detokenize=False, **options)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return self.engine.generate(given, sampling, use_tqdm=False)


def _import() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return import_module("vllm")
