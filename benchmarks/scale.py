"""What a search costs on clusters: a cost model, a simulation of the race, and predictions.

    python benchmarks/scale.py --performance benchmarks/results/performance-*.json > docs/scale.md

The race is sleb's own (``Objective``, ``Race`` and greedy), on losses drawn from the spread that
``race_model.py`` has measured on SmolLM2. It says how many candidates are left at each look, and so
how much work there is; rates come from measurements, or are assumptions that the page names.
``-o FILE`` writes the figures as JSON as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pages import fetched, merged, scale_page
from perf_core import SHAPES
from race_model import Losses, Spread

from sleb.selection.objective import BlockSet, Call, Objective, Scorer
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import BUNDLES
from sleb.selection.sweep import block_forwards as counted_forwards

RESULTS = Path(__file__).resolve().parent / "results"
SPREAD = RESULTS / "spread-smollm2.json"
WINDOWS, LENGTH = 128, 2048
SEEDS = 4


@functools.lru_cache(maxsize=100_000)
def _forwards(sets: tuple[BlockSet, ...], blocks: int) -> int:
    return counted_forwards(sets, blocks)


def block_forwards(sets: Sequence[BlockSet], blocks: int) -> int:
    """As the sweep's; the calls of a step are of the same sets."""
    return _forwards(tuple(sets), blocks)


@functools.lru_cache(maxsize=100_000)
def _split(sets: tuple[BlockSet, ...], ranks: int, blocks: int) -> tuple[int, int]:
    """Block forwards and heads of the busiest of ``ranks`` that share one call."""
    size = math.ceil(len(sets) / BUNDLES)
    bundles = [sets[a : a + size] for a in range(0, len(sets), size)]
    loads: list[list[BlockSet]] = [[] for _ in range(max(1, min(ranks, len(bundles))))]
    for bundle in sorted(bundles, key=lambda b: -block_forwards(b, blocks)):
        min(loads, key=lambda load: block_forwards(load, blocks)).extend(bundle)
    return max(block_forwards(x, blocks) for x in loads), max(len(x) for x in loads)


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

    @property
    def bytes(self) -> float:
        return 2 * (self.blocks * self.held + 2 * self.width * self.vocab)

    def block_flops(self, tokens: int) -> float:
        return 2 * self.active * tokens + 2 * tokens * (tokens + 1) * self.attention

    def head_flops(self, tokens: int) -> float:
        return 2.0 * self.width * self.vocab * tokens


def dense(name: str, blocks: int, width: int, inner: int, heads: int, kv: int, vocab: int) -> Model:
    block = 2 * width * (width + width // heads * kv) + 3 * width * inner
    return Model(
        name=name,
        blocks=blocks,
        width=width,
        active=block,
        held=block,
        attention=width,
        vocab=vocab,
    )


MODELS = (
    dense("70B", 80, 8192, 28672, 64, 8, 128256),
    dense("405B", 126, 16384, 53248, 128, 8, 128256),
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
    link: float
    network: float
    meet: float
    memory: float
    source: dict[str, str]


def rates(performance: Sequence[Path]) -> Rates:
    """From the results of ``performance.py``, else from earlier measurements and assumptions."""
    reports = [json.loads(path.read_text()) for path in performance]
    reports = [report for report in reports if report["about"]["shape"] == "full"]
    sections = merged(reports)
    source = {
        "link": "assumed",
        "network": "assumed",
        "meet": "assumed",
        "memory": "80 GB, less what a process needs beside the model: assumed",
    }
    search = sections.get("7b.search", {})
    if search.get("tflops"):
        tflops = search["tflops"]
        source["tflops"] = f"measured, 7B search, {reports[0]['about']['machine']}"
    else:
        before = json.loads((RESULTS / "search-h100-7b-shape-128x2048.json").read_text())
        row, shape = before["systems"][0], SHAPES["7b"]
        calls = json.loads((RESULTS / "schedule-128x2048.json").read_text())
        heads = sum(len(sets) * (stop - start) for sets, start, stop in calls)
        flops = row["block_forwards"] * shape.block_flops(LENGTH) + heads * shape.head_flops(LENGTH)
        tflops = flops / row["seconds"] / 1e12
        source["tflops"] = f"measured, 7B search ({before['machine']})"
    streamed = sections.get("70b.stream", {})
    cached = "from_page_cache" in streamed
    fetch = round(fetched(streamed, "from_page_cache"), 2) if cached else 5.0
    source["fetch"] = "measured, 70B shape from the page cache" if cached else "assumed"
    return Rates(
        tflops=round(tflops, 1),
        fetch=fetch,
        link=300.0,
        network=40.0,
        meet=0.05,
        memory=72.0,
        source=source,
    )


class Simulated:
    """A race's calls, step by step, for a model of so many blocks."""

    def __init__(self, blocks: int, remove: int, windows: int, batch: int, losses: Losses) -> None:
        self.blocks, self.remove, self.windows = blocks, remove, windows
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
        found = STRATEGIES["greedy"](objective, range(1, blocks - 1), remove)
        best = sorted(range(1, blocks - 1), key=lambda b: losses.damage[b])[:remove]
        self.order = found.order
        self.as_least_damage = len(set(best) & set(found.order)) / remove

    @property
    def forwards(self) -> int:
        return sum(
            block_forwards(sets, self.blocks) * (b - a)
            for step in self.steps
            for sets, a, b in step
        )

    @property
    def heads(self) -> int:
        return sum(len(sets) * (b - a) for step in self.steps for sets, a, b in step)

    def left(self) -> dict[int, float]:
        """Candidates scored on the window with this number, a mean over rounds."""
        seen: dict[int, int] = defaultdict(int)
        for step in self.steps:
            for sets, a, b in step:
                for window in range(a, b):
                    seen[window] += sum(1 for s in sets if s)
        return {w: seen[w] / self.remove for w in sorted(seen)}

    def by_formula(self) -> float:
        """Block forwards by the cost model: a window takes one walk of all live blocks, and half a
        walk more for each candidate that is left."""
        total = 0.0
        for step in self.steps:
            for sets, a, b in step:
                live = self.blocks - min(len(s) for s in sets if s) if any(sets) else self.blocks
                candidates = sum(1 for s in sets if s)
                total += (b - a) * live * (1 + (candidates - 1) / 2)
        return total

    def busiest(self, replicas: int) -> tuple[float, float]:
        """Block forwards, and heads, of the busiest of so many replicas; steps wait for it. Calls
        go whole to replicas, and those of the last turn are split by bundles, as ``dealing`` does.
        """
        forwards = heads = 0.0
        for step in self.steps:
            costs = [
                (block_forwards(s, self.blocks) * (b - a), len(s) * (b - a)) for s, a, b in step
            ]
            whole = len(costs) - len(costs) % replicas
            for turn in range(0, whole, replicas):
                forwards += max(c[0] for c in costs[turn : turn + replicas])
                heads += max(c[1] for c in costs[turn : turn + replicas])
            if rest := step[whole:]:
                ranks = replicas // len(rest)
                shares = [_split(tuple(sets), ranks, self.blocks) for sets, _, _ in rest]
                forwards += max(f * (b - a) for (f, _), (_, a, b) in zip(shares, rest, strict=True))
                heads += max(h * (b - a) for (_, h), (_, a, b) in zip(shares, rest, strict=True))
        return forwards, heads


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
        flops = forwards * model.block_flops(LENGTH) + heads * model.head_flops(LENGTH)
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
    mean = {k: float(np.mean([f[k] for f in found])) for k in found[0]}
    work = float(np.mean([race.forwards / race.busiest(replicas)[0] for race in races]))
    return {
        "model": model.name,
        "gpus": gpus,
        "group": 1 if streamed else tp,
        "streamed": streamed,
        "replicas": replicas,
        "removed": remove,
        "seconds": {k: round(v, 1) for k, v in mean.items()},
        "busy": round(work / replicas, 3),
    }


MEASURED = (
    # result file, windows that go through a block at once
    ("race-cpu-16x256.json", 4),
    ("performance-h200-real.json", 242),
)


def measured(name: str) -> tuple[int, int, int, int, int]:
    """Of a race in a result: blocks, removed, windows, their length, and block forwards."""
    report = json.loads((RESULTS / name).read_text())
    if "sections" in report:
        row = report["sections"]["real"]["searches"]["racing"]
        keys = ("blocks", "removed", "windows", "length", "block_forwards")
        return tuple(row[key] for key in keys)  # type: ignore[return-value]
    racing = next(s for s in report["systems"] if s["system"] == "racing")
    what = report["what"]
    asked = (report["blocks"], what["remove"], what["windows"], what["length"])
    return (*asked, racing["block_forwards"])


def check() -> list[dict[str, Any]]:
    """Block forwards of measured races, against those simulated at the same sizes."""
    rows = []
    for name, batch in MEASURED:
        blocks, remove, windows, length, forwards = measured(name)
        spread = Spread.read(SPREAD, length)
        races = [
            Simulated(blocks, remove, windows, batch, Losses(spread, blocks, windows, seed=s))
            for s in range(SEEDS)
        ]
        found = [race.forwards for race in races]
        rows.append(
            {
                "result": name,
                "windows": windows,
                "length": length,
                "measured": forwards,
                "simulated": round(float(np.mean(found))),
                "least": min(found),
                "most": max(found),
                "formula": round(float(np.mean([race.by_formula() for race in races]))),
            }
        )
    return rows


def figures(performance: Sequence[Path], seeds: int, gpus: Sequence[int]) -> dict[str, Any]:
    """All that the page shows."""
    r = rates(performance)
    spread = Spread.read(SPREAD, LENGTH)
    models, predictions = [], []
    for model in MODELS:
        remove = math.ceil(0.1 * model.blocks)
        races = [
            Simulated(
                model.blocks, remove, WINDOWS, 1, Losses(spread, model.blocks, WINDOWS, seed=s)
            )
            for s in range(seeds)
        ]
        curves = [race.left() for race in races]
        models.append(
            {
                "model": model.name,
                "blocks": model.blocks,
                "removed": remove,
                "gb": round(model.bytes / 1e9),
                "steps": round(float(np.mean([len(race.steps) for race in races]))),
                "block_forwards": round(float(np.mean([race.forwards for race in races]))),
                "formula": round(float(np.mean([race.by_formula() for race in races]))),
                "heads": round(float(np.mean([race.heads for race in races]))),
                "least_damage": round(float(np.mean([race.as_least_damage for race in races])), 3),
                "exact_block_forwards": exact_forwards(model.blocks, remove),
                "left": {
                    w + 1: round(float(np.mean([c[w] for c in curves])), 1)
                    for w in (0, 4, 8, 16, 32, 64, 127)
                },
            }
        )
        predictions += [predict(model, n, remove, races, r) for n in gpus]
    return {
        "windows": WINDOWS,
        "length": LENGTH,
        "seeds": seeds,
        "seeds_check": SEEDS,
        "rates": asdict(r),
        "check": check(),
        "models": models,
        "predictions": predictions,
    }


def exact_forwards(blocks: int, remove: int) -> int:
    """Of an exact search that removes the middle blocks."""
    candidates, total = list(range(1, blocks - 1)), 0
    for done in range(remove):
        start = (len(candidates) - done) // 2
        gone = BlockSet(candidates[start : start + done])
        sets = [gone | {b} for b in candidates if b not in gone]
        total += WINDOWS * counted_forwards(sets, blocks)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--performance", type=Path, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("-o", "--out", type=Path, help="the figures, as JSON")
    options = parser.parse_args()
    found = figures(options.performance, options.seeds, options.gpus)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(scale_page(found), end="")


if __name__ == "__main__":
    main()
