"""The gates where models do not fit in memory: the same verdicts, with blocks read as they run."""

import shutil

import pytest
import torch

import sleb
from conftest import byte_tokenizer
from plan_tools import edit_config, plan_of
from sleb.models.stack import BlockStack
from sleb.surgery import verification
from verification_tools import (
    GENERATION,
    LOGITS,
    ORDER,
    RELOAD,
    WEIGHTS,
    edit_tensors,
    failed,
    measured,
    without_sums,
)
from zoo import tiny


@pytest.fixture(scope="module")
def plan(tiny_dir):
    return plan_of(tiny_dir, 3, 1)


@pytest.fixture
def out(tiny_dir, plan, tmp_path):
    return without_sums(sleb.apply(plan, tiny_dir, tmp_path / "out"))


@pytest.fixture
def streams(monkeypatch):
    """For each model that was run, whether its blocks were in memory."""
    seen = []
    real = verification._logits

    def logits(model, ids, context=None):
        seen.append(BlockStack(model).streamed)
        return real(model, ids, context)

    monkeypatch.setattr(verification, "_logits", logits)
    return seen


def check(out, model, plan, **options):
    return sleb.verify(out, model=model, plan=plan, stream=True, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_a_right_checkpoint_passes_and_blocks_stay_in_its_files(family, tmp_path, streams):
    model, _ = tiny(family)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    found = check(
        sleb.apply(plan_of(folder, 1), folder, tmp_path / "out"), folder, plan_of(folder, 1)
    )
    assert failed(found) == []
    assert [c.name for c in found.checks][1:] == ORDER
    assert measured(found, GENERATION) == "2 equal tokens"
    assert len(streams) >= 2
    assert all(streams)


def test_what_is_wrong_is_named(tiny_dir, plan, out, tmp_path):
    wrong = sleb.apply(plan_of(tiny_dir, 3, 2), tiny_dir, tmp_path / "wrong")
    assert failed(check(wrong, tiny_dir, plan)) == [WEIGHTS, LOGITS]
    untouched = shutil.copytree(out, tmp_path / "untouched")

    def nudge(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1

    edit_tensors(out, nudge)
    found = check(out, tiny_dir, plan)
    assert failed(found) == [WEIGHTS, LOGITS]
    assert measured(found, WEIGHTS) == (
        "1 of 39 tensors differ, for example model.layers.2.mlp.up_proj.weight"
    )
    edit_tensors(out, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    assert failed(check(out, tiny_dir, plan)) == [RELOAD]
    edit_config(untouched, hidden_act="relu")
    assert LOGITS in failed(check(untouched, tiny_dir, plan))


@pytest.mark.slow
def test_repaired_tensors_are_the_plans(learned, tmp_path):
    options = {"remove": 2, "windows": 6, "length": 32, "device": "cpu", "dtype": "float32"}
    text = [str(learned / "text.txt")]
    done = sleb.prune(learned / "model", tmp_path / "out", text=text, repair=True, **options)
    count = len(done.plan.repair.tensors)
    found = check(tmp_path / "out", learned / "model", done.plan)
    assert failed(found) == []
    name = f"{WEIGHTS}, but for the repaired"
    assert measured(found, name).endswith(f"{count} are the plan's")
    without_sums(tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda t: [x.__iadd__(1) for n, x in t.items() if "down" in n])
    found = failed(check(tmp_path / "out", learned / "model", done.plan))
    assert {"repaired tensors", name} <= set(found)


def test_it_is_done_where_a_model_does_not_fit(tiny_dir, plan, out, streams, monkeypatch):
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == []
    assert not any(streams)
    size = sum(p.numel() for p in sleb.load(tiny_dir).model.parameters())

    class Memory:
        available = 1.1 * size * torch.float32.itemsize

    monkeypatch.setattr(verification.psutil, "virtual_memory", Memory)
    streams.clear()
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == []
    assert all(streams)
    streams.clear()
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan, dtype="bfloat16")) == []  # half of it
    assert not any(streams)


def test_a_streamed_cut_is_verified_streamed(learned, tmp_path, streams, capsys):
    from sleb.cli.main import main

    rest = ["--windows", "6", "--length", "32", "--text", str(learned / "text.txt")]
    prune = ["prune", str(learned / "model"), "--remove", "1", "--stream", "--no-repair"]
    assert main([*prune, *rest, "-o", str(tmp_path / "out")]) == 0
    assert all(streams)
    streams.clear()
    again = ["verify", str(tmp_path / "out"), "--model", str(learned / "model"), "--stream"]
    assert main(again) == 0
    assert len(streams) >= 2
    assert all(streams)
    capsys.readouterr()
