"""Config fields that depend on depth, and how each is re-indexed when blocks go.

Works on plain dictionaries (``config.to_dict()`` of the text decoder, so that transformers has
written out what it derives) and needs no torch. ``kept`` is the sorted list of original block ids
that stay. A field whose meaning cannot be kept exactly is refused: a stale one would load without
an error and compute something else.

To support a new field, add a row to ``RULES``; docs/extending.md shows how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from sleb.core.errors import UnsupportedModel

Config = dict[str, Any]
Kept = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one kind of field follows the blocks. ``apply(config, field, kept, n)`` returns the new
    value or raises UnsupportedModel; ``applies`` says whether a value of this field is its kind.
    A list or mapping that is of none of its field's kinds is refused."""

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
    ids = set(config[field])
    return [new for new, old in enumerate(kept) if old in ids]


def _remap_text(config: Config, field: str, kept: Kept, n: int) -> Any:
    # ids past the last block are of those that predict further tokens
    ids = {int(one) for one in config[field].split(",") if one.strip()}
    moved = [new for new, old in enumerate(kept) if old in ids]
    return ",".join(map(str, [*moved, *(i - n + len(kept) for i in sorted(ids) if i >= n)]))


def _slice_inside(config: Config, field: str, kept: Kept, n: int) -> Any:
    part = config[field]
    lists = _lists_inside(config, field, n)
    return {k: _slice(part, k, kept, n) if k in lists else v for k, v in part.items()}


def _remap_keys(config: Config, field: str, kept: Kept, n: int) -> Any:
    entries = {int(key): value for key, value in config[field].items()}
    moved = {new: entries[old] for new, old in enumerate(kept) if old in entries}
    padded = any(len(str(key)) > 1 and str(key)[0] == "0" for key in config[field])
    width = len(str(max(moved, default=0))) if padded else 1  # as transformers writes them
    return {str(new).zfill(width): value for new, value in moved.items()}


def _remap_from_one(config: Config, field: str, kept: Kept, n: int) -> Any:
    """Lists of ids inside a mapping, where the first block is 1."""
    lists = {"full_attn_layers", "kda_layers"}
    return {
        key: [new for new, old in enumerate(kept, 1) if old + 1 in value] if key in lists else value
        for key, value in config[field].items()
    }


def _count_first(config: Config, field: str, kept: Kept, n: int) -> Any:
    return sum(i < config[field] for i in kept)


def _depth(config: Config, field: str, kept: Kept, n: int) -> Any:
    return len(kept)


def _one(config: Config, field: str, kept: Kept, n: int) -> Any:
    return 1


def _mlp_only(config: Config, field: str, kept: Kept, n: int) -> Any:
    # with a step of one, every dense block is listed
    step = config.get("decoder_sparse_step") or 1
    listed = set(config.get(field) or ())
    return [new for new, old in enumerate(kept) if old in listed or (old + 1) % step]


def _moe_range(config: Config, kept: Kept, n: int) -> tuple[int, int]:
    start, end = config.get("moe_layer_start_index", 0), config.get("moe_layer_end_index", -1)
    step, end = config.get("moe_layer_interval") or 1, n - 1 if end == -1 else end
    sparse = [new for new, old in enumerate(kept) if start <= old <= end and not (old + 1) % step]
    if not sparse:
        return len(kept), len(kept)
    if sparse != list(range(sparse[0], sparse[-1] + 1)):
        raise UnsupportedModel(
            "config field `moe_layer_interval`: the MoE blocks that stay are not one after "
            "another, and the config has only a start, an end and a step for them"
        )
    return sparse[0], sparse[-1]


def _phase(offset_field: str | None = None) -> Callable[[Config, str, Kept, int], Any]:
    def apply(config: Config, field: str, kept: Kept, n: int) -> Any:
        period, offset = config[field], config.get(offset_field, 0) if offset_field else 0
        moved = [
            old
            for new, old in enumerate(kept)
            if (old % period == offset) != (new % period == offset)
        ]
        if moved:
            raise UnsupportedModel(
                f"config field `{field}` is a period of {period}: blocks {moved[:4]} would "
                f"change kind; only cuts that keep the pattern (such as {period} blocks in a row) "
                "are exact"
            )
        return period

    return apply


def _cycle(config: Config, field: str, kept: Kept, n: int) -> Any:
    pattern = config[field]
    return [pattern[i % len(pattern)] for i in kept]


def _attention_types(config: Config, field: str, kept: Kept, n: int) -> Any:
    flat = [kind for kinds, repeat in config[field] for _ in range(repeat) for kind in kinds]
    return [[[flat[i] for i in kept], 1]]


def _residual_scale(config: Config, field: str, kept: Kept, n: int) -> Any:
    # the model divides it by the root of the depth; blocks must keep what they were trained with
    return config[field] * math.sqrt(len(kept) / n)


def _refuse(reason: str) -> Callable[[Config, str, Kept, int], Any]:
    def apply(config: Config, field: str, kept: Kept, n: int) -> Any:
        raise UnsupportedModel(f"config field `{field}` = {short(config[field])}: {reason}")

    return apply


# -- which fields are of which kind --------------------------------------------------------------


def _list(value: Any, n: int) -> bool:
    return isinstance(value, (list, tuple))


def _mapping(value: Any, n: int) -> bool:
    return isinstance(value, dict)


def _integer(value: Any, n: int) -> bool:
    return isinstance(value, int)


def _positive(value: Any, n: int) -> bool:
    return isinstance(value, int) and value > 0


def _truthy(value: Any, n: int) -> bool:
    return bool(value)


LIST = Rule(kind="one entry per block: sliced", apply=_slice, applies=_list)
INSIDE = Rule(
    kind="lists with one entry per block inside: sliced", apply=_slice_inside, applies=_mapping
)
INDEX = Rule(kind="list of block ids: renumbered", apply=_remap, applies=_list)
COUNT = Rule(kind="count of the first blocks: recounted", apply=_count_first, applies=_positive)


def refused(reason: str, applies: Callable[[Any, int], bool] = _truthy) -> Rule:
    """A field with which no cut is exact."""
    return Rule(kind="refused", apply=_refuse(reason), applies=applies)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _fields(names: str, *rules: Rule) -> dict[str, tuple[Rule, ...]]:
    return dict.fromkeys(names.split(), rules)


RULES: dict[str, tuple[Rule, ...]] = {
    **_fields(
        "layer_types mlp_layer_types layers_block_type no_rope_layers attention_layers attn_layers "
        "layer_rope_theta num_attention_heads_per_layer num_key_value_heads_per_layer "
        "activation_sparsity_pattern swiglu_limits swiglu_limits_shared compress_ratios "
        "attn_type_list is_moe_layer hybrid_layer_pattern rope_theta partial_rotary_factors",
        LIST,
    ),
    # a number for all blocks, or a list with one for each
    **_fields(
        "num_experts moe_topk intermediate_size num_key_value_heads num_attention_heads "
        "num_query_heads num_kv_heads ffn_hidden_size moe_intermediate_size num_shared_expert",
        LIST,
    ),
    **_fields(
        "moe_layers attn_layer_indices full_attn_idxs cross_attention_layers local_layer_ids", INDEX
    ),
    # max_window_layers only derives layer_types here, but other runtimes read it
    **_fields(
        "first_k_dense_replace first_last_k_dense_replace num_dense_layers dense_mlp_idx "
        "num_hash_layers moe_layer_num_skipped max_window_layers",
        COUNT,
    ),
    "sparse_attention_config": (INSIDE,),
    "moe_layers_enum": (
        Rule(
            kind="block ids, with commas: renumbered",
            apply=_remap_text,
            applies=lambda value, n: isinstance(value, str),
        ),
        INDEX,
    ),
    "moe_layer_freq": (
        LIST,
        Rule(
            kind="period: kept if the pattern stays",
            apply=_phase(),
            applies=lambda value, n: _integer(value, n) and value > 1,
        ),
    ),
    "indexer_types": (
        refused(
            "a `shared` block reuses what an earlier block's indexer chose",
            applies=lambda value, n: _list(value, n) and "shared" in value,
        ),
        LIST,
    ),
    "hybrid_override_pattern": (
        Rule(
            kind="one letter per block: sliced",
            apply=lambda c, f, k, n: "".join(_slice(c, f, k, n)),
            applies=lambda value, n: isinstance(value, str) and value != "",
        ),
    ),
    "per_layer_config": (
        Rule(kind="entries by block id: renumbered", apply=_remap_keys, applies=_mapping),
    ),
    "linear_attn_config": (
        Rule(
            kind="lists of block ids, from 1: renumbered", apply=_remap_from_one, applies=_mapping
        ),
    ),
    # the two MoE fields of Qwen are made one list
    "decoder_sparse_step": (
        Rule(kind="period: made 1, see mlp_only_layers", apply=_one, applies=_positive),
    ),
    "mlp_only_layers": (
        Rule(kind="list of dense blocks: renumbered", apply=_mlp_only, applies=_list),
    ),
    # the three MoE fields of Ernie are made one range
    "moe_layer_start_index": (
        Rule(
            kind="range of MoE blocks: recomputed",
            apply=lambda c, f, k, n: _moe_range(c, k, n)[0],
            applies=_integer,
        ),
    ),
    "moe_layer_end_index": (
        Rule(
            kind="range of MoE blocks: recomputed",
            apply=lambda c, f, k, n: _moe_range(c, k, n)[1],
            applies=_integer,
        ),
    ),
    "moe_layer_interval": (
        Rule(kind="period inside a range: made 1", apply=_one, applies=_positive),
    ),
    "attn_layer_period": (
        Rule(
            kind="period: kept if the pattern stays",
            apply=_phase("attn_layer_offset"),
            applies=_positive,
        ),
    ),
    "expert_layer_period": (
        Rule(
            kind="period: kept if the pattern stays",
            apply=_phase("expert_layer_offset"),
            applies=_positive,
        ),
    ),
    "block_types": (
        Rule(kind="repeating pattern: written out per block", apply=_cycle, applies=_list),
    ),
    "attention_types": (
        Rule(
            kind="[pattern, repeats]: written out per block", apply=_attention_types, applies=_list
        ),
    ),
    "scale_depth": (
        Rule(
            kind="divided by the root of the depth: rescaled",
            apply=_residual_scale,
            applies=lambda value, n: isinstance(value, (int, float)),
        ),
    ),
    "num_blocks": (
        Rule(kind="number of blocks", apply=_depth, applies=lambda value, n: value == n),
    ),
    "num_kv_shared_layers": (refused("the last blocks reuse the keys and values of earlier ones"),),
    "hidden_size_per_layer_input": (refused("one embedding tensor holds columns for every block"),),
    "ple_layer_ids": (refused("the embeddings of these blocks are hashed by their place"),),
    "scale_attn_by_inverse_layer_idx": (refused("attention is scaled by the block's own index"),),
    "rescale_every": (
        refused(
            "the stream is halved after every so many blocks; set it to 0, which is the same model "
            "but for float16 overflow",
            applies=_positive,
        ),
    ),
    "is_encoder_decoder": (refused("sleb cuts decoder-only models"),),
}

REFUSED_TYPES = {
    "cpmant": "it puts a prompt of its own before the text",
    "diffllama": "its attention depends on each block's own index (lambda_init)",
    "nemotron-nas": "its blocks lack parts, for which transformers has no code: sleb.load(MODEL, "
    "plan=PLAN) makes it of the model it was cut from; vLLM and mlx-lm run it (docs/units.md)",
    "zamba": "one transformer block is shared by several positions",
    "zamba2": "one transformer block is shared by several positions",
    "zaya": "each router adds to the router state of the block before it",
}

# Encoders, which transformers also loads as causal models; they are, if their config says so.
ENCODERS = _names(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer "
    "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xlnet xmod"
)

# Fields that only derive a per-block list: without effect once that list is in the config.
DERIVED_FROM = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "prefix_dense_sliding_window_pattern": "layer_types",
    "layer_switch": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "index_topk_freq": "indexer_types",
    "index_topk_pattern": "indexer_types",
}

# How configs call the number of blocks, besides what transformers calls it in their class.
NUMBER_OF_BLOCKS = _names("num_hidden_layers n_layer n_layers num_layers")

# The number of blocks after these, that predict further tokens.
PREDICTING = _names("num_nextn_predict_layers mtp_num_hidden_layers num_mtp_modules")

# Lists whose length may equal the number of blocks by chance, and what holds such lists.
NEVER_PER_BLOCK = _names(
    "architectures eos_token_id bos_token_id pad_token_id suppress_tokens begin_suppress_tokens "
    "bad_words_ids time_step_limit mamba_step_limit mlp_multipliers ssm_multipliers "
    "keys_to_ignore_at_inference mtp_layers_block_type mtp_layer_types mtp_mlp_layer_types "
    "mtp_local_layer_ids summary_proj_to_labels rope_scaling rope_parameters quantization_config "
    "compression_config"
)


def depth_fields(config: Config, n: int) -> list[DepthField]:
    """The depth-dependent fields of a decoder's config with ``n`` blocks, sorted by name."""
    found = [DepthField(name=name, kind=rule.kind) for name, rule in _applying(config, n)]
    return sorted(found, key=lambda field: field.name)


def _applying(config: Config, n: int) -> list[tuple[str, Rule]]:
    """The fields that a rule is for, each with the first such rule. A list that nobody knows, but
    that says the same of every block, is one of those with an entry per block."""
    found = []
    for name, rules in RULES.items():
        rule = next((rule for rule in rules if rule.applies(config.get(name), n)), None)
        if rule:
            found.append((name, rule))
    for name in config:
        lists, rule = _unknown_lists(config, name, n)
        if lists and all(entry == one[0] for one in lists for entry in one):
            found.append((name, rule))
    return found


def _unknown_lists(config: Config, name: str, n: int) -> tuple[list[Sequence[Any]], Rule]:
    """What a field without a rule has of lists as long as there are blocks, as it is or inside, and
    the rule that would be for it."""
    value = config[name]
    if name in RULES or name in NEVER_PER_BLOCK:
        return [], LIST
    if isinstance(value, dict):
        return [value[key] for key in _lists_inside(config, name, n)], INSIDE
    return [value] if _per_block(config, value, n) else [], LIST


def _lists_inside(config: Config, name: str, n: int) -> list[str]:
    """The keys of a mapping with one entry per block."""
    return [key for key, value in config[name].items() if _per_block(config, value, n)]


def _per_block(config: Config, value: Any, n: int) -> bool:
    """Whether a value is a list as long as there are blocks, or these and the ones that follow."""
    more = max(int(config.get(name) or 0) for name in PREDICTING)
    return n > 1 and _list(value, n) and len(value) in (n, n + more)


def refused_type(config: Config) -> str | None:
    """Why no model of this config's type can be cut exactly; None if some can."""
    model_type = config.get("model_type", "")
    if reason := REFUSED_TYPES.get(model_type):
        return f"{model_type} cannot be cut exactly: {reason}"
    if model_type in ENCODERS and not config.get("is_decoder"):
        return (
            f"{model_type}: its attention sees later tokens (`is_decoder` is not set), so it is no "
            "causal language model"
        )
    return None


def refuse_unsupported(config: Config, n: int) -> None:
    """Raise UnsupportedModel, with the reason, if no cut of this model can be exact."""
    if reason := refused_type(config):
        raise UnsupportedModel(reason)
    applying = dict(_applying(config, n))
    for name, rule in applying.items():
        if rule.kind == "refused":
            rule.apply(config, name, range(n), n)
    for name, source in DERIVED_FROM.items():
        # a period of one makes all blocks alike
        if config.get(name) not in (None, 0, 1) and config.get(source) is None:
            raise UnsupportedModel(
                f"config field `{name}` = {config[name]!r} is a pattern over block ids and the "
                f"config has no `{source}` list to cut: load and save the model with transformers "
                "once"
            )
    for name, value in config.items():
        if name in RULES:
            if name not in applying and isinstance(value, (list, tuple, dict)) and value:
                raise UnsupportedModel(
                    f"config field `{name}` = {short(value)} depends on depth, but not in a form "
                    "that sleb knows"
                )
        elif name not in applying and _unknown_lists(config, name, n)[0]:
            raise UnsupportedModel(
                f"config field `{name}` has one entry per block ({n}) but no re-index rule; "
                "add a row to RULES in sleb/checkpoints/depth_fields.py (see docs/extending.md)"
            )


def reindex(config: Config, kept: Kept, n: int, depth_field: str = "num_hidden_layers") -> Config:
    """The config of the model cut down to ``kept``: a new dictionary, the given one unchanged.

    Raises:
        UnsupportedModel: a field's meaning cannot be kept exactly for this cut.
    """
    refuse_unsupported(config, n)
    new = dict(config)
    for name, rule in _applying(config, n):
        new[name] = rule.apply(config, name, kept, n)
    if config.get("decoder_sparse_step"):  # whether or not the list was there before
        new["mlp_only_layers"] = _mlp_only(config, "mlp_only_layers", kept, n)
    for name in {depth_field, *(k for k in NUMBER_OF_BLOCKS if config.get(k) == n)}:
        new[name] = len(kept)
    return new


def reindex_written(
    written: Config, config: Config, kept: Kept, n: int, aliases: Mapping[str, str]
) -> Config:
    """The decoder's part of a config.json for the model cut down to ``kept``: as it is ``written``,
    in its own words and order, with nothing changed but the fields that depend on depth.

    ``config`` is what transformers makes of it, which says what is not written; ``aliases`` are its
    names of fields, by the names that may stand for them.

    Raises:
        UnsupportedModel: a field's meaning cannot be kept exactly for this cut.
    """
    stated = {aliases.get(name, name): value for name, value in written.items()}
    meant = {**config, **written, **stated}
    # an empty list leaves it to transformers what each block is, as Llama 4's no_rope_layers
    meant |= {k: config[k] for k, value in stated.items() if value == [] and config.get(k)}
    refuse_unsupported(meant, n)
    rules, new = dict(_applying(meant, n)), dict(written)
    for name, value in written.items():
        known = aliases.get(name, name)
        if value == n and {name, known} & NUMBER_OF_BLOCKS:
            new[name] = len(kept)
            continue
        # of two names of one field each may have a value of its own
        alone = value != [] and meant.get(known) != value
        own = {**meant, known: value} if alone else meant
        found = dict(_applying(own, n)) if alone else rules
        if known in found:
            new[name] = found[known].apply(own, known, kept, n)
    if "decoder_sparse_step" in written and (dense := _mlp_only(meant, "mlp_only_layers", kept, n)):
        new["mlp_only_layers"] = dense
    return new


def keeps_pattern(pattern: Any, kept: Kept) -> bool:
    """Whether a pattern over block ids, a period or one entry per block that is repeated, gives
    every block that stays the kind that it had."""
    period = pattern if isinstance(pattern, int) else len(pattern)
    return all(period < 2 or (old - new) % period == 0 for new, old in enumerate(kept))
