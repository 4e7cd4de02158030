"""Run by the Python of an environment with llama-cpp-python, which need not have sleb:
``llama_score.py MODEL TEXT COUNT LENGTH`` prints the windows of the text, as llama.cpp tokenizes
it, each begun as the model wants it, and the loss on each token after its first, in nats."""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def score(model: str, text: str, count: int, length: int) -> dict:
    """Token ids [count, length] and losses [count, length - 1]."""
    llama = Llama(model, n_ctx=length, n_batch=length, logits_all=True, n_threads=1, verbose=False)
    begins = llama.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    bos = [llama.token_bos()] if begins else []
    own = length - len(bos)
    ids = llama.tokenize(Path(text).read_bytes(), add_bos=False)
    windows, losses = [bos + ids[i * own : (i + 1) * own] for i in range(count)], []
    for window in windows:
        llama.reset()
        llama.eval(window)
        logits = np.asarray(llama.scores[: length - 1], dtype=np.float64)
        top = logits.max(axis=1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses.append((total - logits[np.arange(length - 1), window[1:]]).tolist())
    return {"windows": windows, "losses": losses}


if __name__ == "__main__":
    json.dump(score(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])), sys.stdout)
