"""How near a model is to the dense one, on windows that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sleb.calibration import Windows
from sleb.core.errors import DataError
from sleb.core.statistics import Interval, Values, exponential, interval
from sleb.distillation.split_model import SplitModel, pieces
from sleb.selection.metrics import token_nll, token_quality

__all__ = ["HealedText", "by_text", "measure"]


@dataclass(frozen=True, kw_only=True)
class HealedText:
    """The dense model's perplexity on ``windows`` held-out windows; before and after healing the
    perplexity as a ratio to it, and the divergence from its predictions (KL, nats/token).
    Intervals are Student's t over windows, paired."""

    windows: int
    perplexity: Interval
    cut_ratio: Interval
    healed_ratio: Interval
    cut_divergence: Interval
    healed_divergence: Interval


@torch.no_grad()
def measure(student: SplitModel, teacher: SplitModel, windows: Windows, at_once: int) -> Values:
    """Per window the dense model's loss, the student's, and its divergence, nats/token, means
    over the predicted tokens. Returns float64 [N, 3].

    Raises:
        DataError: one of them is NaN or infinite.
    """
    rows = []
    for start in range(0, len(windows.ids), at_once):
        ids = windows.ids[start : start + at_once].to(teacher.device)
        known, own = teacher.features(ids), student.features(ids)
        sums = torch.zeros(len(ids), 3, dtype=torch.float64)
        for part in pieces(ids[:, 1:], teacher.vocabulary):
            targets = ids[:, 1:][:, part].reshape(-1)
            dense = teacher.logits(known[:, part]).flatten(0, 1)
            logits = student.logits(own[:, part]).flatten(0, 1)
            found = token_quality(logits, targets, dense)[:, :2]
            values = torch.cat((token_nll(dense, targets)[:, None], found), 1)
            sums += values.double().view(len(ids), -1, 3).sum(1).cpu()
        rows.append(sums / (ids.shape[1] - 1))
    losses: Values = torch.cat(rows).numpy()
    if not np.isfinite(losses).all():
        raise DataError("a loss is NaN or infinite on held-out text; give a lower --lr")
    return losses


def by_text(cut: Values, healed: Values, windows: Windows) -> dict[str, HealedText]:
    """What :func:`measure` found before and after, for each text by its name."""
    source = np.array(windows.source)
    rows = {name: source == i for i, name in enumerate(windows.names)}
    return {name: in_all(cut[r], healed[r]) for name, r in rows.items() if r.any()}


def in_all(cut: Values, healed: Values) -> HealedText:
    """The same over all windows."""
    return HealedText(
        windows=len(cut),
        perplexity=exponential(interval(cut[:, 0])),
        cut_ratio=exponential(interval(cut[:, 1] - cut[:, 0])),
        healed_ratio=exponential(interval(healed[:, 1] - healed[:, 0])),
        cut_divergence=interval(cut[:, 2]),
        healed_divergence=interval(healed[:, 2]),
    )
