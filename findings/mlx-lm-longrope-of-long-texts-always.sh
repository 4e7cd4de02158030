#!/usr/bin/env bash
# mlx-lm 0.32.2 rotates a model with `longrope` (Phi-3.5, Phi-4-mini) by its `long_factor` and the attention factor of
# long texts, however short the text is; `short_factor` is read and not used. transformers takes the short ones up to
# `original_max_position_embeddings` tokens. So a prompt of a few hundred words gets other log-probabilities there, by
# 0.3 nats per token in a tiny random model; no warning.
#
# Seen with mlx-lm 0.32.2, a Phi-3 of two blocks with random weights, 4,096 positions of which 1,024 are original:
#   another short_factor   largest difference of logits 0
#   another long_factor    largest difference of logits about 11, on 32 tokens
# So who compares mlx-lm with transformers on such a model compares texts longer than the original length.
#
# Needs Python 3.10 or newer and 500 MB; one minute. Ends with 1 if any of this has changed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4; sys_platform == 'linux'" \
  "mlx==0.32.4; sys_platform == 'darwin'" mlx-lm==0.32.2
cat > ask.py <<'P'
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.phi3 import Model, ModelArgs

mx.set_default_device(mx.cpu)
ONE, OTHER = [1.0, 1.1, 1.5, 4.0, 12.0, 40.0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]

def logits(short, long):
    mx.random.seed(0)
    scaling = {"type": "longrope", "short_factor": short, "long_factor": long}
    model = Model(ModelArgs.from_dict({
        "model_type": "phi3", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 1024, "rope_scaling": scaling, "tie_word_embeddings": True}))
    matrices = [(name, p) for name, p in tree_flatten(model.parameters()) if p.ndim > 1]
    model.load_weights([(name, mx.random.normal(p.shape) * 0.3) for name, p in matrices], strict=False)
    return model(mx.array([[(7 * i * i) % 250 for i in range(32)]]))

plain = logits([1.0] * 6, ONE)
short = mx.abs(plain - logits(OTHER, ONE)).max().item()
long = mx.abs(plain - logits([1.0] * 6, OTHER)).max().item()
print(f"another short_factor: {short:g}; another long_factor: {long:g}")
assert short == 0 and long > 0.01, "the behaviour has changed"
P
env/bin/python ask.py
