"""Prompts from a file: every form of a row, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleb.core.errors import InputError
from sleb.evaluation.answer_checks import script
from sleb.evaluation.answers import Prompt, read_prompts

EXAMPLE = Path(__file__).parents[1] / "examples" / "prompts.jsonl"


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
    ("row", "message"),
    [
        ("{", r"p.jsonl:2: not JSON"),
        ("[" * 10**6, r"p.jsonl:2: not JSON"),
        ("3", r"p.jsonl:2: "),
        ("{}", r"p.jsonl:2: it has neither `prompt` nor `messages`; a row is"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "2: it has both"),
        ('{"prompt": "", "messages": [{"role": "user", "content": "a"}]}', "2: it has both"),
        ('{"prompt": 1}', r"p.jsonl:2: prompt: Input should be a valid string"),
        ('{"prompt": " "}', "2: the prompt is empty"),
        ('"\\ud800"', "2: not text: it has half of"),
        ('{"prompt": "a", "jsn": true}', "2: jsn: Extra inputs are not permitted"),
        ('{"prompt": "a", "json": 1}', "2: json: Input should be a valid boolean"),
        ('{"messages": []}', "2: messages: "),
        ('{"messages": [{"role": "user"}]}', "2: messages: 0: content: Field required"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "2: messages: 0: content: "),
        ('{"prompt": "b", "id": "one"}', r"p.jsonl:2: id 'one' was there before"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(write, row, message):
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(write("p.jsonl", '{"prompt": "a", "id": "one"}\n' + row))
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts_is_refused(write, tmp_path):
    with pytest.raises(InputError, match=r"e\.jsonl has no prompts"):
        read_prompts(write("e.jsonl", "\n \n"))
    with pytest.raises(InputError, match=r"no file of prompts at none\.jsonl"):
        read_prompts("none.jsonl")
    with pytest.raises(InputError, match=r"p\.csv is no file of prompts; give a \.jsonl or \.txt"):
        read_prompts(write("p.csv", "a"))
    Path("latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8: invalid byte at offset 3"):
        read_prompts("latin.txt")


def test_the_example_has_every_kind_of_prompt():
    found = read_prompts(EXAMPLE)
    assert 6 <= len(found) <= 8
    assert any(p.json for p in found)
    assert any(p.text for p in found)
    assert any(p.messages for p in found)
    assert any(script(str(p.text or p.messages[-1]["content"])) == "Japanese" for p in found)
