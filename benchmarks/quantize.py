"""Pruned, quantized, and both: what each costs and saves, and whether the losses add up.

    python benchmarks/quantize.py MODEL --data FOLDER --work FOLDER -o out.json

FOLDER is laid out as texts.py says; ``--work`` gets the checkpoints, and those that are there are
used again. Dense, pruned and repaired, each as it is, as w4a16 and as int8, are scored on the same
windows of text that nothing was calibrated on. The interaction of a cut with a quantization is
loss(both) - loss(cut) - loss(quantized) + loss(dense), window by window, in nats/token: above zero
the two cost more together than each alone. Then the other order: blocks searched on the quantized
model itself. Needs the extra ``quantize``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import asked, main_of, measure, rounded, setting, table, used
from common import save as save_json
from latency import generated, taking_turns
from texts import DOMAINS, prepare
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import sleb
from sleb.calibration.windows import Windows
from sleb.config import RepairConfig
from sleb.core.errors import UnsupportedModel
from sleb.core.plan import Plan
from sleb.core.statistics import Values, exponential, interval
from sleb.formats.quantize import quantize
from sleb.models.source import resolve
from sleb.repairs import fit_repair
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet
from sleb.selection.sweep import Sweep

SCHEMES = ("w4a16", "int8")
PROMPT, NEW = 128, 16


class Bench:
    """Checkpoints in ``work``, and the windows that nothing else sees."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.work = options, options.work
        self.dense = resolve(options.model).path
        texts = prepare(options.data, place, options.seed)
        self.text = [*texts.calibration.values()]
        self.test_text = [texts.test[name] for name in DOMAINS]
        self.losses: dict[str, Values] = {}

    def run(self, save: Any, report: dict[str, Any]) -> None:
        """All of it; ``save`` is called whenever ``report`` has more."""
        plan = self.plan("dense", self.dense)
        report["removed"] = plan.removed
        report["plan_calibration"] = used(plan.calibration)
        folders = {"dense": self.dense, "pruned": self.cut(plan)}
        folders["repaired"], report["repair"] = self.repaired(plan)
        if folders["repaired"] is None:
            del folders["repaired"]
        for name in [*folders]:
            for scheme in SCHEMES:
                folders[f"{name} {scheme}"] = self.quantized(name, folders[name], scheme)
        report["calibration"] = json.loads(
            (folders["dense w4a16"] / "quantize.json").read_text(encoding="utf-8")
        )["calibration"]
        for source in report["calibration"]["sources"]:
            source["spec"] = Path(source["spec"]).stem
        for name, folder in folders.items():
            report["rows"].append(self.row(name, folder, report))
            save()
        report["interactions"] = self.interactions(folders)
        save()
        report["other_order"] = self.other_order(plan, folders["dense w4a16"])
        save()
        for row in report["rows"]:
            row["speed"] = self.speed(folders["dense"], folders[row["name"]])
            save()

    # -- checkpoints -------------------------------------------------------------------------

    def plan(self, name: str, folder: Path) -> Plan:
        path = self.work / f"{name}.plan.json"
        if not path.is_file():
            o = self.options
            sleb.search(
                folder,
                remove=o.remove,
                text=self.text,
                windows=o.windows,
                length=o.length,
                heldout=0,
                seed=o.seed,
                journal=f"{path}.journal",
            ).save(path)
        return Plan.load(path)

    def cut(self, plan: Plan) -> Path:
        out = self.work / "pruned"
        if not out.exists():
            sleb.apply(plan, self.dense, out, keep=False)
        return out

    def repaired(self, plan: Plan) -> tuple[Path | None, str]:
        out, o = self.work / "repaired", self.options
        if not out.exists():
            model = sleb.load(self.dense)
            try:
                asked = {"text": self.text, "length": o.length, "repair_tokens": o.repair_tokens}
                found = fit_repair(model, plan.removed, config=RepairConfig.of(asked))
            except UnsupportedModel as error:
                return None, f"not possible: {error}"
            if not found.tensors:
                return None, "no fit was better on every text"
            del model
            sleb.apply(plan, self.dense, out, repair=found, keep=False)
        changed = Plan.load(out / "plan.json").repair
        return out, f"{len(changed.tensors) if changed else 0} matrices re-fitted"

    def quantized(self, name: str, folder: Path, scheme: str) -> Path:
        out, o = self.work / f"{name}-{scheme}", self.options
        if not out.exists():
            calibrated = scheme != "int8"
            quantize(
                folder,
                out,
                scheme=scheme,
                text=self.text if calibrated else (),
                windows=o.calibration_windows if calibrated else None,
                length=o.calibration_length,
                seed=o.seed,
            )
        print(f"{out.name} is there", flush=True)
        return out

    # -- measures ----------------------------------------------------------------------------

    def test(self, model: sleb.LoadedModel) -> Windows:
        o = self.options
        found, _ = sleb.load_windows(
            model.tokenizer,
            self.test_text,
            windows=o.test_windows * len(self.test_text),
            length=o.test_length,
            seed=o.seed,
        )
        return found

    def row(self, name: str, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
        model = sleb.load(folder)
        windows = self.test(model)
        report["test"] = used(windows.record)
        self.windows = windows
        losses = _losses(model, windows, [()])[0]
        self.losses[name] = losses
        source = np.array(windows.source)
        found = {
            "name": name,
            "disk_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
            "memory_bytes": _memory(model.model),
            "perplexity": {
                domain: asdict(exponential(interval(losses[source == i])))
                for i, domain in enumerate(windows.names)
            },
            "loss": asdict(interval(losses)),
            "ratio": asdict(exponential(interval(losses - self.losses["dense"]))),
        }
        print(json.dumps({"row": name, "ratio": found["ratio"]["value"]}), flush=True)
        return found

    def interactions(self, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
        rows = []
        for cut in ("pruned", "repaired"):
            for scheme in SCHEMES:
                if cut not in folders:
                    continue
                of = self.losses
                extra = of[f"{cut} {scheme}"] - of[cut] - of[f"dense {scheme}"] + of["dense"]
                rows.append({"cut": cut, "scheme": scheme, **asdict(interval(extra))})
        return rows

    def other_order(self, plan: Plan, folder: Path) -> dict[str, Any]:
        """Blocks searched on the w4a16 model, against those of the dense one; both as cuts of the
        w4a16 model, and the latter also as cut first and quantized then."""
        own = self.plan("w4a16", folder)
        model = sleb.load(folder)
        ours, theirs = _losses(model, self.windows, [own.removed, plan.removed])
        return {
            "removed": own.removed,
            "order": own.order,
            "dense_order": plan.order,
            "in_common": sorted({*own.removed} & {*plan.removed}),
            "loss_own_blocks": asdict(interval(ours)),
            "loss_dense_blocks": asdict(interval(theirs)),
            "own_minus_dense_blocks": asdict(interval(ours - theirs)),
            "cut_first_minus_quantized_first": asdict(
                interval(self.losses["pruned w4a16"] - theirs)
            ),
        }

    def speed(self, dense: Path, folder: Path) -> dict[str, Any]:
        """Times as fast as the dense model at reading and at writing, taking turns."""
        models = {"dense": sleb.load(dense).model, "this": sleb.load(folder).model}
        ids = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        found = {}
        for what, work in (("prefill", _read), ("generation", _write)):
            works = {name: partial(work, model, ids) for name, model in models.items()}
            took = taking_turns(partial(measure, ids.device), works, rounds=self.options.rounds)
            ratios = [a / b for a, b in zip(took["dense"], took["this"], strict=True)]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            found[what] = {"median": middle, "low": low, "high": high}
        gc.collect()
        return found


@torch.inference_mode()
def _read(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _write(model: Any, ids: torch.Tensor) -> None:
    generated(model, ids[:, :8], NEW)


def _losses(model: sleb.LoadedModel, windows: Windows, sets: list[tuple[int, ...]]) -> list[Values]:
    """Mean loss of each window, in nats/token, with each set of blocks bypassed."""
    sweep = Sweep(model.stack, windows.ids, NLL)
    values = sweep.values([BlockSet(blocks) for blocks in sets], 0, len(windows.ids))
    return [*values]


def _memory(model: torch.nn.Module) -> int:
    """Bytes of a loaded model's tensors, each counted once."""
    total, seen = 0, set()

    def add(tensor: torch.Tensor) -> None:
        nonlocal total
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        elif tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor)
    return total


def summary(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    domains = [*report["rows"][0]["perplexity"]]
    head = ["", *domains, "all, over dense", "disk", "memory", "reading", "writing"]
    rows = []
    for row in report["rows"]:
        cells = [row["name"], *(f"{row['perplexity'][d]['value']:.1f}" for d in domains)]
        cells += [_range(row["ratio"])]
        cells += [f"{row[f'{kind}_bytes'] / 1e6:,.0f} MB" for kind in ("disk", "memory")]
        speed = row.get("speed", {})
        cells += [f"{speed[w]['median']:.2f}" for w in ("prefill", "generation") if speed]
        rows.append(cells)
    lines = [table(head, rows)]
    for found in report.get("interactions", ()):
        lines += ["", f"{found['cut']} and {found['scheme']}: {_range(found, '+.3f')} nats/token"]
    if order := report.get("other_order"):
        lines += ["", f"dense search: {order['dense_order']}; on w4a16: {order['order']}"]
        for name in ("own_minus_dense_blocks", "cut_first_minus_quantized_first"):
            lines += ["", f"{name}: {_range(order[name], '+.3f')} nats/token"]
    return "\n".join(lines)


def _range(found: dict[str, Any], form: str = ".2f") -> str:
    value, low, high = (found[key] for key in ("value", "low", "high"))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--name", help="of the model, in the result; default: its file's")
    parser.add_argument("--remove", default="20%")
    parser.add_argument("--windows", type=int, default=20, help="to search on, over all domains")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repair-tokens", type=int, default=40_000)
    parser.add_argument("--calibration-windows", type=int, default=30)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=16, help="of each text")
    parser.add_argument("--test-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument(
        "--retime", action="store_true", help="only time again what -o and --work have"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    start = time.monotonic()
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.retime:
        return retime(options)
    paths = ("out", "model", "data", "work", "name", "retime")
    report: dict[str, Any] = {
        "what": asked(options, *paths),
        "model": options.name or Path(options.model).name,
        **setting(torch.device("cpu"), sleb.load(options.model).stack.dtype),
        "rows": [],
    }

    def save() -> None:
        report["seconds"] = time.monotonic() - start
        save_json(options.out, rounded(report))

    with tempfile.TemporaryDirectory() as place:
        Bench(options, Path(place)).run(save, report)
    save()
    print("\n" + summary(json.loads(options.out.read_text(encoding="utf-8"))))


def retime(options: argparse.Namespace) -> None:
    """New timings in a result that is there, of the checkpoints that it was made from."""
    report = json.loads(options.out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place))
        for row in report["rows"]:
            folder = options.work / row["name"].replace(" ", "-")
            row["speed"] = bench.speed(
                bench.dense, bench.dense if row["name"] == "dense" else folder
            )
    report["timing"] = {"rounds": options.rounds, **setting(torch.device("cpu"), torch.bfloat16)}
    save_json(options.out, rounded(report))
    print(summary(report))


if __name__ == "__main__":
    main_of(main)
