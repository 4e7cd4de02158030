"""Racing: give up candidates that are clearly worse, on a growing prefix of the windows.

Windows are in random order, so a prefix is a sample of them. At each look a candidate is dropped
if its mean paired excess over the k-th best is beyond the one-sided confidence limit. The limit
holds for all candidates and all looks of a race together (Bonferroni at ``ERROR``), so that with
k = 1 the candidate that is best on all windows is lost with probability of at most ``ERROR`` per
race, as far as means of windows are normal. What survives is scored on every window, and decides.

Variances of few windows are unsteady, so each is drawn towards the median over the candidates as if
that had been seen on ``PRIOR`` windows (a moderated t statistic, after Smyth 2004); and as windows
run out the error of a mean over a finite number of them shrinks to zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sleb.plan import Round, Score

__all__ = ["ERROR", "Race", "Values", "rank"]

Values = NDArray[np.float64]

ERROR = 0.05
PRIOR = 8
FIRST = 4


class Race:
    """The candidates still in a race, as indices; at least ``k`` of them stay to the end."""

    def __init__(self, candidates: int, windows: int, k: int) -> None:
        self.live = list(range(candidates))
        self.windows, self.k = windows, k
        self._prefixes = _prefixes(windows)
        self._level = ERROR / (max(1, candidates) * len(self._prefixes))

    @property
    def first(self) -> int:
        """Windows of the first look."""
        return self._prefixes[0]

    def looks(self) -> Iterator[int]:
        """Numbers of windows to score the live candidates on, up to all; fewer looks once only
        ``k`` candidates are left."""
        for windows in self._prefixes[:-1]:
            if len(self.live) <= self.k:
                break
            yield windows
        yield self.windows

    def update(self, values: Values) -> None:
        """Drop what is clearly worse. values [live, m]: scores on the first m windows."""
        m = values.shape[1]
        if m == self.windows or len(self.live) <= self.k:
            return
        means = values.mean(1)
        excess = values - values[np.argsort(means, kind="stable")[self.k - 1]]
        variance = excess.var(1, ddof=1)
        usual = float(np.median(variance))
        variance = (PRIOR * usual + (m - 1) * variance) / (PRIOR + m - 1)
        error = np.sqrt(variance / m * (1 - m / self.windows))
        limit = stats.t.ppf(1 - self._level, PRIOR + m - 1) * error
        self.live = [
            i for i, gap, most in zip(self.live, excess.mean(1), limit, strict=True) if gap <= most
        ]


def _prefixes(windows: int) -> list[int]:
    """4, 6, 8, 12, 16, 24, ... and all: each look adds about two fifths."""
    sizes, size = [], FIRST
    while size < windows:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [s for s in sizes if s < windows] + [windows]


def rank(blocks: Sequence[int], values: Values, n_removed: int) -> Round:
    """A round's record: candidates best first, and the ``n_removed`` best of them.

    values [len(blocks), windows]; NaN from the window on at which a candidate left a race. Such a
    candidate's mean is the winner's plus their mean difference on the windows that both saw, since
    windows differ in difficulty. Ties go to the lower block id.
    """
    whole = np.flatnonzero(np.isfinite(values).all(1)).tolist()
    full: dict[int, float] = {i: float(values[i].mean()) for i in whole}
    best = min(full, key=lambda i: (full[i], blocks[i]))
    scores = []
    for i, row in enumerate(values):
        seen = np.isfinite(row)
        excess = (row - values[best])[seen]
        excess_se = _standard_error(excess)
        if i in full:
            mean, se = full[i], _standard_error(row)
        else:
            mean, base = full[best] + float(excess.mean()), _standard_error(values[best])
            se = None if base is None or excess_se is None else float(np.hypot(base, excess_se))
        scores.append(
            Score(
                block=blocks[i],
                mean=round(mean, 6),  # a millionth of a nat: far below any noise
                se=_rounded(se),
                excess_se=_rounded(excess_se),
                windows=int(seen.sum()),
            )
        )
    # the removed are chosen among those scored on every window, by exact means
    chosen = sorted(full, key=lambda i: (full[i], blocks[i]))[:n_removed]
    removed = tuple(blocks[i] for i in chosen)
    place = {block: turn for turn, block in enumerate(removed)}
    scores.sort(key=lambda s: (place.get(s.block, len(place)), s.mean, s.block))
    return Round(removed=removed, scores=tuple(scores))


def _standard_error(values: Values) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
