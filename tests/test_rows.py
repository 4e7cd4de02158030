"""Rows as people have them: the same words reach the model from every form of a chat."""

import gzip
import json
from pathlib import Path

import pytest

from sleb.calibration.rows import ROW_FILES, file_rows, parse_row, read_document, render
from sleb.core.errors import DataError, InputError
from text_tools import CHAT, documents, message, tokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SAID = "<user>hi\n<assistant>yo\n"
TOOLS = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ '\\n' }}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]"
    "{% endfor %}{% endfor %}"
)
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}


def text(row, template: str = CHAT) -> str:
    return read_document(row, tokenizer(chat_template=template), "row 1")


def spoken(*pairs):
    return [{"from": who, "value": said} for who, said in pairs]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a", "a"),
        ({"text": "a", "messages": TURNS}, "a"),
        ({"text": None, "messages": TURNS}, SAID),
        ({"messages": json.dumps(TURNS)}, SAID),
        ({"messages": TURNS, "prompt": "hi", "source": "x"}, SAID),
        ({"conversations": spoken(("human", "hi"), ("gpt", "yo"))}, SAID),
        ({"conversations": TURNS}, SAID),
        ({"conversation": TURNS, "system": "be"}, "<system>be\n" + SAID),
        ({"messages": [{"role": "system", "content": "x"}, *TURNS], "system": "be"},
         "<system>x\n" + SAID),
        ({"conversations": spoken(("system", "be"), ("human", "hi"), ("gpt", "yo"))},
         "<system>be\n" + SAID),
        ({"conversations": spoken(("human", "hi"), ("observation", "3"))}, "<user>hi\n<tool>3\n"),
        ({"instruction": "hi", "input": "", "output": "yo"}, SAID),
        ({"instruction": "hi", "input": None, "output": "yo"}, SAID),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "<user>Add\n1 1\n<assistant>2\n"),
        ({"instruction": "hi", "output": "yo", "system": "be", "history": [["a", "b"]]},
         "<system>be\n<user>a\n<assistant>b\n" + SAID),
        ({"instruction": "hi"}, "<user>hi\n"),
        ({"system_prompt": "be", "question": "hi", "response": "yo"}, "<system>be\n" + SAID),
        ({"question": "hi", "answer": "yo"}, SAID),
        ({"query": "hi", "response": "yo"}, SAID),
        ({"input": "hi", "output": "yo"}, SAID),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, SAID),
        ({"prompt": TURNS[:1], "completion": "yo"}, SAID),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]},
         "<user>hi\n<assistant>\n"),
        ({"messages": [{"role": "user", "value": "hi"}]}, "<user>hi\n"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}]},
         "<user>hi\n"),
    ],
)  # fmt: skip
def test_every_form_gives_the_text_that_the_model_reads(row, said):
    assert text(row) == said


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None,
         "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{**CALL, "arguments": '{"city": "Oslo"}'}]},
        {"role": "assistant", "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER],
        json.dumps([WEATHER]),
        [json.dumps(WEATHER)],
        [{"type": "function", "function": WEATHER}],
    ],
)
def test_tools_and_their_calls_reach_the_template(turn, tools):
    row = {"messages": [TURNS[0], turn], "tools": tools}
    shown, asked, called = text(row, TOOLS).split("\n")
    assert json.loads(shown) == [{"type": "function", "function": WEATHER}]
    assert (asked, called) == ("<user>hi", "<assistant>[weather Oslo]")


def test_a_template_gets_content_and_arguments_in_the_form_that_it_takes():
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}"
    assert text({"messages": TURNS}, parts) == "hi|yo|"
    joined = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ 'call ' +"
    joined += " m.tool_calls[0].function.arguments }}{% endif %}{% endfor %}"
    turn = {"role": "assistant", "tool_calls": [CALL]}
    assert text({"messages": [TURNS[0], turn]}, joined) == 'hicall {"city": "Oslo"}'
    short = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    thought = {"role": "assistant", "content": "hm</think>yo"}
    assert text({"messages": [TURNS[0], thought]}, short) == "<user>hi<assistant>yo"


def test_what_is_asked_is_the_row_without_its_answer():
    for row in ({"messages": TURNS}, {"instruction": "hi", "output": "yo"}):
        asked = parse_row(row, "row 1").asked
        opened = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"
        words = render(asked, tokenizer(chat_template=opened), "row 1", generate=True)
        assert words.removeprefix("<s>") == "<user>hi\n<assistant>"
    assert parse_row({"prompt": "a", "completion": "b"}, "row 1").asked.completion == ""


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (1, "no form"),
        ({}, "no form"),
        ({"text": ["a"]}, r"no form .*'text'"),
        ({"body": "a"}, r"no form .*'body'"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "no form"),
        ({"messages": []}, "`messages` is no list of turns"),
        ({"messages": "hi"}, "`messages` is no list"),
        ({"messages": [TURNS[0], "yo"]}, "turn 2 is no object"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no `role`"),
        ({"conversations": [{"from": "gtp", "value": "a"}]}, "turn 1 is from 'gtp'.*'gpt'"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no `content`"),
        ({"messages": [{"role": "user", "content": 3}]}, "turn 1: `content` is neither"),
        ({"instruction": "a", "output": "b", "history": ["ab"]}, "`history`"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
         "turn 1 has a part of type 'video'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "1 has a tool call"),
        ({"messages": [{"role": "assistant", "tool_calls": "call"}]}, "`tool_calls` is no list"),
        ({"messages": TURNS, "tools": "weather"}, "`tools` is no list"),
        ({"messages": TURNS, "tools": [3]}, "`tools` holds"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_its_line(write, row, said):
    with pytest.raises(InputError, match=f"row 1.*{said}"):
        parse_row(row, "row 1")
    write("a.jsonl", f'{{"text": "t"}}\n\n{json.dumps(row)}\n')
    assert message("a.jsonl", chat_template=CHAT).startswith("a.jsonl line 3")


def test_a_chat_that_cannot_be_rendered_names_its_line(write):
    write("a.jsonl", '{"text": "t"}\n' + json.dumps({"messages": TURNS}))
    assert "a.jsonl line 2 is a chat, but" in message("a.jsonl")
    refusing = message("a.jsonl", chat_template="{{ raise_exception('no\nsystem') }}")
    assert refusing.startswith("a.jsonl line 2 does not fit")
    assert "(no)" in refusing


def put(name: str, rows: list, form: str = "list") -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    whole = {"list": json.dumps(rows, indent=1), "object": json.dumps({"data": rows})}
    raw = (lines if ".jsonl" in name or form == "lines" else whole[form]).encode()
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


@pytest.mark.parametrize("name", [name for name in ROW_FILES if name != ".parquet"])
@pytest.mark.parametrize("form", ["list", "object", "lines"])
def test_rows_are_the_same_from_every_file(write, monkeypatch, name, form):
    monkeypatch.setattr("sleb.calibration.rows.CHUNK", 16)
    write("x", "")
    put(f"a{name}", [{"messages": TURNS}, {"text": "tö] ,["}, {"text": "last"}], form)
    assert documents(f"a{name}", chat_template=CHAT) == [SAID, "tö] ,[", "last"]


def test_nulls_that_a_column_is_filled_with_are_no_values(write):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write("x", "")
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "clock", "arguments": {"zone": "UTC"}}},
    ]}  # fmt: skip
    rows = [{"text": None, "messages": [TURNS[0], call], "tools": [WEATHER]}, {"text": "t"}]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    every = TOOLS.replace("c.function.arguments.city", "c.function.arguments | tojson")
    first, second = documents("a.parquet", chat_template=every)
    assert second == "t"
    assert '<assistant>[weather {"city": "Oslo"}][clock {"zone": "UTC"}]' in first
    silent = [{"messages": [TURNS[0], {"role": "assistant", "content": None}]}]
    pq.write_table(pa.Table.from_pylist([*rows, *silent]), "b.parquet")
    assert documents("b.parquet", chat_template=CHAT)[-1] == "<user>hi\n<assistant>\n"


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.json", b'[{"text": "a"} {', "row 2 is not JSON"),
        ("a.json", b'[{"text": "a"}', "row 2 is not JSON"),
        ("a.json", b'{"text": "\xff"}', "is not UTF-8"),
        ("a.json", b"[" * 100_000, "row 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("a.jsonl.gz", b"no gzip", "not a readable gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:30], "not a readable gzip"),
    ],
)
def test_broken_files_are_refused(write, name, raw, said):
    write("x", "")
    Path(name).write_bytes(raw)
    kind = DataError if "gzip" in said else InputError
    with pytest.raises(kind, match=said):
        list(file_rows(name))
