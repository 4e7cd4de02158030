"""Laws of calibration text: what is read, what is cut from it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sleb.errors import DataError, InputError, ResourceError, SlebError
from sleb.text import (
    DEFAULT_WINDOWS,
    SOURCES,
    Windows,
    load_windows,
    parse_source,
    read_documents,
    sources,
    tokens,
)

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
BOS = 256
ENDS = {"bos": "<s> $A", "both": "<s> $A </s>", "eos": "$A </s>", "none": "$A"}


def tokenizer(ends: str = "none", **options: Any) -> PreTrainedTokenizerFast:
    """One token a byte, so that windows can be read back as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=ENDS[ends], special_tokens=[("<s>", BOS), ("</s>", BOS + 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options
    )


def letters(n: int, start: int = 0) -> str:
    """``n`` bytes in which every run of ten is different."""
    return "".join(f"{i:09d} " for i in range(start, start + n // 10 + 1))[:n]


def load(
    *specs: str, windows: int | None = None, length: int = 10, seed: int = 0, **options: Any
) -> tuple[Windows, Windows | None]:
    """``load_windows`` with a byte tokenizer and small windows."""
    ends = options.pop("ends", "none")
    return load_windows(
        tokenizer(ends), specs, windows=windows, length=length, seed=seed, **options
    )


def texts(windows: Windows) -> list[str]:
    """The windows as text."""
    return [str(tokenizer().decode(row)) for row in windows.ids]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Write a file into an empty working folder; gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


Write = Callable[[str, str], str]


def documents(spec: str, **options: Any) -> list[str]:
    """What a spec holds."""
    return read_documents(parse_source(spec), tokenizer(**options))


def message(spec: str, **options: Any) -> str:
    """The error of reading a spec, which must be one line."""
    with pytest.raises(InputError) as caught:
        documents(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Specs


@pytest.mark.parametrize(
    ("spec", "name", "kind", "location", "weight"),
    [
        ("dir/a.txt", "a", ".txt", "dir/a.txt", 1),
        ("a.JSONL@2", "a", ".jsonl", "a.JSONL", 2),
        ("wiki=b/a.parquet@0.5", "wiki", ".parquet", "b/a.parquet", 0.5),
        ("me@home/a.txt", "a", ".txt", "me@home/a.txt", 1),
        ("you@me.txt", "you@me", ".txt", "you@me.txt", 1),
        ("default", "default", "default", "default", 1),
        ("base=default@3", "base", "default", "default", 3),
        ("hub:org/name/config:split@2", "org/name/config", "hub:", "org/name/config:split", 2),
        ("hub:wikitext:train[:9]", "wikitext", "hub:", "wikitext:train[:9]", 1),
    ],
)
def test_a_spec_is_taken_apart(
    spec: str, name: str, kind: str, location: str, weight: float
) -> None:
    source = parse_source(spec)
    assert (source.name, source.kind, source.location) == (name, kind, location)
    assert (source.spec, source.weight) == (spec, weight)


def test_a_file_that_looks_like_a_spec_is_a_file(write: Write) -> None:
    write("a=b.txt", "literal")
    write("b.txt", "named")
    assert documents("a=b.txt") == ["literal"]
    assert documents("c=b.txt") == ["named"]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "x", "1e999", ""])
def test_a_weight_is_a_positive_number(weight: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_source(f"a.txt@{weight}")
    assert str(caught.value) == (
        f"--text a.txt@{weight}: the weight '{weight}' is not a positive number; "
        "write for example @2"
    )


def test_an_unknown_kind_lists_the_known(tmp_path: Path) -> None:
    known = "known: .jsonl, .parquet, .txt, default, hub:"
    for spec, hint in [("a.json", " (did you mean '.jsonl'?)"), ("me@home/a", ""), ("x", "")]:
        with pytest.raises(InputError) as caught:
            parse_source(spec)
        assert str(caught.value) == f"--text {spec} is no text that sleb reads{hint}; {known}"
    with pytest.raises(InputError, match=r"is a folder; name a file in it$"):
        parse_source(str(tmp_path))


def test_a_kind_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))

    @SOURCES.register("echo:")
    def read_echo(location: str, tokenizer: Any) -> Iterator[str]:
        yield from (location, location.upper())

    assert documents("echo:hi@2") == ["hi", "HI"]


# Reading


def test_every_file_kind_gives_the_same_documents(write: Write) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = ["één\u2028", "", " two\n"]
    write("a.jsonl", "\ufeff" + "\n\n".join(json.dumps({"id": 1, "text": t}) for t in rows))
    pq.write_table(pa.table({"id": [1, 2, 3], "text": rows}), "a.parquet")
    assert documents("a.jsonl") == documents("a.parquet") == rows
    write("a.txt", "\ufeffone\n\ndocument")
    assert documents("a.txt") == ["one\n\ndocument"]


def test_chats_go_through_the_template_without_its_bos(write: Write) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    write("a.jsonl", json.dumps({"messages": chat}) + "\n" + json.dumps({"text": "t"}))
    assert documents("a.jsonl", chat_template=CHAT) == ["<user>hi\n<assistant>yo\n", "t"]
    pq.write_table(pa.table({"messages": [chat]}), "a.parquet")
    assert documents("a.parquet", chat_template=CHAT) == ["<user>hi\n<assistant>yo\n"]


def test_a_chat_that_cannot_be_rendered_names_its_line(write: Write) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    write("a.jsonl", '{"text": "t"}\n' + good)
    assert message("a.jsonl") == (
        "a.jsonl line 2 is a chat, but the model's tokenizer has no chat template; "
        "give rows with `text`"
    )
    assert message("a.jsonl", chat_template="{{ raise_exception('no\nsystem') }}") == (
        "a.jsonl line 2 does not fit the tokenizer's chat template (no); "
        "change its messages or remove it"
    )


@pytest.mark.parametrize(
    "row",
    [
        "1",
        "{}",
        '{"text": null}',
        '{"text": ["a"]}',
        '{"messages": []}',
        '{"messages": "hi"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
    ],
)
def test_a_row_without_text_names_its_line(write: Write, row: str) -> None:
    write("a.jsonl", f'{{"text": "t"}}\n\n{row}\n')
    assert message("a.jsonl", chat_template=CHAT) == (
        "a.jsonl line 3 has neither a `text` string nor `messages`, "
        'a list of {"role": ..., "content": ...}; add one of them'
    )


def test_a_parquet_file_without_text_names_the_row(write: Write) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write("x", "")
    pq.write_table(pa.table({"body": ["a"]}), "a.parquet")
    assert message("a.parquet").startswith("a.parquet row 1 has neither a `text` string")
    raw = Path("a.parquet").read_bytes()
    for broken in (b"PAR1", raw[: len(raw) // 2], raw[:4] + bytes(len(raw) - 12) + raw[-8:]):
        Path("b.parquet").write_bytes(broken)
        with pytest.raises(DataError, match=r"^b\.parquet is not a readable parquet file: "):
            documents("b.parquet")


def test_what_is_not_json_names_its_line(write: Write) -> None:
    write("a.jsonl", '{"text": "t"}\n{"text": \n')
    assert message("a.jsonl") == "a.jsonl line 2 is not JSON: Expecting value; correct it"
    write("a.jsonl", "[" * 200_000)
    assert message("a.jsonl").startswith("a.jsonl line 1 is not JSON: ")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_invalid_utf8_names_the_byte(write: Write, name: str) -> None:
    row = b'{"text": "t"}\n'
    write(name, "")
    Path(name).write_bytes(row + row + b"12\xff")
    assert message(name) == (
        f"{name} is not UTF-8: invalid byte at offset {2 * len(row) + 2}; convert it to UTF-8"
    )
    Path(name).write_bytes("é".encode()[:1])
    assert "invalid byte at offset 0" in message(name)


def test_half_a_surrogate_pair_is_not_text(write: Write) -> None:
    write("a.jsonl", '{"text": "t"}\n{"text": "\\ud800"}')
    assert message("a.jsonl") == (
        "a.jsonl document 2 is not text: it has half of a surrogate pair; remove that"
    )


@pytest.mark.parametrize(("name", "text"), [("a.txt", ""), ("a.txt", " \n"), ("a.jsonl", "")])
def test_empty_text_is_refused(write: Write, name: str, text: str) -> None:
    assert message(write(name, text)) == f"{name} has no text; give one that is not empty"


def test_a_missing_file_says_what_is_near(write: Write) -> None:
    write("notes.txt", "x")
    Path("dir.txt").mkdir()
    assert message("note.txt") == (
        "no file note.txt (did you mean 'notes.txt'?); give the path of a text file"
    )
    assert message("zzzzzzzzz.jsonl") == "no file zzzzzzzzz.jsonl; give the path of a text file"
    assert message("gone/a.txt") == "no file gone/a.txt: the folder gone does not exist"
    assert message("dir.txt") == "dir.txt is a folder; name a file in it"


def test_at_most_the_limit_is_read(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 9)
    write("a.txt", "é" * 20)
    write("a.jsonl", '{"text": "12345678"}\n{"text": "éé"}\nnot read')
    write("b.txt", "123456789")
    assert documents("b.txt") == ["123456789"]
    assert not caplog.records
    assert documents("a.txt") == ["éééé"]
    assert documents("a.jsonl") == ["12345678", ""]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    monkeypatch.setattr(sources, "MAX_LINE", 15)
    assert message("a.jsonl") == "a.jsonl line 1 is over 0 MiB; split it into rows"


def test_sources_need_no_heavy_import() -> None:
    code = (
        "import sys, sleb.text.sources as s; s.read_documents(s.parse_source('default'), None);"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """Replace ``load_dataset`` by ``answer(path, config)``; gives the list of its calls."""
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((path, config, split, streaming))
        return answer(path, config)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_specs_name_dataset_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, lambda path, config: iter([{"text": "a"}, {"text": "b"}]))
    for spec in ("d:train", "org/d:train", "org/d/config:test[:10]"):
        assert documents(f"hub:{spec}") == ["a", "b"]
    assert calls == [
        ("d", None, "train", True),
        ("org/d", None, "train", True),
        ("org/d", "config", "test[:10]", False),
    ]


def test_two_parts_may_be_dataset_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, config: str | None) -> Any:
        if config is None:
            raise FileNotFoundError(f"no dataset {path}\nmore")
        return [{"text": "a"}]

    calls = fake_hub(monkeypatch, answer)
    assert documents("hub:wikitext/raw:train") == ["a"]
    assert [call[:2] for call in calls] == [("wikitext/raw", None), ("wikitext", "raw")]


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (
            FileNotFoundError("no dataset\nmore"),
            InputError,
            "hub:a/b:train was not found (no dataset); check the name, "
            "and for a private dataset log in with: hf auth login",
        ),
        (
            ValueError('Bad split: "x"\nmore'),
            InputError,
            'hub:a/b:train cannot be used: Bad split: "x"',
        ),
        (
            ConnectionError("Couldn't reach it"),
            ResourceError,
            "hub:a/b:train cannot be fetched (Couldn't reach it); check the network, "
            "or give a local .jsonl or .parquet file",
        ),
        (
            Exception(),
            ResourceError,
            "hub:a/b:train cannot be fetched (Exception); check the network, "
            "or give a local .jsonl or .parquet file",
        ),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_hub_errors_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[SlebError], text: str, late: bool
) -> None:
    def rows() -> Iterator[Any]:
        yield {"text": "a"}
        raise raised

    def answer(path: str, config: str | None) -> Any:
        if late:
            return rows()
        raise raised if config is None else type(raised)("second reading")

    fake_hub(monkeypatch, answer)
    with pytest.raises(kind) as caught:
        documents("hub:a/b:train")
    assert (type(caught.value), str(caught.value)) == (kind, text)


def test_a_hub_row_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, lambda path, config: [{"text": "a"}, {"body": "b"}])
    assert message("hub:d:train").startswith("hub:d:train row 2 has neither a `text` string")


def test_the_hub_needs_a_split_and_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for location in ("wikitext", ":train", "wikitext:"):
        assert message(f"hub:{location}") == (
            f"hub:{location} names no split; write hub:DATASET[/CONFIG]:SPLIT, "
            "for example hub:wikitext/wikitext-2-raw-v1:train"
        )
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message("hub:d:train") == ("hub: needs the datasets library: pip install 'sleb[hub]'")


def test_parquet_needs_a_library(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write("a.parquet", "")
    assert message("a.parquet") == "a.parquet needs pyarrow: pip install 'sleb[hub]'"


def test_the_real_library_reads_a_local_dataset(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write("set/train.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", str(tmp_path / "cache"))
    assert documents(f"hub:{tmp_path}/set:train") == ["a", "", "b"]
    assert message(f"hub:{tmp_path}/set:tran").startswith(
        f"hub:{tmp_path}/set:tran cannot be used: "
    )
    assert "was not found" in message(f"hub:{tmp_path}/sat:train")


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
    assert places == sorted(set(places)) and all(place % 10 == 0 for place in places)
    assert torch.equal(first.ids, again.ids) and first.record == again.record
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
    assert Counter(load("a.txt", "c.txt")[0].source) == {0: 16, 1: 16}
    # The short one sets the number, because weights are kept.
    assert Counter(load("a.txt@2", "b.txt")[0].source) == {0: 11, 1: 5}
    # Held-out windows come from where some are left.
    heldout = load("a.txt", "b.txt", heldout=8)[1]
    assert heldout is not None and set(heldout.source) == {0}


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
        "unsplit": pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        "bytes": bytes_only,
    }[kind]
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=600, special_tokens=["?"], show_progress=False)
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=backend
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "prefix", "unsplit", "bytes"])
def test_a_long_text_has_the_tokens_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    prose = documents("default")
    draw = random.Random(0)
    lines = ("".join(draw.choices("日本語本文山川。", k=draw.randint(5, 40))) for _ in range(100))
    text = "\n\n".join([prose[0][:6000], "\n".join(lines), prose[-1][:6000]])
    family = trained(kind, text)
    whole = family(text, add_special_tokens=False)["input_ids"]
    lengths: list[int] = []
    encode = tokens._encode

    def spy(tokenizer: Any, text: str, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(tokens, "_encode", spy)
    monkeypatch.setattr(tokens, "PIECE", 700)
    assert tokens.encode_text(family, text).tolist() == whole
    assert max(lengths) < len(text) / 2
    # Without white space there is no seam, and the text stays whole.
    lengths.clear()
    solid = "abc" * 2000
    assert tokens.encode_text(family, solid).tolist() == encode(family, solid)
    assert lengths == [6000]


@pytest.mark.parametrize(
    ("specs", "options", "text"),
    [
        (
            ["a.txt"],
            {"length": 128},
            "a.txt has 91 tokens, too short for one window of 128; "
            "give more text or a shorter --length (at most 91)",
        ),
        (
            ["a.txt"],
            {"length": 128, "ends": "bos"},
            "a.txt has 91 tokens, too short for one window of 128; "
            "give more text or a shorter --length (at most 92)",
        ),
        (
            ["a.txt"],
            {"windows": 10},
            "a.txt holds 9 windows of 10 tokens, but 10 are wanted from it; "
            "use --windows 9, a shorter --length, or more text",
        ),
        (
            ["b.txt@2", "a.txt"],
            {"windows": 40},
            "a.txt holds 9 windows of 10 tokens, but 13 are wanted from it; "
            "use --windows 28, a shorter --length, or more text",
        ),
        (
            ["a.txt@100", "b.txt"],
            {"windows": 30},
            "a.txt@100 holds 9 windows of 10 tokens, but 30 are wanted from it; "
            "change the weights, a shorter --length, or more text",
        ),
        (
            ["b.txt@9", "a.txt"],
            {"windows": 4},
            "--windows 4 leaves none for a.txt; raise --windows or its @weight",
        ),
        (
            ["a.txt", "x=a.txt"],
            {},
            "a.txt and x=a.txt are the same text; give it once, with @2 for twice the weight",
        ),
        (
            ["a.txt", "dir/a.txt"],
            {},
            "a.txt and dir/a.txt are both named 'a'; name one, as in NAME=dir/a.txt",
        ),
        (["a.txt"], {"length": 1}, "--length 1 is too short; give at least 2"),
        (["a.txt"], {"windows": 0}, "--windows 0 scores nothing; give at least 1"),
        (["a.txt"], {"heldout": -1}, "-1 held-out windows are not possible; give 0 or more"),
    ],
)
def test_what_cannot_be_cut_says_why(
    write: Write, specs: list[str], options: dict[str, Any], text: str
) -> None:
    write("a.txt", letters(91))
    write("b.txt", letters(1000, 1000))
    Path("dir").mkdir()
    write("dir/a.txt", letters(91, 3000))
    with pytest.raises(InputError) as caught:
        load(*specs, **options)
    assert str(caught.value) == text


# The embedded text


def test_the_embedded_text_is_the_default_and_clean() -> None:
    rows = documents("default")
    raw = sources.DEFAULT.read_bytes()
    assert 450_000 < len(raw) < 550_000 and b"\r" not in raw and raw.endswith(b"}\n")
    assert len(rows) == len(set(rows)) == 168 and all(row == row.strip("\n") for row in rows)
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
    assert windows.names == ("default",) and windows.record.sources[0].documents == 168
    assert heldout is not None and len(heldout.ids) == 4
