"""The embedded prompts: what every reader of them may rely on."""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import sleb
from sleb.calibration.answers import DEFAULT
from sleb.calibration.prompts import read_prompts
from sleb.config import NEW_TOKENS, PromptOptions
from sleb.repairs.answering import ROOM, prompt_files

FILE = Path(str(files("sleb.data") / "prompts.jsonl"))
SHARES = {
    "code": 75,
    "sums": 75,
    "questions": 40,
    "instructions": 40,
    "extraction": 40,
    "languages": 30,
}
FIELDS = {"prompt", "kind", "language", "answer", "json_schema"}
TYPES = {"string", "number", "integer", "boolean", "array", "object"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def loaded(tiny_dir):
    return sleb.load(tiny_dir, dtype="float32", device="cpu")


def test_every_row_is_read_as_a_prompt(rows):
    assert [prompt.text for prompt in read_prompts(FILE)] == [row["prompt"] for row in rows]
    assert all({"prompt", "kind"} <= row.keys() <= FIELDS for row in rows)


def test_a_model_that_reads_them_all_is_asked_and_a_shorter_one_is_not(rows, loaded):
    """Two bytes a token, more than any tokenizer of chats takes, and the longest answer."""
    longest = max(len(row["prompt"].encode()) for row in rows) // 2
    assert longest + max(NEW_TOKENS.values()) <= ROOM
    loaded.tokenizer.chat_template = "{{ messages[0].content }}"
    asked = {}
    for room in (ROOM - 1, ROOM):
        loaded.model.config.max_position_embeddings = room
        asked[room] = prompt_files(loaded, PromptOptions(), embedded=True)
    assert asked == {ROOM - 1: [], ROOM: [DEFAULT]}


def test_the_provenance_is_of_this_file():
    provenance = FILE.with_name("PROVENANCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() in provenance


def test_any_prefix_is_a_fair_mix_of_the_kinds(rows):
    assert Counter(row["kind"] for row in rows) == SHARES
    for length in range(1, len(rows)):
        seen = Counter(row["kind"] for row in rows[:length])
        for kind, share in SHARES.items():
            assert abs(seen[kind] - length * share / len(rows)) < 2


def test_languages_are_named_and_japanese_is_the_most_frequent(rows):
    languages = Counter(row["language"] for row in rows if row["kind"] == "languages")
    assert languages.pop("ja") == 12
    assert len(languages) == 9
    assert set(languages.values()) == {2}
    assert all(("language" in row) == (row["kind"] == "languages") for row in rows)


def test_texts_are_short_and_clean(rows):
    for text in (row["prompt"] for row in rows):
        assert text == text.strip()
        assert len(text) < 1200
        assert unicodedata.is_normalized("NFC", text)
        assert all(c == "\n" or unicodedata.category(c)[0] != "C" for c in text)


def test_no_two_prompts_share_six_words_in_a_row(rows):
    owner: dict[tuple[str, ...], int] = {}
    for at, row in enumerate(rows):
        words = re.findall(r"\w+", row["prompt"].casefold())
        for run in zip(*(words[i:] for i in range(min(6, len(words)))), strict=False):
            assert owner.setdefault(run, at) == at, run


def test_every_sum_has_a_finite_answer(rows):
    assert all("answer" in row for row in rows if row["kind"] == "sums")
    for answer in (row["answer"] for row in rows if "answer" in row):
        assert type(answer) in (int, float)
        assert math.isfinite(answer)


def check_object(schema: dict[str, Any]) -> None:
    assert schema.keys() == {"type", "required", "properties"}
    assert schema["type"] == "object"
    assert schema["required"]
    assert schema["required"] == list(schema["properties"])
    for value in schema["properties"].values():
        item = value["items"] if value["type"] == "array" else value
        assert item["type"] in TYPES
        if item["type"] == "object":
            check_object(item)


def test_every_schema_is_of_an_object_with_required_keys_that_its_prompt_names(rows):
    schemas = [(row["prompt"], row["json_schema"]) for row in rows if "json_schema" in row]
    assert len(schemas) >= 25
    for prompt, schema in schemas:
        check_object(schema)
        assert "JSON" in prompt or "{" in prompt
        assert all(key in prompt for key in schema["required"])
