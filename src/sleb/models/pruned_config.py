"""What a cut makes of a model's config and structure; on disk and in memory alike."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from sleb.checkpoints.depth_fields import depth_fields, reindex
from sleb.core.errors import UnsupportedModel
from sleb.models.stack import BlockStack, decoder_config

__all__ = ["check_structure", "pruned_config"]


def pruned_config(config: Any, removed: Collection[int]) -> Any:
    """A transformers config re-indexed for the model without ``removed``; the given one unchanged.

    Raises:
        UnsupportedModel: a depth-dependent field cannot follow this cut.
    """
    text = decoder_config(config)
    n = text.num_hidden_layers
    kept = [i for i in range(n) if i not in set(removed)]
    field = (getattr(text, "attribute_map", None) or {}).get(
        "num_hidden_layers", "num_hidden_layers"
    )
    fields = text.to_dict()
    new_text = reindex(fields, kept, n, field)
    changed = {k: v for k, v in new_text.items() if k not in fields or fields[k] != v}
    # what transformers writes to config.json; some types (dbrx) refuse to read all of to_dict()
    new = config.to_diff_dict()
    if text is config:
        new.update(changed)
    else:
        key = next(k for k in config.sub_configs if getattr(config, k, None) is text)
        new[key] = {**new.get(key, {}), **changed}
    try:
        cut = type(config).from_dict(copy.deepcopy(new))
    except Exception as error:  # transformers validates with several exception types
        raise UnsupportedModel(
            f"transformers refuses the config of this cut: {' '.join(str(error).split())}"
        ) from error
    check = decoder_config(cut)
    if check.num_hidden_layers != len(kept):
        raise UnsupportedModel(f"config field `{field}` does not set the number of blocks")
    read_back = check.to_dict()
    for name in (known.name for known in depth_fields(new_text, len(kept))):
        if read_back.get(name) != new_text[name]:
            raise UnsupportedModel(
                f"transformers does not accept config field `{name}` = {new_text[name]!r} for this "
                f"cut: it becomes {read_back.get(name)!r}"
            )
    return cut


def check_structure(stack: BlockStack, kept: list[int], cut: nn.Module) -> None:
    """Raise UnsupportedModel unless each kept block is built alike in the cut model: some models
    build the first or the last place differently (rwkv, gpt_neox_japanese)."""
    for old, block in zip(kept, BlockStack(cut).blocks, strict=True):
        before, after = (
            {name: tuple(tensor.shape) for name, tensor in b.state_dict().items()}
            for b in (stack.blocks[old], block)
        )
        if different := sorted(dict(before.items() ^ after.items())):
            raise UnsupportedModel(
                f"block {old} would move to a place where {stack.name} builds blocks differently "
                f"({different[0]}): protect the block that has this place now"
            )
