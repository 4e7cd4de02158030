"""How much of what a cut lost healing gives back, by what it learns from and by how much of it.

    python benchmarks/heal.py MODEL CUT --data FOLDER -o out.json

CUT is a folder from `sleb prune` or `sleb apply` on MODEL; FOLDER is laid out as texts.py and
answers.py say, with prompts to learn from in ``answers/*_fit.jsonl``. For each mix and number of
tokens the cut is healed; of it, of the cut and of MODEL are measured right answers to
``answers/*_dev.jsonl`` (as answers.py does) and perplexity on test texts of texts.py, none of which
was learned from. Runs that are in out.json already are not done again. Answers need a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import measured
from common import asked, main_of, save, setting
from texts import DOMAINS, UNSEEN, prepare

import sleb
from sleb.calibration.answers import ANSWERS
from sleb.distillation import heal
from sleb.distillation.mix import TEXTS, Material

MIXES = {"texts": (TEXTS,), "answers": (ANSWERS,), "both": (TEXTS, ANSWERS)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("cut")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts and prompts")
    parser.add_argument("--prompts", nargs="*", help="learn from these, in place of FOLDER's")
    parser.add_argument("--mixes", default="both,texts,answers")
    parser.add_argument("--tokens", default="2000000", help="several with commas")
    parser.add_argument("--lr", type=float, help="in place of the one that is found")
    parser.add_argument("--limit", type=int, help="items of each set of answers; 0 for none")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer, at most")
    parser.add_argument("--batch", type=int, default=128, help="answers at a time")
    parser.add_argument("--test-windows", type=int, default=16, help="of each text")
    parser.add_argument("--test-length", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


@contextmanager
def learning_from(mix: str) -> Iterator[None]:
    """Only windows of the kinds of ``mix`` are trained on; all judge."""
    whole = Material.of

    def some(*args: Any) -> Material:
        found = whole(*args)
        return replace(found, train={kind: found.train[kind] for kind in MIXES[mix]})

    Material.of = some  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Material.of = whole  # type: ignore[method-assign]


class Measuring:
    """Perplexity and right answers of models, each beside the dense one's."""

    def __init__(self, options: argparse.Namespace, texts: Any) -> None:
        self.options, self.dense = options, {}
        files = {kind: options.data / f"answers/{kind}_dev.jsonl" for kind in ("code", "math")}
        self.sets = {
            kind: [json.loads(row) for row in file.read_text().splitlines()][: options.limit]
            for kind, file in files.items()
            if options.limit != 0
        }
        model = sleb.load(options.model, device=options.device)
        self.test, _ = sleb.load_windows(
            model.tokenizer,
            [*texts.test.values()],
            windows=options.test_windows * len(texts.test),
            length=options.test_length,
            seed=options.seed,
        )
        self.setting = setting(model.stack.input_device, model.stack.dtype)
        self.base = self.losses(model)
        self.dense = measured(model, self.sets, None, options)

    def losses(self, model: Any) -> dict[str, float]:
        found = sleb.evaluate(model, self.test)
        return {name: quality.loss.value for name, quality in found.domains.items()}

    def of(self, folder: str | Path) -> dict[str, Any]:
        model = sleb.load(folder, device=self.options.device)
        found = {"perplexity": ratios(self.losses(model), self.base)}
        return found | measured(model, self.sets, self.dense, self.options)


def healed(options: argparse.Namespace, texts: Any, mix: str, tokens: int, out: Path) -> Any:
    """One run, and what it took."""
    prompts = options.prompts
    if prompts is None:
        prompts = sorted(str(path) for path in (options.data / "answers").glob("*_fit.jsonl"))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    with learning_from(mix):
        done = heal(
            options.cut,
            options.model,
            out,
            text=[*texts.calibration.values()],
            prompts=prompts,
            tokens=tokens,
            lr=options.lr,
            seed=options.seed,
            device=options.device,
        )
    row = {"mix": mix, "asked": tokens, "tokens": done.tokens, "steps": done.steps}
    row |= {"training_seconds": done.seconds, "seconds": round(time.monotonic() - start, 1)}
    row |= {"lr": done.lr, "rates": done.rates, "checks": done.checks, "passes": done.passes}
    if torch.cuda.is_available():
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        texts = prepare(options.data, Path(place), options.seed)
        measuring = Measuring(options, texts)
        report: dict[str, Any] = {
            "what": asked(options, "out", "model", "cut", "data", "mixes", "tokens", "prompts"),
            "model": Path(options.model).name,
            **measuring.setting,
            "dense": measuring.dense,
            "cut": measuring.of(options.cut),
            "healed": [],
        }
        if options.out.is_file():
            report["healed"] = json.loads(options.out.read_text())["healed"]
        save(options.out, report)
        for tokens in map(int, options.tokens.split(",")):
            for mix in options.mixes.split(","):
                if any((row["mix"], row["asked"]) == (mix, tokens) for row in report["healed"]):
                    continue
                out = Path(place) / f"{mix}-{tokens}"
                row = healed(options, texts, mix, tokens, out) | measuring.of(out)
                report["healed"].append(row)
                save(options.out, report)
                right = {kind: row[kind]["kept"] for kind in measuring.sets}
                print(mix, f"{row['tokens']:,} tokens", row["seconds"], right, row["perplexity"])


def ratios(losses: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Perplexity over the dense model's by text, and geometric means over domains and the rest."""

    def mean(names: tuple[str, ...]) -> float:
        return round(float(np.exp(np.mean([losses[n] - base[n] for n in names]))), 4)

    own = {name: round(float(np.exp(losses[name] - base[name])), 4) for name in losses}
    return {**own, "geo": mean(tuple(DOMAINS)), "unseen_geo": mean(tuple(UNSEEN))}


if __name__ == "__main__":
    main_of(main)
