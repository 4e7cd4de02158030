"""The search selects exactly what the published algorithm selects, with the same scores."""

from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reference
import sleb
from conftest import BLOCKS, tiny_llama
from search_tools import split_of, toy
from sleb.calibration.split import CalibrationSplit
from sleb.core.errors import InputError
from sleb.models.stack import BlockStack
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet, Objective, ScoreCache, Scorer
from sleb.selection.racing import rank
from sleb.selection.resources import on_threads
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep, block_forwards

CPU = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def windows(loaded):
    return split_of(loaded.tokenizer, (), windows=6, length=24, seed=3).search


@pytest.mark.parametrize(
    ("metric", "score"), [("loss", reference.loss), ("kl", reference.divergence)]
)
def test_order_and_scores_are_those_of_the_published_algorithm(loaded, windows, metric, score):
    plan = sleb.search(
        loaded,
        remove=4,
        metric=metric,
        exact=True,
        split=CalibrationSplit(search=windows),
        protect="",
    )
    order, rounds = reference.greedy(loaded.model, windows.ids, 4, score)
    assert list(plan.order) == order
    for got, want in zip(plan.rounds, rounds, strict=True):
        assert {s.block: s.mean for s in got.scores} == pytest.approx(want, abs=2e-6)


def test_one_shot_loss_is_the_first_round_alone(loaded, windows):
    plan = sleb.search(
        loaded, remove=3, metric="one-shot-loss", split=CalibrationSplit(search=windows), protect=""
    )
    _, (scores,) = reference.greedy(loaded.model, windows.ids, 1)
    assert list(plan.order) == sorted(scores, key=scores.__getitem__)[:3]
    assert len(plan.rounds) == 1


def test_cosine_ranks_by_the_angle_between_input_and_output(loaded, windows):
    plan = sleb.search(
        loaded, remove=2, metric="cosine", split=CalibrationSplit(search=windows), protect=""
    )
    hidden = []
    hooks = [
        b.register_forward_hook(
            lambda m, a, k, out: hidden.append((a[0] if a else k["hidden_states"], out)),
            with_kwargs=True,
        )
        for b in reference.blocks_of(loaded.model)
    ]
    with torch.no_grad():
        loaded.model(input_ids=windows.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    similarity = torch.nn.functional.cosine_similarity
    want = {i: 1 - similarity(a, b, dim=-1).mean().item() for i, (a, b) in enumerate(hidden)}
    assert {s.block: s.mean for s in plan.rounds[0].scores} == pytest.approx(want, abs=2e-6)
    assert list(plan.order) == sorted(want, key=want.__getitem__)[:2]


def test_protected_blocks_stay_and_are_not_scored(loaded, windows):
    plan = sleb.search(loaded, remove=2, split=CalibrationSplit(search=windows), protect="0,2-3,-1")
    assert {s.block for s in plan.rounds[0].scores} == {1, 4}
    assert plan.removed == (1, 4)
    assert plan.protected == (0, 2, 3, 5)


def test_first_and_last_are_protected_by_default_and_too_many_is_refused(loaded, windows):
    assert sleb.search(loaded, remove=1, split=CalibrationSplit(search=windows)).protected == (
        0,
        BLOCKS - 1,
    )
    with pytest.raises(InputError, match="cannot remove 5 of 4 candidates"):
        sleb.search(loaded, remove=5, split=CalibrationSplit(search=windows))


def test_same_seed_same_plan_and_any_batch_size_the_same_order(tiny_dir):
    def run(batch, seed):
        return sleb.search(tiny_dir, remove=3, windows=6, length=16, seed=seed, batch=batch, **CPU)

    first = run(2, 0)
    assert run(2, 0).to_json() == first.to_json()
    assert run(4, 0).order == first.order
    assert run(2, 1).calibration.sha256 != first.calibration.sha256


def test_dense_baseline_is_the_models_own_loss(loaded, windows):
    plan = sleb.search(loaded, remove=1, split=CalibrationSplit(search=windows))
    want = reference.loss(loaded.model, (), windows.ids)
    assert plan.baseline.mean == pytest.approx(want.mean().item(), abs=2e-6)
    assert plan.baseline.se == pytest.approx(want.std().item() / 6**0.5, abs=2e-6)


def test_a_sweep_equals_separate_passes_and_does_the_work_that_it_says():
    model = tiny_llama(seed=5)
    ids = torch.randint(3, 259, (5, 20), generator=torch.Generator().manual_seed(0))
    sets = [
        BlockSet(),
        BlockSet({0}),
        BlockSet({5}),
        BlockSet({1, 2}),
        BlockSet({1, 4}),
        BlockSet(range(6)),
    ]
    sweep = Sweep(BlockStack(model), ids, NLL, batch=2)
    got = sweep.scores(sets, 0, 5)
    for blocks, row in zip(sets, got, strict=True):
        torch.testing.assert_close(row, reference.loss(model, blocks, ids), rtol=0, atol=2e-6)
    assert sweep.forwards == 5 * block_forwards(sets, 6)


def test_a_greedy_round_costs_half_of_separate_passes():
    """The regression test of the engine's work: block forwards, not seconds."""
    n = 30
    first = [BlockSet({b}) for b in range(1, n - 1)]
    shared, separate = block_forwards(first, n), len(first) * (n - 1)
    assert shared == 435 - 1
    assert shared <= 0.54 * separate


def test_out_of_memory_halves_the_batch_and_gives_the_same_scores():
    model = tiny_llama()
    ids = torch.randint(3, 259, (6, 8), generator=torch.Generator().manual_seed(1))
    stack = BlockStack(model)
    want = Sweep(stack, ids, NLL, batch=1).scores([BlockSet({1})], 0, 6)
    sweep = Sweep(stack, ids, NLL, batch=4)
    real, limit = stack.run, 1

    def run(i, hidden, call):
        if hidden.shape[0] > limit:
            raise torch.OutOfMemoryError("pretend")
        return real(i, hidden, call)

    stack.run = run
    torch.testing.assert_close(sweep.scores([BlockSet({1})], 0, 6), want, rtol=0, atol=1e-6)
    assert sweep.batch == 1


def test_ties_go_to_the_lower_block():
    assert rank([7, 3, 5], np.ones((3, 2)), 2).removed == (3, 5)


def test_standard_errors_are_paired():
    values = np.array([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])
    first, second = rank([0, 1], values, 1).scores
    assert first.se == pytest.approx(2 / 3**0.5, abs=1e-6)
    assert second.excess_se == pytest.approx(0)  # always exactly one more: no doubt at all
    assert first.excess_se == 0
    lone = rank([0, 1], values[:, :1], 1).scores[0]
    assert (lone.se, lone.excess_se) == (None, None)


def test_an_objective_computes_nothing_twice():
    asked = []

    def score(sets, start, stop):
        asked.extend((s, start) for s in sets)
        return toy([1, 2, 3])(sets, start, stop)

    objective = Objective(Scorer(values=score, step=lambda sets: 2), 5)
    sets = [BlockSet({0}), BlockSet({1}), BlockSet({0})]
    once = objective.scores(sets)
    assert np.array_equal(objective.scores(sets), once)
    assert len(asked) == len(set(asked)) == 6


@pytest.mark.parametrize("exact", [True, False])
def test_a_search_killed_anywhere_resumes_to_the_identical_result(tmp_path, exact):
    """Whatever the sweep at which it stops, and even if the last line was torn."""
    weights, pairs = [9, 4, 3, 5, 2, 6, 7], {(4, 2): 8, (1, 3): -6}

    def run(path, fail_after=None, torn=False):
        calls = [0]

        def score(sets, start, stop):
            if calls[0] == fail_after:
                raise KeyboardInterrupt
            calls[0] += 1
            return toy(weights, pairs)(sets, start, stop)

        try:
            with ScoreCache(path, {}) as cache:
                scorer = Scorer(values=score, step=lambda sets: 2)
                objective = Objective(scorer, 5, cache=cache, exact=exact)
                found = STRATEGIES["greedy"](objective, range(7), 4)
        except KeyboardInterrupt:
            if torn:
                path.write_bytes(path.read_bytes()[:-9])
            raise
        return found, calls[0]

    whole, total = run(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    assert total == 12 if exact else total >= 8  # 4 rounds, 3 sweeps each, or a race's looks
    for stop in range(total):
        path = tmp_path / f"journal{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(path, stop, torn=stop % 2 == 1)
        resumed, rest = run(path)
        assert resumed.order == whole.order
        assert resumed.rounds == whole.rounds
        assert rest == total - stop + (stop % 2)  # only what was not yet on disk


def test_scores_of_another_search_or_kind_are_not_used(tmp_path):
    def known(seed, kind):
        with ScoreCache(tmp_path / "j", {"seed": seed}, keep=True) as cache:
            return cache.replay(kind)

    with ScoreCache(tmp_path / "j", {"seed": 1}, keep=True) as cache:
        cache.append("loss", [BlockSet({1})], 0, np.ones((1, 2)))
        cache.append("repaired", [BlockSet({2})], 4, np.zeros((1, 2)))
    ((sets, start, values),) = known(1, "repaired")
    assert (sets, start, values.tolist()) == ([BlockSet({2})], 4, [[0.0, 0.0]])
    assert known(1, "another") == []
    assert known(2, "loss") == []
    (tmp_path / "j").write_text("not json\n")
    assert known(2, "loss") == []
    assert not (tmp_path / "j").exists()  # of nothing scored nothing is kept


def test_scores_of_other_settings_wait_for_these(tmp_path):
    """Whatever is searched in between, interrupted or not, and what is there is said."""
    journal = tmp_path / "plan.json.journal"

    def scored(seed, sets=(), done=False):
        said, display = [], SimpleNamespace(tell=lambda text: said.append(text))
        with suppress(KeyboardInterrupt), ScoreCache(journal, {"seed": seed, "exact": True}) as c:
            c.tell(display)
            known = len(c.replay("loss"))
            for blocks in sets:
                c.append("loss", [BlockSet(blocks)], 0, np.ones((1, 2)))
            if not done:
                raise KeyboardInterrupt
        return known, said

    assert scored(1, [{1}, {2}, {3}]) == (0, [])
    known, (said,) = scored(2, [{1}])
    (aside,) = set(tmp_path.iterdir()) - {journal}
    assert known == 0
    assert said.startswith(f"{journal} has 3 scores of other settings (seed: 2, was 1): kept as")
    assert str(aside) in said
    known, (first, second) = scored(1, done=True)
    assert known == 3
    assert "seed: 1, was 2" in first
    assert second == f"going on from {journal}, which has 3 scores of before"
    assert not journal.exists()
    assert scored(2, done=True)[0] == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [1, 3, 8])
def test_each_round_moves_its_bar_to_the_end_whatever_a_race_saves(left):
    """``left``: candidates that are not clearly worse."""
    stages = []

    class Bars:
        @contextmanager
        def stage(self, title, total):
            stages.append([title, total, 0])

            def tick(n=1, note=""):
                assert n >= 0
                stages[-1][2] += n

            yield tick

    noise = np.random.default_rng(0).normal(0, 0.01, (8, 40))
    told = []

    def score(sets, start, stop):
        for _ in sets:
            told[0](stop - start)
        rows = [sorted(s)[-1] if s else 9 for s in sets]
        return np.array([(0 if r < left else 5) + noise[r % 8, start:stop] for r in rows])

    scorer = Scorer(values=score, on_work=lambda tick: told.__setitem__(slice(None), [tick]))
    for exact in (True, False):
        objective = Objective(scorer, 40, progress=Bars(), title="here", exact=exact)
        objective.best([BlockSet({b}) for b in range(8)])
    assert stages == [["here", 9 * 40, 9 * 40]] * 2


def test_threads_are_put_back():
    before = torch.get_num_threads()
    for threads in (before + 1, None):
        with on_threads(threads):
            assert torch.get_num_threads() == (threads or before)
    assert torch.get_num_threads() == before


def test_similarity_threshold_limits_the_candidates(loaded, windows):
    values = [b.mean for b in sleb.measure_similarity(loaded, windows).blocks]
    middle = sorted(values[1:5])[2]
    plan = sleb.search(
        loaded, remove=1, split=CalibrationSplit(search=windows), min_similarity=middle
    )
    allowed = {b for b in range(1, 5) if values[b] >= middle}
    assert {s.block for s in plan.rounds[0].scores} == allowed == set(plan.similarity.candidates)
    with pytest.raises(InputError, match=r"leaves 0 candidates for 2 removals; at most"):
        sleb.search(loaded, remove=2, split=CalibrationSplit(search=windows), min_similarity=1.5)
    with pytest.raises(InputError, match="neither a number nor auto"):
        sleb.search(loaded, remove=2, split=CalibrationSplit(search=windows), min_similarity="high")
    with pytest.raises(InputError, match="neither a number nor auto"):  # before any model is read
        sleb.search("nowhere", remove=2, min_similarity="high")
    auto = sleb.search(
        loaded, remove=1, split=CalibrationSplit(search=windows), min_similarity="auto"
    )
    assert len(auto.similarity.candidates) == 2


def test_windows_longer_than_the_model_reads_are_refused(loaded):
    with pytest.raises(
        InputError, match="300 tokens are longer than the 256 that LlamaForCausalLM"
    ):
        sleb.search(loaded, remove=1, windows=1, length=300)


def test_bypassed_generation_is_right_or_refused():
    model = tiny_llama(seed=2)
    ids = torch.randint(3, 259, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with sleb.bypassed(model, [2, 4]):
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    with sleb.bypassed(model, [0]):
        model(ids)  # a plain pass is right, though it fills a cache
        model.generate(ids, use_cache=False, **options)
        with pytest.raises(InputError, match="block 0 is bypassed, and generating with a cache"):
            model.generate(ids, use_cache=True, **options)


def test_racing_on_a_model_finds_what_the_exact_search_finds(tiny_dir):
    options = {"remove": 3, "windows": 24, "length": 16, "batch": 4, **CPU}
    exact = sleb.search(tiny_dir, **options)
    raced = sleb.search(tiny_dir, exact=False, **options)
    assert raced.order == exact.order
    assert (raced.strategy, raced.racing, raced.compiled) == ("greedy", True, False)
    winner, last = raced.rounds[0].scores[0], raced.rounds[-1].scores[0]
    assert winner.windows < 24 == last.windows
    assert winner.mean == pytest.approx(exact.rounds[0].scores[0].mean, abs=3 * winner.se)
    assert last.mean == pytest.approx(exact.rounds[-1].scores[0].mean, abs=1e-5)
    again = sleb.search(tiny_dir, exact=False, **options)
    assert again.to_json() == raced.to_json()


def test_mistakes_are_found_before_weights_are_read(tiny_dir, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sleb.repairs.search.load", load)
    monkeypatch.setattr("sleb.pipeline.load", load)
    for options, message in (
        ({"remove": 9}, "is 9 of the model's 6 blocks"),
        ({"remove": 5}, "cannot remove 5 of 4 candidates"),
        ({"remove": 1, "protect": "7"}, "outside the model's blocks"),
        ({"remove": 1, "text": ["none.txt"]}, "no file none.txt"),
        ({"remove": 1, "text": ["a.docx"]}, "is no text that sleb reads"),
    ):
        with pytest.raises(InputError, match=message):
            sleb.search(tiny_dir, **options)
        with pytest.raises(InputError, match=message):
            sleb.prune(tiny_dir, tmp_path / "out", **options)
