"""What is said twice is found, and what is not is let alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleb.calibration.overlap import RUN, shared_with


def distinct(rows: int, width: int) -> torch.Tensor:
    """Token ids [rows, width] of which none comes twice."""
    ids = torch.randperm(rows * width, generator=torch.Generator().manual_seed(0))
    return ids.reshape(rows, width)


PLACES = st.integers(0, 40)


@given(row=st.integers(0, 7), start=PLACES, to=PLACES, length=st.integers(1, 64))
def test_a_run_that_both_have_is_found_wherever_it_is(row, start, to, length):
    every = distinct(12, 64)
    ours, others = every[:8].clone(), every[8:]
    length = min(length, 64 - start, 64 - to)
    ours[row, to : to + length] = others[2, start : start + length]
    assert shared_with(ours, others) == ([row] if length >= RUN else [])


@pytest.mark.parametrize("width", [1, RUN - 1])
def test_windows_shorter_than_a_run_share_none(width):
    ids = torch.zeros((3, width), dtype=torch.int64)
    assert shared_with(ids, ids) == []
