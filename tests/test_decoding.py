"""Decoding from a static cache gives, token by token, what full passes without one give."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from sleb.models.decoding import decode
from zoo import tiny

PROMPTS = ([5, 9, 40], [7, 8, 11, 70, 33], [100])


FAMILIES = ["llama", "gpt_neox", "stablelm", "gemma3_text"]
"""The last one has layers with windows, which a static cache is not for."""


def model_of(family):
    return (tiny_llama() if family == "llama" else tiny(family)[0]).eval()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_full_passes(family):
    model = model_of(family)
    before, heard = model.config._attn_implementation, []
    ids, mask = padded()
    wanted = [one_by_one(model, prompt, 12) for prompt in PROMPTS]
    model.generation_config.eos_token_id = wanted[0][2]  # which ends nothing that is not asked to
    found = decode(model, ids, mask, 12, heard.append)
    assert found.tolist() == wanted
    assert sum(heard) == found.numel()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_stops_where_all_have_ended_and_tells_of_every_token(family):
    model, heard = model_of(family), []
    ids, mask = padded()
    whole = decode(model, ids, mask, 40, heard.append)
    ends = tuple(set(whole[:, 3].tolist()))  # every row has one of them by then
    turns: list[int] = []
    model.register_forward_pre_hook(lambda *_: turns.append(1))
    short = decode(model, ids, mask, 40, heard.append, ends=ends)
    assert len(turns) < 40
    for row, full in zip(short.tolist(), whole.tolist(), strict=True):
        stop = next(i for i, token in enumerate(full) if token in ends) + 1
        assert row[:stop] == full[:stop]
    assert sum(heard) == 2 * whole.numel()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_chosen_is_written_and_read(family):
    model = model_of(family)
    ids, mask = padded()
    least = decode(model, ids, mask, 6, lambda n: None, lambda logits: logits.argmin(-1))
    for row, prompt in zip(least.tolist(), PROMPTS, strict=True):
        for i, token in enumerate(row):
            logits = model(torch.tensor([[*prompt, *row[:i]]]), use_cache=False).logits
            assert token == int(logits[0, -1].argmin())
