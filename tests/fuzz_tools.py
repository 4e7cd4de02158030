"""JSON from nowhere good: any value, and a value with one place spoilt."""

import copy

from hypothesis import strategies as st

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def places(value, path=()):
    """Paths of all values inside a JSON value."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw, value):
    """A JSON value with one place replaced by junk or a number, removed, or named otherwise."""
    value = copy.deepcopy(value)
    *above, last = draw(st.sampled_from([*places(value)]))
    inner = value
    for key in above:
        inner = inner[key]
    how = draw(st.sampled_from(["junk", "remove", "rename", "number"]))
    if how == "remove":
        del inner[last]
    elif how == "rename" and isinstance(inner, dict):
        inner[draw(st.text(max_size=20))] = inner.pop(last)
    else:
        inner[last] = draw(st.integers(-5, 5000) if how == "number" else JUNK)
    return value
