"""Perplexity with its uncertainty, dense and pruned on the same windows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sleb.calibration.windows import Windows
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Interval, Values, exponential, interval
from sleb.core.tabular import Points, Tabular
from sleb.core.units import UnitId
from sleb.models.load import LoadedModel
from sleb.selection.metrics import NLL, QUALITY
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import Patch, Sweep, block_forwards


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Loss in nats/token and perplexity over ``windows`` windows of which ``tokens`` were scored.

    With blocks removed, also the pruned model's, the paired difference of losses, the ratio of
    perplexities (the difference's exponential), the divergence from the dense model's predictions
    (KL, nats/token), and the share of tokens where both find the same one likeliest. Intervals are
    Student's t over windows.
    """

    windows: int
    tokens: int
    loss: Interval
    perplexity: Interval
    pruned_loss: Interval | None = None
    pruned_perplexity: Interval | None = None
    loss_increase: Interval | None = None
    perplexity_ratio: Interval | None = None
    divergence: Interval | None = None
    agreement: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Quality, Tabular):
    """Quality on all windows of ``length`` tokens, and on each text's own, by its name.

    Where the pruned model is a repaired one, ``unrepaired`` is the plain cut's."""

    length: int
    removed: tuple[UnitId, ...] = ()
    domains: dict[str, Quality] = field(default_factory=dict)
    unrepaired: Evaluation | None = None

    def rows(self) -> list[dict[str, Any]]:
        """A row for all texts together, and for each, where there are several."""
        several = self.domains if len(self.domains) > 1 else {}
        found = []
        for name, quality in [("all", self), *several.items()]:
            row: dict[str, Any] = {"text": name, "windows": quality.windows}
            for field_name in ("perplexity", "pruned_perplexity", "perplexity_ratio"):
                if (value := getattr(quality, field_name)) is not None:
                    label = field_name.replace("_", " ")
                    row |= {label: value.value, f"{label} low": value.low}
                    row[f"{label} high"] = value.high
            found.append(row)
        return found

    def drawn(self) -> Points:
        """By text the ratio of perplexities, or the perplexity."""
        label = "perplexity" if self.perplexity_ratio is None else "perplexity ratio"
        rows = self.rows()
        return Points(
            x=tuple(row["text"] for row in rows),
            y=tuple(row[label] for row in rows),
            low=tuple(row[f"{label} low"] for row in rows),
            high=tuple(row[f"{label} high"] for row in rows),
            x_label="text",
            y_label=label,
        )

    def __str__(self) -> str:
        found = self.perplexity_ratio or self.perplexity
        label = "perplexity ratio" if self.perplexity_ratio else "perplexity"
        span = "" if found.low is None else f" ({found.low:.4g} to {found.high:.4g})"
        return f"{label} {found.value:.4g}{span} on {self.windows} windows of {self.length} tokens"


def evaluate(
    model: LoadedModel,
    windows: Windows,
    *,
    removed: Collection[int] = (),
    patch: Patch | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Score ``model`` on ``windows``, and side by side with ``removed`` blocks bypassed; with
    ``patch``, as of a repair, the latter both under it and without.

    Every window scores its length - 1 predicted tokens, as the published protocol does, or those
    that are ``scored``.

    Raises:
        DataError: a loss is NaN or infinite.
    """
    sets = [DENSE, BlockSet(removed)] if removed else [DENSE]
    metric = QUALITY if removed else NLL
    sweep = Sweep(model.stack, windows.ids, metric, batch=batch, patch=patch, scored=windows.scored)
    n, length = windows.ids.shape
    counts = windows.counts.numpy()
    work = n * (block_forwards(sets, len(model.stack)) + len(sets)) * (2 if patch else 1)
    with progress.stage("evaluating", work) as tick:
        sweep.on_work(tick)
        values = sweep.values(sets, 0, n)  # [sets, windows] or [sets, windows, 3]
        plain = None
        if patch and removed:
            sweep = Sweep(model.stack, windows.ids, metric, batch=batch, scored=windows.scored)
            sweep.on_work(tick)
            plain = np.concatenate((values[:1], sweep.values(sets[1:], 0, n)))
    source = np.array(windows.source)

    def of(values: Values) -> Evaluation:
        return Evaluation(
            **vars(_quality(values, counts)),
            length=length,
            removed=tuple(sorted(removed)),
            domains={
                name: _quality(values[:, source == i], counts[source == i])
                for i, name in enumerate(windows.names)
                if (source == i).any()
            },
        )

    return replace(of(values), unrepaired=None if plain is None else of(plain))


def _quality(values: Values, counts: Any) -> Quality:
    """Of the values [sets, windows] or [sets, windows, 3], each the mean of so many tokens."""
    n, tokens = len(counts), int(counts.sum())
    losses = values[..., 0] if values.ndim == 3 else values
    dense = interval(losses[0], 0.0)
    plain = Quality(windows=n, tokens=tokens, loss=dense, perplexity=exponential(dense))
    if values.ndim == 2:
        return plain
    pruned, increase = interval(losses[1], 0.0), interval(losses[1] - losses[0])
    return replace(
        plain,
        pruned_loss=pruned,
        pruned_perplexity=exponential(pruned),
        loss_increase=increase,
        perplexity_ratio=exponential(increase),
        divergence=interval(values[1, :, 1], 0.0),
        agreement=interval(values[1, :, 2], 0.0, 1.0),
    )
