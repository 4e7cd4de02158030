"""What a healing did: heal.json beside the checkpoint, and what the model card says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from sleb.calibration.windows import Windows
from sleb.core.plan import Calibration
from sleb.core.statistics import Interval, Values, exponential, interval
from sleb.core.units import UnitId

Reason = Literal["steps", "time", "no-gain"]
"""Why a run ended: all steps done, its minutes spent, or no better with ever lower rates."""


@dataclass(frozen=True, kw_only=True)
class HealedText:
    """The dense model's perplexity on ``windows`` validation windows; before and after healing the
    perplexity as a ratio to it, and the divergence from its predictions (KL, nats/token).
    Intervals are Student's t over windows, paired."""

    windows: int
    perplexity: Interval
    cut_ratio: Interval
    healed_ratio: Interval
    cut_divergence: Interval
    healed_divergence: Interval

    @classmethod
    def of(cls, cut: Values, healed: Values) -> HealedText:
        """From what :func:`sleb.distillation.loss.validate` found before and after, [N, 3]."""
        return cls(
            windows=len(cut),
            perplexity=exponential(interval(cut[:, 0], 0.0)),
            cut_ratio=exponential(interval(cut[:, 1] - cut[:, 0])),
            healed_ratio=exponential(interval(healed[:, 1] - healed[:, 0])),
            cut_divergence=interval(cut[:, 2], 0.0),
            healed_divergence=interval(healed[:, 2], 0.0),
        )


def by_text(
    cut: Mapping[str, Values], healed: Mapping[str, Values], windows: Mapping[str, Windows]
) -> dict[str, HealedText]:
    """The same for each text by its name, of all kinds of windows."""
    found = {}
    for kind, own in windows.items():
        source = np.array(own.source)
        for i, name in enumerate(own.names):
            if (rows := source == i).any():
                found[name] = HealedText.of(cut[kind][rows], healed[kind][rows])
    return found


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What :func:`sleb.heal` did, as heal.json records it.

    ``texts``: before and after, on validation windows by their text, answers to prompts among them;
    ``overall``: on all but answers. Windows are of kinds, texts and answers: ``checks``: (step,
    validation divergence of each kind in nats/token), of which the best one's weights were taken;
    ``passes``: how often those of a kind were gone through. ``lr``: the highest learning rate, at
    the end, and ``rates`` what a step with others made of the validation divergence, (rate,
    nats/token), the start first, ``trials`` what short runs made of it. ``cut_sha256``,
    ``healed_sha256``: over all tensors of the checkpoint that was healed, and of the result.
    ``repaired``: whether the cut was. ``seconds``: of training, over all calls where it was
    stopped in between. ``tokens_per_second``, ``teraflops``: of steps alone,
    ``product_teraflops``: of a product of two large matrices in the same dtype, measured beside it.
    ``compiled``: whether blocks ran so.
    So many ``processes`` shared each step; speeds are of all.
    """

    path: str
    model: str
    cut: str
    removed: tuple[UnitId, ...]
    repaired: bool
    texts: dict[str, HealedText]
    overall: HealedText
    steps: int
    best_step: int
    tokens: int
    passes: dict[str, float]
    lr: float
    rates: tuple[tuple[float, float], ...]
    trials: tuple[tuple[float, float], ...] = ()
    stopped: Reason
    seconds: float
    tokens_per_second: float
    teraflops: float
    product_teraflops: float
    trained_parameters: int
    checks: tuple[tuple[int, tuple[float, ...]], ...]
    settings: dict[str, Any]
    calibration: dict[str, Calibration]
    heldout: dict[str, Calibration]
    cut_sha256: str
    healed_sha256: str
    compiled: bool = False
    processes: int = 1
    schema_version: int = 3

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_bytes(TypeAdapter(Healed).dump_json(self, indent=1) + b"\n")
