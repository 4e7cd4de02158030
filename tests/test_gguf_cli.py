"""`sleb apply` from GGUF to GGUF, as one types it."""

import hashlib

import gguf
import pytest

import sleb
from cli_tools import refused, run, tree
from gguf_tools import plan_for, plan_of, readable, write_tiny  # noqa: F401 (a fixture)
from sleb.core.plan import Plan

CPU = {"dtype": "float32", "device": "cpu"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a tiny GGUF file and a plan of another form of it."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "m.gguf")
    plan_of("llama", 8, 3, 5).save("plan.json")
    return tmp_path


def test_the_cut_and_what_it_says(here, capsys):
    digest = hashlib.sha256((here / "m.gguf").read_bytes()).hexdigest()
    asked = ["apply", "plan.json", "m.gguf", "-o", "cut.gguf", "--other-weights"]
    ran = run(capsys, *asked)
    assert ran.code == 0, ran.err
    assert "cut.gguf: 6 blocks; removed blocks 3, 5" in ran.out
    assert (
        "chosen, and their cost measured, on other weights of this model: measure this" in ran.out
    )
    assert "plan as used: cut.plan.json; next: llama-cli -m cut.gguf" in ran.out
    assert sorted(p.name for p in here.iterdir()) == [
        "cut.gguf",
        "cut.plan.json",
        "m.gguf",
        "plan.json",
    ]
    assert hashlib.sha256((here / "m.gguf").read_bytes()).hexdigest() == digest
    assert "cut.gguf exists; choose another -o" in refused(capsys, 2, *asked)
    ran = run(capsys, *asked, "--force", "--depth", "1", "--json")
    assert (ran.json["removed"], ran.json["blocks"], ran.json["other_weights"]) == ([3], 7, True)
    assert ran.json["nbytes"] == (here / "cut.gguf").stat().st_size
    assert gguf.GGUFReader("cut.gguf").fields["llama.block_count"].contents() == 7


def test_mistakes_are_one_line_and_leave_nothing(here, capsys, tiny_dir):
    (here / "bad.gguf").write_bytes((here / "m.gguf").read_bytes()[:2000])
    plan_of("llama", 8, 3).save("x.plan.json")
    before = tree(here)
    for words, code, noun in [
        (f"plan.json {tiny_dir} -o c.gguf", 2, "llama.cpp"),
        ("plan.json m.gguf -o c --other-weights", 2, "--other-weights is for GGUF"),
        ("plan.json m.gguf -o c.gguf --repaired r", 2, "records no repair"),
        ("plan.json m.gguf -o c.gguf --repair --repaired r", 2, "--repaired brings"),
        ("plan.json none.gguf -o c.gguf", 2, "no model at none.gguf"),
        ("plan.json m.gguf -o m.gguf --force", 2, "m.gguf is the model itself"),
        ("plan.json m.gguf -o c.gguf --depth 3", 2, "1..2"),
        ("plan.json bad.gguf -o c.gguf", 5, "bad.gguf is corrupt or truncated"),
        ("x.plan.json m.gguf -o x.gguf --other-weights --force", 2, "replace x.plan.json"),
    ]:
        assert noun in refused(capsys, code, "apply", *words.split())
        assert tree(here) == before


@pytest.mark.usefixtures("readable")
def test_a_repair_is_fitted_on_the_file_and_stored_in_it(here, capsys, text_file):
    dense = sleb.load("m.gguf", **CPU)
    plan_for(dense, 3).save("own.json")
    text = ["--text", text_file, "--length", 16, "--repair-tokens", 2000]
    ran = run(
        capsys, "apply", "own.json", "m.gguf", "-o", "c.gguf", "--repair", *text, "--device", "cpu"
    )
    assert ran.code == 0, ran.err
    record = Plan.load("c.plan.json").repair
    assert record
    assert record.removed == (3,)
    assert record.tensors, "nothing was fitted, so nothing is shown"
    assert "as Q4_1, as before" in ran.out
    assert "attn_output of" in ran.out
