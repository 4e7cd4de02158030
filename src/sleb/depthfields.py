"""Config fields that depend on depth, and how each is re-indexed when blocks go.

Works on plain dictionaries (``config.to_dict()`` of the text decoder) and needs no torch. ``kept``
is the sorted list of original block ids that stay. A field whose meaning cannot be kept exactly is
refused: a stale one would load without an error and compute something else.

To support a new field, add a row to ``RULES``; docs/extending.md shows how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sleb.errors import UnsupportedModel

__all__ = ["DepthField", "depth_fields", "reindex", "refuse_unsupported"]

Config = dict[str, Any]
Kept = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one kind of field follows the blocks. ``apply(config, field, kept, n)`` returns the new
    value or raises UnsupportedModel; ``applies`` says whether a value of this field is its kind."""

    kind: str
    apply: Callable[[Config, str, Kept, int], Any]
    applies: Callable[[Any, int], bool]


@dataclass(frozen=True, kw_only=True)
class DepthField:
    """One depth-dependent field of a model's config, for `sleb inspect`."""

    name: str
    kind: str


# -- the kinds of field --------------------------------------------------------------------------


def _slice(config: Config, field: str, kept: Kept, n: int) -> Any:
    value = config[field]
    if len(value) < n:
        raise UnsupportedModel(f"config field `{field}` has {len(value)} entries for {n} blocks")
    # entries past the last block belong to what follows it (multi-token prediction)
    return [value[i] for i in kept] + list(value[n:])


def _remap(config: Config, field: str, kept: Kept, n: int) -> Any:
    return [new for new, old in enumerate(kept) if old in set(config[field])]


def _remap_keys(config: Config, field: str, kept: Kept, n: int) -> Any:
    entries = {int(key): (key, value) for key, value in config[field].items()}
    return {
        str(new).zfill(len(str(entries[old][0]))): entries[old][1]
        for new, old in enumerate(kept)
        if old in entries
    }


def _count_first(config: Config, field: str, kept: Kept, n: int) -> Any:
    return sum(i < config[field] for i in kept)


def _sparse_step(config: Config, field: str, kept: Kept, n: int) -> Any:
    # expressed with a step of one: the dense blocks are listed in mlp_only_layers instead
    return 1


def _mlp_only(config: Config, field: str, kept: Kept, n: int) -> Any:
    step = config.get("decoder_sparse_step") or 1
    listed = set(config[field] or ())
    return [new for new, old in enumerate(kept) if old in listed or (old + 1) % step]


def _moe_range(config: Config, kept: Kept, n: int) -> tuple[int, int]:
    start, end = config["moe_layer_start_index"], config["moe_layer_end_index"]
    step, end = config.get("moe_layer_interval") or 1, n - 1 if end == -1 else end
    sparse = [new for new, old in enumerate(kept) if start <= old <= end and not (old + 1) % step]
    if not sparse:
        return len(kept), len(kept)
    if sparse != list(range(sparse[0], sparse[-1] + 1)):
        raise UnsupportedModel(
            "config field `moe_layer_interval`: the MoE blocks that stay are not a range"
        )
    return sparse[0], sparse[-1]


def _phase(offset_field: str) -> Callable[[Config, str, Kept, int], Any]:
    def apply(config: Config, field: str, kept: Kept, n: int) -> Any:
        period, offset = config[field], config.get(offset_field, 0)
        moved = [old for new, old in enumerate(kept) if (old % period == offset) != (new % period == offset)]
        if moved:
            raise UnsupportedModel(
                f"config field `{field}` is a period of {period}: blocks {moved[:4]} would change "
                f"kind; only cuts that keep the pattern (such as {period} blocks in a row) are exact"
            )
        return period

    return apply


def _cycle(config: Config, field: str, kept: Kept, n: int) -> Any:
    pattern = config[field]
    return [pattern[i % len(pattern)] for i in kept]


def _attention_types(config: Config, field: str, kept: Kept, n: int) -> Any:
    flat = [kind for kinds, repeat in config[field] for _ in range(repeat) for kind in kinds]
    return [[[flat[i] for i in kept], 1]]


def _same(config: Config, field: str, kept: Kept, n: int) -> Any:
    return config[field]


def _refuse(reason: str) -> Callable[[Config, str, Kept, int], Any]:
    def apply(config: Config, field: str, kept: Kept, n: int) -> Any:
        raise UnsupportedModel(f"config field `{field}` = {config[field]!r}: {reason}")

    return apply


# -- which fields are of which kind --------------------------------------------------------------


def _list(value: Any, n: int) -> bool:
    return isinstance(value, (list, tuple))


def _positive(value: Any, n: int) -> bool:
    return isinstance(value, int) and value > 0


def _truthy(value: Any, n: int) -> bool:
    return bool(value)


LIST = Rule(kind="one entry per block: sliced", apply=_slice, applies=_list)
INDEX = Rule(kind="list of block ids: renumbered", apply=_remap, applies=_list)
KEYED = Rule(
    kind="entries by block id: renumbered",
    apply=_remap_keys,
    applies=lambda value, n: isinstance(value, dict) and bool(value),
)
COUNT = Rule(kind="count of the first blocks: recounted", apply=_count_first, applies=_positive)

RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        (
            "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types",
            "no_rope_layers", "attention_layers", "layer_rope_theta",
            "num_attention_heads_per_layer", "activation_sparsity_pattern", "attn_layers",
            "moe_layer_freq", "swiglu_limits", "compress_ratios",
            # a number for all blocks, or a list with one for each
            "num_experts", "moe_topk", "intermediate_size", "num_key_value_heads",
            "num_attention_heads", "num_query_heads", "num_kv_heads",
        ),
        (LIST,),
    ),
    **dict.fromkeys(
        ("moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers"), (INDEX,)
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "max_window_layers"), (COUNT,)),
    "per_layer_config": (KEYED,),
    "decoder_sparse_step": (
        Rule(
            kind="period: made 1, dense blocks listed in mlp_only_layers",
            apply=_sparse_step,
            applies=_positive,
        ),
    ),
    "mlp_only_layers": (
        Rule(kind="list of dense blocks: renumbered", apply=_mlp_only, applies=_list),
    ),
    "moe_layer_start_index": (
        Rule(
            kind="range of MoE blocks: recomputed",
            apply=lambda c, f, k, n: _moe_range(c, k, n)[0],
            applies=lambda value, n: isinstance(value, int),
        ),
    ),
    "moe_layer_end_index": (
        Rule(
            kind="range of MoE blocks: recomputed",
            apply=lambda c, f, k, n: _moe_range(c, k, n)[1],
            applies=lambda value, n: isinstance(value, int),
        ),
    ),
    "moe_layer_interval": (
        Rule(kind="period inside a range: made 1", apply=lambda c, f, k, n: 1, applies=_positive),
    ),
    "attn_layer_period": (
        Rule(kind="period: kept if the pattern stays", apply=_phase("attn_layer_offset"), applies=_positive),
    ),
    "expert_layer_period": (
        Rule(kind="period: kept if the pattern stays", apply=_phase("expert_layer_offset"), applies=_positive),
    ),
    "block_types": (
        Rule(kind="repeating pattern: written out per block", apply=_cycle, applies=_list),
    ),
    "attention_types": (
        Rule(kind="[pattern, repeats]: written out per block", apply=_attention_types, applies=_list),
    ),
    "num_kv_shared_layers": (
        Rule(
            kind="refused",
            apply=_refuse("the last blocks reuse the keys and values of earlier ones"),
            applies=_positive,
        ),
    ),
    "hidden_size_per_layer_input": (
        Rule(
            kind="refused",
            apply=_refuse("one embedding tensor holds columns for every block"),
            applies=_positive,
        ),
    ),
    "scale_attn_by_inverse_layer_idx": (
        Rule(
            kind="refused",
            apply=_refuse("attention is scaled by the block's own index"),
            applies=_truthy,
        ),
    ),
}

REFUSED_TYPES = {
    "diffllama": "its attention depends on each block's own index (lambda_init)",
    "zamba": "one transformer block is shared by several positions",
    "zamba2": "one transformer block is shared by several positions",
}

# Fields that only derive a per-block list: without effect once that list is in the config.
DERIVED_FROM = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}

# Lists whose length may equal the number of blocks by chance.
NEVER_PER_BLOCK = frozenset(
    "architectures eos_token_id bos_token_id pad_token_id suppress_tokens begin_suppress_tokens "
    "time_step_limit mamba_step_limit keys_to_ignore_at_inference attn_config rope_scaling "
    "rope_parameters id2label label2id".split()
)


def depth_fields(config: Config, n: int) -> list[DepthField]:
    """The depth-dependent fields of a decoder's config with ``n`` blocks, sorted by name."""
    found = [
        DepthField(name=name, kind=rule.kind)
        for name, rules in RULES.items()
        for rule in rules
        if rule.applies(config.get(name), n)
    ]
    return sorted(found, key=lambda field: field.name)


def refuse_unsupported(config: Config, n: int) -> None:
    """Raise UnsupportedModel, with the reason, if no cut of this model can be exact."""
    model_type = config.get("model_type", "")
    if reason := REFUSED_TYPES.get(model_type):
        raise UnsupportedModel(f"{model_type}: {reason}, so no cut is exact")
    for name, rules in RULES.items():
        for rule in rules:
            if rule.kind == "refused" and rule.applies(config.get(name), n):
                rule.apply(config, name, range(n), n)
    for name, source in DERIVED_FROM.items():
        if _positive(config.get(name), n) and not config.get(source) and source in config:
            raise UnsupportedModel(
                f"config field `{name}` = {config[name]} is a period over block ids and the config "
                f"has no `{source}` list to cut: load and save the model with transformers once"
            )
    for name, value in config.items():
        known = name in RULES or name in NEVER_PER_BLOCK
        if not known and isinstance(value, (list, tuple)) and len(value) == n and n > 1:
            raise UnsupportedModel(
                f"config field `{name}` has one entry per block ({n}) but no re-index rule; "
                "add a row to RULES in sleb/depthfields.py (see docs/extending.md)"
            )


def reindex(config: Config, kept: Kept, n: int, depth_field: str = "num_hidden_layers") -> Config:
    """The config of the model cut down to ``kept``: a new dictionary, the given one unchanged.

    Raises:
        UnsupportedModel: a field's meaning cannot be kept exactly for this cut.
    """
    refuse_unsupported(config, n)
    new = dict(config)
    for name, rules in RULES.items():
        for rule in rules:
            if rule.applies(config.get(name), n):
                new[name] = rule.apply(config, name, kept, n)
    new[depth_field] = len(kept)
    return new
