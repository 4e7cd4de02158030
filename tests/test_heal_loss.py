"""The chunked loss of healing: gradients are those of one pass."""

import itertools
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import heal_tools
import sleb
import zoo
from heal_tools import CPU, windows_of
from sleb.calibration.windows import load_windows
from sleb.core.errors import UnsupportedModel
from sleb.distillation import loss
from sleb.distillation.computing import forwards, recomputed
from sleb.distillation.loss import (
    ActivationCache,
    Batch,
    HiddenLoss,
    SplitModel,
    Validation,
    backward_kl,
    chunks,
    passes,
)
from sleb.models.stack import BlockStack

home = heal_tools.home


def batch_of(ids, scored=None, weights=None):
    return Batch.of(windows_of(ids, scored), range(len(ids)), torch.device("cpu"), weights)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2"])
@pytest.mark.parametrize("positions", [1, 5, 100])
def test_in_chunks_the_gradients_are_those_of_one_pass(family, positions, monkeypatch):
    """Of all tokens but the first, and of those that are scored alone."""
    teacher, _ = zoo.tiny(family)
    student, _ = zoo.tiny(family)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (3, 12), generator=generator)
    vocabulary = teacher(ids).logits.shape[-1]
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * vocabulary * positions)
    halves = SplitModel(student), SplitModel(teacher)
    assert halves[0].plain == (family not in ("gemma2", "cohere")), "which scale and cap"
    some, weights = torch.rand(3, 12, generator=generator) < 0.4, [1 / 7, 1 / 7, 1 / 3]
    for scored in (None, some):
        student.zero_grad()
        counts = (torch.ones(3, 11) if scored is None else scored[:, 1:]).bool()
        q, p = (model(ids).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
        whole = ((p.exp() * (p - q)).sum(-1) * counts * torch.tensor(weights)[:, None]).sum()
        whole.backward()
        wanted = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        student.zero_grad()
        backward_kl(*halves, batch_of(ids, scored, weights))
        for name, parameter in student.named_parameters():
            # a tied head gets a gradient as the embedding and as the head
            assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6), name
    assert [*chunks(33, vocabulary, ids.device)][-1].stop == 33
    assert len([*chunks(33, vocabulary, ids.device)]) == math.ceil(33 / positions)


def test_passes_hold_all_windows_by_length_and_no_more_tokens_than_wanted():
    lengths = [9, 2, 7, 3, 3, 8]
    found = passes(lengths, [0, 1, 3, 4, 5], 10)
    assert found == [[1, 3, 4], [5], [0]]
    assert passes(lengths, range(6), 1) == [[1], [3], [4], [2], [5], [0]], "one at least"
    assert passes([], [], 10) == []
    batch = batch_of(torch.ones(2, 6, dtype=torch.long), torch.tensor([[0, 1, 0, 1, 0, 0]] * 2) > 0)
    assert batch.ids.shape == (2, 4), "without the padding"
    assert batch.tokens == 8
    assert batch.rows.tolist() == [0, 2, 4, 6]
    assert batch.owner.tolist() == [0, 0, 1, 1]
    assert batch.weights.tolist() == [1, 1, 1, 1]


def test_passes_are_those_that_take_least_padding_and_launches(monkeypatch):
    monkeypatch.setitem(loss.PASS, "cpu", 500)
    draw = random.Random(0)
    for rows in (1, 2, 7, 8):
        lengths = [draw.choice((3, 40, 400, 1000)) + draw.randrange(300) for _ in range(rows)]
        order = sorted(range(rows), key=lengths.__getitem__)

        def taken(groups, lengths=lengths):
            return sum(len(g) * max(lengths[r] for r in g) + 500 for g in groups)

        def allowed(groups, lengths=lengths):
            return all(len(g) == 1 or len(g) * max(lengths[r] for r in g) <= 2500 for g in groups)

        cuts = (c for n in range(rows) for c in itertools.combinations(range(1, rows), n))
        every = ([order[a:b] for a, b in itertools.pairwise((0, *c, rows))] for c in cuts)
        found = passes(lengths, range(rows), 2500)
        assert allowed(found)
        assert taken(found) == min(taken(groups) for groups in every if allowed(groups))


def test_recomputing_changes_no_gradient(home):
    dense, cut = (AutoModelForCausalLM.from_pretrained(home / n) for n in ("MODEL", "OUT"))
    dense.requires_grad_(False)
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    found, calls = [], []
    cut.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for wanted in (False, True):
        cut.zero_grad()
        student, teacher = SplitModel(cut), SplitModel(dense)
        calls.clear()
        with forwards([BlockStack(cut)] if wanted else [], recomputed):
            backward_kl(student, teacher, batch_of(ids))
        assert len(calls) == 1 + wanted
        found.append([p.grad.clone() for p in cut.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert "forward" not in vars(cut.model.layers[0])


def test_what_the_dense_model_made_of_windows_is_remembered(home):
    """As far as there is room; gradients are the same, and what is known is not read again."""
    dense, cut = (AutoModelForCausalLM.from_pretrained(home / n) for n in ("MODEL", "OUT"))
    student, teacher = SplitModel(cut), SplitModel(dense)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (5, 16), generator=draw)
    windows = windows_of(ids, torch.rand(5, 16, generator=draw) < 0.5)
    each = 4 * dense.config.hidden_size * windows.counts
    read = []
    dense.model.layers[0].register_forward_pre_hook(lambda _, given: read.append(len(given[0])))
    for room, expected in ((10**6, [3, 1, 2]), (int(each[:3].sum()), [3, 1, 3]), (0, [3, 3, 3])):
        known = ActivationCache(teacher, windows, room)
        for rows, wanted in zip(([0, 1, 2], [3, 0, 2], [3, 4, 4]), expected, strict=True):
            batch = Batch.of(windows, rows, torch.device("cpu"), [0.1, 0.2, 0.3])
            read.clear()
            features, found = known(rows, batch), []
            assert read == [wanted]
            for given in (features, None):
                cut.zero_grad()
                backward_kl(student, teacher, batch, given)
                found.append([p.grad.clone() for p in cut.parameters()])
            for a, b in zip(*found, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
        assert sum(f.nbytes for f in known.kept.values()) <= room
    known = ActivationCache(teacher, windows, 10**6)
    batch = Batch.of(windows, [0, 1], torch.device("cpu"))
    known([0, 1], batch)
    known.forget()
    read.clear()
    known([0, 1], batch)
    assert read == [2]
    assert not known.kept


def test_hidden_states_are_learned_beside_the_predictions(home):
    dense, cut = (AutoModelForCausalLM.from_pretrained(home / n) for n in ("MODEL", "OUT"))
    draw = torch.Generator().manual_seed(1)
    ids, some = torch.randint(3, 90, (2, 12), generator=draw), torch.rand(2, 12, generator=draw)
    batch = batch_of(ids, some < 0.5, [0.1, 0.2])
    halves = SplitModel(cut), SplitModel(dense)
    backward_kl(*halves, batch)
    wanted = [p.grad.clone() for p in cut.parameters()]
    cut.zero_grad()
    own, its = (m(ids, output_hidden_states=True).hidden_states for m in (cut, dense))
    far = (own[2] - its[4]).square().sum(-1) / its[4].square().sum(-1)
    (0.7 * (far.flatten()[batch.rows] * batch.weights).sum()).backward()
    for gradient, parameter in zip(wanted, cut.parameters(), strict=True):
        gradient += 0 if parameter.grad is None else parameter.grad
    cut.zero_grad()
    backward_kl(*halves, batch, hidden=HiddenLoss(weight=0.7, blocks={1: 3}))
    for gradient, parameter in zip(wanted, cut.parameters(), strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_model_whose_parts_are_not_the_whole_is_refused(home):
    model = AutoModelForCausalLM.from_pretrained(home / "OUT")

    class Further(type(model)):  # its logits depend on more than the head's input
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits + kwargs["input_ids"].sum()
            return found

    model.__class__ = Further
    with pytest.raises(UnsupportedModel, match="split"):
        SplitModel(model)


def test_validation_in_chunks_is_validation(home, monkeypatch):
    dense = sleb.load(home / "MODEL", **CPU)
    cut = SplitModel(AutoModelForCausalLM.from_pretrained(home / "OUT"))
    windows, _ = load_windows(
        dense.tokenizer, [str(home / "code.txt")], windows=5, length=24, seed=0
    )
    teacher = SplitModel(dense.model)
    whole = Validation(teacher, windows, 5 * 24)(cut)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 259 * 7)
    assert Validation(teacher, windows, 2 * 24)(cut) == pytest.approx(whole, rel=1e-5)
    # of windows of several lengths, each as alone
    scored = torch.ones_like(windows.ids, dtype=torch.bool)
    scored[1, 10:] = scored[3, :20] = scored[3, 22:] = False
    some = windows_of(windows.ids, scored)
    found = Validation(teacher, some, 60)(cut)
    for row in range(5):
        alone = Validation(teacher, some.take([row]), 60)(cut)
        assert found[row] == pytest.approx(alone[0], rel=1e-5)
    assert found[[0, 2, 4]] == pytest.approx(whole[[0, 2, 4]], rel=1e-5)
