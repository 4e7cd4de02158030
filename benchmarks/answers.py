"""Right answers of a model and of its cuts: code that passes its unit tests, sums.

    python benchmarks/answers.py MODEL --data FOLDER --removed 3,6 -o out.json
    python benchmarks/answers.py MODEL --data FOLDER --removed 3 --systems default --heal 4 -o OUT
    python benchmarks/answers.py MODEL --data FOLDER --cuts A=FOLDER ... -o out.json

FOLDER holds the texts of texts.py, on whose calibration part cuts are made; prompts that are given
to them, ``answers/*_fit.jsonl``; and others of the same kinds that are asked in the end,
``answers/code_dev.jsonl`` (``prompt``, ``tests``) and ``math_dev.jsonl`` (``prompt``, ``answer``).
Perplexity is over the dense model's, on all test texts; ``divergence`` from it, nats/token, on what
it answered, in the run that measured it. Rows that are in out.json already are not
made again, only timed: speeds are of one run. The code that a model writes is run: see
`sleb eval --run-code`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import asked, main_of, measure, save, setting
from merging import merging
from texts import Texts, prepare

import sleb
from sleb.calibration.answers import answer_windows
from sleb.calibration.prompts import read_prompts
from sleb.core.errors import SlebError
from sleb.core.progress import silent
from sleb.core.statistics import flips, proportion
from sleb.distillation.loss import SplitModel, Validation
from sleb.evaluation.grading import are_right, gradable
from sleb.models.load import LoadedModel
from sleb.repairs.answering import answered, prompt_ids

SYSTEMS: dict[str, dict[str, Any]] = {
    "cosine": {"metric": "cosine", "repair": False},
    "sleb": {"exact": True, "strategy": "greedy", "repair": False},
    "window": {"strategy": "window", "repair": False},
    "texts alone": {"prompts": ("none",)},
    "default": {},
    "answers": {"metric": "answers", "strategy": "greedy-or-window"},
    "merged": {},
}
"""Options of `sleb prune`. "texts alone" is as it was before there were prompts; "merged" is the
default with the repair of merging.py."""
HEALING = (
    "tokens",
    "steps",
    "best_step",
    "lr",
    "rates",
    "trials",
    "checks",
    "passes",
    "seconds",
    "compiled",
    "tokens_per_second",
    "teraflops",
    "product_teraflops",
)
"""What is told of a healing, from heal.json."""
AT_ONCE = 8192
"""Tokens of the dense model's answers in a pass."""
PROMPT = (16, 512)
"""Windows and tokens of the pass that is timed."""


class Measure:
    """Right answers, loss on texts and speed of one model after the other; the first is dense."""

    def __init__(self, options: argparse.Namespace, texts: Texts) -> None:
        self.options, self.texts = options, texts
        self.prompts = {
            kind: read_prompts(options.data / f"answers/{kind}_dev.jsonl")[: options.limit]
            for kind in ("code", "math")
        }
        self.dense: dict[str, Any] = {}
        self.said: dict[str, Validation] = {}
        """What the dense model answered, where it was measured in this run."""

    def of(self, model: LoadedModel) -> dict[str, Any]:
        """What is measured of a model: by kind of prompt, by text, and of a pass."""
        found: dict[str, Any] = {"ms": self.milliseconds(model)}
        for kind, prompts in self.prompts.items():
            ids = prompt_ids(model, prompts, self.options.new)
            tokens = answered(model, ids, self.options.new, silent)
            said = model.tokenizer.batch_decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            good = are_right([p.expected for p in prompts], said, gradable(run_code=True))
            row: dict[str, Any] = {"right": asdict(proportion(sum(good), len(good)))}
            row["items"] = "".join(str(int(g)) for g in good)
            if self.dense:
                before = [item == "1" for item in self.dense[kind]["items"]]
                change = flips(before, good)
                row |= {"lost": change.lost, "won": change.won}
                row["kept"] = round(sum(good) / max(1, sum(before)), 4)
            else:
                windows = answer_windows(ids, tokens, specs=[kind], seed=0)
                self.said[kind] = Validation(SplitModel(model.model), windows, AT_ONCE)
            if kind in self.said:
                kl = self.said[kind](SplitModel(model.model))[:, 2]
                row["divergence"] = round(float(kl.mean()), 4)
            found[kind] = row
        found["loss"] = self._losses(model)
        if self.dense:
            above = {name: found["loss"][name] - self.dense["loss"][name] for name in found["loss"]}
            found["perplexity_ratio"] = round(exp(mean(above.values())), 4)
            found["speedup"] = round(self.dense["ms"] / found["ms"], 3)
        self.dense = self.dense or found
        return found

    def _losses(self, model: LoadedModel) -> dict[str, float]:
        """Nats/token on every test text."""
        specs = [*self.texts.test.values()]
        n, length = self.options.test_windows, self.options.length
        windows, _ = sleb.load_windows(
            model.tokenizer, specs, windows=n * len(specs), length=length, seed=0
        )
        domains = sleb.evaluate(model, windows).domains
        return {name: quality.loss.value for name, quality in domains.items()}

    @torch.inference_mode()
    def milliseconds(self, model: LoadedModel) -> float:
        """Of reading a batch of prompts."""
        device = model.stack.input_device
        ids = torch.zeros(PROMPT, dtype=torch.long, device=device)
        network: Any = model.model

        def read() -> None:
            network(input_ids=ids, use_cache=False, logits_to_keep=1)

        return round(1000 * min(measure(device, read)[1] for _ in range(8)), 2)


def options_of(parser: argparse.ArgumentParser) -> None:
    """Options of a benchmark that makes cuts and counts right answers: on what, and by what."""
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of prompts and texts")
    parser.add_argument("--windows", type=int, default=64, help="that cuts are calibrated on")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--test-windows", type=int, default=12, help="of each text")
    parser.add_argument("--limit", type=int, help="items of each set")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)


def prompts_given(data: Path) -> tuple[str, ...]:
    """Files of prompts that cuts are made with."""
    return tuple(sorted(map(str, (data / "answers").glob("*_fit.jsonl"))))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options_of(parser)
    parser.add_argument("--cuts", nargs="*", default=[], help="NAME=FOLDER of cuts that are there")
    parser.add_argument("--removed", default="", help="cut so many blocks, in every system")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--heal", type=float, help="heal all but plain cuts, for so many minutes")
    return parser.parse_args()


class Bench:
    """The report, to which rows are added; those of an earlier run stay."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place = options, place
        texts = prepare(options.data, place, 0)
        self.measured = Measure(options, texts)
        self.given: dict[str, Any] = {
            "text": tuple(texts.calibration.values()),
            "prompts": prompts_given(options.data),
            "device": options.device,
        }
        self.searched = {"windows": options.windows, "length": options.length}
        self.model = sleb.load(options.model, device=options.device)
        self.orders: dict[tuple[str, int], tuple[int, ...]] = {}
        if options.out.is_file():
            self.report: dict[str, Any] = json.loads(options.out.read_text())
            self.measured.dense = self.report["dense"]
            self.time_again()
            return
        self.report = {
            "model": Path(options.model).name,
            "blocks": len(self.model.stack),
            **setting(self.model.stack.input_device, self.model.stack.dtype),
            "what": asked(options, "model", "data", "cuts", "out"),
            "dense": self.measured.of(self.model),
            "cuts": [],
        }
        save(options.out, self.report)

    def time_again(self) -> None:
        """The dense model and every cut, which takes as long as the original without the blocks."""
        dense = self.report["dense"]
        for row in (dense, *self.report["cuts"]):
            with self.model.stack.bypassed(row.get("removed", ())):
                row["ms"] = self.measured.milliseconds(self.model)
            if row is not dense:
                row["speedup"] = round(dense["ms"] / row["ms"], 3)
        self.report |= setting(self.model.stack.input_device, self.model.stack.dtype)
        save(self.options.out, self.report)

    def has(self, system: str, depth: int) -> bool:
        """Whether a row is there."""
        rows = self.report["cuts"]
        return any((row["system"], len(row.get("removed", ()))) == (system, depth) for row in rows)

    def add(self, system: str, cut: LoadedModel, **more: Any) -> None:
        """Measure a cut."""
        row = {"system": system, **more, **self.measured.of(cut)}
        self.report["cuts"].append(row)
        save(self.options.out, self.report)
        kept = {kind: row[kind]["kept"] for kind in self.measured.prompts}
        said = {key: row[key] for key in ("system", "perplexity_ratio", "speedup")}
        print(json.dumps({**said, **kept, **more}), flush=True)

    def load(self, folder: str | Path) -> LoadedModel:
        return sleb.load(folder, device=self.options.device)

    def plain(self, name: str, depth: int, deepest: int) -> None:
        """A cut without a repair: the blocks are bypassed, which is the cut to the bit."""
        start = time.perf_counter()
        removed = tuple(sorted(self.order(name, depth, deepest)[:depth]))
        seconds = round(time.perf_counter() - start, 1)
        with self.model.stack.bypassed(removed):
            self.add(name, self.model, removed=removed, seconds=seconds)

    def order(self, name: str, depth: int, deepest: int) -> tuple[int, ...]:
        """In which a plain system removes blocks. But for a window, where each depth has its own,
        one search serves all."""
        asked_for = {key: value for key, value in SYSTEMS[name].items() if key != "repair"}
        key = name, depth if asked_for.get("strategy") == "window" else deepest
        if key not in self.orders:
            text = {key: self.given[key] for key in ("text", "device")}
            found = sleb.search(
                self.model.source.path, remove=key[1], **self.searched, **text, **asked_for
            )
            self.orders[key] = found.order
        return self.orders[key]

    def pruned(self, name: str, depth: int) -> None:
        """What `sleb prune` leaves."""
        out, start = self.place / f"{name}-{depth}", time.perf_counter()
        asked_for = {**self.searched, **self.given, "keep": False, "run_code": True}
        asked_for |= {"remove": depth, **SYSTEMS[name]}
        with merging() if name == "merged" else nullcontext():
            done = sleb.prune(self.model.source.path, out, **asked_for)
        more: dict[str, Any] = {"removed": done.plan.removed}
        more["seconds"] = round(time.perf_counter() - start, 1)
        more["phases"] = done.record.seconds
        if finals := done.plan.final_comparison:
            more["compared"] = [f.model_dump(mode="json") for f in finals.sets]
        self.add(name, self.load(out), **more)
        if self.options.heal:
            self.healed(name, depth, done.plan.removed)

    def healed(self, name: str, depth: int, removed: tuple[int, ...]) -> None:
        """The same, healed."""
        cut, out = self.place / f"{name}-{depth}", self.place / f"healed {name}-{depth}"
        start, system = time.perf_counter(), f"{name}, healed"
        try:
            how = {"minutes": self.options.heal, **self.given}
            done = sleb.heal(cut, self.model.source.path, out, **how)
        except SlebError as error:  # the other rows are worth having
            self.report["cuts"].append({"system": system, "error": str(error)})
            return
        seconds = round(time.perf_counter() - start, 1)
        ran = json.loads((out / "heal.json").read_text())
        told: dict[str, Any] = {"healing": {key: ran[key] for key in HEALING}}
        told["phases"] = done.record.seconds
        self.add(system, self.load(out), removed=removed, seconds=seconds, **told)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place))
        for cut in options.cuts:
            name, folder = cut.split("=", 1)
            bench.add(name, bench.load(folder))
        depths = [int(n) for n in options.removed.split(",") if n]
        for name in options.systems.split(","):
            for depth in depths:
                if bench.has(name, depth):
                    continue
                if SYSTEMS[name].get("repair") is False:
                    bench.plain(name, depth, max(depths))
                else:
                    bench.pruned(name, depth)


if __name__ == "__main__":
    main_of(main)
