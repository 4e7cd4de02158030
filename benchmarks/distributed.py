"""How much faster a search is in several processes, and that its plan stays the same file.

    python benchmarks/distributed.py MODEL --ranks 1 2 --json out.json -- --remove 3 --windows 64
    python benchmarks/distributed.py --shape 2048 5632 24 16 8 --ranks 1 2 ...

MODEL is anything that sleb takes; ``--shape`` makes a Llama with random weights (hidden size, MLP
size, blocks, heads, key-value heads; bfloat16, byte tokens) for time alone. What follows ``--``
goes to ``sleb search``. Efficiency is the time of the search itself with the least ranks over that
with more, per rank. Loading is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import save
from perf_core import Shape, byte_tokenizer, random_llama


def random_checkpoint(folder: Path, sizes: list[int]) -> None:
    """A checkpoint with random weights."""
    names = ("width", "inner", "blocks", "heads", "kv_heads")
    shape = Shape(**dict(zip(names, sizes, strict=True)), vocab=256)
    random_llama(shape, torch.device("cpu")).save_pretrained(folder)
    byte_tokenizer(folder, shape.vocab)


def search(model: str, ranks: int, out: Path, options: list[str]) -> dict[str, float]:
    """One search; seconds in all, and of the search itself."""
    start = ["-m", "sleb"]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start += ["-m", "sleb"]
    command = [sys.executable, *start, "search", model, "-o", str(out), "--force", *options]
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    said = re.search(r"searching: done in ([\d.]+) s", done.stderr)
    return {"ranks": ranks, "whole": round(whole, 1), "search": float(said[1]) if said else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", type=int, nargs=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json")
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    asked, options = parser.parse_args(given[:at]), given[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model
        if asked.shape:
            model = f"{folder}/model"
            random_checkpoint(Path(model), asked.shape)
        plans, runs = [], []
        for ranks in asked.ranks:
            out = Path(folder) / f"plan-{ranks}.json"
            runs.append(search(model, ranks, out, options))
            plans.append(out.read_bytes())
    base = runs[0]
    for run in runs:
        ideal = base["search"] * base["ranks"]
        run["efficiency"] = round(ideal / max(run["search"] * run["ranks"], 1e-9), 3)
    same = len(set(plans)) == 1
    found = {"options": options, "shape": asked.shape, "runs": runs, "same_plan": same}
    print(json.dumps(found, indent=1))
    if asked.json:
        save(Path(asked.json), found)
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
