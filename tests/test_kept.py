"""A round of a search starts from what the round before has computed."""

from __future__ import annotations

import pytest
import torch

import sleb
from conftest import tiny_llama
from sleb.models.stack import BlockStack
from sleb.selection.activation_cache import ActivationCache
from sleb.selection.metrics import METRICS
from sleb.selection.objective import Objective
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep


def greedy_forwards(ids, dtype=torch.float32, **options):
    """A greedy search for 3 of 12 blocks that removes 8, 9 and 7."""
    model = tiny_llama(seed=2, blocks=12)
    for i, block in enumerate(model.model.layers):
        size = {8: 0.001, 9: 0.01, 7: 0.1}.get(i, 1.0)
        for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
            weight.data *= size
    sweep = Sweep(BlockStack(model.to(dtype)), ids, METRICS["kl"].token, batch=2, **options)
    objective = Objective(sweep.values, len(ids), step=sweep.step)
    found = STRATEGIES["greedy"](objective, range(1, 11), 3)
    assert found.order == (8, 9, 7)
    return sweep, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_starts_from_what_the_one_before_has_computed(dtype):
    ids = torch.randint(3, 259, (6, 16), generator=torch.Generator().manual_seed(0))
    plain, want = greedy_forwards(ids, dtype)
    saving, got = greedy_forwards(ids, dtype, keep=True)
    assert got.rounds == want.rounds  # to the bit
    assert saving.forwards < 0.85 * plain.forwards
    state = 2 * 16 * saving.stack.model.config.hidden_size * dtype.itemsize
    # max_bytes is for all streams; half of it may be kept
    tight, got = greedy_forwards(ids, dtype, keep=True, max_bytes=2 * 5 * state)
    assert got.rounds == want.rounds
    assert saving.forwards < tight.forwards < plain.forwards
    assert sum(len(s) for s in tight._kept._states.values()) == 5


def test_out_of_memory_first_gives_up_what_was_kept():
    ids = torch.randint(3, 259, (6, 16), generator=torch.Generator().manual_seed(0))
    plain, want = greedy_forwards(ids)
    real, failed = BlockStack.run, []

    def run(self, i, hidden, call):
        if saved and saved[0]._kept and not failed:
            failed.append(i)
            raise torch.OutOfMemoryError("pretend")
        return real(self, i, hidden, call)

    saved = []
    init = Sweep.__init__

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockStack, "run", run)
        patch.setattr(
            Sweep, "__init__", lambda self, *a, **k: saved.append(self) or init(self, *a, **k)
        )
        sweep, got = greedy_forwards(ids, keep=True)
    assert failed
    assert sweep.batch == 2
    assert not sweep._kept
    assert got.rounds == want.rounds
    assert plain.forwards - sweep.forwards < 12 * 6


@pytest.mark.parametrize("exact", [True, False])
def test_an_exact_search_keeps_states_and_a_race_does_not(exact, tiny_dir, monkeypatch):
    budgets = []
    monkeypatch.setattr(
        "sleb.selection.sweep.ActivationCache", lambda n: budgets.append(n) or ActivationCache(n)
    )
    sleb.search(tiny_dir, remove=2, windows=4, length=16, exact=exact, device="cpu")
    assert (max(budgets) > 0) == exact
