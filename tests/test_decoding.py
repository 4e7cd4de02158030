"""Decoding from a static cache gives, token by token, what full passes without one give."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from sleb.models.decoding import decode
from zoo import tiny

PROMPTS = ([5, 9, 40], [7, 8, 11, 70, 33], [100])


def padded():
    longest = max(map(len, PROMPTS))
    ids = torch.zeros((len(PROMPTS), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, here, prompt in zip(ids, mask, PROMPTS, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
        here[longest - len(prompt) :] = 1
    return ids, mask


@torch.no_grad()
def one_by_one(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "stablelm"])
def test_tokens_are_those_of_full_passes(family):
    model = tiny_llama() if family == "llama" else tiny(family)[0]
    model.eval()
    before, heard = model.config._attn_implementation, []
    ids, mask = padded()
    found = decode(model, ids, mask, 12, heard.append)
    assert found.tolist() == [one_by_one(model, prompt, 12) for prompt in PROMPTS]
    assert sum(heard) == found.numel()
    assert model.config._attn_implementation == before


def test_it_stops_where_all_have_ended_and_tells_of_every_token():
    model, heard = tiny_llama().eval(), []
    ids, mask = padded()
    whole = decode(model, ids, mask, 40, heard.append)
    ends = tuple(set(whole[:, 3].tolist()))  # every row has one of them by then
    turns: list[int] = []
    model.register_forward_pre_hook(lambda *_: turns.append(1))
    short = decode(model, ids, mask, 40, heard.append, ends=ends)
    assert len(turns) < 40
    assert short[:, :4].equal(whole[:, :4])
    assert sum(heard) == 2 * whole.numel()


def test_what_is_chosen_is_written_and_read():
    model = tiny_llama().eval()
    ids, mask = padded()
    least = decode(model, ids, mask, 6, lambda n: None, lambda logits: logits.argmin(-1))
    for row, prompt in zip(least.tolist(), PROMPTS, strict=True):
        for i, token in enumerate(row):
            logits = model(torch.tensor([[*prompt, *row[:i]]]), use_cache=False).logits
            assert token == int(logits[0, -1].argmin())
