"""Checkpoints whose blocks lack attention or MLP, as ``nemotron-nas``."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

import sleb
from conftest import byte_tokenizer, tiny_llama
from plan_tools import edit_config, plan_of
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.units import parse_unit

UNITS = ("2.attention", "3.mlp", 4)


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


SCORE = """
import json, sys
import mlx.core as mx
from mlx_lm.utils import load_model
from pathlib import Path
model, _ = load_model(Path(sys.argv[1]))
logits = model(mx.array([json.loads(sys.argv[2])])).astype(mx.float32)
print(json.dumps(logits[0].tolist()))
"""


@pytest.mark.runtimes
def test_mlx_lm_computes_the_bypassed_model(written):
    python = os.environ.get("SLEB_TEST_MLX")
    if not python:
        pytest.skip("SLEB_TEST_MLX is not set; `make test-runtimes` sets it")
    model, _, out = written
    ids = [3, 200, 77, 5, 90, 41]
    done = subprocess.run(
        [python, "-c", SCORE, str(out), json.dumps(ids)], capture_output=True, text=True, check=True
    )
    dense = sleb.load(model)
    with dense.stack.bypassed([*map(parse_unit, UNITS)]), torch.no_grad():
        wanted = dense.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=2e-3)
