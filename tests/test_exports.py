"""`sleb export`: a plan in the words of other tools, held against those tools where they are."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import sleb
from cli_tools import refused, run
from conftest import save_tiny
from plan_tools import plan_of
from rollback_tools import any_repair
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Plan
from sleb.formats.exports import FORMATS, export
from sleb.models.source import resolve
from zoo import tiny


@pytest.fixture(scope="module")
def six(tiny_dir, tmp_path_factory) -> Path:
    """A plan that removes blocks 3, 1 and 2, in this order, of the tiny model's six."""
    path = tmp_path_factory.mktemp("exports") / "plan.json"
    plan_of(tiny_dir, 3, 1, 2).save(path)
    return path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A model with a pattern over its blocks, and a plan for it."""
    folder = tmp_path_factory.mktemp("gemma")
    tiny("gemma3_text")[0].save_pretrained(folder / "model")
    plan_of(folder / "model", 3).save(folder / "plan.json")
    return folder


def test_mergekit_takes_the_runs_of_kept_blocks(six, tiny_dir):
    found = export(six, "mergekit", model=str(tiny_dir))
    assert yaml.safe_load(found.text) == {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": str(tiny_dir), "layer_range": [0, 1]}]},
            {"sources": [{"model": str(tiny_dir), "layer_range": [4, 6]}]},
        ],
    }
    assert found.notes == ()
    shallow = yaml.safe_load(export(six, "mergekit", model=str(tiny_dir), depth=1).text)
    ranges = [s["sources"][0]["layer_range"] for s in shallow["slices"]]
    assert ranges == [[0, 3], [4, 6]]


@pytest.mark.parametrize("name", ["a: b", "x+y", "at@1", 'it\'s "q"', "# no", "日本", "- [x]"])
def test_mergekit_gets_the_name_of_the_model_whatever_is_in_it(
    six, tiny_dir, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    Path(name).symlink_to(tiny_dir)
    written = yaml.safe_load(export(six, "mergekit", model=name).text)
    for part in written["slices"]:
        model = part["sources"][0]["model"]
        # mergekit splits a plain string at + (adapter) and @ (revision)
        assert model == ({"model": {"path": name}} if set("+@") & set(name) else name)


def test_mergekit_keeps_several_dtypes_by_naming_none(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path, {"format": "pt"})
    plan_of(tmp_path / "model", 2).save(tmp_path / "plan.json")
    found = export(tmp_path / "plan.json", "mergekit", model=str(tmp_path / "model"))
    assert "dtype" not in yaml.safe_load(found.text)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].char()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match="tensors of type I8"):
        export(tmp_path / "plan.json", "mergekit", model=str(tmp_path / "model"))


def test_llama_cpp_and_modelopt_get_their_arguments_and_a_warning(six, tiny_dir, gemma, capsys):
    ran = run(capsys, "export", six, "--as", "llama-cpp", "--model", tiny_dir)
    assert (ran.code, ran.out, ran.err) == (0, "--prune-layers 1,2,3\n", "")
    ran = run(capsys, "export", six, "--as", "llama-cpp")
    assert ran.out == "--prune-layers 1,2,3\n"
    assert "--model" in ran.err
    place = gemma / "plan.json"
    ran = run(capsys, "export", place, "--as", "llama-cpp", "--model", gemma / "model")
    assert ran.out == "--prune-layers 3\n"
    assert "would write a wrong gemma3_text model" in ran.err
    assert "`layer_types`" in ran.err
    ran = run(capsys, "export", six, "--as", "modelopt-list")  # which counts from one
    assert ran.out == "--layers-to-drop 2 3 4\n"
    assert "from 1" in ran.err
    ran = run(capsys, "export", six, "--as", "modelopt-list", "--depth", "1")
    assert ran.out == "--layers-to-drop 4\n"


def test_a_layer_map_leads_from_student_to_teacher(six):
    found = json.loads(export(six, "layer-map", model="some/model").text)
    assert found["student_to_teacher"] == [0, 4, 5]
    assert found["teacher_output"] == [3, 4, 5]  # behind block 0 the student is behind the gap
    assert found["gaps"] == [
        {"removed": [1, 2, 3], "student_block_before": 0, "student_block_behind": 1}
    ]
    assert found["teacher"]["blocks"] == 6
    assert found["student"] == {"blocks": 3}


def test_a_layer_map_of_the_ends_and_of_the_tensors(tiny_dir, tmp_path):
    plan = plan_of(tiny_dir, 0, 5, 2)
    plan.save(tmp_path / "plan.json")
    found = json.loads(export(tmp_path / "plan.json", "layer-map").text)
    assert found["gaps"] == [
        {"removed": [0], "student_block_before": None, "student_block_behind": 0},
        {"removed": [2], "student_block_before": 0, "student_block_behind": 1},
        {"removed": [5], "student_block_before": 2, "student_block_behind": None},
    ]
    assert found["teacher_output"] == [2, 3, 5]
    out = sleb.apply(plan, tiny_dir, tmp_path / "out")
    cut, dense = Checkpoint.open(out), Checkpoint.open(tiny_dir)
    for new, old in enumerate(found["student_to_teacher"]):
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
            ours, theirs = (f"model.layers.{i}.{part}" for i in (new, old))
            assert cut.digest(ours) == dense.digest(theirs)


def test_vllm_serves_the_checkpoint_that_the_plan_lies_in(tiny_dir, tiny_plan, tmp_path, capsys):
    out = sleb.apply(tiny_plan, tiny_dir, tmp_path / "out it's")
    plan = out / "plan.json"
    lines = export(plan, "vllm-args", model="some/dense").text.splitlines()
    pruned, draft = (shlex.split(line) for line in lines if not line.startswith("#"))
    args = ["--dtype", "float32", "--max-model-len", "256"]
    assert pruned == ["vllm", "serve", str(out), *args]
    assert draft[:3] == ["vllm", "serve", "some/dense"]
    assert draft[3:7] == args
    assert draft[7] == "--speculative-config"
    assert json.loads(draft[8])["model"] == str(out)
    assert json.loads(draft[8])["method"] == "draft_model"
    alone = export(plan, "vllm-args")
    assert alone.text.count("vllm serve") == 1
    assert "--model" in alone.notes[0]
    with pytest.raises(InputError, match="--depth makes another checkpoint"):
        export(plan, "vllm-args", depth=1)


def test_a_plan_in_memory_is_exported_as_its_file(six):
    plan = Plan.load(six)
    assert export(plan, "layer-map") == export(six, "layer-map")
    with pytest.raises(InputError, match=r"give the plan inside it"):
        export(plan, "vllm-args")


def test_a_repair_is_not_said_to_be_part_of_it(tmp_path, tiny_dir):
    repair = any_repair(tiny_dir, (3,), "model.layers.4.mlp.down_proj.weight").record
    plan_of(tiny_dir, 3).model_copy(update={"repair": repair}).save(tmp_path / "plan.json")
    for form in ("mergekit", "llama-cpp", "modelopt-list"):
        notes = export(tmp_path / "plan.json", form, model=str(tiny_dir)).notes
        assert any("repair (1 matrices) is not part of this" in note for note in notes)


def test_a_file_is_written_whole_and_not_over_another(six, tiny_dir, tmp_path, capsys):
    out = tmp_path / "sub" / "merge.yml"
    words = ["export", six, "--as", "mergekit", "--model", tiny_dir, "-o", out]
    assert (run(capsys, *words).code, run(capsys, *words, "--force").code) == (0, 0)
    assert out.read_text() == export(six, "mergekit", model=str(tiny_dir)).text
    assert "exists" in refused(capsys, 2, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--as", "mergkit"], "'mergkit' (did you mean 'mergekit'?)"),
        (["--as", "mergekit"], "--model"),
        (["--as", "mergekit", "--model", "nowhere/"], "nowhere/"),
        (["--as", "vllm-args"], "vllm-args are of a checkpoint"),
        (["--as", "layer-map", "--depth", "9"], "--depth 9 is outside this plan's 1..3"),
    ],
)
def test_mistakes(six, capsys, words, said):
    assert said in refused(capsys, 2, "export", six, *words)


def test_plans_that_do_not_fit(gemma, tiny_dir, tmp_path):
    with pytest.raises(UnsupportedModel, match="`layer_types`"):
        export(gemma / "plan.json", "mergekit", model=str(gemma / "model"))
    with pytest.raises(InputError, match=r"a gemma3_text of 8 blocks, and .* is a llama of 6"):
        export(gemma / "plan.json", "mergekit", model=str(tiny_dir))
    plan_of(tiny_dir).save(tmp_path / "plan.json")
    for form in FORMATS:
        with pytest.raises(InputError, match="removes no block"):
            export(tmp_path / "plan.json", form, model=str(tiny_dir))


@pytest.fixture
def python() -> str:
    """The interpreter that has mergekit."""
    found = os.environ.get("SLEB_TEST_MERGEKIT")
    return found or pytest.skip("SLEB_TEST_MERGEKIT is not set; `make test-mergekit` sets it")


def mergekit(python: str, config: str, folder: Path) -> Path:
    (folder / "merge.yml").write_text(config, encoding="utf-8")
    command = [python, "-m", "mergekit.scripts.run_yaml", folder / "merge.yml", folder / "theirs"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder / "theirs"


def equal_to_ours(python, source: Path, order: tuple[int, ...], n: int, folder: Path) -> int:
    """mergekit's result of a plan holds the tensors of `sleb apply`, and its depth; how many."""
    plan = plan_of(source, *order)
    plan.save(folder / "plan.json")
    written = export(folder / "plan.json", "mergekit", model=str(source))
    made = sleb.apply(plan, source, folder / "ours"), mergekit(python, written.text, folder)
    ours, theirs = map(Checkpoint.open, made)
    a, b = (
        {name: (i.dtype, i.shape, c.digest(name)) for name, i in c.tensors.items()}
        for c in (ours, theirs)
    )
    assert a == b
    # the rest of the config is as the version of transformers beside mergekit writes it
    depths = {c.config.get("num_hidden_layers", c.config.get("n_layer")) for c in (ours, theirs)}
    assert depths == {n - len(order)}
    return len(a)


FAMILIES = ["llama", "llama:tied", "mistral", "phi3", "gpt2", "stablelm", "starcoder2"]


@pytest.mark.mergekit
@pytest.mark.parametrize("family", FAMILIES)
def test_mergekit_makes_what_apply_makes(python, family, tmp_path):
    model, _ = tiny(family)
    if family in ("llama:tied", "mistral"):
        model = model.bfloat16()
    model.save_pretrained(tmp_path / "source")
    assert equal_to_ours(python, tmp_path / "source", (2, 5, 3, 0), 8, tmp_path) > 20


@pytest.mark.mergekit
@pytest.mark.real
def test_mergekit_makes_what_apply_makes_of_a_real_model(python, real_model, tmp_path):
    source = resolve(real_model).path
    assert equal_to_ours(python, source, (20, 21, 25), 30, tmp_path) == 27 * 9 + 2


def test_the_formats_are_those_of_the_help(capsys):
    said = "".join(run(capsys, "export", "--help").out.split())
    assert set(FORMATS) == set(re.search(r"--asFORM(.*?)\.", said)[1].split(","))
