"""Vision-language models are cut in their decoder, and stay the wrapper that they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import sleb
from plan_tools import plan_of
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import UnsupportedModel
from sleb.models.load import strict_model
from sleb.selection.targets import Costs
from wrappers import BLOCKS, image_inputs, wrapper_folder, wrappers

every_wrapper = pytest.mark.parametrize("name", wrappers())


def decoder_block(name: str) -> int | None:
    """The block of the decoder that a tensor is of, whatever the file calls it; None if of none."""
    before, _, after = name.partition(".layers.")
    return int(after.split(".")[0]) if after and "vision" not in before else None


def loaded(folder):
    """The checkpoint, its weights at aligned addresses, off which kernels for experts round."""
    model = strict_model(folder, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def logits(model, given):
    return model(**given, use_cache=False).logits


@pytest.mark.parametrize("hub_names", [pytest.param(False, marks=pytest.mark.slow), True])
@every_wrapper
def test_the_cut_is_in_the_decoder(name, hub_names, tmp_path):
    """Two cuts one after the other, so that once the tower has as many blocks as the decoder, and
    once more; all else stays to the byte."""
    source = wrapper_folder(name, tmp_path / "M", hub_names=hub_names)
    left = list(range(BLOCKS))
    for step, gone in enumerate([(3, 4), (3,)]):
        before = load_file(source / "model.safetensors")
        out = sleb.apply(plan_of(source, *gone), source, tmp_path / f"cut{step}")
        after = load_file(out / "model.safetensors")
        kept = [block for block in range(len(left)) if block not in gone]
        left = [left[block] for block in kept]
        expected = {}
        for tensor, value in before.items():
            block = decoder_block(tensor)
            if block in gone:
                continue
            moved = tensor
            if block is not None:
                moved = tensor.replace(f".layers.{block}.", f".layers.{kept.index(block)}.", 1)
            expected[moved] = value
        assert after.keys() == expected.keys()
        assert all(torch.equal(after[key], value) for key, value in expected.items())
        assert sleb.verify(out, model=source).passed
        source = out


@every_wrapper
def test_the_tower_is_not_read_for_each_token(name, tmp_path):
    source = wrapper_folder(name, tmp_path / "M")
    loaded = sleb.load(source, device="cpu")
    costs = Costs.of(Checkpoint.open(source), loaded.stack)
    tensors = load_file(source / "model.safetensors")
    tower = sum(
        value.nbytes
        for key, value in tensors.items()
        if any(part in key for part in ("vision", "visual", "multi_modal"))
    )
    embedding = next(v.nbytes for k, v in tensors.items() if k.endswith("embed_tokens.weight"))
    tied = not any(key.endswith("lm_head.weight") for key in tensors)
    assert costs.total - costs.read == tower + (0 if tied else embedding)
    assert tower > 0


@every_wrapper
def test_the_config_says_the_depth_of_the_decoder(name, tmp_path):
    source = wrapper_folder(name, tmp_path / "M")
    out = sleb.apply(plan_of(source, 3, 4), source, tmp_path / "cut")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    own, cut = before.pop("text_config", before), after.pop("text_config", after)
    assert cut["num_hidden_layers"] == BLOCKS - 2
    per_block = {key for key, value in own.items() if isinstance(value, list)}
    changed = {key for key in {*own, *cut} if own.get(key) != cut.get(key)}
    derived = {"layer_types", "sliding_window_pattern", "max_window_layers"}
    assert changed <= {"num_hidden_layers", *derived, *per_block}
    assert before is own or before == after
    assert list(after["architectures"]) == before["architectures"]
    card = (out / "README.md").read_text()
    assert "image-text-to-text" in card
    assert "AutoModelForImageTextToText" in card
    sleb.restore(out, tmp_path / "back")
    for file in source.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@every_wrapper
def test_with_an_image_too_bypass_is_the_cut_checkpoint(name, tmp_path):
    source = wrapper_folder(name, tmp_path / "M")
    model, given = loaded(source), image_inputs(name)
    dense, blind = logits(model, given), logits(model, {"input_ids": given["input_ids"]})
    assert (dense - blind).abs().max() > 1e-3, "the image is not seen"
    with sleb.bypassed(model, {3, 5}):
        bypassed = logits(model, given)
    assert (bypassed - dense).abs().max() > 1e-3
    out = sleb.apply(plan_of(source, 3, 5), source, tmp_path / "cut")
    assert torch.equal(logits(loaded(out), given), bypassed)


@pytest.mark.parametrize("name", wrappers({"qwen3_vl", "mllama"}))
def test_search_keeps_blocks_that_only_images_need(name, tmp_path):
    """The first three of Qwen3-VL get features of images, and text alone does not run through
    Llama 3.2's cross-attention."""
    needed = {"qwen3_vl": {0, 1, 2}, "mllama": {1, 4}}.get(name, set())
    source = wrapper_folder(name, tmp_path / "M")
    few = {"windows": 2, "heldout": 0, "length": 32, "device": "cpu"}
    plan = sleb.search(source, remove=2, protect="", **few)
    assert len(plan.removed) == 2
    assert needed <= {*plan.protected}
    if name == "qwen3_vl":
        with pytest.raises(UnsupportedModel, match="protect"):
            sleb.apply(plan_of(source, 1), source, tmp_path / "cut")


@pytest.mark.parametrize("name", wrappers({"qwen3_vl"}))
def test_healing_leaves_other_towers_to_the_byte(name, tmp_path):
    source = wrapper_folder(name, tmp_path / "M")
    cut = sleb.apply(plan_of(source, 3), source, tmp_path / "cut")
    (tmp_path / "text.txt").write_text("a block passes its input through; " * 400)
    given = {"text": (str(tmp_path / "text.txt"),), "tokens": 2000, "device": "cpu"}
    sleb.heal(cut, model=source, out=tmp_path / "healed", **given)
    before, after = (load_file(f / "model.safetensors") for f in (cut, tmp_path / "healed"))
    changed = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
    assert changed
    assert not {tensor for tensor in changed if "vis" in tensor or "projector" in tensor}
