"""Compiled blocks: they compute the same, a search says that it used them, and what cannot be."""

import pytest
import torch

import sleb
from sleb.core.errors import InputError
from sleb.models.compiled import CompiledStack
from sleb.models.stack import BlockStack


@pytest.mark.slow
def test_full_batches_run_compiled_and_agree(tiny_dir):
    stack = sleb.load(tiny_dir, dtype="float32", device="cpu").stack
    fused = CompiledStack(stack.model, 4)
    ids = torch.randint(0, 256, (4, 32))
    hidden, calls = stack.enter(ids)
    torch._dynamo.utils.counters.clear()
    for i in (1, 2, 3):
        found, own = fused.run(i, hidden, calls[i]), stack.run(i, hidden, calls[i])
        torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all blocks
    part, calls = stack.enter(ids[:2])
    assert torch.equal(fused.run(1, part, calls[1]), stack.run(1, part, calls[1]))


def test_streamed_blocks_are_not_compiled(tiny_dir, monkeypatch):
    with pytest.raises(InputError, match=r"compiled.*--stream"):
        sleb.search("nowhere", remove=1, compile=True, stream=True)  # before it looks for a model
    stack = sleb.load(tiny_dir, device="cpu").stack
    monkeypatch.setattr(BlockStack, "streamed", True)
    with pytest.raises(InputError, match=r"compiled.*--stream"):
        CompiledStack(stack.model, 4)


@pytest.mark.slow
def test_a_compiled_search_finds_the_same_and_says_so(tiny_dir, monkeypatch):
    ran, own = [], CompiledStack.run

    def run(self, i, hidden, call):
        ran.append(len(hidden) == self.windows)
        return own(self, i, hidden, call)

    monkeypatch.setattr(CompiledStack, "run", run)
    options = {"remove": 2, "windows": 8, "length": 32, "batch": 4, "dtype": "float32"}
    plain = sleb.search(tiny_dir, device="cpu", **options)
    assert not ran
    fused = sleb.search(tiny_dir, device="cpu", compile=True, **options)
    assert any(ran)
    assert fused.order == plain.order
    assert (plain.compiled, fused.compiled) == (False, True)
