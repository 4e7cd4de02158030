"""`sleb apply` of a plan that has a repair: the repaired cut, or a word about what it lacks."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import sleb
import zoo
from cli_tools import refused, run, tree
from gguf_tools import plan_for, readable, write_tiny  # noqa: F401 (a fixture)
from rollback_tools import any_repair, files, repaired_cut, small
from sleb.core.errors import InputError
from sleb.core.plan import Plan

CPU = {"dtype": "float32", "device": "cpu"}


@pytest.fixture
def source(tmp_path):
    """A small model; in out/ its repaired cut, in plain/ the same without the repair."""
    source = small(tmp_path / "m", shard="60KB")
    plan, _ = repaired_cut(source, tmp_path / "out", 3, 4)
    sleb.apply(plan.model_copy(update={"repair": None}), source, tmp_path / "plain")
    return source


def test_applying_the_plan_of_a_prune_writes_what_prune_wrote(learned, tmp_path):
    text = [str(learned / "text.txt")]
    done = sleb.prune(
        learned / "model", tmp_path / "out", remove=2, text=text, length=32, windows=8, **CPU
    )
    assert done.plan.repair, "nothing was repaired, so nothing is shown"
    sleb.apply(tmp_path / "out" / "plan.json", learned / "model", tmp_path / "again")
    own = files(tmp_path / "out")
    del own["run.json"]
    assert files(tmp_path / "again") == own


def test_the_repair_is_found_beside_the_plan_or_where_one_says(source, tmp_path, capsys):
    for i, (plan, more) in enumerate([("out", ()), ("moved", ("--repaired", tmp_path / "out"))]):
        (tmp_path / plan).mkdir(exist_ok=True)
        if plan == "moved":
            shutil.copy(tmp_path / "out/plan.json", tmp_path / plan)
        ran = run(
            capsys, "apply", tmp_path / plan / "plan.json", source, "-o", tmp_path / str(i), *more
        )
        assert ran.code == 0, ran.err
        assert files(tmp_path / str(i)) == files(tmp_path / "out")


def test_the_folder_of_the_plan_can_be_replaced_by_the_cut(source, tmp_path):
    before = files(tmp_path / "out")
    sleb.apply(tmp_path / "out/plan.json", source, tmp_path / "out", force=True)
    assert files(tmp_path / "out") == before


def lose_a_tensor(out):
    name = "model.layers.3.mlp.down_proj.weight"
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    rest = {k: v for k, v in load_file(out / weights[name]).items() if k != name}
    save_file(rest, out / weights.pop(name), metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def change_a_tensor(out):
    name = "model.layers.3.mlp.down_proj.weight"
    shard = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(out / shard)
    save_file({**tensors, name: tensors[name] + 1}, out / shard, metadata={"format": "pt"})


def lose_the_checkpoint(out):
    plan = (out / "plan.json").read_text()
    shutil.rmtree(out)
    out.mkdir()
    (out / "plan.json").write_text(plan)


@pytest.mark.parametrize("harm", [lose_a_tensor, change_a_tensor, lose_the_checkpoint])
def test_without_the_right_tensors_nothing_is_written(source, tmp_path, capsys, harm):
    harm(tmp_path / "out")
    before = tree(tmp_path)
    said = refused(capsys, 2, "apply", tmp_path / "out/plan.json", source, "-o", tmp_path / "again")
    assert all(way in said for way in ("--repaired", "--repair ", "--no-repair"))
    assert tree(tmp_path) == before
    plain = ("apply", tmp_path / "out/plan.json", source, "-o", tmp_path / "again", "--no-repair")
    assert run(capsys, *plain).code == 0
    assert files(tmp_path / "again") == files(tmp_path / "plain")


def test_a_repair_is_of_one_depth(source, tmp_path, capsys):
    before = tree(tmp_path)
    asked = ("apply", tmp_path / "out/plan.json", source, "-o", tmp_path / "less", "--depth", 1)
    for more in ((), ("--repaired", tmp_path / "out")):
        said = refused(capsys, 2, *asked, *more)
        assert all(way in said for way in ("--repair ", "--no-repair"))
        assert tree(tmp_path) == before
    assert run(capsys, *asked, "--no-repair").code == 0
    assert Plan.load(tmp_path / "less/plan.json").order == (3,)
    whole = ("apply", tmp_path / "out/plan.json", source, "-o", tmp_path / "whole", "--depth", 2)
    assert run(capsys, *whole).code == 0
    assert files(tmp_path / "whole") == files(tmp_path / "out")


def test_what_cannot_be_meant_is_refused(source, tmp_path):
    plan = Plan.load(tmp_path / "out/plan.json")
    for given, options in [
        (plan, {}),  # no file, so no folder
        (tmp_path / "plain/plan.json", {"repaired": tmp_path / "out"}),
        (plan, {"repair": False, "repaired": tmp_path / "out"}),
    ]:
        with pytest.raises(InputError):
            sleb.apply(given, source, tmp_path / "no", **options)
        assert not (tmp_path / "no").exists()
    sleb.apply(plan, source, tmp_path / "yes", repaired=tmp_path / "out")
    assert files(tmp_path / "yes") == files(tmp_path / "out")


@pytest.mark.usefixtures("readable")
def test_a_gguf_file_gets_the_repair_too(tmp_path):
    model = write_tiny(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.F32)
    dense = sleb.load(model, **CPU)
    repair = any_repair(dense.source.path, (3,), "model.layers.4.mlp.down_proj.weight")
    folder = sleb.apply(plan_for(dense, 3), model, tmp_path / "out", repair=repair)
    cut = sleb.apply(folder / "plan.json", model, tmp_path / "cut.gguf")
    plain = sleb.apply(folder / "plan.json", model, tmp_path / "plain.gguf", repair=False)

    def logits(path):
        with torch.no_grad():
            return sleb.load(path, **CPU).model(zoo.probe()).logits

    assert torch.allclose(logits(cut), logits(folder), atol=1e-5)
    assert not torch.allclose(logits(plain), logits(folder), atol=1e-2)
    assert Plan.load(tmp_path / "cut.plan.json").repair == repair.record
    lonely = tmp_path / "cut.plan.json"  # the cut's own plan has the hashes, the file other bytes
    with pytest.raises(InputError, match="--no-repair"):
        sleb.apply(lonely, model, tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()
