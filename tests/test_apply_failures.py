"""What a cut refuses, and what a full disk leaves: nothing."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import sleb
from cli_tools import tree
from conftest import save_tiny
from fuzz_tools import changed
from plan_tools import edit_config, plan_of
from sleb.checkpoints.checkpoint import INDEX, Checkpoint, read_shard
from sleb.core.errors import DataError, InputError, ResourceError
from sleb.core.plan import Plan
from sleb.surgery import apply as surgery


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/{}", "{}.bin", "..", ""])
def test_an_index_that_points_elsewhere_is_refused(tiny_dir, tmp_path, name):
    source = Path(shutil.copytree(tiny_dir, tmp_path / "deep/source"))
    (source / "sub").mkdir()
    weights = source / "model.safetensors"
    name = name.format("model.safetensors") if name != "/{}" else str(tmp_path / "m.safetensors")
    for place in (tmp_path / "deep", source / "sub", tmp_path):
        shutil.copyfile(weights, place / ("m.safetensors" if place == tmp_path else weights.name))
    names = list(load_file(weights))
    weights.unlink()
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(DataError, match=rf"names '{name}': a shard must be a file beside it"):
        Checkpoint.open(source)


def test_a_damaged_index_is_corrupt(tmp_path):
    source = save_tiny(tmp_path / "source", shard="60KB")
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    for content, message in [
        ("{", "is not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        (json.dumps({"weight_map": {**weight_map, "x": "model-9.safetensors"}}), "lacks the shard"),
    ]:
        (source / INDEX).write_text(content)
        with pytest.raises(DataError, match=message):
            Checkpoint.open(source)


@pytest.mark.parametrize("keep", [0, 4, 8, 500, 20_000, -1])
def test_a_truncated_shard_is_refused_before_anything_is_written(tmp_path, keep):
    source = save_tiny(tmp_path / "source", shard="60KB")
    plan = plan_of(source, 2)
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    before = tree(tmp_path)
    message = rf"{shard.name} is corrupt or truncated \(.*\): fetch it again"
    with pytest.raises(DataError, match=message):
        sleb.apply(plan, source, tmp_path / "out")
    assert tree(tmp_path) == before


@given(st.data())
@settings(max_examples=60)
def test_a_shard_that_the_library_refuses_is_refused_and_read_as_it_reads(tmp_path_factory, data):
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
        "__metadata__": {"format": "pt"},
    }
    raw = json.dumps(data.draw(st.just(header) | changed(header))).encode()
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(26))
    try:
        with safe_open(path, framework="np") as shard:
            known = {name: (*shard.get_slice(name).get_shape(),) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(DataError):
            read_shard(path)
        return
    found, _, _ = read_shard(path)
    assert {name: info.shape for name, info in found.items()} == known


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "weights_sha256 is"),
        ("config", "config_sha256 is"),
        ("type", "model_type is llama in the plan and mistral in"),
        ("blocks", "blocks is 60 in the plan and 6 in"),
    ],
)
def test_a_plan_for_another_model_is_refused_and_says_what_differs(
    tmp_path, tiny_dir, change, said
):
    plan, other = plan_of(tiny_dir, 2), tmp_path / "other"
    if change == "weights":
        save_tiny(other, seed=1)
    else:
        shutil.copytree(tiny_dir, other)
    if change == "config":
        edit_config(other, rms_norm_eps=1e-3)
    if change == "type":
        edit_config(other, model_type="mistral", architectures=["MistralForCausalLM"])
    if change == "blocks":  # a plan that was changed by hand: the hashes are right
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"blocks": 60})})
    with pytest.raises(InputError, match=rf"another model: {said}.*other; search again"):
        sleb.apply(plan, other, tmp_path / "out")
    assert os.listdir(tmp_path) == ["other"]


def test_the_model_itself_is_never_replaced(tmp_path):
    source = save_tiny(tmp_path / "outer/source")
    plan = plan_of(source, 2)
    before = tree(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for out in (source, tmp_path / "outer", link, tmp_path / "outer/../outer/source"):
        with pytest.raises(InputError, match="is the model itself, or holds it; choose another -o"):
            sleb.apply(plan, source, out, force=True)
    assert tree(source) == before


@pytest.mark.parametrize("where", ["shard", "config", "tokenizer", "plan"])
def test_a_disk_that_fills_up_leaves_no_trace(tmp_path, monkeypatch, where):
    source = save_tiny(tmp_path / "source")
    (tmp_path / "out").mkdir()
    plan = plan_of(source, 2)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    if where == "shard":
        real, written = Checkpoint.chunks, []

        def chunks(self, name):
            written.append(name)
            if len(written) > 90:  # hashing asks for each once before
                full()
            return real(self, name)

        monkeypatch.setattr(Checkpoint, "chunks", chunks)
    elif where == "config":
        monkeypatch.setattr(surgery, "write_json", full)
    elif where == "tokenizer":
        monkeypatch.setattr(surgery.shutil, "copyfile", full)
    else:
        monkeypatch.setattr(Plan, "to_json", full)
    before = tree(tmp_path)
    for out in ("out", "new/folder"):
        with pytest.raises(ResourceError, match=rf"disk full while writing .*{out}; free some spa"):
            sleb.apply(plan, source, tmp_path / out, force=True)
    assert tree(tmp_path) == before


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 100_000}))
    before = tree(tmp_path)
    with pytest.raises(ResourceError, match=r"needs [\d.]+ kB, but the disk of .* has 100 kB free"):
        sleb.apply(plan_of(source, 2), source, tmp_path / "out")
    assert tree(tmp_path) == before
