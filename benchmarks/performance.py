"""Time, memory and TFLOP/s of search, repair, prompt and generation on one GPU, in one call.

    python benchmarks/performance.py -o benchmarks/results/performance.json --model MODEL
    python benchmarks/performance.py --shape tiny -o /tmp/tiny.json      # every path, on a CPU
    python benchmarks/performance.py --render benchmarks/results/performance*.json

Sections, most important first; ``--sections 7b,real`` runs those whose names begin so:

    machine      a large matrix product, memory bandwidth, copies to the device
    7b.search    6 of 32 blocks, 128 windows of 2048 tokens, by racing
    7b.block     where the time of one block goes
    7b.compiled  the same search with compiled blocks and loss
    7b.exact     one exact round on 16 windows, extrapolated
    7b.repair    the repair of a cut of 6 blocks on 100,000 tokens
    7b.speed     prompt and generation, dense against 10 and 20 % fewer blocks
    real         MODEL, a small model with real weights: all of the above
    13b.*        the same at the 13B shape, 8 of 40 blocks
    70b.stream   blocks of the 70B shape streamed from disk: one walk
    ranks.2      with --ranks 2: the 7b search under torchrun; likewise for other numbers

Weights of the shapes are random, so their figures are of time and memory only. Random blocks are
all alike and a race among them would drop none: the model is scored for its time, and the race is
told losses drawn from the spread measured on SmolLM2 (``race_model.py``). A section that fails is
recorded and the next one runs; results are written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import perf_search
import torch
from pages import render
from perf_core import FULL, SHAPES, TINY, Run, Shape, Size, random_llama
from perf_speed import speed
from perf_stream import stream
from race_model import Spread

from sleb.core.process_group import joined
from sleb.models.stack import BlockStack

HERE = Path(__file__).resolve().parent
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # to compile takes what it does at first
SPREAD = HERE / "results" / "spread-smollm2.json"


class Models:
    """One random model at a time, made when a section first needs it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name, self.stack = "", None

    def of(self, name: str, shape: Shape) -> BlockStack:
        if self.name != name or self.stack is None:
            self.close()
            self.stack = BlockStack(random_llama(shape, self.run.device))
            self.name = name
        return self.stack

    def close(self) -> None:
        self.name, self.stack = "", None
        self.run.free()


def shape_sections(
    run: Run, models: Models, name: str, shape: Shape, remove: int, size: Size
) -> dict[str, tuple[Callable[[dict[str, Any]], None], float]]:
    """Sections of a random Llama: what to do, and about how many seconds of an H100 it takes."""
    ids = torch.randint(
        0, shape.vocab, (size.windows, size.length), generator=torch.Generator().manual_seed(0)
    )
    scale = shape.block_parameters * shape.blocks / SHAPES["7b"].block_parameters / 32

    def search(row: dict[str, Any], **options: Any) -> None:
        stack = models.of(name, shape)
        spread = None if options.get("exact") else Spread.read(SPREAD, size.length)
        windows = ids[: options.pop("windows", None)]
        row["weights_gb"] = round(sum(p.nbytes for p in stack.model.parameters()) / 1e9, 3)
        perf_search.search(run, row, stack, shape, windows, remove, spread=spread, **options)

    def exact(row: dict[str, Any]) -> None:
        search(row, exact=True, rounds=1, windows=size.exact_windows)

    def repair(row: dict[str, Any]) -> None:
        order = run.results["sections"].get(f"{name}.search", {}).get("order")
        removed = order or list(range(shape.blocks // 2, shape.blocks // 2 + remove))
        stack = models.of(name, shape)
        perf_search.repair(run, row, stack, removed, size.repair_tokens, size.length, shape.vocab)

    def fast(row: dict[str, Any]) -> None:
        large = name != "7b" and shape.blocks > 8
        speed(
            run,
            row,
            models.of(name, shape).model,
            vocab=shape.vocab,
            prompt=size.prompt,
            start=size.start,
            new_tokens=size.new_tokens,
            batches=size.batches[:2] if large else size.batches,
            generate=size.batches[:1] if large else size.batches,
        )

    def block(row: dict[str, Any]) -> None:
        perf_search.block(run, row, models.of(name, shape), shape, size.length)

    return {
        f"{name}.search": (search, 60 * scale),
        f"{name}.block": (block, 8),
        f"{name}.compiled": (lambda row: search(row, compiled=True), 70 * scale),
        f"{name}.exact": (exact, 20 * scale),
        f"{name}.repair": (repair, 15 * scale),
        f"{name}.speed": (fast, 30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--render", type=Path, nargs="*", help="results to print as a page")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full")
    parser.add_argument("--sections", default="", help="names or their beginnings, with commas")
    parser.add_argument("--skip", default="", help="likewise, of sections not to run")
    parser.add_argument("--model", type=Path, help="folder of a small real model")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--note", default="", help="what else to say of the conditions")
    parser.add_argument("--disk", type=Path, help="folder for the streamed model's files")
    options = parser.parse_args()
    if options.render is not None:
        print(render(options.render), end="")
        return
    if options.out is None:
        parser.error("give -o FILE")
    with joined() as here:
        if here.several and options.device == "cuda":
            options.device = f"cuda:{here.local_rank}"
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Run the sections that ``options`` ask for."""
    device = torch.device(options.device)
    tiny = options.shape == "tiny"
    size = TINY if tiny else FULL
    setting = about(device, options.shape, size)
    if options.note:
        setting["note"] = options.note
    run = Run(options.out, options.budget, device, setting)
    models = Models(run)
    shapes = {name: SHAPES["tiny" if tiny else name] for name in ("7b", "13b", "70b")}

    planned: dict[str, tuple[Callable[[dict[str, Any]], None], float]] = {
        "machine": (lambda row: perf_search.machine(run, row), 10),
    }
    planned |= shape_sections(run, models, "7b", shapes["7b"], 2 if tiny else 6, size)
    for n in options.ranks:
        planned[f"ranks.{n}"] = (
            lambda row, n=n: ranks_section(run, row, models, n, options),
            100,
        )
    if options.model:
        planned["real"] = (lambda row: perf_search.real(run, row, options.model, size), 45)
    planned |= shape_sections(run, models, "13b", shapes["13b"], 3 if tiny else 8, size)
    planned["70b.stream"] = (
        lambda row: stream(run, row, shapes["70b"], options.disk, size),
        60,
    )
    wanted, unwanted = _names(options.sections), _names(options.skip)
    for name, (work, need) in planned.items():
        if (not wanted or name.startswith(wanted)) and not (unwanted and name.startswith(unwanted)):
            if not name.startswith(models.name or name):
                models.close()
            run.section(name, work, 0 if tiny else need)
    models.close()


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def about(device: torch.device, shape: str, size: Size) -> dict[str, Any]:
    """Where and with what this ran."""
    cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        if cuda
        else None,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "shape": shape,
        "size": dataclasses.asdict(size),
        "dtype": "bfloat16",
    }


def ranks_section(
    run: Run, row: dict[str, Any], models: Models, ranks: int, options: argparse.Namespace
) -> None:
    """The 7b search in several processes, against that of one in this call."""
    models.close()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), str(Path(__file__).resolve())]
        command += ["--sections", "7b.search", "--shape", options.shape, "-o", str(out)]
        command += ["--device", run.device.type, "--budget", str(run.left)]
        row["command"] = f"torchrun --nproc-per-node {ranks} benchmarks/performance.py ..."
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, run.left), check=False
        )
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr[-1500:]}")
        found = json.loads(out.read_text())["sections"]["7b.search"]
    alone = run.results["sections"].get("7b.search", {})
    row |= {"ranks": ranks, **found}
    if "order" in alone and "order" in found:
        row["same_order_as_one"] = alone["order"] == found["order"]
        row["speedup"] = round(alone["seconds"] / found["seconds"], 3)
        row["efficiency"] = round(alone["seconds"] / found["seconds"] / ranks, 3)


if __name__ == "__main__":
    main()
