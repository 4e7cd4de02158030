"""Other ways to choose blocks, and merging instead of removing: what a cut costs, before a repair
and after a quick one.

    python benchmarks/choices.py MODEL --data FOLDER --remove 3,6 -o out.json

FOLDER is laid out as texts.py and answers.py say. Blocks are chosen on the texts, the model's
answers to ``answers/*_fit.jsonl``, both, or those tokens of answers that the model is decided
about; costs are on other windows and other answers: the increase of the loss in nats/token, and the
share of answers' tokens that stay the likeliest. Models whose blocks are not those of Llama are not
merged.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import prompts_given
from common import asked, main_of, measure, save, setting
from merging import Merging
from texts import prepare
from torch import Tensor

import sleb
from sleb.calibration.split import CalibrationSplit
from sleb.calibration.windows import Windows
from sleb.config import PruneConfig
from sleb.core.progress import silent
from sleb.models.load import LoadedModel
from sleb.repairs import given_tokens
from sleb.repairs.answering import with_answers
from sleb.repairs.regression import gaps
from sleb.repairs.scoring import RIDGE, RepairedScores
from sleb.selection.metrics import MISSED, NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.resources import default_batch
from sleb.selection.sweep import Sweep


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--remove", default="3,6")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--fitted", type=int, default=100_000, help="tokens of a quick repair")
    parser.add_argument("--max-prompts", type=int, help="to answer")
    parser.add_argument("--new-tokens", type=int, help="of an answer, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


DECIDED = 0.9
"""A token is decided where the likeliest one has this probability."""


@torch.inference_mode()
def decided(model: LoadedModel, ids: Tensor) -> Tensor:
    """Which of ids [N, T] the model is decided about before it reads them."""
    network: Any = model.model
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for row, kept in zip(ids, found, strict=True):
        given = row[None].to(model.stack.input_device)
        logits = network(input_ids=given, use_cache=False).logits[0, :-1]
        kept[1:] = logits.float().softmax(-1).amax(-1).cpu() >= DECIDED
    return found


class Study:
    """One model with its windows. ``chosen_on``: by name what sets are chosen on."""

    def __init__(self, model: LoadedModel, options: argparse.Namespace, specs: Sequence[str]):
        self.model, self.stack = model, model.stack
        given = {"max_prompts": options.max_prompts, "new_tokens": options.new_tokens}
        config = PruneConfig(
            text=tuple(specs), prompts=prompts_given(options.data), remove=1, **given
        )
        split = CalibrationSplit.of(
            model.tokenizer,
            tuple(specs),
            windows=options.windows,
            length=options.length,
            seed=0,
            heldout=32,
            loss_on="all",
        ).with_repair(given_tokens(model.stack, None))
        self.split = with_answers(model, split, config, silent)
        assert self.split.answers
        assert self.split.heldout
        answers = self.split.answers.search
        self.chosen_on = {"texts": self.split.search, "answers": answers}
        assert answers.scored is not None
        sure = answers.scored & decided(model, answers.ids)
        self.chosen_on["decided"] = replace(answers, scored=sure)
        self.measured = {
            "texts": self.split.heldout,
            "answers": self.split.answers.measured.windows,
        }
        self.fit = self.split.candidate_fit(options.fitted)
        self.dense: dict[str, float] = {}
        self.known: dict[tuple[str, BlockSet], float] = {}

    def sweep(self, windows: Windows, metric: Any = NLL) -> Sweep:
        return Sweep(self.stack, windows.ids, metric, scored=windows.scored)

    def increases(self, sets: Sequence[BlockSet], name: str) -> Any:
        """Of the loss on what sets are chosen on; "both" is the sum."""
        if name == "both":
            return self.increases(sets, "texts") + self.increases(sets, "answers")
        windows, wanted = self.chosen_on[name], [DENSE, *sets]
        if new := [s for s in wanted if (name, s) not in self.known]:
            found = self.sweep(windows).values(new, 0, len(windows.ids)).mean(1)
            self.known |= {(name, s): loss for s, loss in zip(new, found, strict=True)}
        losses = np.array([self.known[name, s] for s in wanted])
        return losses[1:] - losses[0]

    def costs(self, blocks: BlockSet, *, repaired: bool) -> dict[str, float]:
        """Of one set, where it was not chosen."""
        found: dict[str, float] = {}
        for name, windows in self.measured.items():
            for metric in (NLL, MISSED) if name == "answers" else (NLL,):
                sweep, n = self.sweep(windows, metric), len(windows.ids)
                fitted = RepairedScores(sweep, self.fit.ids, self.fit.scored)
                scores = (fitted if repaired else sweep).values([blocks], 0, n)
                key = "missed" if metric is MISSED else name
                if key not in self.dense:  # before weights are changed
                    self.dense[key] = float(sweep.values([DENSE], 0, n).mean())
                found[key] = round(float(scores.mean()) - self.dense[key], 4)
        return found


def greedy(study: Study, n: int, name: str) -> BlockSet:
    chosen = DENSE
    while len(chosen) < n:
        sets = [chosen | {b} for b in range(len(study.stack)) if b not in chosen]
        chosen = sets[int(study.increases(sets, name).argmin())]
    return chosen


def window(study: Study, n: int, name: str) -> BlockSet:
    sets = [BlockSet(range(i, i + n)) for i in range(1, len(study.stack) - n)]
    return sets[int(study.increases(sets, name).argmin())]


def late(study: Study, n: int, name: str) -> BlockSet:
    """All but the last of the last."""
    return BlockSet(range(len(study.stack) - 1 - n, len(study.stack) - 1))


def pairs(study: Study, n: int, name: str) -> BlockSet:
    """The set that a quadratic form finds best which is exact for one and for two blocks."""
    blocks = range(len(study.stack))
    both = [BlockSet(pair) for pair in combinations(blocks, 2)]
    one = study.increases([BlockSet({b}) for b in blocks], name)
    form = np.diag(one)
    for pair, value in zip(both, study.increases(both, name), strict=True):
        a, b = sorted(pair)
        form[a, b] = value - one[a] - one[b]
    return lowest(form, n)


def gates(study: Study, n: int, name: str) -> BlockSet:
    """The same of one backward pass (as CBO, 2602.00161): first order by the gradient of a gate on
    each block, second order by the products of these of all windows (Gauss-Newton)."""
    parts = ["texts", "answers"] if name == "both" else [name]
    form: Any = 0.0
    for part in parts:
        slopes = np.concatenate([*_slopes(study, study.chosen_on[part])])
        second = slopes.T @ slopes / len(slopes)
        form = form + np.triu(second, 1) + np.diag(np.diag(second) / 2 - slopes.mean(0))
    return lowest(form, n)


def _slopes(study: Study, windows: Windows) -> Iterator[Any]:
    """By batch, the derivatives of each window's mean loss by a gate on each block."""
    stack, network = study.stack, study.model.model
    network.requires_grad_(False)
    for start in range(0, len(windows.ids), 4):
        ids = windows.ids[start : start + 4].to(stack.input_device)
        gate = torch.ones(len(stack), len(ids), 1, 1, device=ids.device, requires_grad=True)

        def gated(i: int, gate: Tensor = gate) -> Callable[..., Any]:
            def hook(_: Any, args: Any, output: Any) -> Any:
                out = output if isinstance(output, Tensor) else output[0]
                new = args[0] + gate[i].to(out.dtype) * (out - args[0])
                return new if isinstance(output, Tensor) else (new, *output[1:])

            return hook

        handles = [b.register_forward_hook(gated(i)) for i, b in enumerate(stack.blocks)]
        logits = network(input_ids=ids, use_cache=False).logits[:, :-1].float()
        for handle in handles:
            handle.remove()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        scored = torch.ones_like(losses)
        if windows.scored is not None:
            scored = windows.scored[start : start + 4, 1:].to(losses)
        ((losses * scored).sum(1) / scored.sum(1)).sum().backward()  # type: ignore[no-untyped-call]
        assert gate.grad is not None
        yield gate.grad[..., 0, 0].T.double().cpu().numpy()


def lowest(form: Any, n: int) -> BlockSet:
    """The set of n indices with the least sum of the entries of an upper triangular form. The first
    and the last block are in none."""
    sets = np.array([*combinations(range(1, len(form) - 1), n)])
    total = sum(form[sets[:, a], sets[:, b]] for a in range(n) for b in range(a, n))
    return BlockSet(map(int, sets[int(np.argmin(total))]))


CHOICES: dict[str, Callable[[Study, int, str], BlockSet]] = {
    "greedy": greedy,
    "window": window,
    "late": late,
    "pairs": pairs,
    "gates": gates,
}
ON = {"late": ("texts",)} | dict.fromkeys(
    ("greedy", "window"), ("texts", "answers", "both", "decided")
)
"""What the ways choose on, if not on texts, answers and both."""


def merged(study: Study, blocks: BlockSet) -> dict[str, float]:
    """What a set costs where the blocks before its gaps take in channels of what is gone."""
    stack, fit = study.stack, study.fit
    fitter = Merging(
        stack, blocks, fit.ids, default_batch(stack, fit.ids.shape[1]), scored=fit.scored
    )
    try:
        for gap in gaps(blocks, len(stack)):
            fitter.fit(gap, (RIDGE,))
        return study.costs(blocks, repaired=False)
    finally:
        fitter.restore()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        texts = prepare(options.data, Path(place), 0)
        model = sleb.load(options.model, device=options.device)
        study = Study(model, options, [*texts.calibration.values()])
        where = setting(model.stack.input_device, model.stack.dtype)
        what = asked(options, "model", "data", "out")
        report: dict[str, Any] = {"model": Path(options.model).name, **where, "what": what}
        report["rows"] = []

        def add(row: dict[str, Any]) -> None:
            report["rows"].append(row)
            save(options.out, report)
            print(row, flush=True)

        for n in map(int, options.remove.split(",")):
            known: dict[BlockSet, dict[str, Any]] = {}
            for way, choose in CHOICES.items():
                for name in ON.get(way, ("texts", "answers", "both")):
                    blocks, seconds, _ = measure(
                        model.stack.input_device,
                        lambda: choose(study, n, name),  # noqa: B023
                    )
                    if blocks not in known:
                        known[blocks] = {
                            "plain": study.costs(blocks, repaired=False),
                            "repaired": study.costs(blocks, repaired=True),
                        }
                    row = {"removed": n, "way": way, "on": name, "blocks": sorted(blocks)}
                    add({**row, "seconds": round(seconds, 1), **known[blocks]})
            if hasattr(model.stack.blocks[0], "post_attention_layernorm"):
                blocks = min(known, key=lambda s: known[s]["repaired"]["texts"])
                cost = merged(study, blocks)
                add({"removed": n, "way": "merged", "blocks": sorted(blocks), "repaired": cost})


if __name__ == "__main__":
    main_of(main)
