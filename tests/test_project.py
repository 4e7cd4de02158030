"""One file from search to report: stages, what they depend on, and what is wrong with a file."""

import json
import re
from unittest.mock import Mock

import pytest

import sleb.project as project_module
from conftest import save_tiny
from sleb import estimates
from sleb.cli.main import main
from sleb.config import HealConfig, PruneConfig
from sleb.core.errors import InputError
from sleb.project import Project, run
from sleb.project_file import Measure
from sleb.record import RunRecord

TEXT = "the mail of today and of all other days to everyone here. "

SETTINGS = """
model = "model"
out = "smaller"
device = "cpu"
dtype = "float32"
[text]
mail = "mail.txt"
notes = "notes.txt"
[search]
remove = 2
windows = 4
heldout = 6
length = 24
[measure]
prompts = "prompts.jsonl"
new_tokens = 4
tasks = ["questions.jsonl"]
bench = false
transfer = true
reports = ["en", "ja"]
[gate.perplexity]
max_ratio = 1000
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    (tmp_path / "mail.txt").write_text(TEXT * 40)
    (tmp_path / "notes.txt").write_text(TEXT[::-1] * 40)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Dear all,"}\n{"prompt": "Today"}\n')
    row = {"question": "One and one?", "choices": ["two", "three"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    (tmp_path / "sleb.toml").write_text(SETTINGS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # paths are relative to the file, not to where one stands
    return tmp_path


def change(place, before, after):
    path = place / "sleb.toml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_what_a_run_will_take_is_said_without_doing_it(place, monkeypatch, capsys):
    """The phases of prune, and those behind it."""

    def phases(*more):
        assert main(["run", str(place / "sleb.toml"), "--dry-run", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["unknown"] == []
        return {phase["name"]: phase["seconds"] for phase in found["phases"]}

    found = phases("--set", "measure.bench=true")
    later = ["similarity", "transfer", "answers", "speed", "tasks"]
    assert [*found] == ["text", "search", "repair", "measure", "write and check", *later]
    assert all(seconds > 0 for name, seconds in found.items() if name != "text")
    assert "speed" not in phases()
    assert not (place / "smaller").exists()
    once = Mock(wraps=estimates.Speed.of)
    monkeypatch.setattr(estimates.Speed, "of", once)
    text = main(["run", str(place / "sleb.toml"), "--dry-run"]), capsys.readouterr().out
    assert once.call_count == 1, "a large model takes long to time"
    assert "not estimated" not in text[1]
    change(place, "transfer = true", "")  # which is of whole blocks
    monkeypatch.setattr(project_module, "check_tasks", lambda *_, **__: None)
    named = project_module.estimate(place / "sleb.toml", settings=['measure.tasks=["arc_easy"]'])
    assert named.unknown == ("tasks",), "how many items those have is not known here"


def test_one_command_goes_from_search_to_reports(place, capsys, monkeypatch):
    monkeypatch.setattr("sleb.core.display.BRIEF_S", 0.0)  # tiny, and told all the same
    assert main(["run", str(place / "sleb.toml")]) == 0
    out = place / "smaller"
    record = RunRecord.load(out)
    assert list(record.evaluation.domains) == ["mail", "notes"]
    assert len(record.similarity) == 7
    assert [t.items for t in record.tasks] == [3]
    assert record.answers.prompts == 2
    assert record.transfer.domains == ("mail", "notes")
    assert record.gate.passed
    assert record.speed is None
    assert str(record.settings["search.remove"]) == "2"
    for lang in ("en", "ja"):
        assert f'lang="{lang}"' in (out / f"report.{lang}.html").read_text(encoding="utf-8")
    printed, told = capsys.readouterr()
    assert "report.ja.html" in printed
    assert "not estimated: what is measured after the cut" in told[: told.index("similarity")]
    parts = ("similarity", "tasks", "transfer", "answers")
    assert re.search(r"CPU: " + ", ".join(rf"{part} \d+ s" for part in parts) + "\n", told)
    for n, part in enumerate(parts, 1):
        assert f"{n} of 4: {part}: about" in told
        assert f"{n} of 4: {part}: done in" in told
    assert "1,000" in printed or "1000" in printed
    assert "measured again" not in told
    monkeypatch.chdir(place)  # where one stands is no other setting
    assert main(["run", "sleb.toml"]) == 0
    when = record.started[:10]
    assert f"nothing was measured again: all is from the run of {when}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_limit_that_fails_ends_with_3_and_still_writes_the_reports(place, capsys):
    change(place, "max_ratio = 1000", "max_ratio = 0.5")
    assert main(["run", str(place / "sleb.toml")]) == 3
    assert "perplexity" in capsys.readouterr().err
    assert (place / "smaller" / "report.en.html").is_file()
    assert not RunRecord.load(place / "smaller").gate.passed
    # another limit is no reason to measure again
    before = RunRecord.load(place / "smaller")
    change(place, "max_ratio = 0.5", "max_ratio = 1000")
    assert main(["run", str(place / "sleb.toml")]) == 0
    assert RunRecord.load(place / "smaller").answers == before.answers


@pytest.mark.slow
def test_a_run_goes_on_with_the_stage_that_is_missing(place, monkeypatch):
    calls = []

    def counted(name):
        real = getattr(project_module, name)

        def call(*args, **kwargs):
            calls.append(name)
            if name == "compare" and calls.count(name) == 1:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(project_module, name, call)

    for name in ("prune", "run_tasks", "transfer", "compare", "write_report"):
        counted(name)
    file = place / "sleb.toml"
    with pytest.raises(KeyboardInterrupt):
        run(file)
    assert calls == ["prune", "run_tasks", "transfer", "compare"]
    run(file)
    assert calls[4:] == ["compare", "write_report", "write_report"]
    # a stage is repeated when what it depends on has changed, and only that stage
    (place / "questions.jsonl").write_text((place / "questions.jsonl").read_text() * 2)
    assert [t.items for t in run(file).tasks] == [6]
    assert calls[7:] == ["run_tasks", "write_report", "write_report"]


@pytest.mark.slow
def test_other_settings_do_not_overwrite_a_result(place):
    run(place / "sleb.toml")
    before = (place / "smaller" / "run.json").read_bytes()
    change(place, "remove = 2", 'remove = "20%"')
    (place / "mail.txt").write_text(TEXT * 41)
    differ = (
        r"other settings .* \(search\.remove: 20%, was 2; mail\.txt: other content\); .* --force"
    )
    with pytest.raises(InputError, match=differ):
        run(place / "sleb.toml")
    record = json.loads(before)
    del record["settings"]  # as it was before they were kept
    (place / "smaller" / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"texts than now; .* --force"):
        run(place / "sleb.toml")
    (place / "smaller" / "run.json").write_bytes(before)
    change(place, 'remove = "20%"', "remove = 1")
    assert (place / "smaller" / "run.json").read_bytes() == before
    assert len(run(place / "sleb.toml", force=True).removed) == 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("remove = 2", "", "no target"),
        ("remove = 2", "remove = 2\nspeedup = 1.5", "two targets"),
        ("heldout = 6", "heldot = 6", r"\[search\] .*heldot \(did you mean 'heldout'"),
        ("heldout = 6", "heldout = 'six'", r"\[search\] heldout 'six'"),
        ("heldout = 6", "heldout = 1", "heldout"),
        ("remove = 2", "remove = 2\ndevice = 'cpu'", "device stands above the tables and in"),
        ("remove = 2", "remove = 2\ncurve = true", r"\[search\] curve"),
        ("bench = false", "bensh = false", r"\[measure\] .*bensh \(did you mean 'bench'"),
        ("[gate.perplexity]", "[gate.perplexty]", "did you mean 'perplexity'"),
        ('model = "model"', "", "model: field required"),
        ('"questions.jsonl"', '"quests.jsonl"', "quests.jsonl"),
        ('"prompts.jsonl"', '"prompt.jsonl"', "prompt.jsonl"),
        ('mail = "mail.txt"', 'mail = "mail.text"', "mail.text"),
        ('model = "model"', 'model = "./modell"', "no model at .*did you mean 'model'"),
        ('["en", "ja"]', '["fr"]', "reports"),
        ('out = "smaller"', 'out = "smaller.gguf"', r"a folder, or .* sleb prune MODEL\.gguf"),
        ("[text]", "[text", "not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_loaded(
    place, before, after, message, capsys
):
    change(place, before, after)
    assert main(["run", str(place / "sleb.toml")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("sleb: ")
    assert error.count("\n") == 1
    assert not (place / "smaller").exists()


def test_settings_given_beside_the_file_replace_its_own(place):
    file = Project.load(place / "sleb.toml")
    given = ["search.remove=20%", "search.protect='0'", "out=elsewhere", "measure.bench=false"]
    found = Project.load(place / "sleb.toml", given)
    assert (found.search.remove, found.search.protect, found.out) == ("20%", "0", "elsewhere")
    assert not found.measure.bench
    assert found.search.text == file.search.text
    for wrong, said in [
        ("search.remove", "no setting"),
        ("=3", "no setting"),
        ("search.remov=3", "no option remov .*'remove'"),
        ("out.x=3", "out is no table"),
    ]:
        with pytest.raises(InputError, match=said):
            Project.load(place / "sleb.toml", [wrong])


def test_the_file_that_init_writes_is_right_and_explains_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / 'a "model"')
    assert main(["init", "--model", 'a "model"']) == 0
    out = capsys.readouterr().out
    assert "sleb run sleb.toml" in out
    assert "note" not in out
    assert main(["init"]) == 2
    assert "exists" in capsys.readouterr().err
    for there, model in ((False, "./nothere"), (True, "maker/nothere")):
        assert main(["init", "-o", "other.toml", "--force", "--model", model]) == 0
        first = (tmp_path / "other.toml").read_text().splitlines()[0]
        assert "`sleb run other.toml`" in first
        assert ("no model at ./nothere" in capsys.readouterr().out) != there
    project = Project.load("sleb.toml")
    assert project.source == 'a "model"'
    # what is commented out is right as well
    text = (tmp_path / "sleb.toml").read_text()
    keys = re.findall(r"^#? ?(\w+) = ", text, re.MULTILINE)
    tables = (PruneConfig, HealConfig, Measure, Project)
    known = {name for table in tables for name in table.model_fields}
    assert set(keys) - known == {
        "default", "mail", "manuals", "max_ratio", "min_speedup", "min_retention",
        "max_repetitive", "max_empty", "max_unfinished", "min_agreement", "min_right",
    }  # fmt: skip
