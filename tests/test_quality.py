"""Perplexity equals transformers' own loss; intervals and pairing are right."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import reference
import sleb


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


def test_only_tokens_that_are_scored_count(loaded, windows):
    scored = torch.zeros_like(windows.ids, dtype=torch.bool)
    scored[:, 5:9] = True
    scored[1:, 12] = True
    found = sleb.evaluate(loaded, replace(windows, scored=scored), removed=(2,))
    labels = windows.ids.masked_fill(~scored, -100)
    with torch.no_grad():
        rows = [*zip(windows.ids, labels, strict=True)]
        losses = [loaded.model(i[None], labels=k[None]).loss.item() for i, k in rows]
    assert found.loss.value == pytest.approx(np.mean(losses), abs=1e-6)
    assert found.tokens == 7 * 5 - 1


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


def test_divergence_and_agreement_are_those_of_the_logits(loaded, windows):
    found = sleb.evaluate(loaded, windows, removed=(1, 4), batch=2)
    with torch.no_grad():
        dense = loaded.model(windows.ids).logits[:, :-1]
        with sleb.bypassed(loaded, (1, 4)):
            pruned = loaded.model(windows.ids, use_cache=False).logits[:, :-1]
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean(1)
    same = (dense.argmax(-1) == pruned.argmax(-1)).float().mean(1)
    assert found.divergence.value == pytest.approx(kl.mean().item(), abs=1e-6)
    assert found.agreement.value == pytest.approx(same.mean().item(), abs=1e-6)
    low, high = stats.t.interval(0.95, 6, same.mean(), stats.sem(same))
    ends = max(0.0, low), min(1.0, high)  # no share is beyond
    assert (found.agreement.low, found.agreement.high) == pytest.approx(ends, abs=1e-6)


def test_each_text_is_measured_by_itself(loaded, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"all of {name} and more of it. " * 40)
    specs = [f"{name}={tmp_path / name}.txt" for name in ("one", "two")]
    both = sleb.load_windows(loaded.tokenizer, specs, windows="all", length=20, seed=0)[0]
    found = sleb.evaluate(loaded, both, removed=(2,))
    assert list(found.domains) == ["one", "two"]
    for spec, (name, quality) in zip(specs, found.domains.items(), strict=True):
        alone = sleb.load_windows(loaded.tokenizer, [spec], windows="all", length=20, seed=0)[0]
        want = sleb.evaluate(loaded, alone, removed=(2,)).domains[name]
        assert quality.windows == len(alone.ids)
        assert quality.perplexity_ratio.value == pytest.approx(want.perplexity_ratio.value)
        assert quality.loss.low == pytest.approx(want.loss.low)
    parts = found.domains.values()
    assert found.tokens == sum(q.tokens for q in parts)
    mean = sum(q.loss.value * q.windows for q in parts) / found.windows
    assert found.loss.value == pytest.approx(mean)
