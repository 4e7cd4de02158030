"""A model's structure as transformers builds it, without weights: whether sleb can cut it."""

from __future__ import annotations

from typing import Any

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.depth_fields import depth_fields, refuse_unsupported
from sleb.checkpoints.gguf_fields import refuse_parts
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import UnsupportedModel
from sleb.models.gguf_source import check_tensors, corrections, parsed_once
from sleb.models.load import empty_model, load_config, refuse_unread
from sleb.models.source import quiet_transformers, read_by_transformers
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix


def structure(checkpoint: Checkpoint, *, trust_remote_code: bool) -> dict[str, Any]:
    """Fields of :class:`sleb.models.describe.Description`: whether the model of a checkpoint can be
    cut, or why not, and what its blocks are.

    Raises:
        InputError, DataError: its config cannot be read.
    """
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = load_config(checkpoint.path, **trust)
        text = decoder_config(config)
        stack = BlockStack(empty_model(config, **trust))
        refuse_unsupported(text.to_dict(), len(stack))
        refuse_unread(checkpoint, config, **trust)
    except UnsupportedModel as error:
        return {"supported": False, "reason": str(error)}
    return {
        "supported": True,
        "block_path": block_prefix(checkpoint, stack).removesuffix("."),
        "block_class": _classes(stack),
        "blocks": len(stack),
        "tied_weights": bool(getattr(config, "tie_word_embeddings", False)),
        "depth_fields": tuple(depth_fields(text.to_dict(), len(stack))),
    }


def gguf_structure(file: GGUFFile) -> dict[str, Any]:
    """The same of a .gguf file, from its header: what transformers would make of it, every tensor
    accounted for, and under ``carried`` what of its config sleb takes from the file itself.

    Raises:
        UnsupportedModel: transformers does not convert it.
        DataError: it lacks tensors.
    """
    from transformers import AutoConfig

    path = file.path
    refuse_parts(file)
    with quiet_transformers(), parsed_once(), read_by_transformers(path):
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        model = empty_model(config)
    check_tensors(file, model)
    carried = corrections(file, config)
    return {
        "supported": True,
        "block_class": _classes(BlockStack(model)),
        "carried": tuple(carried.items()),
    }


def _classes(stack: BlockStack) -> str:
    """The classes of the blocks."""
    return ", ".join(sorted({type(block).__name__ for block in stack.blocks}))
