"""Exceptions of other libraries become one line with an exit code; what is no failure of theirs
goes through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleb.core.errors import SAID, DataError, InputError, map_exceptions, out_of_memory, said
from sleb.models.source import quiet_tqdm, quiet_transformers

TABLE = (
    (ImportError, InputError, f"needs {{a}} package: {SAID}; install it"),
    ((ValueError, OSError), DataError, f"does not load: {SAID}"),
)


@given(st.text(max_size=60), st.sampled_from([ImportError, ValueError, OSError, UnicodeError]))
def test_the_first_row_that_fits_gives_class_and_message(text, kind):
    error = kind.__new__(kind, text)
    error.args = (text,)
    with pytest.raises((InputError, DataError)) as caught, map_exceptions(*TABLE):
        raise error
    assert isinstance(caught.value, InputError if kind is ImportError else DataError)
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    assert SAID not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        InputError("ours"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("cannot allocate memory"),
        KeyError("of no row"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_ours_or_about_memory_or_in_no_row_goes_through(error):
    with pytest.raises(type(error)) as caught, map_exceptions(*TABLE):
        raise error
    assert caught.value is error
    assert out_of_memory(error) == ("emory" in f"{type(error).__name__} {error}")


def test_an_error_is_said_in_a_line_of_its_own():
    assert said(ValueError("one\ntwo")) == "one"
    assert said(ValueError("\n field 'x':\n  is no number\nmore")) == "field 'x': is no number"
    assert said(ValueError("\n ")) == "ValueError"
    assert len(said(ValueError("x" * 10_000))) <= 400


def test_bars_of_others_are_silenced_only_where_they_have_no_switch(capsys):
    from tqdm import tqdm

    before = vars(tqdm)["__init__"]
    with quiet_transformers():
        assert vars(tqdm)["__init__"] is before  # an application's own bars go on
    with quiet_tqdm():
        list(tqdm(range(3)))
    assert capsys.readouterr().err == ""
    assert vars(tqdm)["__init__"] is before
    list(tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err
