"""Strategies and racing on toy objectives with known optima; no model, no torch."""

from itertools import combinations

import numpy as np
import pytest

from search_tools import toy
from sleb.core.errors import InputError
from sleb.selection.objective import BlockSet, Objective
from sleb.selection.racing import ERROR, Race, leaders, rank
from sleb.selection.strategies import BEAM, STRATEGIES, greedy_or_window

WEIGHTS = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def optimum(score, blocks, n):
    return min(combinations(blocks, n), key=lambda s: score([BlockSet(s)], 0, 1)[0, 0])


def test_greedy_follows_interactions_and_one_shot_does_not():
    objective = Objective(toy([5, 1, 2, 3, 4], {(1, 2): 10}), 4)
    assert STRATEGIES["greedy"](objective, range(5), 2).order == (1, 3)
    assert STRATEGIES["one-shot"](objective, range(5), 2).order == (1, 2)


def test_window_finds_the_best_run_of_neighbours():
    objective = Objective(toy([9, 1, 8, 2, 3, 9]), 4)
    found = STRATEGIES["window"](objective, range(6), 2)
    assert found.order == (3, 4)
    assert [s.block for s in found.rounds[0].scores][:1] == [3]
    assert STRATEGIES["window"](objective, [0, 1, 2, 4, 5], 3).order == (0, 1, 2)
    with pytest.raises(InputError, match="no 3 neighbouring blocks are all candidates"):
        STRATEGIES["window"](objective, [0, 1, 3, 4], 3)


def test_beam_and_refine_find_an_optimum_that_greedy_misses():
    # block 1 looks best alone, but only 2 and 3 together are nearly free
    score = toy(WEIGHTS, {(2, 3): -4.5})
    best = optimum(score, range(8), 2)
    assert best == (2, 3)
    assert set(STRATEGIES["greedy"](Objective(score, 4), range(8), 2).order) == {1, 2}
    assert set(STRATEGIES["beam"](Objective(score, 4), range(8), 2).order) == {2, 3}
    assert set(STRATEGIES["refine"](Objective(score, 4), range(8), 2).order) == {2, 3}


@pytest.mark.parametrize("seed", range(20))
def test_beam_and_refine_are_never_worse_than_greedy(seed):
    draw = np.random.default_rng(seed)
    pairs = {pair: draw.normal(0, 3) for pair in combinations(range(8), 2)}
    score = toy(draw.uniform(1, 5, 8), pairs)

    def value(name):
        order = STRATEGIES[name](Objective(score, 2), range(8), 4).order
        assert len(set(order)) == 4
        return score([BlockSet(order)], 0, 1)[0, 0]

    best = score([BlockSet(optimum(score, range(8), 4))], 0, 1)[0, 0]
    assert best - 1e-9 <= value("refine") <= value("greedy")
    assert best - 1e-9 <= value("beam")


def test_beams_plan_is_a_path_whose_rounds_justify_it():
    score = toy(WEIGHTS, {(2, 3): -4.5, (3, 5): -2})
    found = STRATEGIES["beam"](Objective(score, 4), range(8), 3)
    assert [r.removed for r in found.rounds] == [(b,) for b in found.order]
    for i, r in enumerate(found.rounds):
        want = score([BlockSet([*found.order[:i], found.order[i]])], 0, 4)[0].mean()
        assert next(s.mean for s in r.scores if s.block == found.order[i]) == pytest.approx(want)


def test_beams_width_is_respected():
    asked = []

    def score(sets, start, stop):
        asked.append(len(sets))
        return toy(WEIGHTS)(sets, start, stop)

    STRATEGIES["beam"](Objective(score, 2), range(8), 3)
    assert asked[0] == 8 + 1  # and the dense model
    assert all(n <= BEAM * 7 for n in asked[1:])


def noisy(means, noise, windows, seed):
    """Scores with a difficulty per window that all share, and noise of their own."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(0, 1, windows)
    table = np.asarray(means)[:, None] + shared + draw.normal(0, noise, (len(means), windows))

    def score(sets, start, stop):
        return np.array([(table[min(s)] if s else shared)[start:stop] for s in sets])

    return table, score


def test_racing_does_a_fraction_of_the_work_and_finds_the_same_winner():
    work = wrong = 0
    for seed in range(40):
        table, score = noisy(np.linspace(0, 1, 28), 0.1, 128, seed)
        values = Objective(score, 128, exact=False).best([BlockSet([i]) for i in range(28)])
        work += np.isfinite(values).sum()
        wrong += rank(range(28), values, 1).removed[0] != table.mean(1).argmin()
    assert work / (40 * 28 * 128) < 0.12
    assert wrong <= 1


@pytest.mark.slow
def test_the_error_of_a_race_is_within_what_it_states():
    """All but equal candidates are the hardest case: the best of them must hardly ever be lost."""
    lost = 0
    for seed in range(400):
        table, score = noisy([0.0] * 6, 0.3, 48, seed)
        values = Objective(score, 48, exact=False).best([BlockSet([i]) for i in range(6)])
        lost += leaders(values)[0] != table.mean(1).argmin()
    assert lost / 400 <= ERROR


@pytest.mark.slow
def test_the_round_before_saves_windows_and_is_no_riskier():
    """Guides that tell most of what the windows hold make a race shorter; guides of noise do not
    make it wrong."""
    work, lost = {"none": 0, "good": 0, "noise": 0}, 0
    for seed in range(150):
        table, score = noisy(np.linspace(0, 0.3, 12), 0.2, 96, seed)
        draw = np.random.default_rng(seed + 1000)
        before = {
            "good": table + draw.normal(0, 0.05, table.shape),
            "noise": draw.normal(0, 1, table.shape),
        }
        for kind in work:

            def both(sets, start, stop, kind=kind, score=score, before=before):
                old = [before[kind][min(s) - 100, start:stop] for s in sets if s and min(s) >= 100]
                return np.array(old) if old else score(sets, start, stop)

            objective = Objective(both, 96, exact=False)
            guides = [BlockSet([100 + i]) for i in range(12)] if kind != "none" else []
            if guides:
                objective.scores(guides)
            values = objective.best([BlockSet([i]) for i in range(12)], guides=guides)
            work[kind] += np.isfinite(values).sum()
            lost += leaders(values)[0] != table.mean(1).argmin()
    assert work["good"] < 0.75 * work["none"]
    assert work["noise"] < 1.1 * work["none"]
    assert lost / 450 <= ERROR


def test_a_guide_known_in_part_is_used_as_far_as_it_goes():
    table, _ = noisy([0.0, 0.5], 0.2, 40, 0)
    guide = table.copy()
    guide[1, 12:] = np.nan
    # the guide is the table itself, so what it adds is exact: the mean of 12 windows, seen on 4
    excess, error = Race(2, 40, 1, guide)._excess(table[:, :4], 0)
    assert excess[1] == pytest.approx((table[1, :12] - table[0, :12]).mean())
    _, alone = Race(2, 40, 1)._excess(table[:, :4], 0)
    assert 0 < error[1] < alone[1]


def test_looks_are_less_than_independent():
    from sleb.selection.racing import _independent_looks, _prefixes

    looks = _prefixes(128)
    assert looks[0] == 4
    assert looks[-1] == 128
    assert 2 < _independent_looks(looks, 0.001) < len(looks) - 3
    assert _independent_looks([4], 0.001) == 1.0


def test_a_winner_alone_is_scored_no_further_but_the_final_set_and_the_dense_model_are():
    table, score = noisy([0.0, 1.0, 2.0, 3.0, 4.0], 0.02, 64, 0)
    work = 0

    def sums(sets, start, stop):
        nonlocal work
        work += len(sets) * (stop - start)
        shared = score([BlockSet()], start, stop)[0]
        return np.array([shared + sum(table[b][start:stop] - shared for b in s) for s in sets])

    found = STRATEGIES["greedy"](Objective(sums, 64, exact=False), [0, 1, 2, 3, 4], 3)
    assert found.order == (0, 1, 2)
    first, second, last = (r.scores[0] for r in found.rounds)
    assert first.windows == second.windows == 4  # enough to tell such blocks apart
    assert last.windows == len(found.dense) == 64
    assert work < 4 * (5 + 4 + 3 + 3) + 2 * 64
    whole = sums([BlockSet({0}), BlockSet({0, 1}), BlockSet({0, 1, 2})], 0, 64).mean(1)
    # four windows' own means would be off by much more: windows differ by 1
    assert [first.mean, second.mean] == pytest.approx(whole[:2], abs=0.05)
    assert abs(score([BlockSet()], 0, 4).mean() - found.dense.mean()) > 0.1
    assert last.mean == pytest.approx(whole[2], abs=1e-6)
    assert first.se > last.se * 0.9


def test_the_k_best_are_scored_on_every_window():
    table, score = noisy(np.linspace(0, 2, 20), 0.05, 64, 0)
    values = Objective(score, 64, exact=False).best([BlockSet([i]) for i in range(20)], k=3)
    assert np.isfinite(values[:3]).all()
    assert np.isnan(values[10:]).any(1).all()
    seen = np.isfinite(values)
    assert np.array_equal(values[seen], table[seen])


def test_an_early_loser_is_estimated_through_the_windows_that_both_saw():
    table, score = noisy(np.linspace(0, 2, 20), 0.05, 64, 3)
    values = Objective(score, 64, exact=False).best([BlockSet([i]) for i in range(20)])
    for s in rank(range(20), values, 1, score([BlockSet()], 0, 64)[0]).scores:
        assert s.mean == pytest.approx(table[s.block].mean(), abs=0.15)
        assert s.windows == np.isfinite(values[s.block]).sum()
        assert s.se > 0


def test_a_round_says_whether_its_choice_is_within_noise():
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.1, (3, 40))
    clear = rank([0, 1, 2], np.array([[1.0], [1.5], [2.0]]) + noise, 1)
    assert clear.within_noise is False
    assert rank([0, 1, 2], np.array([[1.0], [1.001], [2.0]]) + noise, 1).within_noise is True
    assert clear.choosing(0, 1).within_noise is False
    assert clear.choosing(0, 1, 2).within_noise is None
    assert rank([0, 1], np.array([[1.0], [9.0]]), 1).within_noise is True  # one window: unknown


def test_few_windows_are_all_scored():
    race = Race(5, 4, 1)
    assert list(race.looks()) == [4]
    assert list(Race(5, 1, 1).looks()) == [1]


def test_no_look_leaves_the_device_idle():
    """At least a batch of new windows per look, more of them as candidates leave."""
    race, seen = Race(20, 128, 1), []
    for windows in race.looks(lambda live: 100 // live):
        seen.append(windows)
        race.live = race.live[: len(race.live) // 2]
    assert seen == [5, 16, 40, 99]
    assert list(Race(20, 128, 1).looks(lambda live: 1)) == list(Race(20, 128, 1).looks())


def test_an_exact_objective_does_not_race():
    table, score = noisy(np.linspace(0, 9, 5), 0.01, 32, 0)
    values = Objective(score, 32, exact=True).best([BlockSet([i]) for i in range(5)])
    assert np.array_equal(values, table)


def test_others_suggest_sets_for_the_final_comparison():
    """What another objective finds is compared too, by the final scores, and told by its name."""
    weights = {"": [9, 1, 1, 9, 9, 9], "answers": [9, 9, 9, 9, 1, 1]}

    def scored(costs):
        return Objective(
            lambda sets, a, b: np.array(
                [[sum(costs[i] for i in s)] * (b - a) for s in sets], dtype=float
            ),
            2,
        )

    objective = scored(weights[""])
    objective.others["answers"] = scored(weights["answers"])
    objective.final = scored([9, 5, 5, 9, 2, 2])
    found = greedy_or_window(objective, range(6), 2)
    assert set(found.order) == {4, 5}
    assert found.finalists[0].strategy == "greedy on answers"
    assert {frozenset(f.order) for f in found.finalists} == {frozenset({1, 2}), frozenset({4, 5})}
