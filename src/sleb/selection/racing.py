"""Racing: give up candidates that are clearly worse, on a growing prefix of the windows.

Windows are in random order, so a prefix is a sample of them. At each look a candidate is dropped
if its mean paired excess over the k-th best is beyond the one-sided confidence limit. The limit
holds for all live candidates (Bonferroni) and all looks of a race together, so that with k = 1 the
candidate that is best on all windows is lost with probability of at most ``ERROR`` per race, as far
as means of windows are normal. If several survive, they are scored on every window, which decides;
one alone needs no further windows.

Four things make few windows go far:

- Looks at growing prefixes are far from independent: what they cost together is computed as for
  the boundary of a group sequential trial (Armitage, McPherson and Rowe 1969; Pocock 1977).
- Variances of few windows are unsteady, so each is drawn towards the median over the candidates
  as if that had been seen on ``PRIOR`` windows (a moderated t statistic, after Smyth 2004).
- As windows run out, the error of a mean over a finite number of them shrinks to zero.
- The round before scored nearly the same sets, some on more windows. What it says about the
  windows not yet seen is used by regression (two-phase sampling; Cochran, Sampling Techniques,
  1977, section 12.6), with one slope for all candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from scipy import stats

from sleb.core.plan import Baseline, Round, Score
from sleb.core.statistics import Values, standard_error

ERROR = 0.05
PRIOR = 16
FIRST = 4


class Race:
    """The candidates still in a race, as indices; at least ``k`` of them stay to the end.

    ``guide`` [candidates, windows]: scores of similar candidates on a prefix of the same windows,
    NaN beyond it and where there are none.
    """

    def __init__(self, candidates: int, windows: int, k: int, guide: Values | None = None) -> None:
        self.live = list(range(candidates))
        self.windows, self.k = windows, k
        self._guide = guide
        self._prefixes = _prefixes(windows)
        self._looks = _independent_looks(self._prefixes, ERROR / max(1, candidates))

    def looks(self, fill: Callable[[int], int] | None = None) -> Iterator[int]:
        """Numbers of windows to score the live candidates on, up to all; once only ``k`` are left,
        all at once, or none if that is one. There is no look for fewer new windows than
        ``fill(len(live))``, which would leave the device idle. (To skip a look only makes an error
        less likely.)"""
        seen = 0
        for windows in self._prefixes[:-1]:
            if len(self.live) <= self.k:
                break
            if fill is None or windows >= seen + fill(len(self.live)):
                seen = windows
                yield windows
        if len(self.live) > 1 or not seen:
            yield self.windows

    def update(self, values: Values) -> None:
        """Drop what is clearly worse. values [live, m]: scores on the first m windows."""
        m = values.shape[1]
        if m == self.windows or len(self.live) <= self.k:
            return
        base = int(np.argsort(values.mean(1), kind="stable")[self.k - 1])
        excess, error = self._excess(values, base)
        level = ERROR / (len(self.live) * self._looks)
        limit = stats.t.ppf(1 - level, PRIOR + m - 1) * error
        self.live = [i for i, x, most in zip(self.live, excess, limit, strict=True) if x <= most]

    def _excess(self, values: Values, base: int) -> tuple[Values, Values]:
        """Per candidate its mean excess over candidate ``base`` on all windows, as estimated from
        the first m, and the estimate's standard error."""
        m, n = values.shape[1], self.windows
        excess = values - values[base]
        mean = excess.mean(1)
        around = excess - mean[:, None]
        variance = _moderated(around)
        if self._guide is None:
            return mean, np.sqrt(variance * (1 / m - 1 / n))
        guide = self._guide[self.live]
        before = guide - guide[base]
        known = np.isfinite(before).sum(1)  # windows
        ahead = known > m
        ahead[base] = False
        seen = np.where(ahead[:, None], before[:, :m], 0.0)
        swing = seen - seen.mean(1, keepdims=True)
        slope = (swing * around).sum() / max((swing**2).sum(), 1e-300)
        whole = np.array(
            [row[:k].mean() if k else 0.0 for row, k in zip(before, known, strict=True)]
        )
        mean = mean + np.where(ahead, slope * (whole - seen.mean(1)), 0.0)
        reach = np.where(ahead, known, m)
        rest = _moderated(around - slope * swing)
        return mean, np.sqrt(rest * (1 / m - 1 / reach) + variance * (1 / reach - 1 / n))


def _moderated(around: Values) -> Values:
    """Variance per row of deviations [candidates, m] from their means, drawn to the median."""
    free = around.shape[1] - 1
    own = (around**2).sum(1) / free
    return np.asarray((PRIOR * np.median(own) + free * own) / (PRIOR + free))


def _prefixes(windows: int) -> list[int]:
    """4, 5, 7, 9, 12, 16, 22, ... and all: each look adds about a third. Closer looks would save
    few windows, and leave a GPU with little to do at each."""
    sizes = [FIRST]
    while sizes[-1] < windows:
        sizes.append(max(sizes[-1] + 1, round(sizes[-1] * 1.35)))
    return [s for s in sizes if s < windows] + [windows]


def _independent_looks(prefixes: Sequence[int], level: float) -> float:
    """Probability that any look's standardized error is beyond a limit, over that of one look's,
    for a limit that keeps the former about at ``level``.

    With m of N windows the error of the mean has variance 1/m - 1/N, and the errors at two looks
    correlate as those of a Brownian motion whose time is the reciprocal of that.
    """
    *looks, total = prefixes
    if len(looks) < 2:
        return 1.0
    limit = stats.norm.isf(level / len(looks))  # Bonferroni's: a little high, so on the safe side
    x, step = np.linspace(-8.0, limit, 400, retstep=True)
    density = stats.norm.pdf(x)
    times = [1 / (1 / m - 1 / total) for m in looks]
    for before, now in pairwise(times):
        pull, spread = np.sqrt(before / now), np.sqrt(1 - before / now)
        density = stats.norm.pdf(x[:, None], pull * x[None], spread) @ density * step
    return float((1 - density.sum() * step) / stats.norm.sf(limit))


def leaders(values: Values) -> list[int]:
    """Of candidates that raced, values [candidates, windows] with NaN from the window on at which
    each left: those that saw the most windows, lowest mean first. Ties keep their order."""
    seen = np.isfinite(values).sum(1)
    stayed = np.flatnonzero(seen == seen.max())
    means = values[stayed, : seen.max()].mean(1)
    return [int(i) for i in stayed[np.argsort(means, kind="stable")]]


def rank(
    blocks: Sequence[int], values: Values, n_removed: int, dense: Values | None = None
) -> Round:
    """A round's record: candidates best first, and the ``n_removed`` best of them.

    values [len(blocks), windows]; NaN from the window on at which a candidate left a race. Since
    windows differ in difficulty, means of fewer windows are of differences: a candidate's is the
    winner's plus how much it was above it, and a winner's that of the ``dense`` model [windows],
    if given, plus how much it was above that, each on the windows that both saw. Ties go to the
    lower block id. A candidate scored on no window is left out.
    """
    order = np.argsort(blocks, kind="stable")
    ahead = [int(order[i]) for i in leaders(values[order])]
    best = ahead[0]
    base, base_se = _estimate(values[best], dense)
    scores = []
    for i, row in enumerate(values):
        seen = np.isfinite(row)
        if not seen.any():
            continue
        excess = (row - values[best])[seen]
        excess_se = standard_error(excess)
        if i in ahead:
            mean, se = _estimate(row, dense)
        else:
            mean, se = base + float(excess.mean()), _both(base_se, excess_se)
        scores.append(
            Score(
                block=blocks[i],
                mean=round(mean, 6),  # a millionth of a nat: far below any noise
                se=rounded(se),
                excess_se=rounded(excess_se),
                windows=int(seen.sum()),
            )
        )
    # the removed are chosen by exact means
    removed = tuple(blocks[i] for i in ahead[:n_removed])
    place = {block: turn for turn, block in enumerate(removed)}
    scores.sort(key=lambda s: (place.get(s.block, len(place)), s.mean, s.block))
    return Round(removed=(), scores=tuple(scores)).choosing(*removed)


def _estimate(row: Values, dense: Values | None) -> tuple[float, float | None]:
    """Mean of a row over all windows, and its standard error."""
    seen = np.isfinite(row)
    if dense is None or seen.all():
        return float(row[seen].mean()), standard_error(row[seen])
    above = (row - dense)[seen]
    error = _both(standard_error(dense), standard_error(above))
    return float(dense.mean() + above.mean()), error


def _both(a: float | None, b: float | None) -> float | None:
    """Standard error of a sum."""
    return None if a is None or b is None else float(np.hypot(a, b))


def baseline(dense: Values) -> Baseline:
    """The record of the dense model's scores [windows]."""
    return Baseline(mean=round(float(dense.mean()), 6), se=rounded(standard_error(dense)))


def rounded(value: float | None) -> float | None:
    """To a millionth of a nat."""
    return None if value is None else round(value, 6)
