"""In stages: cut, heal, cut on and heal, in one command."""

import json
import shutil

import pytest
import torch

import heal_tools
import sleb
from cli_tools import tree
from heal_tools import CPU, SMALL, Stopping
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError
from sleb.distillation import stages

home = heal_tools.home


def in_stages(home, out, n=2, **options):
    text = [str(home / "mail.txt"), str(home / "code.txt")]
    asked = {"text": text, "prompts": ["none"], **SMALL, "stages": n}
    return sleb.heal(home / "OUT", home / "MODEL", out, **{**asked, **options})


def test_a_healed_cut_is_cut_on_and_healed_again(home, tmp_path, monkeypatch):
    real, seen = stages.cut_on, []

    def noted(healed, plan, depth, out, *rest):
        real(healed, plan, depth, out, *rest)
        seen.append((healed, out))
        shutil.copytree(healed, tmp_path / "healed-1")
        shutil.copytree(out, tmp_path / "cut-2")

    monkeypatch.setattr(stages, "cut_on", noted)
    done = in_stages(home, tmp_path / "H")
    assert len(seen) == 1
    plan = sleb.Plan.load(home / "OUT/plan.json")
    first, second = (sleb.Plan.load(tmp_path / n / "plan.json") for n in ("healed-1", "cut-2"))
    assert first.removed == plan.at_depth(1)
    assert second.removed == plan.removed
    assert second.order == plan.order

    # what is cut on has the weights that were healed, and its plan says so
    assert (
        json.loads((tmp_path / "healed-1/heal.json").read_text())["steps"]
        == done.record.healed.steps
    )
    loaded = [sleb.load(tmp_path / name, **CPU) for name in ("healed-1", "cut-2")]
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    (last,) = set(plan.removed) - set(first.removed)
    with torch.no_grad(), loaded[0].stack.bypassed([last - (first.removed[0] < last)]):
        wanted = loaded[0].model(ids).logits
    with torch.no_grad():
        assert torch.equal(loaded[1].model(ids).logits, wanted)
    assert sleb.verify(tmp_path / "cut-2", model=home / "MODEL").passed

    # the result is one of the whole plan, as any other
    assert done.plan.removed == plan.removed
    assert sleb.verify(tmp_path / "H", model=home / "MODEL").passed
    assert done.record.healed.cut == str(home / "OUT")
    assert done.record.healed.settings["stages"] == 2
    assert done.record.healed.settings["tokens"] == SMALL["tokens"] // 2
    once = in_stages(home, tmp_path / "ONCE", 1).record.healed
    start = (h.texts["mail"].cut_divergence.value for h in (done.record.healed, once))
    assert next(start) < next(start), "the second stage starts nearer to the dense model"
    names = {"H", "ONCE", "healed-1", "cut-2"}
    assert {path.name for path in tmp_path.iterdir()} == names, "no folder of stages is left"


def test_stages_that_are_there_are_not_done_again(home, tmp_path, monkeypatch):
    class Second(Stopping):  # a pass of the last stage
        def stage(self, title, total):
            last = (tmp_path / "H.stages/healed-1").exists()
            return super().stage(title if last else "before", total)

    with pytest.raises(KeyboardInterrupt):
        in_stages(home, tmp_path / "H", progress=Second(3))
    before = tree(tmp_path / "H.stages")
    with pytest.raises(InputError, match=r"H\.stages is of a run with other settings"):
        in_stages(home, tmp_path / "H", lr=1e-3)
    made = []
    monkeypatch.setattr(stages, "heal", lambda *_, **__: made.append(1))
    monkeypatch.setattr(stages, "apply", lambda *_, **__: made.append(1))
    monkeypatch.setattr(
        "sleb.pipeline.stages_folder",
        lambda out: made.append(tree(stages.stages_folder(out))) or stages.stages_folder(out),
    )
    in_stages(home, tmp_path / "H")
    assert made == [before], "and nothing is left in the end"
    assert not (tmp_path / "H.stages").exists()


def test_there_are_no_more_stages_than_blocks_removed(home, tmp_path):
    with pytest.raises(InputError, match=r"--stages 3: .* lacks 2 blocks"):
        in_stages(home, tmp_path / "H", 3)
    assert tree(tmp_path) == {}
    assert Checkpoint.open(home / "OUT").tensors
