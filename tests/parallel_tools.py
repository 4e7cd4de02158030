"""Jobs of several processes for the tests: what each of them does, and how they are launched.

``python -m torch.distributed.run parallel_tools.py FOLDER`` runs ``main`` in every process; the
first writes what came out to FOLDER/found.json, for comparison with one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sleb.repairs import Repair

HERE = Path(__file__).parent
CPU = {"device": "cpu", "dtype": "float32"}
SEARCH = {"windows": 13, "length": 32, "batch": 2, "threads": 1, **CPU}
SEARCHES = {
    "racing": {"remove": 3, "curve": True},
    "exact": {"remove": 3, "exact": True},
    "kl": {"remove": 2, "metric": "kl", "batch": 3},
    "one batch": {"remove": 2, "windows": 6, "batch": 16},
    "cosine": {"remove": 2, "metric": "cosine"},
    "streamed": {"remove": 2, "stream": True, "max_memory": "200KB"},
    "beam": {"remove": 2, "strategy": "beam", "max_loss_increase": None, "min_similarity": "auto"},
}


def launch(n: int, *command: str, **how: object) -> subprocess.Popen[str]:
    """A job of n processes on this machine, with one thread each."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    run += ["--standalone", "--local-addr", "127.0.0.1", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(run, env=env, **pipes, **how)


def found(folder: Path) -> dict[str, object]:
    """All that is compared, by this job of one or several processes. ``folder`` has ``model``, a
    model that has learned ``text.txt``."""
    import torch

    import sleb
    from sleb.repairs import repair

    torch.set_num_threads(1)
    text = [str(folder / "text.txt")]
    out: dict[str, object] = {
        name: sleb.search(folder / "model", text=text, **{**SEARCH, **options}).model_dump()
        for name, options in SEARCHES.items()
    }
    model = sleb.load(folder / "model", **CPU)
    windows, aside = sleb.load_windows(
        model.tokenizer, text, windows=9, length=32, seed=0, heldout=5
    )
    quality = sleb.evaluate(model, windows, removed=[1, 3], batch=2)
    out["quality"] = dataclasses.asdict(quality)
    alike = sleb.measure_similarity(model, windows, batch=2)
    out["similarity"] = alike.per_window.tolist()
    out["repair"] = told(repair(model, [2, 3], windows, aside, batch=2))
    out["given text"] = told(repair(model, [2, 3], windows, aside, self_generated=False, batch=2))
    streamed = sleb.load(folder / "model", stream=True, **CPU)
    out["streamed repair"] = told(repair(streamed, [2, 3], windows, aside, batch=2))
    return out


def told(fixed: Repair) -> dict[str, object]:
    """What of a repair is compared."""
    return {
        "ridges": [gap.ridge for gap in fixed.record.gaps],
        "after": [sum(gap.after.values()) for gap in fixed.record.gaps],
        "tensors": {name: tensor.tolist() for name, tensor in fixed.tensors.items()},
    }


def trouble(folder: Path) -> dict[str, str]:
    """What every rank says of trouble that only one of them has."""
    import numpy as np
    import torch

    import sleb
    from sleb.core.process_group import group
    from sleb.selection.metrics import NLL
    from sleb.selection.objective import BlockSet
    from sleb.selection.sweep import Sweep

    said = {}
    model = sleb.load(folder / "model", **CPU)
    windows, _ = sleb.load_windows(
        model.tokenizer, [str(folder / "text.txt")], windows=8, length=32, seed=0
    )
    sets = [BlockSet([b]) for b in range(1, 5)]
    real = Sweep._walk_scores

    def only_last(error):
        def walk(self, *args):
            if group().rank == 1 and self.batch == 4:
                raise error
            return real(self, *args)

        return walk

    for name, error in (
        ("memory", torch.OutOfMemoryError("no room")),
        ("data", sleb.DataError("window 7 is no good")),
        ("bug", ZeroDivisionError("oops")),
    ):
        Sweep._walk_scores = only_last(error)
        sweep = Sweep(model.stack, windows.ids, NLL, batch=4)
        try:
            values = sweep.values(sets, 0, 8)
            said[name] = f"{sweep.batch} windows, {np.isfinite(values).all()}"
        except Exception as raised:
            said[name] = f"{type(raised).__name__}: {raised}"
    Sweep._walk_scores = real
    sweep = Sweep(model.stack, windows.ids, NLL, batch=4)
    try:
        sweep.values(sets[group().rank :], 0, 8)
    except sleb.DataError as raised:
        said["apart"] = str(raised)
    return said


def split(folder: Path) -> object:
    """Losses of a model that two processes hold together."""
    import sleb
    from sleb.calibration.split import CalibrationSplit

    model = sleb.load(folder / "wide", tp=2, **CPU)
    windows, _ = sleb.load_windows(
        model.tokenizer, [str(folder / "text.txt")], windows=4, length=32, seed=0
    )
    held = type(model.stack.blocks[0].self_attn.q_proj.weight).__name__
    plan = sleb.search(
        model, split=CalibrationSplit(search=windows), remove=2, batch=2, tp=2, threads=1
    )
    return held, dataclasses.asdict(sleb.evaluate(model, windows, removed=plan.removed, batch=2))


def split_repair(path: Path, folder: Path, tp: int) -> dict[str, object]:
    """A repair of a model that ``tp`` processes hold together; all fits, accepted or not; whether
    the model was as before after each; its loss under a patch; and text that it writes."""
    import sleb
    from sleb.core.progress import silent
    from sleb.repairs import repair, repaired
    from sleb.repairs.regression import Regression, gaps
    from sleb.repairs.self_generated import with_self_generated

    model = sleb.load(path, tp=tp, **CPU)
    windows, aside = sleb.load_windows(
        model.tokenizer, [str(folder / "text.txt")], windows=24, length=32, seed=0, heldout=5
    )
    options = {"removed": [1, 3], "batch": 4}
    before = sleb.evaluate(model, aside, **options)
    fixed = repair(model, [1, 3], windows, aside, self_generated=False, batch=4)
    kept = [sleb.evaluate(model, aside, **options) == before]
    fitter = Regression(
        model.stack, {1, 3}, windows.ids, 4, rounded=lambda i, name, new: new.float()
    )
    for gap in gaps({1, 3}, len(model.stack)):
        fitter.fit(gap, (0.1,))
    values = {f"{i}.{name}": value for (i, name), value in fitter.changes.values.items()}
    fitter.restore()
    kept.append(sleb.evaluate(model, aside, **options) == before)
    halves = {name: value / 2 for name, value in values.items()}
    under = sleb.evaluate(model, aside, **options, patch=lambda: repaired(model.stack, halves, ""))
    return {
        **told(fixed),
        "values": {name: value.tolist() for name, value in values.items()},
        "as before": kept,
        "patched": under.pruned_loss.value,
        "own": with_self_generated(model, windows.take(range(6)), silent).ids.tolist(),
    }


def summed() -> float:
    """The sum of a one from every rank."""
    import torch

    from sleb.core.process_group import group

    one = torch.ones(1)
    group().sum_(one)
    return float(one)


def main(folder: Path) -> None:
    """One process of the job."""
    from sleb.core.process_group import group, joined

    with joined():
        out = {"found": found(folder), "trouble": trouble(folder)}
        told = group().exchange(json.dumps(out["trouble"]).encode())
        out["trouble by rank"] = [json.loads(text) for text in told]
        out["size"] = group().size
        out["split"] = split(folder)
        out["one rank's sum"] = summed()
        names = ("even", "norms")
        out["split repair"] = {name: split_repair(folder / name, folder, 2) for name in names}
        if group().is_main:
            (folder / "found.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
