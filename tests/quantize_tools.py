"""Tiny quantized checkpoints: torchao's through sleb, compressed-tensors' packed by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conftest import byte_tokenizer

GROUP = 32
BLOCKS = 6


def save_dense(path: Path, **options: Any) -> Path:
    """A random Llama of 6 blocks, the columns of its matrices in whole groups; and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **options})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def pack(dense: Path, out: Path, *, ignore: tuple[str, ...] = (), targets: Any = None) -> Path:
    """``dense`` as compressed-tensors, four bits in groups, rounded to the nearest; ``ignore`` are
    modules that stay, besides the head."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    out.mkdir()
    for path in dense.iterdir():
        if path.suffix == ".json":
            (out / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight") or module in ignore:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        grouped = tensor.reshape(rows, columns // GROUP, GROUP)
        scale = grouped.abs().amax(dim=2) / 7
        q = (grouped / scale[..., None]).round().clamp(-8, 7).reshape(rows, columns)
        tensors[f"{module}.weight_packed"] = pack_to_int32(q.to(torch.int8), 4)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {
            "group_0": {
                "targets": targets or ["Linear"],
                "weights": {**weights, "group_size": GROUP},
            }
        },
    }
    (out / "config.json").write_text(json.dumps(config))
    return out
