"""Intervals cover what they say, and paired comparisons know noise from change."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sleb.core.statistics import (
    Interval,
    exponential,
    flips,
    interval,
    items_to_tell,
    proportion,
    shares,
    standard_error,
)


def test_an_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 3.5])
    found = interval(values)
    want = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(want)
    assert found.value == values.mean()
    assert standard_error(values) == pytest.approx(stats.sem(values))


def test_one_value_has_no_bounds():
    found = exponential(interval(np.array([math.log(2)])))
    assert (found.value, found.low, found.high) == (pytest.approx(2), None, None)


def test_perplexity_bounds_are_the_losses():
    found = exponential(interval(np.array([1.0, 2.0, 3.0])))
    logs = interval(np.array([1.0, 2.0, 3.0]))
    assert math.log(found.low) == pytest.approx(logs.low)
    assert math.log(found.high) == pytest.approx(logs.high)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_share_lies_within_its_bounds_and_these_within_0_and_1(counts):
    found = proportion(*counts)
    assert -1e-12 <= found.low <= found.value + 1e-12
    assert found.value <= found.high + 1e-12 <= 1 + 1e-9


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_turning_a_comparison_round_turns_its_sign(pairs):
    before, after = (list(side) for side in zip(*pairs, strict=True))
    there, back = flips(before, after), flips(after, before)
    assert there.difference.value == pytest.approx(np.mean(after) - np.mean(before))
    assert back.difference.value == pytest.approx(-there.difference.value)
    assert back.difference.low == pytest.approx(-there.difference.high)
    assert (back.lost, back.won) == (there.won, there.lost)
    assert back.p_value == pytest.approx(there.p_value)
    assert there.difference.low <= there.difference.value <= there.difference.high


def test_the_same_answers_are_noise_and_many_lost_ones_are_not():
    same = flips([True, False] * 10, [True, False] * 10)
    assert (same.lost, same.won, same.p_value, same.within_noise) == (0, 0, 1.0, True)
    worse = flips([True] * 30, [True] * 20 + [False] * 10)
    assert (worse.lost, worse.won, worse.within_noise) == (10, 0, False)
    assert worse.p_value == pytest.approx(2 * 0.5**10)
    assert worse.difference.high < 0


def test_a_point_on_five_hundred_items_is_noise():
    before = [True] * 250 + [False] * 250
    after = [*[True] * 225, *[False] * 25, *[True] * 20, *[False] * 230]
    found = flips(before, after)
    assert found.difference.value == pytest.approx(-0.01)
    assert found.within_noise


@pytest.mark.parametrize(("lose", "win"), [(0.05, 0.02), (0.3, 0.3), (0.01, 0.01)])
def test_intervals_of_a_difference_cover_it(lose, win):
    """Of 800 samples of 150 items about 95 % of the intervals hold the true difference."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(800):
        draw = generator.random(150)
        lost, won = draw < lose, draw > 1 - win
        before = lost | (~won & (draw < 0.6))
        found = flips(before.tolist(), ((before & ~lost) | won).tolist()).difference
        held += found.low <= win - lose <= found.high
    assert 0.93 < held / 800 < 0.995


def test_the_interval_ends_at_the_limit_with_so_many_items():
    values = np.random.default_rng(0).normal(0.5, 0.2, 40)
    found = interval(values)
    for limit in (0.45, 0.53, 0.56):
        needed = items_to_tell(found, limit, 40)
        half = (found.high - found.low) / 2 * (40 / needed) ** 0.5
        assert half == pytest.approx(abs(limit - found.value), rel=0.1)
    for right, limit in ((0, 0.05), (90, 0.8), (50, 0.6)):
        needed = items_to_tell(proportion(right, 100), limit, 100)
        for items in (needed - 1, needed + 1):
            z, p = 1.959964, right / 100  # Wilson's interval, also of what is no whole count
            half = z * (p * (1 - p) / items + z * z / (4 * items * items)) ** 0.5
            ends = [(p + z * z / (2 * items) + s * half) / (1 + z * z / items) for s in (-1, 1)]
            assert (ends[0] <= limit <= ends[1]) == (items < needed)
    assert items_to_tell(found, found.value, 40) is None


def test_answers_alike_are_told_from_a_limit_by_the_interval_that_they_have():
    """Of answers that are kept in full so many, and the interval ends at the limit."""
    found = shares(np.ones(6))
    needed = items_to_tell(found, 0.93, 6)
    assert shares(np.ones(needed)).low >= 0.93 > shares(np.ones(needed - 1)).low
    of_prompts = items_to_tell(proportion(17, 20), 0.7, 50)  # a share of 20 of 50 prompts
    of_them = items_to_tell(proportion(17, 20), 0.7, 20)
    assert of_prompts == pytest.approx(2.5 * of_them, abs=3)


def test_no_interval_is_beyond_what_is_possible():
    counts = np.array([0.0, 0.0, 1.0, 5.0])
    free, found = interval(counts), interval(counts, 0.0, 5.0)
    assert free.low < 0
    assert free.high > 5
    assert found == Interval(value=1.5, low=0.0, high=min(free.high, 5.0))
    assert interval(counts, -9.0, 9.0) == free
    assert interval(np.full(3, -1e-9), 0.0).low == pytest.approx(0, abs=1e-8)  # by rounding
    found = interval(counts, 0.0, 9.0)
    assert items_to_tell(found, 0.2, 4) == items_to_tell(free, 0.2, 4)  # as if it were not clipped
    assert items_to_tell(interval(1 - counts / 9, 0.0, 1.0), 0.95, 4) == items_to_tell(
        interval(1 - counts / 9), 0.95, 4
    )


def test_an_interval_that_holds_what_means_no_change_is_noise():
    found = Interval(value=1.2, low=1.0, high=1.5)
    assert [found.holds(x) for x in (0.99, 1.0, 1.5, 1.51)] == [False, True, True, False]
    assert Interval(value=9.0, low=None, high=None).holds(1.0)


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_what_is_not_paired_is_refused(before, after):
    with pytest.raises(ValueError, match="before"):
        flips(before, after)


def test_shares_that_are_all_alike_are_no_proof():
    """The ends are those of as many answers that are right or wrong; else Student's, in 0..1."""
    alike = shares(np.ones(6))
    right = proportion(6, 6)
    assert (alike.value, alike.low) == (1.0, pytest.approx(right.low, abs=1e-6))
    assert alike.high == pytest.approx(right.high)
    assert 0 < shares(np.full(6, 0.5)).low < 0.5 < shares(np.full(6, 0.5)).high < 1
    values = np.array([1.0, 1.0, 0.9, 1.0])
    assert (shares(values).low, shares(values).high) == (interval(values).low, 1.0)
    assert shares(np.ones(1)).low is None
