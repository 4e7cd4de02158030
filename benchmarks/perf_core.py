"""What sections of the performance benchmark stand on: the run with its clock, memory and budget,
and Llamas of known shapes with random weights, and the exact work of their parts.

Random weights: times and memory are those of a real model, losses mean nothing.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import save

from sleb.core.process_group import group

__all__ = [
    "FULL",
    "SHAPES",
    "TINY",
    "OutOfTime",
    "Run",
    "Shape",
    "Size",
    "best_seconds",
    "byte_tokenizer",
    "random_llama",
    "shape_of",
    "shortened",
]


class OutOfTime(Exception):
    """A section has used up the time that was left."""


class Run:
    """One call of the benchmark: its device, its end, and its results, written after each section.

    A section that fails is recorded with its error, and the next one runs.
    """

    def __init__(self, out: Path, budget: float, device: torch.device, about: dict[str, Any]):
        self.out, self.device = out, device
        self.started = time.perf_counter()
        self.budget = budget
        self.results: dict[str, Any] = {"about": about, "sections": {}}

    @property
    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget - (time.perf_counter() - self.started)

    @property
    def matmul(self) -> float | None:
        """TFLOP/s of a large matrix product, where that section has run."""
        found: float | None = self.results["sections"].get("machine", {}).get("matmul_tflops")
        return found

    def check(self, need: float = 0.0) -> None:
        """Raise OutOfTime if less than ``need`` seconds are left."""
        if self.left < need:
            raise OutOfTime(f"{self.left:.0f} s left, {need:.0f} s needed")

    def section(self, name: str, work: Callable[[dict[str, Any]], None], need: float) -> None:
        """Run ``work``, which fills a dict as it goes, if ``need`` seconds are left."""
        row: dict[str, Any] = {}
        self.results["sections"][name] = row
        started = time.perf_counter()
        if self.left < need:
            row["skipped"] = f"{self.left:.0f} s of the budget left, about {need:.0f} s needed"
        else:
            try:
                work(row)
            except OutOfTime as error:
                row["stopped"] = str(error)
            except Exception as error:  # of any type: the next section must run
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                row["traceback"] = traceback.format_exc()[-4000:]
        row["section_seconds"] = round(time.perf_counter() - started, 2)
        self.write()
        self.free()
        if not group().is_main:
            return
        shown = {k: v for k, v in row.items() if not isinstance(v, list) or len(v) < 8}
        print(f"[{self.left:.0f} s left] {name}: {json.dumps(shown)[:1500]}", flush=True)

    def write(self) -> None:
        if not group().is_main:
            return
        save(self.out, self.results)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds, the device's work included."""
        self.sync()
        start = time.perf_counter()
        result = work()
        self.sync()
        return result, time.perf_counter() - start

    def measured(self, work: Callable[[], Any]) -> tuple[Any, float, dict[str, float]]:
        """Result, seconds, and on a GPU the allocator's peak in GB, in all and above what was held
        before."""
        if self.device.type != "cuda":
            return *self.timed(work), {}
        self.free()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result, seconds = self.timed(work)
        peak = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
        return (
            result,
            seconds,
            {
                "held_before_gb": round(held / 1e9, 3),
                "peak_gb": round(peak / 1e9, 3),
                "peak_over_held_gb": round((peak - held) / 1e9, 3),
                "reserved_peak_gb": round(reserved / 1e9, 3),
            },
        )


def best_seconds(run: Run, work: Callable[[], Any], *, repeats: int = 5, inner: int = 1) -> float:
    """Seconds of one call: the best of ``repeats`` timings of ``inner`` calls, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        _, seconds = run.timed(lambda: [work() for _ in range(inner)])
        times.append(seconds / inner)
    return min(times)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama. ``kv_heads`` < ``heads`` is grouped attention."""

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def block_parameters(self) -> int:
        """Of the matrices of one block; norms are left out, their work is not in products."""
        kv = self.width // self.heads * self.kv_heads
        return 2 * self.width * (self.width + kv) + 3 * self.width * self.inner

    def block_flops(self, tokens: int) -> float:
        """Floating-point operations of one block on a window: its products, and attention from each
        token to itself and those before it."""
        seen = tokens * (tokens + 1) / 2
        return 2 * self.block_parameters * tokens + 4 * seen * self.width

    def head_flops(self, tokens: int) -> float:
        """Of the output head on a window, of which the last token predicts nothing."""
        return 2.0 * self.width * self.vocab * (tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything is measured."""

    windows: int = 128
    length: int = 2048
    exact_windows: int = 16
    repair_tokens: int = 100_000
    prompt: int = 2048
    new_tokens: int = 128
    start: int = 64
    batches: tuple[int, ...] = (1, 16, 64)
    stream_blocks: int = 8
    stream_windows: int = 16
    stream_candidates: int = 4
    real: tuple[int, int, int] = (64, 256, 6)  # windows, tokens of each, removed


FULL = Size()
TINY = Size(
    windows=12,
    length=32,
    exact_windows=4,
    repair_tokens=512,
    prompt=64,
    new_tokens=8,
    start=8,
    batches=(1, 2),
    stream_blocks=3,
    stream_windows=6,
    stream_candidates=1,
    real=(6, 64, 2),
)


SHAPES = {
    "tiny": Shape(width=64, inner=160, blocks=8, heads=4, kv_heads=4, vocab=256),
    "7b": Shape(width=4096, inner=11008, blocks=32, heads=32, kv_heads=32, vocab=32000),
    "13b": Shape(width=5120, inner=13824, blocks=40, heads=40, kv_heads=40, vocab=32000),
    "70b": Shape(width=8192, inner=28672, blocks=80, heads=64, kv_heads=8, vocab=32000),
}


def llama_config(shape: Shape, blocks: int | None = None) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks or shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        # random tokens would end a text at once
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_llama(shape: Shape, device: torch.device, seed: int = 0) -> Any:
    """In bfloat16, made on the device itself."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(llama_config(shape)).eval()
    finally:
        torch.set_default_dtype(before)


def shape_of(config: Any) -> Shape:
    """Of a loaded model with Llama's kind of blocks."""
    return Shape(
        width=config.hidden_size,
        inner=config.intermediate_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        vocab=config.vocab_size,
    )


def shortened(model: Any, removed: frozenset[int]) -> Any:
    """A model of its own without some blocks, as a cut loads, that shares the weights."""
    config = copy.deepcopy(model.config)
    kept = [b for b in range(config.num_hidden_layers) if b not in removed]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[b] for b in kept]
    with torch.device("meta"):
        short = type(model)(config).eval()
    state, prefix = {}, "model.layers."
    place = {b: i for i, b in enumerate(kept)}
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            block, rest = name.removeprefix(prefix).split(".", 1)
            if int(block) not in place:
                continue
            name = f"{prefix}{place[int(block)]}.{rest}"
        state[name] = tensor
    short.load_state_dict(state, assign=True)
    short.model.rotary_emb = model.model.rotary_emb  # its buffers are not in the state
    vars(short.config)["_attn_implementation_internal"] = model.config._attn_implementation
    short.generation_config = model.generation_config
    return short


def byte_tokenizer(folder: Path, vocab: int) -> None:
    """Bytes, and words that no text has up to the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<{i}>" for i in range(len(names), vocab)]
    words = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
