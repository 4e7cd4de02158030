"""Whether the quick comparison at the end of a search takes the better of two sets of blocks.

    python benchmarks/finals.py MODEL --data FOLDER --result quality.json -o out.json

quality.json is a result of quality.py for the same model. Its greedy and window sets of each depth
are compared as `--strategy greedy-or-window` does it, and beside that stands what quality.py has
measured after a full repair, on the texts given, on others, and of answers.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import measure, setting
from plot_quality import table
from texts import prepare

import sleb
from sleb.calibration.split import CalibrationSplit
from sleb.core.errors import SlebError
from sleb.core.files import write_text
from sleb.core.progress import silent
from sleb.core.statistics import standard_error
from sleb.repairs.scoring import RepairedScores
from sleb.repairs.self_generated import writer
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.search import FINAL_TOKENS
from sleb.selection.sweep import Sweep


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison at every depth, in nats/token over the dense model, and what is known."""
    known = json.loads(options.result.read_text(encoding="utf-8"))
    systems = {s["system"]: s["sets"] for s in known["systems"]}
    names = options.systems.split(",")
    model = sleb.load(options.model, dtype=options.dtype, device=options.device)
    device = model.stack.input_device
    with tempfile.TemporaryDirectory() as folder:
        mix = [*prepare(options.data, Path(folder) / "texts", options.seed).calibration.values()]
        split = CalibrationSplit.of(
            model.tokenizer, mix, windows=options.windows, length=options.length, seed=options.seed
        ).with_self_generated(writer(model, silent), compare=True)
        judging, writing, _ = measure(device, lambda: split.final_comparison)
    given, n, fitted = len(split.search.ids), len(judging), split.candidate_fit(FINAL_TOKENS).ids
    sweep = Sweep(model.stack, judging, NLL, batch=options.batch)
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
        "result": options.result.name,
        "seed": options.seed,
        "setting": setting(device, model.stack.dtype),
        "fitted_tokens": fitted.numel(),
        "judges": {"given": given, "own": n - given, "length": options.length},
        "writing_seconds": writing,
        "depths": rows,
    }


def shown(found: dict[str, Any]) -> str:
    """The comparison as Markdown. Bold: the lower of greedy and window."""
    rows = []
    for row in found["depths"]:
        pair = [name for name in ("greedy", "window") if name in row["sets"]]
        taken = min(pair, key=lambda name: row["sets"][name]["increase"], default=None)
        for name, s in row["sets"].items():
            tasks = s["measured"]["tasks"]
            figures = [f"{s[key]:.3f}" for key in ("given", "own", "increase")]
            figures += [f"{s['measured'][key]:.2f}" for key in ("five", "unseen")]
            figures.append("" if tasks is None else f"{100 * tasks:.1f}")
            rows.append([str(row["removed"]), f"**{name}**" if name == taken else name, *figures])
    head = ["removed", "blocks of", "given text", "own text", "all", "five domains", "unseen"]
    return table([*head, "accuracy"], rows, left=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--render", type=Path, help="print the table of a result")
    parser.add_argument("--data", type=Path, help="folder of texts")
    parser.add_argument("--result", type=Path, help="what quality.py has written")
    parser.add_argument("--systems", default="greedy,window")
    parser.add_argument("--windows", type=int, default=40, help="of given text that judge")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    if options.render:
        print(shown(json.loads(options.render.read_text(encoding="utf-8"))))
        return 0
    if not (options.model and options.data and options.result and options.out):
        parser.error("MODEL, --data, --result and --out are needed, or --render")
    try:
        found = compared(options)
        write_text(options.out, json.dumps(found, indent=1) + "\n")
    except SlebError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(shown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
