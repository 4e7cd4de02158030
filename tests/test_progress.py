"""What a person sees while waiting."""

import io

import pytest
from rich.console import Console

from sleb.cli import progress


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch):
    """Elsewhere in the tests nothing counts as slow."""
    monkeypatch.setattr(progress, "QUIET_S", 2.0)


def test_a_narrow_terminal_keeps_the_time_left_and_shortens_the_note():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, color_system=None)
    with progress._Bars(console).stage("searching", 10) as tick:
        tick(5, note="round 2 of 3, 27 candidates, last removed 12, and more than fits")
    line = shown.getvalue().replace("\r", "\n")
    assert "searching" in line
    assert "50%" in line
    assert "0:00:00" in line
    assert "left round 2 of 3" in line
    assert "…" in line


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress._Lines().stage("searching", 10) as tick:
        for _ in range(5):
            clock[0] += 10
            tick(note="round 1")
    assert capsys.readouterr().err.splitlines() == [
        "searching: 20 %, 20 s gone, about 80 s left; round 1",
        "searching: 40 %, 40 s gone, about 60 s left; round 1",
        "searching: done in 50 s",
    ]


def test_where_the_end_is_not_known_the_time_gone_is_said(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress._Lines().stage("searching", None) as tick:
        clock[0] += 20
        tick(note="round 1")
        clock[0] += 20
        tick()
    assert capsys.readouterr().err.splitlines()[:2] == [
        "searching: 20 s gone; round 1",
        "searching: 40 s gone",
    ]


def test_what_is_quick_says_nothing(capsys):
    with progress._Lines().stage("loading", None) as tick:
        tick()
    assert capsys.readouterr().err == ""
