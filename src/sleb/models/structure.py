"""A model's structure as transformers builds it, without weights: whether sleb can cut it."""

from __future__ import annotations

from typing import Any

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.depth_fields import depth_fields, refuse_unsupported
from sleb.core.errors import UnsupportedModel
from sleb.models.load import empty_model, load_config, refuse_unread
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
        "block_class": ", ".join(sorted({type(block).__name__ for block in stack.blocks})),
        "blocks": len(stack),
        "tied_weights": bool(getattr(config, "tie_word_embeddings", False)),
        "depth_fields": tuple(depth_fields(text.to_dict(), len(stack))),
    }
