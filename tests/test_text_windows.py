"""Calibration text: how it is cut into windows, and what is refused."""

import hashlib
import json
import logging
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sleb.calibration import sources, tokens
from sleb.calibration.windows import DEFAULT_WINDOWS, load_windows
from sleb.core.errors import InputError
from text_tools import BOS, CHAT, Write, documents, letters, load, texts, tokenizer

# Windows


def test_a_text_of_exactly_n_windows_gives_those(write: Write) -> None:
    text = letters(200)
    write("a.txt", text)
    windows, heldout = load("a.txt", windows=20, heldout=4)
    assert windows.ids.shape == (20, 10)
    assert windows.ids.dtype == torch.int64
    assert "".join(texts(windows)) == text
    assert heldout is None
    # A part of a window at the end is no window.
    write("b.txt", text + "123456789")
    assert torch.equal(load("b.txt", windows=20)[0].ids, windows.ids)


def test_documents_are_joined_by_a_blank_line_and_tokenized_as_one(write: Write) -> None:
    write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ("abc", "", "defgh")))
    windows, _ = load("a.jsonl", length=3, ends="none")
    assert texts(windows) == ["abc", "\n\n\n", "\nde", "fgh"]


@pytest.mark.parametrize(("ends", "bos"), [("none", 0), ("eos", 0), ("bos", 1), ("both", 1)])
def test_windows_start_as_the_tokenizer_starts_a_text(write: Write, ends: str, bos: int) -> None:
    text = letters(120)
    write("a.txt", text)
    windows, _ = load("a.txt", windows=12, length=10 + bos, ends=ends)
    assert windows.ids.shape == (12, 10 + bos)
    assert torch.equal(windows.ids[:, :bos], torch.full((12, bos), BOS))
    assert not (windows.ids[:, bos:] >= BOS).any()
    assert str(tokenizer().decode(windows.ids[:, bos:].flatten())) == text
    assert windows.record.sources[0].tokens == 120


def test_the_seed_decides_the_choice_which_keeps_text_order(write: Write) -> None:
    text = letters(1000)
    write("a.txt", text)
    first, again = (load("a.txt", windows=20, seed=7)[0] for _ in range(2))
    other, negative = (load("a.txt", windows=20, seed=seed)[0] for seed in (8, -7))
    places = [text.index(t) for t in texts(first)]
    assert places == sorted(set(places))
    assert all(place % 10 == 0 for place in places)
    assert torch.equal(first.ids, again.ids)
    assert first.record == again.record
    assert len({w.record.sha256 for w in (first, other, negative)}) == 3
    # The same on every platform and version, or plans would not reproduce.
    assert places[:5] == [90, 130, 160, 170, 240]
    # More windows are more evidence, not other evidence.
    assert set(texts(first)) < set(texts(load("a.txt", windows=30, seed=7)[0]))


@pytest.mark.parametrize(("wanted", "left"), [(5, 5), (80, 80), (200, 80)])
def test_held_out_windows_are_others(write: Write, wanted: int, left: int) -> None:
    write("a.txt", letters(1000))
    windows, heldout = load("a.txt", windows=20, heldout=wanted)
    assert heldout is not None
    assert len(set(texts(heldout))) == len(heldout.ids) == heldout.record.windows == left
    assert not set(texts(windows)) & set(texts(heldout))
    assert texts(heldout) == sorted(texts(heldout))
    assert torch.equal(windows.ids, load("a.txt", windows=20)[0].ids)


def test_sources_share_by_weight(write: Write) -> None:
    for name, start in (("a.txt", 0), ("b.txt", 1000), ("c.txt", 2000)):
        write(name, letters(1000, start))
    windows, heldout = load("a.txt", "b=b.txt@2", "c.txt@0.5", windows=10, heldout=7)
    assert heldout is not None
    # 10 * (2, 4, 1) / 7 is 2.86, 5.71, 1.43; rounded by largest remainder.
    assert Counter(windows.source) == {0: 3, 1: 6, 2: 1}
    assert Counter(heldout.source) == {0: 2, 1: 4, 2: 1}
    assert windows.names == ("a", "b", "c")
    assert all(int(t[:9]) // 1000 == i for t, i in zip(texts(windows), windows.source, strict=True))
    assert not set(texts(windows)) & set(texts(heldout))
    assert [s.windows for s in windows.record.sources] == [3, 6, 1]


def test_without_a_number_all_are_scored_up_to_the_default(write: Write) -> None:
    write("a.txt", letters(1000))
    write("b.txt", letters(50, 1000))
    write("c.txt", letters(1000, 2000))
    assert len(load("a.txt")[0].ids) == DEFAULT_WINDOWS == 32
    assert len(load("b.txt")[0].ids) == 5
    assert Counter(load("a.txt@9", "b.txt", windows="all")[0].source) == {0: 100, 1: 5}
    assert Counter(load("a.txt", "c.txt")[0].source) == {0: 16, 1: 16}
    # The short one sets the number, because weights are kept.
    assert Counter(load("a.txt@2", "b.txt")[0].source) == {0: 11, 1: 5}
    # Held-out windows come from where some are left.
    heldout = load("a.txt", "b.txt", heldout=8)[1]
    assert heldout is not None
    assert set(heldout.source) == {0}


def test_the_record_says_what_was_used(write: Write) -> None:
    write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ("één", "two", "three")))
    windows, _ = load("n=a.jsonl", windows=2, length=4, seed=3)
    text = "één\n\ntwo\n\nthree"
    (source,) = windows.record.sources
    assert source.spec == "n=a.jsonl"
    assert source.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (source.documents, source.tokens, source.windows) == (3, len(text.encode()), 2)
    assert (windows.record.windows, windows.record.length, windows.record.seed) == (2, 4, 3)
    numbers = [*windows.ids.flatten().tolist(), 2, 4]
    raw = b"".join(int(n).to_bytes(8, "little") for n in numbers)
    assert windows.record.sha256 == hashlib.sha256(raw).hexdigest()


def test_a_long_text_is_tokenized_without_a_warning(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("a.txt", letters(200))
    short = tokenizer(model_max_length=50)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        load_windows(short, ["a.txt"], windows=20, length=10, seed=0)
        assert not caplog.records
        short(letters(200))  # the tokenizer does warn by itself
        assert caplog.records
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


def trained(kind: str, text: str) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer that splits text as the known families do."""
    backend = Tokenizer(models.BPE(unk_token="?"))
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama3": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), bytes_only]
        ),
        "prefix": pre_tokenizers.Metaspace(prepend_scheme="always"),
        "gemma": pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        "llama2": pre_tokenizers.Split(Regex("(?!)"), "isolated"),
        "bytes": bytes_only,
    }[kind]
    if kind == "llama2":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=600, special_tokens=["?"], show_progress=False)
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=backend
    )


# Those that begin whatever they get with a space cannot cut Japanese, which has none.
LONGEST = dict.fromkeys(("gpt2", "llama3", "gemma", "bytes"), 1500)
LONGEST |= {"prefix": 4000, "llama2": 4000}


@pytest.mark.parametrize("kind", LONGEST)
def test_a_long_text_has_the_tokens_of_the_whole(monkeypatch, kind):
    prose = documents("default")
    draw = random.Random(0)
    lines = ("".join(draw.choices("日本語本文山川。", k=draw.randint(5, 40))) for _ in range(100))
    text = "\n\n".join([prose[0][:6000], "\n".join(lines), prose[-1][:6000]])
    family = trained(kind, text)
    whole = family(text, add_special_tokens=False)["input_ids"]
    lengths, encode = [], tokens._encoded

    def spy(tokenizer, texts, **options):
        lengths.extend(map(len, texts))
        return encode(tokenizer, texts, **options)

    monkeypatch.setattr(tokens, "_encoded", spy)
    monkeypatch.setattr(tokens, "PIECE", 700)
    assert tokens.encode_text(family, text).tolist() == whole
    assert max(lengths) < LONGEST[kind]
    # Without white space there is no seam, and the text stays whole.
    lengths.clear()
    solid = "abc" * 2000
    assert tokens.encode_text(family, solid).tolist() == encode(family, [solid])[0]
    assert lengths == [6000]


@pytest.mark.parametrize(
    ("specs", "options", "said"),
    [
        ("a.txt", {"length": 128}, "a.txt has 91 tokens.*128.*at most 91"),
        ("a.txt", {"length": 128, "ends": "bos"}, "91 tokens.*128.*at most 92"),
        ("a.txt", {"windows": 10}, "holds 9 windows.*10 are wanted.*--windows 9"),
        ("b.txt@2 a.txt", {"windows": 40}, "a.txt holds 9.*13 are wanted.*--windows 28"),
        ("a.txt@100 b.txt", {"windows": 30}, "a.txt@100 holds 9.*30 are wanted.*weights"),
        ("b.txt@9 a.txt", {"windows": 4}, "--windows 4 leaves none for a.txt"),
        ("a.txt x=a.txt", {}, "a.txt and x=a.txt are the same text.*@2"),
        ("a.txt dir/a.txt", {}, "both named 'a'.*NAME=dir/a.txt"),
        ("a.txt", {"length": 1}, "--length 1"),
        ("a.txt", {"windows": 0}, "--windows 0"),
        ("a.txt", {"heldout": -1}, "-1 held-out"),
    ],
)
def test_what_cannot_be_cut_says_why(write, specs, options, said):
    write("a.txt", letters(91))
    write("b.txt", letters(1000, 1000))
    Path("dir").mkdir()
    write("dir/a.txt", letters(91, 3000))
    with pytest.raises(InputError, match=said):
        load(*specs.split(), **options)


# Chats, of which what the assistant says is scored

THINKS = "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}hm. {% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip  # noqa: E501
CHATS = [
    [("user", f"ask {n}"), ("assistant", f"say {n}"), ("user", "so"), ("assistant", f"yes {n}")]
    for n in range(30)
]


@pytest.fixture
def chats(write) -> list[str]:
    rows = [[{"role": role, "content": said} for role, said in chat] for chat in CHATS]
    lines = "\n".join(json.dumps({"messages": row}) for row in rows)
    write("chats.jsonl", lines)
    write("plain.txt", letters(900))
    return ["chats.jsonl", "plain.txt"]


@pytest.mark.parametrize("template", [CHAT, THINKS])
@pytest.mark.parametrize("ends", ["none", "bos"])
def test_of_chats_what_the_assistant_says_is_scored(chats, template, ends):
    """Also where the last turn is written in another way once more has been said."""
    reader = tokenizer(ends, chat_template=template)
    found, _ = load_windows(reader, chats[:1], windows="all", length=24, seed=0, loss_on="answers")
    words = "".join(reader.decode(i[s]) for i, s in zip(found.ids, found.scored, strict=True))
    said = "".join(turn for chat in CHATS for role, turn in chat if role == "assistant")
    kept = [c for c in words if not c.isspace()]
    assert len(kept) > 0.9 * len(said.replace(" ", ""))  # but for ends, and firsts of windows
    assert set(words) <= set(said + "hm.")
    assert not found.scored[:, 0].any()
    assert found.scored.any(1).all()
    every, _ = load_windows(reader, chats[:1], windows="all", length=24, seed=0)
    assert every.scored is None
    assert len(every.ids) >= len(found.ids)


def test_texts_that_are_no_chats_count_in_full_beside_them(chats):
    reader = tokenizer(chat_template=THINKS)
    plain = load_windows(reader, chats[1:], windows=8, length=24, seed=0, loss_on="answers")[0]
    assert plain.scored is None
    both = load_windows(reader, chats, windows=16, length=24, seed=0, loss_on="answers")[0]
    rows = both.of("plain")
    assert both.scored[rows, 1:].all()
    assert not both.scored[both.of("chats"), 1:].all()


def test_a_chat_in_which_no_assistant_speaks_says_what_to_do(write):
    write("a.jsonl", json.dumps({"messages": [{"role": "user", "content": letters(99)}]}))
    reader = tokenizer(chat_template=THINKS)
    with pytest.raises(InputError, match="--loss-on all"):
        load_windows(reader, ["a.jsonl"], windows=2, length=24, seed=0, loss_on="answers")


# The embedded text


def test_the_embedded_text_is_the_default_and_clean() -> None:
    rows = documents("default")
    raw = sources.DEFAULT.read_bytes()
    assert 450_000 < len(raw) < 550_000
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    assert len(rows) == len(set(rows)) == 168
    assert all(row == row.strip("\n") for row in rows)
    ids = [json.loads(line)["id"] for line in raw.splitlines()]
    assert len(set(ids)) == len(ids)
    assert Counter(i.split(":")[0].split("-")[0] for i in ids) == {
        "factbook": 94,
        "sotu": 64,
        "cpython": 10,
    }
    provenance = sources.DEFAULT.with_name("PROVENANCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256(raw).hexdigest() in provenance
    windows, heldout = load(windows=4, length=2048, heldout=4)
    assert windows.names == ("default",)
    assert windows.record.sources[0].documents == 168
    assert heldout is not None
    assert len(heldout.ids) == 4
