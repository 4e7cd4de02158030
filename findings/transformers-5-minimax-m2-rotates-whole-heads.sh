#!/usr/bin/env bash
# MiniMax-M2 to M2.7 say in their config.json `rotary_dim` 64 for heads of 128: half of each head is rotated. The class
# that transformers 5.17.0 has of its own for this type does not read the field and rotates whole heads: it loads
# without a word, and each block of attention computes something else. Reported as transformers #48241. mlx-lm
# reads the field, and differs from transformers by 0.1 nats per token in a tiny random model.
#
# Seen with transformers 5.17.0, a MiniMax-M2 of two blocks with random weights and heads of 16:
#   rotary_dim 8 against none            largest difference of logits 0
#   partial_rotary_factor 0.5 instead    largest difference of logits about 11
# So who loads a MiniMax-M2 there adds "partial_rotary_factor": 0.5 to its config.json.
#
# Needs Python 3.10 or newer and 1 GB; two minutes. Ends with 1 if any of this has changed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.17.0
cat > ask.py <<'P'
import json, pathlib, torch
from transformers import AutoConfig, AutoModelForCausalLM

FILE = {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "vocab_size": 256, "hidden_size": 64,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 5000000,
        "max_position_embeddings": 512, "use_qk_norm": True, "qk_norm_type": "per_layer", "dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2}

def logits(**more):
    folder = pathlib.Path("model")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FILE, **more}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[(7 * i * i) % 250 for i in range(32)]])).logits

none = logits()
dim = (none - logits(rotary_dim=8)).abs().max().item()
factor = (none - logits(partial_rotary_factor=0.5)).abs().max().item()
print(f"rotary_dim: {dim:g}; partial_rotary_factor: {factor:g}")
assert dim == 0 and factor > 0.01, "the behaviour has changed"
P
env/bin/python ask.py
