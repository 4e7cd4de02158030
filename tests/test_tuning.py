"""The warm-up picks what is clearly faster, once per machine, and never overrules the user."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import tiny_llama
from sleb.core.errors import InputError
from sleb.models.stack import BlockStack
from sleb.selection import tuning
from sleb.selection.pace import ProgressEstimator, rounds_of_work
from sleb.selection.tuning import Setting, running, tune


@pytest.fixture
def stack(tmp_path, monkeypatch):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return BlockStack(tiny_llama())


@pytest.fixture
def speeds(monkeypatch):
    """Pretended seconds per window by batch size, and what was measured."""
    table, asked = {}, []

    def seconds(stack, ids, setting):
        asked.append(setting.batch)
        return table.get(setting.batch, 1.0)

    monkeypatch.setattr(tuning, "_seconds_per_window", seconds)
    return table, asked


def ids(n=2 * tuning.WORTH // 64, length=64):
    return torch.zeros((n, length), dtype=torch.long)


def test_a_clearly_faster_batch_is_taken_and_remembered(stack, speeds):
    table, asked = speeds
    table.update({32: 0.5, 16: 1.0, 8: 1.2})
    assert tune(stack, ids()).batch == 32  # the usual is 1,024 tokens, so 16
    assert sorted(asked) == [8, 16, 32]
    table[32] = 9.0
    assert tune(stack, ids()).batch == 32
    assert len(asked) == 3


def test_noise_changes_nothing(stack, speeds):
    speeds[0].update({32: 0.95, 16: 1.0})
    assert tune(stack, ids()).batch == 16


def test_what_the_user_says_is_not_measured(stack, speeds):
    assert tune(stack, ids(), batch=5, threads=1) == Setting(batch=5, threads=1)
    assert tune(stack, ids(n=4)) == Setting(batch=16, threads=torch.get_num_threads())
    assert speeds[1] == []
    with pytest.raises(InputError, match="--threads 0 is not possible"):
        tune(stack, ids(), threads=0)


def test_a_real_measurement_and_a_damaged_memory_of_it(stack, tmp_path, caplog):
    found = tune(stack, ids())
    assert found.batch in (8, 16, 32)
    path = tmp_path / "tuning.json"
    assert len(json.loads(path.read_text())) == 1
    path.write_text("{")
    assert tune(stack, ids()).batch in (8, 16, 32)
    assert "cannot be read, so the batch size is measured anew" in caplog.text
    assert len(json.loads(path.read_text())) == 1


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with running(Setting(batch=1, threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# -- time left -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_a_search_moves_evenly_whatever_racing_saves(share):
    """After the first round the bar stands where the work stands."""
    rounds = rounds_of_work("greedy", range(1, 29), 6, 30, 128)
    place = [0]

    def tick(n=1, note=""):
        assert n >= 0
        place[0] += n

    pace = ProgressEstimator(tick, rounds, racing=share < 1)
    done = 0
    for turn, work in enumerate(rounds):
        for _ in range(10):
            pace.work(int(work * share / 10))
            done += work / 10
            assert place[0] <= sum(rounds)
            if turn:
                assert place[0] == pytest.approx(done, rel=0.04)
        pace.next_round()
        assert place[0] == sum(rounds[: turn + 1])


def test_work_is_that_of_an_exact_round():
    from sleb.selection.objective import BlockSet
    from sleb.selection.sweep import block_forwards

    first = [BlockSet([b]) for b in range(1, 29)]
    assert rounds_of_work("greedy", range(1, 29), 3, 30, 7)[0] == 7 * (
        block_forwards(first, 30) + 28
    )
    assert len(rounds_of_work("window", range(1, 29), 3, 30, 7)) == 1
    assert (
        rounds_of_work("beam", range(1, 29), 2, 30, 7)[1]
        > 3 * rounds_of_work("greedy", range(1, 29), 2, 30, 7)[1]
    )
