"""What a run will take, by the work that it then does."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

import heal_tools
import sleb
from cli_tools import run
from conftest import byte_tokenizer, tiny_llama
from gguf_tools import readable, write_tiny  # noqa: F401 (a fixture)
from heal_tools import SMALL, Stopping
from sleb import estimates
from sleb.config import HEAL_TOKENS, HealConfig
from sleb.core.files import shown_size
from sleb.distillation.mix import SHORTEST, STEPS
from sleb.evaluation.questions import read_questions

home = heal_tools.home

SETTINGS = {"windows": 8, "length": 32, "heldout": 4, "repair_tokens": 2000, "prompts": ["none"]}


class Heard:
    """A progress that keeps the estimate, and the units of each stage."""

    def __init__(self):
        self.seconds, self.ticks = {}, {}

    def tell(self, what):
        if isinstance(what, estimates.Estimate):
            self.estimate = what
            self.seconds = {phase.name: phase.seconds for phase in what.phases}

    @contextmanager
    def stage(self, title, total):
        def tick(n=1, note=""):
            self.ticks[title] = self.ticks.get(title, 0) + n

        yield tick


@pytest.mark.parametrize(
    ("removed", "how"),
    [
        (1, {"strategy": "greedy"}),
        (2, {"strategy": "greedy"}),
        (2, {"strategy": "window"}),
        (2, {"strategy": "one-shot"}),
        (2, {"metric": "cosine"}),
    ],
)
def test_the_work_that_is_foretold_is_done(learned, tmp_path, monkeypatch, removed, how):
    """In block forwards of a window, as the stages count them: a second per token of a pass is one
    for each of 6 blocks."""
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    speed = estimates.Speed(blocks=6 / SETTINGS["length"], head=0.0, written=0.0, alone=0.0)
    monkeypatch.setattr(estimates.Speed, "of", lambda *_: speed)
    heard, text = Heard(), [str(learned / "text.txt")]
    where = {"text": text, "device": "cpu", "dtype": "float32", "progress": heard}
    where |= {"exact": True, **how}  # else it depends on what is found
    sleb.prune(learned / "model", tmp_path / "out", remove=removed, **SETTINGS, **where)
    search, repair = heard.seconds[estimates.SEARCH], heard.seconds[estimates.REPAIR]
    ticks = heard.ticks.get("searching") or 6 * heard.ticks["measuring similarity"]  # of windows
    assert 1 / 2.5 < search / ticks < 2.5
    # up to three ridges are tried, and sums of products are no block forwards
    assert 1 / 2 < repair / heard.ticks["repairing"] < 4


@pytest.mark.parametrize("how", [{}, {"strategy": "one-shot"}, {"strategy": "window"}])
def test_of_a_search_alone_the_work_is_foretold(learned, tmp_path, monkeypatch, how):
    speed = estimates.Speed(blocks=6 / SETTINGS["length"], head=0.0, written=0.0, alone=0.0)
    monkeypatch.setattr(estimates.Speed, "of", lambda *_: speed)
    settings = {key: SETTINGS[key] for key in ("windows", "length", "prompts")}
    heard = Heard()
    where = {"text": [str(learned / "text.txt")], "device": "cpu", "progress": heard}
    sleb.search(learned / "model", remove=2, exact=True, **settings, **where, **how)
    assert heard.estimate.disk == 0
    assert 1 / 2.5 < heard.seconds[estimates.SEARCH] / heard.ticks["searching"] < 2.5


def test_a_search_that_goes_on_says_so_of_its_estimate(learned, tmp_path, capsys):
    command = ["search", learned / "model", "--remove", "1", "--text", learned / "text.txt"]
    command += ["--windows", "4", "--length", "32", "--device", "cpu", "--prompts", "none"]
    command += ["-o", tmp_path / "plan.json", "--dry-run", "--json"]
    assert run(capsys, *command).json["resumed"] is False
    (tmp_path / "plan.json.journal").write_text("")
    assert run(capsys, *command).json["resumed"] is True
    assert not (tmp_path / "plan.json").exists()


def test_both_models_are_counted_in_what_an_evaluation_reads(learned, tmp_path, monkeypatch):
    speed = estimates.Speed(blocks=0.5, head=0.5, written=0.0, alone=0.0)
    monkeypatch.setattr(estimates.Speed, "of", lambda *_: speed)
    where = {"text": [str(learned / "text.txt")], "device": "cpu", "windows": 3, "length": 32}
    settings = {"windows": 8, "length": 32, "prompts": ["none"]}
    plan = sleb.search(
        learned / "model", remove=1, **settings, text=where["text"], out=tmp_path / "plan.json"
    )
    for more, models in ({}, 1), ({"plan": plan}, 2):
        heard = Heard()
        sleb.evaluate(learned / "model", **where, **more, progress=heard)
        assert heard.seconds == {estimates.MEASURE: models * 3 * 32}


def test_a_pass_is_timed_in_its_parts(loaded_learned):
    """Blocks, head and writing: a second way through the blocks takes longer than none."""
    speed = estimates.Speed.of(loaded_learned, 32)
    assert min(speed.blocks, speed.head, speed.written) > 0
    assert speed.alone > speed.written, "a token alone costs what the whole batch does, nearly"


def test_healing_takes_as_long_as_it_is_given_and_more_for_more_tokens():
    speed = estimates.Speed(blocks=1e-3, head=1e-3, written=2e-3, alone=4e-3)

    def seconds(**options):
        return estimates.healing(speed, HealConfig.of({"prompts": ("none",), **options}), "cpu")

    one, two = seconds(tokens=10_000), seconds(tokens=20_000)
    assert two == pytest.approx(2 * one)
    passes = (one - 2e-3 * 10_000 / 3) / (2e-3 * 10_000)
    assert 4 < passes < 8, "a dense pass, a cut one, back, and what finds the rate and checks"
    assert seconds(tokens=10_000, lr=1e-5) < one < seconds(tokens=10_000, recompute=True)
    assert seconds(tokens=10_000, minutes=1e6) == one
    assert seconds(minutes=41) - seconds(minutes=40) == pytest.approx(60)
    few, many = (seconds(tokens=10_000, max_prompts=n, prompts=()) for n in (9, 10))
    assert many - few == pytest.approx(96 * 2e-3)


def test_of_few_minutes_on_a_cpu_there_are_few_tokens():
    speed = estimates.Speed(blocks=1e-3, head=1e-3, written=2e-3, alone=4e-3)

    def tokens(kind="cpu", **options):
        return estimates.heal_tokens(speed, HealConfig.of(options), kind)

    assert tokens(minutes=0.01) == STEPS * SHORTEST
    # a token goes through the model 4 times, and a tenth and a half more
    assert tokens(minutes=5) == 2**14 <= 300 / (2e-3 * 5.9) < 2**15
    assert tokens(minutes=1e4) == tokens() == HEAL_TOKENS["cpu"]
    assert tokens("cuda", minutes=0.1) == HEAL_TOKENS["cuda"]
    assert tokens(minutes=0.1, tokens=10**6) == 10**6


def test_a_healing_is_foretold_and_goes_on_with_the_tokens_it_began_with(
    home, tmp_path, monkeypatch
):
    class Told(Stopping):
        heard = None

        def tell(self, what):
            self.heard = self.heard or what

    def heal(at, read):
        speed = estimates.Speed(blocks=read, head=0.0, written=0.0, alone=0.0)
        monkeypatch.setattr(estimates.Speed, "of", lambda *_: speed)
        text = [str(home / "mail.txt"), str(home / "code.txt")]
        how = SMALL | {"tokens": None, "minutes": 0.05, "text": text, "prompts": ["none"]}
        told = Told(at)
        try:
            found = sleb.heal(home / "OUT", home / "MODEL", tmp_path / "H", **how, progress=told)
        except KeyboardInterrupt:
            return told.heard
        return found.record.healed

    found = heal(3, 1e-5)
    assert [(phase.name, phase.seconds) for phase in found.phases] == [("healing", 3.0)]
    nbytes = sum(file.stat().st_size for file in (home / "OUT").glob("*.safetensors"))
    assert found.disk > nbytes + (tmp_path / "H.heal").stat().st_size
    assert heal(-1, 1e-6).settings["tokens"] == 2**15


def test_what_a_cut_and_its_healing_take_is_foretold_together(learned, tmp_path, capsys):
    command = ["prune", learned / "model", "--remove", "1", "--text", learned / "text.txt"]
    command += ["--windows", "4", "--length", "32", "--device", "cpu", "--prompts", "none"]
    command += ["-o", tmp_path / "out", "--dry-run", "--json"]
    cut, both = (run(capsys, *command, *more).json for more in ([], ["--heal"]))
    names = [[phase["name"] for phase in found["phases"]] for found in (cut, both)]
    assert names[1] == [*names[0], "healing"]
    assert both["disk"] > 2 * cut["disk"], "OUT-cut stays, beside OUT and its state"


@pytest.mark.usefixtures("readable")
def test_the_size_of_a_gguf_file_is_foretold(tmp_path, capsys):
    """Blocks go; embedding, vocabulary and header stay."""
    model = write_tiny(tmp_path / "m.gguf")
    (tmp_path / "t.txt").write_text("".join(map(chr, range(32, 120))) * 100)
    command = ["prune", model, "--remove", "3", "--text", tmp_path / "t.txt", "--windows", "4"]
    command += ["--length", "32", "--device", "cpu", "--prompts", "none", "--no-repair"]
    command += ["-o", tmp_path / "cut.gguf"]
    foretold = run(capsys, *command, "--dry-run", "--json").json["disk"]
    run(capsys, *command)
    assert foretold == pytest.approx((tmp_path / "cut.gguf").stat().st_size, rel=0.02)


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("out", ["cut.gguf", "folder", "whole"])
def test_a_disk_is_too_small_for_what_is_foretold(tmp_path, capsys, monkeypatch, out):
    model = write_tiny(tmp_path / "m.gguf")
    (tmp_path / "t.txt").write_text("".join(map(chr, range(32, 120))) * 100)
    command = ["prune", model, "--remove", "3", "--text", tmp_path / "t.txt", "--windows", "4"]
    command += ["--length", "32", "--device", "cpu", "--prompts", "none", "--no-repair"]
    command += ["-o", tmp_path / out, "--dry-run", "--json", *(["--no-keep"] * (out == "folder"))]
    foretold = run(capsys, *command).json["disk"]
    for free, fits in ((foretold, True), (foretold - 1, False)):
        usage = type("U", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        ran = run(capsys, *command)
        assert (ran.code == 0) == fits, ran.err
    assert f"needs {shown_size(foretold)}, but the disk of {tmp_path} has" in ran.err


def test_of_a_long_healing_on_a_cpu_it_is_said_what_to_lower(loaded_learned):
    def shorter(tokens):
        speed = estimates.Speed(blocks=1e-3, head=0.0, written=0.0, alone=0.0)
        config = HealConfig.of({"prompts": ("none",), "tokens": tokens})
        return estimates.estimate_healing(loaded_learned, speed, config, 0, 4).shorter

    assert shorter(10_000) == ()
    assert shorter(10_000_000) == ("sleb heal with few --minutes",)


def test_questions_are_read_with_every_choice_by_both_models(loaded_learned, tmp_path):
    speed = estimates.Speed(blocks=0.5, head=0.5, written=1.0, alone=1.0)
    row = {"question": "One and one?", "choices": ["two", "three"], "answer": 0}
    words = {"question": "One and one?", "answer": "two"}
    tokens = loaded_learned.tokenizer

    def seconds(row, rows, limit=None):
        (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n" * rows)
        questions = read_questions(tmp_path / "q.jsonl")
        return estimates.scoring(speed, questions, limit, tokens), questions

    three, questions = seconds(row, 3)
    text = next(iter(questions.items.values())).text
    once = sum(len(tokens(text + choice).input_ids) for choice in row["choices"])
    assert three == 2 * 3 * once
    assert seconds(row, 9, limit=3)[0] == three
    written, questions = seconds(words, 1)
    assert written == 2 * (len(tokens(text).input_ids) + questions.answer_tokens(tokens))


PEAK = """
import contextlib, resource, sys, sleb
class Heard:
    memory = 0
    @contextlib.contextmanager
    def stage(self, title, total):
        yield lambda n=1, note="": None
    def tell(self, what):
        self.memory = getattr(what, "memory", self.memory)
heard = Heard()
sleb.search(sys.argv[1], remove=1, metric="cosine", windows=2, length=256, prompts=["none"],
            device="cpu", dtype="float32", threads=1, progress=heard)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(heard.memory, peak * (1024 if sys.platform == "linux" else 1))
"""


def test_memory_is_what_a_process_takes_with_a_large_vocabulary_too(tmp_path):
    """Whose logits are most of it where the model is small."""
    pytest.importorskip("resource")
    model = tiny_llama()
    model.resize_token_embeddings(150_000)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    told, peak = map(int, ran.stdout.split())
    assert 1 / 1.5 < told / peak < 1.5
