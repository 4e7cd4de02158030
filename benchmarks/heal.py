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

import torch
from answers import Measure, prompts_given
from common import asked, main_of, save, setting
from texts import prepare

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
    parser.add_argument("--limit", type=int, help="items of each set of answers")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer, at most")
    parser.add_argument("--test-windows", type=int, default=16, help="of each text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
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


def healed(options: argparse.Namespace, texts: Any, mix: str, tokens: int, out: Path) -> Any:
    """One run, and what it took."""
    prompts = options.prompts
    if prompts is None:
        prompts = prompts_given(options.data)
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
    speeds = ("tokens_per_second", "teraflops", "product_teraflops")
    row |= {name: getattr(done, name) for name in speeds}
    row |= {"lr": done.lr, "rates": done.rates, "checks": done.checks, "passes": done.passes}
    if torch.cuda.is_available():
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        texts = prepare(options.data, Path(place), options.seed)
        measure = Measure(options, texts)

        def measured(folder: str | Path) -> dict[str, Any]:
            return measure.of(sleb.load(folder, device=options.device))

        dense = sleb.load(options.model, device=options.device)
        where = setting(dense.stack.input_device, dense.stack.dtype)
        measure.of(dense)
        del dense
        report: dict[str, Any] = {
            "what": asked(options, "out", "model", "cut", "data", "mixes", "tokens", "prompts"),
            "model": Path(options.model).name,
            **where,
            "dense": measure.dense,
            "cut": measured(options.cut),
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
                row = healed(options, texts, mix, tokens, out) | measured(out)
                report["healed"].append(row)
                save(options.out, report)
                right = {kind: row[kind]["kept"] for kind in measure.prompts}
                print(mix, f"{row['tokens']:,} tokens", right, row["perplexity_ratio"], flush=True)


if __name__ == "__main__":
    main_of(main)
