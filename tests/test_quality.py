"""Perplexity equals transformers' own loss; intervals and pairing are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import reference
import sleb
from sleb.quality import exponential, interval


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    return sleb.load(tiny_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def windows(loaded):
    return sleb.load_windows(loaded.tokenizer, (), windows=7, length=20, seed=2)[0]


def test_perplexity_is_the_exponential_of_transformers_own_loss(loaded, windows):
    found = sleb.evaluate(loaded, windows, batch=3)
    with torch.no_grad():
        losses = [loaded.model(w[None], labels=w[None]).loss.item() for w in windows.ids]
    assert found.loss.value == pytest.approx(np.mean(losses), abs=1e-6)
    assert found.perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert (found.windows, found.length, found.tokens) == (7, 20, 7 * 19)
    assert found.pruned_loss is None


def test_dense_and_pruned_are_paired(loaded, windows):
    found = sleb.evaluate(loaded, windows, removed=(1, 4))
    dense = reference.loss(loaded.model, (), windows.ids).numpy()
    pruned = reference.loss(loaded.model, (1, 4), windows.ids).numpy()
    difference = pruned - dense
    low, high = stats.t.interval(0.95, 6, difference.mean(), stats.sem(difference))
    assert found.loss_increase.value == pytest.approx(difference.mean(), abs=1e-6)
    assert (found.loss_increase.low, found.loss_increase.high) == pytest.approx(
        (low, high), abs=1e-5
    )
    ratio = found.perplexity_ratio
    assert (ratio.value, ratio.low) == pytest.approx((math.exp(difference.mean()), math.exp(low)))
    assert found.pruned_perplexity.value == pytest.approx(math.exp(pruned.mean()), rel=1e-6)
    assert found.removed == (1, 4)


def test_a_single_window_has_no_interval():
    one = interval(np.array([2.0]))
    assert (one.value, one.low, one.high) == (2.0, None, None)
    assert exponential(one).low is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = interval(generator.normal(3.0, 1.0, size=5))
        hits += found.low <= 3.0 <= found.high
    assert 0.93 < hits / 2000 < 0.97
