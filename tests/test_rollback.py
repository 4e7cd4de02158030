"""A cut can be taken back: restore(apply(x)) = x, byte for byte, without x at hand."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sleb
import zoo
from cli_tools import refused, run, tree
from conftest import save_tiny
from rollback_tools import CARRIED, any_repair, files, plan_of, repaired_cut, small
from sleb.checkpoints.checkpoint import INDEX, Checkpoint, fingerprint
from sleb.core.errors import InputError, ResourceError
from sleb.core.plan import Plan
from sleb.surgery.rollback_manifest import Manifest


@pytest.mark.parametrize("shard", ["1GB", "60KB", "20KB"])
def test_the_original_comes_back_byte_for_byte_and_so_does_every_depth(tmp_path, shard):
    source = small(tmp_path / "source", shard=shard)
    before, plan = tree(source), plan_of(source, 4, 1, 3)
    out = sleb.apply(plan, source, tmp_path / "out")
    for depth in (1, 2):
        sleb.apply(plan, source, tmp_path / f"own{depth}", depth=depth)
    shutil.rmtree(source)
    done = sleb.restore(out, tmp_path / "back")
    assert tree(tmp_path / "back") == before
    assert (done.removed, done.blocks, done.repair_undone) == ((), 6, False)
    for depth in (1, 2):
        own, less = tmp_path / f"own{depth}", tmp_path / f"less{depth}"
        done = sleb.restore(out, less, depth=depth)
        assert (done.removed, done.blocks) == (plan.at_depth(depth), 6 - depth)
        assert files(less) == files(own)
        assert Plan.load(less / "plan.json").order == (4, 1, 3)[:depth]
        card = (less / "README.md").read_text()
        assert "license: mit" in card
        assert f"sleb restore --depth {depth}" in card
        sleb.restore(less, tmp_path / f"again{depth}")
        assert tree(tmp_path / f"again{depth}") == before


FAMILIES = ["llama:tied", "gpt2", "mixtral", "gpt_oss", "qwen3_moe", "gemma3_text"]
FAMILIES += ["deepseek_v3", "nemotron_h", "mamba"]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_many_kinds_come_back(family, tmp_path):
    model, _ = zoo.tiny(family)
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="40KB")
    out = sleb.apply(plan_of(source, 5, 2), source, tmp_path / "out")
    sleb.restore(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)
    sleb.restore(out, tmp_path / "one", depth=1)
    sleb.apply(plan_of(source, 5, 2), source, tmp_path / "own", depth=1)
    assert files(tmp_path / "one") == files(tmp_path / "own")


def test_odd_layouts_come_back(tmp_path):
    """Other writers: tensors in another order, spaces in headers, metadata, dtypes of one byte,
    no tensor left of a shard, and an index with fields of its own."""
    source = save_tiny(tmp_path / "source", blocks=4)
    whole = load_file(source / "model.safetensors")
    whole["model.layers.2.mlp.up_proj.weight"] = torch.arange(21).byte().reshape(7, 3)
    whole["model.layers.0.mlp.up_proj.weight"] = torch.ones(5).to(torch.float8_e4m3fn)
    whole["model.layers.1.empty"] = torch.empty(0, 4)
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in whole.items():
        parts["b.safetensors" if ".layers.1." in name else "a.safetensors"][name] = tensor
    for shard, content in parts.items():
        save_file(content, source / shard, {"format": "pt", "of": shard})
        raw = (source / shard).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        entries = dict(reversed(json.loads(raw[8 : 8 + size]).items()))
        header = json.dumps(entries, indent=1).encode()
        header += b" " * (-len(header) % 8 + 16)
        (source / shard).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    weight_map = {name: shard for shard, content in parts.items() for name in content}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map, "by": "hand"}))
    (source / "model.safetensors").unlink()
    plan = plan_of(source, 1, 2)
    out = sleb.apply(plan, source, tmp_path / "out")
    assert not (out / INDEX).exists()
    sleb.restore(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)
    sleb.restore(out, tmp_path / "less", depth=1)
    assert files(tmp_path / "less") == files(sleb.apply(plan, source, tmp_path / "own", depth=1))


def test_a_repair_is_undone(tmp_path, capsys):
    source = small(tmp_path / "source", shard="60KB")
    out = tmp_path / "out"
    plan, _ = repaired_cut(source, out, 3, 4)
    before = tree(source)
    kept = load_file(out / "rollback/removed.safetensors")
    assert {n.split(".")[2] for n in kept} == {"2", "3", "4", "5"}
    sleb.apply(plan, source, tmp_path / "own", depth=1, repair=False)
    shutil.rmtree(source)
    ran = run(capsys, "restore", out, "-o", tmp_path / "back.gguf")
    assert ran.code == 2
    assert (
        f"{tmp_path / 'back.gguf'} would be a folder, as this writes no file: give back" in ran.err
    )
    ran = run(capsys, "restore", out, "-o", tmp_path / "back")
    assert (ran.code, ran.err) == (0, "")
    assert "byte for byte" in " ".join(ran.out.split())
    assert tree(tmp_path / "back") == before
    ran = run(capsys, "restore", out, "-o", tmp_path / "less", "--depth", "1")
    assert "removed block 3 without the repair" in " ".join(ran.out.split())
    assert files(tmp_path / "less") == files(tmp_path / "own")
    assert Plan.load(tmp_path / "less/plan.json").repair is None
    found = run(capsys, "restore", out, "-o", tmp_path / "2", "--depth", "1", "--json").json
    assert (found["removed"], found["blocks"], found["repair_undone"]) == ([3], 5, True)
    assert found["nbytes"] == Checkpoint.open(tmp_path / "2").nbytes
    whole = sleb.restore(out, tmp_path / "whole", depth=2)  # the very cut, repair included
    assert not whole.repair_undone
    assert files(tmp_path / "whole") == files(out)


def test_a_cut_of_a_cut_comes_back_to_the_first_cut(tmp_path):
    source = small(tmp_path / "source")
    first = sleb.apply(plan_of(source, 4, 1), source, tmp_path / "first")
    (first / "run.json").write_text("{}")
    (first / "heal.json").write_text("{}")  # as if it had been trained: a cut of it was not
    second = sleb.apply(plan_of(first, 2), first, tmp_path / "second")
    assert not (second / "rollback/rollback").exists()
    assert not (second / "heal.json").exists()
    assert Manifest.load(second / "rollback/rollback.json").model == fingerprint(
        Checkpoint.open(first), 4
    )
    sleb.restore(second, tmp_path / "back")
    wanted = {k: v for k, v in tree(first).items() if not k.startswith("rollback")}
    assert tree(tmp_path / "back") == wanted


def test_the_side_car_holds_what_the_cut_took_and_no_more(tmp_path):
    source = small(tmp_path / "source")
    out = sleb.apply(plan_of(source, 4, 1), source, tmp_path / "out")
    kept = load_file(out / "rollback/removed.safetensors")
    before = load_file(source / "model.safetensors")
    assert set(kept) == {n for n in before if n.startswith(("model.layers.4.", "model.layers.1."))}
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert not list(out.glob("*removed*"))  # vLLM loads every *.safetensors beside the config
    manifest = Manifest.load(out / "rollback/rollback.json")
    assert set(manifest.carried) >= set(CARRIED)
    assert "`sleb restore PATH -o ORIGINAL`" in (out / "README.md").read_text()
    listed = {f"rollback/{name}" for name in manifest.files} | {"rollback/rollback.json"}
    found = {k for k, v in tree(out).items() if k.startswith("rollback/") and v is not None}
    assert found - {"rollback/SHA256SUMS"} == listed


def test_without_keep_there_is_no_way_back(tmp_path, capsys):
    source = small(tmp_path / "source")
    plan_of(source, 4, 1).save(tmp_path / "plan.json")
    out = tmp_path / "out"
    options = ["apply", tmp_path / "plan.json", source, "-o", out]
    assert run(capsys, *options, "--no-keep").code == 0
    assert not (out / "rollback").exists()
    assert "restore" not in (out / "README.md").read_text()
    said = refused(capsys, 2, "restore", out, "-o", tmp_path / "back")
    assert said.startswith(f"{out} has no rollback/rollback.json: it was written with --no-keep, ")
    assert run(capsys, *options, "--force").code == 0
    assert run(capsys, "restore", out, "-o", tmp_path / "back").code == 0
    assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize("keep", [True, False])
def test_the_disk_must_hold_what_is_kept(tmp_path, monkeypatch, keep):
    source = small(tmp_path / "source")
    nbytes = Checkpoint.open(source).nbytes
    repair = any_repair(source, (1,), "model.layers.0.mlp.down_proj.weight")
    spare = nbytes if not keep else nbytes + 32 * 48 * 4
    for free, fits in ((spare - 1, not keep), (spare, True)):
        usage = type("U", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        out, plan = tmp_path / f"out{free}", plan_of(source, 1)
        if fits:
            sleb.apply(plan, source, out, repair=repair, keep=keep)
        else:
            with pytest.raises(ResourceError, match=r"the checkpoint needs [1-9][\d.]* kB"):
                sleb.apply(plan, source, out, repair=repair, keep=keep)
    if keep:
        before = tree(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": nbytes}))
        with pytest.raises(ResourceError, match=r"needs [1-9][\d.]* kB"):
            sleb.restore(out, tmp_path / "back")
        assert tree(tmp_path) == before


def test_the_command_line_refuses_what_cannot_be(tmp_path, capsys):
    source = small(tmp_path / "source")
    out = sleb.apply(plan_of(source, 4, 1), source, tmp_path / "out")
    (healed := Path(shutil.copytree(out, tmp_path / "healed")) / "heal.json").write_text("{}")
    before, back = tree(tmp_path), tmp_path / "back"
    for arguments, noun in [
        ([tmp_path / "nothing", "-o", back], "no checkpoint folder"),
        ([source, "-o", back], "no rollback/rollback.json"),
        ([healed.parent, "-o", back], "healed"),
        ([out, "-o", out], "exists"),
        ([out, "-o", out, "--force"], "is the model itself"),
        ([out, "-o", back, "--depth", "3"], "--depth 3"),
        ([out, "-o", back, "--depth", "0"], "--depth 0"),
    ]:
        assert noun in refused(capsys, 2, "restore", *arguments)
    assert tree(tmp_path) == before
    assert run(capsys, "restore", out, "-o", source, "--force").code == 0
    assert tree(tmp_path) == before  # the source, replaced by itself


def test_sources_may_be_read_only_and_results_have_plain_modes(tmp_path):
    source = small(tmp_path / "source", shard="60KB")
    for path in (*source.rglob("*"), source):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    before, mask = tree(source), os.umask(0o077)
    try:
        out = sleb.apply(plan_of(source, 4, 1), source, tmp_path / "out")
        assert tree(source) == before
        for path in (*out.rglob("*"), out):
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        cut = tree(out)
        sleb.restore(out, tmp_path / "back")
        sleb.restore(out, tmp_path / "less", depth=1)
        assert tree(out) == cut
    finally:
        os.umask(mask)
    for made in (tmp_path / "back", tmp_path / "less"):
        for path in (*made.rglob("*"), made):
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert tree(tmp_path / "back") == before


def test_a_name_that_could_not_be_restored_is_refused_by_apply(tmp_path):
    source = small(tmp_path / "source")
    (source / "back\\slash.txt").write_text("x")
    with pytest.raises(InputError, match=r"cannot be kept .* rename it, or pass --no-keep"):
        sleb.apply(plan_of(source, 1), source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]
    sleb.apply(plan_of(source, 1), source, tmp_path / "out", keep=False)
