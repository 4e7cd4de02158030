"""Windows that say again what others say: measured on such text, a cut looks better than it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

RUN = 24
"""Tokens in a row that two texts have in common by more than chance or a phrase."""
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is zero


def shared_with(windows: Tensor, others: Tensor, run: int = RUN) -> list[int]:
    """The rows of ``windows`` [N, T] with a run of tokens that is in a row of ``others`` [M, U]."""
    known = np.unique(_runs(others, run))
    return [row for row, runs in enumerate(_runs(windows, run)) if np.isin(runs, known).any()]


def _runs(windows: Tensor, run: int) -> NDArray[np.uint64]:
    """A hash of every ``run`` tokens in a row, [N, T - run + 1]; empty if rows are shorter."""
    ids = windows.numpy().astype(np.uint64)
    width = max(0, ids.shape[1] - run + 1)
    found = np.zeros((len(ids), width), dtype=np.uint64)
    for i in range(run if width else 0):  # modulo 2**64
        found = found * _BASE + (ids[:, i : i + width] + np.uint64(1))
    return found
