"""Choosing blocks by the loss after a repair: as by hand, only for a few, and resumable."""

import numpy as np
import pytest
import torch

import conftest
import sleb
from search_tools import split_of, stopped_at
from sleb.core.errors import InputError
from sleb.repairs import scoring
from sleb.repairs.regression import Regression, gaps
from sleb.repairs.scoring import RepairedScores
from sleb.selection import objective
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet
from sleb.selection.search import SEARCH_TOKENS
from sleb.selection.sweep import Sweep

CPU = {"dtype": "float32", "device": "cpu"}
SMALL = {"windows": 6, "length": 32, "exact": True, "batch": 6}


loaded = conftest.loaded_learned


def find(loaded, learned, **options):
    return sleb.search(
        loaded,
        metric="repaired-loss",
        **{**SMALL, "remove": 2, "text": [str(learned / "text.txt")], **options},
    )


def test_it_is_the_loss_after_a_repair(loaded, learned):
    plan = find(loaded, learned, remove=1)
    text = [str(learned / "text.txt")]
    split = split_of(loaded.tokenizer, text, windows=6)
    scored, fitted = split.search, split.candidate_fit(SEARCH_TOKENS)
    by_hand = {}
    for block in range(1, 5):
        fitter = Regression(loaded.stack, {block}, fitted.ids, 6)
        for gap in gaps({block}, 6):
            fitter.fit(gap, (0.1,))
        sweep = Sweep(loaded.stack, scored.ids, NLL, batch=6)
        by_hand[block] = float(sweep.values([BlockSet([block])], 0, 6).mean())
        fitter.restore()
    first = plan.rounds[0]
    assert {s.block: s.mean for s in first.scores} == pytest.approx(by_hand, abs=1e-4)
    assert first.removed == (min(by_hand, key=by_hand.get),)
    plain = sleb.search(loaded, remove=1, text=text, windows=6, length=32, exact=True)
    assert all(
        repaired.mean < alone.mean
        for repaired in first.scores
        for alone in plain.rounds[0].scores
        if alone.block == repaired.block
    )
    assert plan.metric == "repaired-loss"


def test_what_the_dense_model_makes_of_the_windows_is_remembered_from_set_to_set(
    loaded, monkeypatch
):
    ids = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(0))
    sets = [BlockSet({2}), BlockSet({1, 4}), BlockSet({3, 4})]

    def scored() -> tuple[np.ndarray, int, int]:
        forwards, ticks, run = [], [], loaded.stack.run
        monkeypatch.setattr(loaded.stack, "run", lambda *a: forwards.append(1) or run(*a))
        scores = RepairedScores(Sweep(loaded.stack, ids[:4], NLL, batch=4), ids[4:])
        scores.on_work(ticks.append)
        found = scores.values(sets, 0, 4)
        monkeypatch.setattr(loaded.stack, "run", run)
        return found, len(forwards), sum(ticks)

    known = scored()
    monkeypatch.setattr(scoring, "free_bytes", lambda stack: 0)
    anew = scored()
    np.testing.assert_array_equal(known[0], anew[0])
    assert known[1] < anew[1]
    assert known[2] == anew[2]


@pytest.mark.slow
def test_it_is_the_same_where_blocks_are_streamed(loaded, learned):
    ids = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(0))
    streamed = sleb.load(learned / "model", stream=True, **CPU)
    sets = [BlockSet(), BlockSet({2}), BlockSet({1, 4})]
    both = [
        RepairedScores(Sweep(model.stack, ids[:4], NLL, batch=4), ids[4:]).values(sets, 0, 4)
        for model in (loaded, streamed)
    ]
    np.testing.assert_array_equal(*both)
    plain = Sweep(streamed.stack, ids[:4], NLL, batch=4).values(sets, 0, 4)
    assert (plain[0] == both[0][0]).all()
    assert (plain[1:] != both[0][1:]).all()
    assert find(streamed, learned).order == find(loaded, learned).order


def test_only_the_best_by_plain_loss_are_fitted(loaded, learned, monkeypatch):
    monkeypatch.setattr(objective, "SHORTLIST", 2)
    asked = []
    real = RepairedScores.values

    def values(self, sets, start, stop):
        asked.extend(sets)
        return real(self, sets, start, stop)

    monkeypatch.setattr(RepairedScores, "values", values)
    plan = find(loaded, learned)
    plain = sleb.search(
        loaded, remove=1, text=[str(learned / "text.txt")], windows=6, length=32, exact=True
    )
    best = {score.block for score in plain.rounds[0].scores[:2]}
    assert {score.block for score in plan.rounds[0].scores} == best
    assert len([s for s in asked if s]) == 4


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(loaded, learned, monkeypatch, tmp_path):
    plan = find(loaded, learned)
    calls = stopped_at(monkeypatch, 6)
    journal = tmp_path / "plan.json.journal"
    with pytest.raises(KeyboardInterrupt):
        find(loaded, learned, journal=journal)
    assert journal.exists()
    again = find(loaded, learned, journal=journal)
    assert again.to_json() == plan.to_json()
    assert calls.count(calls[0]) == 1  # what was scored is not scored again
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(loaded, learned, tmp_path):
    (tmp_path / "short.txt").write_text("the block of a model " * 10)
    with pytest.raises(InputError, match="give more --text, or fewer --windows"):
        find(loaded, learned, text=[str(tmp_path / "short.txt")], windows=6)


def test_what_is_not_fitted_is_not_in_the_record():
    from sleb.selection.racing import rank

    values = np.array([[1.0, 2.0], [np.nan, np.nan], [0.5, 1.0]])
    assert [s.block for s in rank([3, 4, 5], values, 1).scores] == [5, 3]
