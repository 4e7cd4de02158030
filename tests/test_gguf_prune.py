"""`sleb prune model.gguf -o smaller.gguf`: one command from a file to a repaired smaller one."""

import json
import re
from pathlib import Path

import gguf
import pytest

import sleb
from cli_tools import refused, run, tree
from gguf_tools import readable, write_tiny  # noqa: F401 (a fixture)
from sleb.calibration.split import CalibrationSplit
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import VerificationFailed
from sleb.core.units import block_of
from sleb.record import RunRecord
from sleb.surgery import gguf_prune

pytestmark = pytest.mark.usefixtures("readable")
CPU = {"dtype": "float32", "device": "cpu"}
SMALL = {"windows": 4, "length": 16, "heldout": 6, "repair_tokens": 600}
WORDS = [w for k, v in {**SMALL, **CPU}.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    return tmp_path


def test_what_is_measured_is_what_the_file_computes(here, capsys):
    before = Path("m.gguf").read_bytes()
    ran = run(capsys, "prune", "m.gguf", "--remove", 2, "-o", "s.gguf", *WORDS)
    assert ran.code == 0, ran.err
    assert Path("m.gguf").read_bytes() == before
    assert {p.name for p in here.iterdir() if p.is_file()} == {
        "m.gguf", "s.gguf", "s.plan.json", "s.run.json",
    }  # fmt: skip
    record, plan = RunRecord.load("s.gguf"), sleb.Plan.load("s.plan.json")
    assert record.nbytes == (len(before), Path("s.gguf").stat().st_size)
    assert record.removed == plan.removed
    assert {check.key for check in record.verification.checks} >= {"blocks", "weights-but-repaired"}

    assert record.repair.status == "repaired"
    assert len(record.requantized) == len(plan.repair.tensors) > 0
    for tensor in record.requantized:
        assert tensor.name.split(".")[2] in ran.out
        assert (tensor.was, tensor.type) == ("Q8_0", "Q8_0")

    dense, cut = sleb.load("m.gguf", **CPU), sleb.load("s.gguf", **CPU)
    planned = sleb.load("m.gguf", plan="s.plan.json", **CPU)
    windows = {name: SMALL[name] for name in ("windows", "length", "heldout")}
    heldout = CalibrationSplit.of(dense.tokenizer, (), seed=0, **windows).heldout
    for model, stated in (
        (dense, record.evaluation.perplexity),
        (cut, record.evaluation.pruned_perplexity),
        (planned, record.evaluation.pruned_perplexity),
    ):
        found = sleb.evaluate(model, heldout).perplexity.value
        assert found == pytest.approx(stated.value, rel=1e-6)
    text = Path("held.txt")
    text.write_text("the block of a model passes its input through " * 20)
    own = {"text": [str(text)], "windows": 4, "length": 16, **CPU}
    both = sleb.evaluate("m.gguf", plan="s.plan.json", **own)
    assert both.pruned_perplexity.value == pytest.approx(
        sleb.evaluate("s.gguf", **own).perplexity.value, rel=1e-6
    )
    assert run(capsys, "report", "s.gguf", "-o", "r.html").code == 0


def flipped(name: str) -> None:
    """Change one bit of a tensor of s.gguf."""
    raw, info = bytearray(Path("s.gguf").read_bytes()), GGUFFile.open("s.gguf").tensors[name]
    raw[info.start + 5] ^= 1
    Path("s.gguf").write_bytes(raw)


def test_a_file_is_verified_against_the_one_that_it_was_cut_from(here, capsys):
    assert run(capsys, "prune", "m.gguf", "--remove", 2, "-o", "s.gguf", *WORDS).code == 0
    record, whole = RunRecord.load("s.gguf"), Path("s.gguf").read_bytes()
    Path("limits.toml").write_text("perplexity.max_ratio = 1000.0\nsize.max_mb = 0.01\n")
    asked = ["verify", "s.gguf", "--model", "m.gguf"]
    assert run(capsys, *asked).code == 0
    assert run(capsys, *asked, "--gate", "limits.toml").code == 3  # the size
    gate = RunRecord.load("s.gguf").gate
    assert [row.verdict for row in gate.rows] == ["kept", "not-kept"]

    changed = record.requantized[0].name
    block = int(changed.split(".")[1]) - sum(b < int(changed.split(".")[1]) for b in record.removed)
    for name, check in (
        (f"blk.{block}.{changed.split('.', 2)[2]}", "repaired-tensors"),
        ("token_embd.weight", "weights-but-repaired"),
    ):
        flipped(name)
        found = sleb.verify("s.gguf", model="m.gguf")
        assert [one.key for one in found.checks if not one.passed] == [check]
        Path("s.gguf").write_bytes(whole)

    plan = Path("s.plan.json").read_text()
    assert run(capsys, "apply", "s.plan.json", "m.gguf", "-o", "p.gguf", "--no-repair").code == 0
    Path("p.plan.json").write_text(plan)
    assert [c.key for c in sleb.verify("p.gguf", model="m.gguf").checks if not c.passed] == [
        "repaired-tensors"
    ]
    write_tiny(here / "other.gguf", blocks=9)
    for words, noun in [
        (["--model", "other.gguf"], "s.gguf was not cut from other.gguf"),
        (["--model", "m.gguf", "--recorded"], "leave it out"),
        (["--model", "elsewhere"], "run it: --runtime llama-cpp"),
    ]:
        assert noun in refused(capsys, 2, "verify", "s.gguf", *words)
    for words, noun in [
        (["apply", "s.plan.json", "m.gguf", "-o", "c.gguf"], "holds the repaired tensors rounded"),
        (["restore", "s.gguf", "-o", "back"], "unchanged, so go back to that"),
        (["compare", "m.gguf", "s.gguf", "--prompts", "p.txt"], "of folders"),
    ]:
        Path("p.txt").write_text("what is it\n")
        assert noun in refused(capsys, 2, *words)


def test_a_size_is_the_files(here):
    whole = Path("m.gguf").stat().st_size
    found = sleb.prune("m.gguf", "s.gguf", size=int(0.8 * whole), **SMALL, **CPU, repair=False)
    assert found.plan.target.reached <= 0.8 * whole
    assert found.path.stat().st_size == pytest.approx(found.plan.target.reached, rel=0.02)


def test_what_cannot_be_is_said_first_and_leaves_nothing(here, capsys, tiny_dir):
    write_tiny(here / "odd.gguf", "bert")
    Path("there.run.json").write_text("{}")
    before = tree(here)
    for words, code, noun in [
        (f"{tiny_dir} -o s.gguf", 2, "convert_hf_to_gguf"),
        ("m.gguf -o m.gguf", 2, "m.gguf exists"),
        ("m.gguf -o there.gguf", 2, "there.run.json exists"),
        ("m.gguf -o s.gguf --heal", 2, "--heal"),
        ("m.gguf -o s.gguf --quantize int8", 2, "--quantize"),
        ("odd.gguf -o s.gguf", 4, "bert"),
    ]:
        assert noun in refused(capsys, code, "prune", *words.split(), "--remove", 2, *WORDS)
        assert tree(here) == before
    said = refused(capsys, 2, "prune", "m.gguf", "-o", "folder", "--size", "50KB", *WORDS)
    assert "-o folder.gguf" in said
    assert tree(here) == before


def test_a_file_that_is_not_the_cut_does_not_appear(here, monkeypatch):
    whole = gguf_prune.cut_gguf

    def spoilt(*args, **how):
        done = whole(*args, **how)
        raw = bytearray(done.out.read_bytes())
        raw[-20] ^= 1
        done.out.write_bytes(raw)
        return done

    monkeypatch.setattr(gguf_prune, "cut_gguf", spoilt)
    with pytest.raises(VerificationFailed, match="weights"):
        sleb.prune("m.gguf", "s.gguf", remove=2, **SMALL, **CPU, repair=False)
    left = {p.name for p in here.iterdir() if p.is_file()}
    assert left == {"m.gguf", "s.gguf.journal"}
    assert json.loads(Path("s.gguf.journal").read_text().splitlines()[0])


def test_attention_alone_goes_from_a_file_to_a_file_of_another_architecture(here, capsys):
    ran = run(
        capsys, "prune", "m.gguf", "--unit", "attention", "--remove", 2, "-o", "s.gguf", *WORDS
    )
    assert ran.code == 0, ran.err
    plan, written = sleb.Plan.load("s.plan.json"), GGUFFile.open("s.gguf")
    assert len(plan.parts) == 2
    assert written.value("general.architecture") == "deci"
    gone = [i for i, n in enumerate(written.value("deci.attention.head_count")) if not n]
    assert gone == [block_of(unit) for unit in plan.removed]
    assert RunRecord.load("s.gguf").removed == plan.removed


def test_sizes_of_a_folder_from_a_file_are_of_one_kind(here, capsys):
    """A file of few bits, beside the folder of 16 that was made from it, is no larger result."""
    words = ["--remove", 2, "--curve", "--no-repair", *WORDS]
    ran = run(capsys, "prune", "m.gguf", "-o", "s", *words)
    assert ran.code == 0, ran.err
    record = RunRecord.load("s")
    assert record.file_nbytes == Path("m.gguf").stat().st_size
    ratio = record.nbytes[1] / record.nbytes[0]
    assert ratio == pytest.approx(record.parameters[1] / record.parameters[0])
    assert re.search(r"\nweights +[\d.]+.[kM]B as \.gguf +[\d.]+.[kM]B in 16 bits", ran.out)
    curve = sleb.Plan.load("s/plan.json").curve.points
    assert [p.nbytes for p in curve if p.depth == 2] == [record.nbytes[1]]


def test_a_plan_of_parts_of_a_file_knows_the_size_of_that(here, capsys):
    words = ["--unit", "attention", "--remove", 2, "--no-repair", *WORDS]
    ran = run(capsys, "prune", "m.gguf", "-o", "s", *words)
    assert ran.code == 0, ran.err
    assert RunRecord.load("s").file_nbytes == Path("m.gguf").stat().st_size
    assert re.search(r"\nweights +[\d.]+.[kM]B as \.gguf +[\d.]+.[kM]B in 16 bits", ran.out)


def test_what_a_cut_of_a_file_is_taken_back_to_is_called_a_folder(here, capsys):
    words = ["--remove", 2, "--no-repair", "-o", "s", *WORDS]
    assert run(capsys, "prune", "m.gguf", *words).code == 0
    card = Path("s/README.md").read_text()
    assert "does not rebuild the .gguf file" in " ".join(card.split())
    ran = run(capsys, "restore", "s", "-o", "back")
    assert "folder of 16-bit weights" in " ".join(ran.out.split())
    assert run(capsys, "restore", "s", "-o", "less", "--depth", 1).code == 0
    assert "does not rebuild the .gguf" in " ".join(Path("less/README.md").read_text().split())
