"""Losses for a race whose model has random weights, drawn from the spread seen on a real one.

    python benchmarks/race_model.py MODEL -o benchmarks/results/spread-smollm2.json

runs two exact rounds of a search on 16 windows of 256 tokens, and describes their losses by

    loss(R, w) = level(w) + sum over b in R of (damage(b) + own(b, w)) + joint(R) + fresh(R, w)

``level`` is what makes a window hard for every candidate; it cancels in a race. ``own`` is what a
block's absence adds on a window whatever else is gone, which one round learns from the one before;
``joint`` and ``fresh`` are of the set alone, over all windows and on one.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import RESULTS, save

import sleb
from sleb.core.statistics import Values
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import block_forwards

__all__ = ["SPREAD", "Losses", "Spread", "exact_work", "fit"]

SPREAD = RESULTS / "spread-smollm2.json"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Nats/token. ``damages``: what the removal of each candidate costs, least first; of models
    with another number of blocks these are quantiles. Standard deviations over windows: of ``own``
    as ``own_floor + own_slope * damage``, of ``fresh``, of ``level``; over sets: of ``joint``."""

    damages: tuple[float, ...]
    own_floor: float
    own_slope: float
    fresh: float
    joint: float
    level: float

    @classmethod
    def read(cls, path: Path, length: int) -> Spread:
        """As measured, for windows of ``length`` tokens: a mean over more tokens is steadier, by
        the square root of their number if tokens are as good as independent."""
        report = json.loads(path.read_text())
        found = cls(**{**report["spread"], "damages": tuple(report["spread"]["damages"])})
        steadier = (report["length"] / length) ** 0.5
        return replace(
            found,
            own_floor=found.own_floor * steadier,
            own_slope=found.own_slope * steadier,
            fresh=found.fresh * steadier,
        )


class Losses:
    """A score function for an Objective: (sets, start, stop) -> [sets, windows]. The same sets and
    windows always get the same losses."""

    def __init__(self, spread: Spread, blocks: int, windows: int, *, seed: int = 0) -> None:
        self.spread, self.windows, self.seed = spread, windows, seed
        draw = np.random.default_rng([seed, 0])
        share = draw.permutation((np.arange(blocks) + draw.random(blocks)) / blocks)
        known = (np.arange(len(spread.damages)) + 0.5) / len(spread.damages)
        self.damage = np.interp(share, known, spread.damages)
        self.level = spread.level * draw.standard_normal(windows)
        width = spread.own_floor + spread.own_slope * self.damage
        self.own = width[:, None] * draw.standard_normal((blocks, windows))
        # a race asks for the same sets on one prefix after another
        self._of = functools.lru_cache(maxsize=4096)(self._drawn)

    def __call__(self, sets: Sequence[BlockSet], start: int, stop: int) -> Values:
        return np.stack([self._of(s)[start:stop] for s in sets])

    def _drawn(self, blocks: BlockSet) -> Values:
        if not blocks:
            return self.level
        members = sorted(blocks)
        digest = hashlib.sha256(str((self.seed, members)).encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        mean = self.damage[members].sum() + self.spread.joint * draw.standard_normal()
        fresh = self.spread.fresh * draw.standard_normal(self.windows)
        return np.asarray(self.level + self.own[members].sum(0) + mean + fresh)


def exact_work(blocks: int, remove: int) -> list[tuple[int, int]]:
    """Block forwards and heads that each round of an exact search takes for a window. Which blocks
    are gone hardly matters: those in the middle."""
    candidates, work = list(range(1, blocks - 1)), []
    for done in range(remove):
        start = (len(candidates) - done) // 2
        gone = BlockSet(candidates[start : start + done])
        sets = [gone | {b} for b in candidates if b not in gone]
        work.append((block_forwards(sets, blocks), len(sets)))
    return work


def fit(values: Mapping[BlockSet, Values]) -> Spread:
    """From scores per window of the dense model, of all single blocks removed, and of all pairs
    with the best of them."""
    dense = values[DENSE]
    alone = {next(iter(s)): v - dense for s, v in values.items() if len(s) == 1}
    best = min(alone, key=lambda b: float(alone[b].mean()))
    first = values[BlockSet([best])]
    # how a block's excess changes once another is gone: fresh of three sets, and joint of two that
    # differ from block to block
    change = [
        v - first - alone[next(iter(s - {best}))]
        for s, v in values.items()
        if len(s) == 2 and best in s
    ]
    fresh = float(np.median([c.std(ddof=1) for c in change])) / 3**0.5
    # a median and a median deviation: blocks of great damage, which no race keeps, are far off
    means = np.array([c.mean() for c in change])
    joint = 1.4826 * float(np.median(np.abs(means - np.median(means)))) / 2**0.5
    damage = np.array([v.mean() for v in alone.values()])
    deviation = np.array([v.std(ddof=1) for v in alone.values()])
    slope, floor = np.polyfit(damage, np.sqrt(np.maximum(deviation**2 - fresh**2, 0)), 1)
    return Spread(
        damages=tuple(round(float(d), 4) for d in sorted(damage)),
        own_floor=round(float(floor), 4),
        own_slope=round(float(slope), 4),
        fresh=round(fresh, 4),
        joint=round(joint, 4),
        level=round(float(dense.std(ddof=1)), 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    size = {"windows": options.windows, "length": options.length}
    with tempfile.TemporaryDirectory() as folder:
        journal = {"journal": Path(folder) / "journal", "keep_journal": True}
        plan = sleb.search(options.model, remove=2, exact=True, **size, **journal)
        lines = journal["journal"].read_text().splitlines()[1:]
    values: dict[BlockSet, Values] = {}
    for line in map(json.loads, lines):
        for blocks, row in zip(line["sets"], line["values"], strict=True):
            own = values.setdefault(BlockSet(blocks), np.full(options.windows, np.nan))
            own[line["start"] : line["start"] + len(row)] = row
    report = {
        "model": Path(options.model).name,
        "blocks": plan.model.blocks,
        **size,
        "dtype": plan.dtype,
        "spread": asdict(fit(values)),
    }
    save(options.out, report)
    print(json.dumps(report["spread"]))


if __name__ == "__main__":
    main()
