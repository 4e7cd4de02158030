"""A checkpoint's weights as a GGUF file, for architectures whose tensors go over as they are or by
a rule of one line. llama.cpp's own converter is no package; names are the gguf package's."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gguf_tools import RUNNABLE, add_field

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "seed_oss": "seed_oss",
    "granite": "granite",
    "arcee": "arcee",
    "cohere2": "cohere2",
    "ernie4_5": "ernie4_5",
    "exaone4": "exaone4",
}
"""llama.cpp's name of what transformers calls a type."""
PAIRED = {"llama", "mistral", "smollm3", "granite", "arcee"}
"""Rows of Q and K go in pairs: llama.cpp rotates neighbours, transformers the halves of a head."""
BY_DEPTH = {"exaone4"}
"""llama.cpp tells by the number of blocks whether some slide: none does in one of eight."""
SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def can_be_gguf(folder: Path) -> bool:
    """Whether there is such a rule for the model in ``folder``."""
    config = AutoConfig.from_pretrained(folder)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return config.model_type in ARCHITECTURES and not (slides and config.model_type in BY_DEPTH)


def write_gguf_of(folder: Path, path: Path) -> Path:
    """The model in ``folder`` in float32, with a tokenizer that is only run by ids."""
    config = AutoConfig.from_pretrained(folder)
    kind = config.model_type
    architecture, n = ARCHITECTURES[kind], config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_fields(config, head) | _scaling(config)).items():
        add_field(writer, f"{architecture}.{key}", value)
    for key, value in RUNNABLE.items():
        add_field(writer, key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    by_name = {member: number for number, member in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[architecture], n)
    tensors = load_file(folder / "model.safetensors")
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new, name
        writer.add_tensor(new, _as_llama_cpp_has_it(name, tensor, config).numpy())
    divisors = _divisors(config, head)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fields(config: Any, head: int) -> dict[str, Any]:
    rope = config.rope_parameters
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", 1e-5),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if config.model_type == "cohere2":
        fields["attention.layer_norm_epsilon"] = config.layer_norm_eps
        fields["logit_scale"] = config.logit_scale
        fields["vocab_size"] = config.vocab_size
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        fields["attention.sliding_window"] = config.sliding_window
    return fields


def _scaling(config: Any) -> dict[str, Any]:
    scales = {key: float(getattr(config, k)) for key, k in SCALES.items() if hasattr(config, k)}
    rope = config.rope_parameters
    if rope.get("rope_type") != "yarn":
        return scales
    yarn = {f"rope.scaling.{key}": rope[k] for key, k in YARN.items() if k in rope}
    return {**scales, **yarn, "rope.scaling.type": "yarn"}


def _as_llama_cpp_has_it(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part in heads and config.model_type in PAIRED:
        halves = tensor.unflatten(0, (heads[part], 2, -1))
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    if "norm" in part and config.model_type == "gemma3_text":
        tensor = tensor + 1
    return tensor.float().contiguous()


def _divisors(config: Any, head: int) -> np.ndarray | None:
    """Llama 3's divisors of the rotary frequencies."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, head, 2) / head)
    return (plain / scaled).float().numpy()
