"""Repair: the matrices it finds, that the fit is least squares, and what it never does."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
import sleb
import zoo
from search_tools import fit_windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, UnsupportedModel
from sleb.models.stack import BlockStack
from sleb.repairs import RIDGES, _Validation, repair
from sleb.repairs.regression import Gap, Regression, gaps
from sleb.repairs.residual_writers import find_residual_writers
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE
from sleb.selection.sweep import Sweep
from sleb.surgery.verification import verify

CPU = {"dtype": "float32", "device": "cpu"}
REMOVED = (2, 3)

OUTPUTS = {
    "llama": ({"mlp.down_proj": 1.0}, {"self_attn.o_proj": 1.0}),
    "gpt2": ({"mlp.c_proj": 1.0}, {"attn.c_proj": 1.0}),
    "opt": ({"fc2": 1.0}, {"self_attn.out_proj": 1.0}),
    "bloom": ({"mlp.dense_4h_to_h": 1.0}, {"self_attention.dense": 1.0}),
    "gpt_neox": ({"attention.dense": 1.0, "mlp.dense_4h_to_h": 1.0}, {}),  # side by side
    "minicpm3": ({"mlp.down_proj": 0.49497}, {"self_attn.o_proj": 0.49497}),  # scaled branches
    "mixtral": ({}, {"self_attn.o_proj": 1.0}),  # routed experts
    "hunyuan_v1_moe": ({"mlp.shared_mlp.down_proj": 1.0}, {"self_attn.o_proj": 1.0}),
    "mamba": ({"mixer.out_proj": 1.0}, {}),
    "gemma2": ({"mlp.down_proj": 1.0}, {"self_attn.o_proj": 1.0}),  # norms behind them
    "olmo2": ({"mlp.down_proj": 1.0}, {"self_attn.o_proj": 1.0}),
}


def in_float32(block, path, new):
    """The precision that weights are stored with."""
    return new.float()


@pytest.mark.parametrize("family", OUTPUTS)
def test_the_matrices_that_write_into_the_stream_are_found(family):
    found = find_residual_writers(BlockStack(zoo.tiny(family)[0]), 2)
    assert (dict(found.final), dict(found.inner)) == OUTPUTS[family]


def test_probing_leaves_the_block_as_it_was():
    model, _ = zoo.tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_residual_writers(BlockStack(model.bfloat16()), 1)
    assert all(torch.equal(t, before[n].bfloat16()) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("removed", "blocks", "expected"),
    [
        ({3, 4}, 10, [((3, 4), (2, 5, 6))]),
        ({2, 6}, 10, [((2,), (1, 3, 4)), ((6,), (5, 7, 8))]),
        ({2, 5}, 10, [((2,), (1, 3)), ((5,), (4, 6, 7))]),  # 4 is nearer to the next gap
        ({2, 4}, 8, [((2,), (1,)), ((4,), (3, 5, 6))]),
        ({0, 1}, 6, [((0, 1), (2, 3))]),
        ({5}, 6, [((5,), (4,))]),
        ({0, 2}, 6, [((0,), ()), ((2,), (1, 3, 4))]),
    ],
)
def test_every_block_belongs_to_one_gap(removed, blocks, expected):
    assert gaps(removed, blocks) == tuple(Gap(removed=a, blocks=b) for a, b in expected)


def streams(stack, removed, ids):
    """Dense and cut hidden states after the last block."""
    with torch.inference_mode():
        dense, calls = stack.enter(ids)
        cut = dense
        for i in range(len(stack)):
            dense = stack.run(i, dense, calls[i])
            if i not in removed:
                cut = stack.run(i, cut, calls[i])
    return dense, cut


def distance(stack, removed, ids) -> float:
    dense, cut = streams(stack, removed, ids)
    return float((dense - cut).norm() / dense.norm())


def fit_all(stack, removed, ids, ridge=0.01, reach=2, batch=8):
    fitter = Regression(stack, removed, ids, batch, rounded=in_float32)
    for gap in gaps(removed, len(stack), reach):
        fitter.fit(gap, (ridge,))
    return fitter


@pytest.mark.parametrize("family", [f for f in OUTPUTS if any(OUTPUTS[f])])
def test_a_fit_brings_the_stream_nearer_on_new_text(family):
    model, _ = zoo.tiny(family)
    stack = BlockStack(model)
    ids = torch.randint(3, 90, (96, 24), generator=torch.Generator().manual_seed(1))
    plain = distance(stack, REMOVED, ids[80:])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitter = fit_all(stack, set(REMOVED), ids[:80], ridge=0.1)
    assert distance(stack, REMOVED, ids[80:]) < 0.98 * plain
    fitter.restore()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert distance(stack, REMOVED, ids[80:]) == plain


def test_a_fit_is_weighted_ridge_regression():
    """The block before the gap, against the normal equations written out by hand."""
    model, _ = zoo.tiny("llama")
    stack, ridge = BlockStack(model), 0.05
    ids = torch.randint(3, 90, (12, 20), generator=torch.Generator().manual_seed(2))
    down = stack.blocks[1].mlp.down_proj
    old, seen = down.weight.detach().double().clone(), []
    fitter = Regression(stack, {2}, ids, 5)
    stack.blocks[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: out)
    # without attention's matrix, the fit of the last one stands alone
    fitter.writers(1).inner.clear()
    with torch.inference_mode():
        hidden, calls = stack.enter(ids)
        hidden = stack.run(0, hidden, calls[0])
        handle = down.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        out = stack.run(1, hidden, calls[1])
        handle.remove()
        target = stack.run(2, out, calls[2])
    fitter.fit(Gap(removed=(2,), blocks=(1,)), (ridge,))
    x = seen[0].flatten(0, 1).double()
    w = 1 / target.flatten(0, 1).double().square().mean(-1)
    e = (target - out).flatten(0, 1).double()
    ones = torch.cat((x, torch.ones(len(x), 1)), 1)
    gram = (ones * w[:, None]).T @ ones
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram, (ones * w[:, None]).T @ e).T
    torch.testing.assert_close(down.weight.double(), old + change[:, :-1], rtol=1e-4, atol=1e-5)


def test_a_bias_takes_part():
    model, _ = zoo.tiny("gpt2")
    stack = BlockStack(model)
    ids = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(3))
    before = stack.blocks[1].mlp.c_proj.bias.detach().clone()
    fitter = fit_all(stack, {2}, ids)
    assert not torch.equal(stack.blocks[1].mlp.c_proj.bias, before)
    fitter.restore()
    assert torch.equal(stack.blocks[1].mlp.c_proj.bias, before)


def test_a_larger_ridge_is_a_smaller_step():
    sizes = []
    for ridge in (0.01, 1.0, 100.0):
        model, _ = zoo.tiny("llama")
        stack = BlockStack(model)
        old = stack.blocks[1].mlp.down_proj.weight.detach().clone()
        ids = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(4))
        fit_all(stack, {2}, ids, ridge=ridge)
        sizes.append(float((stack.blocks[1].mlp.down_proj.weight.detach() - old).norm()))
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_batches_do_not_matter():
    weights = []
    for batch in (3, 40):
        model, _ = zoo.tiny("llama")
        stack = BlockStack(model)
        ids = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(5))
        fit_all(stack, {2, 4}, ids, batch=batch)
        weights.append(torch.cat([p.detach().flatten() for p in stack.blocks.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "apart"), [("llama", True), ("gemma2", True), ("cohere", False)]
)
def test_a_fit_by_halves_of_blocks_is_that_by_whole_ones(family, apart, monkeypatch):
    """Attention and MLP of a block one after the other, but where they stand side by side."""
    found = {}
    for how in ("halves", "whole"):
        if how == "whole":
            monkeypatch.setattr(Regression, "_apart", lambda self, block: ())
        model, _ = zoo.tiny(family)
        stack, calls = BlockStack(model), []
        attention = stack.blocks[5].get_submodule(stack.parts(5)["attention"].name)
        matrix = next(m for m in attention.modules() if isinstance(m, torch.nn.Linear))
        matrix.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        ids = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(5))
        fitter = Regression(stack, {2, 4}, ids, 8, rounded=in_float32)
        for gap in gaps({2, 4}, len(stack), 2):
            fitter.fit(gap, (0.1,))
        weights = torch.cat([p.detach().flatten() for p in stack.blocks.parameters()])
        found[how] = weights, len(calls)
    torch.testing.assert_close(found["halves"][0], found["whole"][0], rtol=1e-3, atol=1e-4)
    assert (found["halves"][1] < found["whole"][1]) is apart


def test_what_is_refused_leaves_no_trace():
    model, _ = zoo.tiny("llama")
    stack, asked = BlockStack(model), []
    ids = torch.randint(3, 90, (24, 20), generator=torch.Generator().manual_seed(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def only_the_second() -> bool:
        asked.append({n for n, t in model.state_dict().items() if not torch.equal(t, before[n])})
        return len(asked) == 2

    fitter = Regression(stack, {1, 4}, ids, 8, rounded=in_float32)
    first, second = gaps({1, 4}, len(stack), 1)
    assert fitter.fit(first, RIDGES, only_the_second) == RIDGES[1]
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    assert fitter.fit(second, RIDGES, lambda: False) is None
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    assert len(asked) == 2
    assert asked[0]


loaded = conftest.loaded_learned


@pytest.fixture(scope="module")
def material(learned, loaded):
    return fit_windows(loaded.tokenizer, [str(learned / "text.txt")], 8_000)


def test_a_repair_gives_loss_back_and_a_stock_checkpoint(learned, loaded, material, tmp_path):
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    plan = sleb.search(
        loaded, remove=2, text=[str(learned / "text.txt")], windows=8, length=32, exact=True
    )
    found = repair(loaded, plan.removed, *material)
    assert all(torch.equal(t, before[n]) for n, t in loaded.model.state_dict().items())
    assert found.record.removed == plan.removed
    for gap in found.record.gaps:
        assert gap.ridge in RIDGES
        assert all(gap.after[text] < gap.before[text] for text in gap.before)

    out = sleb.apply(plan, learned / "model", tmp_path / "out", repair=found)
    written = sleb.Plan.load(out / "plan.json")
    assert written.repair == found.record
    checked = verify(out, model=learned / "model", plan=written)
    assert checked.passed, checked
    found_by = {c.key: c.found.values for c in checked.checks}
    changed, stay = len(found.tensors), len(Checkpoint.open(out).tensors)
    assert found_by["repaired-tensors"] == {"tensors": changed}
    assert found_by["weights-but-repaired"] == {"tensors": stay - changed, "repaired": changed}

    # the checkpoint's loss is what the record claims, computed by plain transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        loss = model(input_ids=material[1].ids, labels=material[1].ids).loss.item()
    last = found.record.gaps[-1]
    assert loss == pytest.approx(last.after["text"], abs=1e-4)
    plain = sleb.apply(plan, learned / "model", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        worse = model(input_ids=material[1].ids, labels=material[1].ids).loss.item()
    assert worse == pytest.approx(found.record.gaps[0].before["text"], abs=1e-4)
    assert loss < worse - 0.01
    kept = Checkpoint.open(plain), Checkpoint.open(out)
    differ = {n for n in kept[0].tensors if kept[0].digest(n) != kept[1].digest(n)}
    assert len(differ) == len(found.tensors)


def test_verify_notices_a_tensor_that_is_not_the_plans(learned, loaded, material, tmp_path):
    plan = sleb.search(
        loaded, remove=1, text=[str(learned / "text.txt")], windows=4, length=32, exact=True
    )
    found = repair(loaded, plan.removed, *material)
    out = sleb.apply(plan, learned / "model", tmp_path / "out", repair=found)
    name, tensor = next(iter(found.tensors.items()))
    again = replace(found, tensors={**found.tensors, name: tensor + 1})
    with pytest.raises(InputError, match=re.escape(name)):
        sleb.apply(plan, learned / "model", tmp_path / "wrong", repair=again)
    file, ours = out / "model.safetensors", sleb.Plan.load(out / "plan.json")
    tensors = load_file(file)
    changed = Cut.of(ours, folder=out).rename(name, found.prefix)
    save_file({**tensors, changed: tensors[changed] + 1}, file, metadata={"format": "pt"})
    (out / "SHA256SUMS").unlink()  # which would tell it sooner
    checked = verify(out, model=learned / "model", plan=ours)
    assert not checked.passed
    assert "repaired-tensors" in [c.key for c in checked.checks if not c.passed]


def test_a_text_that_the_repair_would_harm_is_protected(loaded, material):
    """Fits by which one text loses more against the dense model are refused, whatever they gain on
    others, but for what a standard error may be; that a cut is better than it is chance too."""
    fitted, judges = material
    half = np.arange(len(judges.ids)) >= len(judges.ids) // 2
    two = replace(judges, source=tuple(half.astype(int).tolist()), names=("one", "two"))
    dense = np.ones(len(judges.ids))

    spread = np.where(np.arange(len(half)) % 2, 1.0, -1.0)

    def accepts(old, new, noise=0.0):
        """Of losses above the dense model's, of both texts; the change differs by window."""
        of = [np.where(half, b, a) + dense for a, b in (old, new)]
        of[1] += noise * spread
        values = lambda sets, *_: [dense if sets == [DENSE] else of[1]]  # noqa: E731
        return _Validation(SimpleNamespace(values=values), (2,), two).better_than(of[0])()

    assert accepts((1.0, 1.0), (0.9, 0.9))
    assert not accepts((1.0, 1.0), (1.0, 1.0))
    assert not accepts((1.0, 1.0), (0.1, 1.1))
    assert accepts((1.0, -0.5), (0.4, -0.1))
    assert not accepts((1.0, -0.5), (0.4, 0.1))
    assert not accepts((-0.2, -0.5), (-0.3, -0.6))
    assert accepts((1.0, 1.0), (0.1, 1.1), noise=1.0)
    assert not accepts((1.0, 1.0), (0.1, 1.1), noise=0.1)
    assert not accepts((1.0, 1.0), (1.0, 1.0), noise=1.0)
    random = replace(fitted, ids=torch.randint(3, 250, fitted.ids.shape))
    found = repair(loaded, (2,), random, judges)
    whole = _Validation(Sweep(loaded.stack, judges.ids, NLL), (2,), judges)
    known = whole.by_text(whole.dense)
    for gap in found.record.gaps:
        assert all(gap.after[t] <= max(gap.before[t], known[t]) for t in gap.before)


def test_what_cannot_be_repaired_is_refused(loaded, material, tmp_path, learned):
    model, _ = zoo.tiny("openai-gpt")  # a norm behind the whole sum
    model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="no matrix beside the gaps writes into the stream"):
        repair(
            sleb.load(tmp_path / "model", **CPU),
            (2,),
            *(replace(w.take([0]), ids=w.ids[:1] % 90) for w in material),
        )
    plan = sleb.search(loaded, remove=2, text=[str(learned / "text.txt")], windows=4, length=32)
    other = repair(loaded, plan.removed[:1], *material)
    with pytest.raises(InputError, match="the repair is of a cut of blocks"):
        sleb.apply(plan, learned / "model", tmp_path / "out", repair=other)
    assert not (tmp_path / "out").exists()


def test_a_gap_without_blocks_of_its_own_is_left_as_it_is(loaded, material):
    found = repair(loaded, (0, 2), *material)
    first, second = found.record.gaps
    assert (first.removed, first.ridge, first.tensors) == ((0,), None, ())
    assert second.removed == (2,)
