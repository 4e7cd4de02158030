"""The real llm-compressor. Run by make test-quantize, in an environment of its own."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import sleb
from cli_tools import run
from quantize_tools import save_dense
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.surgery.verification import verify

pytestmark = [
    pytest.mark.quantize,
    pytest.mark.skipif(
        importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
    ),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_dense(tmp_path_factory.mktemp("gptq") / "dense")


def logits(folder: Path) -> torch.Tensor:
    model = sleb.load(folder, dtype="float32", device="cpu").model
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


@pytest.mark.parametrize(("scheme", "limit"), [("w4a16", 0.8), ("w8a16", 0.06)])
def test_gptq_makes_compressed_tensors_that_can_be_cut(dense, tmp_path, capsys, scheme, limit):
    out = tmp_path / scheme
    ran = run(
        capsys, "quantize", dense, "-o", out, "--scheme", scheme, "--windows", 8, "--length", 32,
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran
    assert ran.json["group"] == 32
    assert ran.json["calibration"]["windows"] == 8
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert quantization["ignore"] == ["lm_head"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (
        int(scheme[1]), True, 32
    )  # fmt: skip
    names = Checkpoint.open(out).tensors
    assert sum(name.endswith("weight_packed") for name in names) == 42
    assert not any("zero_point" in name for name in names)
    assert not (out / "recipe.yaml").exists()
    gap = (logits(out) - logits(dense)).abs().max() / logits(dense).abs().max()
    assert 0 < gap < limit
    plan = sleb.search(out, remove=2, windows=4, length=16, dtype="float32", device="cpu")
    cut = sleb.apply(plan, out, tmp_path / "cut")
    found = verify(cut, model=out, plan=plan)
    assert found.passed, found


def test_awq_makes_the_same_form_and_needs_a_gpu(dense, tmp_path, capsys, monkeypatch):
    """On a CPU llm-compressor's fails only where it pins memory."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    options = ("--scheme", "awq", "--windows", 4, "--length", 32)
    if not torch.cuda.is_available():
        ran = run(capsys, "quantize", dense, "-o", tmp_path / "no", *options)
        assert ran.code == 2
        assert "needs a CUDA GPU, and there is none; use w4a16" in ran.err
        monkeypatch.setattr("sleb.formats.quantize._has_gpu", lambda: True)
        monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *a, **k: None)
    ran = run(capsys, "quantize", dense, "-o", tmp_path / "awq", *options)
    assert ran.code == 0, ran
    quantization = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["group_size"]) == (4, True, 32)
    found = Checkpoint.open(tmp_path / "awq")
    assert not any("zero_point" in name for name in found.tensors)
    norm = "model.layers.0.input_layernorm.weight"
    assert found.digest(norm) != Checkpoint.open(dense).digest(norm)  # it has taken the scales
    gap = (logits(tmp_path / "awq") - logits(dense)).abs().max() / logits(dense).abs().max()
    assert 0 < gap < 0.8
