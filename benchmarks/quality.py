"""What each choice of blocks costs, with and without repair: one model, one run.

    python benchmarks/quality.py MODEL --data FOLDER -o out.json

FOLDER is laid out as texts.py says. Every set of blocks is scored as a plain cut and as a repaired
one, on text that neither search nor repair has seen: perplexity over the dense model's on the same
windows, by domain; their geometric mean over the five domains that calibrate; likewise over texts
of other kinds; and zero-shot accuracy with --tasks. The JSON is written after every set.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import measure, setting
from plot_quality import summary
from texts import DOMAINS, PUBLISHED, UNSEEN, Texts, prepare
from zeroshot import Tasks, local_tasks

import sleb
from sleb.calibration.split import SHARE, CalibrationSplit
from sleb.core.errors import InputError, SlebError, UnsupportedModel
from sleb.core.files import write_text
from sleb.core.plan import Calibration, blocks_to_remove
from sleb.core.progress import silent
from sleb.core.statistics import Interval, exponential
from sleb.evaluation.tasks import check_tasks
from sleb.repairs import Repair, repair
from sleb.repairs.regression import default_tokens
from sleb.repairs.self_generated import with_self_generated
from sleb.selection.sweep import Patch


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to choose blocks: options of :func:`sleb.search`; whether its first k of n blocks are
    what it finds for k; and whether it sees the published calibration text or that of all domains.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    nested: bool = True
    published: bool = False


SYSTEMS = {
    "cosine": System(options={"metric": "cosine"}),
    "sleb": System(options={"exact": True}, published=True),
    "greedy": System(),
    "beam": System(options={"strategy": "beam"}, nested=False),
    "window": System(options={"strategy": "window"}, nested=False),
    "repair-aware": System(options={"metric": "repaired-loss"}),
}


class Bench:
    """The loaded model, the windows of every use, and what was measured of which cut."""

    def __init__(self, options: argparse.Namespace, texts: Texts) -> None:
        self.options, seed = options, options.seed
        self.model = sleb.load(options.model, dtype=options.dtype, device=options.device)
        self.depths = [blocks_to_remove(n, len(self.model.stack)) for n in options.removed]
        self.device = self.model.stack.input_device
        self.mix = [*texts.calibration.values()]
        cut = functools.partial(sleb.load_windows, self.model.tokenizer, seed=seed)
        split = functools.partial(CalibrationSplit.of, self.model.tokenizer, seed=seed)
        self.mixed = split(self.mix, windows=options.windows, length=options.length)
        self.scored = self.mixed.search
        self.narrow = split(
            [texts.calibration[PUBLISHED]],
            windows=options.published_windows,
            length=options.published_length,
        )
        length = options.repair_length or options.length
        known = length == options.length
        tokens = options.repair_tokens or default_tokens(self.model.stack)
        repaired = split(self.mix, windows=options.windows if known else None, length=length)
        given = tokens - tokens // SHARE * options.own
        repaired = repaired.with_repair(given, beside_search=not known)
        self.fitted, self.judges = repaired.repair_fit, repaired.repair_validation
        self.writing = 0.0  # seconds
        if options.own:  # once for all cuts
            work = functools.partial(with_self_generated, self.model, self.fitted, silent)
            self.fitted, self.writing, _ = measure(self.device, work)
        self.test, _ = cut(
            [*texts.test.values()],
            windows=options.test_windows * len(texts.test),
            length=options.test_length,
        )
        self.tasks: Tasks | None = None
        self._known: dict[frozenset[int], dict[str, Any]] = {}

    def dense(self) -> dict[str, Any]:
        """The model as it is."""
        found, seconds, peak = measure(self.device, lambda: sleb.evaluate(self.model, self.test))
        return {
            "perplexity": {name: asdict(q.perplexity) for name, q in found.domains.items()},
            "evaluation_seconds": seconds,
            "peak_gb": peak,
            "tasks": self.tasks.dense() if self.tasks else None,
        }

    def texts(self) -> dict[str, Any]:
        """What was used of which text."""
        return {
            "search": _used(self.scored.record),
            "published": {
                "note": "as much as the released code, which takes 128 rows of the training set",
                **_used(self.narrow.search.record),
            },
            "repair": {**_used(self.fitted.record), "writing_seconds": self.writing},
            "repair_judges": _used(self.judges.record),
            "test": _used(self.test.record),
        }

    def run(self, found: dict[str, Any]) -> Iterator[None]:
        """Measure the system that ``found`` names, and put it there, one depth after another."""
        name = found["system"]
        system = SYSTEMS[name]
        found |= {
            "options": dict(system.options),
            "calibration": "published" if system.published else "search",
            "searches": [],
            "sets": [],
        }
        plans: dict[int, sleb.Plan] = {}
        for depth in [max(self.depths)] if system.nested else self.depths:
            plan, seconds, peak = measure(self.device, functools.partial(self._search, name, depth))
            plans[depth] = plan
            found["searches"].append(
                {"removed": depth, "order": plan.order, "seconds": seconds, "peak_gb": peak}
            )
        for depth in self.depths:
            removed = plans[depth if depth in plans else max(plans)].at_depth(depth)
            cut = {"removed": depth, "blocks": removed, **self._measured(removed)}
            found["sets"].append(cut)
            print(json.dumps({"system": name, **_brief(cut)}), flush=True)
            yield

    def _search(self, name: str, depth: int) -> sleb.Plan:
        system = SYSTEMS[name]
        return sleb.search(
            self.model,
            remove=depth,
            split=self.narrow if system.published else self.mixed,
            seed=self.options.seed,
            **system.options,
        )

    def _measured(self, removed: tuple[int, ...]) -> dict[str, Any]:
        """A cut, plain and repaired. Two systems may find the same one."""
        key = frozenset(removed)
        if key not in self._known:
            found, done = self._repair(removed)
            patch = functools.partial(found.patch, self.model.stack) if found else None
            scored = sleb.evaluate(self.model, self.test, removed=removed, patch=patch)
            plain = self._scored(scored.unrepaired or scored)
            repaired = self._scored(scored, patch) if patch else None
            if "refused" not in done and not patch:  # no fit was accepted: the cut is the plain one
                repaired = plain
            self._known[key] = {"plain": plain, "repaired": repaired, "repair": done}
        return self._known[key]

    def _repair(self, removed: tuple[int, ...]) -> tuple[Repair | None, dict[str, Any]]:
        """A repair, if it changes anything, and what is to be said of it."""
        work = functools.partial(
            repair, self.model, removed, self.fitted, self.judges, self_generated=False
        )
        try:
            found, seconds, peak = measure(self.device, work)
        except UnsupportedModel as error:
            return None, {"refused": str(error)}
        return found if found.tensors else None, {
            "seconds": seconds,
            "peak_gb": peak,
            "tensors": len(found.tensors),
            "gaps": [
                {"blocks": gap.removed, "ridge": gap.ridge, "tensors": len(gap.tensors)}
                for gap in found.record.gaps
            ],
        }

    def _scored(self, found: sleb.Evaluation, patch: Patch | None = None) -> dict[str, Any]:
        increases: dict[str, Interval] = {}
        domains = {}
        for name, quality in found.domains.items():
            assert quality.loss_increase is not None
            assert quality.perplexity_ratio is not None
            assert quality.agreement is not None
            increases[name] = quality.loss_increase
            domains[name] = {
                "ratio": asdict(quality.perplexity_ratio),
                "agreement": quality.agreement.value,
            }
        return {
            "geo": geometric([increases[name] for name in DOMAINS]),
            "unseen_geo": geometric([increases[name] for name in UNSEEN]),
            "worst": max(DOMAINS, key=lambda name: increases[name].value),
            "domains": domains,
            "tasks": self.tasks.score(found.removed, patch) if self.tasks else None,
        }


def geometric(increases: Sequence[Interval]) -> dict[str, Any]:
    """Geometric mean of the perplexity ratios whose logs are ``increases``, with its 95 % interval:
    domains are independent strata of one weight, so their half-widths add as squares."""
    mean = float(np.mean([i.value for i in increases]))
    halves = [i.high - i.value for i in increases if i.high is not None]
    if len(halves) < len(increases):
        return asdict(exponential(Interval(value=mean, low=None, high=None)))
    half = float(np.sqrt(np.square(halves).sum())) / len(halves)
    return asdict(exponential(Interval(value=mean, low=mean - half, high=mean + half)))


def _used(record: Calibration) -> dict[str, Any]:
    sources = [
        {"name": Path(s.spec).stem, **s.model_dump(mode="json", exclude={"spec"})}
        for s in record.sources
    ]
    return {"windows": record.windows, "length": record.length, "sources": sources}


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "removed": row["blocks"],
        "plain": round(row["plain"]["geo"]["value"], 3),
        "repaired": row["repaired"] and round(row["repaired"]["geo"]["value"], 3),
        "repair_seconds": round(row["repair"].get("seconds", 0), 1),
    }


def _rounded(value: Any) -> Any:
    """Six figures are more than any of these means."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """One report of several, which measured different systems alike."""
    first, *rest = [json.loads(path.read_text()) for path in paths]

    def alike(report: dict[str, Any]) -> dict[str, Any]:
        """All that must be the same."""
        kept = {k: v for k, v in report.items() if k not in ("systems", "not_begun", "seconds")}
        texts = {k: v for k, v in kept["texts"].items() if k != "repair"}  # it is sampled
        what = {k: v for k, v in kept["what"].items() if k != "systems"}
        return {**kept, "texts": texts, "what": what, "dense": kept["dense"]["perplexity"]}

    wanted = alike(first)
    for path, report in zip(paths[1:], rest, strict=True):
        found = alike(report)
        if differ := [key for key in wanted if found.get(key) != wanted[key]]:
            raise InputError(f"{path} differs from {paths[0]} in '{differ[0]}'")
        for key in ("systems", "not_begun"):
            first[key] += report[key]
        first["what"]["systems"] += report["what"]["systems"]
    first["processes"] = len(paths)  # beside each other, so times are longer
    return first  # type: ignore[no-any-return]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", help="make one of several results")
    parser.add_argument("--data", type=Path, help="folder of texts and items")
    parser.add_argument("--removed", default="10%,20%,30%", help="depths: blocks, or percentages")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--windows", type=int, default=64, help="to search on, over all domains")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--published-windows", type=int, default=4)
    parser.add_argument("--published-length", type=int, default=2048)
    parser.add_argument("--repair-tokens", type=int, help="default: as sleb prune")
    parser.add_argument("--repair-length", type=int, help="default: --length")
    parser.add_argument(
        "--own",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit on text that the model writes itself, too",
    )
    parser.add_argument("--test-windows", type=int, default=16, help="of each text")
    parser.add_argument("--test-length", type=int, default=2048)
    parser.add_argument("--tasks", help="examples/tasks without _local, or of --tasks-folder")
    parser.add_argument("--tasks-folder", type=Path)
    parser.add_argument("--limit", type=int, help="items per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, help="then no further system is begun")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    if not options.merge and (options.model is None or options.data is None):
        parser.error("give MODEL and --data FOLDER, or --merge")
    for name in ("removed", "systems", "tasks"):
        setattr(options, name, [p for p in (getattr(options, name) or "").split(",") if p])
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        parser.error(f"no system {unknown[0]!r}; known: {', '.join(SYSTEMS)}")
    return options


def main() -> None:
    start = time.monotonic()
    options = parse()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.merge:
        write_text(options.out, json.dumps(merged(options.merge), indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as place:
        texts = prepare(options.data, Path(place), options.seed)
        names, folder = options.tasks, options.tasks_folder
        if names:
            if folder is None:
                folder = Path(place) / "tasks"
                names = local_tasks(options.data, names, folder)
            check_tasks(names, folder=folder)
        bench = Bench(options, texts)
        if names:
            bench.tasks = Tasks(bench.model, names, folder, options.limit, options.seed)
        paths = ("out", "model", "data", "tasks_folder", "merge")
        report: dict[str, Any] = {
            "what": {k: v for k, v in vars(options).items() if k not in paths},
            "model": Path(options.model).name,
            "blocks": len(bench.model.stack),
            **setting(bench.device, bench.model.stack.dtype),
            "domains": [*DOMAINS],
            "unseen": [*UNSEEN],
            "texts": bench.texts(),
            "dense": bench.dense(),
            "systems": [],
            "not_begun": options.systems,
        }

        def save() -> None:
            report["seconds"] = time.monotonic() - start
            write_text(options.out, json.dumps(_rounded(report), indent=1) + "\n")

        save()
        while report["not_begun"]:
            if options.minutes and time.monotonic() - start > 60 * options.minutes:
                break
            name, *report["not_begun"] = report["not_begun"]
            report["systems"].append({"system": name})
            for _ in bench.run(report["systems"][-1]):
                save()
    print("\n" + summary(report))
    if report["not_begun"]:
        print(f"\nnot begun for lack of time: {', '.join(report['not_begun'])}")


if __name__ == "__main__":
    try:
        main()
    except SlebError as error:
        sys.exit(f"quality.py: {error}")
