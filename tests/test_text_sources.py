"""Calibration text: how a spec is read, and what is refused."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest

from sleb.calibration import parse_source, rows, sources
from sleb.core.errors import DataError, InputError, ResourceError
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
def test_a_spec_is_taken_apart(spec, name, kind, location, weight):
    source = parse_source(spec)
    assert (source.name, source.kind, source.location) == (name, kind, location)
    assert (source.spec, source.weight) == (spec, weight)


def test_a_file_that_looks_like_a_spec_is_a_file(write: Write) -> None:
    write("a=b.txt", "literal")
    write("b.txt", "named")
    assert documents("a=b.txt") == ["literal"]
    assert documents("c=b.txt") == ["named"]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "x", "1e999", ""])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(InputError, match=f"weight '{weight}' is not a positive number"):
        parse_source(f"a.txt@{weight}")


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


NOT_TEXT = {
    "a.jsonl line 2 is not JSON": b'{"text": "t"}\n{"text": \n',
    "a.jsonl line 1 is not JSON": b"[" * 200_000,
    "a.jsonl is not UTF-8: invalid byte at offset 16": b'{"text": "t"}\n12\xff',
    "a.txt is not UTF-8: invalid byte at offset 0": b"\xc3",
    "a.jsonl document 2 is not text: it has half of a surrogate": b'"t"\n{"text": "\\ud800"}',
    "a.jsonl has no text": b"",
    "a.txt has no text": b" \n",
}


@pytest.mark.parametrize("said", NOT_TEXT)
def test_what_is_no_text_is_said_with_its_place(write, said):
    write(name := said.split()[0], "")
    Path(name).write_bytes(NOT_TEXT[said])
    assert message(name).startswith(said)


def test_a_missing_file_says_what_is_near(write):
    write("notes.txt", "x")
    Path("dir.txt").mkdir()
    for spec, said in {
        "note.txt": "no file note.txt (did you mean 'notes.txt'?)",
        "zzzzzzzzz.jsonl": "no file zzzzzzzzz.jsonl; give",
        "gone/a.txt": "the folder gone does not exist",
        "dir.txt": "dir.txt is a folder",
    }.items():
        assert said in message(spec)


def test_at_most_the_limit_is_read(write, monkeypatch, caplog):
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
    assert "a.jsonl line 1 is over" in message("a.jsonl")


# The hub


def fake_hub(monkeypatch, answer) -> list[tuple]:
    """Replace ``load_dataset`` by ``answer(path, config)``; gives the list of its calls."""
    datasets, calls = pytest.importorskip("datasets"), []

    def load_dataset(path, config, *, split, streaming):
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


def test_two_parts_may_be_dataset_and_config(monkeypatch):
    def answer(path, config):
        if config is None:
            raise FileNotFoundError(f"no dataset {path}\nmore")
        return [{"text": "a"}]

    calls = fake_hub(monkeypatch, answer)
    assert documents("hub:wikitext/raw:train") == ["a"]
    assert [call[:2] for call in calls] == [("wikitext/raw", None), ("wikitext", "raw")]
    fake_hub(monkeypatch, lambda path, config: [{"text": "a"}, {"body": "b"}])
    assert "hub:d:train row 2 is of no form" in message("hub:d:train")


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (FileNotFoundError("no dataset\nmore"), InputError, "was not found (no dataset).*log in"),
        (ValueError('Bad split: "x"\nmore'), InputError, 'cannot be used: Bad split: "x"'),
        (ConnectionError("Couldn't reach it"), ResourceError, "cannot be fetched (Couldn't reach"),
        (Exception(), ResourceError, "cannot be fetched (Exception)"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_hub_errors_say_what_to_do(monkeypatch, raised, kind, said, late):
    def rows():
        yield {"text": "a"}
        raise raised

    def answer(path, config):
        if late:
            return rows()
        raise raised if config is None else type(raised)("second reading")

    fake_hub(monkeypatch, answer)
    with pytest.raises(kind) as caught:
        documents("hub:a/b:train")
    assert type(caught.value) is kind
    assert all(part in str(caught.value) for part in ("hub:a/b:train", *said.split(".*")))
    assert "\n" not in str(caught.value)


def test_the_hub_needs_a_split_and_files_a_library(write, monkeypatch):
    for location in ("wikitext", ":train", "wikitext:"):
        assert f"hub:{location} names no split" in message(f"hub:{location}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install datasets" in message("hub:d:train")
    assert "needs pyarrow: pip install pyarrow" in message(write("a.parquet", ""))


def test_the_real_library_reads_a_local_dataset(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write("set/train.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    assert documents(f"hub:{tmp_path}/set:train") == ["a", "", "b"]
    assert message(f"hub:{tmp_path}/set:tran").startswith(
        f"hub:{tmp_path}/set:tran cannot be used: "
    )
    assert "was not found" in message(f"hub:{tmp_path}/sat:train")
