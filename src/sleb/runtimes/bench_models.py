"""The models that a bench compares, looked at before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.depth_fields import refuse_unsupported
from sleb.core.errors import InputError
from sleb.core.progress import Progress
from sleb.models.load import load_config
from sleb.models.source import resolve
from sleb.models.stack import decoder_config

__all__ = ["BenchModel", "subjects"]


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model: ``ref`` as the user wrote it, the folder to load, stored elements and bytes of
    weights. ``longest``: tokens that it reads, None without a limit. ``gguf``: the .gguf file that
    it is, or the one that lies in its folder."""

    ref: str
    path: Path
    config: Any
    blocks: int
    parameters: int
    nbytes: int
    vocabulary: int
    longest: int | None
    gguf: Path | None


def subjects(
    model: str | Path,
    outs: Sequence[str | Path],
    *,
    trust_remote_code: bool,
    progress: Progress,
) -> list[BenchModel]:
    """MODEL and each OUT, from configs and file headers.

    Raises:
        InputError: a model is not there, or given twice; an OUT is not MODEL with fewer blocks.
        UnsupportedModel, DataError, ResourceError: see :func:`sleb.load`.
    """
    refs = [str(ref) for ref in (model, *outs)]
    for i, ref in enumerate(refs):
        if ref in refs[:i]:
            raise InputError(f"{ref} is given twice; give each model once, the dense one first")
    found = [_subject(ref, trust_remote_code, progress) for ref in refs]
    for pruned in found[1:]:
        _check(found[0], pruned)
    return found


def _subject(ref: str, trust_remote_code: bool, progress: Progress) -> BenchModel:
    source = resolve(ref, progress)
    checkpoint = Checkpoint.open(source.path)
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    text = decoder_config(config)
    refuse_unsupported(text.to_dict(), text.num_hidden_layers)
    beside = sorted(source.path.glob("*.gguf"))
    return BenchModel(
        ref=ref,
        path=source.path,
        config=config,
        blocks=text.num_hidden_layers,
        parameters=sum(info.numel for info in checkpoint.tensors.values()),
        nbytes=checkpoint.nbytes,
        vocabulary=text.vocab_size,
        longest=getattr(text, "max_position_embeddings", None),
        gguf=Path(ref).expanduser() if source.is_gguf else beside[0] if len(beside) == 1 else None,
    )


def _check(dense: BenchModel, pruned: BenchModel) -> None:
    """Refuse what is no pruned ``dense``: its ratio would say nothing about blocks."""
    for field in ("model_type", "vocab_size", "hidden_size"):
        theirs, ours = (
            getattr(decoder_config(subject.config), field, None) for subject in (pruned, dense)
        )
        if theirs != ours:
            raise InputError(
                f"{pruned.ref} is not {dense.ref} with blocks removed: its {field} is {theirs}, "
                f"not {ours}"
            )
    if pruned.blocks >= dense.blocks:
        raise InputError(
            f"{pruned.ref} has {pruned.blocks} blocks and {dense.ref} {dense.blocks}; give the "
            "dense model first, and then what was made of it"
        )
