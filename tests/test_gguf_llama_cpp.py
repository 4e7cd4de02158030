"""What llama.cpp computes with a cut file, against transformers with the same blocks bypassed.

`make test-llama-cpp` builds llama.cpp once (minutes) and runs this. SLEB_TEST_LLAMA_CPP is the
Python that has it, SLEB_TEST_GEMMA a GGUF file of Gemma-3-270M.
"""

import json
import os
import subprocess
from collections.abc import Callable
from importlib.resources import files
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch

import sleb
from gguf_tools import plan_of
from sleb.checkpoints.gguf_fields import PATTERN
from sleb.checkpoints.gguf_file import GGUFFile, NewTensor, Value, write_gguf
from sleb.models.source import quiet_transformers
from sleb.surgery.gguf_cut import cut_gguf

COUNT, LENGTH = 3, 512
CLOSE = 0.04
"""Nats per token between the two: llama.cpp rounds activations to 8 bits and its cache to 16."""
pytestmark = pytest.mark.llama_cpp


@pytest.fixture
def scored(tmp_path) -> Callable[[Path], tuple[torch.Tensor, np.ndarray]]:
    """Score a GGUF file in llama.cpp: token ids and losses, on the embedded text."""
    python = os.environ.get("SLEB_TEST_LLAMA_CPP", "")
    if not python:
        pytest.skip("SLEB_TEST_LLAMA_CPP is not set; `make test-llama-cpp` sets it")
    lines = (files("sleb.data") / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(json.loads(line)["text"] for line in lines[:12]))

    def score(model: Path) -> tuple[torch.Tensor, np.ndarray]:
        script = Path(__file__).with_name("llama_score.py")
        command = [python, str(script), str(model), str(text), str(COUNT), str(LENGTH)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        return torch.tensor(found["windows"]), np.array(found["losses"])

    return score


def expected(model: Path, windows: torch.Tensor, removed: list[int]) -> dict[str, np.ndarray]:
    """Losses in transformers, float32, of the model and of the model with blocks bypassed. The
    file is read without its tokenizer, which not every transformers can convert."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        dense = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def losses() -> np.ndarray:
        logits = dense(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = windows[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return loss.view(len(windows), -1).double().numpy()

    found = {"dense": losses()}
    with sleb.bypassed(dense, removed):
        found["cut"] = losses()
    return found


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of two losses on a token, nats."""
    return float(np.abs(a - b).mean())


def compared(model: Path, scored, removed: list[int], cut: Path, record_property):
    """Losses of the cut in llama.cpp and in transformers; the dense models are close, too."""
    windows, dense = scored(model)
    same, found = scored(cut)
    assert torch.equal(windows, same)
    want = expected(model, windows, removed)
    for name, losses in (
        ("llama.cpp dense", dense),
        ("transformers dense", want["dense"]),
        ("llama.cpp cut", found),
        ("transformers bypassed", want["cut"]),
    ):
        record_property(name, exp(losses.mean()))
        print(f"perplexity, {name}: {exp(losses.mean()):.3f}")  # noqa: T201 (it is run for that)
    assert abs(dense.mean() - want["dense"].mean()) < CLOSE
    assert abs(found.mean() - want["cut"].mean()) < CLOSE
    assert found.mean() - dense.mean() > 10 * CLOSE, "the cut must show"
    return found, want["cut"]


def cut_of(model: Path, kind: str, blocks: int, removed: list[int], out: Path) -> Path:
    return cut_gguf(plan_of(kind, blocks, *removed), model, out, other_weights=True).out


@pytest.mark.real
def test_a_cut_llama_is_the_model_with_blocks_bypassed(
    real_model, scored, tmp_path, record_property
):
    model, removed = Path(real_model), [20, 21, 22]
    cut = cut_of(model, "llama", 30, removed, tmp_path / "cut.gguf")
    compared(model, scored, removed, cut, record_property)


def test_a_cut_gemma_keeps_its_windows_and_without_the_pattern_does_not(
    scored, tmp_path, record_property
):
    path = os.environ.get("SLEB_TEST_GEMMA", "")
    if not path:
        pytest.skip("SLEB_TEST_GEMMA is not set")
    model, removed = Path(path), [8, 9, 10]
    cut = cut_of(model, "gemma3_text", 18, removed, tmp_path / "cut.gguf")
    found, want = compared(model, scored, removed, cut, record_property)
    # the same file with the period that llama.cpp would go by
    file, plain = GGUFFile.open(cut), tmp_path / "plain.gguf"
    period = {f"gemma3.{PATTERN}": Value(kind=4, data=6)}
    kept = [NewTensor(name=n, source=t, kind=t.kind) for n, t in file.tensors.items()]
    write_gguf(file, plain, values=period, tensors=kept, tick=lambda n: None)
    assert apart(scored(plain)[1], want) > 3 * apart(found, want)
