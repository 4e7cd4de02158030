"""A GGUF file is converted as llama.cpp runs it, or refused by the field that would be lost."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as converter

import sleb
from conftest import byte_tokenizer
from gguf_tools import llama3_divisors, readable, write_tiny  # noqa: F401
from sleb.calibration.tokens import special_tokens
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import DataError, InputError, UnsupportedModel
from sleb.models.gguf_source import correct_tokens, corrections, parsed_once
from sleb.models.source import resolve

CPU = {"dtype": "float32", "device": "cpu"}
LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def found(path, config=None):
    return corrections(GGUFFile.open(path), config or transformers.LlamaConfig(**LLAMA))


def test_a_plain_file_needs_no_correction(tmp_path):
    assert found(write_tiny(tmp_path / "m.gguf")) == {"rms_norm_eps": pytest.approx(1e-5)}


@pytest.mark.usefixtures("readable")
def test_a_file_is_parsed_once_and_gguf_is_left_as_it_was(tmp_path, monkeypatch):
    """Quantized rows are dequantized apart; a vector is one piece."""
    path, parsed, before = write_tiny(tmp_path / "m.gguf"), [], dict(vars(gguf))
    init = gguf.GGUFReader.__init__
    counted = lambda self, *given: parsed.append(given) or init(self, *given)  # noqa: E731
    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    read, value_of = [], converter._gguf_parse_value
    counting = lambda part, kinds: read.append(part) or value_of(part, kinds)  # noqa: E731
    monkeypatch.setattr(converter, "_gguf_parse_value", counting)
    resolve(path)
    assert len(parsed) == 1
    assert read
    assert len({id(part) for part in read}) == len(read), "a value is read once as well"
    assert dict(vars(gguf)) == before
    assert converter._gguf_parse_value is counting
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for shape in ((5, 64), (3, 2, 32), (64,)):
        rows = gguf.quantize(rng.standard_normal(shape, np.float32), kind)
        with parsed_once():
            found = gguf.dequantize(rows, kind)
        np.testing.assert_array_equal(found, gguf.dequantize(rows, kind))


def test_what_the_file_marks_as_a_token_is_read_as_one_and_its_end_is_the_end(tmp_path):
    """As of Qwen2, of whose tokens transformers 5.17 knows three, and another end."""
    tokenizer = byte_tokenizer("<|end|>", "<tool>")
    text, plain = "a <tool> b<|end|>", tokenizer("a b").input_ids
    split = tokenizer(text).input_ids
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(261))])
    writer.add_token_types([1] * 259 + [3, 4])  # control, user-defined
    writer.add_eos_token_id(259)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert {259, 260}.isdisjoint(split)
    correct_tokens(tmp_path / "m.gguf", tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    for found in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = found(text).input_ids
        assert ids[-1] == found.eos_token_id == 259
        assert ids.count(260) == 1
        assert found("a b").input_ids == plain
        assert special_tokens(found) == {0, 1, 2, 259}
        assert found.decode(ids, skip_special_tokens=True) == "a <tool> b"


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_positions_are_those_of_the_model_that_was_read(tmp_path, kind):
    if kind == "linear":
        path = write_tiny(
            tmp_path / "m.gguf", fields={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
        )
    else:
        path = write_tiny(tmp_path / "m.gguf", extra={"rope_freqs.weight": llama3_divisors()})
    model = sleb.load(path, **CPU)
    plain = write_tiny(tmp_path / "plain.gguf")
    other = sleb.load(plain, **CPU)
    own, base = (m.model.model.rotary_emb.inv_freq for m in (model, other))
    divisors = 4.0 if kind == "linear" else torch.from_numpy(llama3_divisors())
    torch.testing.assert_close(own, base / divisors, rtol=1e-5, atol=0)
    # and a cut of it says so in the words of transformers 4 and 5
    assert model.model.config.rope_parameters["rope_type"] == kind


@pytest.mark.usefixtures("readable")
def test_inspecting_a_file_says_in_advance_what_converting_it_would(tmp_path):
    """From its header: nothing is converted."""
    whole = sleb.describe(write_tiny(tmp_path / "m.gguf"))
    assert (whole.supported, whole.block_class) == (True, "LlamaDecoderLayer")
    freqs = {"rope_freqs.weight": llama3_divisors()}
    scaled = sleb.describe(write_tiny(tmp_path / "r.gguf", extra=freqs))
    assert dict(scaled.carried)["rope_parameters"]["rope_type"] == "llama3"
    lost = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    with pytest.raises(UnsupportedModel, match=r"rope\.scaling"):
        sleb.describe(write_tiny(tmp_path / "f.gguf", fields=lost))
    with pytest.raises(UnsupportedModel, match="glm4moe"):
        sleb.describe(write_tiny(tmp_path / "g.gguf", "glm4moe"))
    with pytest.raises(DataError, match=r"blk\.3\.ffn_up"):
        sleb.describe(write_tiny(tmp_path / "l.gguf", extra={"blk.3.ffn_up.weight": None}))
    assert not (tmp_path / "cache/gguf").exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope.scaling.type"),
        ({"rope.scaling.type": "linear", "rope.scaling.attn_factor": 2.0}, "attn_factor"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"attention.key_length": 32}, "attention.key_length"),
        ({"attention.causal": False}, "attention.causal"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv"),
        ({"expert_gating_func": 2}, "expert_gating_func"),
    ],
)
def test_a_field_without_a_place_is_named(tmp_path, fields, named):
    path = write_tiny(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(UnsupportedModel, match=rf"llama\.{named}|llama\.\S*{named}"):
        found(path)


def test_divisors_that_no_rule_makes_are_named(tmp_path):
    odd = np.linspace(1, 3, 8).astype(np.float32)
    path = write_tiny(tmp_path / "m.gguf", extra={"rope_freqs.weight": odd})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        found(path)
    ones = write_tiny(tmp_path / "1.gguf", extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rope_parameters" not in found(ones)


@pytest.mark.parametrize(("architecture", "depth"), [("gemma2", 46), ("gemma3", 62)])
def test_the_query_scale_of_gemma_goes_by_its_size(tmp_path, architecture, depth):
    kind = {"gemma2": transformers.Gemma2Config, "gemma3": transformers.Gemma3TextConfig}
    own = {"attention.key_length": 32, "attention.sliding_window": 24, "rope.dimension_count": 32}
    for blocks, scale in ((depth, 64 // 4), (depth - 1, 32)):
        path = write_tiny(tmp_path / f"{blocks}.gguf", architecture, blocks, fields=own)
        config = kind[architecture](
            num_hidden_layers=blocks, hidden_size=64, num_attention_heads=4, head_dim=32
        )
        changes = found(path, config)
        assert changes["query_pre_attn_scalar"] == scale
        assert changes["sliding_window"] == 24


def test_caps_windows_and_bases_are_the_files(tmp_path):
    fields = {
        "attention.key_length": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "attention.sliding_window_pattern": [True, True, False, True] * 2,
        "rope.freq_base": 500000.0,
        "attention.layer_norm_rms_epsilon": 1e-4,
    }
    path = write_tiny(tmp_path / "m.gguf", "gemma2", fields=fields)
    changes = found(
        path, transformers.Gemma2Config(num_hidden_layers=8, hidden_size=64, head_dim=16)
    )
    assert changes["attn_logit_softcapping"] == 20
    assert changes["final_logit_softcapping"] == 10
    assert changes["rope_parameters"]["rope_theta"] == 500000
    assert changes["rms_norm_eps"] == pytest.approx(1e-4)
    kinds = {True: "sliding_attention", False: "full_attention"}
    assert changes["layer_types"] == [kinds[k] for k in [True, True, False, True] * 2]


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"extra": {"blk.2.ffn_up.weight": None}}, DataError, r"blk\.2\.ffn_up\.weight"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, UnsupportedModel, "64 elem"),
        ({"last": {"split.count": 2}}, InputError, "2 parts"),
        ({"architecture": "glm4moe"}, UnsupportedModel, "glm4moe"),
    ],
)
def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path, options, kind, named):
    path = write_tiny(tmp_path / "m.gguf", **options)
    with pytest.raises(kind, match=named):
        resolve(path)
    assert not list((tmp_path / "cache").glob("gguf/*"))
