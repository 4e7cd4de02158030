"""Cutting a checkpoint on disk: what stays is the same bytes, what goes is gone."""

import json
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sleb
from cli_tools import tree
from conftest import save_tiny
from plan_tools import plan_of
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError
from sleb.core.plan import Plan

INDEX = "model.safetensors.index.json"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                assert name not in found
                found[name] = opened.get_tensor(name)
    return found


def expected_names(before: dict, removed: set[int]) -> dict[str, str]:
    """New name to old name, written down independently of the code under test."""
    names = {}
    for old in before:
        parts = old.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) in removed:
                continue
            parts[2] = str(len([b for b in range(int(parts[2])) if b not in removed]))
        names[".".join(parts)] = old
    return names


def assert_cut(source: Path, out: Path, removed: set[int]) -> None:
    before, after = tensors(source), tensors(out)
    names = expected_names(before, removed)
    assert sorted(after) == sorted(names)
    for new, old in names.items():
        assert after[new].dtype == before[old].dtype
        raw_new, raw_old = (t.contiguous().view(torch.uint8) for t in (after[new], before[old]))
        assert torch.equal(raw_new, raw_old), new


@pytest.mark.parametrize("shard", ["1GB", "60KB", "20KB"])
def test_every_depth_is_the_first_removals_of_the_order(tmp_path, shard):
    source = save_tiny(tmp_path / "source", shard=shard)
    before = tree(source)
    plan = plan_of(source, 4, 1, 3)
    for depth in (1, 2, 3, None):
        out = sleb.apply(plan, source, tmp_path / f"out{depth}", depth=depth)
        assert_cut(source, out, set((4, 1, 3)[:depth]))
        config = json.loads((out / "config.json").read_text())
        assert config["num_hidden_layers"] == 6 - (depth or 3)
        used = Plan.load(out / "plan.json")
        assert used.order == (4, 1, 3)[:depth]
        assert used.at_depth(None) == plan.at_depth(depth)
    assert tree(source) == before
    with pytest.raises(InputError, match=r"--depth 4 is outside this plan's 1\.\.3; search again"):
        sleb.apply(plan, source, tmp_path / "never", depth=4)
    assert not (tmp_path / "never").exists()


def test_the_index_describes_the_shards(tmp_path):
    source = save_tiny(tmp_path / "source", shard="20KB")
    assert len(list(source.glob("*.safetensors"))) > 10
    out = sleb.apply(plan_of(source, 2, 3), source, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    total = len(shards)
    assert total > 5
    assert shards == [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    assert sorted(set(index["weight_map"].values())) == shards
    held = {}
    for shard in shards:
        held.update(dict.fromkeys(load_file(out / shard), shard))
    assert index["weight_map"] == held
    found = tensors(out).values()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found)
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in found)


def test_every_dtype_keeps_its_bytes_and_its_alignment(tmp_path):
    source = save_tiny(tmp_path / "source", blocks=8)
    path = source / "model.safetensors"
    content = {k: v.bfloat16() for k, v in load_file(path).items()}
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        content[name] = torch.randint(0, 120, (7, 3), generator=generator).byte()
        kind = (torch.float8_e4m3fn, torch.int8, torch.float16, torch.float64, torch.bool)[i % 5]
        content[name] = content[name].to(kind)
    save_file(content, path, {"format": "pt", "note": "kept"})
    out = sleb.apply(plan_of(source, 0, 1), source, tmp_path / "out")
    assert_cut(source, out, {0, 1})
    with safe_open(out / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_tensors_stay_aligned_though_odd_ones_before_them_go(tmp_path):
    """Other writers order tensors as they like; here bytes come before floats."""
    source = save_tiny(tmp_path / "source", blocks=2)
    header, offset = {}, 0
    for name, dtype, size in [("0.a", "U8", 3), ("1.a", "U8", 5), ("1.b", "F64", 16)]:
        entry = {"dtype": dtype, "shape": [size // 8 if dtype == "F64" else size]}
        header[f"model.layers.{name}"] = {**entry, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    data = bytes(range(offset))
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    out = sleb.apply(plan_of(source, 0), source, tmp_path / "out")
    assert_cut(source, out, {0})
    for info in Checkpoint.open(out).tensors.values():
        assert info.start % info.width == 0


def test_what_belongs_to_the_model_is_carried_and_other_weights_are_not(tmp_path):
    source = save_tiny(tmp_path / "source")
    carried = {
        "LICENSE": b"do as you like",
        "NOTICE.txt": b"by them",
        "chat_template.jinja": b"{{ messages }}",
        "special_tokens_map.json": b"{}",
        "modeling_own.py": b"# code",
        "additional_chat_templates/rag.jinja": b"{{ x }}",
    }
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "model.onnx"]
    left += ["model.onnx_data", "tf_model.h5", "flax_model.msgpack", "consolidated.00.pth"]
    left += ["params.json", "run.json", ".gitattributes", "onnx/model.onnx", "extra.safetensors"]
    for name, content in {**carried, **dict.fromkeys(left, b"of six blocks")}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    before = tree(source)
    out = sleb.apply(plan_of(source, 2), source, tmp_path / "out")
    after = tree(out)
    for name in [*carried, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        assert after[name] == before[name]
    assert {name for name in after if name.split("/")[0] != "rollback"} == {
        *carried, "additional_chat_templates", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "config.json", "model.safetensors", "plan.json",
        "README.md", "SHA256SUMS",
    }  # fmt: skip
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert Plan.load(out / "plan.json").removed == (2,)


MEASURE = """
import pathlib, re, sys
import sleb
from sleb.models.load import empty_model, load_config

def peak():  # since the last reset, in bytes; getrusage would count the parent's memory too
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

empty_model(load_config(pathlib.Path(sys.argv[2])))  # what is imported on the way is not counted
plan = sleb.Plan.load(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
sleb.apply(plan, sys.argv[2], sys.argv[3])
cutting = peak() - before
held = b"x" * 200_000_000
print(cutting, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A file of 346 MB, with tensors of 131 MB, is cut with less than 80 MB above the imports."""
    from transformers import LlamaConfig

    source = tmp_path / "source"
    shapes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    LlamaConfig(vocab_size=64_000, num_attention_heads=8, **shapes).save_pretrained(source)
    from sleb.models.load import empty_model, load_config

    generator = np.random.default_rng(0)
    noise = torch.from_numpy(generator.integers(0, 16_000, 64_000 * 1024, dtype=np.int16))
    content = {
        name: (noise[: t.numel()].view(torch.bfloat16).reshape(t.shape)).clone()
        for name, t in empty_model(load_config(source)).state_dict().items()
    }
    save_file(content, source / "model.safetensors", {"format": "pt"})
    size = (source / "model.safetensors").stat().st_size
    assert size > 300e6
    del content
    plan_of(source, 1).save(tmp_path / "plan.json")
    places = [str(tmp_path / name) for name in ("plan.json", "source", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *places], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cutting, with_200_mb = map(int, done.stdout.split())
    assert cutting < 80e6
    assert with_200_mb > 190e6  # the measure can fail
    assert (tmp_path / "out/model.safetensors").stat().st_size < 0.95 * size
    shutil.rmtree(tmp_path)


PLAIN = """
import sys
class NoSleb:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sleb":
            raise ImportError("sleb is not here")
sys.meta_path.insert(0, NoSleb())
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
made = model.generate(**tokenizer("some text", return_tensors="pt"), max_new_tokens=5)
assert "sleb" not in sys.modules
print(len(model.model.layers), made.shape[1])
"""


@pytest.mark.slow
def test_plain_transformers_loads_and_runs_the_result(tiny_dir, tmp_path):
    out = sleb.apply(plan_of(tiny_dir, 4, 1), tiny_dir, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", str(len("some text") + 5)]
