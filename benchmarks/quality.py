"""What each choice of blocks costs, with and without repair: one model, one run.

    python benchmarks/quality.py MODEL --data FOLDER -o out.json

FOLDER is laid out as texts.py says. Every set of blocks is scored as a plain cut and as a repaired
one, on text that neither search nor repair has seen: perplexity over the dense model's on the same
windows, by domain; their geometric mean over the five domains that calibrate; likewise over texts
of other kinds; and zero-shot accuracy with --tasks. The JSON is written after every set.

    python benchmarks/quality.py MODEL --data FOLDER --finals quality.json --systems greedy,window \
        --windows 40 --length 256 -o out.json

sets the quick comparison at the end of a search beside what a result of this script has measured of
the same sets after a full repair, on the texts given, on others, and of answers.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import asked, main_of, measure, rounded, setting, used
from common import save as save_json
from plot import finals, markdown
from texts import DOMAINS, PUBLISHED, UNSEEN, Texts, prepare

import sleb
from sleb.calibration.split import SHARE, CalibrationSplit
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import blocks_to_remove
from sleb.core.progress import silent
from sleb.core.statistics import Interval, exponential, flips, proportion, standard_error
from sleb.evaluation.tasks import check_tasks
from sleb.repairs import Repair, repair
from sleb.repairs.answering import writer
from sleb.repairs.regression import default_tokens
from sleb.repairs.scoring import RepairedScores
from sleb.repairs.self_generated import with_self_generated
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.search import FINAL_TOKENS
from sleb.selection.sweep import Patch, Sweep

EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"


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
            "search": used(self.scored.record),
            "published": {
                "note": "as much as the released code, which takes 128 rows of the training set",
                **used(self.narrow.search.record),
            },
            "repair": {**used(self.fitted.record), "writing_seconds": self.writing},
            "repair_judges": used(self.judges.record),
            "test": used(self.test.record),
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


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "removed": row["blocks"],
        "plain": round(row["plain"]["geo"]["value"], 3),
        "repaired": row["repaired"] and round(row["repaired"]["geo"]["value"], 3),
        "repair_seconds": round(row["repair"].get("seconds", 0), 1),
    }


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


class Tasks:
    """Zero-shot tasks, read once, and the dense model's score of every item of theirs."""

    def __init__(
        self,
        model: sleb.LoadedModel,
        names: Sequence[str],
        folder: Path,
        limit: int | None,
        seed: int,
    ) -> None:
        from sleb.evaluation.lm_eval import Harness

        self.harness = Harness(model, batch=None, progress=silent)
        self.found = self.harness.load([], names, folder, limit=limit, seed=seed)
        self._dense = {task.name: self.harness.score(task) for task in self.found}
        for name, scores in self._dense.items():
            if set(scores.values) - {0.0, 1.0}:
                raise InputError(f"task {name!r} does not score items as right or wrong")

    def dense(self) -> dict[str, Any]:
        """Accuracies of the dense model."""
        rows = {
            task.name: {
                "metric": task.metric,
                "items": len(self._dense[task.name].values),
                "chance": self._dense[task.name].chance,
                **_accuracy(self._dense[task.name].values),
            }
            for task in self.found
        }
        return _with_mean(rows)

    def score(self, removed: Collection[int], patch: Patch | None) -> dict[str, Any]:
        """Accuracies without ``removed`` blocks, and what flipped against the dense model."""
        rows = {}
        for task in self.found:
            values = self.harness.score(task, removed, patch).values
            before = self._dense[task.name].values
            change = flips([v == 1 for v in before], [v == 1 for v in values])
            rows[task.name] = {**_accuracy(values), "lost": change.lost, "won": change.won}
        return _with_mean(rows)


def _accuracy(values: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": asdict(proportion(int(sum(values)), len(values)))}


def _with_mean(rows: dict[str, Any]) -> dict[str, Any]:
    return {"mean": float(np.mean([row["accuracy"]["value"] for row in rows.values()])), **rows}


def local_tasks(data: Path, names: Sequence[str], folder: Path) -> list[str]:
    """The public tasks of examples/tasks, on the files in ``data``: their names, which are defined
    in ``folder`` then.

    Raises:
        InputError: there is no such example, or no file for it.
    """
    examples = {path.stem.removesuffix("_local"): path for path in EXAMPLES.glob("*_local.yaml")}
    if unknown := [name for name in names if name not in examples]:
        known = ", ".join(sorted(examples))
        raise InputError(f"no task {unknown[0]!r} in examples/tasks; it has {known}")
    folder.mkdir()
    for task, path in examples.items():  # all, since some include others
        text = path.read_text(encoding="utf-8")
        files = sorted((data / "zeroshot").glob(f"{task}*.jsonl"), key=lambda f: len(f.name))
        if files:
            text = text.replace(f"data/{task}.jsonl", json.dumps(str(files[0].resolve())))
        elif task in names:
            raise InputError(f"no file {task}*.jsonl in {data / 'zeroshot'}; leave the task out")
        (folder / path.name).write_text(text, encoding="utf-8")
    return [f"{name}_local" for name in names]


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison at every depth, in nats/token over the dense model, and what is known."""
    known = json.loads(options.finals.read_text(encoding="utf-8"))
    systems = {s["system"]: s["sets"] for s in known["systems"]}
    names = options.systems
    model = sleb.load(options.model, dtype=options.dtype, device=options.device)
    device = model.stack.input_device
    with tempfile.TemporaryDirectory() as folder:
        mix = [*prepare(options.data, Path(folder) / "texts", options.seed).calibration.values()]
        split = CalibrationSplit.of(
            model.tokenizer, mix, windows=options.windows, length=options.length, seed=options.seed
        ).with_self_generated(writer(model, silent), compare=True)
        judging, writing, _ = measure(device, lambda: split.final_comparison.ids)
    given, n, fitted = len(split.search.ids), len(judging), split.candidate_fit(FINAL_TOKENS).ids
    sweep = Sweep(model.stack, judging, NLL, batch=8)
    scores = RepairedScores(sweep, fitted)
    dense = scores.values([DENSE], 0, n)[0]
    rows = []
    for found in zip(*(systems[name] for name in names), strict=True):
        above = {}
        sets = {}
        for name, measured in zip(names, found, strict=True):
            work = functools.partial(scores.values, [BlockSet(measured["blocks"])], 0, n)
            losses, seconds, _ = measure(device, work)
            above[name] = losses[0] - dense
            sets[name] = {
                "blocks": measured["blocks"],
                "increase": float(above[name].mean()),
                "given": float(above[name][:given].mean()),
                "own": float(above[name][given:].mean()),
                "seconds": seconds,
                "measured": {
                    "five": measured["repaired"]["geo"]["value"],
                    "unseen": measured["repaired"]["unseen_geo"]["value"],
                    "tasks": (measured["repaired"]["tasks"] or {}).get("mean"),
                },
            }
        taken = min(names, key=lambda name: sets[name]["increase"])
        for name in names:
            excess = above[name] - above[taken]
            sets[name]["excess"] = [float(excess.mean()), standard_error(excess)]
        rows.append({"removed": found[0]["removed"], "taken": taken, "sets": sets})
        print(json.dumps(rows[-1]), flush=True)
    return {
        "model": Path(options.model).name,
        "result": options.finals.name,
        "seed": options.seed,
        "setting": setting(device, model.stack.dtype),
        "fitted_tokens": fitted.numel(),
        "judges": {"given": given, "own": n - given, "length": options.length},
        "writing_seconds": writing,
        "depths": rows,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--merge", type=Path, nargs="+", help="make one of several results")
    parser.add_argument("--data", type=Path, help="folder of texts and items")
    parser.add_argument("--finals", type=Path, help="a result, to compare its sets quickly")
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
    if options.merge:
        save_json(options.out, merged(options.merge))
        return
    if options.finals:
        found = compared(options)
        save_json(options.out, found)
        print(finals(found))
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
        paths = ("out", "model", "data", "tasks_folder", "merge", "finals")
        report: dict[str, Any] = {
            "what": asked(options, *paths),
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
            save_json(options.out, rounded(report))

        save()
        while report["not_begun"]:
            if options.minutes and time.monotonic() - start > 60 * options.minutes:
                break
            name, *report["not_begun"] = report["not_begun"]
            report["systems"].append({"system": name})
            for _ in bench.run(report["systems"][-1]):
                save()
    print("\n" + markdown(report))


if __name__ == "__main__":
    main_of(main)
