"""Plans and records from an untrusted place: read, or refused in one line and in little time."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plan_tools import minimal
from sleb.core.errors import InputError, SlebError
from sleb.core.plan import MAX_BYTES, Plan
from sleb.formats.exports import FORMATS, export_plan
from sleb.record import RunRecord

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_plan_changed_anywhere_is_read_or_refused(tiny_plan, tmp_path, data):
    value = json.loads(tiny_plan.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(value) if p]))
        put(value, path, data.draw(JUNK))
    (tmp_path / "plan.json").write_text(json.dumps(value))
    try:
        plan = Plan.load(tmp_path / "plan.json")
        for form in sorted(FORMATS):
            if form != "mergekit":
                export_plan(tmp_path / "plan.json", form)
    except SlebError as error:
        said = str(error)
    else:
        said = ""
        assert Plan.model_validate_json(plan.to_json()) == plan
    assert "\n" not in said
    assert len(said) < 5000


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_plan_with_damaged_bytes_is_read_or_refused(tiny_plan, tmp_path, data):
    raw = bytearray(tiny_plan.to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "plan.json").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    said = ""
    try:
        Plan.load(tmp_path / "plan.json")
    except SlebError as error:
        said = str(error)
    assert "\n" not in said


def bombs():
    n = 2_000_000
    yield "nested", "[" * n
    yield "nested objects", '{"a":' * n
    yield "long number", json.dumps(minimal()).replace('"order": [4', '"order": [' + "4" * n)
    yield "long text", json.dumps(minimal(metric="x" * n))
    yield "long list", json.dumps(minimal(order=[1] * n))
    yield (
        "many versions",
        json.dumps(minimal(schema_version=1)).replace(
            "{", '{"schema_version": 1,' + '"schema_version" ' * (n // 10), 1
        ),
    )
    yield "blanks", '"schema_version"' + " " * n + ":" + " " * n + "x"
    yield "escapes", json.dumps(minimal(metric="\\u0041" * (n // 6)))


@pytest.mark.parametrize(("name", "text"), [*bombs()], ids=lambda value: value[:16])
def test_a_plan_made_to_be_slow_is_refused_quickly(tmp_path, name, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert path.stat().st_size < MAX_BYTES
    before = time.process_time()
    with pytest.raises(InputError) as error:
        Plan.load(path)
    assert time.process_time() - before < 5
    assert len(str(error.value)) < 2000


def test_the_largest_plan_is_exported_quickly(tmp_path):
    order = list(range(0, 9_998, 2))
    model = {**minimal()["model"], "blocks": 9_999}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(minimal(model=model, order=order, removed=order)))
    before = time.process_time()
    for form in ("llama-cpp", "modelopt-list", "layer-map"):
        export_plan(path, form)
    assert time.process_time() - before < 1


def test_a_record_from_elsewhere_is_read_or_refused(tmp_path):
    for raw in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"schema_version": 2}'):
        (tmp_path / "run.json").write_bytes(raw)
        with pytest.raises(InputError):
            RunRecord.load(tmp_path)
