"""What `sleb inspect` knows: structure and sizes of a model, from its config and file headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.depth_fields import DepthField, depth_fields, refuse_unsupported
from sleb.core.errors import UnsupportedModel
from sleb.core.plan import blocks_to_remove
from sleb.core.progress import Progress, silent
from sleb.models.load import empty_model, load_config, refuse_unread
from sleb.models.source import resolve
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What removing ``blocks`` average blocks leaves: stored elements, bytes on disk, and the
    speed-up of the stack (upper bound for the model's)."""

    percent: int
    blocks: int
    parameters: int
    nbytes: int
    ideal_speedup: float


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model's facts. Parameter counts are stored elements, sizes are bytes on disk; both per
    block in ``block_parameters`` and ``block_bytes``. ``reason`` says why it is not supported."""

    model: str
    model_type: str
    architecture: str
    supported: bool
    reason: str | None
    block_path: str | None = None
    block_class: str | None = None
    blocks: int | None = None
    parameters: int | None = None
    nbytes: int | None = None
    block_parameters: tuple[int, ...] = ()
    block_bytes: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    tied_weights: bool = False
    depth_fields: tuple[DepthField, ...] = ()
    savings: tuple[Saving, ...] = ()


def describe(
    ref: str | Path, *, trust_remote_code: bool = False, progress: Progress = silent
) -> Description:
    """Describe MODEL without loading its weights. A model that sleb refuses is described as far
    as it can be, with the reason.

    Raises:
        InputError, DataError: there is no such model, or its files are damaged.
    """
    source = resolve(ref, progress)
    checkpoint = Checkpoint.open(source.path)
    facts = {
        "model": source.ref,
        "model_type": str(checkpoint.config.get("model_type", "unknown")),
        "architecture": checkpoint.architecture or "unknown",
    }
    try:
        config = load_config(source.path, trust_remote_code=trust_remote_code)
        text = decoder_config(config)
        stack = BlockStack(empty_model(config, trust_remote_code=trust_remote_code))
        refuse_unsupported(text.to_dict(), len(stack))
        refuse_unread(checkpoint, config, trust_remote_code=trust_remote_code)
    except UnsupportedModel as error:
        return Description(**facts, supported=False, reason=str(error))  # type: ignore[arg-type]

    n = len(stack)
    elements, sizes = zip(*checkpoint.block_sizes(n, block_prefix(checkpoint, stack)), strict=True)
    total = sum(info.numel for info in checkpoint.tensors.values())
    savings = []
    for percent in (10, 20, 30):
        gone = min(blocks_to_remove(f"{percent}%", n), n - 1) if n > 1 else 0
        savings.append(
            Saving(
                percent=percent,
                blocks=gone,
                parameters=total - gone * sum(elements) // n,
                nbytes=checkpoint.nbytes - gone * sum(sizes) // n,
                ideal_speedup=n / (n - gone),
            )
        )
    return Description(
        **facts,
        supported=True,
        reason=None,
        block_path=stack.path,
        block_class=", ".join(sorted({type(block).__name__ for block in stack.blocks})),
        blocks=n,
        parameters=total,
        nbytes=checkpoint.nbytes,
        block_parameters=elements,
        block_bytes=sizes,
        dtypes=tuple(sorted({info.dtype for info in checkpoint.tensors.values()})),
        tied_weights=bool(getattr(config, "tie_word_embeddings", False)),
        depth_fields=tuple(depth_fields(text.to_dict(), n)),
        savings=tuple(savings),
    )
