"""Ctrl-C, a polite kill and kill -9: nothing half-written, and a search goes on where it was."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from cli_tools import run, tree
from sleb import estimates, pipeline, project
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.cli.main import main
from sleb.selection.sweep import Sweep

pytestmark = pytest.mark.slow  # processes of their own

# many short windows one by one: long enough to be interrupted, and much to write down
SEARCH = ["search", "MODEL", "--remove", "3", "--windows", "60", "--length", "16", "--batch", "1"]
CPU = ["--dtype", "float32", "--device", "cpu"]
KEPT = "sleb: interrupted; scores so far are in {}: repeat the command to go on\n"


@contextlib.contextmanager
def counted():
    """How many times the model is run while this is open: a list that grows."""
    calls: list[int] = []
    real = Sweep.scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "scores", lambda *args: (calls.append(1), real(*args))[1])
        yield calls


@pytest.fixture(scope="module")
def uninterrupted(tiny_dir, tmp_path_factory) -> tuple[str, int]:
    """The plan of an uninterrupted search, and how many steps it took."""
    plan = tmp_path_factory.mktemp("whole") / "plan.json"
    with counted() as calls:
        assert main(["search", str(tiny_dir), *SEARCH[2:], *CPU, "-o", str(plan)]) == 0
    return plan.read_text(), len(calls)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_search_that_is_stopped_goes_on_to_the_same_plan(place, capsys, uninterrupted, number):
    command = [*SEARCH, *CPU, "-o", "new.json"]
    journal = place / "new.json.journal"
    process = subprocess.Popen(
        [sys.executable, "-m", "sleb", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 100
        while not journal.exists() or len(journal.read_text().splitlines()) < 4:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert out == ""
        said = re.sub(r"\Astarting: done in \d+ s\n", "", err)  # where importing took a while
        assert said == KEPT.format("new.json.journal")
    assert not (place / "new.json").exists()
    kept = len(journal.read_text().splitlines()) - 1
    plan, steps = uninterrupted
    assert 3 <= kept < steps
    with counted() as calls:
        assert run(capsys, *command).code == 0
    assert 0 < len(calls) <= steps - kept + 1  # a torn last line is scored again
    assert (place / "new.json").read_text() == plan
    assert not journal.exists()


def test_an_interrupted_run_says_that_it_goes_on(place, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(project, "prune", stopped)
    file = 'model = "MODEL"\nout = "OUT"\n[text]\na = "default"\n[search]\nremove = 1\n'
    (place / "sleb.toml").write_text(file)
    ran = run(capsys, "run", "sleb.toml")
    assert ran.code == 130
    assert ran.err.endswith("interrupted; what is finished is kept: repeat the command to go on\n")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["OUT.heal", "OUT-cut"], "the training so far is in OUT.heal"),
        (["OUT.stages", "OUT-cut"], "the stages so far are in OUT.stages"),
        (["OUT-cut.journal"], "scores so far are in OUT-cut.journal"),
        (["OUT-cut"], "the cut stays in OUT-cut"),
    ],
)
def test_what_a_cut_and_a_healing_leave_is_said(place, capsys, monkeypatch, there, said):
    def stopped(*args, **options):
        for name in there:
            (place / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prune_and_heal", stopped)
    ran = run(capsys, "prune", "MODEL", "--remove", "1", "--heal", "-o", "OUT")
    assert ran.code == 130
    assert ran.err.endswith(f"interrupted; {said}: repeat the command to go on\n")


def test_an_interrupted_estimate_has_nothing_to_go_on_from(place, capsys, monkeypatch):
    """Even where an earlier run has."""
    (place / "out.journal").touch()
    monkeypatch.setattr(estimates.Speed, "of", Mock(side_effect=KeyboardInterrupt))
    ran = run(capsys, "prune", "MODEL", "--remove", "1", "-o", "out", "--dry-run")
    assert (ran.code, ran.err) == (130, "sleb: interrupted; nothing was written\n")


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_apply_leaves_nothing(place, capsys, monkeypatch, stop, existing):
    command = ["apply", "plan.json", "MODEL", "-o", "new/out"]
    if existing:
        assert run(capsys, *command).code == 0
        command.append("--force")
    real = Checkpoint.chunks

    def chunks(self, name):
        if any(place.glob("new/.out.part-*/model.safetensors")):
            if stop == "Ctrl-C":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, name)

    before = tree(place)
    monkeypatch.setattr(Checkpoint, "chunks", chunks)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        ran = run(capsys, *command)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # as it was before
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == "sleb: interrupted; nothing was written\n"
    assert tree(place) == before


@pytest.mark.slow
def test_a_reader_that_goes_away_and_a_full_pipe(place):
    """`sleb inspect MODEL | head -0`, and `sleb inspect MODEL --json > /dev/full`."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone, open("/dev/full", "w") as full:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "sleb", "inspect", "MODEL", *options],
                stdout=target,
                stderr=subprocess.PIPE,
                text=True,
                env=buffered,
            )
            for target, options in ((gone, []), (gone, ["--json"]), (full, ["--json"]))
        ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 6]
    assert said == ["", "", "sleb: disk full; free some space and repeat the command\n"]
