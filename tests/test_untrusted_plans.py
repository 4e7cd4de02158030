"""Plans from an untrusted place: read, or refused in one line and in little time."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz_tools import changed
from plan_tools import minimal
from sleb.core.errors import InputError, SlebError
from sleb.core.plan import MAX_BYTES, Plan
from sleb.formats.exports import FORMATS, export


def attempt(path) -> None:
    """A plan that is sound, or one line that is not long."""
    said = ""
    try:
        plan = Plan.load(path)
        for form in sorted({*FORMATS} - {"mergekit"}):
            export(path, form)
    except SlebError as error:
        said = str(error)
    else:
        assert plan.removed == tuple(sorted(plan.order))
        assert all(0 <= b < plan.model.blocks for b in plan.removed)
        assert Plan.model_validate_json(plan.to_json()) == plan
    assert "\n" not in said
    assert len(said) < 5000


@settings(max_examples=300)
@given(data=st.data())
def test_a_plan_changed_anywhere_is_read_or_refused(tiny_plan, tmp_path, data):
    value = json.loads(tiny_plan.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        value = data.draw(changed(value))
    (tmp_path / "plan.json").write_text(json.dumps(value))
    attempt(tmp_path / "plan.json")


@settings(max_examples=200)
@given(data=st.data())
def test_a_plan_with_damaged_bytes_is_read_or_refused(tiny_plan, tmp_path, data):
    raw = bytearray(tiny_plan.to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "plan.json").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    attempt(tmp_path / "plan.json")


def bombs():
    n = 2_000_000
    many = '{"schema_version": 1,' + '"schema_version" ' * (n // 10)
    yield "nested", "[" * n
    yield "nested objects", '{"a":' * n
    yield "long number", json.dumps(minimal()).replace('"order": [4', '"order": [' + "4" * n)
    yield "long text", json.dumps(minimal(metric="x" * n))
    yield "long list", json.dumps(minimal(order=[1] * n))
    yield "many versions", json.dumps(minimal(schema_version=1)).replace("{", many, 1)
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
        export(path, form)
    assert time.process_time() - before < 1
