"""Prompts from a file: every form of a row, and what is wrong with one."""

import json
from pathlib import Path

import pytest

from sleb.calibration.prompts import Prompt, read_prompts
from sleb.core.errors import InputError

TURN = {"role": "user", "content": "a"}


def test_every_form_of_a_row_is_read(write):
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi\u2028there"}]
    rows = ["\ufeff" + json.dumps("alone"), "", json.dumps({"prompt": " a ", "id": 7})]
    rows += [json.dumps({"messages": turns, "json": True}, ensure_ascii=False), "  "]
    found = read_prompts(write("p.jsonl", "\r\n".join(rows)))
    assert found == (
        Prompt(id="line 1", text="alone", messages=None),
        Prompt(id="7", text=" a ", messages=None),
        Prompt(id="line 4", text=None, messages=tuple(turns), json=True),
    )
    lines = read_prompts(write("p.txt", '{"prompt": 1}\n\n second \n'))
    assert [(p.id, p.text) for p in lines] == [("line 1", '{"prompt": 1}'), ("line 3", "second")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [TURN, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b", "source": "a set's own"},
        {"prompt": [TURN], "completion": "b"},
    ],
)
def test_of_a_chat_set_what_is_asked_is_the_prompt(write, row):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (found,) = read_prompts(write("p.json", json.dumps([{**row, "tools": tools}])))
    assert found == Prompt(id="row 1", text=None, messages=(TURN,), tools=tuple(tools))
    (plain,) = read_prompts(write("q.jsonl", '{"prompt": "a", "completion": "b"}'))
    assert (plain.text, plain.messages) == ("a", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[" * 10**6, "not JSON"),
        ("3", "no form"),
        ("{}", "no form"),
        ('{"prompt": 1}', "no form"),
        ('{"prompt": " "}', "empty"),
        ('"\\ud800"', "surrogate"),
        ('{"prompt": "a", "jsn": true}', "`jsn`.*`json`"),
        ('{"prompt": "a", "json": 1}', "`json`"),
        ('{"prompt": "a", "id": []}', "`id`"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "asks"),
        ('{"prompt": "b", "id": "one"}', "id 'one'"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(write, row, message):
    with pytest.raises(InputError, match=rf"p\.jsonl line 2.*{message}") as caught:
        read_prompts(write("p.jsonl", '{"prompt": "a", "id": "one"}\n' + row))
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts_is_refused(write):
    Path(write("latin.txt", "")).write_bytes(b"caf\xe9")
    for path, said in [
        (write("e.jsonl", "\n \n"), "no prompts"),
        ("none.jsonl", r"none\.jsonl"),
        (write("p.csv", "a"), r"p\.csv.*\.jsonl.*\.txt"),
        ("latin.txt", "offset 3"),
    ]:
        with pytest.raises(InputError, match=said):
            read_prompts(path)


def test_turns_are_what_was_said_by_role():
    call = {"function": {"name": "find", "arguments": "{}"}}
    picture = [{"type": "image", "url": "x.png"}, {"type": "text", "text": "What is it?"}]
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": picture},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    )
    found = Prompt(id="a", text=None, messages=turns).turns
    assert found[0] == ("system", "Be brief.")
    assert found[1] == ("user", "[image]\nWhat is it?")
    assert found[2] == ("assistant", json.dumps([call]))
    assert Prompt(id="b", text="plain", messages=None).turns == (("", "plain"),)
