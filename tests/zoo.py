"""Tiny random causal LMs of many architectures, built from their configs without any download.

``FAMILIES`` has one row per ``model_type`` (or ``model_type:variant``): what its config needs
besides ``GENERIC``. Rows are chosen so that neighbouring blocks differ in kind (sliding or full
attention, dense or MoE), and weights are drawn wide enough that every block, and every wrong mask,
shows in the logits.
"""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

BLOCKS = 8
VOCAB = 128

GENERIC: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    # state space and linear attention
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # sparse attention with an indexer
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
}


def pattern(*kinds: str) -> list[str]:
    """The kinds repeated over all blocks, starting again at each end."""
    return [kinds[i % len(kinds)] for i in range(BLOCKS)]


SLIDING = {"layer_types": pattern("sliding_attention", "sliding_attention", "full_attention")}
LINEAR = {"layer_types": pattern("linear_attention", "full_attention", "full_attention")}
DENSE_FIRST = {"first_k_dense_replace": 3}
DENSE_MIXED = {"mlp_layer_types": pattern("dense", "sparse", "sparse")}
SPARSE_STEP = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
# latent attention takes its head sizes from other fields
MLA = {"num_key_value_heads": 4, "head_dim": None}

PLAIN = [
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "cohere", "deepseek_v4", "doge", "ernie4_5",
    "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "glm", "glm4", "gpt2",
    "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "hyperclovax", "jais2", "jetmoe", "llama", "mamba", "minimax_m2",
    "minimax_m3_vl_text", "ministral3", "mistral", "mixtral", "mpt", "nanochat", "nemotron",
    "olmo", "olmo2", "olmoe", "openai-gpt", "persimmon", "phi", "phi3", "phimoe", "seed_oss",
    "solar_open", "stablelm", "starcoder2", "xlstm",
]  # fmt: skip
WITH_WINDOWS = [
    "cohere2", "cohere2_moe", "cwm", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "ministral",
    "modernbert-decoder", "olmo3", "vaultgemma",
]  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN},
    **dict.fromkeys(WITH_WINDOWS, SLIDING),
    "afmoe": {**SLIDING, "num_dense_layers": 3},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "axk1": {**MLA, **DENSE_FIRST},
    "axk2": {**MLA, **DENSE_MIXED},
    "bamba": {"attn_layer_indices": [1, 2, 4, 5]},
    "bert": {"is_decoder": True},
    "codegen": {"rotary_dim": 4},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "d_model": 32,
    },
    "deepseek_v2": {**MLA, **DENSE_FIRST},
    "deepseek_v3": {**MLA, **DENSE_FIRST},
    "deepseek_v32": {**MLA, **DENSE_MIXED},
    "dots1": {**SLIDING, **DENSE_FIRST, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 2},
    "exaone_moe": {**SLIDING, **DENSE_MIXED},
    "gemma4_text": {
        "layer_types": pattern("full_attention", "sliding_attention", "full_attention"),
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_text:twelve blocks": {
        "num_hidden_layers": 12,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_unified_text": {
        "layer_types": pattern("full_attention", "sliding_attention", "full_attention"),
        "global_head_dim": 16,
    },
    "glm4_moe": DENSE_FIRST,
    "glm4_moe_lite": {**MLA, **DENSE_MIXED},
    "glm_moe_dsa": {**MLA, **DENSE_MIXED},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granite_swa": {**SLIDING, "layer_rope_theta": [1e4, 2e4, 3e4, 4e4, 5e4, 6e4, 7e4, 8e4]},
    "granitemoe_swa": {**SLIDING, "layer_rope_theta": [1e4, 2e4, 3e4, 4e4, 5e4, 6e4, 7e4, 8e4]},
    "granitemoehybrid": {**LINEAR, "shared_intermediate_size": 16},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"moe_topk": [2, 1] * 4},
    "hy_v3": DENSE_MIXED,
    "hy_v4": {**MLA, **DENSE_MIXED, "indexer_types": ["full"] * BLOCKS},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "local_layer_ids": [0, 1, 3, 4, 6],
        **DENSE_MIXED,
    },
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear:ids from one": {
        **MLA,
        "linear_attn_config": {
            "full_attn_layers": [2, 4, 5, 8],
            "kda_layers": [1, 3, 6, 7],
            "head_dim": 8,
            "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
        "first_k_dense_replace": 3,
    },
    "kimi_linear": {**MLA, **LINEAR, **DENSE_MIXED, "linear_num_heads": 2, "linear_head_dim": 8},
    "laguna": {**SLIDING, **DENSE_MIXED, "num_attention_heads_per_layer": [4, 2] * 4},
    "lfm2": {"layer_types": pattern("conv", "full_attention", "full_attention")},
    "lfm2_moe": {
        "layer_types": pattern("conv", "full_attention", "full_attention"),
        "num_dense_layers": 3,
    },
    "llama:tied": {"tie_word_embeddings": True},
    "llama4_text": {"moe_layers": [1, 2, 5], "no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "mellum": {**SLIDING, **DENSE_MIXED},
    "mimo_v2_flash": {**SLIDING, **DENSE_MIXED},
    "minicpm3": MLA,
    "minimax": LINEAR,
    "nemotron_h": {
        "layers_block_type": pattern("linear_attention", "moe", "full_attention", "mlp"),
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": LINEAR,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "qwen2": {**SLIDING, "use_sliding_window": True},
    "qwen2_moe": {**SLIDING, **SPARSE_STEP, "use_sliding_window": True},
    "qwen3": {**SLIDING, "use_sliding_window": True},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": SPARSE_STEP,
    "qwen3_moe:step of three": {"decoder_sparse_step": 3},
    "qwen3_next": {**LINEAR, **SPARSE_STEP},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention", "attention"],
        "attention_window_size": 8,
        "lru_width": 32,
    },
    "roberta": {"is_decoder": True},
    "rwkv": {"rescale_every": 0},
    "smollm3": {**SLIDING, "no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0]},
    "xglm": {"ffn_dim": 48},
    "youtu": {**MLA, "pad_token_id": None},
}


# One architecture per kind of structure; these are tested by default, and all with `make test-all`.
KINDS: dict[str, str] = {
    "pre-norm, rotary positions, grouped heads": "llama",
    "tied embeddings": "llama:tied",
    "learned positions, fused projections, biases": "gpt2",
    "norms behind blocks, sliding windows": "gemma2",
    "windows by a pattern, one rotation each": "gemma3_text",
    "head sizes by kind of block": "gemma4_text",
    "experts, stored one by one": "mixtral",
    "experts in every n-th block": "qwen3_moe",
    "dense blocks first, latent attention": "deepseek_v3",
    "an indexer for sparse attention": "glm_moe_dsa",
    "linear attention between full": "qwen3_next",
    "convolutions between attention": "lfm2",
    "state space alone": "mamba",
    "every kind of block, experts too": "nemotron_h",
    "a period of blocks": "jamba",
    "lists of block ids": "bamba",
    "lists of block ids from one": "kimi_linear:ids from one",
    "values by block": "laguna",
    "positions by block": "smollm3",
    "attention beside the MLP": "gptj",
    "a block that has to stay": "modernbert-decoder",
    "recurrence, its own cache": "recurrent_gemma",
}


def families() -> list[Any]:
    """Parameters for pytest: every family, of which those that stand for a kind are quick."""
    quick = {*KINDS.values()}
    return [f if f in quick else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


# The place of these blocks is built differently from all others, so they must stay.
FIXED = {"gpt_neox_japanese": {7}, "modernbert-decoder": {0}, "rwkv": {0}}

# Generating with the key-value cache differs from without one before any cut.
CACHE_DIFFERS = {"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4", "minimax", "xlstm"}


def cuts(family: str) -> list[set[int]]:
    """Sets of blocks to remove: inside, apart, and both ends."""
    if family == "jamba":  # only whole periods of its pattern
        return [{1, 2, 3, 4}, {0, 1, 2, 3}]
    sets = [{1}, {3}, {2, 5}, {0, 7}]
    return [blocks - FIXED.get(family, set()) for blocks in sets]


def tiny_config(family: str, **options: Any) -> Any:
    """The family's config: GENERIC where it has such a field, its row, then ``options``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = family.split(":")[0]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    kind = CONFIG_MAPPING[name]
    names = {*kind().to_dict(), *kind.attribute_map}
    fields = {**{k: v for k, v in GENERIC.items() if k in names}, **FAMILIES.get(family, {})}
    fields.update(options)
    return kind(**{name: value for name, value in fields.items() if value is not None})


def tiny(family: str, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A random model of the family in evaluation mode, and its config."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        size = model.num_parameters()
        assert size < 2**24, f"{family} needs a row in FAMILIES that makes it tiny: {size} weights"
        randomize(model)
    return model, model.config


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every weight anew, so that no two blocks are alike in any of them."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
            tensor.normal_(0, 0.15)
        elif isinstance(tensor, nn.Parameter) or name.endswith("_bias"):
            # norms stay near one; expert biases are buffers, drawn since they start at zero
            tensor += torch.empty_like(tensor).normal_(0, 0.05)


def probe(length: int = 24) -> torch.Tensor:
    """Token ids [1, length], longer than any window in the zoo."""
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
