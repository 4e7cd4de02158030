"""Jobs of the command line: one voice, one plan file, a journal that any number goes on from."""

import json
import shutil
import signal
import time

import psutil
import pytest

from parallel_tools import launch
from sleb.cli.main import main
from sleb.core import process_group as parallel
from sleb.selection.sweep import Sweep

pytestmark = pytest.mark.slow  # processes of their own

SEARCH = [
    *("search", "MODEL", "--remove", "3", "--exact", "--windows", "40", "--length", "32"),
    *("--batch", "1", "--threads", "1", "--device", "cpu", "--dtype", "float32"),
]


def said(errors: str) -> list[str]:
    """What sleb itself said, among the launcher's lines."""
    return [line for line in errors.splitlines() if line.startswith("sleb: ")]


def rank_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("RANK", "")
    except psutil.Error:
        return ""


def lines(path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def place(learned, tmp_path, monkeypatch):
    """A working folder with a model of its own kind of text; ``SEARCH`` finds enough text in it."""
    (tmp_path / "MODEL").symlink_to(learned / "model")
    shutil.copy(learned / "text.txt", tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("victim", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_and_any_number_goes_on(place, victim, monkeypatch, capsys):
    search = [*SEARCH, "--text", "text.txt"]
    journal = place / "plan.json.journal"
    job = launch(2, "-m", "sleb", *search, "-o", "plan.json")
    deadline = time.monotonic() + 200
    while lines(journal) < 6:
        assert job.poll() is None, job.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {rank_of(p): p for p in psutil.Process(job.pid).children(recursive=True)}
    ranks[victim].send_signal(signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    (line,) = said(errors)
    assert "another process" in line
    assert line.endswith(
        "scores so far are in plan.json.journal: repeat the command to go on, with any number of "
        "processes"
    )
    assert not (place / "plan.json").exists()
    kept = lines(journal)

    # one process goes on, and is interrupted
    calls = []
    real = Sweep._walk_scores

    def counted(self, sets, among, start, stop):
        calls.append((start, len(sets)))
        if len(calls) == 15:
            raise KeyboardInterrupt
        return real(self, sets, among, start, stop)

    monkeypatch.setattr(Sweep, "_walk_scores", counted)
    assert main([*search, "-o", "plan.json"]) == 130
    assert lines(journal) == kept + 14
    monkeypatch.setattr(Sweep, "_walk_scores", real)
    assert main([*search, "-o", "whole.json"]) == 0
    if victim == "0":  # and two finish
        job = launch(2, "-m", "sleb", *search, "-o", "plan.json")
        out, errors = job.communicate(timeout=200)
        assert job.returncode == 0, errors[-2000:]
        assert out.count("plan written to plan.json") == 1
    else:
        assert main([*search, "-o", "plan.json"]) == 0
    assert (place / "plan.json").read_bytes() == (place / "whole.json").read_bytes()
    assert not journal.exists()


@pytest.mark.slow
def test_a_mistake_is_said_once(place):
    job = launch(2, "-m", "sleb", "search", "MODEL", "--remove", "99")
    _, errors = job.communicate(timeout=200)
    assert job.returncode != 0
    (line,) = said(errors)
    assert "--remove 99 is 99 of the model's 6 blocks" in line


@pytest.mark.slow
def test_a_verb_that_is_not_shared_is_done_once_and_prune_leaves_one_checkpoint(place):
    job = launch(2, "-m", "sleb", "inspect", "MODEL", "--json")
    out, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors[-2000:]
    assert json.loads(out)["blocks"]
    options = ["--remove", "2", "--windows", "12", "--length", "32", "--text", "text.txt"]
    options += ["--batch", "2", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    options += ["--heldout", "4", "--repair-tokens", "2000"]
    job = launch(2, "-m", "sleb", "prune", "MODEL", *options, "-o", "two", "--json")
    out, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors[-2000:]
    record = json.loads(out)
    assert record == json.loads((place / "two/run.json").read_text())
    assert record["environment"]["processes"] == 2
    assert main(["prune", "MODEL", *options, "-o", "one"]) == 0
    plans = [json.loads((place / name / "plan.json").read_text()) for name in ("one", "two")]
    for plan in plans:
        assert [gap["ridge"] for gap in plan.pop("repair")["gaps"]]
    assert plans[0] == plans[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--tp", "2"), ("--stream",)], ids=["tp", "stream"])
def test_prune_repairs_a_model_that_is_split_or_streamed(place, way):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("MODEL")
    model.resize_token_embeddings(260, mean_resizing=False)  # a vocabulary that 2 divides
    model.save_pretrained("even")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "MODEL" / name, "even")
    options = ["--remove", "2", "--windows", "12", "--length", "32", "--text", "text.txt"]
    options += ["--batch", "2", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    options += ["--heldout", "4", "--repair-tokens", "4000", "--repair"]
    job = launch(2, "-m", "sleb", "prune", "even", *options, *way, "-o", "two", "--json")
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors[-2000:]
    record = json.loads(out)
    assert record["repair"]["self_generated"] or "--stream" in way
    assert main(["prune", "even", *options, "-o", "one"]) == 0
    plans = [json.loads((place / name / "plan.json").read_text()) for name in ("one", "two")]
    assert plans[0]["order"] == plans[1]["order"]
    assert all(gap["ridge"] for plan in plans for gap in plan["repair"]["gaps"])
    assert main(["verify", "two", "--model", "even"]) == 0


def test_one_process_needs_no_job(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.joined() as here:
        assert (here.is_main, here.several, here.size) == (True, False, 1)
        assert here.exchange(b"x") == [b"x"]
        assert here.broadcast_from_main(lambda: "done") == "done"
        assert here.all_or_raise(lambda: 3) == here.sequentially(lambda: 3) == 3
        assert here.reports_errors()
