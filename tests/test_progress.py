"""What a person sees while waiting."""

import io
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cli_tools import run
from sleb.core import display as progress
from sleb.core.bars import Bars
from sleb.core.progress import (
    EARLY_PART,
    EARLY_S,
    FIRST_PART,
    FIRST_S,
    Begins,
    Estimate,
    Phase,
    TimeLeft,
    silent,
    tell,
)
from sleb.record import Stopwatch

TWO = Estimate(
    phases=(Phase(name="search", seconds=180), Phase(name="repair", seconds=120)),
    memory=1_200_000_000,
    disk=227_000_000,
    device="this CPU",
)


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch):
    """Elsewhere in the tests nothing counts as slow."""
    monkeypatch.setattr(progress, "QUIET_S", 2.0)
    monkeypatch.setattr(progress, "BRIEF_S", 20.0)


def wait_for(lines, count: int) -> None:
    """Until so many lines were said."""
    for _ in range(400):
        if len(lines) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(lines)


@pytest.fixture
def log(monkeypatch):
    """Lines as they are said where there is no terminal, with a heartbeat of 20 ms."""
    lines: list[str] = []
    monkeypatch.setattr(progress.Lines, "say", lambda self, text: lines.append(text))
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    return lines


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_keeps_the_time_left_and_shortens_the_note(width):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, color_system=None)
    with Bars(console).stage("searching", 10) as tick:
        tick(5, note="round 2 of 3, 27 candidates, last removed 12, and more than fits " * 2)
    line = shown.getvalue().replace("\r", "\n")
    assert "searching" in line
    assert "50%" in line
    assert "0:00:00" in line
    assert "s left" in line
    assert "round 2 of 3" in line
    assert "…" in line


def test_without_a_terminal_there_is_a_line_now_and_then_even_if_nothing_moves(log):
    with progress.Lines().stage("searching", 10) as tick:
        tick(2, note="round 1")
        log.clear()
        wait_for(log, 3)
    assert all(line.startswith("searching: 20 %, ") for line in log[1:3])
    assert all("left; round 1" in line for line in log[1:3])


def test_short_stages_make_no_silence(log, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.3)
    lines = progress.Lines()
    for _ in range(5):
        with lines.stage("searching", 10):
            time.sleep(0.2)
    assert log, "each is shorter than the time between lines, and all are longer"


def test_the_line_of_a_stage_that_has_ended_names_its_round(log):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    for shown, said in ((progress.Lines(0.0), log), (Bars(console, 0.0), None)):
        with shown.stage("searching", 2) as tick:
            tick(1, note="round 1")
            tick(1, note="round 2 of 6, 3 left")
        last = said[-1] if said else console.file.getvalue()
        assert "searching: round 2 of 6, 3 left; done in " in last


def test_within_a_phase_its_own_time_leads_and_the_rest_is_of_a_stage(log, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 60.0)
    shown = io.StringIO()
    bars = Bars(Console(file=shown, force_terminal=True, width=100, color_system=None))
    for display in (bars, lines := progress.Lines()):
        tell(display, TWO)
        tell(display, Begins("search"))
        display._since -= 50
    with bars.stage("searching", 10) as tick:
        tick(4)
    assert "1 of 2: search, 50 s of 3 min; searching" in shown.getvalue()
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    with lines.stage("searching", 10) as tick:
        tick(4)
        log.clear()
        wait_for(log, 2)
        assert log[1].startswith("1 of 2: search, 50 s of 3 min; searching: 40 %, ")
        lines._since -= 500
        log.clear()
        wait_for(log, 2)
    assert log[1].startswith("1 of 2: search, 9 min gone; searching: 40 %, ")


def test_where_the_end_is_not_known_or_passed_only_the_time_gone_is_said(log):
    for total, done in ((None, 3), (4, 4), (4, 9)):
        log.clear()
        with progress.Lines().stage("searching", total) as tick:
            tick(done)
            log.clear()
            wait_for(log, 2)
        assert "gone" in log[1]
        assert "left" not in log[1]


def test_what_is_quick_says_nothing(capsys):
    with progress.Lines().stage("loading", None) as tick:
        tick()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("display", ["log", "terminal"])
def test_what_will_come_and_every_phase_that_ended_stay_to_be_read(capsys, display):
    shown = io.StringIO()
    console = Console(file=shown, width=80, color_system=None)
    shows = progress.Lines() if display == "log" else Bars(console)
    watch = Stopwatch(shows)  # as the pipeline has it
    tell(watch, TWO)
    for phase in TWO.phases:
        tell(watch, Begins(phase.name))
        with watch.stage("working", 3) as tick:
            tick(3)
    shows.finish()
    said = capsys.readouterr().err if display == "log" else shown.getvalue()
    order = ["about 5 min", "1.2 GB", "227 MB", "1 of 2: search", "1 of 2: search: done", "2 of 2"]
    for words in [*order, "2 of 2: repair: done"]:
        assert words in said
        said = said[said.index(words) :]
    tell(silent, TWO)  # nobody listens, and nothing happens


@pytest.mark.parametrize(
    ("took", "then"), [(60, "40 s"), (1, "2 min"), (360, "4 min"), (7200, "8 min")]
)
def test_what_is_to_come_is_corrected_by_what_phases_took(capsys, monkeypatch, took, then):
    """By the same share, but by no more than four times, and not where nothing had to be done."""
    now = iter([0.0, took, took])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    lines = progress.Lines()
    lines.tell(TWO)
    for phase in TWO.phases:
        lines.tell(Begins(phase.name))
    said = capsys.readouterr().err.splitlines()
    assert "1 of 2: search: about 3 min, and 2 min after it" in said
    assert said[-1] == f"2 of 2: repair: about {then}"


@given(st.lists(st.integers(1, 40), min_size=3, max_size=60))
def test_the_time_left_is_steady(steps):
    """It never jumps: in one step it falls or rises by no more than the share of half a minute, or
    of an eighth of what is behind, that went by, towards what the mean speed says."""
    total, done, now = sum(steps) + 1, 0, 0.0
    clock, before, first = TimeLeft(total, 0.0), None, None
    for step in steps:
        done, now = done + step, now + 1.0
        left = clock.at(done, now)
        first = first or (done, now)
        known, since = first if done > first[0] else (0, 0.0)
        fresh = (now - since) * (total - done) / (done - known)
        early = done * EARLY_PART < total and now < EARLY_S
        if early or (before is None and first[0] * FIRST_PART < total and now < 1 + FIRST_S):
            assert left is None
            continue
        assert left is not None
        assert left >= 0
        if before is not None:
            due = max(0.0, before - 1)
            assert min(due, fresh) - 1e-6 <= left <= max(due, fresh) + 1e-6
            share = 1 - math.exp(-1 / min(30, now / 8))
            assert abs(left - due) <= abs(fresh - due) * share + 1e-9
        before = left


def test_where_all_units_take_as_long_the_time_left_is_right():
    clock = TimeLeft(100, 0.0)
    assert clock.at(1, 2.0) is None, "of a first unit it is not known yet"
    for done in range(2, 100):
        assert clock.at(done, 2.0 * done) == pytest.approx(2.0 * (100 - done))


def test_a_slow_start_is_soon_forgotten():
    """13 s for the first of 200 units, and then 7 in a second."""
    clock = TimeLeft(200, 0.0)
    assert clock.at(1, 13.0) is None
    for second in range(1, 11):
        left = clock.at(1 + 7 * second, 13.0 + second)
    assert left is not None
    assert left < 1.5 * (199 - 70) / 7


def test_a_first_unit_that_took_long_is_no_speed():
    """A minute until the first of 6,000 tokens, and then 100 in a second."""
    clock = TimeLeft(6000, 0.0)
    assert clock.at(64, 60.0) is None
    left = [clock.at(64 + 100 * second, 60.0 + second) for second in range(1, 9)]
    assert left[0] is None
    assert all(
        found == pytest.approx((5936 - 100 * (i + 2)) / 100) for i, found in enumerate(left[1:])
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5400, "1 h 30 min"), (7199, "2 h 00 min"), (31200, "8 h 40 min"), (5399, "90 min")],
)
def test_hours_are_whole(seconds, said):
    assert progress.spelled(seconds) == said


def test_no_verb_is_silent_while_it_starts(tiny_dir, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    said = run(capsys, "inspect", tiny_dir, "--full").err
    assert said.index("starting: done in") < said.index("asking transformers: done in")
    assert run(capsys, "inspect", tiny_dir, "--full", "-q").err == ""


def test_a_run_says_what_it_will_take_and_a_dry_run_says_only_that(
    tiny_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small = ["--windows", 4, "--length", 16, "--repair-tokens", 400, "--device", "cpu"]
    command = ["prune", tiny_dir, "--remove", 2, "-o", "out", *small]
    ran = run(capsys, *command, "--dry-run")
    assert (ran.code, list(tmp_path.iterdir())) == (0, [])
    assert "search" in ran.out
    found = run(capsys, *command, "--dry-run", "--json").json
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["text", "search", "repair", "measure", "write and check"]
    assert all(phase["seconds"] > 0 for phase in found["phases"])
    monkeypatch.setattr(progress, "BRIEF_S", 0.0)
    ran = run(capsys, *command)
    assert ran.code == 0
    for number, name in enumerate(names, 1):
        assert f"{number} of 5: {name}" in ran.err
    assert run(capsys, *command, "--force", "-q").err == ""


def test_going_on_from_a_journal_is_said(tiny_dir, tmp_path, monkeypatch, capsys):
    from sleb.selection import search

    monkeypatch.chdir(tmp_path)
    command = ["search", tiny_dir, "--remove", 2, "--windows", 4, "--length", 16, "-o", "p.json"]
    with monkeypatch.context() as patch:

        def stopped(*args, **how):
            raise KeyboardInterrupt

        patch.setattr(search.StoppingRule, "settle", stopped)
        assert run(capsys, *command).code == 130
    ran = run(capsys, *command)
    assert "going on from p.json.journal" in ran.err


@pytest.mark.parametrize(("asked", "note"), [("20%", True), ("50%", False), (2, False)])
def test_a_share_of_blocks_that_is_rounded_up_is_said_once(tiny_dir, tmp_path, capsys, asked, note):
    small = ["--windows", 4, "--length", 16, "--curve", "--heldout", 2]
    out = ["-o", tmp_path / "plan.json"]
    assert run(capsys, "search", tiny_dir, "--remove", asked, *small, *out).err.count(
        "20 % of 6 blocks, rounded up: 2\n"
    ) == int(note)


def test_every_second_of_a_run_is_in_a_stage_or_between_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch(silent)
    now[0] = 2.0
    for seconds in (3.0, 4.0):
        with watch.stage("searching", None):
            now[0] += seconds
        now[0] += 0.5
    assert watch.accounted == {"searching": 7.0, "between these": 3.0}
    assert watch.seconds == {"searching": 7.0}
