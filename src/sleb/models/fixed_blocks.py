"""Blocks that a model needs for something else than what they compute."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sleb.core.errors import UnsupportedModel
from sleb.models.stack import decoder_config

_WITHOUT_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})
"""Kinds of blocks that cache no keys and values, by transformers' names."""


def fixed_blocks(config: Any, protected: Collection[int] = ()) -> frozenset[int]:
    """Blocks that are no candidates, as no cut can take them: those that images enter between,
    those that text alone does not run through, and the last one with keys and values unless one of
    the blocks ``protected`` has some."""
    text = decoder_config(config)
    fixed = {*range(_visual(config)), *(getattr(text, "cross_attention_layers", None) or ())}
    attention = _attention(text)
    if not attention & {*fixed, *protected}:
        fixed |= {max(attention)} if attention else set()
    return frozenset(fixed)


def refuse_fixed(config: Any, removed: Collection[int]) -> None:
    """
    Raises:
        UnsupportedModel: the model without ``removed`` could not generate, or would see images
            elsewhere than it has learnt to.
    """
    if lost := [block for block in range(_visual(config)) if block in removed]:
        raise UnsupportedModel(
            f"features of images are added between the first {_visual(config)} blocks, and no "
            f"config can say that block {lost[0]} is gone: protect it"
        )
    attention = _attention(decoder_config(config))
    if attention and attention <= {*removed}:
        raise UnsupportedModel(
            "no block would be left that caches keys and values, and without one transformers "
            f"cannot generate: protect one of {sorted(attention)}"
        )


def refuse_parts(config: Any) -> None:
    """
    Raises:
        UnsupportedModel: not all blocks are attention and MLP.
    """
    if _attention(decoder_config(config)):
        raise UnsupportedModel(
            "some blocks of this model have no attention with keys and values, so parts of blocks "
            "are no candidates: use --unit block"
        )


def _visual(config: Any) -> int:
    """How many of the first blocks images enter between: their features are added after each of
    the first few (Qwen3-VL's deep stack), or before some that are named (Granite Vision)."""
    vision = getattr(config, "vision_config", None)
    after = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    pairs = getattr(config, "deepstack_layer_map", None) or ()
    spatial = getattr(config, "spatial_target_layers", None) or ()
    return max(after, *(int(block) for _, block in pairs), *map(int, spatial), 0)


def _attention(text: Any) -> set[int]:
    """The blocks that cache keys and values, in a decoder that has other ones too."""
    kinds = getattr(text, "layer_types", None) or ()
    found = {i for i, kind in enumerate(kinds) if kind not in _WITHOUT_KEYS}
    return found if len(found) < len(kinds) else set()
