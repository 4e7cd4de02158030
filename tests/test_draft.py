"""A pruned model as draft: answers stay the dense model's, and what is accepted is counted."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import stats

import sleb
from cli_tools import refused, run
from conftest import byte_tokenizer, save_tiny
from plan_tools import plan_of
from runtime_tools import CPU, InProcess
from sleb.calibration.prompts import Prompt
from sleb.core.errors import InputError, UnsupportedModel
from sleb.runtimes import worker
from sleb.runtimes.speculative import Drafting, Tally, acceptance_rate, draft
from sleb.runtimes.transformers import Transformers
from sleb.runtimes.worker import Child
from zoo import tiny

PROMPTS = tuple(
    Prompt(id=text, text=text, messages=None) for text in ("the block of", "passes its", "x")
)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Models are loaded by this process; one test has a child."""
    monkeypatch.setattr(worker, "Child", InProcess)


@pytest.fixture(scope="module")
def pair(learned, tmp_path_factory) -> tuple[Path, Path]:
    """A model that has learned a little, without an end token, and the same without a block."""
    home = tmp_path_factory.mktemp("drafts")
    dense = shutil.copytree(learned / "model", home / "dense")
    (dense / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))
    return dense, sleb.apply(plan_of(dense, 2), dense, home / "out")


@torch.inference_mode()
def likeliest(model, ids: list[int]) -> list[int]:
    """The likeliest token after each."""
    return model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()


def simulated(dense, small, ids: list[int], new: int, k: int) -> tuple[list[int], Tally]:
    """Greedy speculative decoding from its definition, without any cache."""
    ids, start, proposed, accepted = list(ids), len(ids), 0, 0
    while (left := new - (len(ids) - start)) > 0:
        drafted: list[int] = []
        for _ in range(min(k, left - 1)):
            drafted.append(likeliest(small, ids + drafted)[-1])
        own = likeliest(dense, ids + drafted)[len(ids) - 1 :]
        right = 0
        while right < len(drafted) and drafted[right] == own[right]:
            right += 1
        ids += own[: right + 1]
        proposed, accepted = proposed + len(drafted), accepted + right
    return ids[start:], Tally(proposed=proposed, accepted=accepted)


@pytest.mark.parametrize("k", [1, 3])
def test_answers_are_the_dense_models_and_counts_those_of_the_definition(pair, k):
    found = draft(pair[0], pair[1:], PROMPTS, new_tokens=14, draft_tokens=k, runs=1, **CPU)
    (one,) = found.drafts
    assert (found.prompts, found.tokens, found.blocks, one.blocks) == (3, 42, 6, 5)
    assert one.identical == 3
    dense, small = (sleb.load(path, dtype="float32", device="cpu") for path in pair)
    tallies = []
    for prompt in PROMPTS:
        ids = dense.tokenizer(prompt.text).input_ids
        answer, tally = simulated(dense.model, small.model, ids, 14, k)
        plain = dense.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=14)
        assert plain[0, len(ids) :].tolist() == answer
        tallies.append(tally)
    assert one.tallies == tuple(tallies)
    accepted, proposed = (sum(getattr(t, n) for t in tallies) for n in ("accepted", "proposed"))
    assert 0 < accepted < proposed
    assert one.acceptance.value == pytest.approx(accepted / proposed)
    assert one.ceiling == pytest.approx((k + 1) / (1 + k * 5 / 6))
    assert TypeAdapter(Drafting).validate_json(json.dumps(asdict(found))) == found


def test_a_different_answer_is_counted(pair, monkeypatch):
    generate = Transformers.generate

    def off(self, ids, new_tokens, draft, counted):
        made = generate(self, ids, new_tokens, draft, counted)
        if draft is not None and len(ids) == 1:
            made["tokens"][-1] += 1
        return made

    monkeypatch.setattr(Transformers, "generate", off)
    found = draft(pair[0], pair[1:], PROMPTS, new_tokens=4, runs=1, **CPU)
    assert found.drafts[0].identical == 2


def test_generation_settings_of_the_models_do_not_matter(pair, tmp_path):
    """Sampling, penalties, and a length of its own."""
    models = [shutil.copytree(path, tmp_path / path.name) for path in pair]
    own = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "max_length": 3}
    for path in models:
        (path / "generation_config.json").write_text(json.dumps(own))
    (as_set, plain) = (
        draft(m[0], m[1:], PROMPTS[:2], new_tokens=6, runs=1, **CPU) for m in (models, pair)
    )
    assert as_set.tokens == plain.tokens == 12
    assert as_set.drafts[0].tallies == plain.drafts[0].tallies
    assert as_set.drafts[0].identical == 2


def test_an_answer_ends_where_the_dense_model_ends_it(pair, tmp_path):
    dense, out = (shutil.copytree(path, tmp_path / path.name) for path in pair)
    loaded = sleb.load(dense, dtype="float32", device="cpu")
    ids = loaded.tokenizer("the block of").input_ids
    answer = loaded.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=9)[0]
    end = int(answer[len(ids) + 5])
    length = answer[len(ids) :].tolist().index(end) + 1
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    found = draft(dense, [out], PROMPTS[:1], new_tokens=9, runs=1, **CPU)
    assert found.tokens == length < 9
    assert found.drafts[0].identical == 1


def test_rounds_are_paired_and_take_turns(pair, tmp_path, monkeypatch):
    log: list[int | None] = []
    pace = {None: 1.0, 0: 0.5, 1: 2.0}
    generate = Transformers.generate

    def timed(self, ids, new_tokens, draft, counted):
        if counted:
            return generate(self, ids, new_tokens, draft, counted)
        log.append(draft)
        return {"seconds": pace[draft] * (1 + len(log))}  # a machine that becomes slower

    monkeypatch.setattr(Transformers, "generate", timed)
    again = shutil.copytree(pair[1], tmp_path / "again")
    found = draft(pair[0], [pair[1], again], PROMPTS[:2], new_tokens=2, runs=6, **CPU)
    there = [None, None, 0, 0, 1, 1]
    assert log == (there + there[::-1]) * 3
    first, second = found.drafts
    each = np.array(found.seconds) / np.array(first.seconds)
    assert first.ratio.value == pytest.approx(np.median(each))
    assert (first.ratio.low, first.ratio.high) == pytest.approx((each.min(), each.max()))
    assert first.ratio.low > 1 > second.ratio.high
    assert found.tokens_per_second == pytest.approx(4 / np.median(found.seconds))
    assert first.tokens_per_second == pytest.approx(4 / np.median(first.seconds))


def test_the_interval_of_acceptance():
    def rate(proposed, accepted):
        pairs = zip(proposed, accepted, strict=True)
        return acceptance_rate([Tally(proposed=int(p), accepted=int(a)) for p, a in pairs])

    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        proposed = rng.integers(10, 60, 12)
        found = rate(proposed, rng.binomial(proposed, np.clip(rng.normal(0.6, 0.1, 12), 0, 1)))
        hits += found.low <= 0.6 <= found.high
    assert stats.binomtest(hits, 400, 0.95).pvalue > 1e-4
    same, alone = rate([10] * 3, [5] * 3), rate([4], [1])
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    assert (alone.value, alone.low) == (0.25, None)
    assert rate([0, 0], [0, 0]).value == 0


@pytest.mark.slow
def test_the_command_drafts_in_a_child(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = ["bench", pair[0], pair[1], "--draft", "--quick", "--device", "cpu", "--threads", "1"]
    Path("p.txt").write_text("the block of\npasses its\n")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "Child", Child)
        ran = run(capsys, *bench, "--runs", "1", "--prompts", "p.txt", "--json")
    assert (ran.code, ran.json["prompts"], ran.json["tokens"]) == (0, 2, 32)
    ran = run(capsys, *bench, "--runs", "1", "--prompts", "p.txt")
    assert ran.code == 0
    assert "2 of 2" in ran.out
    assert "pruned checkpoint" in refused(capsys, 2, "bench", pair[0], "--draft")
    assert "--draft" in refused(capsys, 2, "bench", pair[0], pair[1], "--prompts", "p.txt")


def test_without_prompts_embedded_text_is_begun(pair):
    found = draft(pair[0], pair[1:], new_tokens=1, runs=1, **CPU)
    assert (found.prompts, found.tokens) == (8, 8)
    assert all(t == Tally(proposed=0, accepted=0) for t in found.drafts[0].tallies)


def test_what_cannot_be_drafted(pair, tmp_path):
    for wrong in ({"draft_tokens": 0}, {"runs": 0}, {"new_tokens": 0}, {"threads": 0}):
        with pytest.raises(InputError, match="--" + next(iter(wrong)).replace("_", "-")):
            draft(pair[0], pair[1:], **{**CPU, **wrong})
    with pytest.raises(InputError, match="256 tokens"):
        draft(pair[0], pair[1:], new_tokens=200, **CPU)
    other = save_tiny(tmp_path / "other", blocks=3)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="different tokenizers"):
        draft(pair[0], [other], **CPU)


def test_a_model_that_cannot_take_tokens_back(tmp_path):
    model, _ = tiny("mamba", vocab_size=259)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    out = sleb.apply(plan_of(tmp_path / "dense", 2), tmp_path / "dense", tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="draft for Mamba"):
        draft(tmp_path / "dense", [out], PROMPTS, new_tokens=4, runs=1, **CPU)
