"""GGUF files in llama.cpp itself (xllamacpp), by the log-probabilities of what comes next.

`make test-runtimes` runs it; SLEB_TEST_MLX is the Python that has xllamacpp.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import sleb
from gguf_tools import (
    GEMMA3,
    RUNNABLE,
    llama3_divisors,
    plan_of,
    readable,  # noqa: F401 (a fixture)
    write_qwen35,
    write_tiny,
)
from runtime_tools import next_logprobs
from sleb.checkpoints.gguf_fields import ARCHITECTURES
from sleb.checkpoints.gguf_file import GGUFFile, GGUFTensor, NewTensor, write_gguf
from sleb.core.units import block_of, parse_unit, part_of
from sleb.surgery.gguf_cut import cut_gguf

pytestmark = pytest.mark.runtimes

F32 = {"kind": gguf.GGMLQuantizationType.F32, "last": RUNNABLE}
PROMPTS = [[3, 200, 77, 5], [(7 * i * i) % 250 + 3 for i in range(96)]]
"""One of them is longer than any sliding window here."""
WRITERS = ("attn_output.weight", "ffn_down.weight", "ssm_out.weight")
GEMMA2 = {
    "norms": ("post_attention_norm", "post_ffw_norm"),
    "fields": {
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": 8,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
    },
}
QWEN3 = {
    "norms": ("attn_q_norm", "attn_k_norm"),
    "fields": {"attention.key_length": 16, "attention.value_length": 16},
}


def wide(blocks: int) -> dict[str, Any]:
    """Gemma 2 with heads wider than the model has room for, so that its two scales of queries,
    by a head's width and by the model's, are not the same."""
    rng = np.random.default_rng(3)
    shapes = {"attn_q": (128, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 128)}
    extra = {
        f"blk.{i}.{name}.weight": rng.normal(0, 0.15, shape).astype(np.float32)
        for i in range(blocks)
        for name, shape in shapes.items()
    }
    heads = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    return {**GEMMA2, "fields": {**GEMMA2["fields"], **heads}, "extra": extra}


@pytest.fixture
def run() -> Callable[..., list[np.ndarray]]:
    """Log-probabilities [prompts, vocabulary] of files in llama.cpp."""
    python = os.environ.get("SLEB_TEST_MLX")
    if not python:
        pytest.skip("SLEB_TEST_MLX is not set; `make test-runtimes` sets it")

    def scored(*files: Path) -> list[np.ndarray]:
        return next_logprobs(python, files, PROMPTS)

    return scored


def rewritten(model: Path, out: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The same file, with the bytes of each tensor that ``change`` makes of them."""
    file = GGUFFile.open(model)
    tensors = [
        NewTensor(name=name, source=t, kind=t.kind, content=change(name, file.content(t)))
        for name, t in file.tensors.items()
    ]
    write_gguf(file, out, values={}, tensors=tensors, tick=lambda _: None)
    return out


def silenced(model: Path, out: Path, removed: tuple[int, ...]) -> Path:
    """The whole file, with zeros where blocks ``removed`` would write into the stream."""
    off = {f"blk.{block}.{part}" for block in removed for part in WRITERS}
    return rewritten(model, out, lambda name, raw: bytes(len(raw)) if name in off else raw)


def without(model: Path, out: Path, units: Sequence[int]) -> Path:
    """The whole file, with zeros where these blocks, or parts of them, would write."""
    off = {
        f"blk.{block_of(unit)}.{name}.weight"
        for unit in units
        for name, part in (("attn_output", "attention"), ("ffn_down", "mlp"))
        if part_of(unit) in ("", part)
    }
    return rewritten(model, out, lambda name, raw: bytes(len(raw)) if name in off else raw)


def in_f32(model: Path, out: Path) -> Path:
    """The same file with every tensor as 32-bit floats."""
    file = GGUFFile.open(model)

    def widened(tensor: GGUFTensor) -> NewTensor:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        content = gguf.dequantize(np.frombuffer(file.content(tensor), np.uint8), kind)
        raw = content.astype(np.float32).tobytes()
        return NewTensor(name=tensor.name, source=tensor, kind=F32["kind"], content=raw)

    tensors = [widened(tensor) for tensor in file.tensors.values()]
    write_gguf(file, out, values={}, tensors=tensors, tick=lambda _: None)
    return out


def rounded(name: str, raw: bytes) -> bytes:
    """Weights that bfloat16 can hold, to which sleb dequantizes a file."""
    if name.startswith("rope_freqs"):
        return raw
    return (np.frombuffer(raw, "<u4") & 0xFFFF0000).astype("<u4").tobytes()


@pytest.mark.parametrize(
    ("architecture", "removed", "options"),
    [
        ("llama", (1, 4), {}),
        ("qwen3", (0, 7), QWEN3),
        ("gemma2", (1, 4), GEMMA2),
        ("gemma3", (1, 4), GEMMA3),
        ("smollm3", (2, 3, 4, 5), {}),
        ("qwen35", (1, 3), {}),
        ("qwen35", (0, 1, 6), {"fields": {"full_attention_interval": 4}}),
    ],
)
def test_a_cut_is_the_file_with_its_blocks_silenced(architecture, removed, options, run, tmp_path):
    if architecture == "qwen35":
        model = write_qwen35(tmp_path / "m.gguf", **options, **F32)
    else:
        model = write_tiny(tmp_path / "m.gguf", architecture, **options, **F32)
    plan = plan_of(ARCHITECTURES[architecture].types[0], 8, *removed)
    cut = cut_gguf(plan, model, tmp_path / "cut.gguf", other_weights=True).out
    whole, expected, found = run(model, silenced(model, tmp_path / "0.gguf", removed), cut)
    assert np.abs(whole - expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def biased(blocks: int) -> dict[str, np.ndarray]:
    """Biases of Q, K and V, as Qwen2 has them."""
    rng = np.random.default_rng(4)
    widths = {"attn_q": 64, "attn_k": 32, "attn_v": 32}
    return {
        f"blk.{i}.{name}.bias": rng.normal(0, 0.5, width).astype(np.float32)
        for i in range(blocks)
        for name, width in widths.items()
    }


@pytest.mark.parametrize(
    "units", [("2.attention", "3.attention"), ("4.mlp",), ("1.mlp", 3, "5.attention")]
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_blocks_without_a_part_are_the_file_with_it_silenced(
    units, architecture, kind, run, tmp_path
):
    """With Qwen2's rows in another order sums round otherwise; quantized activations more so."""
    extra = biased(8) if architecture == "qwen2" else {}
    how = {"kind": gguf.GGMLQuantizationType[kind], "last": RUNNABLE, "extra": extra}
    model = write_tiny(tmp_path / "m.gguf", architecture, **how)
    plan = plan_of(architecture, 8, *map(parse_unit, units))
    cut = cut_gguf(plan, model, tmp_path / "cut.gguf", other_weights=True).out
    silent = without(model, tmp_path / "0.gguf", plan.removed)
    whole, expected, found = run(model, silent, cut)
    assert np.abs(whole - expected).max() > 0.1
    if architecture == "llama":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if kind == "F32" else 0.2)


@pytest.mark.parametrize(
    ("variable", "kind", "mean", "worst"),
    [
        ("SLEB_TEST_MODEL", "own", 0, 0),
        ("SLEB_TEST_MODEL", "F32", 0, 0),
        ("SLEB_TEST_QWEN", "own", 0.1, 0.5),
        ("SLEB_TEST_QWEN", "F32", 1e-5, 1e-4),
    ],
)
def test_a_real_file_without_attentions_is_the_file_with_them_silenced(
    variable, kind, mean, worst, run, tmp_path
):
    """SLEB_TEST_QWEN: a Qwen2 GGUF file, quantized or not; three times its size in 32 bits must
    fit on the disk. Bounds are in nats, of the 50 likeliest next tokens."""
    if not (path := os.environ.get(variable)):
        pytest.skip(f"{variable} is not set")
    model = Path(path) if kind == "own" else in_f32(Path(path), tmp_path / "m.gguf")
    file = GGUFFile.open(model)
    name = str(file.value("general.architecture"))
    units = [parse_unit(f"{block}.attention") for block in (3, 7, 8, 12, 18, 23)]
    plan = plan_of(name, file.value(f"{name}.block_count"), *units)
    cut = cut_gguf(plan, model, tmp_path / "cut.gguf", other_weights=True).out
    whole, expected, found = run(model, without(model, tmp_path / "0.gguf", units), cut)
    assert np.abs(whole - expected).max() > 1
    likeliest = np.argsort(-expected, axis=1)[:, :50]
    off = np.abs(np.take_along_axis(found - expected, likeliest, 1))
    assert off.mean() <= mean, (off.mean(), off.max())
    assert off.max() <= worst, (off.mean(), off.max())


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("architecture", "blocks", "options"),
    [
        ("llama", 8, {}),
        ("llama", 8, {"fields": {"rope.freq_base": 500000.0}}),
        ("llama", 8, {"fields": {"attention.layer_norm_rms_epsilon": 0.1}}),
        ("llama", 8, {"fields": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}}),
        ("llama", 8, {"fields": {"rope.scale_linear": 4.0}}),
        ("llama", 8, {"extra": {"rope_freqs.weight": llama3_divisors(old=1024)}}),
        ("gemma2", 8, GEMMA2),
        ("gemma2", 8, wide(8)),
        ("gemma2", 46, wide(46)),  # its queries are scaled otherwise
        ("gemma3", 8, GEMMA3),
        ("gemma3", 8, {**GEMMA3, "fields": {**GEMMA3["fields"], "rope.scaling.factor": 8.0,
                                            "rope.scaling.type": "linear"}}),
    ],
)  # fmt: skip
def test_a_file_is_the_same_model_in_transformers(architecture, blocks, options, run, tmp_path):
    exact = write_tiny(tmp_path / "exact.gguf", architecture, blocks, **options, **F32)
    model = rewritten(exact, tmp_path / "m.gguf", rounded)
    (expected,) = run(model)
    loaded = sleb.load(model, dtype="float32", device="cpu").model
    loaded.set_attn_implementation("eager")  # the usual one passes over Gemma 2's caps
    with torch.inference_mode():
        logits = [loaded(input_ids=torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
    found = torch.stack(logits).log_softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)
