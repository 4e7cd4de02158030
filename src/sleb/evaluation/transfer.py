"""How well blocks chosen on one domain's text do on the others.

Every text, and the mix of all, gets a search of its own. All searches see equally many windows, or
the mix would win by more evidence alone; each is the search that `sleb search` does on the same
texts, windows and seed. Then every choice is scored on the windows that each text holds out, all
in one sweep, so that choices are compared on the very same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from sleb.calibration import parse_source
from sleb.calibration.split import CalibrationSplit
from sleb.calibration.windows import DEFAULT_WINDOWS, Windows
from sleb.config import TransferConfig, takes
from sleb.core.errors import InputError
from sleb.core.printable import paragraphs
from sleb.core.progress import Progress, Tick, silent
from sleb.core.statistics import Interval, Values, interval
from sleb.core.units import UnitId
from sleb.evaluation.transfer_texts import MIX as MIX
from sleb.evaluation.transfer_texts import check_texts
from sleb.models.load import LoadedModel
from sleb.repairs.search import search
from sleb.selection.goal import parse_bytes
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.request import check_options
from sleb.selection.resources import on_threads
from sleb.selection.sweep import Sweep, block_forwards

WORSE = 0.1
"""Part of the other choice's loss increase by which a choice must exceed it to be clearly worse."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The blocks chosen on one domain (or on ``mix``), and what they cost on each domain's
    held-out text: increase of loss, nats/token, paired, in the order of ``Transfer.domains``.
    ``away``: domains on which they cost clearly more than the blocks chosen at home there; see
    :func:`clearly_worse`."""

    source: str
    removed: tuple[UnitId, ...]
    increase: tuple[Interval, ...]
    away: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Plans of each domain, in order, and last of the mix, against every domain.

    ``windows``: of each search; ``heldout``: of each domain; ``length``: tokens of each.
    ``overlap[i][j]``: blocks that plans i and j share, over those in either (Jaccard).
    ``recommended``: ``source`` of the plan to use where the model is to serve all domains:

    ``mix``, unless a domain's plan costs clearly more than the mix's on no domain, clearly less on
    some, and less on the average over domains. Of several such plans, the one with the least
    average.
    """

    domains: tuple[str, ...]
    windows: int
    heldout: tuple[int, ...]
    length: int
    plans: tuple[Chosen, ...]
    overlap: tuple[tuple[float, ...], ...]
    recommended: str

    def __str__(self) -> str:
        told = f"transfer between {', '.join(self.domains)}; recommended: {self.recommended}"
        return paragraphs([told])


def check_transfer(config: TransferConfig) -> None:
    """Find mistakes in the options of :func:`transfer` before a model is loaded.

    Raises:
        InputError: as :func:`sleb.evaluation.transfer_texts.check_texts` or :func:`sleb.search`.
    """
    check_texts(config)
    check_options(config)


@takes(TransferConfig)
def transfer(
    model: LoadedModel, config: TransferConfig, *, progress: Progress = silent
) -> Transfer:
    """Search on each text and on all of them, and score every choice on every held-out part.

    The names of the texts are the domains; their weights (``@2``) shape the mix alone. Each search,
    the mix's included, is on as many ``windows``: by default up to 32, and as many as the shortest
    text has beside its ``heldout`` windows; of a text too short for both, half. No window that is
    held out is in any search. The target must be ``remove``, ``size`` or ``speedup``.

    Raises:
        InputError: see :func:`check_transfer`; or a text leaves fewer than two windows to hold out.
        DataError, ResourceError, UnsupportedModel: see ``sleb.core.errors``.
    """
    check_transfer(config)
    parts = _parts(model, config)
    aside = [held for split in parts if (held := split.heldout) is not None]
    mix = _split(model, config, config.text, len(parts[0].search.ids))
    domains = tuple(parse_source(spec).name for spec in config.text)

    plans = {
        name: search(model, config, split=split, progress=_Named(progress, name)).removed
        for name, split in zip((*domains, MIX), (*parts, mix), strict=True)
    }
    costs = _costs(model, list(plans.values()), aside, config, progress)
    return Transfer(
        domains=domains,
        windows=mix.search.record.windows,
        heldout=tuple(len(held.ids) for held in aside),
        length=config.length,
        plans=tuple(
            Chosen(
                source=source,
                removed=removed,
                increase=tuple(interval(cost[i]) for cost in costs),
                away=tuple(
                    name
                    for home, (name, cost) in enumerate(zip(domains, costs, strict=True))
                    if clearly_worse(cost[i], cost[home])
                ),
            )
            for i, (source, removed) in enumerate(plans.items())
        ),
        overlap=tuple(tuple(_overlap(a, b) for b in plans.values()) for a in plans.values()),
        recommended=list(plans)[_recommended(costs)],
    )


def clearly_worse(cost: Values, other: Values) -> bool:
    """Whether a choice costs clearly more than another, from increases of loss [n] on the same
    windows: the 95 % interval of the paired difference lies above zero, and the difference is more
    than 10 % of what the other costs."""
    gap = interval(cost - other)
    return gap.low is not None and gap.low > 0 and gap.value > WORSE * abs(float(other.mean()))


def _recommended(costs: Sequence[Values]) -> int:
    """Index of the plan to recommend; see :class:`Transfer`. costs: [plans, windows] per domain,
    of which the last plan is the mix's."""
    mix = len(costs)
    average = np.mean([cost.mean(1) for cost in costs], axis=0)
    better = [
        plan
        for plan in range(mix)
        if average[plan] < average[mix]
        and any(clearly_worse(cost[mix], cost[plan]) for cost in costs)
        and not any(clearly_worse(cost[plan], cost[mix]) for cost in costs)
    ]
    return min(better, key=lambda plan: average[plan], default=mix)


def _costs(
    model: LoadedModel,
    plans: Sequence[Sequence[int]],
    aside: Sequence[Windows],
    config: TransferConfig,
    progress: Progress,
) -> list[Values]:
    """Increase of loss of each plan on each domain's held-out windows: [plans, windows] per
    domain, nats/token. One sweep does all, so what plans share is computed once."""
    ids = torch.cat([part.ids for part in aside])
    sets = [DENSE, *map(BlockSet, plans)]
    work = len(ids) * (block_forwards(sets, len(model.stack)) + len(set(sets)))
    most = None if config.max_memory is None else parse_bytes(config.max_memory, "--max-memory")
    sweep = Sweep(model.stack, ids, NLL, batch=config.batch, max_bytes=most)
    with on_threads(config.threads), progress.stage("comparing", work) as tick:
        sweep.on_work(tick)
        losses = sweep.values(sets, 0, len(ids))
    ends = np.cumsum([len(part.ids) for part in aside])[:-1]
    return np.split(losses[1:] - losses[0], ends, axis=1)


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    return len({*a} & {*b}) / len({*a, *b})


def _split(
    model: LoadedModel, config: TransferConfig, text: Sequence[str], windows: int | None
) -> CalibrationSplit:
    """Windows to search on, and held-out ones as far as there are some. A text's windows come in
    one seeded order, so those of the mix are among those of its own search, and never held out."""
    return CalibrationSplit.of(
        model.tokenizer,
        text,
        windows=windows,
        length=config.length,
        seed=config.seed,
        heldout=config.heldout,
        loss_on=config.loss_on,
    )


def _parts(model: LoadedModel, config: TransferConfig) -> list[CalibrationSplit]:
    """For each text as many windows to search on, and two or more held-out ones."""
    windows, length = config.windows, config.length
    found = {spec: _split(model, config, [spec], windows) for spec in config.text}
    if windows is None:
        for spec, split in found.items():
            has = len(split.search.ids) + _heldout(split)
            if has < 4:
                raise InputError(
                    f"{spec} has {has} windows of {length} tokens, too few to search on and to "
                    "hold out: give more text, or a shorter --length"
                )
            fits = min(DEFAULT_WINDOWS, max(has // 2, has - config.heldout))
            windows = fits if windows is None else min(windows, fits)
        for spec, split in found.items():
            if len(split.search.ids) != windows:
                found[spec] = _split(model, config, [spec], windows)
    for spec, split in found.items():
        if _heldout(split) < 2:
            raise InputError(
                f"{spec} leaves {_heldout(split)} windows of {length} tokens to hold out, and a "
                "comparison needs two: give more text, fewer --windows, or a shorter --length"
            )
    return list(found.values())


def _heldout(split: CalibrationSplit) -> int:
    return 0 if split.heldout is None else len(split.heldout.ids)


@dataclass(frozen=True)
class _Named:
    """A Progress whose stages say which search they belong to."""

    inner: Progress
    name: str

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        return self.inner.stage(f"{title} ({self.name})", total)
