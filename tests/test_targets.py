"""Targets: what is asked for is what a cut then has, and held-out text decides about loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import reference
import sleb
from conftest import save_tiny
from search_tools import split_of
from sleb.calibration.split import CalibrationSplit
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError, VerificationFailed
from sleb.core.plan import Plan
from sleb.selection.goal import Goal, parse_bytes
from sleb.selection.targets import Costs, StoppingRule

CPU = {"dtype": "float32", "device": "cpu"}
SMALL = {"windows": 6, "length": 24, **CPU}


@pytest.fixture(scope="module")
def split(loaded):
    """Windows to score and to hold out, of text that the model itself wrote: so its loss is low,
    and every removal raises it."""
    parts = split_of(loaded.tokenizer, (), windows=6, length=24, heldout=8)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 259, (14, 1), generator=draw)
    while ids.shape[1] < 24:
        with torch.no_grad():
            odds = (1.5 * loaded.model(input_ids=ids).logits[:, -1]).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(odds, 1, generator=draw)), 1)
    return CalibrationSplit(
        search=replace(parts.search, ids=ids[:6]), heldout=replace(parts.heldout, ids=ids[6:])
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("100MB", 10**8), ("1.5 GiB", 3 * 2**29), ("7", 7), ("2k", 2000), (512, 512), ("1TB", 10**12)],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert parse_bytes(text, "--size") == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1XB", "0", "1 2", "inf", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"--size .* is not a size; write for example 100MB"):
        parse_bytes(text, "--size")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "no target: give one of"),
        ({"remove": 2, "speedup": 1.2}, "--remove and --speedup are two targets"),
        ({"max_loss_increase": 0}, "--max-loss-increase 0 is not possible"),
        ({"max_loss_increase": float("nan")}, "--max-loss-increase nan is not possible"),
        ({"speedup": 1.0}, "--speedup 1.0 is not possible"),
        ({"speedup": float("inf")}, "--speedup inf is not possible"),
        ({"size": "big"}, "--size 'big' is not a size"),
    ],
)
def test_impossible_targets_are_refused(targets, message):
    with pytest.raises(InputError, match=message):
        Goal(**targets)


@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_the_bytes_of_the_files(tmp_path, tied):
    path = save_tiny(tmp_path / "m", tie_word_embeddings=tied, shard="20KB")
    costs = Costs.of(Checkpoint.open(path), sleb.load(path, **CPU).stack)
    plan = sleb.search(path, remove=2, **SMALL)
    out = sleb.apply(plan, path, tmp_path / "out")
    assert costs.size(plan.removed) == Checkpoint.open(out).nbytes
    head = 259 * 32 * 4
    assert costs.read == costs.total - (0 if tied else head)
    block = costs.blocks[0]
    assert costs.speedup((1, 2)) == pytest.approx(costs.read / (costs.read - 2 * block))


def test_as_few_blocks_go_as_the_size_allows(loaded, split):
    costs = Costs.of(Checkpoint.open(loaded.source.path), loaded.stack)
    for n in (1, 2, 3):
        limit = costs.total - n * costs.blocks[1]
        plan = sleb.search(loaded, size=limit, split=split)
        assert (len(plan.removed), plan.target.reached) == (n, limit)
        assert len(sleb.search(loaded, size=limit + 1, split=split).removed) == n
        assert plan.order == sleb.search(loaded, remove=n, split=split).order
    with pytest.raises(InputError, match="without all 4 candidates the weights still take"):
        sleb.search(loaded, size=limit // 2, split=split)
    whole = Checkpoint.open(loaded.source.path).nbytes
    for model in (loaded, loaded.source.path):
        with pytest.raises(InputError, match=f"--size {whole}: the weights take .* MB already"):
            sleb.search(model, size=whole, split=split)


def test_as_few_blocks_go_as_the_speed_up_needs(loaded, split):
    plan = sleb.search(loaded, speedup=1.4, split=split)
    costs = Costs.of(Checkpoint.open(loaded.source.path), loaded.stack)
    assert plan.target.kind == "speedup"
    assert plan.target.reached >= 1.4 > costs.speedup(plan.order[:-1])
    with pytest.raises(InputError, match="--speedup 50 is not within reach: without all 4"):
        sleb.search(loaded, speedup=50, split=split)


def test_blocks_of_unequal_size_count_as_they_are():
    """With small blocks chosen first it takes more of them; the search stops when it is enough."""
    costs = Costs(total=100, read=100, blocks=(30, 10, 10, 30, 10))
    aim = StoppingRule(Goal(size=65), costs, range(5), None)
    assert aim.most == 4  # 10 + 10 + 10 + 30: the least that surely suffices
    assert [aim.enough(o) for o in ([0], [0, 1], [1, 2, 4], [1, 2, 4, 0])] == [0, 1, 0, 1]
    assert aim.settle((0, 1, 3, 2))[0] == (0, 1)


@pytest.mark.parametrize("strategy", ["beam", "refine", "window", "one-shot"])
def test_other_strategies_reach_a_size_too(loaded, split, strategy):
    costs = Costs.of(Checkpoint.open(loaded.source.path), loaded.stack)
    limit = costs.total - 2 * costs.blocks[1]
    plan = sleb.search(loaded, size=limit, strategy=strategy, split=split)
    assert len(plan.removed) == 2
    assert costs.size(plan.removed) <= limit


def bound(model, removed, ids):
    """95 % upper bound of the mean paired increase, from the definitions."""
    gap = (reference.loss(model, removed, ids) - reference.loss(model, (), ids)).numpy()
    return gap.mean() + stats.t.ppf(0.95, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5


def test_a_limit_on_loss_is_kept_on_windows_that_were_not_scored(loaded, split):
    aside = split.heldout
    whole = sleb.search(loaded, remove=4, exact=True, split=split).order
    bounds = [bound(loaded.model, whole[: d + 1], aside.ids) for d in range(4)]
    assert bounds == sorted(bounds)  # else the cases below say nothing
    for depth in (1, 2, 3):
        limit = float(np.mean(bounds[depth - 1 : depth + 1]))
        plan = sleb.search(loaded, max_loss_increase=limit, exact=True, split=split)
        assert plan.order == whole[:depth]
        assert plan.target.reached == pytest.approx(bounds[depth - 1], abs=1e-5)
        assert [p.bound for p in plan.curve.points] == pytest.approx(bounds[: depth + 1], abs=1e-5)
        assert plan.curve.heldout == aside.record
        assert len(plan.rounds) == depth
    everything = sleb.search(loaded, max_loss_increase=1e3, split=split)
    assert len(everything.order) == 4


def test_one_shot_keeps_the_limit_too(loaded, split):
    aside = split.heldout
    options = {"metric": "one-shot-loss", "split": split}
    order = sleb.search(loaded, remove=4, **options).order
    limit = bound(loaded.model, order[:2], aside.ids) + 1e-4
    plan = sleb.search(loaded, max_loss_increase=limit, **options)
    assert plan.order == order[:2]
    assert plan.rounds[0].removed == order[:2]


def test_nothing_within_the_limit_is_a_failed_gate(loaded, split):
    with pytest.raises(VerificationFailed, match=r"nothing can be removed within .* on 8 windows"):
        sleb.search(loaded, max_loss_increase=1e-6, split=split)
    assert VerificationFailed.exit_code == 3


def test_a_limit_needs_text_to_hold_out(loaded, text_file):
    with pytest.raises(InputError, match="no two windows are left over to hold out"):
        sleb.search(loaded, max_loss_increase=1, text=[str(text_file)], windows=64, length=64)
    with pytest.raises(InputError, match="no two windows are left over"):
        sleb.search(loaded, curve=True, heldout=1, **{k: SMALL[k] for k in ("windows", "length")})


@pytest.mark.parametrize("strategy", ["window", "beam", "refine"])
def test_a_limit_needs_one_removal_after_the_other(loaded, strategy):
    with pytest.raises(InputError, match=f"--strategy {strategy} chooses a set of known size"):
        sleb.search(loaded, max_loss_increase=1, strategy=strategy, windows=4, length=24)


def test_the_curve_is_what_eval_measures_at_each_depth(loaded, split, tmp_path):
    aside = split.heldout
    plan = sleb.search(loaded, remove=3, curve=True, split=split)
    costs = Costs.of(Checkpoint.open(loaded.source.path), loaded.stack)
    assert plan.order == sleb.search(loaded, remove=3, split=split).order
    for point in plan.curve.points:
        removed = plan.at_depth(point.depth)
        assert point.block == plan.order[point.depth - 1]
        found = sleb.evaluate(loaded, aside, removed=removed)
        seen = (point.increase, point.low, point.high)
        increase = found.loss_increase
        assert seen == pytest.approx((increase.value, increase.low, increase.high), abs=2e-6)
        assert point.increase < point.bound < point.high
        assert point.nbytes == costs.size(removed)
        assert plan.curve.baseline.mean == pytest.approx(found.loss.value, abs=2e-6)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_curve_alone_goes_to_half_of_the_blocks(tiny_dir):
    plan = sleb.search(tiny_dir, curve=True, **SMALL)
    assert [p.depth for p in plan.curve.points] == [1, 2, 3]
    assert plan.curve.heldout.windows == 16
    assert plan.curve.heldout.sha256 != plan.calibration.sha256


def test_a_failed_gate_leaves_no_plan(place, capsys, monkeypatch):
    from sleb.cli.main import main

    monkeypatch.setattr(StoppingRule, "_bound", lambda self, order: 0.5 * len(order))
    base = ["search", "MODEL", "--windows", "5", "--length", "16", "-o", "new.json"]
    assert main([*base, "--max-loss-increase", "0.4"]) == 3
    assert "nothing can be removed within --max-loss-increase 0.4" in capsys.readouterr().err
    assert sorted(p.name for p in place.iterdir()) == ["MODEL", "plan.json"]
    assert main([*base, "--max-loss-increase", "0.9"]) == 0
    assert "beyond the target" in capsys.readouterr().out
