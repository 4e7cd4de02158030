"""SmolLM2-135M-Instruct, a real Llama with 30 blocks, from GGUF to a verified checkpoint."""

import json
import os
import subprocess
import sys

import pytest

import reference
import sleb
from sleb.calibration.split import CalibrationSplit
from sleb.cli.main import main
from sleb.models.source import resolve

pytestmark = pytest.mark.real
CPU = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def loaded(real_model):
    return sleb.load(real_model, **CPU)


@pytest.fixture(scope="module")
def windows(loaded):
    return sleb.load_windows(loaded.tokenizer, (), windows=2, length=24, seed=0)[0]


@pytest.fixture(scope="module")
def plan(loaded, windows):
    return sleb.search(loaded, remove=2, split=CalibrationSplit(search=windows))


@pytest.mark.slow
def test_the_order_and_scores_are_the_published_algorithms(loaded, windows, plan):
    order, rounds = reference.greedy(loaded.model, windows.ids, 2, protected=(0, 29))
    assert list(plan.order) == order
    for got, want in zip(plan.rounds, rounds, strict=True):
        assert {s.block: s.mean for s in got.scores} == pytest.approx(want, abs=2e-5)


def test_the_dequantized_model_is_good_english(loaded):
    """Perplexity of this model on plain prose is near 20; a wrong conversion gives thousands."""
    scored, _ = sleb.load_windows(loaded.tokenizer, (), windows=4, length=128, seed=0)
    assert 5 < sleb.evaluate(loaded, scored).perplexity.value < 60


def test_inspect_says_what_the_model_is(real_model):
    file, found = sleb.describe(real_model), sleb.describe(real_model, full=True)
    assert (file.blocks, file.parameters, file.gguf) == (30, found.parameters, "")
    assert file.nbytes == found.nbytes == os.stat(real_model).st_size
    assert (found.blocks, found.block_path, found.tied_weights) == (30, "model.layers", True)
    assert found.parameters == 134_515_008
    attention, mlp, norms = 2 * 576 * (576 + 192), 3 * 576 * 1536, 2 * 576
    assert set(found.block_parameters) == {attention + mlp + norms}
    assert set(found.block_bytes) == {(attention + mlp) // 32 * 20 + 4 * norms}  # Q4_1
    assert [s.blocks for s in found.savings] == [3, 6, 9]
    assert found.nbytes - found.savings[1].nbytes == 6 * found.block_bytes[0]


@pytest.mark.slow
def test_from_plan_to_a_checkpoint_that_plain_transformers_loads(
    real_model, plan, tmp_path, capsys
):
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    assert main(["apply", str(tmp_path / "plan.json"), real_model, "-o", str(out)]) == 0
    capsys.readouterr()
    arguments = ["verify", str(out), "--model", real_model, "--plan", str(tmp_path / "plan.json")]
    assert main([*arguments, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert all(check["passed"] for check in checks)
    assert {check["key"]: check["found"]["values"] for check in checks}["logits"]["gap"] == 0

    code = f"""
import sys, torch
sys.modules["sleb"] = None  # importing it would fail
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained({str(out)!r}, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
tokenizer = AutoTokenizer.from_pretrained({str(out)!r})
ids = tokenizer("The capital of France is", return_tensors="pt")
made = model.generate(**ids, max_new_tokens=4, do_sample=False)
print(model.config.num_hidden_layers, model.dtype, tokenizer.decode(made[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("28 torch.bfloat16 The capital of France is")


def test_the_conversion_is_cached_and_the_source_untouched(real_model):
    first, again = resolve(real_model), resolve(real_model)
    assert first.path == again.path
    assert (first.path / "config.json").stat().st_mtime_ns == (
        (again.path / "config.json").stat().st_mtime_ns
    )
    assert "apache-2.0" in (first.path / "README.md").read_text()
