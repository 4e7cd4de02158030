"""Answers to the user's own prompts: as transformers' greedy ones, paired, and judged rightly."""

import gc
import hashlib
import json
import math
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import conftest
import sleb
from conftest import byte_tokenizer
from sleb.calibration.prompts import Prompt
from sleb.core.errors import InputError
from sleb.core.progress import silent
from sleb.core.statistics import proportion
from sleb.evaluation import answers
from sleb.evaluation.answer_checks import first_difference, language, repetition, script
from sleb.evaluation.answers import Comparison, compare
from sleb.record import Stopwatch

CPU = {"dtype": "float32", "device": "cpu"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def plain(text: str, id: str = "p", **options) -> Prompt:
    return Prompt(id=id, text=text, messages=None, **options)


def chat(content: str, id: str = "c", role: str = "user") -> Prompt:
    return Prompt(id=id, text=None, messages=({"role": role, "content": content},))


PROMPTS = (plain("the block of", "one"), plain("nothing", "two", json=True), plain("a", "three"))


out = conftest.cut


@pytest.fixture(scope="module")
def compared(tiny_dir, out) -> Comparison:
    return compare(tiny_dir, out, PROMPTS, new_tokens=12, **CPU)


@pytest.fixture
def copy(tiny_dir, tmp_path):
    """A copy of the tiny model in which something is changed."""

    def copy(name: str, template: str | None = None, **generation) -> Path:
        path = Path(shutil.copytree(tiny_dir, tmp_path / name))
        if template:
            tokenizer = byte_tokenizer()
            tokenizer.chat_template = template
            tokenizer.save_pretrained(path)
        if generation:
            file = path / "generation_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
        return path

    return copy


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is a failed test: the mistake was to be found before."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(answers, "load", load)


def greedy(path: Path, ids: list[int], n: int, forbidden: tuple[int, ...] = ()) -> list[int]:
    """Likeliest tokens one by one, from a full pass each, without a cache."""
    model = sleb.load(path, **CPU).model
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[list(forbidden)] = -math.inf
        ids = [*ids, int(logits.argmax())]
    return ids[start:]


def test_answers_are_the_greedy_ones_of_each_model(tiny_dir, out, compared):
    tokenizer = byte_tokenizer()
    for prompt, pair in zip(PROMPTS, compared.pairs, strict=True):
        ids = tokenizer(prompt.text).input_ids
        before, after = (greedy(path, ids, 12) for path in (tiny_dir, out))
        assert (pair.id, pair.prompt) == (prompt.id, prompt.text)
        for answer, tokens in ((pair.dense, before), (pair.pruned, after)):
            assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
            assert (answer.tokens, answer.ended) == (12, False)
            assert answer.repetition == repetition(tokens)
            assert answer.script == script(answer.text)
            assert answer.language == language(answer.text)
            assert answer.json_valid is (False if prompt.json else None)
            assert answer.seconds > 0
        assert pair.agreed == first_difference(before, after) < 12
    assert len({pair.dense.text for pair in compared.pairs}) == 3


def test_the_sum_is_that_of_the_pairs(compared):
    pairs = compared.pairs
    n = len(pairs)
    for model in ("dense", "pruned"):
        each, whole = [getattr(p, model) for p in pairs], getattr(compared, model)
        assert whole.ended == proportion(sum(a.ended for a in each), n)
        assert whole.empty == proportion(sum(not a.text.strip() for a in each), n)
        assert whole.repetitive == proportion(sum(a.repetition > 0.5 for a in each), n)
        assert whole.json_valid == proportion(0, 1)
        assert whole.seconds_median == sorted(a.seconds for a in each)[1]
        assert whole.seconds_median <= whole.seconds_p90 <= max(a.seconds for a in each)
    assert (compared.prompts, compared.max_new_tokens) == (n, 12)
    assert compared.identical == proportion(0, n)
    assert compared.switched == proportion(sum(p.switched for p in pairs), n)
    assert compared.agreed_median == sorted(p.agreed for p in pairs)[1]
    logs = np.log([p.dense.seconds / p.pruned.seconds for p in pairs])
    ends = stats.t.interval(0.95, n - 1, logs.mean(), stats.sem(logs))
    ratio = compared.seconds_per_token_ratio
    assert ratio.value == pytest.approx(math.exp(logs.mean()))
    assert (ratio.low, ratio.high) == pytest.approx(tuple(np.exp(ends)))
    assert len(compared.sha256) == len(hashlib.sha256().hexdigest())


def test_a_model_agrees_with_itself_and_again(tiny_dir, out, compared):
    watch = Stopwatch(silent)
    same = compare(tiny_dir, tiny_dir, PROMPTS[:2], new_tokens=5, **CPU, progress=watch)
    assert {f"loading {tiny_dir.name}", f"answering with {tiny_dir.name}"} <= watch.seconds.keys()
    assert same.identical == proportion(2, 2)
    assert same.switched == proportion(0, 2)
    assert same.agreed_median == 5
    assert all(pair.identical for pair in same.worst_first)
    again = compare(tiny_dir, out, PROMPTS, new_tokens=12, **CPU)
    assert again.sha256 == compared.sha256 != same.sha256

    def still(pair):
        return replace(
            pair, **{m: replace(getattr(pair, m), seconds=0) for m in ("dense", "pruned")}
        )

    assert [still(p) for p in again.pairs] == [still(p) for p in compared.pairs]


def test_answers_are_judged_by_their_rows_before_and_after(tiny_dir, out, compared):
    text = compared.pairs[2].dense.text
    asked = [PROMPTS[0], replace(PROMPTS[2], expected={"regex": f"^{re.escape(text)}$"})]
    found = compare(tiny_dir, out, asked, new_tokens=12, **CPU)
    assert [pair.judged and pair.judged.lost for pair in found.pairs] == [None, True]
    assert found.worst_first[0].id == "three"


def test_a_schema_that_is_none_is_found_before_weights_are_loaded(tiny_dir, out, no_weights):
    wrong = plain("a", expected={"json_schema": {"type": 5}})
    with pytest.raises(InputError, match="json_schema"):
        compare(tiny_dir, out, [wrong], **CPU)


def test_the_generation_config_is_kept_but_for_sampling(tiny_dir, copy, capfd, recwarn):
    ids = byte_tokenizer()("nothing").input_ids
    first = greedy(tiny_dir, ids, 1)[0]
    tokens = greedy(tiny_dir, ids, 12, forbidden=(first,))
    stop = next(t for t in tokens[3:] if t not in tokens[:3])
    end = tokens.index(stop) + 1
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 7, "top_p": 0.5, "num_beams": 3}
    model = copy(
        "sampling", **sampling, max_length=40, eos_token_id=[2, stop], suppress_tokens=[first]
    )
    capfd.readouterr()
    found = compare(model, tiny_dir, [PROMPTS[1]], new_tokens=12, **CPU).pairs[0]
    assert found.dense.tokens == end
    assert found.dense.ended
    assert found.dense.text == byte_tokenizer().decode(tokens[:end], skip_special_tokens=True)
    assert not found.pruned.ended
    assert capfd.readouterr() == ("", "")
    assert not [w for w in recwarn if "generation" in str(w.message) or "sample" in str(w.message)]
    at_the_limit = compare(model, model, [PROMPTS[1]], new_tokens=end, **CPU).pairs[0]
    assert at_the_limit.dense.ended


def test_an_answer_of_special_tokens_is_empty_and_has_no_speed(tiny_dir, copy):
    ids = byte_tokenizer()("a").input_ids
    first = greedy(tiny_dir, ids, 1)[0]
    others = [i for i in range(259) if i != 2]
    silent = copy("silent", suppress_tokens=others)
    found = compare(tiny_dir, silent, [plain("a")], new_tokens=3, **CPU)
    pair = found.pairs[0]
    assert (pair.pruned.text, pair.pruned.tokens, pair.pruned.ended) == ("", 1, True)
    assert pair.pruned.script == ""
    assert not pair.switched
    assert found.pruned.empty == proportion(1, 1)
    assert found.dense.empty == proportion(0, 1)
    assert found.seconds_per_token_ratio is None
    assert found.dense.json_valid is None
    assert first != 2
    assert pair.faults == ("empty",)


def test_a_chat_goes_through_the_template_with_a_generation_prompt(copy):
    model = copy("chat", TEMPLATE)
    found = compare(model, model, [chat("hi"), plain("hi")], new_tokens=4, **CPU).pairs
    assert [p.prompt for p in found] == ["<user>hi<assistant>"] * 2, "plain text is a user's turn"
    ids = byte_tokenizer()("<user>hi<assistant>").input_ids
    assert found[0].dense.text == byte_tokenizer().decode(
        greedy(model, ids, 4), skip_special_tokens=True
    )


def test_one_model_is_in_memory_at_a_time(tiny_dir, out, monkeypatch):
    seen = []

    def load(*args, **kwargs):
        assert all(model() is None for model in seen)
        loaded = sleb.load(*args, **kwargs)
        seen.append(weakref.ref(loaded.model))
        return loaded

    gc.disable()  # a cycle that is not collected on purpose would be a chance
    try:
        monkeypatch.setattr(answers, "load", load)
        compare(tiny_dir, out, PROMPTS[:1], new_tokens=2, **CPU)
    finally:
        gc.enable()
    assert len(seen) == 2


@pytest.mark.usefixtures("no_weights")
def test_mistakes_are_found_before_any_weights_are_loaded(tiny_dir, out, copy, tmp_path):
    def refused(said, dense, pruned, prompts, **options):
        with pytest.raises(InputError, match=said):
            compare(dense, pruned, prompts, **{**CPU, **options})

    chats = copy("chat", TEMPLATE)
    refused("prompt 'c' is a chat, but", tiny_dir, out, [plain("a"), chat("hi")])
    refused(r"'c' does not fit .* \(no robots\)", chats, chats, [chat("hi", role="robot")])
    with pytest.raises(AssertionError, match="weights were loaded"):
        compare(tiny_dir, out, [plain("a" * 200)], new_tokens=56, **CPU)
    long = [plain("a", "q"), plain("a" * 201)]
    refused("prompt 'p' takes 201 of the 256 tokens", tiny_dir, out, long, new_tokens=56)
    refused(r"no checkpoint folder at .*none", tiny_dir, tmp_path / "none", PROMPTS)
    (tmp_path / "bare").mkdir()
    refused(r"no config\.json", tiny_dir, tmp_path / "bare", PROMPTS)
    shutil.copy(tiny_dir / "config.json", tmp_path / "bare")
    refused("safetensors", tiny_dir, tmp_path / "bare", PROMPTS)
    other = copy("tokens")
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    refused(r"different tokenizers \(of 259 and 259 tokens\)", tiny_dir, other, PROMPTS)
    bots = copy("bots", TEMPLATE.replace("assistant", "bot"))
    refused("read prompt 'c' differently", chats, bots, [chat("hi")], new_tokens=9)
    refused("no prompts to compare on", tiny_dir, out, ())
    refused("--new-tokens 0", tiny_dir, out, PROMPTS, new_tokens=0)
    refused("--device 'tpu'", tiny_dir, out, PROMPTS, device="tpu")
    refused("prompt 'p' has no tokens", tiny_dir, out, [plain("")])
