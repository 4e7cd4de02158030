"""GGUF files whose blocks lack their attention or MLP; tests/test_gguf_runtimes.py runs them."""

import numpy as np
import pytest

import sleb
from gguf_tools import plan_of, write_tiny
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import UnsupportedModel
from sleb.core.units import block_of, parse_unit, part_of
from sleb.surgery.gguf_cut import cut_gguf


def cut_of(tmp_path, architecture="llama", units=(), **options):
    model = write_tiny(tmp_path / "m.gguf", architecture, **options)
    plan = plan_of(architecture, 8, *map(parse_unit, units))
    plan.save(tmp_path / "plan.json")
    return model, GGUFFile.open(
        cut_gguf(plan, model, tmp_path / "cut.gguf", other_weights=True).out
    )


@pytest.mark.parametrize(
    "units", [("2.attention",), ("2.mlp", "5.attention"), (3, "4.mlp", "7.attention")]
)
def test_a_file_says_block_by_block_what_is_there_and_keeps_its_bytes(units, tmp_path):
    model, cut = cut_of(tmp_path, units=units)
    gone = [parse_unit(u) for u in units]
    kept = [b for b in range(8) if b not in gone]
    assert cut.value("general.architecture") == "deci"
    assert not [key for key in cut.fields if key.startswith("llama.")]
    lacks = {(block_of(u), part_of(u)) for u in gone}
    without = {kind: [(b, kind) in lacks for b in kept] for kind in ("attention", "mlp")}
    for key, kind, left, usual in (
        ("attention.head_count", "attention", 0, 4),
        ("attention.head_count_kv", "attention", 0, 2),
        ("feed_forward_length", "mlp", 32, 96),
    ):
        assert cut.value(f"deci.{key}") == [left if none else usual for none in without[kind]]
    dense = GGUFFile.open(model)
    for new, old in enumerate(kept):
        own = {n for n in dense.tensors if n.startswith(f"blk.{old}.")}
        for name in own:
            rest = name.split(".", 2)[2]
            here = cut.tensors.get(f"blk.{new}.{rest}")
            if rest.startswith("attn") and without["attention"][new]:
                assert here is None
            elif rest[:4] == "ffn_" and rest != "ffn_norm.weight" and without["mlp"][new]:
                assert here.shape == ((32, 64) if "down" in rest else (64, 32))
                assert not any(cut.content(here))
            else:
                assert cut.content(here) == dense.content(dense.tensors[name])


def test_rows_of_qwen2_change_places_by_head(tmp_path):
    extra = {f"blk.{i}.attn_q.bias": np.arange(64, dtype=np.float32) for i in range(8)}
    model, cut = cut_of(tmp_path, "qwen2", ["2.attention"], extra=extra)
    found = np.frombuffer(cut.content(cut.tensors["blk.5.attn_q.bias"]), np.float32)
    pairs = [[16 * head + i, 16 * head + 8 + i] for head in range(4) for i in range(8)]
    assert found.tolist() == np.array(pairs).ravel().tolist()
    dense = GGUFFile.open(model)
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        before, after = (
            np.frombuffer(f.content(f.tensors[f"blk.5.{name}.weight"]), np.uint8)
            for f in (dense, cut)
        )
        order = np.array(pairs).ravel()[: 16 * heads]
        assert np.array_equal(after.reshape(16 * heads, -1), before.reshape(16 * heads, -1)[order])
    same = "blk.5.attn_v.weight"
    assert cut.content(cut.tensors[same]) == dense.content(dense.tensors[same])


@pytest.mark.parametrize(
    ("architecture", "units", "options", "why"),
    [
        ("qwen3", ["2.attention"], {"norms": ("attn_q_norm", "attn_k_norm")}, "qwen3"),
        ("gemma2", ["2.attention"], {"norms": ("post_attention_norm",)}, "gemma2"),
        ("llama", ["0.attention"], {}, "block 0"),
        ("llama", [0, "1.attention"], {}, "block 1"),
        ("llama", ["2.mlp"], {"fields": {"expert_count": 4}}, "experts"),
        ("llama", ["2.mlp"], {"norms": ("attn_odd",)}, "attn_odd"),
        ("llama", ["2.mlp"], {"fields": {"logit_scale": 2.0}}, "logit_scale"),
        ("qwen2", ["2.mlp"], {"fields": {"rope.dimension_count": 8}}, "rotated"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(architecture, units, options, why, tmp_path):
    with pytest.raises(UnsupportedModel, match=why):
        cut_of(tmp_path, architecture, units, **options)
    assert [p.name for p in tmp_path.glob("cut*")] == []


def test_what_needs_transformers_says_that_llama_cpp_runs_the_file(tmp_path):
    model, cut = cut_of(tmp_path, units=["2.attention"])
    for attempt in (
        lambda: sleb.load(cut.path),
        lambda: sleb.describe(cut.path),
        lambda: sleb.bench(cut.path, [model]),
    ):
        with pytest.raises(UnsupportedModel, match="runs it, and transformers has no code"):
            attempt()


def test_a_folder_cannot_be_written_from_a_plan_of_parts(tmp_path):
    model, _ = cut_of(tmp_path, units=["2.attention"])
    with pytest.raises(UnsupportedModel, match=r"2\.attention"):
        sleb.apply(tmp_path / "plan.json", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
