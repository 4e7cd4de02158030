"""How fast llama.cpp runs GGUF files, dense and cut in turn.

    PYTHON benchmarks/llama_cpp.py dense.gguf cut.gguf ... --prompts 256,2048 --together 1,8 -o OUT

PYTHON is an interpreter with xllamacpp (a prebuilt llama.cpp); it need not have sleb. For each
length of a prompt, and so many texts at once, the seconds of reading prompts and of writing behind
them are medians of turns, as llama.cpp itself times them. ``possible``: dense over cut in bytes of
the files, which is what writing one text behind a short prompt can gain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

KINDS = {"reading": "prompt_ms", "writing": "predicted_ms"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="the first is the dense model")
    parser.add_argument("--prompts", default="256,2048", help="tokens")
    parser.add_argument("--together", default="1", help="texts at once")
    parser.add_argument("--new", type=int, default=32, help="tokens written behind each")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def server(file: Path, context: int, together: int, threads: int) -> Any:
    """A model, ready for so many texts of so many tokens."""
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = context * together, together, True
    params.verbosity, params.fit_params = -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def timed(model: Any, length: int, together: int, new: int, turn: int) -> dict[str, float]:
    """Seconds of one turn, of all texts."""

    def ask(text: int) -> dict[str, float]:
        ids = [100 + (7 * i + 31 * text + turn) % 1000 for i in range(length)]
        how = {"cache_prompt": False, "ignore_eos": True, "temperature": 0.0}
        found: dict[str, float] = model.handle_completions(
            {"prompt": ids, "n_predict": new, **how}
        )["timings"]
        return found

    with ThreadPoolExecutor(together) as pool:
        each = [*pool.map(ask, range(together))]
    return {kind: max(one[name] for one in each) / 1000 for kind, name in KINDS.items()}


def main() -> None:
    options = parse()
    prompts, togethers = (
        [int(n) for n in text.split(",")] for text in (options.prompts, options.together)
    )
    sizes = {file.name: file.stat().st_size for file in options.files}
    dense = options.files[0].name
    rows: list[dict[str, Any]] = []
    for together in togethers:
        context = max(prompts) + options.new + 8
        models = {f.name: server(f, context, together, options.threads) for f in options.files}
        for length in prompts:
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in models}
            for turn in range(options.turns):
                for name, model in models.items():
                    turns[name].append(timed(model, length, together, options.new, turn))
            row: dict[str, Any] = {"prompt": length, "together": together}
            for kind in KINDS:
                seconds = {name: median(t[kind] for t in found) for name, found in turns.items()}
                row[f"{kind}_seconds"] = {k: round(s, 4) for k, s in seconds.items()}
                row[f"{kind}_speedup"] = {
                    k: round(seconds[dense] / s, 3) for k, s in seconds.items() if k != dense
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    report = {
        "llama.cpp": f"xllamacpp {version('xllamacpp')}",
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "new": options.new,
        "turns": options.turns,
        "possible": {k: round(sizes[dense] / s, 3) for k, s in sizes.items() if k != dense},
        "rows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    os._exit(0)  # the servers' threads would stay


if __name__ == "__main__":
    main()
