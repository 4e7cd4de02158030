"""A repair's tensors in a GGUF file: found by name, proved to be the same, quantized again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.gguf_fields import GGUFModel
from sleb.checkpoints.gguf_file import GGUFTensor
from sleb.checkpoints.gguf_repaired import decoded, packed, stored_name, unpacked
from sleb.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the gguf package writes as llama.cpp would, of those that a matrix may have."""
INSTEAD = "Q8_0"
ALIKE = 0.5
"""Cosine of a repaired matrix and the original in the file, at least: a repair moves it less, and
one that is stored transposed or permuted has a cosine near zero."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A repaired tensor: its name in the uncut file, its type before and now, and the norm of the
    rounding error over that of the tensor."""

    name: str
    was: str
    type: str
    error: float


@dataclass(frozen=True, kw_only=True)
class Requantized(Stored):
    """With its bytes, of ggml's type ``kind``."""

    kind: int = field(repr=False)
    content: bytes = field(repr=False)

    @property
    def stored(self) -> Stored:
        """Without its bytes, for records."""
        return Stored(name=self.name, was=self.was, type=self.type, error=self.error)


def quantize_again(
    model: GGUFModel, tensors: Mapping[str, Tensor], original: Checkpoint | None
) -> tuple[Requantized, ...]:
    """``tensors``, by their names in the checkpoint, as the file can store them. ``original`` is
    the dequantized file; without it a tensor must still be much like the file's.

    Raises:
        UnsupportedModel: a tensor has no counterpart, or is stored in another form.
    """
    found: dict[str, Requantized] = {}
    for name, tensor in tensors.items():
        info = model.file.tensors.get(own := stored_name(model, name) or "")
        if info is None or own in found:
            raise UnsupportedModel(
                f"{name} has no tensor of its own in {model.file.path}: cut without the repair"
            )
        _check_form(name, tensor, info, model, original)
        found[info.name] = _quantized(info, packed(model, info.name, tensor))
    return tuple(found.values())


def as_stored(
    model: GGUFModel, tensors: Mapping[str, Tensor], original: Checkpoint
) -> dict[str, Tensor]:
    """``tensors`` with the rounding that they get in the file: what its reader computes with.

    Raises:
        UnsupportedModel: see :func:`quantize_again`.
    """
    again = quantize_again(model, tensors, original)
    return {
        name: unpacked(model, new.name, new.content, new.kind).to(tensor.dtype)
        for (name, tensor), new in zip(tensors.items(), again, strict=True)
    }


def _check_form(
    name: str,
    tensor: Tensor,
    info: GGUFTensor,
    model: GGUFModel,
    original: Checkpoint | None,
) -> None:
    """Raise UnsupportedModel unless the file stores this tensor as is known: converters transpose
    some and permute the rows of others."""
    import torch

    same = tuple(tensor.shape) == info.shape[::-1]
    if same:
        before = unpacked(model, info.name, model.file.content(info), info.kind)
        if original is not None:
            stored = original.tensor(name)
            same = torch.equal(before.to(stored.dtype), stored)
        else:
            new = tensor.float()
            norm = before.norm() * new.norm()
            same = bool(norm == 0 or (before * new).sum() / norm >= ALIKE)
    if not same:
        raise UnsupportedModel(
            f"{name} is stored in another form in {model.file.path} ({info.name}), so its repair "
            "cannot go there: cut without the repair"
        )


def _quantized(info: GGUFTensor, tensor: Tensor) -> Requantized:
    from gguf import GGMLQuantizationType, quants

    values = tensor.float().numpy()
    was = GGMLQuantizationType(info.kind)
    fits = values.shape[-1] % 32 == 0
    to = was if was.name in WRITABLE else GGMLQuantizationType[INSTEAD if fits else "F16"]
    content = np.ascontiguousarray(quants.quantize(values, to)).tobytes()
    back = decoded(content, int(to), values.shape)
    norm = float(np.linalg.norm(values))
    return Requantized(
        name=info.name,
        was=was.name,
        type=to.name,
        error=float(np.linalg.norm(back - values)) / norm if norm else 0.0,
        kind=int(to),
        content=content,
    )
