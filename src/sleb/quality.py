"""Perplexity with its uncertainty, dense and pruned on the same windows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from sleb.metrics import NLL
from sleb.models.load import LoadedModel
from sleb.progress import Progress, silent
from sleb.selection.objective import DENSE, BlockSet, Values
from sleb.selection.racing import standard_error
from sleb.selection.sweep import Sweep, block_forwards
from sleb.text import Windows

__all__ = ["Evaluation", "Interval", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % confidence interval; the bounds are null for a single window."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss in nats/token and perplexity over ``windows`` windows with ``tokens`` scored tokens.

    With blocks removed, also the pruned model's, the paired difference of losses, and the ratio of
    perplexities (the difference's exponential). Intervals are Student's t over windows.
    """

    windows: int
    length: int
    tokens: int
    loss: Interval
    perplexity: Interval
    removed: tuple[int, ...] = ()
    pruned_loss: Interval | None = None
    pruned_perplexity: Interval | None = None
    loss_increase: Interval | None = None
    perplexity_ratio: Interval | None = None


def evaluate(
    model: LoadedModel,
    windows: Windows,
    *,
    removed: Collection[int] = (),
    batch: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Score ``model`` on ``windows``, and side by side with ``removed`` blocks bypassed.

    Every window scores its length - 1 predicted tokens, as the published protocol does.

    Raises:
        DataError: a loss is NaN or infinite.
    """
    sets = [DENSE, BlockSet(removed)] if removed else [DENSE]
    sweep = Sweep(model.stack, windows.ids, NLL, batch=batch)
    n, length = windows.ids.shape
    work = n * (block_forwards(sets, len(model.stack)) + len(sets))
    with progress.stage("evaluating", work) as tick:
        sweep.on_work(tick)
        losses = sweep.values(sets, 0, n)
    dense = interval(losses[0])
    plain = Evaluation(
        windows=n,
        length=length,
        tokens=n * (length - 1),
        loss=dense,
        perplexity=exponential(dense),
    )
    if not removed:
        return plain
    pruned, increase = interval(losses[1]), interval(losses[1] - losses[0])
    return replace(
        plain,
        removed=tuple(sorted(removed)),
        pruned_loss=pruned,
        pruned_perplexity=exponential(pruned),
        loss_increase=increase,
        perplexity_ratio=exponential(increase),
    )


def interval(values: Values) -> Interval:
    """Mean of per-window values [windows] with its 95 % interval (Student's t)."""
    mean, error = float(values.mean()), standard_error(values)
    if error is None:
        return Interval(value=mean, low=None, high=None)
    half = float(stats.t.ppf(0.975, values.size - 1)) * error
    return Interval(value=mean, low=mean - half, high=mean + half)


def exponential(losses: Interval) -> Interval:
    """From nats/token to perplexity, bounds included."""

    def exp(x: float | None) -> float | None:
        return None if x is None else float(np.exp(x))

    return Interval(value=float(np.exp(losses.value)), low=exp(losses.low), high=exp(losses.high))
