"""Time, memory and TFLOP/s of search, repair, prompt and generation on one GPU, in one call.

    python benchmarks/performance.py -o benchmarks/results/performance.json --model MODEL
    python benchmarks/performance.py --shape tiny -o tiny.json      # every path, on a CPU
    python benchmarks/performance.py --render benchmarks/results/{performance,end-to-end}*.json

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
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Run, setting
from latency import latency
from pages import render
from race_model import SPREAD, Losses, Spread, exact_work
from shapes import FULL, SHAPES, TINY, Shape, Size, random_llama, shape_of, write_random

import sleb
from sleb.calibration.split import CalibrationSplit
from sleb.core.process_group import group, joined
from sleb.models.compiled import CompiledStack
from sleb.models.stack import BlockStack
from sleb.repairs import RIDGES, given_tokens
from sleb.repairs import repair as fit_repair
from sleb.repairs.regression import Regression, gaps
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet, Call, Objective
from sleb.selection.resources import default_batch
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep, distribute

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # to compile takes what it does at first

Row = dict[str, Any]


class Models:
    """One random model at a time, made when a section first needs it."""

    def __init__(self, run: Run) -> None:
        self.run, self.name, self.stack = run, "", None

    def of(self, name: str, shape: Shape) -> BlockStack:
        if self.name != name or self.stack is None:
            self.close()
            self.name, self.stack = name, BlockStack(random_llama(shape, self.run.device))
        return self.stack

    def close(self) -> None:
        self.name, self.stack = "", None
        self.run.free()


# -- sections ------------------------------------------------------------------------------------


def machine(run: Run, row: Row) -> None:
    """A large matrix product, copies within the device, and copies to it."""
    cuda = run.device.type == "cuda"
    n = 8192 if cuda else 512
    a, b = (torch.randn((n, n), device=run.device, dtype=torch.bfloat16) for _ in range(2))
    # long enough that the clock settles where sustained work leaves it
    times = run.seconds(partial(torch.mm, a, b), inner=50 if cuda else 2)
    row["matmul_n"] = n
    row["matmul_tflops"] = round(2 * n**3 / float(np.median(times)) / 1e12, 2)
    size = 2**30 if cuda else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = min(run.seconds(lambda: target.copy_(source)))
    row["copy_gb_per_s"] = round(2 * size / seconds / 1e9, 1)  # read and written
    if cuda:
        for name, host in (
            ("pinned", torch.empty(size, dtype=torch.uint8, pin_memory=True)),
            ("pageable", torch.empty(size, dtype=torch.uint8).fill_(1)),
        ):
            copy = partial(target.copy_, host, non_blocking=name == "pinned")
            row[f"{name}_to_device_gb_per_s"] = round(size / min(run.seconds(copy)) / 1e9, 2)


@torch.inference_mode()
def block(run: Run, row: Row, stack: BlockStack, shape: Shape, length: int) -> None:
    """Where one block's time goes: batches of several sizes, its products and its attention alone,
    and the head with the loss."""
    i, flops, usual = len(stack) // 2, shape.block_flops(length), default_batch(stack, length)
    row |= {"default_batch": usual, "windows": {}}
    ids = torch.randint(0, shape.vocab, (2 * usual, length))

    def rate(work: Callable[[], Any], flops: float) -> dict[str, float]:
        seconds = min(run.seconds(work, inner=4 if run.device.type == "cuda" else 1))
        return {"ms": round(1e3 * seconds, 3), "tflops": round(flops / seconds / 1e12, 1)}

    for batch in sorted({1, max(1, usual // 2), usual, 2 * usual}):
        hidden, calls = stack.enter(ids[:batch])
        row["windows"][str(batch)] = rate(partial(stack.run, i, hidden, calls[i]), batch * flops)
    fused = CompiledStack(stack.model, usual)
    row["compiled"] = {"compile_seconds": round(_compile(run, fused, ids[:usual]), 2)}
    hidden, calls = stack.enter(ids[:usual])
    row["compiled"] |= rate(partial(fused.run, i, hidden, calls[i]), usual * flops)
    eager, compiled = stack.run(i, hidden, calls[i]), fused.run(i, hidden, calls[i])
    row["compiled"]["largest_difference"] = (eager - compiled).abs().max().item()
    products, attention = _parts(stack, shape, hidden)
    work = usual * (2 * shape.block_parameters * length)
    row["products"] = rate(products, work)
    row["attention"] = rate(attention, usual * flops - work)
    sweep = Sweep(stack, ids[:usual], NLL, batch=usual)
    head = partial(sweep._score, hidden, None, ids[:usual])
    row["head_and_loss"] = rate(head, usual * shape.head_flops(length))


def _parts(
    stack: BlockStack, shape: Shape, hidden: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The linear layers of a block on inputs of their width, and its attention, alone."""
    linear = [m for m in stack.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    wide = hidden.new_empty((*hidden.shape[:2], shape.inner)).normal_()

    def products() -> None:
        for layer in linear:
            layer(wide if layer.in_features == shape.inner else hidden)

    size = shape.width // shape.heads
    q = hidden.new_empty((len(hidden), shape.heads, hidden.shape[1], size)).normal_()
    k = hidden.new_empty((len(hidden), shape.kv_heads, hidden.shape[1], size)).normal_()
    scaled = torch.nn.functional.scaled_dot_product_attention
    many = shape.heads != shape.kv_heads
    return products, partial(scaled, q, k, k, is_causal=True, enable_gqa=many)


def _compile(run: Run, stack: BlockStack, ids: torch.Tensor) -> float:
    """Seconds of the first full batch through a block, which compiles it."""
    hidden, calls = stack.enter(ids)
    return run.timed(lambda: stack.run(1, hidden, calls[1]))[1]


def search(
    run: Run,
    row: Row,
    stack: BlockStack,
    shape: Shape,
    ids: torch.Tensor,
    remove: int,
    *,
    exact: bool = False,
    rounds: int | None = None,
    spread: Spread | None = None,
    compiled: bool = False,
) -> None:
    """A search as ``sleb search`` runs it: Sweep, Objective, greedy. ``seconds`` are
    without those that compiling took.

    With ``spread`` the model is scored, and the race is told losses drawn from it instead: random
    weights make all blocks alike. With ``rounds`` only so many rounds are run, and ``row`` says how
    the rest was extrapolated.
    """
    n, length = len(stack), ids.shape[1]
    candidates = list(range(1, n - 1))
    batch = default_batch(stack, length)
    if compiled:
        torch.compiler.reset()  # else another section's graphs are used
        stack = CompiledStack(stack.model, batch)
        few = ids.repeat(-(-batch // len(ids)), 1)[:batch]
        row["compile_seconds"] = round(_compile(run, stack, few), 2)
    sweep = Sweep(stack, ids, NLL, batch=batch)
    drawn = Losses(spread, n, len(ids)) if spread else None
    units = 0  # block forwards and heads of all processes

    def count(done: int) -> None:
        nonlocal units
        units += done

    def told(calls: Sequence[Call]) -> Iterator[tuple[Call, Any]]:
        for call, found in distribute(sweep, calls):
            yield call, found if drawn is None else drawn(*call)

    sweep.on_work(count)
    scorer = replace(sweep.scorer, distribute=told, on_work=lambda tick: None)
    objective = Objective(scorer, len(ids), exact=exact)
    found, seconds, memory = run.measured(
        lambda: STRATEGIES["greedy"](objective, candidates, rounds or remove)
    )
    heads = units // group().size - sweep.forwards
    flops = sweep.forwards * shape.block_flops(length) + heads * shape.head_flops(length)
    row |= {
        "blocks": n,
        "windows": len(ids),
        "length": length,
        "removed": remove,
        "batch": batch,
        "exact": exact,
        "compiled": compiled,
        "race_decided_by": "losses drawn from a real model's spread" if drawn else "own losses",
        "order": list(found.order),
        "seconds": round(seconds, 2),
        "block_forwards": sweep.forwards,
        "heads": heads,
        "petaflop": round(flops / 1e15, 3),
        "tflops": round(flops / seconds / 1e12, 2),
        "share_of_matmul": round(flops / seconds / 1e12 / run.matmul, 3) if run.matmul else None,
        "memory": memory,
    }
    if rounds and rounds < remove:
        work = [sum(round_) for round_ in exact_work(n, remove)]
        row["extrapolated_seconds"] = round(seconds * sum(work) / sum(work[:rounds]), 1)
        row["extrapolated_by"] = (
            f"{rounds} of {remove} rounds on {len(ids)} windows; "
            "the rest by block forwards and heads"
        )


def repair(
    run: Run, row: Row, stack: BlockStack, removed: Sequence[int], size: Size, vocab: int
) -> None:
    """The fit of every gap of a cut as ``sleb prune`` makes it, and the loss on 16 held-out windows
    after each. Every first fit is accepted: of random weights the loss tells nothing."""
    ids = torch.randint(0, vocab, (-(-size.repair_tokens // size.length), size.length))
    aside = torch.randint(0, vocab, (16 if run.device.type == "cuda" else 2, size.length))
    sweep = Sweep(stack, aside, NLL)
    cut = gaps(removed, len(stack))

    def accept() -> bool:
        sweep.values([BlockSet(removed)], 0, len(aside))
        return True

    def fit() -> None:
        fitter = Regression(
            stack, removed, ids, sweep.batch, rounded=lambda b, p, new: new.to(stack.dtype)
        )
        try:
            for gap in cut:
                fitter.fit(gap, RIDGES, accept)
        finally:
            fitter.restore()

    _, seconds, memory = run.measured(fit)
    row |= {
        "removed": list(removed),
        "gaps": [{"removed": list(g.removed), "fitted_blocks": list(g.blocks)} for g in cut],
        "tokens": ids.numel(),
        "seconds": round(seconds, 2),
        "memory": memory,
    }


def real(run: Run, row: Row, path: Path, size: Size) -> None:
    """Losses, plans and repairs are of the model itself; texts are the built-in ones."""
    windows, length, remove = size.real
    cuda = run.device.type == "cuda"
    model = sleb.load(path, device=str(run.device))
    shape = shape_of(model.stack.model.config)
    row |= {"model": path.name, "blocks": len(model.stack), "dtype": model.dtype, "searches": {}}
    split = CalibrationSplit.of(
        model.tokenizer, (), windows=windows, length=length, seed=0, heldout=16
    )
    ids = split.search.ids
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    kinds = [("exact, states kept", True, False), ("racing", False, False)]
    for name, exact, compiling in [*kinds, *([("racing, compiled", False, True)] * cuda)]:
        found = row["searches"][name] = {}
        search(run, found, model.stack, shape, ids, remove, exact=exact, compiled=compiling)
        run.write()
    order = row["searches"]["racing"]["order"]
    row["same_order"] = order == row["searches"]["exact, states kept"]["order"]
    split = split.with_repair(given_tokens(model.stack, size.repair_tokens))
    fitted, judged = split.repair_fit, split.repair_validation
    fixed, seconds, memory = run.measured(lambda: fit_repair(model, order, fitted, judged))
    row["repair"] = {
        "removed": order,
        "tokens": fitted.ids.numel(),
        "seconds": round(seconds, 2),
        "memory": memory,
        "gaps": [
            {"removed": list(g.removed), "ridge": g.ridge, "before": g.before, "after": g.after}
            for g in fixed.record.gaps
        ],
    }
    run.write()
    row["speed"] = {}
    several = (1, 64) if cuda else (1,)
    latency(run, row["speed"], model.stack.model, shape.vocab, size, size.batches, several)


def stream(run: Run, row: Row, shape: Shape, disk: Path | None, size: Size) -> None:
    """A few blocks of a shape streamed from disk, each in a file of its own: one walk of sets of
    one removed block over some windows, with the files dropped from the page cache before, and
    again with them in it. A block of the whole model takes as long as these do."""
    blocks, windows, length = size.stream_blocks, size.stream_windows, size.length
    need = 2 * (blocks * shape.block_parameters + 2 * shape.width * shape.vocab)
    with tempfile.TemporaryDirectory(prefix="sleb-stream-", dir=disk) as place:
        folder = Path(place)
        if (free := shutil.disk_usage(folder).free) < 1.1 * need:
            raise OSError(f"{folder} has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed")
        files = write_random(shape, folder, blocks, run.device)
        row |= {
            "blocks_on_disk": blocks,
            "blocks_of_the_shape": shape.blocks,
            "block_gb": round(sum(f.stat().st_size for f in files) / blocks / 1e9, 4),
            "disk_gb_per_s": round(_read(run, files[:4], cold=True), 2),
            "page_cache_gb_per_s": round(_read(run, files[:4]), 2),
        }
        stack = sleb.load(folder, dtype="bfloat16", device=str(run.device), stream=True).stack
        assert stack.streamed
        ids = torch.randint(0, shape.vocab, (windows, length))
        sets = [DENSE, *(BlockSet([b]) for b in range(1, 1 + size.stream_candidates))]
        row |= {"sets": len(sets), "windows": windows, "length": length}
        Sweep(stack, ids, NLL, batch=1).values(sets[:1], 0, 1)  # checks the model once
        # the batch that all blocks of the shape would get
        whole = max(1, default_batch(stack, length) * blocks // shape.blocks)
        for name, cold in (("from_disk", True), ("from_page_cache", False)):
            _read(run, files)
            if cold:
                _drop(files)
            sweep = Sweep(stack, ids, NLL, batch=whole)
            walks = -(-windows // sweep.step(len(sets)))
            _, seconds, memory = run.measured(partial(sweep.values, sets, 0, windows))
            row[name] = {
                "seconds": round(seconds, 2),
                "walks": walks,
                "reads": walks,  # of every block
                "block_forwards": sweep.forwards,
                "memory": memory,
            }
        # what the same work takes with a block in place
        few, i = ids[: max(1, min(windows, 8192 // length))], blocks // 2
        with torch.inference_mode(), stack.holding(i):
            hidden, calls = stack.enter(few)
            per = min(run.seconds(partial(stack.run, i, hidden, calls[i]), inner=4)) / len(few)
        row["compute"] = {
            "window_block_ms": round(1e3 * per, 3),
            "tflops": round(shape.block_flops(length) / per / 1e12, 1),
            "walk_seconds": round(sweep.forwards * per, 2),
        }


def _drop(files: Sequence[Path]) -> None:
    """Out of the page cache, so that the next read is the disk's."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(run: Run, files: Sequence[Path], *, cold: bool = False) -> float:
    """GB/s of plain reads, 16 MiB at a time."""
    if cold:
        _drop(files)
    buffer = memoryview(bytearray(2**24))

    def read() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass

    return sum(path.stat().st_size for path in files) / run.timed(read)[1] / 1e9


def ranks_section(run: Run, row: Row, models: Models, ranks: int, shape: str) -> None:
    """The 7b search in several processes, against that of one in this call."""
    models.close()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), str(Path(__file__).resolve())]
        command += ["--sections", "7b.search", "--shape", shape, "-o", str(out)]
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


# -- the run -------------------------------------------------------------------------------------

Section = tuple[Callable[[Row], None], float]
"""What to do, and about how many seconds of an H100 it takes."""


def shape_sections(
    run: Run, models: Models, name: str, shape: Shape, remove: int, size: Size
) -> dict[str, Section]:
    """Sections of a random Llama."""
    ids = torch.randint(
        0, shape.vocab, (size.windows, size.length), generator=torch.Generator().manual_seed(0)
    )
    scale = shape.block_parameters * shape.blocks / SHAPES["7b"].block_parameters / 32

    def searched(row: Row, windows: int | None = None, **options: Any) -> None:
        stack = models.of(name, shape)
        spread = None if options.get("exact") else Spread.read(SPREAD, size.length)
        row["weights_gb"] = round(sum(p.nbytes for p in stack.model.parameters()) / 1e9, 3)
        search(run, row, stack, shape, ids[:windows], remove, spread=spread, **options)

    def repaired(row: Row) -> None:
        order = run.results["sections"].get(f"{name}.search", {}).get("order")
        removed = order or list(range(shape.blocks // 2, shape.blocks // 2 + remove))
        repair(run, row, models.of(name, shape), removed, size, shape.vocab)

    def fast(row: Row) -> None:
        large = name != "7b" and shape.blocks > 8
        some, few = (size.batches[:2], size.batches[:1]) if large else (size.batches,) * 2
        latency(run, row, models.of(name, shape).model, shape.vocab, size, some, few)

    return {
        f"{name}.search": (searched, 60 * scale),
        f"{name}.block": (
            lambda row: block(run, row, models.of(name, shape), shape, size.length),
            8,
        ),
        f"{name}.compiled": (partial(searched, compiled=True), 70 * scale),
        f"{name}.exact": (
            partial(searched, exact=True, rounds=1, windows=size.exact_windows),
            20 * scale,
        ),
        f"{name}.repair": (repaired, 15 * scale),
        f"{name}.speed": (fast, 30),
    }


def measure(options: argparse.Namespace) -> None:
    """Run the sections that ``options`` ask for."""
    device, tiny = torch.device(options.device), options.shape == "tiny"
    size = TINY if tiny else FULL
    cuda = device.type == "cuda"
    about = {
        **setting(device, torch.bfloat16),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "shape": options.shape,
        "size": dataclasses.asdict(size),
        **({"note": options.note} if options.note else {}),
    }
    run = Run(options.out, options.budget, device, about)
    models = Models(run)
    shapes = {name: SHAPES["tiny" if tiny else name] for name in ("7b", "13b", "70b")}
    planned: dict[str, Section] = {"machine": (partial(machine, run), 10)}
    planned |= shape_sections(run, models, "7b", shapes["7b"], 2 if tiny else 6, size)
    for n in options.ranks:
        work = partial(ranks_section, run, models=models, ranks=n, shape=options.shape)
        planned[f"ranks.{n}"] = (work, 100)
    if options.model:
        planned["real"] = (partial(real, run, path=options.model, size=size), 45)
    planned |= shape_sections(run, models, "13b", shapes["13b"], 3 if tiny else 8, size)
    work = partial(stream, run, shape=shapes["70b"], disk=options.disk, size=size)
    planned["70b.stream"] = (work, 60)
    wanted, unwanted = (
        tuple(part.strip() for part in text.split(",") if part.strip())
        for text in (options.sections, options.skip)
    )
    for name, (work, need) in planned.items():
        if (not wanted or name.startswith(wanted)) and not (unwanted and name.startswith(unwanted)):
            if not name.startswith(models.name or name):
                models.close()
            run.section(name, work, 0 if tiny else need)
    models.close()


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


if __name__ == "__main__":
    main()
