"""A LoRA adapter of the dense model, cut along: on the cut it does what it did on the dense model
with the same blocks bypassed."""

import json

import pytest
import torch

import sleb
from cli_tools import refused, run
from conftest import BLOCKS, save_tiny
from plan_tools import plan_of
from zoo import probe

peft = pytest.importorskip("peft")

REMOVED = (1, 3)
FORMS = {
    "every block": {"target_modules": ["q_proj", "down_proj"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2, 5]},
    "a pattern": {"target_modules": r"model\.layers\.[0245]\.self_attn\.[qv]_proj"},
    "names": {"target_modules": ["layers.3.mlp.up_proj", "model.layers.4.mlp.up_proj", "o_proj"]},
    "ranks": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.2.self_attn.q_proj": 2, r"layers\.[45]\.mlp.down_proj": 8},
        "alpha_pattern": {"layers.4.mlp.down_proj": 32, "layers.1.self_attn.q_proj": 64},
    },
    "DoRA, and a part saved whole": {
        "target_modules": ["q_proj"],
        "use_dora": True,
        "modules_to_save": ["input_layernorm"],
    },
}


def adapter_of(model, folder, **options):
    """An adapter of random weights, saved; and the model with it."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def logits(model):
    return model(input_ids=probe(), use_cache=False).logits


@pytest.mark.parametrize("form", FORMS)
def test_it_does_on_the_cut_what_it_did_beside_the_bypassed_blocks(form, tmp_path):
    source = save_tiny(tmp_path / "model")
    dense = sleb.load(source, dtype="float32", device="cpu")
    out = tmp_path / "cut"
    with dense.stack.bypassed(REMOVED):
        bare = logits(dense.model)
    adapted = adapter_of(dense.model, tmp_path / "adapter", **FORMS[form])
    with dense.stack.bypassed(REMOVED):
        expected = logits(adapted)
    assert (expected - bare).abs().max() > 0.01
    sleb.apply(plan_of(source, *REMOVED), source, out, adapter=str(tmp_path / "adapter"))

    folder = tmp_path / "cut-adapter"
    cut = sleb.load(out, dtype="float32", device="cpu").model
    found = peft.PeftModel.from_pretrained(cut, folder).eval()
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)
    before, after = (
        json.loads((place / "adapter_config.json").read_text())
        for place in (tmp_path / "adapter", folder)
    )
    assert after["base_model_name_or_path"] == str(out)
    assert (before.keys(), before["r"]) == (after.keys(), after["r"])
    if form == "every block":
        changed = {k for k, v in before.items() if after[k] != v}
        assert changed == {"base_model_name_or_path"}


def test_what_cannot_be_cut_along_is_refused_before_anything_is_written(tmp_path, capsys):
    source = save_tiny(tmp_path / "model")
    plan_of(source, *REMOVED).save(tmp_path / "plan.json")
    place = tmp_path / "adapter"
    adapter_of(
        sleb.load(source, dtype="float32", device="cpu").model, place, target_modules=["v_proj"]
    )
    command = ["apply", tmp_path / "plan.json", source, "-o", tmp_path / "cut", "--adapter", place]
    config = place / "adapter_config.json"
    right = json.loads(config.read_text())
    for change, code, said in [
        ({"peft_type": "IA3"}, 4, "IA3"),
        ({"layer_replication": [[0, 2], [0, 2]]}, 4, "layer_replication"),
        ({"modules_to_save": ["layers.2.input_layernorm"]}, 4, "modules_to_save"),
        ({"layers_to_transform": [1], "target_parameters": ["w"]}, 4, "target_parameters"),
        ({"alpha_pattern": {"layers.1.(": 1}}, 5, "cannot be read"),
    ]:
        config.write_text(json.dumps({**right, **change}))
        assert said in refused(capsys, code, *command)
    config.write_text(json.dumps(right))
    smaller = save_tiny(tmp_path / "smaller", blocks=BLOCKS - 2)
    plan_of(smaller, 1).save(tmp_path / "other.json")
    other = ["apply", tmp_path / "other.json", smaller, "-o", tmp_path / "cut", "--adapter", place]
    assert "no module" in refused(capsys, 4, *other)
    gguf = [*command[:3], "-o", tmp_path / "cut.gguf", "--adapter", place]
    assert "--adapter" in refused(capsys, 2, *gguf)
    assert "adapter_config.json" in refused(capsys, 2, *command[:-1], tmp_path)
    assert not list(tmp_path.glob("cut*"))

    done = run(capsys, *command)
    assert done.code == 0
    assert "2 modules" in done.err + done.out
    assert "exists" in refused(capsys, 2, *command)
