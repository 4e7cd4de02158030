"""Every mistake ends in one line that says what to do, the documented code, and no half output."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_tools import refused, run, tree
from conftest import byte_tokenizer, save_tiny
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


# -- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("verfy MODEL", "No such command 'verfy'. Did you mean 'verify'? See: sleb --help"),
        ("qqqqqqqqqq", "No such command 'qqqqqqqqqq'. See: sleb --help"),
        ("inspect", "Missing argument 'MODEL'. See: sleb inspect --help"),
        (
            "search MODEL -o new.json",
            "no target: give one of --remove, --max-loss-increase, --speedup or --size, for "
            "example --remove 20%",
        ),
        (
            "search MODEL --remove 2 --size 1MB -o new.json",
            "--remove and --size are two targets: give one of --remove, --max-loss-increase, "
            "--speedup or --size",
        ),
        ("prune MODEL --remove 2", "Missing option '--out' / '-o'. See: sleb prune --help"),
        ("search MODEL --remove", "Option '--remove' requires an argument. See: sleb --help"),
    ],
)
def test_usage_errors(place, capsys, command, message):
    before = tree(place)
    assert refused(capsys, 2, *command.split()) == message
    assert tree(place) == before


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("search MODEL --remov 3", ["No such option: --remov", "--remove", "sleb search --help"]),
        ("eval MODEL --windows many", ["Invalid value for '--windows'", "integer"]),
        ("eval MODEL --windows 0", ["Invalid value for '--windows'", "1"]),
        ("eval MODEL --length 1", ["Invalid value for '--length'", "2"]),
        ("inspect MODEL more", ["Got unexpected extra argument", "(more)", "sleb inspect --help"]),
        ("search MODEL --remove 2 --seed x", ["Invalid value for '--seed'", "integer"]),
    ],
)
def test_usage_errors_that_the_library_words(place, capsys, command, parts):
    said = refused(capsys, 2, *command.split())
    assert all(part in said for part in parts), said


# -- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", EVERY)
def test_a_model_that_is_not_there(place, capsys, verb):
    said = both(capsys, 2, verb.format("./MODLE"))
    assert said == "no model at ./MODLE (did you mean 'MODEL'?); check the path"
    said = both(capsys, 6, verb.format("MODLE"))
    assert said.startswith("no folder named MODLE here (did you mean 'MODEL'?), and the hub canno")


@pytest.mark.parametrize("verb", EVERY)
def test_a_model_without_weights_that_sleb_reads(copy, capsys, verb):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    said = both(capsys, 2, verb.format("copy"))
    assert said.startswith(
        "copy has only pickled weights (.bin), which sleb does not open; convert"
    )
    (copy / "adapter_config.json").write_text("{}")
    said = both(capsys, 2, verb.format("copy"))
    assert said == "copy is an adapter (PEFT); merge it into its base model first"
    (copy / "adapter_config.json").unlink()
    (copy / "config.json").unlink()
    said = both(capsys, 2, verb.format("copy"))
    assert said == "copy has no config.json: not a Hugging Face checkpoint"


@pytest.mark.parametrize("verb", EVERY)
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_a_model_with_a_damaged_file(copy, capsys, verb, damage):
    shard = copy / "model.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-100] if damage == "truncated" else raw[:20] + b"\xff" * 40 + raw[60:])
    said = both(capsys, 5, verb.format("copy"))
    assert said.startswith("copy/model.safetensors is corrupt or truncated (")
    assert said.endswith("): fetch it again")


@pytest.mark.parametrize("verb", EVERY[1:])
def test_a_model_that_is_not_a_causal_language_model(place, capsys, verb):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained("t5")
    byte_tokenizer().save_pretrained("t5")
    said = both(capsys, 4, verb.format("t5"))
    assert said == "t5 is not a causal language model (model_type 't5')"
    ran = run(capsys, "inspect", "t5", "--json")
    assert (ran.code, ran.json["supported"], ran.json["reason"]) == (4, False, said)
    assert f"no: {said}" in run(capsys, "inspect", "t5").out


@pytest.mark.parametrize(
    "verb", ["inspect {}", "search {} --remove 2 -o p", "prune {} --remove 2 -o o"]
)
def test_a_gguf_file_that_is_none(place, capsys, monkeypatch, verb):
    monkeypatch.setenv("SLEB_CACHE", str(place / "cache"))
    Path("not.gguf").write_bytes(b"PK\x03\x04")
    said = both(capsys, 5, verb.format("not.gguf"))
    assert said == "not.gguf does not start as a GGUF file: fetch it again"
    Path("cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    said = both(capsys, 5, verb.format("cut.gguf"))
    assert said.startswith("cut.gguf is corrupt or truncated")


@pytest.mark.parametrize(
    ("verb", "where"),
    [
        ("search {} --remove 2 -o p", "loss is nan with blocks [1] removed, on window 0: try --dt"),
        ("prune {} --remove 2 -o out", "copy cannot write text to fit on, since its scores of the"),
        (
            "prune {} --remove 2 --no-repair -o out",
            "loss is nan with blocks [1] removed, on window",
        ),
        (
            "search {} --remove 2 --metric cosine -o p",
            "the output of block 2 is NaN or infinite on",
        ),
        ("eval {}", "loss is nan with blocks [] removed, on window 0: try --dtype float32"),
        (
            "similarity {}",
            "the output of block 2 is NaN or infinite on window 0: try --dtype float32",
        ),
    ],
)
def test_a_model_with_a_nan(copy, capsys, verb, where):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    said = refused(capsys, 5, *verb.format("copy").split(), *SMALL)
    assert said.startswith(where)
    left = {p.name for p in Path().iterdir()}
    assert left - {"p.journal", "out.journal"} == {"MODEL", "copy", "plan.json"}


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["search MODEL -o new.json", "prune MODEL -o out"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--remove 6", "--remove 6 is 6 of the model's 6 blocks; at most 5 can go"),
        ("--remove 100%", "--remove 100% is 6 of the model's 6 blocks; at most 5 can go"),
        ("--remove 0", "--remove 0 removes nothing; give at least 1"),
        ("--remove half", "--remove 'half' is neither a number of blocks nor a percentage"),
        ("--remove -1", "--remove '-1' is neither a number of blocks nor a percentage"),
        ("--remove 5", "cannot remove 5 of 4 candidates (6 less 2 protected); remove fewer, or"),
        ("--remove 2 --protect x", "'x' in 'x' is not a block; write for example 0,5-7,-1"),
        ("--remove 2 --protect 9", "'9' is outside the model's blocks 0..5"),
        ("--remove 2 --metric los", "unknown metric 'los' (did you mean 'loss'?); known: cosine,"),
        (
            "--remove 2 --dtype flot32",
            "unknown dtype 'flot32' (did you mean 'float32'?); known: auto",
        ),
        ("--remove 2 --device gpu", "--device 'gpu' is not a device; use cpu, cuda, cuda:1 or mps"),
        (
            "--remove 2 --min-similarity high",
            "--min-similarity 'high' is neither a number nor auto",
        ),
        ("--remove 2 --text no.txt", "no file no.txt (did you mean 'short.txt'?); give the path"),
        ("--remove 2 --text MODEL", "--text MODEL is a folder; name a file in it"),
        (
            "--remove 2 --text short.txt",
            "short.txt has 11 tokens, too short for one window of 256;",
        ),
    ],
)
def test_options_that_make_no_sense(place, capsys, verb, options, message):
    Path("short.txt").write_text("short text.")
    assert both(capsys, 2, f"{verb} {options}").startswith(message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "similarity ./nowhere --measure cosin",
            "unknown measure 'cosin' (did you mean 'cosine'?); kno",
        ),
        ("search ./nowhere --remove 2 --metric los -o p", "unknown metric 'los' (did you mean"),
        ("prune ./nowhere --remove 2 --metric los -o p", "unknown metric 'los' (did you mean"),
        ("eval MODEL --depth 1", "--depth is a depth of a plan; give the plan with --plan"),
        (
            "eval MODEL --plan plan.json --depth 9",
            "--depth 9 is outside this plan's 1..3; search aga",
        ),
        (
            "apply plan.json MODEL -o out --depth 0",
            "--depth 0 is outside this plan's 1..3; search ag",
        ),
        (
            "verify MODEL --model MODEL --plan plan.json --dtype int3",
            "unknown dtype 'int3'; known: a",
        ),
        (
            "verify nothing --model MODEL",
            "no checkpoint folder at nothing; make one with: sleb apply",
        ),
        (
            "verify MODEL --model MODEL",
            "no plan at MODEL/plan.json; make one with: sleb search MODEL",
        ),
        ("prune MODEL --remove 2 -o .", "-o '.' is not a name for something new; give one"),
        ("prune MODEL --remove 2 --force -o MODEL", "MODEL is a symbolic link to /"),
        (
            "prune MODEL --remove 2 --force -o docs",
            "docs holds no checkpoint, so --force does not re",
        ),
        (
            "search MODEL --remove 2 --force -o docs",
            "docs is a folder, not a file; choose another -o",
        ),
        ("apply plan.json MODEL -o plan.json/out", "plan.json/out cannot be created: "),
        ("demo --model nowhere.gguf", "no model at nowhere.gguf"),
    ],
)
def test_commands_that_make_no_sense(place, capsys, command, message):
    Path("docs").mkdir()
    Path("docs/notes.txt").write_text("mine")
    before = tree(place)
    assert refused(capsys, 2, *command.split()).startswith(message)
    assert tree(place) == before


# -- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    ["apply {} MODEL -o out", "verify MODEL --model MODEL --plan {}", "eval MODEL --plan {}"],
)
def test_plans_that_cannot_be_used(place, capsys, verb, tiny_plan):
    def said(text: str | None) -> str:
        if text is None:
            Path("bad.json").unlink(missing_ok=True)
        else:
            Path("bad.json").write_text(text)
        return both(capsys, 2, verb.format("bad.json"))

    good = json.loads(tiny_plan.to_json())
    assert said(None).startswith(
        "no plan at bad.json; make one with: sleb search MODEL -o bad.json"
    )
    assert said("").startswith("bad.json is not a valid plan: file: Invalid JSON")
    assert said(tiny_plan.to_json()[:300]).startswith(
        "bad.json is not a valid plan: file: Invalid J"
    )
    assert said(json.dumps({**good, "order": "x"})).startswith(
        "bad.json is not a valid plan: order: "
    )
    assert said(json.dumps({**good, "odd": 1})).startswith(
        "bad.json is not a valid plan: odd: Extra"
    )
    assert said(json.dumps({**good, "schema_version": 3})) == (
        "bad.json has plan schema 3, this sleb reads 1 to 2: upgrade sleb"
    )
    with open("bad.json", "r+b") as stream:
        stream.truncate(MAX_BYTES + 1)
    assert both(capsys, 2, verb.format("bad.json")) == "bad.json is larger than 32 MiB: not a plan"


@pytest.mark.parametrize(
    "verb",
    [
        "apply plan.json {} -o out",
        "verify {} --model {} --plan plan.json",
        "eval {} --plan plan.json",
    ],
)
def test_a_plan_of_another_model(place, capsys, verb):
    save_tiny(place / "other", seed=3)
    said = both(capsys, 2, verb.format("other", "other"))
    assert said.startswith("the plan was made for another model: weights_sha256 is ")
    assert said.endswith("… in other; search again on this model")


# -- the machine ---------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "verb", ["apply plan.json MODEL -o out", "prune MODEL --remove 2 --no-repair -o out"]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up(place, capsys, monkeypatch, verb, existing):
    if existing:
        shutil.copytree("MODEL", "out")
        verb += " --force"
    real = Checkpoint.chunks

    def chunks(self, name):
        half_written = any(place.glob(".out.part-*/model.safetensors"))
        if half_written and name == "model.norm.weight":
            full()
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "chunks", chunks)
    before = tree(place)
    options = SMALL if verb.startswith("prune") else []
    said = refused(capsys, 6, *verb.split(), *options)
    assert said == f"disk full while writing {place}/out; free some space and repeat the command"
    kept = place / "out.journal"  # a search is not lost for want of space
    assert kept.exists() == verb.startswith("prune")
    kept.unlink(missing_ok=True)
    assert tree(place) == before


def test_a_plan_that_does_not_fit_on_the_disk(place, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    said = refused(capsys, 6, "search", "MODEL", "--remove", "2", *SMALL, "-o", "new.json")
    assert said.startswith("disk full while writing new.json")
    assert not Path("new.json").exists()


def test_a_folder_that_cannot_be_written(place, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write anywhere
    for verb in ("search MODEL --remove 2 -o a/p.json", "prune MODEL --remove 2 -o a/out"):
        said = both(capsys, 2, verb)
        assert said.endswith(f" cannot be created: {place} is not writable")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 6, "out of memory; try fewer or shorter windows, or --dtype bfloat16"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            6,
            "out of memory; try fewer or s",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "out of memory; try fewer"),
        (
            PermissionError(13, "Permission denied", "/x"),
            2,
            "Permission denied: /x; check the path",
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            6,
            "Input/output error; the system refused, che",
        ),
        (OSError(errno.ENOSPC, "No space"), 6, "disk full; free some space and repeat the command"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_refuses(place, capsys, monkeypatch, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(BlockStack, "enter", fail)
    assert refused(capsys, code, "similarity", "MODEL", *SMALL).startswith(message)


def test_a_bug_is_not_hidden(place, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(BlockStack, "enter", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(capsys, "similarity", "MODEL", *SMALL)
