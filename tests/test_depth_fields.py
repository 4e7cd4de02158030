"""Config fields that depend on depth: each is re-indexed to mean the same, or the cut is refused.

Every expectation is worked out from what the field means for each block, not from the rule.
"""

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb.checkpoints.depth_fields import (
    RULES,
    depth_fields,
    refuse_unsupported,
    reindex,
    reindex_written,
)
from sleb.core.errors import UnsupportedModel

KEPT = [0, 2, 3, 6]  # of 8: 1, 4, 5 and 7 go


def cut(n=8, kept=KEPT, **config):
    """The re-indexed config; the given one must stay as it was."""
    before = copy.deepcopy(config)
    new = reindex(config, kept, n)
    assert config == before
    assert new.pop("num_hidden_layers") == len(kept)
    return new


@st.composite
def depths(draw):
    """A number of blocks, and those that stay."""
    n = draw(st.integers(2, 20))
    kept = draw(st.sets(st.integers(0, n - 1), min_size=1).map(sorted))
    return n, kept


def kinds(n, kept, kind_of_old, kind_of_new):
    """Each kept block must be of the same kind before and after."""
    assert [kind_of_new(new) for new in range(len(kept))] == [kind_of_old(old) for old in kept]


@pytest.mark.parametrize(
    "field",
    [
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "no_rope_layers",
        "attention_layers",
        "attn_layers",
        "layer_rope_theta",
        "num_attention_heads_per_layer",
        "activation_sparsity_pattern",
        "moe_layer_freq",
        "swiglu_limits",
        "compress_ratios",
        "indexer_types",
        "num_experts",
        "moe_topk",
        "intermediate_size",
        "num_key_value_heads",
    ],
)
def test_lists_are_sliced(field):
    assert cut(**{field: list("abcdefgh")}) == {field: ["a", "c", "d", "g"]}
    assert cut(**{field: tuple("abcdefgh")}) == {field: ["a", "c", "d", "g"]}
    # entries for what follows the last block
    assert cut(**{field: list("abcdefghXY")}) == {field: list("acdgXY")}
    with pytest.raises(UnsupportedModel, match=f"`{field}` has 7 entries for 8 blocks"):
        cut(**{field: list("abcdefg")})


@pytest.mark.parametrize(
    "field", ["num_experts", "intermediate_size", "moe_layer_freq", "moe_topk"]
)
def test_one_number_for_all_blocks_stays(field):
    assert cut(**{field: 1}) == {field: 1}
    assert cut(**{field: None}) == {field: None}


@pytest.mark.parametrize(
    "field", ["moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers"]
)
def test_ids_are_renumbered(field):
    assert cut(**{field: [0, 1, 3, 6]}) == {field: [0, 2, 3]}
    assert cut(**{field: [1, 4]}) == {field: []}
    # as long as there are blocks, and still a list of ids
    assert cut(**{field: list(range(8))}) == {field: [0, 1, 2, 3]}


def test_ids_that_count_from_one():
    given = {"full_attn_layers": [3, 4, 8], "kda_layers": [1, 2, 5, 6, 7], "head_dim": 8}
    new = {"full_attn_layers": [2, 3], "kda_layers": [1, 4], "head_dim": 8}
    assert cut(linear_attn_config=given) == {"linear_attn_config": new}


def test_entries_by_block_id():
    given = {"1": {"head_dim": 4}, "3": {"head_dim": 8}, "6": {"head_dim": 16}}
    new = {"2": {"head_dim": 8}, "3": {"head_dim": 16}}
    assert cut(per_layer_config=given) == {"per_layer_config": new}
    by_number = {int(block): entry for block, entry in given.items()}
    assert cut(per_layer_config=by_number) == {"per_layer_config": new}
    assert cut(kept=[0, 2], per_layer_config=given) == {"per_layer_config": {}}


def test_keys_are_padded_as_transformers_writes_them():
    given = {f"{block:02}": {"head_dim": block} for block in range(12)}
    without = [block for block in range(12) if block != 4]
    new = {f"{i:02}": {"head_dim": block} for i, block in enumerate(without)}
    assert cut(12, without, per_layer_config=given) == {"per_layer_config": new}
    nine = {str(i): {"head_dim": block} for i, block in enumerate(without[:9])}
    assert cut(12, without[:9], per_layer_config=given) == {"per_layer_config": nine}


@given(depths(), st.sets(st.integers(0, 24)))
def test_ids_in_a_text_are_renumbered(depth, ids):
    n, kept = depth
    given = ",".join(map(str, sorted(ids)))
    (new,) = cut(n, kept, moe_layers_enum=given).values()
    found = {int(one) for one in new.split(",") if one}
    kinds(n, kept, lambda old: old in ids, lambda block: block in found)
    after = {
        i - n for i in ids if i >= n
    }  # what follows the last block follows the last that stays
    assert {i - len(kept) for i in found if i >= len(kept)} == after


def test_lists_inside_a_mapping_are_sliced():
    given = {"freq": [0, 0, 1, 1, 1, 1, 0, 1], "block": 16, "pair": [1, 2]}
    new = {"freq": [0, 1, 1, 0], "block": 16, "pair": [1, 2]}
    assert cut(sparse_attention_config=given) == {"sparse_attention_config": new}
    assert cut(of_a_maker={"a": [3] * 8, "b": 1}) == {"of_a_maker": {"a": [3] * 4, "b": 1}}


def test_lists_reach_to_the_blocks_that_predict_further_tokens():
    more = {"num_nextn_predict_layers": 2}
    assert cut(**more, of_a_maker=[3] * 10) == {**more, "of_a_maker": [3] * 6}
    assert cut(of_a_maker=list(range(10))) == {"of_a_maker": list(range(10))}
    with pytest.raises(UnsupportedModel, match="`of_a_maker` has one entry per block"):
        cut(**more, of_a_maker=list(range(10)))


@given(depths())
def test_an_empty_list_says_what_transformers_makes_of_it(depth):
    n, kept = depth
    read = {"no_rope_layers": [int(i % 4 != 3) for i in range(n)]}
    new = reindex_written({"no_rope_layers": []}, read, kept, n, {})
    assert new == {"no_rope_layers": [read["no_rope_layers"][i] for i in kept]}
    nothing = {"moe_layers": []}
    assert reindex_written(nothing, nothing, kept, n, {}) == nothing


def test_of_two_names_of_one_field_each_keeps_a_value_of_its_own():
    """As Hunyuan's: a list, and a number under the name that transformers gives it."""
    written = {"num_experts_per_tok": 2, "moe_topk": [2, 2, 3, 2]}
    for order in (written, dict(reversed(written.items()))):
        new = reindex_written(order, {}, [0, 2, 3], 4, {"num_experts_per_tok": "moe_topk"})
        assert new == {"num_experts_per_tok": 2, "moe_topk": [2, 3, 2]}


COUNTS = ["first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers"]


@given(depths(), st.sampled_from(COUNTS), st.integers(0, 25))
def test_first_blocks_are_counted_again(depth, field, count):
    n, kept = depth
    new = cut(n, kept, **{field: count})[field]
    kinds(n, kept, lambda old: old < count, lambda block: block < new)


@given(depths(), st.integers(1, 6), st.sets(st.integers(0, 19)))
def test_qwen_moe_blocks_stay_moe(depth, step, listed):
    n, kept = depth
    given = {"decoder_sparse_step": step, "mlp_only_layers": sorted(b for b in listed if b < n)}
    new = cut(n, kept, **given)

    def sparse(config):
        return lambda block: (
            block not in config["mlp_only_layers"]
            and (block + 1) % config["decoder_sparse_step"] == 0
        )

    kinds(n, kept, sparse(given), sparse(new))
    # cutting twice is cutting once
    assert reindex(new, range(len(kept)), len(kept)) == {**new, "num_hidden_layers": len(kept)}


@pytest.mark.parametrize("listed", [{}, {"mlp_only_layers": None}])
def test_qwen_moe_step_without_a_list(listed):
    assert cut(decoder_sparse_step=3, **listed) == {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 2, 3],  # of the old 2 and 5, only 2 stays
    }


@given(depths(), st.integers(1, 4), st.integers(0, 19), st.integers(-1, 19))
def test_ernie_moe_blocks_stay_moe_or_the_cut_is_refused(depth, step, start, end):
    n, kept = depth
    given = {
        "moe_layer_interval": step,
        "moe_layer_start_index": start,
        "moe_layer_end_index": end if end < n else n - 1,
    }

    def sparse(config, depth):
        last = config["moe_layer_end_index"]
        last = depth - 1 if last == -1 else last
        first, step = config["moe_layer_start_index"], config["moe_layer_interval"]
        return lambda block: (block + 1) % step == 0 and first <= block <= last

    moe = "".join("x" if sparse(given, n)(block) else " " for block in kept)
    if " " in moe.strip():
        with pytest.raises(UnsupportedModel, match="MoE blocks that stay are not one after"):
            cut(n, kept, **given)
    else:
        kinds(n, kept, sparse(given, n), sparse(cut(n, kept, **given), len(kept)))


@given(depths(), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3))
def test_jamba_blocks_keep_their_kind_or_the_cut_is_refused(depth, p, a, q, b):
    n, kept = depth
    given = {
        "attn_layer_period": p,
        "attn_layer_offset": a % p,
        "expert_layer_period": q,
        "expert_layer_offset": b % q,
    }

    def kind(block):
        return block % p == a % p, block % q == b % q

    same = all(kind(new) == kind(old) for new, old in enumerate(kept))
    if same:
        assert cut(n, kept, **given) == given
    else:
        with pytest.raises(UnsupportedModel, match=r"period of \d+: blocks \[.*would change kind"):
            cut(n, kept, **given)


@pytest.mark.parametrize(("freq", "kept", "fine"), [(2, [2, 3, 4, 5], True), (2, KEPT, False)])
def test_deepseek_moe_frequency(freq, kept, fine):
    if fine:
        assert cut(kept=kept, moe_layer_freq=freq) == {"moe_layer_freq": freq}
    else:
        with pytest.raises(UnsupportedModel, match="moe_layer_freq` is a period of 2: blocks"):
            cut(kept=kept, moe_layer_freq=freq)


@given(depths(), st.lists(st.sampled_from("ra"), min_size=1, max_size=5))
def test_repeating_patterns_are_written_out(depth, pattern):
    n, kept = depth
    new = cut(n, kept, block_types=pattern)["block_types"]
    assert len(new) == len(kept)
    kinds(n, kept, lambda old: pattern[old % len(pattern)], lambda block: new[block % len(new)])


def test_gpt_neo_attention():
    new = cut(
        attention_types=[[["global", "local"], 3], [["local"], 2]],
        attention_layers=["global", "local"] * 3 + ["local", "local"],
    )
    layers = ["global", "global", "local", "local"]
    assert new == {"attention_types": [[layers, 1]], "attention_layers": layers}


def test_residual_branches_keep_their_scale():
    new = cut(scale_depth=1.4)["scale_depth"]
    assert new / math.sqrt(4) == pytest.approx(1.4 / math.sqrt(8), rel=1e-15)


def test_a_second_count_of_blocks_follows():
    assert cut(num_blocks=8) == {"num_blocks": 4}
    assert cut(num_blocks=5) == {"num_blocks": 5}  # something else


def test_the_depth_field_has_other_names():
    assert reindex({"n_layer": 8}, KEPT, 8, "n_layer") == {"n_layer": 4}
    both = {"n_layer": 8, "num_layers": 8, "n_layers": 3}  # whoever reads which
    assert reindex(both, KEPT, 8, "n_layer") == {"n_layer": 4, "num_layers": 4, "n_layers": 3}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"num_kv_shared_layers": 2}, "reuse the keys and values of earlier ones"),
        ({"hidden_size_per_layer_input": 256}, "holds columns for every block"),
        ({"ple_layer_ids": [1, 3]}, "hashed by their place"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scaled by the block's own index"),
        ({"rescale_every": 6}, "halved after every so many blocks; set it to 0"),
        ({"is_encoder_decoder": True}, "sleb cuts decoder-only models"),
        ({"indexer_types": ["full", "shared"] * 4}, "reuses what an earlier block's indexer"),
        ({"model_type": "diffllama"}, r"diffllama cannot be cut exactly: .*\(lambda_init\)"),
        ({"model_type": "zamba2"}, "zamba2 cannot be cut exactly: one transformer block is shared"),
        ({"model_type": "zaya"}, "router state of the block before"),
        ({"model_type": "roberta"}, "attention sees later tokens"),
        ({"model_type": "roberta", "is_decoder": False}, "`is_decoder` is not set"),
        # a pattern over ids without the list that it makes
        ({"sliding_window_pattern": 6, "layer_types": None}, "no `layer_types` list to cut: load"),
        ({"sliding_window_pattern": "LLLG"}, "= 'LLLG' is a pattern over block ids"),
        ({"full_attention_interval": 4}, "`full_attention_interval` = 4 .* no `layer_types`"),
        ({"no_rope_layer_interval": 4}, "no `no_rope_layers` list"),
        ({"interleave_moe_layer_step": 2, "moe_layers": None}, "no `moe_layers` list"),
        # unknown fields, and known ones in an unknown form
        (
            {"widget_sizes": [1, 2] * 4},
            r"`widget_sizes` has one entry per block \(8\) but no re-index",
        ),
        ({"widget": {"sizes": [1, 2] * 4}}, r"`widget` has one entry per block"),
        ({"moe_layer_start_index": [1, 2]}, r"`moe_layer_start_index` = \[1, 2\] .* not in a form"),
        ({"layer_types": {"full": [0, 1]}}, "`layer_types` = .* not in a form that sleb knows"),
    ],
)
def test_what_cannot_be_kept_is_refused(config, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        refuse_unsupported(config, 8)
    with pytest.raises(UnsupportedModel, match=reason):
        reindex(config, KEPT, 8)


@pytest.mark.parametrize(
    "config",
    [
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": None, "rescale_every": 0},
        {"scale_attn_by_inverse_layer_idx": False, "is_encoder_decoder": False},
        {"model_type": "roberta", "is_decoder": True},
        {"sliding_window_pattern": 4, "layer_types": ["full_attention"] * 8},
        {"interleave_moe_layer_step": 2, "moe_layers": []},
        {"interleave_moe_layer_step": 1, "no_rope_layer_interval": 0},
        {"indexer_types": ["full"] * 8, "moe_layer_freq": 1, "ple_layer_ids": []},
        # lists that are as long as the model is deep by chance
        {"eos_token_id": list(range(8)), "architectures": ["A"] * 8},
        {"mtp_layers_block_type": ["moe"] * 8, "suppress_tokens": [1] * 8},
        {"mlp_multipliers": [1.0] * 7, "name": "abcdefgh", "nested": {"a": 1}},
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, 2.0] * 4}},
    ],
)
def test_harmless_values_are_not_refused(config):
    refuse_unsupported(config, 8)


@given(depths(), st.sampled_from(sorted(RULES)))
def test_a_field_that_is_absent_or_none_stays_so(depth, field):
    n, kept = depth
    assert cut(n, kept) == {}
    assert cut(n, kept, **{field: None}) == {field: None}


@given(depths())
def test_keeping_every_block_changes_nothing(depth):
    n, _ = depth
    config = {
        "layer_types": ["a", "b"] * (n // 2) + ["a"] * (n % 2),
        "moe_layers": list(range(0, n, 2)),
        "first_k_dense_replace": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "moe_layer_start_index": 0,
        "moe_layer_end_index": n - 1,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
    }
    assert cut(n, range(n), **config) == config


def test_fields_are_listed_for_inspection():
    config = {
        "num_experts": 8,
        "layer_types": ["a"] * 8,
        "first_k_dense_replace": 3,
        "sliding_window": 8,
        "decoder_sparse_step": 2,
    }
    assert [(field.name, field.kind.split(":")[0]) for field in depth_fields(config, 8)] == [
        ("decoder_sparse_step", "period"),
        ("first_k_dense_replace", "count of the first blocks"),
        ("layer_types", "one entry per block"),
    ]
