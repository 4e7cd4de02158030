"""Tiny GGUF files, written by the gguf package; and plans for them."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers

from conftest import byte_tokenizer
from plan_tools import minimal
from sleb.checkpoints.checkpoint import Checkpoint, fingerprint
from sleb.core.plan import Plan
from sleb.core.units import canonical
from sleb.models import source
from sleb.models.load import LoadedModel

WIDTH, VOCABULARY = 64, 259
GEMMA3 = {
    "fields": {
        "attention.sliding_window": 8,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.freq_base": 1000000.0,
    },
    "norms": ("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
}
RUNNABLE = {
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.merges": ["< 1"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
"""What llama.cpp needs of a tokenizer."""
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def plan_of(model_type: str, blocks: int, *order: int) -> Plan:
    """A plan of another form of the model: its hashes are of nothing."""
    model = {**minimal()["model"], "model_type": model_type, "architecture": "", "blocks": blocks}
    return Plan.model_validate(minimal(model=model, removed=canonical(order), order=order))


def plan_for(dense: LoadedModel, *order: int) -> Plan:
    """A plan of this very model."""
    found = fingerprint(Checkpoint.open(dense.source.path), len(dense.stack))
    return plan_of("", len(dense.stack), *order).model_copy(update={"model": found})


@pytest.fixture
def readable(monkeypatch, tmp_path):
    """Let transformers read tiny files, whose vocabulary it could not convert."""
    own = byte_tokenizer()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: own)
    monkeypatch.setattr(source, "_check_tokenizer", lambda *a: None)
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))


def write_tiny(
    path: Path,
    architecture: str = "llama",
    blocks: int = 8,
    *,
    fields: dict | None = None,
    last: dict | None = None,
    norms: tuple[str, ...] = (),
    kind: gguf.GGMLQuantizationType = Q4_1,
    alignment: int | None = None,
    extra: dict[str, np.ndarray | None] | None = None,
) -> Path:
    """A file of ``blocks`` blocks with random matrices of type ``kind``. ``fields`` are of the
    architecture, ``last`` have full names; a value is a number, a list, or a text. ``norms`` are
    norms that each block has besides Llama's two; of ``extra`` tensors, those that are None are
    left out."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "tiny")
    writer.add_block_count(blocks)
    writer.add_embedding_length(WIDTH)
    writer.add_context_length(128)
    own = {
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 96,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 16,
        **(fields or {}),
    }
    for key, value in [(f"{architecture}.{k}", v) for k, v in own.items()] + list(
        (last or {}).items()
    ):
        add_field(writer, key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)

    def matrix(name, rows, columns):
        values = rng.normal(0, 0.15, (rows, columns)).astype(np.float32)
        if name in (extra or {}):
            return
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name, length=WIDTH):
        if name in (extra or {}):
            return
        writer.add_tensor(name, 1 + rng.normal(0, 0.1, length).astype(np.float32))

    matrix("token_embd.weight", VOCABULARY, WIDTH)
    for i in range(blocks):
        for name in ("attn_norm", "ffn_norm", *norms):
            norm(f"blk.{i}.{name}.weight", 16 if name in ("attn_q_norm", "attn_k_norm") else WIDTH)
        for name, rows, columns in [
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", 96, WIDTH),
            ("ffn_up", 96, WIDTH),
            ("ffn_down", WIDTH, 96),
        ]:
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    norm("output_norm.weight")
    for name, values in (extra or {}).items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, key: str, value) -> None:
    """Add a number, text or list, in the type that converters use."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def write_qwen35(path: Path, blocks: int = 8, fields: dict | None = None, **options) -> Path:
    """A file of Qwen3.5: full attention in every fourth block, linear attention in the others."""
    rng = np.random.default_rng(2)

    def matrix(*shape):
        return rng.normal(0, 0.15, shape).astype(np.float32)

    extra: dict[str, np.ndarray | None] = {}
    for i in range(blocks):
        own: dict[str, np.ndarray | None] = {"ffn_norm.weight": None}
        if (i + 1) % 4 == 0:
            own |= {"attn_q.weight": matrix(2 * WIDTH, WIDTH)}  # queries and their gates
            own |= {f"attn_{one}_norm.weight": 1 + matrix(16) for one in "qk"}
        else:
            gone = ("attn_q", "attn_k", "attn_v", "attn_output")
            own |= dict.fromkeys(f"{name}.weight" for name in gone)
            own |= {"attn_qkv.weight": matrix(128, WIDTH), "attn_gate.weight": matrix(64, WIDTH)}
            own |= {"ssm_beta.weight": matrix(4, WIDTH), "ssm_alpha.weight": matrix(4, WIDTH)}
            own |= {"ssm_conv1d.weight": matrix(128, 4), "ssm_dt.bias": matrix(4)}
            own |= {"ssm_a": -np.abs(matrix(4)) - 0.5, "ssm_norm.weight": 1 + matrix(16)}
            own |= {"ssm_out.weight": matrix(WIDTH, 64)}
        extra |= {f"blk.{i}.{name}": value for name, value in own.items()}
    own_fields = {
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.dimension_sections": [4, 2, 2, 0],
        "rope.freq_base": 10000000.0,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 64,
        "ssm.state_size": 16,
        "ssm.time_step_rank": 4,
        "ssm.group_count": 2,
        **(fields or {}),
    }
    norms = ("post_attention_norm",)
    return write_tiny(
        path, "qwen35", blocks, fields=own_fields, norms=norms, extra=extra, **options
    )


def llama3_divisors(base=10000.0, factor=8.0, old=8192, half=8):
    """Worked out wave by wave, as Llama 3.1's release says it."""
    divisors = []
    for i in range(half):
        wave = 2 * math.pi * base ** (i / half)
        if wave < old / 4:
            divisors.append(1.0)
        elif wave > old:
            divisors.append(factor)
        else:
            smooth = (old / wave - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def write_imatrix(path: Path, model: Path) -> Path:
    """Importance of every matrix in the blocks of ``model``, as llama-imatrix writes it."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in gguf.GGUFReader(model).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            sums = rng.random((1, int(tensor.shape[0])), dtype=np.float32)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.full((1, 1), 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
