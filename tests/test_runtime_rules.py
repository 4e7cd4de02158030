"""Verdicts on configs and GGUF files for runtimes that are not installed."""

import pytest

from gguf_tools import write_tiny
from sleb.checkpoints.cut import Cut
from sleb.runtimes import rules
from sleb.runtimes.compatibility import RuntimeReport, Verdict
from sleb.views.locale import DASH, Locale
from sleb.views.model import Listing
from sleb.views.speed import runtimes
from zoo import tiny_config

S, F = "sliding_attention", "full_attention"
D, E = "dense", "sparse"
CUT = Cut(blocks=6, removed=(1, 2))


def told(ruling) -> str:
    """Why, as a reader sees it; in both languages it is a sentence."""
    verdict = Verdict(
        runtime="it", version="1", verdict=ruling.verdict, how="by rule", why=ruling.why
    )
    about = {"checkpoint": "c", "removed": (), "dtype": "float32", "device": "cpu"}
    report = RuntimeReport(**about, tokens=0, moved=None, verdicts=(verdict,))
    said = []
    for words in (Locale("ja"), Locale("en")):
        assert ruling.why.key in words.tables["rules"]
        assert str(ruling.why.values.get("rule", "note")) in words.tables["rules"]
        shown = [item for item in runtimes(words, report) if isinstance(item, Listing)]
        said.append(shown[0].lines[0])
        assert DASH not in said[-1]
    return said[-1]


@pytest.mark.parametrize(
    ("fields", "verdict", "why"),
    [
        ({"model_type": "llama"}, "accepted", "alike"),
        ({"model_type": "gemma3_text", "layer_types": [S, S, F, S]}, "accepted", "block by block"),
        ({"model_type": "gpt_oss", "layer_types": [S, F, S, F]}, "accepted", "keeps"),
        ({"model_type": "gpt_oss", "layer_types": [S, F, F, S]}, "refused", "block 2"),
        ({"model_type": "qwen3", "layer_types": [F] * 4, "max_window_layers": 2}, "accepted", ""),
        ({"model_type": "qwen3", "layer_types": [F, F, S, S], "max_window_layers": 2},
         "refused", "in one model"),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 2, "moe_layers": [1, 3]},
         "accepted", "keeps"),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 2, "moe_layers": [0, 2]},
         "refused", "interleave_moe_layer_step"),
        ({"model_type": "hy_v3", "mlp_layer_types": [D, E, E, E], "first_k_dense_replace": 1},
         "accepted", "keeps"),
        ({"model_type": "hy_v3", "mlp_layer_types": [D, E, E, E], "first_k_dense_replace": 2},
         "refused", "block 1"),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": [D, E, E, E]},
         "refused", "first_k_dense_replace"),
        ({"model_type": "exaone4", "layer_types": [S, F, S, F], "sliding_window": 8},
         "accepted", "keeps"),
        ({"model_type": "exaone4", "layer_types": [F, F, F, F], "sliding_window": 8},
         "refused", "rotary"),
        ({"model_type": "mimo_v2_flash", "layer_types": [F, S, S, F], "mlp_layer_types": [D] * 4},
         "refused", "hybrid_layer_pattern"),
        ({"model_type": "rwkv"}, "refused", "no code"),
    ],
)  # fmt: skip
def test_rules_of_vllm(fields, verdict, why):
    ruling = rules.vllm({"num_hidden_layers": 4, **fields})
    assert ruling.verdict == verdict
    assert why in told(ruling)


MLX_DSA = {"model_type": "deepseek_v32", "mlp_layer_types": [D, E, E, E]}
L = "linear_attention"


@pytest.mark.parametrize(
    ("fields", "written", "verdict", "why"),
    [
        ({"model_type": "llama"}, {}, "accepted", "alike"),
        ({"model_type": "gemma3_text", "layer_types": [S, S, F, S]}, {"sliding_window_pattern": 3},
         "accepted", "keeps"),
        # gone from the file, as it is no longer true: the default is six
        ({"model_type": "gemma3_text", "layer_types": [S, F, S, S]}, {}, "refused", "block 1"),
        ({"model_type": "cohere2", "layer_types": [S, S, S, F]}, {}, "accepted", "keeps"),
        ({"model_type": "qwen3_5_text", "layer_types": [L, F, L, F]},
         {"model_type": "qwen3_5", "text_config": {}}, "refused", "linear"),
        ({"model_type": "qwen3_next", "layer_types": [L, F, L, F]}, {"full_attention_interval": 2},
         "accepted", "keeps"),
        ({"model_type": "exaone4", "layer_types": [S, F, S, F]}, {"sliding_window_pattern": "LG"},
         "accepted", "keeps"),
        ({"model_type": "cohere2", "layer_types": [S, S]}, {"num_hidden_layers": 2}, "refused", ""),
        ({"model_type": "exaone4", "layer_types": [F, F, F, F]}, {"sliding_window_pattern": None},
         "accepted", "keeps"),
        ({"model_type": "exaone4", "layer_types": [S, F, S, F]}, {}, "refused", "place"),
        ({"model_type": "llama4_text", "moe_layers": [1, 3], "no_rope_layers": [1, 1, 1, 0]},
         {"model_type": "llama4", "text_config": {"interleave_moe_layer_step": 2}}, "accepted", ""),
        ({"model_type": "llama4_text", "moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 0]},
         {"model_type": "llama4", "text_config": {"interleave_moe_layer_step": 2}},
         "refused", "rotary"),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 0, 1, 0]}, {}, "accepted", ""),
        (MLX_DSA, {"first_k_dense_replace": 1}, "accepted", "keeps"),
        (MLX_DSA, {"first_k_dense_replace": 2}, "refused", "block 1"),
        ({"model_type": "gpt_oss", "layer_types": [F, F]}, {"layer_types": [F, F]},
         "refused", "each kind"),
    ],
)  # fmt: skip
def test_rules_of_mlx_lm_read_the_file(fields, written, verdict, why):
    written = {"model_type": fields["model_type"], **written}
    ruling = rules.mlx_lm({"num_hidden_layers": 4, **fields}, written)
    assert ruling.verdict == verdict
    assert why in told(ruling)


def test_every_type_in_the_rules_is_one_of_transformers():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as known

    lacking = {*rules.VLLM, *rules.NOT_IN_VLLM, *rules.MLX} - set(known)
    assert lacking <= {"hy_v3", "glm4_moe_lite", "mimo_v2_flash"}  # of newer versions
    for kind in ("gpt_oss", "qwen3", "exaone4", "llama4_text"):
        config = tiny_config(kind).to_dict()
        assert rules.vllm(config).verdict in ("accepted", "refused")


@pytest.mark.parametrize(
    ("pattern", "verdict", "why"),
    [
        ([True, False, True, True], "accepted", "told by the file"),
        ([True, True, True, False], "refused", "block 1"),
        (None, "refused", "by their place: block 1"),
    ],
)
def test_rules_of_llama_cpp_read_the_file(tmp_path, pattern, verdict, why):
    fields = {"attention.sliding_window": 8, "attention.key_length": 32}
    if pattern:
        fields["attention.sliding_window_pattern"] = pattern
    file = write_tiny(tmp_path / "a.gguf", "gemma3", 4, fields=fields)
    config = {"model_type": "gemma3_text", "num_hidden_layers": 4, "layer_types": [S, F, S, S]}
    ruling = rules.llama_cpp(config, file, CUT)
    assert ruling.verdict == verdict
    assert why in told(ruling)
    assert rules.llama_cpp({**config, "num_hidden_layers": 3}, file, CUT).verdict == "refused"
    assert rules.llama_cpp(config, None, CUT).verdict == "undecided"
    deep = Cut(blocks=62, removed=tuple(range(58)))
    # the scale of attention is another at 62 blocks
    assert "how attention is scaled" in told(rules.llama_cpp(config, file, deep))


@pytest.mark.parametrize(("removed", "verdict"), [((1, 2, 3, 4), "accepted"), ((1,), "refused")])
def test_rules_of_llama_cpp_on_what_goes_by_place(tmp_path, removed, verdict):
    file = write_tiny(tmp_path / "b.gguf", "smollm3", 8 - len(removed))
    config = {"model_type": "smollm3", "num_hidden_layers": 8 - len(removed)}
    assert rules.llama_cpp(config, file, Cut(blocks=8, removed=removed)).verdict == verdict
