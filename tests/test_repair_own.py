"""The text that a model writes itself for its repair."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

import conftest
import sleb
from search_tools import fit_windows, split_of
from sleb.calibration.split import SELF_GENERATED
from sleb.calibration.tokens import opening_tokens
from sleb.core.progress import silent
from sleb.models.stack import BlockStack
from sleb.repairs import given_tokens, regression, repair
from sleb.repairs import self_generated as own
from sleb.repairs.answering import writer
from sleb.repairs.self_generated import with_self_generated
from sleb.selection import resources
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE
from sleb.selection.sweep import Sweep

loaded = conftest.loaded_learned


@pytest.fixture(scope="module")
def windows(learned, loaded):
    found, _ = sleb.load_windows(
        loaded.tokenizer, [str(learned / "text.txt")], windows=12, length=32, seed=0
    )
    return found


@pytest.fixture(scope="module")
def both(loaded, windows):
    return with_self_generated(loaded, windows, silent)


def test_the_tokens_of_a_fit_count_it(learned, loaded):
    text = [str(learned / "text.txt")]
    split = split_of(loaded.tokenizer, text, windows=8, seed=3)
    tokens = given_tokens(loaded.stack, 3200)
    assert tokens == pytest.approx(3200 * 2 / 3, abs=1)
    fit = split.with_repair(tokens).with_self_generated(writer(loaded, silent)).repair_fit
    assert len(fit.ids) == pytest.approx(100, abs=3)
    assert fit.source.count(1) == pytest.approx(33, abs=1)
    assert torch.equal(fit.ids[:8], split.search.ids)


@pytest.mark.parametrize(
    ("kind", "streamed", "room", "others", "expected"),
    [
        ("cpu", False, 2**40, [], 100_000),
        ("cuda", True, 2**40, [], 100_000),
        ("cuda", False, 2**40, [], 400_000),
        ("cuda", False, 2**40, [250_000], 250_000),
        ("cuda", False, 6 * 64 * 4 * 300_000, [], 300_000),  # 6 streams of 64 in float32
        ("cuda", False, 2**20, [], 100_000),
    ],
)
def test_a_fit_sees_more_on_a_gpu_with_room(monkeypatch, kind, streamed, room, others, expected):
    class Ranks:
        def exchange(self, mine):
            return [mine, *(str(n).encode() for n in others)]

    stack = SimpleNamespace(
        input_device=torch.device(kind),
        streamed=streamed,
        dtype=torch.float32,
        model=SimpleNamespace(config=PretrainedConfig(hidden_size=64)),
    )
    monkeypatch.setattr(regression, "room_bytes", lambda stack: room)
    monkeypatch.setattr(regression, "group", Ranks)
    assert regression.default_tokens(stack) == expected


def test_half_as_many_windows_are_added_and_recorded(windows, both):
    assert torch.equal(both.ids[:12], windows.ids)
    assert both.ids.shape == (18, 32)
    assert both.source[12:] == (1,) * 6
    assert both.names == (*windows.names, SELF_GENERATED)
    record = both.record
    assert [(s.spec, s.windows) for s in record.sources][1:] == [(SELF_GENERATED, 6)]
    assert record.windows == 18
    assert record.sha256 != windows.record.sha256
    assert both.take(range(12)).record.sha256 == windows.record.sha256


def test_it_is_what_the_model_finds_likely(loaded, both):
    """Its loss is about the model's entropy, as on the text it has learned; far below chance's."""
    values = Sweep(loaded.stack, both.ids, NLL).values([DENSE], 0, 18)[0]
    text, own = values[:12].mean(), values[12:].mean()
    other = torch.randint(3, 250, both.ids.shape, generator=torch.Generator().manual_seed(0))
    chance = Sweep(loaded.stack, other, NLL).values([DENSE], 0, 18)[0].mean()
    assert own < (text + chance) / 2


def test_every_other_one_begins_as_texts_do_the_others_with_any_word(loaded, both):
    assert len({tuple(row.tolist()) for row in both.ids[12:]}) == 6
    assert both.ids.max() < len(loaded.tokenizer)
    opening = opening_tokens(loaded.tokenizer)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        starts = own._starts(loaded, opening, 400, 0)
    begin = opening or [loaded.tokenizer.bos_token_id]
    assert (starts[:, :-1] == torch.tensor(begin)).all()
    logits = loaded.model(input_ids=torch.tensor([begin])).logits[0, -1]
    likely = set(logits.topk(20).indices.tolist())
    as_texts, any_word = (
        [t in likely for t in half]
        for half in (starts[::2, -1].tolist(), starts[1::2, -1].tolist())
    )
    assert sum(as_texts) > 100 > 3 * sum(any_word)


def test_every_third_strays_further(loaded):
    """At a higher temperature less likely words are sampled."""
    ids = own.write(loaded, 60, 32, 0, silent)
    losses = Sweep(loaded.stack, ids, NLL).values([DENSE], 0, 60)[0]
    hot, others = losses[2::3], [*losses[::3], *losses[1::3]]
    assert hot.mean() > sum(others) / len(others) + 0.2


def test_it_depends_on_the_seed_alone_and_leaves_other_random_numbers(loaded, windows, both):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = with_self_generated(loaded, windows, silent)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(again.ids, both.ids)


def test_a_repair_is_fitted_on_it_unless_told_not_to(learned, loaded):
    fitted, judges = fit_windows(loaded.tokenizer, [str(learned / "text.txt")], 2134)
    texts = len(fitted.ids)
    with_it, without = (
        repair(loaded, (2,), fitted, judges, self_generated=own) for own in (True, False)
    )
    named = [s.spec for s in with_it.record.calibration.sources]
    assert SELF_GENERATED in named
    assert with_it.record.calibration.windows == texts + texts // 2
    assert without.record.calibration.windows == texts
    assert SELF_GENERATED not in [s.spec for s in without.record.calibration.sources]
    assert with_it.record.tensors != without.record.tensors
    assert SELF_GENERATED not in [s.spec for s in with_it.record.heldout.sources]


def test_as_many_are_written_at_once_as_their_cache_has_room(loaded, monkeypatch):
    """6 blocks of 2 key-value heads of 8, keys and values in float32: 768 bytes a token."""
    monkeypatch.setattr(own, "CACHE", 768 * 32 * 20)
    assert own.at_once(loaded.stack, 32) == 20
    assert own.at_once(loaded.stack, 64) == 10
    assert own.at_once(loaded.stack, 32_000) == 1
    sizes = []
    real = own._continued

    def continued(model, prompts, heat, piece, tick):
        sizes.append((len(prompts), len(heat), piece))
        return real(model, prompts, heat, piece, tick)

    monkeypatch.setattr(own, "_continued", continued)
    first = len(opening_tokens(loaded.tokenizer))
    assert own.write(loaded, 40, 32 + first, 0, silent).shape == (40, 32 + first)
    assert sizes == [(20, 20, 32), (20, 20, 32)]


@pytest.mark.parametrize(("free", "room"), [(2**30, 2**28), (2**32, 2**29)])
def test_a_gpu_has_room_by_its_size_unless_it_is_full(loaded, monkeypatch, free, room):
    monkeypatch.setattr(BlockStack, "input_device", torch.device("cuda"))
    monkeypatch.setattr(resources, "free_bytes", lambda stack: free)
    size = SimpleNamespace(total_memory=2**32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    assert resources.room_bytes(loaded.stack) == room
    assert own.at_once(loaded.stack, 32) == room // (768 * 32)


def test_long_windows_are_of_several_pieces(loaded, monkeypatch):
    monkeypatch.setattr(own, "PIECE", 12)
    opening = opening_tokens(loaded.tokenizer)
    wide = 32 + len(opening)
    ids = own.write(loaded, 3, wide, 0, silent)
    assert ids.shape == (3, wide)
    assert all(row[: len(opening)].tolist() == opening for row in ids)
    # 8 pieces, of which the last row needs all: nothing is left of the room
    special = set(loaded.tokenizer.all_special_ids)
    assert not special & set(ids[:, len(opening) :].flatten().tolist())


def test_tokens_are_drawn_by_their_probabilities_at_their_temperature():
    shares, never, rows = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([1]), 8000
    heat = torch.ones(2 * rows, 1)
    heat[rows:] = 2.0
    torch.manual_seed(0)
    drawn = own.Sampler(heat, never)(shares.log().expand(2 * rows, -1))
    for part, power in ((drawn[:rows], 1.0), (drawn[rows:], 0.5)):
        wanted = shares**power
        wanted[never] = 0
        wanted /= wanted.sum()
        found = part.bincount(minlength=4) / rows
        assert (found - wanted).abs().max() < 0.02  # three standard errors
        assert found[1] == 0
