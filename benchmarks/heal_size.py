"""How long a step of healing takes at a model's size, and how much memory, on random weights.

    python benchmarks/heal_size.py --shape 7b -o out.json

For each way to train (the optimizers of `sleb heal`, ``lora``, and with ``+recompute`` these with
activations that are computed again) a Llama of that shape without a quarter of its blocks takes
steps of ``--batch`` windows towards the whole one, in bfloat16. What does not fit is an error in
its row. Losses mean nothing; time and memory are those of a real model.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from common import asked, main_of, save, setting
from shapes import SHAPES, random_llama, shortened

from sleb.calibration.windows import Windows, digest, written_source
from sleb.config import HEAL_AT_ONCE, HEAL_BATCH
from sleb.core.plan import Calibration
from sleb.core.progress import silent
from sleb.distillation.computing import forwards, product_teraflops, recomputed
from sleb.distillation.loss import SplitModel
from sleb.distillation.mix import TEXTS, Mix
from sleb.distillation.state import Schedule
from sleb.distillation.student import Student
from sleb.distillation.training import Training

RANK = 16
WAYS = ("adamw", "adamw-host", "adamw-8bit", "adamw-8bit+recompute", "lora", "adamw+recompute")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--batch", type=int, default=HEAL_BATCH, help="windows of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="blocks run compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def random_windows(n: int, length: int, vocabulary: int, seed: int) -> Windows:
    ids = torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    source = written_source("random", ids, ids.numel())
    record = Calibration(sources=(source,), windows=n, length=length, seed=seed, sha256=digest(ids))
    return Windows(ids=ids, source=(0,) * n, names=("random",), record=record)


def student_of(dense: Any, removed: frozenset[int], rank: int | None, how: Any) -> Student:
    """Of a cut whose blocks have weights of their own."""
    model = shortened(dense, removed)
    for parameter in model.model.layers.parameters():
        parameter.data = parameter.data.clone()
    state = model.state_dict()
    forms = {n: SimpleNamespace(dtype="BF16", shape=tuple(t.shape)) for n, t in state.items()}
    stored: Any = SimpleNamespace(tensors=forms, path="random weights", tensor=state.__getitem__)
    return Student(model, stored, rank=rank, seed=0, optimizer=how)


def measured(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """Steps of one way."""
    shape, device = SHAPES[options.shape], torch.device(options.device)
    kind, _, again = way.partition("+")
    rank = RANK if kind == "lora" else None
    optimizer = "adamw" if kind == "lora" else kind
    dense = random_llama(shape, device)
    blocks = shape.blocks
    removed = frozenset(range(blocks // 2, blocks // 2 + blocks // 4))
    student = student_of(dense, removed, rank, optimizer)
    n, length = options.batch, options.length
    windows = [random_windows(size, length, shape.vocab, n) for size in (n * options.steps, 4)]
    training = Training(
        student=student,
        split=SplitModel(student.model),
        teacher=SplitModel(dense),
        mix=Mix(kinds={TEXTS: windows[0]}, tokens=n * length, total=windows[0].ids.numel(), seed=0),
        at_once=max(length, HEAL_AT_ONCE[device.type]),
        validation={TEXTS: windows[1]},
        schedule=Schedule(steps=options.steps),
        lr=1e-5,
        settings={"optimizer": optimizer},
        path=folder / "state",
    )
    seconds, step = [], training._step

    def timed(*args: Any) -> bool:
        begun = time.perf_counter()
        done = step(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        return done

    training._step = timed  # type: ignore[method-assign]
    stacks = [training.split.stack] if again else []
    with forwards(stacks, recomputed), patch.object(Training, "compiling", options.compile):
        training.run(1e9, silent)
    each = statistics.median(seconds[len(seconds) // 2 :])  # memory and kernels are there by then
    row = {
        "parameters": sum(p.numel() for p in dense.parameters()),
        "trained": student.count,
        "blocks": blocks - len(removed),
        "step_seconds": round(each, 4),
        "tokens_per_second": round(n * length / each),
        "teraflops": round(training.step_operations / each / 1e12, 2),
        "pass_tokens": training.at_once,
        "compiled": training.compiled,
    }
    if device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    report: dict[str, Any] = {
        "what": asked(options, "out", "device"),
        **setting(device, torch.bfloat16),
        "product_teraflops": round(product_teraflops(device, torch.bfloat16), 1),
        "ways": {},
    }
    for way in options.ways.split(","):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            try:
                report["ways"][way] = measured(options, way, Path(folder))
            except torch.OutOfMemoryError as error:
                report["ways"][way] = {"error": str(error).partition("\n")[0][:200]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        save(options.out, report)
        print(way, report["ways"][way], flush=True)


if __name__ == "__main__":
    main_of(main)
