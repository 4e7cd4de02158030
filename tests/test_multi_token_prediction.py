"""Checkpoints with multi-token-prediction blocks after the last one (DeepSeek-V3, GLM-4-MoE)."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import sleb
from cli_tools import tree
from conftest import byte_tokenizer
from plan_tools import plan_of
from sleb.core.errors import DataError
from sleb.models.load import strict_model
from zoo import tiny


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny DeepSeek-V3 of 8 blocks and, as the real one has, a further one numbered 8."""
    model, _ = tiny("deepseek_v3")
    model.config.num_nextn_predict_layers = 1
    path = tmp_path / "model"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    last = {k: v for k, v in tensors.items() if k.startswith("model.layers.7.")}
    extra = {k.replace("layers.7.", "layers.8."): v * 2 for k, v in last.items()}
    save_file({**tensors, **extra}, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("order", [(5, 2), (7, 2)])
def test_they_move_down_and_the_cut_is_verified_and_taken_back(checkpoint, tmp_path, order):
    plan = plan_of(checkpoint, *order)
    out = sleb.apply(plan, checkpoint, tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (checkpoint, out))
    moved = {k for k in after if k.startswith("model.layers.6.")}
    assert moved
    assert not any(k.startswith("model.layers.7.") for k in after)
    for key in moved:
        assert torch.equal(after[key], before[key.replace("layers.6.", "layers.8.")])
    sleb.verify(out, model=checkpoint, plan=plan).require()
    sleb.restore(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(checkpoint)


def test_other_tensors_that_the_model_does_not_have_are_still_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    save_file(
        {**load_file(path), "model.layers.3.surprise": torch.ones(1)},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(DataError, match=r"1 unexpected keys on loading.*layers\.3\.surprise"):
        strict_model(checkpoint, torch.float32)
