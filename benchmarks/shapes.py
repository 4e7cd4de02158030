"""Llamas of known shapes with random weights, and the exact work of their parts.

Random weights: times and memory are those of a real model, losses mean nothing.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["FULL", "SHAPES", "TINY", "Shape", "Size", "random_llama", "shape_of", "shortened"]
__all__ += ["write_random"]


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


def _byte_tokenizer(folder: Path, vocab: int) -> None:
    """Bytes, and words that no text has up to the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<{i}>" for i in range(len(names), vocab)]
    words = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def write_random(shape: Shape, folder: Path, blocks: int, device: torch.device) -> list[Path]:
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
    _byte_tokenizer(folder, shape.vocab)
    return sorted(folder.glob("block-*.safetensors"))
