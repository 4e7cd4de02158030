"""Every mistake ends in one line that says what to do, the documented code, and no half output."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_tools import refused, run, tree
from conftest import byte_tokenizer
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.plan import MAX_BYTES
from sleb.models.stack import BlockStack

SMALL = ["--windows", "4", "--length", "16", "--dtype", "float32", "--device", "cpu"]
EVERY = [
    "inspect {}",
    "similarity {}",
    "search {} --remove 2 -o new.json",
    "apply plan.json {} -o out",
    "verify MODEL --model {} --plan plan.json",
    "eval {}",
    "prune {} --remove 2 -o out",
]
every_verb = pytest.mark.parametrize("verb", EVERY)


@pytest.fixture
def copy(tiny_dir, place) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(tiny_dir, place / "copy"))


def both(capsys, code: int, command: str) -> str:
    """A command refused as text and as JSON, with the same line and without a trace."""
    before = tree(Path())
    said = refused(capsys, code, *command.split())
    assert refused(capsys, code, *command.split(), "--json") == said
    assert tree(Path()) == before
    return said


MISTAKES = {  # the nouns that matter of what is said
    "verfy MODEL": "verfy.*'verify'.*sleb --help",
    "inspect": "MODEL.*sleb inspect --help",
    "inspect MODEL more": "more.*sleb inspect --help",
    "search MODEL -o new.json": "no target.*--remove",
    "search MODEL --remove 2 --size 1MB -o new.json": "--remove and --size are two targets",
    "prune MODEL --remove 2": "--out",
    "search MODEL --remove 0.2 -o new.json": "0.2.*20%?",
    "export plan.json --as mergkit": "form 'mergkit'.*'mergekit'",
    "report MODEL --lang jp": "lang 'jp'.*'ja'",
    "search MODEL --remove 2 --metric answers --prompts none -o p": "--metric answers needs prompts"
    ".*leave out --prompts none",
    "search MODEL --keep-answers 0.9 --prompts none -o p": "--keep-answers needs prompts",
    "search MODEL --keep-answers 95% -o p": "--keep-answers 95% is not a share of tokens: 0.95?",
    "search MODEL --keep-answers most -o p": "--keep-answers most.*0.95",
    "search MODEL --keep-answers 1.5 -o p": "--keep-answers 1.5.*below 1",
    "run sleb.toml --set search": "no file at sleb.toml",
    "search MODEL --remove": "--remove.*requires",
    "search MODEL --remov 3": "--remov.*--remove.*sleb search --help",
    "eval MODEL --windows many": "--windows.*integer",
    "eval MODEL --windows 0": "--windows.*1",
    "eval MODEL --length 1": "--length.*2",
    "search MODEL --remove 2 --seed x": "--seed.*integer",
    "search MODEL --remove 2 --unit blok -o p": "--unit': 'blok'.*'attention'",
    # found before the model is looked for
    "similarity ./nowhere --measure cosin": "measure 'cosin'.*'cosine'",
    "search ./nowhere --remove 2 --metric los -o p": "metric 'los'.*'loss'",
    "prune ./nowhere --remove 2 --metric los -o p": "metric 'los'.*'loss'",
    # plans and outputs
    "eval MODEL --depth 1": "--depth.*--plan",
    "eval MODEL --plan plan.json --depth 9": "--depth 9.*1..3",
    "apply plan.json MODEL -o out --depth 0": "--depth 0.*1..3",
    "verify MODEL --model MODEL --plan plan.json --dtype int3": "dtype 'int3'",
    "verify nothing --model MODEL": "nothing.*sleb apply",
    "verify MODEL --model MODEL": "no plan at MODEL/plan.json.*sleb search",
    "prune MODEL --remove 2 -o .": "-o '.'",
    "prune MODEL --remove 2 --force -o MODEL": "MODEL is a symbolic link",
    "prune MODEL --remove 2 --force -o docs": "docs holds no checkpoint",
    "search MODEL --remove 2 --force -o docs": "docs is a folder",
    "apply plan.json MODEL -o plan.json/out": "plan.json/out cannot be created",
    "demo --model nowhere.gguf": "no model at nowhere.gguf",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_commands_that_make_no_sense(place, capsys, command):
    Path("docs").mkdir()
    Path("docs/notes.txt").write_text("mine")
    before = tree(place)
    assert_says(refused(capsys, 2, *command.split()), MISTAKES[command])
    assert tree(place) == before


@pytest.mark.parametrize(
    ("options", "nouns"),
    [
        (["--max-prompts", "6"], "--max-prompts: 6 prompts are too few.*at least 12"),
        (["--prompts", "few.jsonl"], "--prompts few.jsonl: 3 prompts are too few.*at least 12"),
        (
            ["--prompts", "few.jsonl", "--max-prompts", "6"],
            "--prompts few.jsonl: 3 prompts are too few.*at least 12",
        ),
    ],
)
def test_too_few_prompts_are_refused_before_weights_are_read(place, capsys, options, nouns):
    (place / "bare").mkdir()
    shutil.copy("MODEL/config.json", "bare")  # of a model without any
    Path("few.jsonl").write_text('{"prompt": "Who?"}\n' * 3)
    command = ["bare", "--remove", "2", "-o", "out", *options]
    assert_says(refused(capsys, 2, "prune", *command), nouns)
    repair = ["apply", "plan.json", "bare", "--repair", "-o", "out", *options]
    assert_says(refused(capsys, 2, *repair), nouns)
    if "few.jsonl" not in options:
        said = refused(capsys, 2, "prune", *command, "--prompts", "none")
        assert "no weights" in said  # nothing is asked


def assert_says(said: str, nouns: str) -> None:
    at = 0
    for noun in nouns.split(".*"):
        assert noun in said[at:], said
        at = said.index(noun, at)


@pytest.mark.parametrize("verb", ["search MODEL -o new.json", "prune MODEL -o out"])
@pytest.mark.parametrize(
    ("options", "nouns"),
    [
        ("--remove 6", "--remove 6.*at most 4"),
        ("--remove 100%", "100%.*at most 4"),
        ("--remove 0", "--remove 0"),
        ("--remove half", "'half'"),
        ("--remove -1", "'-1'"),
        ("--remove 5", "5 of 4 candidates"),
        ("--remove 2 --protect x", "--protect 'x' in 'x' is not a block"),
        ("--remove 2 --protect 9", "--protect '9'.*0..5"),
        ("--remove 2 --dtype flot32", "'flot32'.*'float32'"),
        ("--remove 2 --device gpu", "--device 'gpu'"),
        ("--remove 2 --min-similarity high", "--min-similarity 'high'"),
        ("--remove 2 --text no.txt", "no.txt.*'short.txt'"),
        ("--remove 2 --text MODEL", "--text MODEL is a folder"),
        ("--remove 2 --text short.txt", "short.txt has 11 tokens.*256"),
    ],
)
def test_options_that_make_no_sense(place, capsys, verb, options, nouns):
    Path("short.txt").write_text("short text.")
    assert_says(both(capsys, 2, f"{verb} {options}"), nouns)


@every_verb
def test_a_model_that_is_not_there(place, capsys, verb):
    assert "'MODEL'" in both(capsys, 2, verb.format("./MODLE"))
    assert_says(both(capsys, 6, verb.format("MODLE")), "'MODEL'.*hub")


@every_verb
def test_a_model_that_is_not_one_or_damaged(copy, capsys, verb):
    shard = copy / "model.safetensors"
    raw = shard.read_bytes()
    for bad in (raw[:-100], raw[:20] + b"\xff" * 40 + raw[60:]):
        shard.write_bytes(bad)
        assert_says(both(capsys, 5, verb.format("copy")), "model.safetensors is corrupt")
    shard.rename(copy / "pytorch_model.bin")
    assert "pickled" in both(capsys, 2, verb.format("copy"))
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter" in both(capsys, 2, verb.format("copy"))
    (copy / "adapter_config.json").unlink()
    (copy / "config.json").unlink()
    assert "config.json" in both(capsys, 2, verb.format("copy"))
    Path("not.gguf").write_bytes(b"PK\x03\x04")
    if verb.split()[0] in ("inspect", "search", "prune"):
        assert "GGUF" in both(capsys, 5, verb.format("not.gguf"))


@pytest.mark.parametrize("verb", EVERY[1:])
def test_a_model_that_is_not_a_causal_language_model(place, capsys, verb):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained("t5")
    byte_tokenizer().save_pretrained("t5")
    said = both(capsys, 4, verb.format("t5"))
    assert "'t5'" in said
    assert run(capsys, "inspect", "t5").code == 4
    ran = run(capsys, "inspect", "t5", "--full", "--json")
    assert (ran.code, ran.json["supported"], ran.json["reason"]) == (4, False, said)
    assert f"no: {said}" in run(capsys, "inspect", "t5", "--full").out


@pytest.mark.parametrize(
    ("verb", "where"),
    [
        ("search {} --remove 2 -o p", "loss is nan with blocks [1].*window 0.*--dtype"),
        ("prune {} --remove 2 -o out", "copy cannot write text"),
        ("prune {} --remove 2 --no-repair -o out", "loss is nan with blocks [1]"),
        ("search {} --remove 2 --metric cosine -o p", "output of block 2 is NaN"),
        ("eval {}", "loss is nan with blocks [].*window 0.*--dtype"),
        ("similarity {}", "output of block 2 is NaN.*window 0.*--dtype"),
    ],
)
def test_a_model_with_a_nan(copy, capsys, verb, where):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert_says(refused(capsys, 5, *verb.format("copy").split(), *SMALL), where)
    left = {p.name for p in Path().iterdir()}
    assert left - {"p.journal", "out.journal"} == {"MODEL", "copy", "plan.json"}


@pytest.mark.parametrize(
    "verb",
    ["apply {} MODEL -o out", "verify MODEL --model MODEL --plan {}", "eval MODEL --plan {}"],
)
def test_plans_that_cannot_be_used(place, capsys, verb, tiny_plan):
    good = json.loads(tiny_plan.to_json())
    for text, nouns in [
        (None, "no plan at bad.json.*sleb search"),
        ("", "bad.json is not a valid plan.*JSON"),
        (tiny_plan.to_json()[:300], "not a valid plan.*JSON"),
        (json.dumps({**good, "order": "x"}), "not a valid plan: order"),
        (json.dumps({**good, "odd": 1}), "not a valid plan: odd"),
        (json.dumps({**good, "schema_version": 4}), "schema 4.*upgrade"),
        (" " * (MAX_BYTES + 1), "larger than 32 MiB"),
    ]:
        if text is not None:
            Path("bad.json").write_text(text)
        assert_says(both(capsys, 2, verb.format("bad.json")), nouns)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up(place, capsys, monkeypatch, existing):
    verb = ["prune", "MODEL", "--remove", "2", "--no-repair", "-o", "out", *SMALL]
    if existing:
        shutil.copytree("MODEL", "out")
        verb.append("--force")
    real = Checkpoint.chunks

    def chunks(self, name):
        half_written = any(place.glob(".out.part-*/model.safetensors"))
        if half_written and name == "model.norm.weight":
            full()
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "chunks", chunks)
    before = tree(place)
    assert f"disk full while writing {place}/out" in refused(capsys, 6, *verb)
    (place / "out.journal").unlink()  # a search is not lost for want of space
    assert tree(place) == before


def test_a_plan_that_cannot_be_written(place, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(capsys, 6, "search", "MODEL", "--remove", "2", *SMALL, "-o", "new.json")
        assert "disk full while writing new.json" in said
        assert not Path("new.json").exists()
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write anywhere
    for verb in ("search MODEL --remove 2 -o a/p.json", "prune MODEL --remove 2 -o a/out"):
        assert f"{place} is not writable" in both(capsys, 2, verb)


@pytest.mark.parametrize(
    ("error", "code", "nouns"),
    [
        (MemoryError(), 6, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 6, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied: /x"),
        (OSError(errno.EIO, "Input/output error"), 6, "Input/output error"),
        (OSError(errno.ENOSPC, "No space"), 6, "disk full"),
        (RuntimeError("a bug"), None, ""),  # which is not hidden
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_refuses(place, capsys, monkeypatch, error, code, nouns):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(BlockStack, "enter", fail)
    if code is None:
        with pytest.raises(RuntimeError, match="a bug"):
            run(capsys, "similarity", "MODEL", *SMALL)
    else:
        assert nouns in refused(capsys, code, "similarity", "MODEL", *SMALL)
