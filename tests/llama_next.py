"""Run by the Python of an environment with xllamacpp, which need not have sleb: ``llama_next.py``
reads ``{"files": [...], "prompts": [[id, ...], ...]}`` from the standard input and prints, for each
file and prompt, the log-probability of every token that may come next, in nats."""

import json
import os
import sys

import xllamacpp


def next_logprobs(file: str, prompts: list[list[int]]) -> list[dict[int, float]]:
    """By token id."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
    params.verbosity, params.fit_params = -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = []
    for ids in prompts:
        asked = {"prompt": ids, "n_predict": 1, "n_probs": 200_000, "cache_prompt": False}
        answer = server.handle_completions({**asked, "temperature": 0.0, "ignore_eos": True})
        tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({token["id"]: token["logprob"] for token in tokens})
    return found


if __name__ == "__main__":
    answers, given = os.fdopen(os.dup(1), "w"), json.load(sys.stdin)
    os.dup2(2, 1)  # what the library prints is no answer
    json.dump([next_logprobs(file, given["prompts"]) for file in given["files"]], answers)
    answers.flush()
    os._exit(0)  # its server's thread would stay
