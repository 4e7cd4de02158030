"""Checkpoints whose blocks lack attention or MLP, as ``nemotron-nas``."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM

import sleb
from conftest import byte_tokenizer, tiny_llama
from plan_tools import edit_config, plan_of
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.units import parse_unit

UNITS = ("2.attention", "3.mlp", 4)
LAYERS = {"num_hidden_layers": 6, "max_position_embeddings": 256, "tie_word_embeddings": False}


def saved(folder: Path, **options) -> Path:
    model = tiny_llama(**options)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, a plan, and what `sleb apply --format` makes of them."""
    place = tmp_path_factory.mktemp("nas")
    model = saved(place / "m", width=256)
    plan_of(model, *map(parse_unit, UNITS)).save(place / "plan.json")
    out = sleb.apply(place / "plan.json", model, place / "out", format="nemotron-nas")
    return model, place / "plan.json", out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_tensors_of_parts_that_go_are_left_out_and_others_keep_their_bytes(written):
    model, _, out = written
    dense, found = tensors_of(model), tensors_of(out)
    lost = {"2.self_attn", "2.input_layernorm", "3.mlp", "3.post_attention_layernorm"}
    for name, tensor in dense.items():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        new = f"model.layers.4.{rest}" if name.startswith("model.layers.5.") else name
        gone = f"{block}.{rest.split('.')[0]}" in lost or name.startswith("model.layers.4.")
        if not gone:
            assert torch.equal(found.pop(new), tensor)
    assert not found


def test_the_table_says_what_each_block_has_as_attributes(written):
    _, _, out = written
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert (config.model_type, config.num_hidden_layers) == ("nemotron-nas", 5)
    assert config.architectures == ["DeciLMForCausalLM"]
    assert [b.attention.no_op for b in config.block_configs] == [i == 2 for i in range(5)]
    assert [b.ffn.no_op for b in config.block_configs] == [i == 3 for i in range(5)]
    groups = {b.attention.n_heads_in_group for b in config.block_configs if not b.attention.no_op}
    assert groups == {2}
    for block in config.block_configs:
        if not block.ffn.no_op:
            width = int(2 * block.ffn.ffn_mult * config.hidden_size / 3)
            assert -(-width // 256) * 256 == 256
    assert json.loads(config.to_json_string())["block_configs"]
    raw = json.loads((out / "config.json").read_text())
    assert raw["rope_theta"] == 10000.0
    assert "skip" not in json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "units", "why"),
    [
        ({}, ["0.attention"], "first block"),
        ({"model_type": "qwen3"}, UNITS, "qwen3"),
        ({"attention_bias": True}, UNITS, "biases"),
        ({"intermediate_size": 200}, UNITS, "256"),
        ({"model_type": "mistral", "sliding_window": 8}, UNITS, "windows"),
    ],
)
def test_what_the_format_cannot_say_is_refused(written, change, units, why, tmp_path):
    model = saved(tmp_path / "m", width=256)
    plan_of(model, *map(parse_unit, units)).save(tmp_path / "plan.json")
    edit_config(model, **change)
    with pytest.raises(UnsupportedModel, match=why):
        sleb.apply(tmp_path / "plan.json", model, tmp_path / "out", format="nemotron-nas")
    assert not (tmp_path / "out").exists()


def test_the_format_is_of_folders(written, tmp_path):
    model, plan, _ = written
    with pytest.raises(InputError, match="--format"):
        sleb.apply(plan, model, tmp_path / "out.gguf", format="nemotron-nas")


MLX = """
import json, sys
import mlx.core as mx
from mlx_lm.utils import load_model
from pathlib import Path
model, _ = load_model(Path(sys.argv[1]))
ids = json.loads(sys.argv[2])
logits = model(mx.array([ids])).astype(mx.float32)[0]
found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
print(json.dumps([found[i, token].item() for i, token in enumerate(ids[1:])]))
"""
VLLM = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
from vllm import LLM, SamplingParams
how = {"max_model_len": 64, "max_num_seqs": 1, "enforce_eager": True, "dtype": "float32"}
engine = LLM(model=sys.argv[1], skip_tokenizer_init=True, trust_remote_code=True, **how)
ids = json.loads(sys.argv[2])
asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
(made,) = engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
found = zip(ids[1:], made.prompt_logprobs[1:])
print(json.dumps([pair[token].logprob for token, pair in found]))
"""
IDS = [3, 200, 77, 5, 90, 41, 18, 122, 9, 64]


def scored(runtime: str, code: str, folder: Path) -> list[float]:
    """Log-probabilities of all of ``IDS`` but the first, in another interpreter."""
    variable = f"SLEB_TEST_{runtime}"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} is not set; `make test-runtimes` sets it")
    command = [python, "-c", code, str(folder), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def bypassed(model: str | Path, units) -> list[float]:
    """The same of the model in transformers, without these units."""
    dense = sleb.load(model, dtype="float32", device="cpu")
    with dense.stack.bypassed([*map(parse_unit, units)]), torch.no_grad():
        logits = dense.model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[range(len(IDS) - 1), IDS[1:]].tolist()


@pytest.mark.runtimes
def test_mlx_lm_computes_the_bypassed_model(written):
    model, _, out = written
    found = scored("MLX", MLX, out)
    np.testing.assert_allclose(found, bypassed(model, UNITS), rtol=0, atol=2e-3)


@pytest.mark.runtimes
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vllm_computes_the_bypassed_model(family, tmp_path):
    """It has kernels for heads of 32 and more, and takes Qwen2's biases."""
    config = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    kind = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    torch.manual_seed(0)
    dense = kind(kind.config_class(vocab_size=259, intermediate_size=256, **LAYERS, **config))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.15)
    dense.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    plan = plan_of(tmp_path / "m", *map(parse_unit, UNITS))
    out = sleb.apply(plan, tmp_path / "m", tmp_path / "out", format="nemotron-nas")
    wanted, whole = bypassed(tmp_path / "m", UNITS), bypassed(tmp_path / "m", ())
    found = scored("VLLM", VLLM, out)
    assert np.abs(np.subtract(wanted, whole)).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.runtimes
def test_vllm_computes_a_real_model_without_its_parts(real_model, tmp_path):
    from sleb.models.source import resolve

    model = resolve(real_model).path
    units = ("5.attention", "12.attention", "20.attention", "27.attention", "14.mlp", 16)
    out = sleb.apply(
        plan_of(model, *map(parse_unit, units)), model, tmp_path / "out", format="nemotron-nas"
    )
    np.testing.assert_allclose(scored("VLLM", VLLM, out), bypassed(model, units), atol=1e-3, rtol=0)
