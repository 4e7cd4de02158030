"""Intervals and paired tests: how sure a measured figure is. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
Z95 = 1.959964
"""Standard errors of a normal figure to each end of its 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % confidence interval; the bounds are null where one value was seen."""

    value: float
    low: float | None
    high: float | None

    def holds(self, value: float) -> bool:
        """Whether the figure cannot be told from ``value``, as that is in its interval, or there is
        none. With 0 or 1 as what means no change, this is "within noise" everywhere."""
        if self.low is None or self.high is None:
            return True
        return not (value < self.low or value > self.high)

    def mapped(self, change: Callable[[float], float]) -> Interval:
        """The figure and its ends through a monotonic function."""
        if self.low is None or self.high is None:
            return Interval(value=change(self.value), low=None, high=None)
        low, high = sorted((change(self.low), change(self.high)))
        return Interval(value=change(self.value), low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Flips:
    """The same items, right or wrong, before and after.

    ``lost``: right before, wrong after; ``won``: the reverse. ``difference``: share right after
    minus before, in -1..1. ``p_value``: McNemar's exact test, two-sided; 1 if nothing flipped.
    """

    items: int
    lost: int
    won: int
    difference: Interval
    p_value: float

    @property
    def within_noise(self) -> bool:
        """Whether the difference cannot be told from none."""
        return self.difference.holds(0.0)


def standard_error(values: Values) -> float | None:
    """Of the mean of ``values``; None for a single one."""
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else None


def interval(values: Values, least: float = -inf, most: float = inf) -> Interval:
    """Mean of independent values [n] with its 95 % interval (Student's t), which ends where values
    do: no mean of what is from ``least`` to ``most`` is beyond these."""
    mean, error = float(values.mean()), standard_error(values)
    if error is None:
        return Interval(value=mean, low=None, high=None)
    half = float(stats.t.ppf(0.975, values.size - 1)) * error
    # rounding may leave a mean itself a little beyond
    low, high = max(mean - half, min(least, mean)), min(mean + half, max(most, mean))
    return Interval(value=mean, low=low, high=high)


def shares(values: Values) -> Interval:
    """As :func:`interval`, of values in 0..1. Where all of several are alike they show no spread,
    and the ends are those of a :func:`proportion`: six answers that are kept in full do not prove
    that the next one is."""
    found = interval(values, 0.0, 1.0)
    if found.low is None or values.min() != values.max():
        return found
    low, high = _wilson(found.value, values.size)
    return Interval(value=found.value, low=low, high=high)


def _wilson(share: float, items: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which need not be a whole number of ``items``."""
    more = Z95**2 / items
    middle = (share + more / 2) / (1 + more)
    half = float(np.sqrt(more * (share * (1 - share) + more / 4))) / (1 + more)
    return max(0.0, middle - half), min(1.0, middle + half)


def exponential(logs: Interval) -> Interval:
    """From nats/token to perplexity, or from a difference of logs to a ratio; bounds included."""

    return logs.mapped(lambda x: float(np.exp(x)))


def proportion(successes: int, items: int) -> Interval:
    """A share of ``items`` with Wilson's 95 % interval, which is sound at 0 and 1 too."""
    found = stats.binomtest(successes, items).proportion_ci(0.95, method="wilson")
    return Interval(value=successes / items, low=float(found.low), high=float(found.high))


MOST = 10_000
"""Measurements that may be asked for."""


def items_to_tell(found: Interval, limit: float, items: int) -> int | None:
    """About how many items would tell a figure, measured on ``items``, from ``limit``, if its value
    stayed: those at which its interval would end there. Intervals narrow with the root of the
    number; Wilson's of a share ends at L where (value - L)^2 = z^2 L (1 - L) / n. None where no
    number would do."""
    gap = abs(limit - found.value)
    end = found.high if limit > found.value else found.low
    if not gap > 0 or end is None:
        return None
    half = abs(end - found.value)
    if _is_wilson(found):
        half *= sqrt(limit * (1 - limit) / (end * (1 - end)))
    elif found.low is not None and found.high is not None:
        half = max(found.value - found.low, found.high - found.value)  # one end may be clipped
    more = (half / gap) ** 2
    return ceil(items * more) or None


def about(count: int) -> int:
    """Up to two digits that mean something."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def _is_wilson(found: Interval) -> bool:
    """Whether the ends are those that Wilson's rule gives a share, of however many items."""
    low, high, share = found.low, found.high, found.value
    if low is None or high is None or not 0 <= low < high <= 1:
        return False
    end = low if low > 0 else high
    if end in (share, 1):
        return False
    items = Z95**2 * end * (1 - end) / (share - end) ** 2
    return bool(np.allclose((low, high), _wilson(share, items), rtol=0, atol=1e-6))


def flips(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """Paired comparison of right and wrong on the same items.

    The interval of the difference is Wald's for paired shares with Agresti and Min's half a flip
    added each way (Statistics in Medicine 24, 2005), which holds up where few items flip.

    Raises:
        ValueError: no items, or not as many before as after.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"{len(before)} items before, {len(after)} after")
    n = len(before)
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    more = n + 2
    p, q = (won + 0.5) / more, (lost + 0.5) / more
    half = Z95 * float(np.sqrt((p + q - (p - q) ** 2) / more))
    return Flips(
        items=n,
        lost=lost,
        won=won,
        difference=Interval(
            value=(won - lost) / n, low=max(-1.0, p - q - half), high=min(1.0, p - q + half)
        ),
        p_value=float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    )
