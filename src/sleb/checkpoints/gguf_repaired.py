"""The repaired tensors in a cut GGUF file: found by name, proved to be a plan's, dequantized."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sleb.checkpoints.gguf_fields import GGUFModel
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import InputError, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "sleb.repaired_sha256"
PLUS_ONE = ("gemma", "gemma2", "gemma3")
"""Architectures whose files have the gains of norms, and checkpoints one less."""
PAIRS = ("llama", "deci")
"""Architectures whose files have the rows of Q and K in the order in which pairs of a head's rows
are rotated, where checkpoints rotate its first half with its second."""


def repaired_sha256(fitted: Mapping[str, str], contents: Mapping[str, bytes]) -> str:
    """What a file says of its repair: SHA-256 over names in the original checkpoint, each with that
    of the tensor as it was ``fitted`` (as in a plan) and the bytes that the file has of it."""
    sha = hashlib.sha256()
    for name in sorted(fitted):
        sha.update(f"{name} {fitted[name]} ".encode())
        sha.update(contents[name])
    return sha.hexdigest()


def read_repaired(
    path: Path, fitted: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors ``fitted`` (SHA-256 by names in the original checkpoint) as the cut file ``path``
    holds them, in bfloat16, as all of a GGUF file is read. ``names``: after the cut.

    Raises:
        InputError: it was not written with them.
    """
    import torch

    model = GGUFModel.of(GGUFFile.open(path))
    if FIELD not in model.file.fields:
        raise InputError(
            f"{path} does not say that it has a repair: it has none, or an older sleb wrote it; "
            "cut it again, or give the file that was written with this plan"
        )
    own = {name: stored_name(model, names[name]) for name in fitted}
    infos = {name: model.file.tensors[key] for name, key in own.items() if key}
    contents = {name: model.file.content(info) for name, info in infos.items()}
    if len(infos) < len(own) or model.file.value(FIELD) != repaired_sha256(fitted, contents):
        raise InputError(
            f"{path} does not hold the repaired tensors that the plan records; give the file that "
            "was written with this plan"
        )
    return {
        name: unpacked(model, info.name, contents[name], info.kind).to(torch.bfloat16)
        for name, info in infos.items()
    }


def stored_name(model: GGUFModel, name: str) -> str | None:
    """What the file calls a tensor of the checkpoint; None if it has none.

    Raises:
        UnsupportedModel: the gguf package does not know such models.
    """
    names = _names(model.name, model.blocks)
    own = names.get_name(name, try_suffixes=(".weight", ".bias"))
    return own if own in model.file.tensors else None


@lru_cache(maxsize=2)
def _names(architecture: str, blocks: int) -> Any:
    """gguf's map of names, which has those of all blocks."""
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in by_name:
        raise UnsupportedModel(f"the gguf package does not know {architecture}: upgrade it")
    return gguf.get_tensor_name_map(by_name[architecture], blocks)


def packed(model: GGUFModel, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a checkpoint as the file has that ``name``: float32, not rounded."""
    values = tensor.float() + _shift(model, name)
    heads = _heads(model, name)
    if not heads:
        return values
    halves = values.view(heads, 2, len(values) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(values.shape)


def unpacked(model: GGUFModel, name: str, content: bytes, kind: int) -> Tensor:
    """A tensor of the file, or other bytes in its place, as a checkpoint has it: float32."""
    import torch

    shape = model.file.tensors[name].shape[::-1]
    values = torch.from_numpy(decoded(content, kind, shape)) - _shift(model, name)
    heads = _heads(model, name)
    if not heads:
        return values
    pairs = values.view(heads, len(values) // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(values.shape)


def _shift(model: GGUFModel, name: str) -> float:
    """What the file has more than the checkpoint."""
    return 1.0 if model.name in PLUS_ONE and name.endswith("norm.weight") else 0.0


def _heads(model: GGUFModel, name: str) -> int:
    """How many heads have their rows in another order than in the checkpoint; 0 if none."""
    match = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.(weight|bias)", name)
    if not match or model.name not in PAIRS:
        return 0
    heads = model.counts("attention.head_count")
    shared = model.counts("attention.head_count_kv") or heads
    counts = heads if match[2] == "q" else shared
    return counts[int(match[1])] if counts else 0


def decoded(content: bytes, kind: int, shape: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Values of a tensor from its bytes, float32, of ``shape``."""
    from gguf import GGMLQuantizationType, quants

    to = GGMLQuantizationType(kind)
    direct = {"F32": np.float32, "F16": np.float16}.get(to.name)
    raw = np.frombuffer(content, dtype=direct or np.uint8)
    values = raw.astype(np.float32) if direct else quants.dequantize(raw, to)
    return np.asarray(values, dtype=np.float32).reshape(tuple(shape))
