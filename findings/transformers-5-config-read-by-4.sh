#!/usr/bin/env bash
# A Llama whose rotary base is not 10,000, saved by transformers 5: transformers 4.57 loads the folder without a
# word and computes another model. transformers 5 writes the base into `rope_parameters` alone; 4.57 looks for
# `rope_theta`, finds none, and takes its default.
#
# Seen with transformers 5.17.0 (saving) and 4.57.6 (loading), tiny random weights, base 500,000:
#   5.17.0 writes rope_theta: False, rope_parameters: True
#   4.57.6 reads base 10000.0, no message names rope; log-probabilities differ by up to 12
#   with "rope_theta": 500000.0 put back by hand they agree to 1e-6
# So who passes a checkpoint on has to keep the maker's own spelling of config.json.
#
# Needs Python 3.10 to 3.12; torch comes twice, several GB where pip takes a CUDA build. Ends with 1 if this changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
for v in 5.17.0 4.57.6; do
  python3 -m venv "env-$v"
  "env-$v/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy "transformers==$v"
done
cat > save.py <<'P'
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.5,
    rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})).eval()
model.save_pretrained("model")
written = json.load(open("model/config.json"))
print("writes rope_theta:", "rope_theta" in written, " rope_parameters:", "rope_parameters" in written)
assert "rope_theta" not in written and written["rope_parameters"]["rope_theta"] == 500000.0
with torch.no_grad():
    torch.save(model(torch.arange(48)[None]).logits.log_softmax(-1), "want.pt")
P
cat > load.py <<'P'
import json, torch
from transformers import AutoModelForCausalLM

def difference():
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    with torch.no_grad():
        got = model(torch.arange(48)[None]).logits.log_softmax(-1)
    return model.config.rope_theta, float((got - torch.load("want.pt")).abs().max())

base, silent = difference()
print(f"reads base {base}, log-probabilities differ by up to {silent:.4f}")
config = json.load(open("model/config.json"))
json.dump({**config, "rope_theta": 500000.0}, open("model/config.json", "w"))
restored, none = difference()
print(f"with rope_theta put back: base {restored}, {none:.6f}")
assert base == 10000.0 and silent > 1e-3 and none < 1e-4, "the behaviour has changed"
P
env-5.17.0/bin/python save.py 2> log || { cat log; exit 1; }
env-4.57.6/bin/python load.py 2> log || { cat log; exit 1; }
if grep -qi rope log; then echo "a message names rope now"; cat log; exit 1; fi
