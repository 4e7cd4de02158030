"""Which fields of a GGUF file follow the blocks, and which cuts llama.cpp would not run exactly."""

import re
from pathlib import Path

import gguf
import pytest

from gguf_tools import plan_of, write_tiny
from sleb.checkpoints.gguf_fields import ARCHITECTURES, PATTERN, REFUSED
from sleb.core.errors import DataError, InputError, UnsupportedModel
from sleb.surgery.gguf_cut import cut_gguf

BOOL, INT32, UINT32 = (gguf.GGUFValueType[name] for name in ("BOOL", "INT32", "UINT32"))
ARRAY = gguf.GGUFValueType.ARRAY


def cut(folder: Path, architecture: str, removed, blocks: int = 8, fields=None, last=None):
    """Write a tiny file, cut it; fields of the result, types and values."""
    model = write_tiny(folder / "m.gguf", architecture, blocks, fields=fields, last=last)
    known = ARCHITECTURES.get(architecture)
    plan = plan_of(known.types[0] if known else "x", blocks, *removed)
    out = cut_gguf(plan, model, folder / "cut.gguf", other_weights=True, force=True).out
    return {k: (f.types, f.contents()) for k, f in gguf.GGUFReader(out).fields.items()}


@pytest.mark.parametrize(
    ("architecture", "period", "fields"),
    [
        ("gemma2", 2, {"attention.key_length": 16}),
        ("gemma3", 6, {"attention.sliding_window": 8, "attention.key_length": 16}),
        ("cohere2", 4, {}),
        ("gpt-oss", 2, {}),
        ("olmo2", 4, {"attention.sliding_window": 8}),
    ],
)
def test_the_windows_of_the_uncut_model_are_written_block_by_block(
    tmp_path, architecture, period, fields
):
    whole = [i % period < period - 1 for i in range(12)]  # as llama.cpp derives them
    for removed in ([1], [5], [3, 4], [0, 11]):
        found = cut(tmp_path, architecture, removed, 12, fields)[f"{architecture}.{PATTERN}"]
        expected = [window for i, window in enumerate(whole) if i not in removed]
        assert found == ([ARRAY, BOOL], expected)


@pytest.mark.parametrize("architecture", ["qwen3next", "qwen35", "qwen35moe"])
def test_which_blocks_have_linear_attention_is_written_block_by_block(tmp_path, architecture):
    key = "attention.recurrent_layers"
    stated = [True, False, False, True] * 3
    for fields, whole in (
        ({}, [i % 4 < 3 for i in range(12)]),  # as llama.cpp derives them
        ({"full_attention_interval": 3}, [i % 3 < 2 for i in range(12)]),
        ({key: stated}, stated),
    ):
        for removed in ([1], [3], [3, 4], [0, 11]):
            found = cut(tmp_path, architecture, removed, 12, fields)[f"{architecture}.{key}"]
            expected = [linear for i, linear in enumerate(whole) if i not in removed]
            assert found == ([ARRAY, BOOL], expected)
    with pytest.raises(UnsupportedModel, match="two kinds"):
        cut(tmp_path, architecture, [3, 7], 8)


@pytest.mark.parametrize(("architecture", "fields"), [("gemma3", {}), ("olmo2", {}), ("llama", {})])
def test_a_model_without_sliding_windows_gets_no_pattern(tmp_path, architecture, fields):
    assert f"{architecture}.{PATTERN}" not in cut(tmp_path, architecture, [3], fields=fields)


def test_a_period_or_a_pattern_in_the_file_comes_before_the_rule(tmp_path):
    sliding = {"attention.sliding_window": 8, "attention.key_length": 16}
    key = f"gemma3.{PATTERN}"
    found = cut(tmp_path, "gemma3", [2], 9, {**sliding, PATTERN: 3})
    assert found[key] == ([ARRAY, BOOL], [True] * 4 + [False] + [True] * 2 + [False])
    stated = [True, False, False, True, True, True]
    found = cut(tmp_path, "gemma3", [1], 6, {**sliding, PATTERN: stated})
    assert found[key] == ([ARRAY, BOOL], [True, False, True, True, True])
    found = cut(tmp_path, "gemma3", [1], 6, {**sliding, PATTERN: [int(s) for s in stated]})
    assert found[key] == ([ARRAY, INT32], [1, 0, 1, 1, 1])
    order = list(found)
    assert order.index(key) < order.index("tokenizer.ggml.model"), "it stays in its place"


def test_every_per_block_list_is_cut_and_other_lists_stay(tmp_path):
    counts = [4, 4, 2, 4, 1, 4, 4, 4]
    fields = {
        "attention.head_count": [8, *counts[1:]],
        "attention.head_count_kv": counts,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "feed_forward_length": [96 + i for i in range(8)],
        "expert_feed_forward_length": list(range(8)),
        "rope.dimension_sections": [4, 4, 4, 4],
        "leading_dense_block_count": 3,
    }
    last = {
        "xielu.alpha_p": [i / 8 for i in range(8)],
        "general.tags": ["a", "b"],
        "general.eight": list(range(8)),
        "tokenizer.ggml.eight": list(range(8)),
    }
    found = cut(tmp_path, "dots1", [0, 4], 8, fields, last)
    stay = [1, 2, 3, 5, 6, 7]
    for key in ("head_count", "head_count_kv"):
        assert found[f"dots1.attention.{key}"] == ([ARRAY, INT32], [counts[i] for i in stay])
    assert found["dots1.feed_forward_length"][1] == [96 + i for i in stay]
    assert found["dots1.expert_feed_forward_length"][1] == stay
    assert found["dots1.leading_dense_block_count"] == ([UINT32], 2)
    assert found["dots1.rope.dimension_sections"][1] == [4, 4, 4, 4]
    assert found["xielu.alpha_p"][1] == [i / 8 for i in stay]
    assert found["general.eight"][1] == found["tokenizer.ggml.eight"][1] == list(range(8))


@pytest.mark.parametrize(("removed", "left"), [([0], 2), ([0, 1, 2], 0), ([5], 3), ([2, 5], 2)])
def test_leading_dense_blocks_are_counted_again(tmp_path, removed, left):
    found = cut(tmp_path, "deepseek", removed, fields={"leading_dense_block_count": 3})
    assert found["deepseek.leading_dense_block_count"][1] == left


WINDOWS = {"attention.sliding_window": 8, "attention.key_length": 16}
REFUSALS = {  # architecture, removed, blocks, fields, and the nouns of the reason
    "no rope": ("smollm3", [2], 8, {}, r"rotary embedding .* every 4th .*\[3, 4, 7\]"),
    "llama4": ("llama4", [5], 8, {}, r"rotary embedding .* every 4th .*\[7\]"),
    "experts": (
        "ernie4_5-moe", [0], 8, {"interleave_moe_layer_step": 2}, r"every 2th .*\[1, 2, 3, 4\]"),
    "multi-token": ("glm4", [2], 8, {"nextn_predict_layers": 1}, "1 of its 8 .*nextn_predict"),
    "shared": ("gemma3n", [2], 8, {}, "gemma3n .* cannot be cut exactly: its last blocks"),
    "unknown": ("qwen9", [2], 8, {}, r"'qwen9' \(did you mean 'qwen\d"),
    "a list": ("llama", [2], 8, {"compress_ratios": [1, 2, 3]}, r"list llama\.compress_ratios"),
    "a text list": ("llama", [2], 8, {"x": ["a", "b"]}, r"does not know the list llama\.x"),
    "all windows": ("gemma3", [5], 8, WINDOWS, "one of its two kinds of attention"),
    "all attention": (
        "lfm2", [2, 5], 8, {"attention.head_count_kv": [0, 0, 2] * 2 + [0, 0]}, "kinds of blocks"),
    "27B": ("gemma2", [5], 46, {"attention.key_length": 8}, "scaled .* 46 and 45"),
    "windows by depth": ("exaone4", [5], 64, {}, "whether there are sliding windows"),
    "norms by depth": ("command-r", [5], 64, {}, "whether queries and keys are normalized"),
    "lite": ("deepseek2", [5], 28, {}, "its attention and gates by the number of"),
    "residuals": ("minicpm", [5], 8, {}, r"minicpm\.residual_scale"),
    "first heads": (
        "llama", [0], 8, {"attention.head_count": [4, 8] + [4] * 6}, "block 1 has 8 instead of 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_llama_cpp_would_not_run_exactly_is_refused(tmp_path, case):
    architecture, removed, blocks, fields, message = REFUSALS[case]
    with pytest.raises(UnsupportedModel, match=message) as info:
        cut(tmp_path, architecture, removed, blocks, fields)
    assert "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("architecture", "removed", "blocks", "fields"),
    [
        ("smollm3", [1, 2, 3, 4], 8, {}),
        ("smollm3", [7], 8, {}),
        ("llama4", [2, 3, 4, 5], 12, {"interleave_moe_layer_step": 2}),
        ("ernie4_5-moe", [3], 8, {"interleave_moe_layer_step": 1}),
        ("glm4", [3], 8, {"nextn_predict_layers": 0}),
        ("lfm2", [2], 8, {"attention.head_count_kv": [0, 0, 2, 0, 0, 2, 0, 0]}),
        ("gemma2", [5], 46, {"attention.key_length": 16}),  # 64 / 4 heads: scaled alike
        ("exaone4", [5], 30, {}),
        ("command-r", [5], 40, {}),
        ("deepseek2", [5], 27, {}),
        ("minicpm", [5], 8, {"residual_scale": 0.25}),
        ("llama", [0], 8, {"attention.head_count": [4] * 8}),
    ],
)
def test_cuts_that_keep_what_llama_cpp_goes_by_are_made(
    tmp_path, architecture, removed, blocks, fields
):
    found = cut(tmp_path, architecture, removed, blocks, fields)
    assert found[f"{architecture}.block_count"][1] == blocks - len(removed)


def test_lists_that_do_not_fit_the_blocks_are_corrupt(tmp_path):
    for key, value, message in [
        ("feed_forward_length", [1, 2], "llama.feed_forward_length has 2 entries for 8 blocks"),
        ("attention.head_count", 0.5, r"llama\.attention\.head_count is 0\.5, not a count"),
        ("leading_dense_block_count", "x", "leading_dense_block_count is x, not a count"),
        ("attention.head_count_kv", [0.5] * 8, "head_count_kv is not one count for each of 8"),
    ]:
        with pytest.raises(DataError, match=message):
            cut(tmp_path, "llama", [3], fields={key: value})
    with pytest.raises(UnsupportedModel, match=r"other\.eight has one entry per block"):
        cut(tmp_path, "llama", [3], last={"other.eight": list(range(8))})


def test_blocks_that_are_missing_or_beyond_the_last_and_parts(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    part = write_tiny(tmp_path / "m-00001-of-00003.gguf", last={"split.count": 3})
    for source, old, new, error, message in [
        (model, b"blk.3.", b"blx.3.", DataError, "block 3 of 8 has no tensors"),
        (model, b"blk.7.ffn_up", b"blk.8.ffn_up", UnsupportedModel, "block 8 behind its 8 bl"),
        (part, b"", b"", InputError, "one of 3 parts of a model; join them"),
    ]:
        (tmp_path / "other.gguf").write_bytes(
            source.read_bytes().replace(old or b"GGUF", new or b"GGUF")
        )
        plan, out = plan_of("llama", 8, 3), tmp_path / "cut.gguf"
        with pytest.raises(error, match=message):
            cut_gguf(plan, tmp_path / "other.gguf", out, other_weights=True)


def test_the_documentation_lists_every_architecture():
    text = (Path(__file__).parents[1] / "docs/gguf.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.-]+)`", text))
    assert set(ARCHITECTURES) | set(REFUSED) <= named
