"""Plans of each text and of all: fair searches, costs on text that none saw, and which to use."""

from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

import reference
import sleb
import sleb.evaluation.transfer as module
from sleb.config import TransferConfig
from sleb.core.errors import InputError
from sleb.evaluation.transfer import Transfer, check_transfer, clearly_worse, transfer
from text_tools import letters

SMALL = {"windows": 6, "length": 20}


@pytest.fixture
def texts(write):
    """Three texts of 64 kinds of window each, of which no two are alike."""
    write("mail.txt", "".join(f"Dear {i:03d}, thank" for i in range(70)))
    write("code.txt", "".join(f"x[{i:03d}]=f({i:03d});{{}};" for i in range(70)))
    write("sums.txt", letters(1280, 5000))
    return ["mail.txt", "prog=code.txt", "sums.txt"]


@pytest.fixture
def searched(monkeypatch):
    """Every search that is made: name of its stage, its windows, its plan."""
    calls = []

    def spy(model, config, *, split, progress):
        plan = sleb.search(model, config, split=split)
        calls.append((progress.name, split.search, plan))
        return plan

    monkeypatch.setattr(module, "search", spy)
    return calls


def rows(windows):
    return {tuple(row) for row in windows.ids.tolist()}


def test_each_plan_is_the_search_on_the_same_text(loaded, texts):
    found = transfer(loaded, text=texts, remove=2, heldout=3, **SMALL)
    assert found.domains == ("mail", "prog", "sums")
    assert [plan.source for plan in found.plans] == ["mail", "prog", "sums", "mix"]
    for plan, text in zip(found.plans, [*([spec] for spec in texts), texts], strict=True):
        assert plan.removed == sleb.search(loaded, text=text, remove=2, **SMALL).removed
    assert (found.windows, found.heldout, found.length) == (6, (3, 3, 3), 20)


def test_searches_are_equal_in_windows_and_see_nothing_held_out(
    loaded, texts, searched, monkeypatch
):
    aside = []

    def costs(model, plans, held, config, progress):
        aside.extend(held)
        return [np.ones((4, 5))] * 3

    monkeypatch.setattr(module, "_costs", costs)
    weighted = [f"{texts[0]}@4", *texts[1:]]
    transfer(loaded, text=weighted, remove=1, heldout=5, **SMALL)
    assert [name for name, _, _ in searched] == ["mail", "prog", "sums", "mix"]
    assert [len(windows.ids) for _, windows, _ in searched] == [6] * 4
    *own, mix = [windows for _, windows, _ in searched]
    assert [mix.source.count(i) for i in range(3)] == [4, 1, 1]  # weights shape the mix alone
    assert rows(mix) < set.union(*map(rows, own))
    assert [len(rows(held)) for held in aside] == [5] * 3
    assert not set.union(*map(rows, aside)) & set.union(*map(rows, own))


def test_costs_are_paired_increases_on_each_texts_own_windows(loaded, texts):
    found = transfer(loaded, text=texts, remove=2, heldout=4, **SMALL)
    model = loaded.model
    for i, spec in enumerate(texts):
        held = sleb.load_windows(loaded.tokenizer, [spec], **SMALL, seed=0, heldout=4)[1].ids
        dense = reference.loss(model, (), held).numpy()
        for plan in found.plans:
            gap = reference.loss(model, plan.removed, held).numpy() - dense
            low, high = stats.t.interval(0.95, 3, gap.mean(), stats.sem(gap))
            seen = plan.increase[i]
            assert (seen.value, seen.low, seen.high) == pytest.approx(
                (gap.mean(), low, high), abs=1e-5
            )


@pytest.mark.parametrize(
    ("windows", "heldout", "scored", "held"),
    [
        (200, 16, 32, (16, 16)),  # enough of both
        (200, 48, 32, (48, 48)),
        (40, 16, 24, (16, 16)),  # the shorter text sets the number for all
        (20, 16, 10, (10, 16)),  # half of a short text is held out
        (5, 2, 3, (2, 2)),
    ],
)
def test_the_shortest_text_sets_the_number(loaded, write, searched, windows, heldout, scored, held):
    write("short.txt", letters(10 * windows))
    write("long.txt", letters(2000, 5000))
    found = transfer(
        loaded,
        text=["short.txt", "long.txt"],
        remove=1,
        heldout=heldout,
        length=10,
        metric="cosine",
    )
    assert (found.windows, found.heldout) == (scored, held)
    assert [len(used.ids) for _, used, _ in searched] == [scored] * 3


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (None, "short.txt has 3 windows"),
        (2, "short.txt leaves 1 windows"),
        (3, "short.txt leaves 0 windows"),
        (4, "short.txt holds 3 windows"),
        (1, "--windows 1"),
    ],
)
def test_texts_that_are_too_short_are_refused_before_a_search(
    loaded, write, monkeypatch, windows, message
):
    monkeypatch.setattr(module, "search", None)  # none is made
    write("short.txt", letters(60))
    write("long.txt", letters(2000, 5000))
    with pytest.raises(InputError, match=message):
        transfer(loaded, text=["long.txt", "short.txt"], remove=1, length=20, windows=windows)


TWO = {"text": ["mail.txt", "code=code.txt"]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": ()}, "two or more"),
        ({"text": ["mail.txt"]}, "two or more"),
        ({"text": ["mail.txt", "mail=code.txt"]}, "mail=code.txt: 'mail'"),
        ({"text": ["mail.txt", "mix=code.txt"]}, "mix=code.txt: 'mix'"),
        ({"text": ["mail.txt", "cod.txt"]}, "cod.txt .*'code.txt'"),
        ({"remove": None}, "no target"),
        ({"speedup": 1.5}, "--remove and --speedup"),
        ({"curve": True}, "--curve"),
        ({"remove": None, "max_loss_increase": 0.1}, "--max-loss-increase"),
        ({"heldout": 1}, "--heldout 1"),
        ({"metric": "los"}, "metric 'los'"),
        ({"metric": "cosine", "strategy": "beam"}, "--metric cosine"),
    ],
)
def test_mistakes_are_found_without_a_model(texts, options, said):
    given = {**TWO, "remove": 1, **options}
    with pytest.raises(InputError, match=said):
        check_transfer(TransferConfig.of(given))
    with pytest.raises(InputError, match=said):
        transfer(None, **given)


@pytest.mark.parametrize("target", [{"remove": "20%"}, {"speedup": 1.2}, {"size": "1MB"}])
def test_every_target_that_plans_can_share_is_accepted(texts, target):
    check_transfer(TransferConfig.of({**TWO, **target}))


def cost(mean, windows=8, spread=0.001):
    """Increases of loss of this mean, whose paired differences spread little."""
    noise = np.cos(np.arange(windows) * mean * 7)
    return mean + spread * (noise - noise.mean())


def test_clearly_worse_is_beyond_noise_and_beyond_a_tenth():
    assert clearly_worse(cost(0.56), cost(0.50))
    assert not clearly_worse(cost(0.54), cost(0.50))  # sure, but little
    assert not clearly_worse(cost(0.50), cost(0.56))
    assert not clearly_worse(cost(0.5), cost(0.5))
    noisy = cost(0.5) + np.array([0.5, -0.4] * 4)
    assert noisy.mean() > 1.1 * 0.49  # much, but not sure
    assert not clearly_worse(noisy, cost(0.49))
    # the windows differ much more than the plans do: pairing sees through that
    windows = np.linspace(0, 5, 8)
    assert clearly_worse(windows + cost(0.5), windows + cost(0.05))
    assert clearly_worse(cost(-0.02), cost(-0.1))
    assert not clearly_worse(cost(-0.097), cost(-0.1))
    assert not clearly_worse(np.array([1.0]), np.array([0.1]))  # one window proves nothing


PLANS = {"mail": (1, 2), "code": (2, 3), "mix": (1, 4)}


def outcome(loaded, write, monkeypatch, table):
    """The transfer of plans that cost this much: a row per plan, a column per text."""
    plans = iter(PLANS.values())
    write("mail.txt", letters(400))
    write("code.txt", letters(400, 5000))
    monkeypatch.setattr(module, "search", lambda *a, **o: SimpleNamespace(removed=next(plans)))
    columns = [np.array([cost(row[d]) for row in table]) for d in range(2)]
    monkeypatch.setattr(module, "_costs", lambda *a: columns)
    return transfer(loaded, text=["mail.txt", "code.txt"], remove=2, length=10)


@pytest.mark.parametrize(
    ("table", "away", "recommended"),
    [
        # each is best at home, and the mix is second everywhere
        ([(0.1, 0.9), (0.9, 0.1), (0.2, 0.2)], [["code"], ["mail"], ["mail", "code"]], "mix"),
        # mail's plan is as good as the mix's at home, but not better anywhere
        ([(0.2, 0.2), (0.9, 0.2), (0.2, 0.2)], [[], ["mail"], []], "mix"),
        # code's plan is better at home, and no worse elsewhere
        ([(0.2, 0.9), (0.2, 0.1), (0.2, 0.2)], [["code"], [], ["code"]], "code"),
        # both are better somewhere and nowhere worse: the one with the lower average
        ([(0.1, 0.2), (0.2, 0.15), (0.2, 0.2)], [["code"], ["mail"], ["mail", "code"]], "mail"),
        # better on the average and at home, but clearly worse elsewhere
        ([(0.1, 0.3), (0.5, 0.2), (0.5, 0.2)], [["code"], ["mail"], ["mail"]], "mix"),
        # better on the average, but clearly so nowhere
        ([(0.19, 0.2), (0.9, 0.2), (0.2, 0.2)], [[], ["mail"], []], "mix"),
        # better at home by 0.1, worse elsewhere by 0.3
        ([(0.1, 0.5), (0.5, 0.2), (0.2, 0.2)], [["code"], ["mail"], ["mail"]], "mix"),
    ],
)
def test_what_is_far_from_home_and_what_is_recommended(
    loaded, write, monkeypatch, table, away, recommended
):
    found = outcome(loaded, write, monkeypatch, table)
    assert [list(plan.away) for plan in found.plans] == away
    assert found.recommended == recommended
    for plan, row in zip(found.plans, table, strict=True):
        assert [cost.value for cost in plan.increase] == pytest.approx(row)


def test_too_few_windows_to_tell_do_not_make_a_plan_the_better_one(loaded, write, monkeypatch):
    """Clearly better at home, and elsewhere worse on average without being clearly so."""
    far = 0.2 + np.array([1.5, -0.5] * 4)
    costs = [np.array([cost(0.1), cost(0.5), cost(0.2)]), np.array([far, cost(0.2), cost(0.2)])]
    assert not clearly_worse(far, cost(0.2))
    assert module._recommended(costs) == 2
    costs[1][0] = cost(0.2)
    assert module._recommended(costs) == 0


def test_overlap_is_shared_over_either_and_all_is_read_back(loaded, write, monkeypatch):
    found = outcome(loaded, write, monkeypatch, [(0.1, 0.1)] * 3)
    assert np.array(found.overlap) == pytest.approx(
        np.array([[1, 1 / 3, 1 / 3], [1 / 3, 1, 0], [1 / 3, 0, 1]])
    )
    adapter = TypeAdapter(Transfer)
    assert adapter.validate_json(adapter.dump_json(found)) == found
