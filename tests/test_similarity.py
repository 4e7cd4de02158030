"""Similarity measures against independent formulas, and their laws."""

import numpy as np
import pytest
import torch

import sleb
from sleb.selection.similarity import Similarity, Spread

MEASURE_NAMES = ["angular", "cka", "correlation", "cosine", "relative-l2"]


@pytest.fixture(scope="module")
def windows(loaded):
    return sleb.load_windows(loaded.tokenizer, (), windows=5, length=12, seed=1)[0]


@pytest.fixture(scope="module")
def states(loaded, windows):
    """Hidden states from transformers' own output, float64 [blocks + 1, windows, T, D].

    Its last entry is after the final norm, so the last block's output comes from a hook.
    """
    last = []
    hook = loaded.stack.blocks[-1].register_forward_hook(lambda m, a, out: last.append(out))
    with torch.no_grad():
        out = loaded.model(windows.ids, output_hidden_states=True, use_cache=False)
    hook.remove()
    return torch.stack([*out.hidden_states[:-1], last[0]]).double().numpy()


def by_hand(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a, b [T, D] -> per token [T], or [1] for cka; textbook formulas, one token at a time."""
    if name == "cka":
        a, b = a - a.mean(0), b - b.mean(0)
        top = np.linalg.norm(a.T @ b) ** 2
        return np.array([top / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))])
    rows = []
    for x, y in zip(a, b, strict=True):
        cosine = x @ y / np.sqrt((x @ x) * (y @ y))
        rows.append(
            {
                "cosine": cosine,
                "angular": 1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi,
                "correlation": np.corrcoef(x, y)[0, 1],
                "relative-l2": 1
                - np.sqrt(((x - y) ** 2).sum()) / (np.sqrt((x**2).sum()) + np.sqrt((y**2).sum())),
            }[name]
        )
    return np.array(rows)


@pytest.mark.parametrize("name", MEASURE_NAMES)
def test_every_pair_equals_the_formula_with_its_spread(name, loaded, windows, states):
    found = sleb.measure_similarity(loaded, windows, measure=name, batch=2)
    n = len(states)
    assert len(found.blocks) == n - 1
    for i in range(n):
        for j in range(n):
            if i == j:
                continue  # rounding of arccos near 1; tested below
            values = [by_hand(name, states[i, w], states[j, w]) for w in range(5)]
            means = np.array([v.mean() for v in values])
            spread = found.pairs[i][j]
            assert spread.mean == pytest.approx(means.mean(), abs=2e-5)
            assert spread.window_se == pytest.approx(means.std(ddof=1) / 5**0.5, abs=2e-5)
            if name == "cka":
                assert spread.token_std is None
            else:
                assert spread.token_std == pytest.approx(np.concatenate(values).std(), abs=2e-4)
    assert found.blocks[2] == found.pairs[2][3]


@pytest.mark.parametrize("name", MEASURE_NAMES)
def test_identical_states_are_one_and_order_does_not_matter(name, loaded, windows):
    found = sleb.measure_similarity(loaded, windows, measure=name)
    for i, row in enumerate(found.pairs):
        assert row[i].mean == pytest.approx(1, abs=2e-4)
        for j in range(i):
            assert row[j].mean == pytest.approx(found.pairs[j][i].mean, abs=1e-5)


def test_a_bypassed_block_is_perfectly_similar(loaded, windows):
    with sleb.bypassed(loaded.model, [3]):
        found = sleb.measure_similarity(loaded, windows)
    assert found.blocks[3].mean == pytest.approx(1, abs=1e-6)
    assert found.blocks[3].token_std == pytest.approx(0, abs=1e-3)
    assert sleb.measure_similarity(loaded, windows).blocks[3].mean < 0.99


def test_one_window_has_no_standard_error(loaded):
    one, _ = sleb.load_windows(loaded.tokenizer, (), windows=1, length=12, seed=1)
    assert sleb.measure_similarity(loaded, one).blocks[0].window_se is None


def test_auto_threshold_is_the_more_similar_half_but_at_least_twice_n():
    blocks = tuple(Spread(mean=x, token_std=0, window_se=0) for x in (0.1, 0.9, 0.8, 0.7, 0.6, 0.5))
    s = Similarity(measure="cosine", blocks=blocks, pairs=(), per_window=np.zeros((1, 6)))
    assert s.auto_threshold(range(6), 1) == 0.7
    assert s.auto_threshold(range(6), 2) == 0.6
    assert s.auto_threshold(range(6), 5) == 0.1
    assert s.auto_threshold([0, 5], 1) == 0.1
