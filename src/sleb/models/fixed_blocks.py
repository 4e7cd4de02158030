"""Blocks that a model needs for something else than what they compute."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sleb.core.errors import SAID, UnsupportedModel, map_exceptions
from sleb.models.source import quiet_transformers
from sleb.models.stack import decoder_config

_WITHOUT_KEYS = frozenset({"linear_attention", "conv", "moe", "mlp"})
"""Kinds of blocks that cache no keys and values, by transformers' names."""


def fixed_blocks(config: Any, protected: Collection[int] = ()) -> frozenset[int]:
    """Blocks that are no candidates, as no cut can take them: those that images enter between,
    those that text alone does not run through, and the last one with keys and values, or of a kind
    that transformers demands, unless one of the blocks ``protected`` is such a one."""
    text = decoder_config(config)
    fixed = {*range(_visual(config)), *(getattr(text, "cross_attention_layers", None) or ())}
    for needed in (_attention(text), *_demanded(text)):
        if needed and not needed & {*fixed, *protected}:
            fixed.add(max(needed))
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


def _demanded(text: Any) -> Iterator[set[int]]:
    """Blocks of which transformers wants one: those of a kind without which it refuses the config,
    and the last one where it makes of whatever comes last what it is (Gemma 4)."""
    kinds = list(getattr(text, "layer_types", None) or ())
    if len(set(kinds)) < 2 or _read(text, kinds) != kinds:
        return
    other = {kind: next(k for k in kinds if k != kind) for kind in kinds}
    for kind in other:
        without = [other[k] if k == kind else k for k in kinds]
        if _read(text, without) is None:
            yield {i for i, k in enumerate(kinds) if k == kind}
    first, last = [other[kinds[0]], *kinds[1:]], [*kinds[:-1], other[kinds[-1]]]
    if _read(text, first) == first and _read(text, last) == kinds:
        yield {len(kinds) - 1}


def _read(text: Any, kinds: Sequence[str]) -> list[str] | None:
    """The kinds of blocks that transformers reads from ``text`` with ``kinds``; None if it refuses
    them."""
    fields = {**text.to_diff_dict(), "layer_types": list(kinds)}
    try:
        with map_exceptions((Exception, UnsupportedModel, SAID)), quiet_transformers():
            return list(type(text).from_dict(fields).layer_types)
    except UnsupportedModel:
        return None
