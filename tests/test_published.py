"""The search against the published algorithm on several architectures: same scores, same order."""

import pytest
import torch

import reference
import sleb
from conftest import byte_tokenizer
from sleb.core.errors import UnsupportedModel
from sleb.models.stack import BlockStack
from sleb.selection.metrics import NLL
from sleb.selection.objective import Objective
from sleb.selection.strategies import STRATEGIES
from sleb.selection.sweep import Sweep
from zoo import tiny

FAMILIES = ["gemma3_text", "gpt2", "mamba", "qwen3_moe"]
FURTHER = ["bloom", "deepseek_v3", "gpt_oss", "opt"]
FAMILIES += [pytest.param(family, marks=pytest.mark.slow) for family in FURTHER]


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_scores_are_those_of_the_published_algorithm(family):
    model, config = tiny(family)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, config.get_text_config().vocab_size, (5, 20), generator=generator)
    order, rounds = reference.greedy(model, ids, 3, protected=(0, 7))

    sweep = Sweep(BlockStack(model), ids, NLL, batch=2)
    objective = Objective(sweep.scorer, 5)
    found = STRATEGIES["greedy"](objective, range(1, 7), 3)

    assert list(found.order) == order
    for got, want in zip(found.rounds, rounds, strict=True):
        assert {s.block: s.mean for s in got.scores} == pytest.approx(want, abs=5e-5)


def test_a_search_in_vain_is_refused_before_it_starts(tmp_path):
    """Jamba's blocks change kind by their place: no single one can be removed."""
    model, _ = tiny("jamba")
    model.save_pretrained(tmp_path / "jamba")
    byte_tokenizer().save_pretrained(tmp_path / "jamba")
    with pytest.raises(UnsupportedModel, match=r"is a period of .* only cuts that keep the"):
        sleb.search(tmp_path / "jamba", remove=2, windows=1, length=8)
