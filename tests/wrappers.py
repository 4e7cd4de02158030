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


# Published models, each with what its config.json says otherwise than the file of ``WRAPPERS``.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma-3-4b-it",
        {"vocab_size": 259, "text_config": {"sliding_window_pattern": 6}},
    ),
    "mistral3": (
        "Mistral-Small-3.2-24B-Instruct-2506",
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
    ),
    "qwen2_5_vl": ("Qwen2.5-VL-3B-Instruct", {"tie_word_embeddings": True}),
    "qwen3_vl": (
        "Qwen3-VL-4B-Instruct",
        {
            "tie_word_embeddings": True,
            "text_config": {"tie_word_embeddings": True, "rope_theta": 5e6},
        },
    ),
    "qwen3_5": (
        "Qwen3.5-27B",
        {
            "text_config": {
                "layer_types": [
                    *["linear_attention"] * 3,
                    "full_attention",
                    *["linear_attention"] * 2,
                ],
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": 4,
            }
        },
    ),
    "llama4": (
        "Llama-4-Scout-17B-16E-Instruct",
        {
            "text_config": {
                "attention_bias": False,
                "moe_layers": None,
                "interleave_moe_layer_step": 1,
                "no_rope_layers": [1, 1, 1, 0, 1, 1],
                "num_experts_per_tok": 1,
                "rope_scaling": None,
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
