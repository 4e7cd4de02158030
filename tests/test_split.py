"""One split of the texts: no window has two roles, and texts are read once."""

import pytest
import torch

from sleb.calibration import windows
from sleb.calibration.split import SELF_GENERATED, CalibrationSplit
from sleb.calibration.windows import digest
from sleb.core.errors import InputError
from text_tools import letters, tokenizer


def split_of(*text, searched=6, heldout=5):
    return CalibrationSplit.of(
        tokenizer(), text, windows=searched, length=10, seed=0, heldout=heldout
    )


def rows(given):
    return {tuple(row) for row in given.ids.tolist()}


@pytest.fixture
def texts(write):
    """Two texts of 150 windows each, of which no two are alike."""
    return write("a.txt", letters(1500)), f"{write('b.txt', letters(1500, 5000))}@2"


def test_no_window_has_two_roles_and_all_texts_take_part(texts):
    split = split_of(*texts).with_repair(1200)
    fit, validation = split.repair_fit, split.repair_validation
    assert len(fit.ids) == pytest.approx(120, abs=3)
    assert rows(split.search) < rows(fit)  # what was searched on is fitted on, and nothing else
    roles = [split.search, split.heldout, validation]
    for i, one in enumerate(roles):
        assert set(one.source) == {0, 1}
        for other in roles[:i]:
            assert not rows(one) & rows(other)
    assert not rows(fit) & (rows(split.heldout) | rows(validation))
    candidates = split.candidate_fit(400)
    assert 40 <= len(candidates.ids) < 60
    assert not rows(candidates) & (rows(split.search) | rows(split.heldout))
    beside = split_of(*texts).with_repair(1200, beside_search=True).repair_fit
    assert len(beside.ids) == len(fit.ids) + 6


def test_a_window_that_reads_as_a_held_out_one_is_in_no_role_of_a_repair(write):
    text = write("same.txt", "abcdefghij" * 40 + letters(300))
    split = split_of(text, searched=1, heldout=30).with_repair(600)
    assert not rows(split.heldout) & rows(split.repair_validation)
    fitted = split.repair_fit.ids[1:]
    assert not rows(split.heldout) & {tuple(row) for row in fitted.tolist()}


def test_texts_are_read_and_tokenized_once(texts, monkeypatch):
    read, real = [], windows.read_documents
    monkeypatch.setattr(windows, "read_documents", lambda *a: read.append(a) or real(*a))
    split = split_of(*texts).with_repair(900)
    assert len(split.candidate_fit(300).ids) < len(split.repair_fit.ids)
    split.healing(4, 2)
    assert len(read) == 2


def test_a_model_writes_when_it_is_first_asked_and_all_at_once(texts):
    asked = []

    def write(n, length, seed):
        asked.append((n, length, seed))
        return torch.full((n, length), 7 + seed)

    split = split_of(*texts)
    alone = split.with_self_generated(write, compare=True)
    assert asked == []
    assert torch.equal(alone.final_comparison.ids[:6], split.search.ids)
    assert alone.final_comparison.ids.shape == (14, 10)
    assert asked == [(8, 10, 1)]  # not what a repair would be fitted on, of seed 0
    both = split.with_repair(600).with_self_generated(write, compare=True)
    half = len(both.repair_given.ids) // 2
    fit = both.repair_fit
    assert len(fit.ids) == 3 * half + len(both.repair_given.ids) % 2
    assert fit.names[-1] == fit.record.sources[-1].spec == SELF_GENERATED
    assert len(both.final_comparison.ids) == 14
    assert asked[1:] == [(half + 8, 10, 0)]


def test_hashes_are_of_the_tokens(texts):
    split = split_of(*texts)
    assert split.hashes == {
        "search": digest(split.search.ids),
        "heldout": digest(split.heldout.ids),
    }
    assert split_of(*texts, heldout=0).hashes == {"search": digest(split.search.ids)}


def test_healing_validates_on_every_text_and_trains_on_the_rest(texts):
    train, validation = split_of(*texts, searched=None, heldout=100).healing(60, 8)
    assert (len(train.ids), len(validation.ids)) == (60, 8)
    assert set(train.source) == set(validation.source) == {0, 1}
    assert not rows(train) & rows(validation)


def test_too_little_text_and_none_at_all(write):
    short = write("short.txt", letters(60))
    for split in (split_of(short, heldout=0), CalibrationSplit(search=split_of(short).search)):
        for ask in (lambda s=split: s.with_repair(100), lambda s=split: s.candidate_fit(100)):
            with pytest.raises(InputError, match="give more --text, or fewer --windows"):
                ask()
