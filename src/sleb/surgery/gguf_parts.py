"""A GGUF file in which blocks lack their attention or their MLP: llama.cpp's architecture ``deci``.

That is Llama's graph with heads and widths block by block, made for NVIDIA's Nemotron models. A
Llama or Qwen2 file becomes one by its fields alone, and tensors keep their bytes; but where Qwen2
rotates halves of a head, Llama rotates pairs, so rows of Q and K change places. Two things do not
work, as llama.cpp's source says and runs show: block 0 must keep its attention, from which the size
of a head is read; and a length of 0 for an MLP drops the attention beside it, so an MLP of zeros
stays, as narrow as a quantization block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sleb.checkpoints.cut import Cut
from sleb.checkpoints.gguf_fields import GGUFModel, block_of
from sleb.checkpoints.gguf_file import (
    ARRAY,
    INT32,
    STRING,
    GGUFFile,
    GGUFTensor,
    NewTensor,
    Value,
)
from sleb.core.errors import UnsupportedModel
from sleb.core.units import ATTENTION, MLP, Unit

DECI = "deci"
FROM = {"llama": False, "qwen2": True}
"""Architectures that can become ``deci``, and whether they rotate halves of a head."""
ZEROS = 32
"""Width of an MLP of zeros."""
F32 = 0
OF_ATTENTION, OF_MLP = "attn_", "ffn_"

_FIELDS = re.compile(
    r"block_count|context_length|embedding_length|feed_forward_length|vocab_size|expert_count|"
    r"expert_used_count|attention\.(head_count|head_count_kv|layer_norm_rms_epsilon|key_length|"
    r"value_length)|rope\.(dimension_count|freq_base|scale_linear|scaling\..*)"
)
_TENSORS = re.compile(
    r"(token_embd|output_norm|output|rope_freqs|blk\.\d+\.(attn_(norm|q|k|v|output)|"
    r"ffn_(norm|gate|up|down)))\.(weight|bias)"
)


def check_parts(model: GGUFModel, cut: Cut) -> None:
    """
    Raises:
        UnsupportedModel: the file without these parts is no ``deci`` that llama.cpp computes
            exactly; the message says why.
    """
    why = ""
    if model.name not in FROM:
        why = f"the architecture that allows it is Llama's, and {model.name} has more than that"
    elif model.integer("expert_count"):
        why = "it knows no experts"
    elif Unit.of(0, ATTENTION) in cut.parts:
        why = f"block {cut.kept[0]} would be the first, and that needs its attention"
    elif unknown := _unknown(model):
        why = f"what becomes of {unknown} is not known"
    elif FROM[model.name] and model.integer("rope.dimension_count") not in (None, _head(model)):
        why = "only a part of each head is rotated"
    if why:
        raise UnsupportedModel(
            f"llama.cpp cannot run {model.file.path} without parts of blocks: {why}; whole blocks "
            "can be cut (--unit block), and sleb.load(MODEL, plan=PLAN) runs it in transformers"
        )


def _unknown(model: GGUFModel) -> str:
    """A field or tensor that Llama's graph may not take; empty if there is none."""
    own = f"{model.name}."
    fields = [key.removeprefix(own) for key in model.file.fields if key.startswith(own)]
    odd = [key for key in fields if not _FIELDS.fullmatch(key)]
    odd += [name for name in model.file.tensors if not _TENSORS.fullmatch(name)]
    return odd[0] if odd else ""


def _head(model: GGUFModel) -> int:
    """Length of a head."""
    heads, width = model.counts("attention.head_count") or [1], model.integer("embedding_length")
    return model.integer("attention.key_length") or (width or 0) // heads[0]


def as_deci(
    model: GGUFModel, cut: Cut, values: dict[str, Value], tensors: Sequence[NewTensor]
) -> tuple[dict[str, Value], list[NewTensor], dict[str, str]]:
    """The file that `sleb.surgery.gguf_cut` is about to write, as ``deci``: fields, tensors, and
    the new names of fields that stay. ``values`` and ``tensors`` are without whole blocks."""
    own = f"{model.name}."
    names = {k: f"{DECI}.{k.removeprefix(own)}" for k in model.file.fields if k.startswith(own)}
    changed = {names.get(key, key): value for key, value in values.items()}
    heads = model.counts("attention.head_count") or [0] * model.blocks
    shared = model.counts("attention.head_count_kv") or heads
    widths = model.counts("feed_forward_length") or [0] * model.blocks
    for key, counts, kind, left in (
        ("attention.head_count", heads, ATTENTION, 0),
        ("attention.head_count_kv", shared, ATTENTION, 0),
        ("feed_forward_length", widths, MLP, ZEROS),
    ):
        data = [
            left if Unit.of(new, kind) in cut.parts else counts[old]
            for new, old in enumerate(cut.kept)
        ]
        changed[f"{DECI}.{key}"] = Value(kind=ARRAY, item=INT32, data=data)
    changed["general.architecture"] = Value(kind=STRING, data=DECI)
    kept = without_parts(tensors, cut)
    if FROM[model.name]:
        of = {new: (heads[old], shared[old]) for new, old in enumerate(cut.kept)}
        kept = [_paired(model.file, tensor, of) for tensor in kept]
    zeros = [
        zero
        for new in range(len(cut.kept))
        if Unit.of(new, MLP) in cut.parts
        for zero in _zeros(new, model.integer("embedding_length") or 0)
    ]
    return changed, kept + zeros, names


def without_parts(tensors: Sequence[NewTensor], cut: Cut) -> list[NewTensor]:
    """Those of ``tensors``, by their new names, that are of no part that goes. The norm before an
    MLP stays: zeros take its place, not nothing."""
    found = []
    for tensor in tensors:
        block, name = block_of(tensor.name), tensor.name.split(".", 2)[-1]
        gone = block is not None and (
            (Unit.of(block, ATTENTION) in cut.parts and name.startswith(OF_ATTENTION))
            or (
                Unit.of(block, MLP) in cut.parts
                and name.startswith(OF_MLP)
                and not name.startswith("ffn_norm")
            )
        )
        if not gone:
            found.append(tensor)
    return found


def _zeros(block: int, width: int) -> list[NewTensor]:
    """An MLP that adds nothing."""
    found = []
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        shape = (ZEROS, width) if name == "ffn_down" else (width, ZEROS)
        nbytes = 4 * width * ZEROS
        source = GGUFTensor(name=name, kind=F32, shape=shape, start=0, nbytes=nbytes)
        full = f"blk.{block}.{name}.weight"
        found.append(NewTensor(name=full, source=source, kind=F32, content=bytes(nbytes)))
    return found


def _paired(file: GGUFFile, tensor: NewTensor, counts: dict[int, tuple[int, int]]) -> NewTensor:
    """A matrix or bias of Q or K with its rows in the order in which pairs are rotated."""
    match = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.(weight|bias)", tensor.name)
    if not match:
        return tensor
    heads = counts[int(match[1])][match[2] == "k"]
    length = tensor.source.shape[-1] // heads
    if isinstance(tensor.content, bytes):
        return replace(tensor, content=_interleaved(tensor.content, heads, length))

    def made() -> bytes:
        return _interleaved(file.content(tensor.source), heads, length)

    return replace(tensor, content=made)


def _interleaved(content: bytes, heads: int, length: int) -> bytes:
    """Rows of each head, of which the first half was rotated with the second, in pairs."""
    rows = np.frombuffer(content, dtype=np.uint8)
    halves = rows.reshape(heads, 2, length // 2, -1)
    return bytes(halves.swapaxes(1, 2).tobytes())
