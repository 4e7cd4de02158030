"""Local first: blocks beside gaps learn to end where the dense model does, before all others."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import heal_tools
import sleb
from cli_tools import tree
from heal_tools import SMALL, Stopping, healed
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.config import HealConfig
from sleb.distillation import training
from sleb.distillation.local import JUDGING, Local, Segment, segments
from sleb.distillation.loss import SplitModel
from sleb.distillation.mix import TEXTS, Mix, heal_windows
from sleb.distillation.student import Student

home = heal_tools.home


@pytest.mark.parametrize(
    ("removed", "found"),
    [
        ([3], [(2, 3, 4)]),
        ([3, 4], [(2, 3, 5)]),
        ([3, 6], [(2, 3, 4), (4, 5, 7)]),
        ([3, 5], [(2, 4, 6)]),  # 4 is beside both
        ([0], [(0, 0, 1)]),
        ([8, 9], [(7, 7, 9)]),
        ([0, 9], [(0, 0, 1), (7, 7, 9)]),
        ([1, 3, 5, 7], [(0, 4, 8)]),
    ],
)
def test_segments_are_what_lies_beside_gaps(removed, found):
    kept = [block for block in range(10) if block not in removed]
    assert segments(kept, 10) == [Segment(first=a, last=b, target=t) for a, b, t in found]


@pytest.mark.parametrize("rank", [None, 4])
def test_a_segment_alone_is_the_segment_in_its_model_and_learns(home, rank):
    dense = AutoModelForCausalLM.from_pretrained(home / "MODEL")
    cut = AutoModelForCausalLM.from_pretrained(home / "OUT")
    kept_blocks = [b for b in range(6) if b not in sleb.Plan.load(home / "OUT/plan.json").removed]
    segment, *_ = segments(kept_blocks, 6)
    student = Student(cut, Checkpoint.open(home / "OUT"), rank=rank, seed=0)
    split, teacher = SplitModel(cut), SplitModel(dense)
    tokenizer = sleb.load(home / "MODEL", device="cpu").tokenizer
    config = HealConfig(text=[str(home / "mail.txt"), str(home / "code.txt")], heldout=2)
    windows, _ = heal_windows(tokenizer, config, wanted=16, length=32)
    mix = Mix(kinds={TEXTS: windows}, tokens=16 * 32, total=16 * 32, seed=0)
    local = Local(segment, student, split, teacher, "adamw")
    passes = local.keep(mix, 0, 32)
    assert len(passes) == 16
    row, *_ = next(iter(mix.step(0, 32)))
    ids = windows.ids[row]
    with torch.no_grad():
        own = cut(ids, output_hidden_states=True).hidden_states[segment.last + 1]
        its = dense(ids, output_hidden_states=True).hidden_states[segment.target + 1]
        far = ((own - its).square().sum(-1) / its.square().sum(-1)).mean()
        assert local.loss(passes[0]) == pytest.approx(float(far), rel=1e-5)

    before = {name: weight.detach().clone() for name, weight in student.trained.items()}
    start = local.judged(passes[::JUDGING])
    local.train(passes, lambda: False, lambda *_: None)
    assert local.judged(passes[::JUDGING]) < 0.9 * start
    changed = {n for n, w in student.trained.items() if not torch.equal(w, before[n])}
    assert changed == {*local.weights}, "and no other"
    blocks = {f".layers.{i}." for i in range(segment.first, segment.last + 1)}
    assert {block for block in blocks for name in changed if block in name} == blocks
    assert all(weight.grad is None for weight in student.trained.values())

    student.take(before)
    stops = iter([False] * 40 + [True] * 999)
    local.train(passes, lambda: next(stops), lambda *_: None)
    assert all(torch.equal(w, before[n]) for n, w in student.trained.items()), "stopped: undone"


def test_it_comes_first_and_stays_if_the_whole_is_better(home, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PART", 2)
    plain = healed(home, tmp_path / "P")
    first = healed(home, tmp_path / "L", local_first=True)
    assert [step for step, _ in first.checks].count(0) == 2
    start, local = (found[0] for step, found in first.checks if step == 0)
    assert start == plain.checks[0][1][0]
    assert local < start
    assert first.settings["local_first"]

    # what does not help is undone, and the run is that without it
    monkeypatch.setattr(
        Local, "train", lambda self, *_: [w.data.mul_(2) for w in self.weights.values()]
    )
    undone = healed(home, tmp_path / "U", local_first=True)
    assert undone.checks == plain.checks
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "PU"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stopped_in_it_a_run_starts_anew(home, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PART", 2)

    class Early(Stopping):
        def stage(self, title, total):
            return super().stage("healing" if "beside gaps" in title else title, total)

    options = {**SMALL, "local_first": True, "at_once": 1}
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", **options, progress=Early(3))
    assert tree(tmp_path) == {}
    assert healed(home, tmp_path / "H", **options).checks == (
        healed(home, tmp_path / "A", **options).checks
    )
