"""What a search costs on many GPUs, predicted: the page docs/scale.md.

    python benchmarks/scale.py > docs/scale.md

sleb's own race is run on losses drawn from the spread seen on a real model (``race_model.py``),
without a model; its calls are counted, dealt out to ranks as a sweep does, and priced by measured
and assumed rates. Nothing here is run on a cluster.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS
from pages import fetched, merged, page
from race_model import SPREAD, Losses, Spread, exact_work
from shapes import Shape

from sleb.selection.objective import BlockSet, Call, Objective, Scorer
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import BUNDLES, block_forwards

WINDOWS, LENGTH = 128, 2048
SEEDS = 4
PERFORMANCE = sorted(RESULTS.glob("performance-*.json"))


@functools.lru_cache(maxsize=100_000)
def _forwards(sets: tuple[BlockSet, ...], blocks: int) -> int:
    """As the sweep's; the calls of a step are of the same sets."""
    return block_forwards(sets, blocks)


@functools.lru_cache(maxsize=100_000)
def _split(sets: tuple[BlockSet, ...], ranks: int, blocks: int) -> tuple[int, int]:
    """Block forwards and heads of the busiest of ``ranks`` that share one call."""
    size = math.ceil(len(sets) / BUNDLES)
    bundles = [sets[a : a + size] for a in range(0, len(sets), size)]
    loads: list[tuple[BlockSet, ...]] = [()] * max(1, min(ranks, len(bundles)))
    for bundle in sorted(bundles, key=lambda b: -_forwards(b, blocks)):
        least = min(range(len(loads)), key=lambda i: _forwards(loads[i], blocks))
        loads[least] += bundle
    return max(_forwards(x, blocks) for x in loads), max(map(len, loads))


@dataclass(frozen=True, kw_only=True)
class Model:
    """``active`` parameters of a block work on a token, ``held`` are in memory."""

    name: str
    blocks: int
    width: int
    active: float
    held: float
    attention: int  # heads times their size
    vocab: int

    @classmethod
    def of(cls, name: str, shape: Shape) -> Model:
        block = shape.block_parameters
        known = {"blocks": shape.blocks, "width": shape.width, "vocab": shape.vocab}
        return cls(name=name, active=block, held=block, attention=shape.width, **known)

    @property
    def bytes(self) -> float:
        return 2 * (self.blocks * self.held + 2 * self.width * self.vocab)

    def flops(self, forwards: float, heads: float) -> float:
        """Of so many block forwards and heads, of windows of LENGTH tokens."""
        block = 2 * self.active * LENGTH + 2 * LENGTH * (LENGTH + 1) * self.attention
        return forwards * block + heads * 2.0 * self.width * self.vocab * LENGTH


LLAMA_70B = Shape(width=8192, inner=28672, blocks=80, heads=64, kv_heads=8, vocab=128256)
LLAMA_405B = Shape(width=16384, inner=53248, blocks=126, heads=128, kv_heads=8, vocab=128256)
MODELS = (
    Model.of("70B", LLAMA_70B),
    Model.of("405B", LLAMA_405B),
    # 61 blocks of 256 experts of which 8 work on a token, and one that always does
    Model(
        name="600B MoE",
        blocks=61,
        width=7168,
        active=0.58e9,
        held=10.7e9,
        attention=16384,
        vocab=129280,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """TFLOP/s of a sweep on one GPU; GB/s of fetching streamed blocks, of all-reduce between GPUs
    of a machine and of several; seconds that the ranks take to meet; GB of a GPU. ``source`` says
    of each whether it was measured."""

    tflops: float
    fetch: float
    source: dict[str, str]
    link: float = 300.0
    network: float = 40.0
    meet: float = 0.05
    memory: float = 72.0


def rates(performance: Sequence[Path]) -> Rates:
    """From results of ``performance.py``, and assumptions."""
    reports = [json.loads(path.read_text()) for path in performance]
    sections = merged(reports)
    return Rates(
        tflops=round(sections["7b.search"]["tflops"], 1),
        fetch=round(fetched(sections["70b.stream"], "from_page_cache"), 2),
        source={
            **dict.fromkeys(("link", "network", "meet"), "assumed"),
            "memory": "80 GB, less what a process needs beside the model: assumed",
            "tflops": f"measured, 7B search, {reports[0]['about']['machine']}",
            "fetch": "measured, 70B shape from the page cache",
        },
    )


class Simulated:
    """A race's calls, step by step, for a model of so many blocks."""

    def __init__(self, blocks: int, remove: int, windows: int, batch: int, losses: Losses) -> None:
        self.blocks, self.remove = blocks, remove
        self.steps: list[list[Call]] = []

        def distribute(calls: Sequence[Call]) -> Any:
            if calls:
                self.steps.append(list(calls))
            return ((call, losses(*call)) for call in calls)

        scorer = Scorer(
            values=losses,
            step=lambda sets: batch,
            fill=lambda sets: max(1, batch // sets),
            distribute=distribute,
        )
        objective = Objective(scorer, windows, exact=False)
        STRATEGIES["greedy"](objective, range(1, blocks - 1), remove)
        self.forwards, self.heads = map(sum, zip(*map(self._cost, self._calls()), strict=True))
        self.calls, self.left, self.formula = len(self.steps), self._left(), self._by_formula()

    def _calls(self) -> list[Call]:
        return [call for step in self.steps for call in step]

    def _cost(self, call: Call) -> tuple[int, int]:
        """Block forwards and heads."""
        sets, start, stop = call
        return (stop - start) * _forwards(tuple(sets), self.blocks), (stop - start) * len(sets)

    def _left(self) -> dict[int, float]:
        """Candidates scored on the window with this number, a mean over rounds."""
        seen: dict[int, int] = defaultdict(int)
        for sets, start, stop in self._calls():
            for window in range(start, stop):
                seen[window] += sum(1 for s in sets if s)
        return {w: seen[w] / self.remove for w in sorted(seen)}

    def _by_formula(self) -> float:
        """Block forwards by the cost model: a window takes one walk of all live blocks, and half a
        walk more for each candidate that is left."""
        total = 0.0
        for sets, start, stop in self._calls():
            live = self.blocks - min((len(s) for s in sets if s), default=0)
            candidates = sum(1 for s in sets if s)
            total += (stop - start) * live * (1 + (candidates - 1) / 2)
        return total

    def busiest(self, replicas: int) -> tuple[float, float]:
        """Block forwards, and heads, of the busiest of so many replicas; steps wait for it. Calls
        go whole to replicas, and those of the last turn are split by bundles, as a sweep does."""
        forwards = heads = 0.0
        for step in self.steps:
            whole = len(step) - len(step) % replicas
            turns = [
                [self._cost(call) for call in step[turn : turn + replicas]]
                for turn in range(0, whole, replicas)
            ]
            if rest := step[whole:]:
                split = [
                    (stop - start, _split(tuple(sets), replicas // len(rest), self.blocks))
                    for sets, start, stop in rest
                ]
                turns.append([(f * n, h * n) for n, (f, h) in split])
            for costs in turns:
                forwards += max(cost[0] for cost in costs)
                heads += max(cost[1] for cost in costs)
        return forwards, heads


def simulated(blocks: int, remove: int, windows: int, length: int, batch: int, seeds: int) -> Any:
    """Races that differ by the seed of their losses."""
    spread = Spread.read(SPREAD, length)
    return [
        Simulated(blocks, remove, windows, batch, Losses(spread, blocks, windows, seed=seed))
        for seed in range(seeds)
    ]


def predict(model: Model, gpus: int, remove: int, races: Sequence[Simulated], r: Rates) -> Any:
    """Seconds of a search: models that fit are held by groups of GPUs, the smallest that can; where
    all GPUs together cannot, each streams the blocks from its machine's memory."""
    tp = 1
    while model.bytes / tp > (r.memory - 8) * 1e9:
        tp *= 2
    streamed = tp > gpus
    replicas = gpus if streamed else gpus // tp
    found = []
    for race in races:
        forwards, heads = race.busiest(replicas)
        flops = model.flops(forwards, heads)
        seconds = {"compute": flops / (1 if streamed else tp) / r.tflops / 1e12}
        if streamed:
            # all GPUs of a machine share what it can fetch; a step takes one walk of each
            walk = 2 * model.blocks * model.held / (r.fetch * 1e9) * min(8, gpus)
            seconds["fetch"] = len(race.steps) * walk
        elif tp > 1:
            rate = r.link if tp <= 8 else r.network
            moved = 2 * 2 * (tp - 1) / tp * LENGTH * model.width * 2
            seconds["between GPUs"] = forwards * moved / (rate * 1e9)
        seconds["meeting"] = len(race.steps) * r.meet if replicas > 1 else 0.0
        total = sum(seconds.values())
        if streamed:  # the next block is fetched while this one computes
            total -= min(seconds["compute"], seconds["fetch"])
        found.append({**seconds, "total": total})
    return {
        "model": model.name,
        "gb": round(model.bytes / 1e9),
        "gpus": gpus,
        "group": 1 if streamed else tp,
        "streamed": streamed,
        "replicas": replicas,
        "removed": remove,
        "seconds": {k: round(_mean(f[k] for f in found), 1) for k in found[0]},
        "busy": _mean(race.forwards / race.busiest(replicas)[0] for race in races) / replicas,
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def check() -> Iterator[dict[str, Any]]:
    """Block forwards of measured races, against those simulated at the same sizes."""
    cpu = json.loads((RESULTS / "race-cpu-16x256.json").read_text())
    gpu = json.loads((RESULTS / "performance-h200-real.json").read_text())
    racing = next(s for s in cpu["systems"] if s["system"] == "racing")
    asked = {**cpu["what"], "removed": cpu["what"]["remove"], "blocks": cpu["blocks"]}
    for name, batch, row in (  # ``batch`` windows go through a block at once
        ("race-cpu-16x256.json", 4, asked | racing),
        ("performance-h200-real.json", 242, gpu["sections"]["real"]["searches"]["racing"]),
    ):
        size = (row[key] for key in ("blocks", "removed", "windows", "length"))
        yield {"result": name, **row, "races": simulated(*size, batch, SEEDS)}


def figures(performance: Sequence[Path], seeds: int, gpus: Sequence[int]) -> dict[str, Any]:
    """All that the page shows."""
    r = rates(performance)
    models, predictions = [], []
    for model in MODELS:
        remove = math.ceil(0.1 * model.blocks)
        races = simulated(model.blocks, remove, WINDOWS, LENGTH, 1, seeds)
        exact = sum(forwards for forwards, _ in exact_work(model.blocks, remove))
        row = {"model": model.name, "blocks": model.blocks, "removed": remove, "races": races}
        models.append(row | {"exact_block_forwards": WINDOWS * exact})
        predictions += [predict(model, n, remove, races, r) for n in gpus]
    shown = {"looked_at": (1, 5, 9, 17, 33, 65, 128), "rates": r, "seeds": seeds}
    return shown | {"check": [*check()], "models": models, "predictions": predictions}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--performance", type=Path, nargs="+", default=PERFORMANCE)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    options = parser.parse_args()
    found = figures(options.performance, options.seeds, options.gpus)
    constants = {"windows": WINDOWS, "length": LENGTH, "seeds_check": SEEDS}
    print(page("scale.md.j2", mean=_mean, **constants, **found), end="")


if __name__ == "__main__":
    main()
