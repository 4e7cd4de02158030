"""A limit on the loss of a cut that will be repaired: it is the repaired cut that keeps it."""

import pytest
import torch
from scipy import stats

import conftest
import sleb
from search_tools import split_of, stopped_at
from sleb import pipeline
from sleb.core.errors import VerificationFailed
from sleb.pipeline import prune
from sleb.repairs import self_generated as own
from sleb.repairs.regression import Regression, gaps
from sleb.repairs.scoring import RIDGE
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.search import FINAL_TOKENS
from sleb.selection.sweep import Sweep

CPU = {"dtype": "float32", "device": "cpu"}
SMALL = {"exact": True, "batch": 6, **CPU}
LENGTH, SCORED, HELDOUT = 32, 6, 8


@pytest.fixture(scope="module")
def text(learned):
    return [str(learned / "text.txt")]


loaded = conftest.loaded_learned


@pytest.fixture(scope="module")
def split(loaded, text):
    return split_of(loaded.tokenizer, text, windows=SCORED, length=LENGTH, heldout=HELDOUT)


def losses(stack, ids, removed):
    return Sweep(stack, ids, NLL, batch=6).values([BlockSet(removed)], 0, len(ids))[0]


def bound(increase):
    n = len(increase)
    return increase.mean() + stats.t.ppf(0.95, n - 1) * increase.std(ddof=1) / n**0.5


@pytest.fixture(scope="module")
def bounds(loaded, text, split):
    """Greedy's order, upper bounds for its depths as plain cuts and repaired, and the tokens that
    the repairs saw."""
    aside = split.heldout
    order = sleb.search(loaded, remove=4, split=split, **SMALL).order
    fitted = split.candidate_fit(FINAL_TOKENS).ids
    dense = losses(loaded.stack, aside.ids, DENSE)
    plain, repaired = [], []
    for depth in range(1, 5):
        removed = BlockSet(order[:depth])
        plain.append(bound(losses(loaded.stack, aside.ids, removed) - dense))
        fitter = Regression(loaded.stack, removed, fitted, 6)
        for gap in gaps(removed, 6):
            fitter.fit(gap, (RIDGE,))
        repaired.append(bound(losses(loaded.stack, aside.ids, removed) - dense))
        fitter.restore()
    return order, plain, repaired, fitted.numel()


@pytest.fixture(scope="module")
def limit(bounds):
    """One that plain cuts keep at one depth less than repaired ones."""
    _, plain, repaired, _ = bounds
    assert repaired == sorted(repaired)  # else what is below says nothing
    found = [(max(repaired[d], plain[d - 1]) + plain[d]) / 2 for d in range(1, 4)]
    (first, *_) = [x for d, x in enumerate(found, 1) if max(repaired[d], plain[d - 1]) < plain[d]]
    return first


def searched(model, split, limit, **options):
    return sleb.search(model, max_loss_increase=limit, split=split, **SMALL, **options)


def test_every_depth_is_measured_after_a_quick_repair(loaded, split, bounds, limit):
    order, plain, repaired, tokens = bounds
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    plan = searched(loaded, split, limit, after_repair=True)
    kept = sum(b <= limit for b in repaired)
    assert kept > sum(b <= limit for b in plain) > 0
    assert plan.order == order[:kept]
    assert [p.bound for p in plan.curve.points] == pytest.approx(repaired[: kept + 1], abs=1e-4)
    assert plan.target.reached == pytest.approx(repaired[kept - 1], abs=1e-4)
    assert plan.curve.fitted == tokens
    assert all(torch.equal(t, before[n]) for n, t in loaded.model.state_dict().items())
    alone = searched(loaded, split, limit)
    assert alone.curve.fitted is None
    assert [p.bound for p in alone.curve.points] == pytest.approx(
        plain[: len(alone.order) + 1], abs=1e-4
    )


def test_a_search_that_was_stopped_goes_on(loaded, split, limit, monkeypatch, tmp_path):
    plan = searched(loaded, split, limit, after_repair=True)
    calls = stopped_at(monkeypatch, 3)  # the second depth's; the first is the dense model's
    journal = {"journal": tmp_path / "plan.json.journal", "after_repair": True}
    with pytest.raises(KeyboardInterrupt):
        searched(loaded, split, limit, **journal)
    assert (tmp_path / "plan.json.journal").exists()
    assert searched(loaded, split, limit, **journal) == plan
    assert len(calls) == len(set(calls)) + 1  # only what was stopped is done again
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VerificationFailed):
        searched(loaded, split, 1e-9, **journal)
    assert list(tmp_path.iterdir()) == []


def pruned(learned, out, text, limit, **options):
    sizes = {"windows": SCORED, "length": LENGTH, "heldout": HELDOUT, "repair_tokens": 16_000}
    given = {"text": text, **sizes, **SMALL, **options}
    return prune(learned / "model", out, max_loss_increase=limit, **given).plan


def test_prune_removes_more_than_a_plain_cut_could(learned, text, split, limit, tmp_path):
    plan = pruned(learned, tmp_path / "out", text, limit)
    plain = pruned(learned, tmp_path / "plain", text, limit, repair=False)
    assert len(plan.order) > len(plain.order)
    assert (plan.curve.fitted is None, plain.curve.fitted) == (False, None)
    ids = split.heldout.ids
    dense = losses(sleb.load(learned / "model", **CPU).stack, ids, DENSE)
    cut = losses(sleb.load(tmp_path / "out", **CPU).stack, ids, DENSE)
    assert plan.target.reached == pytest.approx(bound(cut - dense), abs=1e-4)
    assert plan.target.reached <= limit
    assert {path.name for path in tmp_path.iterdir()} == {"out", "plain"}  # and no journal


@pytest.mark.slow
def test_where_blocks_are_streamed_the_plain_cut_keeps_it(learned, text, limit, tmp_path):
    plan = pruned(learned, tmp_path / "out", text, limit, stream=True)
    assert plan.curve.fitted is None
    assert plan.repair is not None


@pytest.mark.slow
def test_removals_are_taken_back_until_the_whole_repair_keeps_it(
    learned, text, limit, tmp_path, monkeypatch
):
    asked, written = [], []
    real = own.write

    def reached(model, plan, fixed, aside, options):
        asked.append(plan.order)
        return 0.3 * limit if len(plan.order) == 1 else 2 * limit

    def write(*args):
        written.append(real(*args))
        return written[-1]

    monkeypatch.setattr(pipeline, "_reached", reached)
    monkeypatch.setattr(own, "write", write)
    plan = pruned(learned, tmp_path / "out", text, limit)
    assert [len(order) for order in asked] == [*range(len(asked[0]), 0, -1)]
    assert len(asked) > 1
    assert len(written) == 1  # for all of them
    assert plan.order == asked[0][:1]
    assert plan.removed == plan.repair.removed
    assert len(plan.rounds) == 1
    assert plan.target.reached == pytest.approx(0.3 * limit, abs=1e-5)


def test_if_no_removal_keeps_it_nothing_is_written(learned, text, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_reached", lambda *a: 2 * limit)
    with pytest.raises(
        VerificationFailed, match=r"alone the held-out loss rises by up to .* after"
    ):
        pruned(learned, tmp_path / "out", text, limit, repair_tokens=1000)
    assert not (tmp_path / "out").exists()


def test_all_that_were_chosen_at_once_stay_one_round(loaded, split):
    plan = sleb.search(loaded, remove=3, metric="one-shot-loss", split=split, **SMALL)
    less = plan.without_last()
    assert less.order == plan.order[:2]
    assert [r.removed for r in less.rounds] == [plan.order[:2]]
    assert less.rounds[0].scores == plan.rounds[0].scores
