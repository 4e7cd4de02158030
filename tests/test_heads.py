"""Losses, choices and samples from tiles of logits are those of whole rows."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from sleb.evaluation.agreement import ANSWER_QUALITY
from sleb.models import heads
from sleb.models.decoding import decode
from sleb.models.stack import BlockStack
from sleb.selection.metrics import KL, NLL, QUALITY
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import Sweep

WIDTH, VOCAB, ROWS = 16, 2 * heads.COLUMNS + 300, heads.ROWS + 40
SETS = [DENSE, BlockSet([2]), BlockSet([3, 4])]


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB).requires_grad_(False)
    head.weight.mul_(4)
    return head


def test_losses_and_divergences_are_those_of_whole_rows(head):
    dense = torch.randn(ROWS, WIDTH)
    given = torch.stack((dense + 0.3 * torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)))
    targets = torch.randint(VOCAB, (ROWS,))
    found = heads.predicted(head, given, targets, dense, same=True)
    exact = head.double()
    for k, x in enumerate(given):
        log_q, log_p = (exact(each.double()).log_softmax(-1) for each in (x, dense))
        nll = -log_q.gather(1, targets[:, None])[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert torch.allclose(found.nll[k].double(), nll, atol=1e-5)
        assert torch.allclose(found.kl[k].double(), kl, atol=1e-5)
        assert torch.equal(found.same[k], (log_q.argmax(-1) == log_p.argmax(-1)).float())
    assert 0 < found.same.mean() < 1


def test_of_equal_logits_the_first_is_likeliest(head):
    given = torch.randn(50, WIDTH)
    best = head(given).argmax(-1)
    assert torch.equal(heads.likeliest(head, given), best)
    with torch.no_grad():  # every column of the first half comes again, in other tiles
        half = VOCAB // 2
        head.weight[half:], head.bias[half:] = head.weight[:half].clone(), head.bias[:half].clone()
    assert heads.likeliest(head, given).max() < half


def test_samples_have_their_probabilities(head):
    torch.manual_seed(1)
    heat, never = torch.tensor([[1.0], [3.0]]), [7, VOCAB - 1]
    x = torch.randn(1, WIDTH)
    n = 20_000
    for warm in heat:
        room = heads.room_for(head, n)
        drawn = heads.sampled(head, x.repeat(n, 1), warm.expand(n, 1), never, room)
        logits = (head(x)[0] / warm).double()
        logits[never] = float("-inf")
        counts = torch.bincount(drawn, minlength=VOCAB).double()
        share = logits.softmax(0)
        off = (counts / n - share).abs() / (share * (1 - share) / n).sqrt().clamp_min(1 / n)
        assert off.max() < 5
        assert not counts[never].any()


@pytest.mark.parametrize(
    ("family", "plain"), [("llama", True), ("gemma2", False), ("granite", False), ("cohere", False)]
)
def test_only_a_head_that_does_nothing_else_is_plain(family, plain):
    options = {"logits_scaling": 3.0} if family == "granite" else {}
    model, _ = zoo.tiny(family, **options)
    assert (BlockStack(model).plain_head is not None) is plain


@pytest.mark.parametrize("metric", [NLL, KL, QUALITY, ANSWER_QUALITY], ids=lambda m: m.name)
@pytest.mark.parametrize("part", [False, True], ids=["all tokens", "some tokens"])
def test_scores_are_those_of_logits(metric, part):
    model, _ = zoo.tiny("llama")
    stack, draw = BlockStack(model), torch.Generator().manual_seed(0)
    ids = torch.randint(zoo.VOCAB, (5, 20), generator=draw)
    scored = torch.rand(5, 20, generator=draw) < 0.5 if part else None
    if scored is not None:
        scored[:, 0], scored[:, 1] = False, True
    found, wanted = (
        Sweep(stack, ids, each, batch=2, scored=scored).values(SETS, 0, 5)
        for each in (metric, replace(metric, of=None))
    )
    assert np.allclose(found, wanted, atol=1e-5)
    assert np.abs(wanted[1]).max() > 1e-2


def test_a_long_answer_reads_all_of_the_cache():
    model, _ = zoo.tiny("llama")
    ids = torch.arange(3, 11)[None].repeat(2, 1)
    found = decode(model, ids, torch.ones_like(ids), 60, lambda n: None)
    whole = torch.cat((ids, found), 1)
    with torch.inference_mode():
        said = model(input_ids=whole).logits.argmax(-1)[:, 7:-1]
    assert torch.equal(found, said)


FAULTS = """
import resource, sys
from sleb.cli.main import main
if sys.argv[1] == "sleb":
    main(["--version"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    some = [bytearray(2**23) for _ in range(4)]
    del some
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_command_uses_freed_memory_again():
    pages = 4 * 2**23 // 4096
    faults = {}
    for how in ("sleb", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
        )
        faults[how] = int(done.stdout.split()[-1])
    assert faults["sleb"] < 2 * pages
    assert faults["plain"] > 5 * pages
