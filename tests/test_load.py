"""A checkpoint loads only if config, tensors and tokenizer are whole and fit each other."""

import contextlib
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.numpy import load_file, save_file

import sleb
from conftest import byte_tokenizer
from plan_tools import edit_config
from sleb.core.errors import DataError, InputError, UnsupportedModel
from sleb.models.load import load_config, load_tokenizer
from sleb.models.source import quiet_transformers

CPU = {"dtype": "float32", "device": "cpu"}


@pytest.fixture
def copy(tiny_dir, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


def test_pickles_are_never_opened_even_beside_safetensors(copy):
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04not a pickle")
    assert len(sleb.load(copy, **CPU).stack) == 6


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_type": "nonsense"}, UnsupportedModel, "model type `nonsense`"),
        ({"model_type": []}, DataError, r"config\.json is not valid: unhashable type"),
        ({"num_hidden_layers": "six"}, DataError, "is not valid: .*'num_hidden_layers'.* got str"),
        ({"num_hidden_layers": 0}, DataError, "is not valid: num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**30}, DataError, "is not valid: num_hidden_layers is 1000"),
        ({"num_attention_heads": 0}, DataError, "is not valid: integer modulo by zero"),
        ({"num_key_value_heads": -8}, DataError, "negative dimension"),
        ({"num_hidden_layers": 7}, DataError, r"9 missing keys .*model\.lay"),
        ({"num_hidden_layers": 5}, DataError, r"9 unexpected keys .*model\.l"),
        ({"vocab_size": 300}, DataError, r"2 mismatched .*lm_head.* \[259, 32\] .*\[300, 32\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copy, fields, error, message):
    edit_config(copy, **fields)
    with pytest.raises(error, match=message) as info:
        sleb.load(copy, **CPU)
    assert "\n" not in str(info.value)


def test_an_architecture_need_not_be_named(copy):
    edit_config(copy, architectures=None)
    assert sleb.describe(copy).architecture == "unknown"


@pytest.mark.parametrize("text", ["", "[]", "{", "1" * 5000, '{"a":' + "[" * 100_000, '{"\xff'])
def test_a_config_that_is_not_json_is_corrupt(copy, text):
    (copy / "config.json").write_text(text, encoding="latin-1")
    for use in (sleb.load, sleb.describe, load_config):
        with pytest.raises(DataError, match=r"config\.json is not (valid JSON|a JSON object)"):
            use(copy)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_every_tensor_is_accounted_for(copy, change):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors[name.replace(".3.", ".6.")] = tensors[name]
    else:
        tensors[name] = tensors[name][1:].copy()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=rf"1 {change} keys .*model\.layers\.\d\.mlp\.up_proj"):
        sleb.load(copy, **CPU)


def test_an_encoder_decoder_and_an_encoder_are_not_supported(tmp_path):
    small = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    transformers.BartConfig(**small, **heads).save_pretrained(tmp_path / "bart")
    with pytest.raises(UnsupportedModel, match="bart is an encoder-decoder; sleb cuts decoder-onl"):
        load_config(tmp_path / "bart")
    transformers.T5Config(d_model=16, num_layers=2, vocab_size=40).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match=r"not a causal language model \(model_type 't5'\)"):
        load_config(tmp_path / "t5")


def test_a_bidirectional_model_is_not_supported(tmp_path):
    small = {"vocab_size": 259, "hidden_size": 16, "num_attention_heads": 2}
    config = transformers.BertConfig(**small, num_hidden_layers=2, intermediate_size=16)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModel, match="so it is no causal language model"):
        sleb.load(tmp_path / "bert", **CPU)
    assert sleb.describe(tmp_path / "bert").supported is False


def test_code_of_the_models_own_needs_permission(copy):
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (copy / "own.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UnsupportedModel, match="contains custom code which must be executed"):
        sleb.load(copy, **CPU)


def test_a_tokenizer_is_needed_and_must_be_whole(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"copy has no tokenizer that loads: "):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"copy has no tokenizer that loads: "):
        sleb.load(copy, **CPU)


def test_dtype_and_device_are_checked(tiny_dir):
    with pytest.raises(InputError, match=r"unknown dtype 'bfloat'.*did you mean 'bfloat16'.*auto,"):
        sleb.load(tiny_dir, dtype="bfloat")
    for device in ("gpu", "meta", "xla:0"):
        with pytest.raises(InputError, match=rf"'{device}' is not a device; use cpu, cuda, cuda:1"):
            sleb.load(tiny_dir, device=device)
    with pytest.raises(InputError, match=r"--device cuda:99: this machine has \d+ CUDA devices"):
        sleb.load(tiny_dir, device="cuda:99")


def test_transformers_settings_are_put_back():
    from transformers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) != before
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_sentencepiece_file_alone_names_its_packages(tiny_dir, tmp_path, monkeypatch):
    import transformers.utils

    copy = Path(shutil.copytree(tiny_dir, tmp_path / "copy"))
    for file in copy.glob("tokenizer*"):
        file.unlink()
    (copy / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(transformers.utils, "is_sentencepiece_available", lambda: False)
    monkeypatch.setattr(transformers.utils, "is_protobuf_available", lambda: False)
    with pytest.raises(InputError, match="pip install sentencepiece protobuf"):
        load_tokenizer(copy)


def test_a_token_without_an_embedding_is_named_where_it_comes_up(copy, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(copy)
    few = {"windows": 2, "heldout": 0, "length": 32, "device": "cpu", "remove": 1}
    words = "a block passes its input through " * 20
    for text, refused in ((words, False), (words.replace(" ", "<extra>"), True)):
        (tmp_path / "text.txt").write_text(text)
        expected = pytest.raises(InputError, match=r"token 259 \(<extra>\).*0 to 258")
        with expected if refused else contextlib.nullcontext():
            sleb.search(copy, text=(str(tmp_path / "text.txt"),), **few)
