"""Greedy's blocks or a run of neighbours: by what is lost after a repair, and on whose text."""

import hashlib
import weakref

import numpy as np
import pytest
import torch

import conftest
import sleb
from conftest import byte_tokenizer
from search_tools import split_of, stopped_at, toy
from sleb import pipeline
from sleb.calibration.split import SELF_GENERATED
from sleb.core.errors import InputError
from sleb.core.plan import Plan
from sleb.core.progress import silent
from sleb.pipeline import prune
from sleb.repairs import answering
from sleb.repairs import self_generated as own
from sleb.repairs.regression import Regression, gaps
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet, Objective
from sleb.selection.search import FINAL_TOKENS
from sleb.selection.strategies import GREEDY_OR_WINDOW, STRATEGIES
from sleb.selection.sweep import Sweep
from zoo import tiny

CPU = {"dtype": "float32", "device": "cpu"}
SMALL = {"windows": 6, "length": 32, "exact": True, "batch": 6}
APART = {"remove": 2, "protect": "0,3,-1"}  # 1, 2 and 4 may go: greedy takes 4, a run cannot

WEIGHTS = [9, 1, 8, 2, 3, 9]  # greedy takes 1 and 3, the best run is 3 and 4


def either(judge, candidates=range(6), n=2):
    objective = Objective(toy(WEIGHTS), 4)
    objective.final = Objective(judge, 3)
    return STRATEGIES[GREEDY_OR_WINDOW](objective, candidates, n)


def test_the_judge_decides_and_the_rounds_are_the_winners():
    run = either(toy(WEIGHTS, {(3, 4): -4}))
    assert run.order == (3, 4)
    assert [s.block for s in run.rounds[0].scores][:1] == [3]
    assert [(f.strategy, f.order, f.increase, f.excess) for f in run.finalists] == [
        ("window", (3, 4), 1, 0),
        ("greedy", (1, 3), 3, 2),
    ]
    assert run.finalists[1].excess_se == pytest.approx(0)
    single = either(toy(WEIGHTS))
    assert single.order == (1, 3)
    assert [r.removed for r in single.rounds] == [(1,), (3,)]
    assert [f.strategy for f in single.finalists] == ["greedy", "window"]


def test_without_a_judge_it_is_the_objective():
    found = STRATEGIES[GREEDY_OR_WINDOW](Objective(toy(WEIGHTS, {(3, 4): -4}), 4), range(6), 2)
    assert found.order == (3, 4)


def test_a_set_between_what_two_measures_find_may_win():
    """By texts 1, 2 and 3 go, by answers 1, 4 and 5; 1, 3 and 4 cost little by either."""
    texts, answers = [9, 0.5, 1, 1, 1.1, 5, 9], [9, 0.5, 5, 1.1, 1, 1, 9]

    def both(sets, start, stop):
        columns = [toy(texts)(sets, 0, 1), toy(answers)(sets, 0, 1)]
        return np.concatenate(columns, 1)[:, start:stop]

    objective = Objective(toy(texts), 4)
    objective.others["answers"] = Objective(toy(answers), 4)
    objective.final = Objective(both, 2)
    objective.final.kinds = {"texts": [0], "answers": [1]}
    objective.final.leaders = lambda v: sorted(range(len(v)), key=lambda i: (v[i, 0] > 3, v[i, 1]))
    found = STRATEGIES[GREEDY_OR_WINDOW](objective, range(7), 3)
    assert found.order == (1, 3, 4)
    assert found.finalists[0].strategy == "between both"
    assert found.finalists[0].by_kind == pytest.approx({"texts": 2.6, "answers": 2.6})
    assert [r.removed for r in found.rounds] == [(1,), (3,), (4,)]
    sizes = [9, 1, 1, 2, 1, 1, 9]  # 1 and 3 are enough: what stands there is of these
    objective.enough = lambda order: sum(sizes[b] for b in order) >= 3
    part = STRATEGIES[GREEDY_OR_WINDOW](objective, range(7), 3).finalists[0]
    assert part.order == (1, 3)
    assert part.by_kind == pytest.approx({"texts": 1.5, "answers": 1.6})
    objective.enough = lambda order: len(order) == 3 and {*order} != {1, 3, 4}  # misses the target
    assert set(STRATEGIES[GREEDY_OR_WINDOW](objective, range(7), 3).order) == {1, 2, 4}


def test_nothing_is_compared_where_there_is_one_set():
    def never(sets, start, stop):
        raise AssertionError

    assert either(never, [1, 3, 5]).order == (1, 3)  # no two are neighbours
    same = either(never, range(6), 1)
    assert same.order == (1,)
    assert same.finalists == ()


def test_a_run_is_as_long_as_greedy_went():
    objective = Objective(toy(WEIGHTS), 4, enough=lambda order: len(order) == 2)
    found = STRATEGIES[GREEDY_OR_WINDOW](objective, range(6), 4)
    assert [len(f.order) for f in found.finalists] == [2, 2]


def test_a_run_that_misses_the_target_is_no_rival():
    """Blocks of unlike size: without 1 and 3 enough is gone, without the run it is not."""
    sizes = [1, 3, 1, 3, 1, 1]
    objective = Objective(toy(WEIGHTS), 4, enough=lambda order: sum(sizes[b] for b in order) >= 6)
    objective.final = Objective(toy(WEIGHTS, {(3, 4): -4}), 3)
    found = STRATEGIES[GREEDY_OR_WINDOW](objective, range(6), 6)
    assert (found.order, found.finalists) == ((1, 3), ())


loaded = conftest.loaded_learned


def find(loaded, learned, **options):
    text = [str(learned / "text.txt")]
    return sleb.search(
        loaded, strategy=GREEDY_OR_WINDOW, **{**SMALL, **APART, "text": text, **options}
    )


@pytest.fixture(scope="module")
def plan(loaded, learned):
    return find(loaded, learned)


def test_it_compares_losses_after_repairs(loaded, learned, plan, monkeypatch):
    text = [str(learned / "text.txt")]
    split = split_of(loaded.tokenizer, text, windows=6)
    fitted = split.candidate_fit(FINAL_TOKENS).ids
    judges = torch.cat((split.search.ids, own.write(loaded, 8, 32, 1, silent)))
    sweep = Sweep(loaded.stack, judges, NLL, batch=6)
    dense = sweep.values([BlockSet()], 0, 14)[0].mean()
    by_hand = {}
    for final in plan.final_comparison.sets:
        fitter = Regression(loaded.stack, final.order, fitted, 6)
        for gap in gaps(final.order, 6):
            fitter.fit(gap, (0.1,))
        by_hand[final.strategy] = sweep.values([BlockSet(final.order)], 0, 14)[0].mean() - dense
        fitter.restore()
    found = {final.strategy: final.increase for final in plan.final_comparison.sets}
    assert found == pytest.approx(by_hand, abs=1e-5)
    assert set(found) == {"greedy", "window"}
    winner = min(by_hand, key=by_hand.get)
    assert plan.final_comparison.sets[0].strategy == winner
    assert plan.strategy == winner
    alone = sleb.search(loaded, strategy=winner, text=text, **SMALL, **APART)
    assert (plan.order, plan.rounds, plan.baseline) == (alone.order, alone.rounds, alone.baseline)
    assert alone.final_comparison is None
    assert (plan.final_comparison.windows, plan.final_comparison.self_generated) == (14, 8)
    assert plan.final_comparison.fitted == fitted.numel() > 8000
    assert Plan.model_validate_json(plan.to_json()) == plan


@pytest.mark.slow
def test_where_blocks_are_fetched_the_given_text_judges(learned, plan):
    streamed = find(sleb.load(learned / "model", stream=True, **CPU), learned)
    assert (streamed.final_comparison.windows, streamed.final_comparison.self_generated) == (6, 0)
    assert {f.order for f in streamed.final_comparison.sets} == {
        f.order for f in plan.final_comparison.sets
    }


def test_a_search_that_was_stopped_goes_on(loaded, learned, plan, monkeypatch, tmp_path):
    calls = stopped_at(monkeypatch, 3)
    journal = tmp_path / "plan.json.journal"
    with pytest.raises(KeyboardInterrupt):
        find(loaded, learned, journal=journal)
    assert journal.exists()
    assert find(loaded, learned, journal=journal) == plan
    kept = len(calls)
    assert find(loaded, learned, journal=journal, keep_journal=True) == plan
    assert len(calls) == 2 * kept - 3  # three calls more, as nothing was left of the search before
    assert find(loaded, learned, journal=journal) == plan
    assert len(calls) == 2 * kept - 3
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_loss_has_no_run_to_compare_with(loaded, learned):
    with pytest.raises(InputError, match="use greedy"):
        find(loaded, learned, remove=None, max_loss_increase=0.5)


def pruned(model, learned, out, **options):
    text = options.pop("text", [str(learned / "text.txt")])
    usual = {**SMALL, **APART, **CPU, "heldout": 4, "repair_tokens": 4000}
    return prune(model, out, text=text, **{**usual, **options}).plan


def test_prune_compares_where_it_repairs(learned, plan, tmp_path, tmp_path_factory, monkeypatch):
    """What is fitted on and what judges are written in one go, and are not the same, and once for
    all runs. The model is let go of before the result is loaded: both at once would take twice the
    memory."""
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path_factory.mktemp("cache")))
    written, models, alive = [], [], []
    write, load, verify = own.write, pipeline.load, pipeline.verify

    def writing(*args):
        written.append(write(*args))
        return written[-1]

    def loading(*args, **options):
        found = load(*args, **options)
        models.append(weakref.ref(found.model))
        return found

    def verifying(*args, **options):
        alive.append([model() is not None for model in models])
        return verify(*args, **options)

    monkeypatch.setattr(answering, "write", writing)
    monkeypatch.setattr(pipeline, "load", loading)
    monkeypatch.setattr(pipeline, "verify", verifying)
    ours = pruned(learned / "model", learned, tmp_path / "out")
    assert {f.order for f in ours.final_comparison.sets} == {
        f.order for f in plan.final_comparison.sets
    }
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]
    assert alive == [[False]]
    (ids,) = written
    fitted = next(s for s in ours.repair.calibration.sources if s.spec == SELF_GENERATED)
    assert (fitted.windows, ours.final_comparison.self_generated) == (len(ids) - 8, 8) == (41, 8)
    assert fitted.sha256 == hashlib.sha256(ids[:41].numpy().tobytes()).hexdigest()
    assert ours.split["repair_fit"] == ours.repair.calibration.sha256
    assert len({*ours.split.values()}) == 4
    only_fitted = pruned(learned / "model", learned, tmp_path / "greedy", strategy="greedy")
    assert only_fitted.repair is not None
    assert (only_fitted.strategy, only_fitted.final_comparison) == ("greedy", None)
    assert len(written) == 2
    assert len(written[1]) == fitted.windows
    assert pruned(learned / "model", learned, tmp_path / "again", strategy="greedy") == only_fitted
    assert len(written) == 2, "it is kept"


@pytest.mark.parametrize(
    "options",
    [
        {"repair": False},
        pytest.param({"metric": "kl"}, marks=pytest.mark.slow),
        pytest.param({"remove": None, "max_loss_increase": 9.0}, marks=pytest.mark.slow),
    ],
    ids=["repair", "metric", "limit"],
)
def test_prune_leaves_what_was_asked_for(learned, tmp_path, options):
    ours = pruned(learned / "model", learned, tmp_path / "out", **options)
    assert ours.final_comparison is None
    assert ours.strategy == "greedy"


def test_prune_is_greedy_where_nothing_can_be_repaired(learned, tmp_path):
    model, _ = tiny("openai-gpt", vocab_size=259)  # a norm behind the whole sum
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    ours = pruned(tmp_path / "model", learned, tmp_path / "out", protect="0,-1", remove=1)
    assert (ours.final_comparison, ours.repair) == (None, None)


def test_prune_is_greedy_where_no_text_is_left(learned, tmp_path):
    (tmp_path / "short.txt").write_text("the block of a model " * 10)
    text = {"text": [str(tmp_path / "short.txt")], "heldout": 0}
    ours = pruned(learned / "model", learned, tmp_path / "out", **text)
    assert (ours.final_comparison, ours.repair) == (None, None)
    assert len(ours.order) == 2
    (tmp_path / "short.txt").write_text("the block of a model " * 11)  # one window more: it judges
    ours = pruned(learned / "model", learned, tmp_path / "other", **text)
    assert (ours.final_comparison, ours.repair.heldout.windows) == (None, 1)


def test_a_runs_rival_is_another_run(loaded, learned):
    text = [str(learned / "text.txt")]
    ours = sleb.search(loaded, remove=2, strategy="window", text=text, **SMALL)
    (only,) = ours.rounds
    best, second, *_ = only.scores
    assert only.removed == ours.order[:1] == (best.block,)
    rival, margin, _ = only.runner_up()
    assert rival == second
    assert margin == pytest.approx(second.mean - best.mean)
    assert margin > 0
