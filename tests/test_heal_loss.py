"""The chunked loss of healing: values and gradients are those of one pass."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import heal_tools
import sleb
import zoo
from heal_tools import CPU
from sleb.calibration.windows import load_windows
from sleb.core.errors import UnsupportedModel
from sleb.distillation import loss
from sleb.distillation.loss import SplitModel, backward_kl, chunks, kl, validate
from sleb.distillation.training import recomputed
from sleb.models.stack import BlockStack

home = heal_tools.home


def test_the_divergence_is_that_of_its_definition():
    a, b = torch.randn(2, 3, 5, 17, generator=torch.Generator().manual_seed(0)) * 3
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    assert float(kl(a, b)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert float(kl(a, a)) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2"])
@pytest.mark.parametrize("positions", [1, 5, 100])
def test_in_chunks_the_loss_and_its_gradients_are_those_of_one_pass(family, positions, monkeypatch):
    teacher, _ = zoo.tiny(family)
    student, _ = zoo.tiny(family)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    whole = kl(student(ids).logits, teacher(ids).logits.detach())
    (whole / 7).backward()
    wanted = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    vocabulary = teacher(ids).logits.shape[-1]
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * vocabulary * 3 * positions)
    assert len([*chunks(ids, vocabulary)]) == math.ceil(12 / positions)
    end = student.get_output_embeddings().weight  # frozen, if it is not the embedding too
    total = backward_kl(SplitModel(student), SplitModel(teacher), ids, 1 / 7)
    # what float32 loses where two distributions are nearly equal: one part in a thousand here
    assert float(total) == pytest.approx(float(whole.detach()), rel=1e-5, abs=5e-6)
    for name, parameter in student.named_parameters():
        # a tied head gets a gradient as the embedding and as the head
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6), name
    assert end.grad is not None


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
        with recomputed(BlockStack(cut), wanted):
            backward_kl(student, teacher, ids, 1.0)
        assert len(calls) == 1 + wanted
        found.append([p.grad.clone() for p in cut.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert "forward" not in vars(cut.model.layers[0])


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
    whole = validate(cut, SplitModel(dense.model), windows, 5)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 259 * 2 * 7)
    assert validate(cut, SplitModel(dense.model), windows, 2) == pytest.approx(whole, rel=1e-5)
