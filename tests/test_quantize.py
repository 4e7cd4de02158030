"""Quantized checkpoints: made (int8; GPTQ in test_quantize_gptq.py), searched, cut, refused."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

import sleb
from cli_tools import refused, run, tree
from plan_tools import plan_of
from quantize_tools import pack, save_dense
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.checksums import check_sums
from sleb.core.errors import InputError, UnsupportedModel, VerificationFailed
from sleb.formats.quantize import quantize
from sleb.surgery.verification import verify

SEARCH = {"remove": 2, "windows": 4, "length": 16, "dtype": "float32", "device": "cpu"}
NAMED = "model.layers.3.mlp.up_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_dense(tmp_path_factory.mktemp("q") / "dense")


@pytest.fixture(scope="module")
def int8(dense) -> Path:
    out = dense.parent / "int8"
    before = tree(dense)
    done = quantize(dense, out, scheme="int8")
    assert tree(dense) == before
    assert done.matrices == 6 * 7
    assert done.nbytes[0] == Checkpoint.open(dense).nbytes > 2 * Checkpoint.open(out).nbytes
    assert done.difference <= done.limit
    return out


@pytest.fixture(scope="module")
def packed(dense) -> Path:
    """Four bits, and one matrix of block 3 that stays as it is."""
    return pack(dense, dense.parent / "w4a16", ignore=(NAMED,))


@pytest.fixture(scope="module", params=["int8", "packed"])
def quantized(request) -> Path:
    return request.getfixturevalue(request.param)


def logits(folder: Path, removed=()) -> torch.Tensor:
    model = sleb.load(folder, dtype="float32", device="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode(), sleb.bypassed(model, removed):
        return model.model(input_ids=ids, use_cache=False).logits


def test_int8_is_near_the_dense_model_and_stock_transformers_loads_it(dense, int8):
    from transformers import AutoModelForCausalLM

    wanted, found = logits(dense), logits(int8)
    gap = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert 0 < gap < 0.05
    stock = AutoModelForCausalLM.from_pretrained(int8, dtype=torch.float32)
    with torch.inference_mode():
        again = stock(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.equal(again, found)
    dtypes = {name: info.dtype for name, info in Checkpoint.open(int8).tensors.items()}
    assert dtypes["lm_head.weight"] == dtypes["model.embed_tokens.weight"] == "F32"
    assert sum(dtype == "I8" and "qdata" in name for name, dtype in dtypes.items()) == 42


def test_the_folder_holds_what_belongs_to_the_model(dense, int8):
    names = {path.name for path in int8.iterdir()}
    assert {"tokenizer.json", "quantize.json", "README.md", "SHA256SUMS"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert check_sums(int8)[1] == {}
    record = json.loads((int8 / "quantize.json").read_text())
    assert (record["scheme"], record["group"], record["calibration"]) == ("int8", None, None)
    assert set(record["versions"]) == {"torchao", "transformers", "torch"}
    assert "42 matrices in the blocks were rounded to 8 bits" in (int8 / "README.md").read_text()


def test_quantize_then_cut_is_the_bypassed_quantized_model(quantized, tmp_path):
    """The law of every cut, on packed weights; and no plan of it is a plan of another model."""
    plan = sleb.search(quantized, **SEARCH)
    out = sleb.apply(plan, quantized, tmp_path / "cut")
    assert torch.equal(logits(out), logits(quantized, plan.removed))
    found = verify(out, model=quantized, plan=plan)
    assert found.passed, found
    before, after = Checkpoint.open(quantized), Checkpoint.open(out)
    kept = [i for i in range(6) if i not in plan.removed]
    for name in after.tensors:
        old = name
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            old = f"model.layers.{kept[int(number)]}.{rest}"
        assert before.digest(old) == after.digest(name)


@pytest.mark.parametrize("removed", [(1, 4), (3,), (0, 5)])
def test_names_in_the_config_follow_the_cut(packed, tmp_path, removed):
    out = sleb.apply(plan_of(packed, *removed), packed, tmp_path / "cut")
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    new = {(1, 4): ["model.layers.2.mlp.up_proj"], (3,): [], (0, 5): ["model.layers.2.mlp.up_proj"]}
    assert ignore == ["lm_head", *new[removed]]
    assert torch.equal(logits(out), logits(packed, removed))


@pytest.mark.slow
def test_torchaos_metadata_follows_the_cut(dense, tmp_path):
    """It says which tensors are quantized, block by block; here one is not."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", NAMED])
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(tmp_path / "int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "int8" / name).write_bytes((dense / name).read_bytes())
    plan = sleb.search(tmp_path / "int8", **SEARCH).model_copy(
        update={"removed": (1, 4), "order": (1, 4)}
    )
    out = sleb.apply(plan, tmp_path / "int8", tmp_path / "cut")
    (metadata,) = Checkpoint.open(out).metadata.values()
    assert sorted(json.loads(metadata["tensor_names"])) == sorted(sleb.load(out).model.state_dict())
    plain = [
        n for n, v in metadata.items() if v == '{"_type": "Tensor"}' and n.endswith("_proj.weight")
    ]
    assert plain == ["model.layers.2.mlp.up_proj.weight"]
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]
    assert skipped["modules_to_not_convert"] == ["lm_head", "model.layers.2.mlp.up_proj"]
    assert torch.equal(logits(out), logits(tmp_path / "int8", (1, 4)))


def test_a_forward_pass_does_not_change_what_a_model_consists_of(quantized):
    loaded = sleb.load(quantized, dtype="float32", device="cpu")
    before = list(loaded.model.state_dict())
    loaded.model(input_ids=torch.arange(3, 40)[None])
    assert list(loaded.model.state_dict()) == before


def test_a_quantized_cut_is_restored_byte_for_byte(quantized, tmp_path):
    out = sleb.apply(plan_of(quantized, 1, 4), quantized, tmp_path / "cut")
    sleb.restore(out, tmp_path / "back")

    def weights(folder: Path) -> str:
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    assert weights(tmp_path / "back") == weights(quantized)
    config = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "back", quantized)]
    assert config[0] == config[1]


def test_a_quantized_model_is_not_repaired(quantized):
    from sleb.repairs import repair

    model = sleb.load(quantized, dtype="float32", device="cpu")
    windows, aside = sleb.load_windows(model.tokenizer, (), windows=4, length=16, seed=0, heldout=2)
    with pytest.raises(UnsupportedModel, match="repair the cut first and quantize it then"):
        repair(model, (2,), windows, aside)


@pytest.mark.slow
def test_a_pruned_model_keeps_its_plan_but_not_what_it_is_restored_from(dense, tmp_path, capsys):
    ran = run(
        capsys, "prune", dense, "-o", tmp_path / "out", "--remove", 1, "--windows", 4, "--length",
        16, "--dtype", "float32", "--no-repair", "--quantize", "int8", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran
    assert set(ran.json) == {"run", "quantized"}
    assert ran.json["quantized"]["scheme"] == "int8"
    out, small = tmp_path / "out", tmp_path / "out-int8"
    assert (small / "plan.json").read_bytes() == (out / "plan.json").read_bytes()
    assert (out / "rollback").is_dir()
    assert not (small / "rollback").exists()
    assert not (small / "run.json").exists()
    assert "with `sleb restore`, but not in this one" in (small / "README.md").read_text()
    assert torch.allclose(logits(small), logits(out), atol=0.2)
    with pytest.raises(InputError, match=r"is quantized .torchao. and .* is not, so no weight"):
        verify(small, model=dense, plan=sleb.Plan.load(small / "plan.json"))


@pytest.fixture
def without(monkeypatch):
    """No llm-compressor, also where it is installed."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "llmcompressor" else find(name)
    )


def test_a_missing_library_is_said_in_one_line(dense, tmp_path, capsys, without):
    for verb in (
        ["quantize", "--scheme", "w4a16"],
        ["prune", "--remove", 1, "--quantize", "w8a16"],
    ):
        name, *options = verb
        said = refused(capsys, 2, name, dense, "-o", tmp_path / "x", *options)
        assert "needs llmcompressor" in said
        assert "pip install llmcompressor" in said
    assert os.listdir(tmp_path) == []


def test_mistakes(dense, int8, tmp_path, capsys, text_file):
    out, quantizing = tmp_path / "x", ("quantize", dense, "-o")
    (tmp_path / "p-int8").mkdir()
    for words, noun in [
        ((*quantizing, out, "--scheme", "int4"), "'int4' (did you mean 'int8'?)"),
        ((*quantizing, out, "--scheme", "int8", "--text", text_file), "leave out --text"),
        (("quantize", int8, "-o", out, "--scheme", "int8"), "is quantized already (torchao)"),
        ((*quantizing, int8, "--scheme", "int8"), "exists"),
        ((*quantizing, dense, "--scheme", "int8", "--force"), "is the model itself"),
        (("prune", dense, "-o", tmp_path / "p", "--remove", 1, "--quantize", "int8"), "p-int8 ex"),
    ]:
        assert noun in refused(capsys, 2, *words)
    assert not out.exists()


def test_weights_that_are_not_in_linear_modules_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from conftest import byte_tokenizer

    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModel, match="only 0% of its blocks' weights are in linear"):
        quantize(tmp_path / "gpt2", tmp_path / "out", scheme="int8")
    assert not (tmp_path / "out").exists()


def test_groups_divide_all_columns():
    from torch import nn

    from sleb.formats.quantizers import group_size

    layers = {"a": nn.Linear(256, 4), "b": nn.Linear(192, 4)}
    assert group_size({"a": layers["a"]}) == 128
    assert group_size(layers) == 64
    assert group_size({**layers, "c": nn.Linear(96, 4)}) == 32
    with pytest.raises(UnsupportedModel, match="no group of 128, 64, 32 columns divides the 48 of"):
        group_size({**layers, "d": nn.Linear(48, 4)})


@pytest.mark.parametrize(("how", "said"), [("damaged", "differs by"), ("pickled", "model.bin")])
def test_a_checkpoint_that_reads_back_differently_is_not_written(
    dense, tmp_path, monkeypatch, how, said
):
    from sleb.formats.quantizers import Rounding

    save = Rounding.save

    def spoilt(self, stage):
        if how == "damaged":
            self.model.model.norm.weight.data *= 1.1
        save(self, stage)
        if how == "pickled":
            (stage / "pytorch_model.bin").write_bytes(b"")

    monkeypatch.setattr(Rounding, "save", spoilt)
    with pytest.raises(VerificationFailed, match=said):
        quantize(dense, tmp_path / "out", scheme="int8")
    assert os.listdir(tmp_path) == []
