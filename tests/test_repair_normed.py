"""Repair of blocks whose matrices write into the stream through an RMS norm."""

import pytest
import torch

import sleb
import zoo
from conftest import byte_tokenizer, teach
from search_tools import fit_windows
from sleb.models.stack import BlockStack
from sleb.repairs import repair
from sleb.repairs.regression import Regression
from sleb.repairs.residual_writers import Norm, find_residual_writers
from sleb.surgery.verification import verify

CPU = {"dtype": "float32", "device": "cpu"}
MATRIX, NORM = "mlp.down_proj", "post_feedforward_layernorm"


@pytest.mark.parametrize(
    ("family", "offset"), [("gemma2", 1.0), ("gemma3_text", 1.0), ("olmo2", 0.0)]
)
def test_the_norm_behind_a_matrix_is_found(family, offset):
    found = find_residual_writers(BlockStack(zoo.tiny(family)[0]), 2)
    assert found.norms == {
        MATRIX: Norm(path=NORM, offset=offset),
        "self_attn.o_proj": Norm(path="post_attention_layernorm", offset=offset),
    }
    assert found.last == {NORM: 1.0}


def test_a_norm_in_front_is_none_behind():
    assert not find_residual_writers(BlockStack(zoo.tiny("llama")[0]), 2).norms


@pytest.fixture
def place():
    """A stack, and a Regression at its block 2 with equal streams."""
    stack = BlockStack(zoo.tiny("gemma2")[0])
    ids = torch.randint(3, 90, (24, 24), generator=torch.Generator().manual_seed(0))
    fitter = Regression(stack, {3}, ids, 8, rounded=lambda b, n, t: t.float())
    with torch.inference_mode():
        fitter._advance_to(2)
    return stack, fitter


def planted(stack, fitter, changes) -> tuple[list[torch.Tensor], float, float]:
    """Targets that block 2 would reach with ``changes``, and how far it is from them before and
    after a fit."""
    modules = {name: stack.blocks[2].get_submodule(name) for name in (MATRIX, NORM)}
    old = {name: module.weight.detach().clone() for name, module in modules.items()}
    with torch.inference_mode():
        for name, change in changes.items():
            modules[name].weight.add_(change)
        targets = list(fitter.run(2, fitter.cut))
        for name, module in modules.items():
            module.weight.copy_(old[name])

    def distance() -> float:
        with torch.inference_mode():
            now = list(fitter.run(2, fitter.cut))
        return float(sum((a - b).norm() for a, b in zip(now, targets, strict=True)))

    before = distance()
    with torch.inference_mode():
        fitter.fit_before_norm(2, MATRIX, targets, 1e-4)
    return targets, before, distance()


def test_gains_and_directions_are_both_found_again(place):
    stack, fitter = place
    generator = torch.Generator().manual_seed(1)
    width = stack.blocks[2].get_submodule(MATRIX).weight.shape
    gains = {NORM: 0.5 * torch.randn(width[0], generator=generator)}
    turned = {MATRIX: 0.3 * torch.randn(width, generator=generator) * 0.15}
    for changes in (gains, turned, gains | turned):
        _, before, after = planted(stack, fitter, changes)
        assert after < 0.25 * before, sorted(changes)
        fitter.restore()


def test_nothing_lost_is_nothing_changed(place):
    stack, fitter = place
    targets, before, after = planted(stack, fitter, {})
    assert before == 0
    assert after < 1e-4 * float(sum(t.norm() for t in targets))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny Gemma 3 that has learned a text."""
    folder = tmp_path_factory.mktemp("taught")
    text = " ".join(f"{a} and {b} make {a + b}." for a in range(40) for b in range(40))
    (folder / "text.txt").write_text(text)
    tokenizer, options = byte_tokenizer(), {"sliding_window": 16, "intermediate_size": 64}
    model, _ = zoo.tiny("gemma3_text", vocab_size=len(tokenizer), **options)
    model.init_weights()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    teach(model, ids, steps=90, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def test_a_repair_gives_loss_back_and_a_stock_checkpoint(taught, tmp_path):
    model = sleb.load(taught / "model", **CPU)
    text = [str(taught / "text.txt")]
    plan = sleb.search(model, remove=2, text=text, windows=8, length=32, exact=True)
    material = fit_windows(model.tokenizer, text, 6_000)
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    found = repair(model, plan.removed, *material, self_generated=False)
    assert all(torch.equal(t, before[n]) for n, t in model.model.state_dict().items())
    first, last = found.record.gaps[0].before["text"], found.record.gaps[-1].after["text"]
    with torch.no_grad():
        ids = material[1].ids
        dense = model.model(input_ids=ids, labels=ids).loss.item()
    assert last - dense < 0.6 * (first - dense)
    assert any(NORM in name for name in found.tensors)
    assert any(MATRIX in name for name in found.tensors)
    out = sleb.apply(plan, taught / "model", tmp_path / "out", repair=found)
    verify(out, model=taught / "model", plan=sleb.Plan.load(out / "plan.json")).require()
