"""Healing by several processes, each with a part of every step: as by one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import heal_tools
import sleb
from heal_tools import IN_PARALLEL, healed, windows_of
from parallel_tools import launch
from sleb.cli.main import main
from sleb.core.process_group import Group
from sleb.distillation.mix import TEXTS, Mix
from sleb.distillation.training import Training

home = heal_tools.home
HEAL = ["heal", "OUT", "--model", "MODEL", "--text", "mail.txt", "--text", "code.txt"]
HEAL += ["--tokens", "3072", "--length", "32", "--batch", "8", "--heldout", "8"]
HEAL += ["--device", "cpu", "--dtype", "float32"]


def test_passes_are_given_out_whole_and_evenly(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    scored = torch.ones(40, 64, dtype=torch.bool)
    for row, used in enumerate(torch.randint(8, 64, (40,), generator=draw).tolist()):
        scored[row, used:] = False
    windows = windows_of(torch.ones(40, 64, dtype=torch.long), scored)
    mix = Mix(kinds={TEXTS: windows}, tokens=20 * 36, total=10**4, seed=0)
    training = Training.__new__(Training)
    training.at_once = 4096
    training.split = SimpleNamespace(device=torch.device("cpu"))
    alone = training._mine(mix, 0)
    whole = sorted(row for rows, _ in alone for row in rows)

    def weights(passes):
        return {row: w for rows, ws in passes for row, w in zip(rows, ws, strict=True)}

    for size in (2, 3, 8):
        here, parts = Group(), []
        here.size = size
        monkeypatch.setattr("sleb.distillation.training.group", lambda here=here: here)
        for rank in range(size):
            here.rank = rank
            parts.append(training._mine(mix, 0))
        assert sorted(row for part in parts for rows, _ in part for row in rows) == whole
        tokens = [sum(mix.lengths[row] for rows, _ in part for row in rows) for part in parts]
        assert max(tokens) < 2.2 * sum(tokens) / size
        assert weights(each for part in parts for each in part) == weights(alone)


@pytest.mark.slow
def test_two_processes_heal_as_one(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    job = launch(2, "-m", "sleb", *HEAL, "--lr", "1e-3", "-o", str(tmp_path / "two"), "--json")
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors[-3000:]
    record = json.loads(out)
    assert record == json.loads((tmp_path / "two/run.json").read_text())
    assert record["healed"]["processes"] == 2
    assert main([*HEAL, "--lr", "1e-3", "-o", str(tmp_path / "one")]) == 0
    one, two = (sleb.RunRecord.load(tmp_path / name).healed for name in ("one", "two"))
    assert one.steps == two.steps
    for (step, found), (other, wanted) in zip(two.checks, one.checks, strict=True):
        assert step == other
        assert found == pytest.approx(wanted, rel=1e-4)
    trained, alone, start = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "two", tmp_path / "one", home / "OUT")
    )
    apart = sum(float((trained[n] - alone[n]).square().sum()) for n in alone)
    moved = sum(float((alone[n] - start[n]).square().sum()) for n in alone)
    assert apart < 1e-4 * moved
    assert sleb.verify(tmp_path / "two", model=home / "MODEL").passed


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_one_goes_on(home, tmp_path):
    """After the local stage and the range test, in which all must find the same."""
    job = launch(2, str(Path(__file__).parent / "heal_tools.py"), str(home), str(tmp_path / "H"))
    out, errors = job.communicate(timeout=300)
    assert out.count("stopped") == 2, errors[-3000:]
    found = healed(home, tmp_path / "H", **IN_PARALLEL)
    whole = healed(home, tmp_path / "W", **IN_PARALLEL)
    assert found.lr == whole.lr > 0
    assert [step for step, _ in found.checks].count(0) == 2, "and of before"
    assert found.steps == whole.steps
    assert found.checks[-1][1] == pytest.approx(whole.checks[-1][1], rel=0.01)
