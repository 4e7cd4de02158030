"""Section: a 70B-shaped Llama streamed from disk through one GPU.

A few blocks of the shape are written, each in a file of its own, and one walk over them is timed:
with the files dropped from the page cache before, and again with them in it. A block of the whole
model takes as long as these do, so the time of its walks is that of a block times 80.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from perf_core import Run, Shape, Size, byte_tokenizer, llama_config

import sleb
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.resources import default_batch
from sleb.selection.sweep import Sweep

__all__ = ["stream"]


def stream(run: Run, row: dict[str, Any], shape: Shape, disk: Path | None, size: Size) -> None:
    """One walk of sets of one removed block over some windows."""
    folder, blocks = Path(tempfile.mkdtemp(prefix="sleb-70b-", dir=disk)), size.stream_blocks
    need = 2 * (blocks * shape.block_parameters + 2 * shape.width * shape.vocab)
    free = shutil.disk_usage(folder).free
    row |= {"blocks_on_disk": blocks, "blocks_of_the_shape": shape.blocks, "bytes": need}
    if free < 1.1 * need:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are needed")
    try:
        started = time.perf_counter()
        files = _write(shape, folder, blocks, run.device)
        row["write_seconds"] = round(time.perf_counter() - started, 2)
        _walks(run, row, shape, folder, files, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _walks(
    run: Run,
    row: dict[str, Any],
    shape: Shape,
    folder: Path,
    files: list[Path],
    size: Size,
) -> None:
    blocks, windows, length = size.stream_blocks, size.stream_windows, size.length
    block_bytes = sum(f.stat().st_size for f in files) / blocks
    row["block_gb"] = round(block_bytes / 1e9, 4)
    row["disk_gb_per_s"] = round(_read(files[:4], cold=True) / 1e9, 2)
    row["page_cache_gb_per_s"] = round(_read(files[:4], cold=False) / 1e9, 2)
    model = sleb.load(folder, dtype="bfloat16", device=str(run.device), stream=True)
    assert model.stack.streamed
    ids = torch.randint(0, shape.vocab, (windows, length))
    sets = [DENSE, *(BlockSet([b]) for b in range(1, 1 + size.stream_candidates))]
    Sweep(model.stack, ids, NLL, batch=1).values(sets[:1], 0, 1)  # checks the model once
    forwards = 0
    for name, cold in (("from_disk", True), ("from_page_cache", False)):
        run.check(20 if run.device.type == "cuda" else 0)
        if cold:
            for f in files:
                _drop(f)
        else:
            _read(files, cold=False)
        # the batch that all 80 blocks would get
        whole = max(1, default_batch(model.stack, length) * blocks // shape.blocks)
        sweep = Sweep(model.stack, ids, NLL, batch=whole)
        step = sweep.step(len(sets))
        _, seconds, memory = run.measured(lambda s=sweep: s.values(sets, 0, windows))
        forwards = sweep.forwards
        walks = -(-windows // step)
        row[name] = {
            "seconds": round(seconds, 2),
            "walks": walks,
            "reads": walks,  # of every block
            "block_forwards": forwards,
            "block_seconds": round(seconds / blocks / walks, 3),
            "memory": memory,
        }
    row["sets"], row["windows"], row["length"] = len(sets), windows, length
    # what the same work takes with a block in place
    stack, i = model.stack, blocks // 2
    few = ids[: max(1, min(windows, 8192 // length))]
    with torch.inference_mode(), stack.holding(i):
        hidden, calls = stack.enter(few)
        stack.run(i, hidden, calls[i])
        _, seconds = run.timed(lambda: [stack.run(i, hidden, calls[i]) for _ in range(4)])
    per = seconds / 4 / len(few)
    flops = shape.block_flops(length)
    compute = forwards * per
    row["compute"] = {
        "window_block_ms": round(1e3 * per, 3),
        "tflops": round(flops / per / 1e12, 1),
        "walk_seconds": round(compute, 2),
    }


def _write(shape: Shape, folder: Path, blocks: int, device: torch.device) -> list[Path]:
    """A checkpoint of so many blocks with random weights, one block to a file."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = llama_config(shape, blocks)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in names.items():
        bits = name.split(".")
        part = f"block-{int(bits[2]):03d}" if bits[1] == "layers" else "rest"
        parts.setdefault(part, {})[name] = size
    index: dict[str, str] = {}
    for part, sizes in parts.items():
        tensors = {}
        for name, size in sizes.items():
            if len(size) == 1:
                tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            else:
                drawn = torch.empty(size, dtype=torch.bfloat16, device=device)
                tensors[name] = drawn.normal_(std=0.02).cpu()
        save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(sizes, f"{part}.safetensors")
    total = sum(2 * torch.Size(s).numel() for s in names.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    byte_tokenizer(folder, shape.vocab)
    return sorted(folder.glob("block-*.safetensors"))


def _drop(path: Path) -> None:
    """Out of the page cache, so that the next read is the disk's."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(files: list[Path], *, cold: bool) -> float:
    """Bytes/s of plain reads, 16 MiB at a time."""
    if cold:
        for f in files:
            _drop(f)
    buffer = memoryview(bytearray(2**24))
    total, started = 0, time.perf_counter()
    for f in files:
        with open(f, "rb", buffering=0) as source:
            while got := source.readinto(buffer):
                total += got
    return total / (time.perf_counter() - started)
