"""config.json as makers publish them: in their own words, not as transformers 5 would write them.

``HUB`` has, by a name, the class of a tiny model, what its file says, and cuts to try. Each file
has words that transformers 5 renames or drops (``rope_theta``, ``torch_dtype``, ``rotary_pct``,
patterns in place of lists, kinds of layers by older names).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from conftest import byte_tokenizer

BLOCKS = 8
COMMON: dict[str, Any] = {
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": BLOCKS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "a_field_of_the_maker": {"nested": [1, None, "é"]},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ANY = ((1, 4), (0, 7))
GEMMA3 = {
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 8,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 8,
}


def _file(kind: str, architecture: str, **own: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": kind, **COMMON, **own}


def _gpt2(depth: str) -> dict[str, Any]:
    names = {"n_embd": 32, "n_head": 4, "n_positions": 256, "n_inner": None, depth: BLOCKS}
    few = {k: v for k, v in COMMON.items() if k[-2:] == "id" or k.startswith(("torch", "vocab"))}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **few, **names}


HUB: dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "llama": (
        _file("llama", "LlamaForCausalLM", rope_theta=500000.0, rope_scaling=LLAMA3),
        ANY,
    ),
    "llama linear": (
        _file(
            "llama",
            "LlamaForCausalLM",
            rope_theta=10000.0,
            rope_scaling={"type": "linear", "factor": 4.0},
        ),
        ANY,
    ),
    "qwen2": (
        _file(
            "qwen2",
            "Qwen2ForCausalLM",
            rope_theta=1000000.0,
            use_sliding_window=False,
            sliding_window=8,
            max_window_layers=BLOCKS,
        ),
        ANY,
    ),
    "qwen2 with windows": (
        _file(
            "qwen2",
            "Qwen2ForCausalLM",
            rope_theta=1000000.0,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=3,
        ),
        ANY,
    ),
    "gemma3": (
        _file("gemma3_text", "Gemma3ForCausalLM", **GEMMA3),
        (*ANY, (0, 1, 2, 3, 4, 5)),
    ),
    "cohere2": (
        _file(
            "cohere2",
            "Cohere2ForCausalLM",
            rope_theta=50000,
            sliding_window=8,
            sliding_window_pattern=4,
            layer_norm_eps=1e-05,
            logit_scale=0.25,
        ),
        (*ANY, (2, 3, 4, 5)),
    ),
    "qwen3_next": (
        _file(
            "qwen3_next",
            "Qwen3NextForCausalLM",
            rope_theta=10000000,
            partial_rotary_factor=0.25,
            full_attention_interval=4,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            shared_expert_intermediate_size=16,
            **EXPERTS,
            **LINEAR,
        ),
        (*ANY, (4, 5, 6, 7)),
    ),
    "qwen3_moe": (
        _file(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            rope_theta=1000000.0,
            decoder_sparse_step=2,
            **EXPERTS,
        ),
        ANY,
    ),
    "granitemoehybrid": (
        _file(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            rope_theta=10000.0,
            layer_types=["mamba", "mamba", "attention", "mamba"] * 2,
            position_embedding_type="nope",
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            **MAMBA,
        ),
        ANY,
    ),
    "gpt_neox": (
        _file(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            rotary_pct=0.5,
            rotary_emb_base=20000,
            layer_norm_eps=1e-05,
            use_parallel_residual=True,
        ),
        ANY,
    ),
    "gpt2": (_gpt2("n_layer"), ANY),
    "gpt2, another name": (_gpt2("num_hidden_layers"), ANY),
    "smollm3": (
        _file(
            "smollm3",
            "SmolLM3ForCausalLM",
            rope_theta=5000000.0,
            no_rope_layers=[1, 1, 1, 0] * 2,
            no_rope_layer_interval=4,
            use_sliding_window=False,
            sliding_window=None,
        ),
        (*ANY, (0, 1, 2, 3)),
    ),
    "exaone4": (
        _file(
            "exaone4",
            "Exaone4ForCausalLM",
            rope_theta=1000000,
            sliding_window=8,
            sliding_window_pattern="LLLG",
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        ),
        (*ANY, (1, 2, 3, 4)),
    ),
    "gpt_oss": (
        _file(
            "gpt_oss",
            "GptOssForCausalLM",
            rope_theta=150000,
            sliding_window=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"] * 4,
        ),
        ANY,
    ),
    "glm4_moe": (
        _file(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            rope_theta=1000000,
            partial_rotary_factor=0.5,
            first_k_dense_replace=2,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        ANY,
    ),
}


def hub_folder(name: str, folder: Path) -> Path:
    """A random model under the file ``name`` of ``HUB``, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    text = json.dumps(HUB[name][0], indent=1) + "\n"
    (folder / "config.json").write_text(text)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(text)
    return folder
