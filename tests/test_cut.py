"""What a cut says: which blocks stay, under which names, and which repair belongs to it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollback_tools import repaired_cut, small
from sleb.checkpoints.cut import Cut, consecutive_runs
from sleb.core.errors import InputError
from sleb.core.plan import Plan

PREFIXES = ("model.layers.", "blk.", "transformer.h.", "")


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.sampled_from(PREFIXES))
def test_renaming_numbers_the_blocks_that_stay_from_zero(blocks, removed, prefix):
    cut = Cut(blocks=blocks, removed=tuple(sorted(b for b in removed if b < blocks)))
    named = {b: cut.rename(f"{prefix}{b}.mlp.0.weight", prefix) for b in range(blocks)}
    assert [b for b, new in named.items() if new is None] == list(cut.removed)
    expected = [f"{prefix}{new}.mlp.0.weight" for new in range(len(cut.kept))]
    assert [named[b] for b in cut.kept] == expected
    further = cut.rename(f"{prefix}{blocks}.mlp.weight", prefix)  # multi-token prediction
    assert further == f"{prefix}{blocks - len(cut.removed)}.mlp.weight"
    assert cut.rename("model.norm.weight", prefix) == "model.norm.weight"


@given(st.sets(st.integers(0, 60)))
def test_runs_are_the_blocks_and_never_touch(blocks):
    runs = consecutive_runs(sorted(blocks))
    assert [b for start, stop in runs for b in range(start, stop)] == sorted(blocks)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))


def test_a_repair_belongs_to_the_whole_plan_and_its_tensors_are_checked(tmp_path):
    source = small(tmp_path / "m")
    plan, repair = repaired_cut(source, tmp_path / "out", 3, 4)
    whole = Cut.of(plan, folder=tmp_path / "out")
    assert whole.repair is not None
    assert all(torch.equal(whole.repair[name], t) for name, t in repair.tensors.items())
    assert whole.used(plan) == plan
    assert Cut.of(plan).used(plan).repair is None  # without tensors nothing is repaired
    assert Cut.of(plan).record == plan.repair
    shallow = Cut.of(plan, 1, tmp_path / "out")
    assert (shallow.record, shallow.repair, shallow.used(plan).order) == (None, None, (3,))
    for folder in (source, tmp_path):  # another checkpoint, and none
        with pytest.raises(InputError, match=str(folder)):
            Cut.of(plan, folder=folder)
    other = {name: tensor + 1 for name, tensor in repair.tensors.items()}
    for tensors in (other, {}):
        with pytest.raises(InputError, match="not the repaired tensor"):
            Cut.of(plan).with_repair(repair.record, tensors)
    with pytest.raises(InputError, match=r"\[3, 4\].*\[3\]"):
        Cut.of(Plan.load(tmp_path / "out" / "plan.json"), 1).with_repair(
            repair.record, repair.tensors
        )
