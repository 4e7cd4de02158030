"""What can be kept of the answers, and at what cost on texts, by which blocks are removed.

    python benchmarks/answer_frontier.py MODEL --data FOLDER --removed 3,6 -o out.json

Every run of neighbours, and what greedy finds by the loss on texts and on answers, is repaired
quickly and scored on both; the sets that look best are repaired in full, on texts, on the model's
own text and on its answers to ``answers/*_fit.jsonl``, and measured: agreement on held-out answers,
right answers to ``answers/*_dev.jsonl``, perplexity on all test texts of texts.py. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from answers import measured
from common import main_of, save, setting
from texts import prepare

import sleb
from sleb.calibration.answers import ANSWERS
from sleb.calibration.split import CalibrationSplit
from sleb.config import PromptOptions, SearchConfig
from sleb.core.progress import silent
from sleb.evaluation.agreement import agreement_of
from sleb.evaluation.perplexity import evaluate
from sleb.repairs import given_tokens, repair
from sleb.repairs.answering import with_answers
from sleb.repairs.scoring import RepairedScores
from sleb.repairs.search import search
from sleb.repairs.self_generated import writer
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import Sweep

QUICK = 16_384
"""Tokens that a quick repair is fitted on."""


class Frontier:
    """One model with its split, the sets that were scored, and the report that grows."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options = options
        self.model = model = sleb.load(options.model)
        texts = prepare(options.data, place, 0)
        windows, length = options.windows, options.length
        split = CalibrationSplit.of(
            model.tokenizer, [*texts.calibration.values()], windows=windows, length=length, seed=0
        )
        split = split.with_repair(given_tokens(model.stack))
        files = sorted(str(path) for path in (options.data / "answers").glob("*_fit.jsonl"))
        split = with_answers(model, split, PromptOptions(prompts=tuple(files)), silent)
        self.split = split.with_self_generated(writer(model, silent), compare=True)
        self.test = {
            name: sleb.load_windows(model.tokenizer, (spec,), windows=12, length=length, seed=0)[0]
            for name, spec in texts.test.items()
        }
        self.sets = {
            kind: [
                json.loads(row)
                for row in (options.data / f"answers/{kind}_dev.jsonl").read_text().splitlines()
            ][: options.limit]
            for kind in ("code", "math")
        }
        self.dense = measured(model, self.sets, None, options)
        self.report: dict[str, Any] = {
            "model": Path(options.model).name,
            **setting(model.stack.input_device, model.stack.dtype),
            "fitted": self.split.repair_fit.tokens,
            "dense": self.dense,
            "quick": [],
            "cuts": [],
        }

    def candidates(self, n: int) -> dict[str, tuple[int, ...]]:
        """All runs of n neighbours by their first block, and what greedy finds."""
        assert self.split.answers is not None
        last = len(self.model.stack) - 1
        found = {f"run {b}": tuple(range(b, b + n)) for b in range(1, last - n + 1)}
        texts = replace(self.split, answers=None)
        for name, split in {
            "greedy on texts": texts,
            "greedy on answers": replace(texts, search=self.split.answers.search),
        }.items():
            found[name] = search(self.model, SearchConfig(remove=n), split=split).order
        return found

    def quick(self, sets: dict[str, tuple[int, ...]]) -> dict[str, tuple[float, float]]:
        """Increase of the loss on answers and on texts after a quick repair, nats/token."""
        last, fitted = self.split.final_comparison, self.split.candidate_fit(QUICK)
        sweep = Sweep(self.model.stack, last.ids, NLL, scored=last.scored)
        scores = RepairedScores(sweep, fitted.ids, fitted.scored)
        answers = last.of(ANSWERS)
        texts = [i for i in range(len(last.ids)) if i not in set(answers)]
        dense = sweep.values([DENSE], 0, len(last.ids))[0]
        found = {}
        for name, blocks in sets.items():
            rise = scores.values([BlockSet(blocks)], 0, len(last.ids))[0] - dense
            found[name] = float(rise[answers].mean()), float(rise[texts].mean())
        return found

    def measure(self, name: str, blocks: tuple[int, ...]) -> dict[str, Any]:
        """Repair a set in full and measure all."""
        model, split, start = self.model, self.split, time.perf_counter()
        assert split.answers is not None
        fixed = repair(model, blocks, split.repair_fit, split.validation, self_generated=False)
        seconds = time.perf_counter() - start

        def patch() -> Any:
            return fixed.patch(model.stack) if fixed.tensors else nullcontext()

        kept = agreement_of(model, split.answers.measured, blocks, patch).mean(0)
        with patch(), model.stack.bypassed(blocks):
            right = measured(model, self.sets, self.dense, self.options)
        ratios = {}
        for text, windows in self.test.items():
            found = evaluate(model, windows, removed=blocks, patch=patch).perplexity_ratio
            assert found is not None
            ratios[text] = found.value
        ratios["mean"] = float(np.exp(np.mean(np.log([*ratios.values()]))))
        return {
            "set": name,
            "removed": sorted(blocks),
            "agreement": kept[1],
            "divergence": kept[0],
            "until_first": kept[2],
            "perplexity": ratios,
            "repair_seconds": seconds,
            **right,
        }


def chosen(quick: dict[str, tuple[float, float]], most: int) -> list[str]:
    """Sets to repair in full: the best on answers within some loss on texts, for several limits,
    and what greedy found."""
    best = min(texts for _, texts in quick.values())
    found = ["greedy on answers", "greedy on texts"]
    for limit in (0.0, 0.03, 0.06, 0.12, np.inf):
        near = [name for name in quick if quick[name][1] <= best + limit]
        found.append(min(near, key=lambda name: quick[name][0]))
    return [*dict.fromkeys(found)][:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of prompts and texts")
    parser.add_argument("--removed", default="3,6")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=150, help="items of each set")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer, at most")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--most", type=int, default=6, help="sets to repair in full")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        frontier = Frontier(options, Path(place))
        for n in map(int, options.removed.split(",")):
            sets = frontier.candidates(n)
            quick = frontier.quick(sets)
            rows = [{"set": k, "removed": sorted(sets[k]), "answers": a, "texts": b}
                    for k, (a, b) in quick.items()]  # fmt: skip
            frontier.report["quick"] += rows
            for name in chosen(quick, options.most):
                frontier.report["cuts"].append(frontier.measure(name, sets[name]))
                save(options.out, frontier.report)
                print(json.dumps(frontier.report["cuts"][-1])[:400], flush=True)


if __name__ == "__main__":
    main_of(main)
