"""Checkpoints whose blocks lack attention or MLP, as ``nemotron-nas``."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM

import sleb
from conftest import byte_tokenizer, tiny_llama
from plan_tools import edit_config, plan_of
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Plan
from sleb.core.units import parse_unit
from sleb.models.source import resolve
from sleb.runtimes.compatibility import check_runtimes

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


def test_what_needs_transformers_says_who_runs_it(written, tmp_path):
    model, _, out = written
    for attempt in (
        lambda: sleb.load(out, trust_remote_code=True),
        lambda: sleb.bench(model, [out]),
        lambda: sleb.quantize(out, tmp_path / "q", scheme="int8"),
        lambda: sleb.heal(out, model, tmp_path / "h", text=("default",)),
    ):
        with pytest.raises((InputError, UnsupportedModel), match="docs/units"):
            attempt()
    assert sleb.describe(out).supported is False
    assert not [*tmp_path.iterdir()]


def test_a_folder_can_be_pushed(written):
    _, _, out = written
    found = sleb.push(out, "me/cut", dry_run=True)
    assert {"config.json", "configuration_nemotron_nas.py", "plan.json"} <= {*found.files}


def test_the_format_is_of_folders(written, tmp_path):
    model, plan, _ = written
    with pytest.raises(InputError, match="--format"):
        sleb.apply(plan, model, tmp_path / "out.gguf", format="nemotron-nas")


def test_a_folder_is_verified_file_by_file(written, tmp_path):
    model, plan, out = written
    found = sleb.verify(out, model=model).verification
    assert found.passed
    assert {"checksums", "config-kept", "weights", "logits"} <= {c.key for c in found.checks}
    for change, gate in (
        (lambda folder: edit_config(folder, rms_norm_eps=0.1), "config-kept"),
        (lambda folder: flipped(folder / "model.safetensors"), "weights"),
    ):
        folder = shutil.copytree(out, tmp_path / gate)
        (folder / "SHA256SUMS").unlink()
        change(folder)
        checked = sleb.verify(folder, model=model).verification
        assert [c.key for c in checked.checks if not c.passed] == [gate]
    with pytest.raises(InputError, match="nothing that a plan of parts"):
        sleb.verify(model, model=model, plan=plan)


def flipped(path: Path) -> None:
    """Change the last byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_what_is_not_loaded_is_judged_by_the_format(written):
    model, plan, out = written
    report = check_runtimes(
        out, model=model, plan=Plan.load(plan), runtimes=("vllm", "llama.cpp", "mlx-lm")
    )
    found = {v.runtime: (v.verdict, v.how) for v in report.verdicts}
    assert found["vllm"] == found["mlx-lm"] == ("accepted", "by rule")
    assert found["llama.cpp"] == ("refused", "by rule")
    with pytest.raises(UnsupportedModel, match="parts of blocks"):
        check_runtimes(out / "x.gguf", model=model, plan=Plan.load(plan))


def loaded_in(runtime: str, model, out: Path) -> None:
    """The folder, and the model, by another interpreter that has the runtime."""
    variable = {"vllm": "SLEB_TEST_VLLM", "mlx-lm": "SLEB_TEST_MLX"}[runtime]
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} is not set; `make test-runtimes` sets it")
    how = {"dtype": "float32", "device": "cpu", "trust_remote_code": True}
    plan, pythons = Plan.load(out / "plan.json"), {runtime: python}
    report = check_runtimes(
        out, model=model, plan=plan, runtimes=(runtime,), pythons=pythons, **how
    )
    (found,) = report.verdicts
    assert (found.verdict, found.how) == ("accepted", "loaded"), found.why
    assert report.moved > 0.1
    assert found.pruned < 1e-4


@pytest.mark.runtimes
def test_mlx_lm_computes_the_bypassed_model(written):
    model, _, out = written
    loaded_in("mlx-lm", model, out)


@pytest.mark.runtimes
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_vllm_computes_the_bypassed_model(kind, tmp_path):
    """It has kernels for heads of 32 and more, and takes Qwen2's biases."""
    heads = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    dense = kind(kind.config_class(vocab_size=259, intermediate_size=256, **LAYERS, **heads))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.15)
    dense.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    plan = plan_of(tmp_path / "m", *map(parse_unit, UNITS))
    out = sleb.apply(plan, tmp_path / "m", tmp_path / "out", format="nemotron-nas")
    loaded_in("vllm", tmp_path / "m", out)


@pytest.mark.runtimes
def test_vllm_computes_a_real_model_without_its_parts(real_model, tmp_path):
    model = resolve(real_model).path
    units = ("5.attention", "12.attention", "20.attention", "27.attention", "14.mlp", 16)
    plan = plan_of(model, *map(parse_unit, units))
    loaded_in("vllm", model, sleb.apply(plan, model, tmp_path / "out", format="nemotron-nas"))
