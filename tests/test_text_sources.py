"""Calibration text: how a spec is read, and what is refused."""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sleb.calibration import parse_source, rows, sources
from sleb.core.errors import DataError, InputError, ResourceError, SlebError
from text_tools import Write, documents, message

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
    for spec, hint in [("a.jsnl", ".jsonl"), ("me@home/a", ".parquet"), ("x", "default")]:
        with pytest.raises(InputError, match=re.escape(hint)):
            parse_source(spec)
    with pytest.raises(InputError, match=r"is a folder; name a file in it$"):
        parse_source(str(tmp_path))


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


def test_a_parquet_file_without_text_names_the_row(write: Write) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write("x", "")
    pq.write_table(pa.table({"body": ["a"]}), "a.parquet")
    assert message("a.parquet").startswith("a.parquet row 1 is of no form")
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
    monkeypatch.setattr(rows, "MAX_ROW", 15)
    assert message("a.jsonl") == "a.jsonl line 1 is over 0 MiB; split it into rows"


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
    assert message("hub:d:train").startswith("hub:d:train row 2 is of no form")


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


def test_the_real_library_reads_a_local_dataset(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write("set/train.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    assert documents(f"hub:{tmp_path}/set:train") == ["a", "", "b"]
    assert message(f"hub:{tmp_path}/set:tran").startswith(
        f"hub:{tmp_path}/set:tran cannot be used: "
    )
    assert "was not found" in message(f"hub:{tmp_path}/sat:train")
