"""The verbs from the command line: what they print, write, and leave alone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from cli_tools import refused, run, tree
from sleb import config, pipeline
from sleb.cli.verbs import FORMS, VERBS
from sleb.core import display as progress
from sleb.core.errors import InputError
from sleb.core.finding import finding
from sleb.core.plan import Plan
from sleb.models import on_disk
from sleb.surgery.gates import Check

SMALL = ["--windows", "4", "--length", "16", "--dtype", "float32", "--device", "cpu"]
CARD = """---
license: apache-2.0
license_link: https://licence.invalid
language:
- en
base_model: someone/base
tags: [theirs]
---
# Their card
"""


@pytest.fixture
def place(tiny_dir, tmp_path, monkeypatch) -> Path:
    """An empty working folder with the tiny model's path in ``MODEL``, a link."""
    (tmp_path / "MODEL").symlink_to(tiny_dir)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_inspect_and_similarity(place, capsys):
    text = run(capsys, "inspect", "MODEL", "--full")
    assert (text.code, text.err) == (0, "")
    assert re.search(r"blocks +6 x LlamaDecoderLayer at model\.layers", text.out)
    assert re.search(r"20 % +2 .*1\.50x", text.out)
    found = run(capsys, "inspect", "MODEL", "--full", "--json").json
    assert (found["blocks"], found["supported"], found["model"]) == (6, True, "MODEL")
    quick = run(capsys, "inspect", "MODEL", "--json").json
    assert quick["supported"] is None
    assert {**quick, "supported": True, "block_class": found["block_class"]} == found
    assert found["parameters"] == 63072
    assert [s["blocks"] for s in found["savings"]] == [1, 2, 2]
    command = ["similarity", "MODEL", "--measure", "angular", *SMALL]
    text, found = run(capsys, *command), run(capsys, *command, "--json").json
    assert (text.code, text.err) == (0, "")
    assert "angular" in text.out
    assert len(found["pairs"]) == 7
    for i, block in enumerate(found["blocks"]):
        assert re.search(rf"^{i} +{block['mean']:.4f} ", text.out, re.MULTILINE)


def test_search_apply_verify_and_eval(place, capsys):
    text = run(capsys, "search", "MODEL", "--remove", "50%", *SMALL)
    assert (text.code, text.err) == (0, "")
    plan = Plan.load("plan.json")
    assert all(f"block {block}" in text.out for block in plan.order)
    assert "next: sleb apply plan.json MODEL -o OUT" in text.out
    assert names(place) == ["MODEL", "plan.json"]
    ran = run(capsys, "search", "MODEL", "--remove", "3", *SMALL, "-o", "deep/2.json", "--json")
    assert ran.json == json.loads(Path("plan.json").read_text())
    assert "deep/2.json" in ran.err
    assert Path("deep/2.json").read_text() == Path("plan.json").read_text()

    text = run(capsys, "apply", "plan.json", "MODEL", "-o", "out", "--depth", "2")
    assert (text.code, text.err) == (0, "")
    assert f"4 blocks; removed blocks {', '.join(map(str, plan.at_depth(2)))}\n" in text.out
    ran = run(capsys, "apply", "plan.json", "MODEL", "-o", "out3", "--json")
    assert ran.json == {"out": "out3", "removed": list(plan.removed), "blocks": 3}

    text = run(capsys, "verify", "out", "--model", "MODEL")  # OUT/plan.json says what was cut
    assert (text.code, text.err) == (0, "")
    assert len(re.findall(r"^pass ", text.out, re.MULTILINE)) == 8
    explicit = ["verify", "out", "--model", "MODEL", "--plan", "plan.json", "--depth", "2"]
    found = run(capsys, *explicit, "--json").json
    assert all(check["passed"] for check in found["checks"])
    assert found["removed"] == list(plan.at_depth(2))
    ran = run(capsys, "verify", "out3", "--model", "MODEL", "--depth", "2", "--json")
    assert ran.code == 3
    assert not all(check["passed"] for check in ran.json["checks"])
    assert "'blocks' (counted: blocks 3, expected 4)" in ran.err

    options = ["--plan", "plan.json", "--length", "32", "--windows", "8"]
    text, found = (run(capsys, "eval", "MODEL", *options, *json_) for json_ in ([], ["--json"]))
    assert text.code == 0
    assert text.err.startswith("default: the cut was made by this text, whose figures flatter it")
    other = ["--text", "other.txt", *options[:-1], "1"]
    Path("other.txt").write_text("What no block was chosen by. " * 40)
    assert run(capsys, "eval", "MODEL", *other).err == ""
    found = found.json
    assert (found["tokens"], found["removed"]) == (8 * 31, list(plan.removed))
    assert f"{found['perplexity_ratio']['value']:.3f} (" in text.out
    alone = run(capsys, "eval", "out3", "--length", "32", "--windows", "8", "--json").json
    assert alone["loss"]["value"] == pytest.approx(found["pruned_loss"]["value"], abs=2e-6)
    assert alone["removed"] == []


def test_prune_leaves_a_checkpoint_with_its_plan_record_and_card(tiny_dir, tmp_path, capsys):
    model = Path(shutil.copytree(tiny_dir, tmp_path / "a model [/it]"))  # looks like markup
    (model / "README.md").write_text(CARD)
    (model / "LICENSE").write_text("the licence")
    before = tree(model)
    out = tmp_path / "small er"
    arguments = ["prune", str(model), "--remove", "2", *SMALL, "--repair-tokens", "500"]
    arguments += ["-o", str(out)]
    text = run(capsys, *arguments)
    assert (text.code, text.err) == (0, "")
    plan = Plan.load(out / "plan.json")
    gates = 8 if plan.repair else 7
    assert f"{gates} of {gates} checks" in text.out
    assert "repair: " in text.out
    assert names(tmp_path) == ["a model [", "small er"]  # no journal, no staging folder
    added = {"plan.json", "run.json", "README.md", "SHA256SUMS", "rollback"}
    assert names(out) == sorted({p.name for p in model.iterdir()} | added)
    assert tree(model) == before

    record = json.loads((out / "run.json").read_text())
    assert record["command"] == shlex.join(["sleb", *arguments])
    assert record["removed"] == list(plan.removed)
    assert record["verification"]["checkpoint"] == str(out)
    assert [c["passed"] for c in record["verification"]["checks"]] == [True] * gates
    assert record["nbytes"][1] < record["nbytes"][0]
    assert ".part-" not in (out / "run.json").read_text()
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert card.data.license_link == "https://licence.invalid"
    assert card.data.base_model is None  # a folder is no name that others could look up
    assert card.data.tags == ["sleb", "pruned", "block-pruning"]
    published = shlex.join(
        ["sleb", *(Path(word).name if word[0] == "/" else word for word in arguments)]
    )
    assert f"\n```\n{published}\n```\n" in card.text
    assert str(tmp_path) not in card.text
    shown = run(capsys, *arguments, "--force", "--json")
    assert shown.code == 0
    again = json.loads((out / "run.json").read_text())
    assert shown.json == again
    assert again["evaluation"] == record["evaluation"]
    assert Plan.load(out / "plan.json") == plan


def test_prune_without_text_to_spare_says_that_quality_was_not_measured(place, text_file, capsys):
    text_file.write_text(text_file.read_text()[:64])
    arguments = ["--remove", "2", *SMALL, "--text", text_file, "-o", "out"]
    ran = run(capsys, "prune", "MODEL", *arguments, "--json")
    assert ran.json["evaluation"] is None
    assert "Quality was not measured: no text was left" in Path("out/README.md").read_text()


def test_a_gate_that_fails_leaves_no_checkpoint(place, capsys, monkeypatch):
    real = pipeline.verify

    def verify(*args, **kwargs):
        bad = Check(key="logits", passed=False, found=finding("gap", gap=1.0, limit=0.0))
        found = real(*args, **kwargs)
        return replace(found, checks=(*found.checks, bad))

    monkeypatch.setattr(pipeline, "verify", verify)
    options = ["--remove", "2", *SMALL, "--no-repair"]
    said = refused(capsys, 3, "prune", "MODEL", *options, "-o", "out")
    assert "'logits' (gap: gap 1, limit 0)" in said
    assert names(place) == ["MODEL", "out.journal"]  # the scores are kept for another try


@pytest.mark.parametrize("verb", ["search", "apply", "prune"])
def test_force_replaces_an_existing_output(place, capsys, verb, tiny_plan):
    tiny_plan.save("plan.json")
    shutil.copytree("MODEL", "out")
    Path("out/stale").write_text("from before")
    arguments = {
        "search": ["search", "MODEL", "--remove", "2", *SMALL, "-o", "plan.json"],
        "apply": ["apply", "plan.json", "MODEL", "-o", "out"],
        "prune": ["prune", "MODEL", "--remove", "2", *SMALL, "--no-repair", "-o", "out"],
    }[verb]
    output = arguments[-1]
    before = tree(place)
    said = refused(capsys, 2, *arguments)
    assert said == f"{output} exists; choose another -o, or pass --force to replace it"
    assert tree(place) == before
    assert run(capsys, *arguments, "--force").code == 0
    assert tree(place) != before
    assert Path("out/stale").exists() == (verb == "search")
    assert names(place) == ["MODEL", "out", "plan.json"]


def test_progress_goes_to_stderr_and_leaves_stdout_alone(place, capsys, monkeypatch):
    quiet = run(capsys, "similarity", "MODEL", *SMALL, "--json")
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.001)
    loud = run(capsys, "similarity", Path("MODEL").absolute(), *SMALL, "--json")
    assert loud.out == quiet.out.replace('"MODEL"', json.dumps(str(Path("MODEL").absolute())))
    assert quiet.err == ""
    assert re.search(r"^loading MODEL: done in \d+ s$", loud.err, re.MULTILINE)
    assert re.search(r"^measuring similarity: .*\d+ s gone", loud.err, re.MULTILINE)


def test_a_terminal_gets_bars_even_for_odd_names(place, capsys, monkeypatch):
    Path("M [").mkdir()
    os.rename("MODEL", "M [/x] :smile:")
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for verb, options in (("similarity", SMALL), ("inspect", []), ("eval", SMALL)):
        ran = run(capsys, verb, "M [/x] :smile:", *options)
        assert ran.code == 0, ran.err
        assert "M [/x] :smile:" in ran.out or verb != "inspect"
        assert "measuring similarity" in ran.err or verb != "similarity"


LIGHT = """
import sys, time
from sleb.cli.main import main
start = time.perf_counter()
codes = [main(line.split()) for line in sys.argv[1].splitlines()]
seconds = time.perf_counter() - start
print("REPORT", codes, "torch" in sys.modules, seconds < 3)
"""


def report(*lines: str) -> tuple[str, str]:
    """What these commands print; and their codes, if torch was loaded, and if it was soon."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, "\n".join(lines)], capture_output=True, text=True, check=True
    )
    text, _, found = done.stdout.rpartition("REPORT ")
    return text, found.strip()


@pytest.mark.slow
def test_help_has_an_example_and_does_not_load_torch(place):
    """The last line shows that the check can fail."""
    text, found = report("-h", *(f"{verb.name} --help" for verb in VERBS))
    assert found == f"{[0] * (1 + len(VERBS))} False True"
    text = " ".join(text.split())
    for verb in VERBS:
        assert f"Usage: sleb {verb.name} [OPTIONS]" in text
        assert f"Example: {verb.example}" in text
        assert verb.help.split(";")[0] in text
    assert not re.search(r"<\w*(str|list|int|float)\b", text)
    assert "Exit codes: 0 done; 1 a bug; 2 bad input;" in text
    assert text.count("Folder or .gguf file for the new checkpoint.") == 2  # prune and apply
    assert "Folders or .gguf files from sleb prune" in text
    assert report("inspect MODEL")[1] == "[0] False True"
    assert report("inspect MODEL --full")[1].startswith("[0] True")


@pytest.mark.slow
def test_mistakes_that_can_be_seen_without_torch_do_not_load_it(place):
    mistakes = [
        "serch x",
        "apply nothing.json MODEL -o out",
        "verify nothing --model MODEL",
        "prune MODEL --remove 2 --metric los -o out",
        "prune MODEL --remove 0.2 -o out",
        "prune MODEL --remove 0 -o out",
        "prune MODEL --remove 2 --quantize foo -o out",
        "prune MODEL --remove 2 -o .",
        "search ./nowhere --remove 2 -o p.json",
        "search MODEL --remove 2 --text nothing.txt -o p.json",
        "compare MODEL MODEL --prompts nothing.jsonl",
        "report MODEL",
        "prune MODEL --remove 6 -o out",
        "prune MODEL --remove 99% -o out",
        "search MODEL --remove 2 --protect 99 -o p.json",
        "prune MODEL --remove 2 --device gpu -o out",
        "prune MODEL --remove 2 --metric answers --prompts none -o out",
        "search MODEL --keep-answers 0.9 --prompts none -o p.json",
        "bench MODEL ./nofolder",
        "demo -o mine",
        "eval MODEL --task missing.jsonl",
        "verify MODEL --model MODEL --plan plan.json --gate missing.toml",
        "transfer MODEL --remove 2 --text default",
        "heal MODEL --model MODEL -o mine",
        "heal nofolder --model MODEL -o new",
        "compare MODEL MODEL --prompts prompts.jsonl --record nofolder",
        "compare MODEL nofolder --prompts prompts.jsonl",
        "restore nofolder -o new",
        "run sleb.toml --set search.remov=3",
        "run sleb.toml --set search.remove=99",
        "run sleb.toml --set search.device=gpu",
        "run sleb.toml --set text.more=nothing.txt",
    ]
    Path("sleb.toml").write_text(
        'model = "MODEL"\nout = "out"\n[text]\na = "default"\n[search]\nremove = 2\n'
    )
    Path("mine").mkdir()
    Path("prompts.jsonl").write_text('{"prompt": "Who?"}\n')
    assert report(*mistakes)[1] == f"{[2] * len(mistakes)} False True"


@pytest.mark.parametrize(
    ("built", "driver", "refused"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", True, True),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", False, True),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", True, False),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n", False, False),
    ],
)
def test_a_gpu_is_refused_early_where_torch_can_have_none(
    tmp_path, monkeypatch, built, driver, refused
):
    (tmp_path / "version.py").write_text(built)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(on_disk, "find_spec", lambda name: spec)
    monkeypatch.setattr(on_disk, "CDLL", lambda name: None if driver else os.stat(name))
    monkeypatch.setattr(on_disk, "LINUX", True)
    on_disk.check_device("cpu")
    with pytest.raises(InputError) if refused else nullcontext():
        on_disk.check_device("cuda:0")


def test_choices_of_the_command_line_are_what_is_registered():
    from sleb.formats.exports import FORMATS
    from sleb.formats.quantize import SCHEMES
    from sleb.models.load import DTYPES
    from sleb.selection.metrics import METRICS
    from sleb.selection.similarity import MEASURES
    from sleb.selection.strategies import STRATEGIES

    def choices(kind, name):
        return set(config.declared(kind, name)["choices"])

    assert choices(config.SearchConfig, "metric") == {*METRICS}
    assert choices(config.SearchConfig, "strategy") == {*STRATEGIES}
    assert choices(config.SearchConfig, "dtype") == {*DTYPES, "auto"}
    assert choices(config.SimilarityConfig, "measure") == {*MEASURES}
    assert choices(config.QuantizeConfig, "scheme") == {*SCHEMES}
    assert set(FORMS) == {*FORMATS}


def test_sleb_runs_as_a_module_and_alone_shows_its_help(place):
    def sleb_module(*arguments, **options):
        command = [sys.executable, "-m", "sleb", *arguments]
        return subprocess.run(command, text=True, check=False, **options)

    alone = sleb_module(capture_output=True)
    assert (alone.returncode, alone.stdout) == (2, "")
    assert alone.stderr.startswith("Usage: sleb [OPTIONS] COMMAND")
    assert "Traceback" not in alone.stderr
    wrong = sleb_module("verfy", capture_output=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("sleb: No such command 'verfy'. Did you mean 'verify'?")
