"""Right answers of a model and of its cuts: code that passes its unit tests, sums.

    python benchmarks/answers.py MODEL --data FOLDER --removed 3,6 -o out.json
    python benchmarks/answers.py MODEL --data FOLDER --cuts A=FOLDER ... -o out.json

FOLDER holds ``answers/code_dev.jsonl`` (``prompt``, ``tests``) and ``answers/math_dev.jsonl``
(``prompt``, ``answer``), and the texts of texts.py, on which cuts are calibrated. The code that a
model writes is run, in a child process with a time limit alone: use a machine that you can lose.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import main_of, save, setting
from texts import prepare

import sleb
from sleb.core.statistics import flips, proportion

SYSTEMS: dict[str, dict[str, Any]] = {
    "cosine": {"metric": "cosine", "repair": False},
    "sleb": {"exact": True, "strategy": "greedy", "repair": False},
    "window": {"strategy": "window", "repair": False},
    "window-repaired": {"strategy": "window"},
    "default": {},
}
SECONDS = 10  # for one task's tests
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def answers(model: Any, prompts: Sequence[str], new: int, batch: int) -> list[str]:
    """What the model answers greedily; batches are of prompts of about one length."""
    tokenizer, network = model.tokenizer, model.model
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        if tokenizer.chat_template
        else prompt
        for prompt in prompts
    ]
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids = tokenizer(
            [chats[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(network.device)
        with torch.inference_mode():
            out = network.generate(
                **ids, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new_ids = out[:, ids["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        found |= dict(zip(rows, texts, strict=True))
    return [found[i] for i in range(len(prompts))]


def right(item: dict[str, Any], text: str) -> bool:
    """Whether an answer passes its tests, or ends in its number."""
    if "tests" in item:
        block = re.search(r"```(?:python)?\s*\n(.*?)(?:```|$)", text, re.DOTALL)
        return passes(f"{block[1] if block else text}\n{item['tests']}\n")
    _, marked, tail = text.rpartition("Answer:")
    numbers = NUMBER.findall(tail)
    if not numbers:
        return False
    number = numbers[0 if marked else -1].replace(",", "")
    return abs(float(number) - float(item["answer"])) < 1e-6


def passes(source: str) -> bool:
    """Whether a program ends well, in a folder of its own."""
    run, given = [sys.executable, "-I", "-"], source.encode(errors="replace")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                run, input=given, capture_output=True, timeout=SECONDS, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def measured(
    model: Any, sets: dict[str, list[dict[str, Any]]], dense: dict[str, Any] | None, options: Any
) -> dict[str, Any]:
    """Right answers of each set, with what flipped against the dense model."""
    found: dict[str, Any] = {}
    for name, items in sets.items():
        start = time.perf_counter()
        texts = answers(model, [item["prompt"] for item in items], options.new, options.batch)
        seconds = time.perf_counter() - start
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            good = [*pool.map(right, items, texts)]
        row = {"right": asdict(proportion(sum(good), len(good))), "of": len(good)}
        row |= {"seconds": round(seconds, 1), "items": "".join(str(int(g)) for g in good)}
        if dense is not None:
            before = [item == "1" for item in dense[name]["items"]]
            change = flips(before, good)
            row |= {"lost": change.lost, "won": change.won}
            row |= {"kept": round(sum(good) / sum(before), 4) if any(before) else None}
        found[name] = row
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of prompts and texts")
    parser.add_argument("--cuts", nargs="*", default=[], help="NAME=FOLDER of cuts that are there")
    parser.add_argument("--removed", default="", help="cut so many blocks, in every system")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--windows", type=int, default=64, help="that cuts are calibrated on")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--limit", type=int, help="items of each set")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer, at most")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    sets = {
        kind: [
            json.loads(row)
            for row in (options.data / f"answers/{kind}_dev.jsonl").read_text().splitlines()
        ][: options.limit]
        for kind in ("code", "math")
    }
    model = sleb.load(options.model, device=options.device)
    report: dict[str, Any] = {
        "model": Path(options.model).name,
        "blocks": len(model.stack),
        **setting(model.stack.input_device, model.stack.dtype),
        "what": {
            key: getattr(options, key) for key in ("windows", "length", "limit", "new", "batch")
        },
        "dense": measured(model, sets, None, options),
        "cuts": [],
    }
    del model

    def add(name: str, folder: str | Path, **more: Any) -> None:
        cut = sleb.load(folder, device=options.device)
        row = {"system": name, "blocks": len(cut.stack), **more}
        report["cuts"].append(row | measured(cut, sets, report["dense"], options))
        save(options.out, report)
        print(json.dumps({k: v for k, v in report["cuts"][-1].items() if k != "plan"}), flush=True)

    save(options.out, report)
    for given in options.cuts:
        name, _, folder = given.partition("=")
        add(name, folder)
    depths = [int(n) for n in options.removed.split(",") if n]
    with tempfile.TemporaryDirectory() as place:
        text = tuple(prepare(options.data, Path(place), 0).calibration.values()) if depths else ()
        for depth in depths:
            for name in options.systems.split(","):
                out = Path(place) / f"{name}-{depth}"
                start = time.perf_counter()
                asked = {"text": text, "windows": options.windows, "length": options.length}
                asked |= {"remove": depth, "device": options.device, "keep": False}
                done = sleb.prune(options.model, out, **asked, **SYSTEMS[name])
                seconds = round(time.perf_counter() - start, 1)
                add(name, out, removed=done.plan.removed, prune_seconds=seconds)


if __name__ == "__main__":
    main_of(main)
