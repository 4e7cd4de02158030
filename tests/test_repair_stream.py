"""Repair of blocks that are fetched when they run: the same tensors, each block read once, and the
model as it was afterwards."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import sleb
import zoo
from conftest import byte_tokenizer
from search_tools import fit_windows
from sleb.calibration.split import SELF_GENERATED
from sleb.cli.main import main
from sleb.core.errors import InputError
from sleb.evaluation.perplexity import evaluate
from sleb.models.load import load_config, stream_places, strict_model
from sleb.models.overrides import WeightOverrides
from sleb.models.stack import BlockStack
from sleb.repairs import RIDGES, repair, repaired
from sleb.repairs.regression import Regression, gaps
from sleb.selection.metrics import NLL
from sleb.selection.objective import BlockSet
from sleb.selection.sweep import Sweep

CPU = {"dtype": "float32", "device": "cpu"}
REMOVED = {1, 4}
FAMILIES = ["llama", "gemma3_text", "gpt2", "mixtral"]


def in_float32(block, path, new):
    """The precision that weights are stored with."""
    return new.float()


def ids(n=24, length=20, seed=0):
    return torch.randint(3, 90, (n, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def reads(monkeypatch):
    """How often every tensor is read from the files."""
    from accelerate.utils.offload import OffloadedWeightsLoader

    counted: Counter[str] = Counter()
    real = OffloadedWeightsLoader.__getitem__

    def get(self, key):
        counted[key] += 1
        return real(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedWeightsLoader, "__getitem__", get)
        yield counted


def pair(family, folder, dtype=torch.float32, places=None):
    """A tiny model in memory, and the same one with blocks in files."""
    model, _ = zoo.tiny(family)
    model.save_pretrained(folder)
    config = load_config(folder)
    streaming = stream_places(config, torch.device("cpu"), False)
    where = {k: v for k, v in streaming.items() if places is None or v == "cpu"}
    where |= {k: places(k) for k, v in streaming.items() if places is not None and v == "disk"}
    streamed = BlockStack(strict_model(folder, dtype, False, {"device_map": where}))
    assert streamed.streamed
    return BlockStack(strict_model(folder, dtype)), streamed


def fit(stack, accept=lambda: True, removed=frozenset(REMOVED), ridges=(0.1,)):
    fitter = Regression(stack, removed, ids(), 8, rounded=in_float32)
    for gap in gaps(removed, len(stack)):
        fitter.fit(gap, ridges, accept)
    return fitter


def losses(stack, removed=frozenset(REMOVED)):
    return Sweep(stack, ids(5, seed=9), NLL, batch=2).scores([BlockSet(removed)], 0, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_the_model_in_memory(family, tmp_path):
    resident, streamed = pair(family, tmp_path / "m")
    before = losses(streamed)
    want, found = fit(resident), fit(streamed)
    assert list(found.changes.values) == list(want.changes.values)
    assert len(found.changes) >= 3
    for key, value in found.changes.values.items():
        assert torch.equal(value, want.changes.values[key]), key
    # all that read the block see them
    assert torch.equal(losses(streamed), losses(resident))
    assert not torch.equal(losses(streamed), before)
    assert all(p.device.type == "meta" for p in streamed.blocks.parameters())
    found.restore()
    assert torch.equal(losses(streamed), before)


def test_weights_that_are_computed_with_more_precision_than_stored(tmp_path):
    model, _ = zoo.tiny("llama")
    model.bfloat16().save_pretrained(tmp_path / "m")
    where = {"device_map": stream_places(load_config(tmp_path / "m"), torch.device("cpu"), False)}
    stacks = [
        BlockStack(strict_model(tmp_path / "m", torch.float32, False, w)) for w in ({}, where)
    ]
    values = [fit(stack).changes.values for stack in stacks]
    assert all(v.dtype == torch.float32 for found in values for v in found.values())
    assert all(torch.equal(v, values[1][k]) for k, v in values[0].items())


@pytest.mark.parametrize("place", ["disk", "some"])
def test_a_device_map_with_blocks_elsewhere_gives_the_same(place, tmp_path):
    """Of two GPUs there is none here: some blocks stay on the device, and others in files."""

    def where(name):
        return "cpu" if place == "some" and name[-1] in "025" else "disk"

    resident, placed = pair("llama", tmp_path / "m", places=where)
    want, found = fit(resident).changes.values, fit(placed)
    assert all(torch.equal(found.changes.values[k], v) for k, v in want.items())
    if place == "some":
        kept = placed.blocks[2].mlp.down_proj.weight
        assert torch.equal(kept, want[2, "mlp.down_proj.weight"])
    found.restore()
    plain = BlockStack(strict_model(tmp_path / "m", torch.float32))
    assert torch.equal(losses(placed), losses(plain))


def test_blocks_offloaded_to_memory_give_the_same(tmp_path):
    """As accelerate keeps those that do not fit on a GPU; the copy in memory stays as it is."""
    from accelerate import cpu_offload

    resident, _ = pair("llama", tmp_path / "m")
    model = strict_model(tmp_path / "m", torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = dict(model.state_dict())
    cpu_offload(model, torch.device("cpu"), state_dict=own)
    stack = BlockStack(model)
    assert stack.streamed
    want, found = fit(resident).changes.values, fit(stack)
    assert all(torch.equal(found.changes.values[k], v) for k, v in want.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())


def test_what_is_refused_leaves_no_trace(tmp_path):
    _, streamed = pair("llama", tmp_path / "m")
    before, during = losses(streamed), []

    def never():
        during.append(losses(streamed))
        return False

    fitter = fit(streamed, never, ridges=RIDGES)
    assert len(during) == 2 * len(RIDGES)
    assert not any(torch.equal(found, before) for found in during)
    assert not fitter.changes
    assert torch.equal(losses(streamed), before)


def test_a_fit_that_breaks_off_leaves_no_trace(tmp_path, monkeypatch):
    _, streamed = pair("llama", tmp_path / "m")
    before, put = losses(streamed), WeightOverrides.put

    def failing(self, *args):
        put(self, *args)
        if len(self) == 3:
            assert any(p.device.type == "cpu" for p in streamed.blocks.parameters())
            raise RuntimeError("stop")

    monkeypatch.setattr(WeightOverrides, "put", failing)
    fitter = Regression(streamed, REMOVED, ids(), 8, rounded=in_float32)
    first, _ = gaps(REMOVED, len(streamed))
    with pytest.raises(RuntimeError, match="stop"):
        fitter.fit(first, (0.1,))
    fitter.restore()
    assert torch.equal(losses(streamed), before)


def test_each_block_is_read_once_for_every_ridge(tmp_path, monkeypatch):
    _, streamed = pair("llama", tmp_path / "m")
    fit(streamed).restore()  # the first forward pass of all learns what blocks return
    writers = {}
    first, second = gaps(REMOVED, len(streamed))
    with reads(monkeypatch) as counted:
        fitter = Regression(streamed, REMOVED, ids(), 8, writers, in_float32)
        fitter.fit(first, (0.1,))
        assert set(counted.values()) == {1}, counted
        assert {key.split(".")[2] for key in counted} == {*"0123"[: second.blocks[0]]}
        tried = []
        fitter.fit(second, (0.1, 1.0), lambda: bool(tried.append(1)) or len(tried) == 2)
    by_block = {int(key.split(".")[2]): n for key, n in counted.items()}
    assert by_block == {b: 2 if b >= second.blocks[0] else 1 for b in range(second.blocks[-1] + 1)}
    assert {block for block, *_ in writers} == {*first.blocks, *second.blocks}


def test_never_more_than_three_blocks_are_in_memory(tmp_path):
    """Those that are held; the next one is being read beside them."""
    _, streamed = pair("llama", tmp_path / "m")
    most, real = [], streamed.run

    def run(i, hidden, call):
        held = {
            b
            for b, block in enumerate(streamed.blocks)
            if any(p.device.type != "meta" for p in block.parameters())
        }
        most.append((len(held), streamed.reader._ahead is not None))
        return real(i, hidden, call)

    streamed.run = run
    fit(streamed, removed=frozenset({2, 3}))
    assert max(n + ahead for n, ahead in most) == 3
    assert sum(n > 1 for n, _ in most) == 2 * len(ids()) // 8  # of the dense stream, in the gap


def test_what_was_read_ahead_under_a_patch_is_read_again(tmp_path):
    _, streamed = pair("llama", tmp_path / "m")
    weight = "mlp.down_proj.weight"
    before = losses(streamed)

    def broken_off():
        with repaired(streamed, {f"2.{weight}": torch.zeros(32, 48)}, ""):
            with streamed.holding(0, 2):
                raise RuntimeError("stop")

    shape = streamed.blocks[2].get_parameter(weight).shape
    assert shape == (32, 48)
    with pytest.raises(RuntimeError, match="stop"):
        broken_off()
    with streamed.holding(2):
        assert streamed.blocks[2].get_parameter(weight).abs().max() > 0
    assert torch.equal(losses(streamed), before)


def test_a_block_that_is_held_changes_and_changes_back_at_once(tmp_path):
    _, streamed = pair("llama", tmp_path / "m")
    changes, path = WeightOverrides(streamed), "mlp.down_proj.weight"
    with streamed.holding(1):
        before = streamed.blocks[1].get_parameter(path).clone()
        changes.put(1, path, before + 1)
        changes.put(1, path, before + 2)
        assert torch.equal(streamed.blocks[1].get_parameter(path), before + 2)
        assert list(changes.values) == [(1, path)]
        changes.undo()
        assert torch.equal(streamed.blocks[1].get_parameter(path), before)
    with streamed.holding(1):
        assert torch.equal(streamed.blocks[1].get_parameter(path), before)


@pytest.fixture(scope="module")
def material(learned):
    return fit_windows(byte_tokenizer(), [str(learned / "text.txt")], 8_000)


def test_a_repair_is_the_same_record_and_the_model_scores_as_before(learned, material):
    loaded = sleb.load(learned / "model", **CPU)
    streamed = sleb.load(learned / "model", stream=True, **CPU)
    before = evaluate(streamed, material[1], removed=(1, 4))
    want = repair(loaded, (1, 4), *material, self_generated=False)
    found = repair(streamed, (1, 4), *material)
    assert found.record == want.record
    assert [gap.ridge for gap in found.record.gaps] == [RIDGES[0]] * 2
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in want.tensors.items())
    assert evaluate(streamed, material[1], removed=(1, 4)) == before
    both = [
        evaluate(m, material[1], removed=(1, 4), patch=lambda m=m: found.patch(m.stack))
        for m in (streamed, loaded)
    ]
    assert both[0] == both[1]
    assert both[0].unrepaired == before
    assert both[0].pruned_loss.value < before.pruned_loss.value


def test_a_streamed_model_writes_no_text_and_that_is_said(learned, material):
    streamed = sleb.load(learned / "model", stream=True, **CPU)
    with pytest.raises(InputError, match="cannot write text to fit on, since every token would"):
        repair(streamed, (2,), *material, self_generated=True)
    assert SELF_GENERATED not in [
        s.spec for s in repair(streamed, (2,), *material).record.calibration.sources
    ]


PRUNE = ("--remove", "2", "--windows", "8", "--length", "32", "--heldout", "6", "--text", "TEXT")
PRUNE += ("--repair", "--repair-tokens", "6000", "--device", "cpu", "--dtype", "float32")


def test_prune_streams_repairs_and_verifies(learned, tmp_path, capsys):
    rest = [str(learned / "text.txt") if word == "TEXT" else word for word in PRUNE]
    out = tmp_path / "out"
    assert main(["prune", str(learned / "model"), *rest, "--stream", "-o", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["repair"]["status"] == "repaired"
    assert not record["repair"]["self_generated"]
    measured = record["evaluation"]
    plain = measured["unrepaired"]["pruned_loss"]["value"]
    assert measured["pruned_loss"]["value"] < plain
    plan = sleb.Plan.load(out / "plan.json")
    seen = plan.repair.calibration
    assert 5_500 <= seen.windows * seen.length <= 6_300  # not a third less
    verify = ["verify", str(out), "--model", str(learned / "model")]
    assert main(verify) == 0
    assert "tensors are the plan" in capsys.readouterr().out


def test_apply_streams_a_repair(learned, tmp_path, capsys):
    plan = sleb.search(
        learned / "model", remove=1, text=[str(learned / "text.txt")], windows=4, length=32, **CPU
    )
    plan.save(tmp_path / "plan.json")
    apply = ["apply", str(tmp_path / "plan.json"), str(learned / "model"), "--stream"]
    assert main([*apply, "-o", str(tmp_path / "plain")]) == 2
    assert "only --repair loads blocks" in capsys.readouterr().err
    apply += ["--repair", "--text", str(learned / "text.txt"), "--repair-tokens", "4000"]
    apply += ["--length", "32", "--device", "cpu", "--dtype", "float32"]
    assert main([*apply, "-o", str(tmp_path / "out")]) == 0
    assert "the repair was fitted on all of the given texts" in capsys.readouterr().out
    assert sleb.Plan.load(tmp_path / "out/plan.json").repair.tensors
    assert main(["verify", str(tmp_path / "out"), "--model", str(learned / "model")]) == 0
