"""A run record holds facts; one of an older schema is read as if it had held them too."""

import json

import pytest

from report_plan import plan
from report_tools import HERE, complete, repaired, save, seen, sparse
from sleb.core.errors import InputError
from sleb.record import SCHEMA, RepairStatus, RunRecord, upgrade

EXAMPLE = HERE.parent / "docs" / "example"


@pytest.mark.parametrize("record", [complete(), repaired(), sparse()], ids=["full", "rep", "bare"])
def test_what_is_written_is_what_is_read(tmp_path, record):
    save(tmp_path, record, plan())
    assert RunRecord.load(tmp_path) == record
    assert json.loads((tmp_path / "run.json").read_text())["schema_version"] == SCHEMA


def test_sections_are_replaced_and_nothing_else(tmp_path):
    save(tmp_path, complete(), plan())
    new = RunRecord.update(tmp_path, speed=None)
    assert new == RunRecord.load(tmp_path) == complete(speed=None)


@pytest.mark.parametrize(
    ("note", "windows", "length", "source", "texts"),
    [
        ("16 held-out windows of 128 tokens from the calibration texts", 16, 128, "held-out", ()),
        ("9 windows of 256 tokens from a.txt, b.txt", 9, 256, "given", ("a.txt", "b.txt")),
        ("3 windows of 8 tokens from 2 held-out windows of x", 3, 8, "given", None),
    ],
)
def test_the_sentence_on_texts_becomes_facts(note, windows, length, source, texts):
    found = upgrade({"evaluation_note": note})["evaluation_text"]
    assert (found["windows"], found["length"], found["source"]) == (windows, length, source)
    assert texts is None or tuple(found["texts"]) == texts


REPAIRED = (
    "5 matrices around 1 of 2 gaps, fitted on 31,872 tokens, {}and judged on 32 other windows"
)
COUNTS = {"tensors": 5, "gaps": 1, "gaps_total": 2, "tokens": 31_872, "validation_windows": 32}
COUNTS |= {"status": "repaired"}
OWN = {"self_generated": True}
WHY = {"key": "error", "values": {"error": "too short: x"}}
IMPOSSIBLE = {"status": "not-possible", "why": WHY}


@pytest.mark.parametrize(
    ("note", "facts"),
    [
        ("", None),
        ("not asked for", {"status": "not-asked"}),
        ("no fit was better on every text", {"status": "no-gain"}),
        ("not possible: too short: x", IMPOSSIBLE),
        (REPAIRED.format(""), COUNTS),
        (REPAIRED.format("a third of them the model's own text, "), COUNTS | OWN),
        ("something else", {"status": "repaired", "note": "something else"}),
    ],
)
def test_the_sentence_on_the_repair_becomes_facts(note, facts):
    found = upgrade({"repair_note": note})["repair"]
    assert (found and RepairStatus(**found)) == (facts and RepairStatus(**facts))


def test_a_repairs_message_becomes_a_finding():
    before = {"status": "not-possible", "reason": "too short: x"}
    assert upgrade({"schema_version": 2, "repair": before})["repair"] == IMPOSSIBLE
    done = {"status": "repaired", "reason": ""}
    assert upgrade({"schema_version": 2, "repair": done})["repair"]["why"] is None


@pytest.mark.parametrize(
    ("name", "missing", "facts"),
    [
        ("perplexity ratio, all texts", "", {"name": "perplexity.max_ratio", "of": ""}),
        ("perplexity ratio, a, b", "", {"name": "perplexity.max_ratio", "of": "a, b"}),
        ("answers, json valid", "no prompt asks for JSON; run: x",
         {"name": "answers.min_json_valid", "of": "", "missing": "no-json-prompt"}),
        ("speed-up, generate-8, small with vllm", "measured only once, so without an interval; x",
         {"name": "speed.min_speedup", "of": "generate-8", "path": "small", "runtime": "vllm",
          "missing": "no-interval"}),
        ("memory, small with vllm", "not measured; run: x",
         {"name": "memory.max_mb", "of": "", "path": "small", "missing": "not-measured"}),
        ("score kept, lw", "the record has no 'lw' (did you mean 'law'?); run: x",
         {"name": "tasks.min_retention", "of": "lw", "missing": "unknown-name", "near": "law"}),
    ],
)  # fmt: skip
def test_rows_of_a_gate_become_keys(name, missing, facts):
    old = {"gate": {"rows": [{"name": name, "missing": missing}]}}
    (row,) = upgrade(old)["gate"]["rows"]
    assert {key: row.get(key, "") for key in facts} == facts


def test_a_gate_of_old_had_the_worst_case_alone():
    row = {"name": "perplexity.max_ratio", "measured": 1.27, "passed": False}
    rows = [row, {**row, "passed": True}, {**row, "measured": None, "missing": "not-measured"}]
    new = upgrade({"schema_version": 2, "gate": {"rows": rows}})["gate"]["rows"]
    assert [(r["measured"], r["worst"], r["verdict"]) for r in new] == [
        (None, 1.27, "not-kept"),
        (None, 1.27, "kept"),
        (None, None, "unclear"),
    ]


@pytest.mark.parametrize("schema", [1, 2])
def test_sentences_of_checks_and_verdicts_are_kept_as_they_were(tmp_path, schema):
    old = json.loads((HERE / "data" / "run.json").read_text())
    old["schema_version"] = schema
    check = {"name": "number of blocks", "passed": True, "measured": "nine", "limit": "9"}
    old["verification"]["checks"] = [check]
    old["runtimes"]["verdicts"][0]["why"], old["runtimes"]["verdicts"][1]["why"] = "", "who knows"
    (tmp_path / "run.json").write_text(json.dumps(old))
    record = RunRecord.load(tmp_path)
    assert [c.key for c in record.verification.checks] == ["blocks"]
    assert [v.why and v.why.key for v in record.runtimes.verdicts] == [None, "note", "unknown"]
    page = seen(record)
    assert page.rows["exact"][1][2:] == ["nine", "9"]
    assert "llama.cpp: who knows" in page.text("runtimes")
    record.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path) == record


def test_what_was_not_timed_and_the_names_of_runtimes_become_keys():
    old = {"speed": {"skipped": ["words"]}, "runtimes": {"verdicts": [{"runtime": "llama-cpp"}]}}
    found = upgrade(old)
    assert found["speed"]["skipped"] == [{"reason": "note", "detail": "words"}]
    assert found["runtimes"]["verdicts"] == [{"runtime": "llama.cpp"}]


def test_the_example_is_read_in_full():
    record = RunRecord.load(EXAMPLE)
    assert record.schema_version == SCHEMA
    assert record.evaluation_text.source == "held-out"
    assert (record.repair.status, record.repair.self_generated) == ("repaired", True)
    assert {row.verdict for row in record.gate.rows} == {"kept", "not-kept", "unclear"}
    assert record.answers.pairs[2].turns
    assert upgrade(upgrade({"repair_note": "not asked for"}))["repair"]["status"] == "not-asked"


@pytest.mark.parametrize(
    ("content", "nouns"),
    [
        (None, ("no run record", "run.json")),
        (b"{", ("not a run record", "file")),
        (b"[" * 10_000, ("not a run record",)),
        (b"[1]", ("not a run record",)),
        (b'{"command": 1}', ("not a run record", "command")),
        (b'{"schema_version": 99}', ("schema 99", "upgrade")),
        (b'{"schema_version": "x"}', ("not a run record",)),
        (b'{"gate": {"rows": [3]}, "verification": 4}', ("not a run record",)),
        (b'{"evaluation_note": [1], "repair_note": {}}', ("not a run record",)),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, content, nouns):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        RunRecord.load(tmp_path)
    assert all(noun in str(caught.value) for noun in nouns)
    assert "\n" not in str(caught.value)
