"""How well blocks chosen on one domain's text do on the others.

Every text, and the mix of all, gets a search of its own. All searches see equally many windows, or
the mix would win by more evidence alone; each is the search that `sleb search` does on the same
texts, windows and seed. Then every choice is scored on the windows that each text holds out, all
in one sweep, so that choices are compared on the very same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sleb.calibration import DEFAULT_WINDOWS, Windows, check_sources, parse_source
from sleb.calibration.split import CalibrationSplit
from sleb.config import HeldoutOptions, LengthOptions, TransferConfig
from sleb.core.errors import InputError
from sleb.core.progress import Progress, Tick, silent
from sleb.core.statistics import Interval, Values, interval
from sleb.models.load import LoadedModel
from sleb.repairs.search import search
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.request import check_options, parse_bytes
from sleb.selection.resources import on_threads
from sleb.selection.sweep import Sweep, block_forwards

__all__ = ["MIX", "Chosen", "Transfer", "check_transfer", "clearly_worse", "transfer"]

MIX = "mix"
HELDOUT, LENGTH = HeldoutOptions().heldout, LengthOptions().length
WORSE = 0.1
"""Part of the other choice's loss increase by which a choice must exceed it to be clearly worse."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The blocks chosen on one domain (or on ``mix``), and what they cost on each domain's
    held-out text: increase of loss, nats/token, paired, in the order of ``Transfer.domains``.
    ``away``: domains on which they cost clearly more than the blocks chosen at home there; see
    :func:`clearly_worse`."""

    source: str
    removed: tuple[int, ...]
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


def check_transfer(options: Mapping[str, Any]) -> None:
    """Find mistakes before a model is loaded, in the options of :func:`transfer` with ``text``.

    Raises:
        InputError: fewer than two texts, or two of one name; a target that plans cannot share; no
            windows to compare on; or as :func:`sleb.search`.
    """
    text, heldout = options.get("text", ()), options.get("heldout", HELDOUT)
    if len(text) < 2:
        raise InputError(
            "sleb transfer compares texts: give two or more, as in --text mail=mail.jsonl "
            "--text code=code.txt"
        )
    names = [parse_source(spec).name for spec in text]
    for i, name in enumerate(names):
        if name == MIX or name in names[:i]:
            why = "means all texts together" if name == MIX else "is the name of two texts"
            raise InputError(f"{text[i]}: '{name}' {why}; give another name, as in NAME=FILE")
    if options.get("curve"):
        raise InputError(
            "--curve measures one plan at many depths, and sleb transfer many plans at one: use "
            "--curve with sleb search"
        )
    if options.get("max_loss_increase") is not None:
        raise InputError(
            "--max-loss-increase would have every plan remove another number of blocks, so their "
            "losses would not compare; give --remove, --speedup or --size"
        )
    if heldout < 2:
        raise InputError(f"--heldout {heldout} is too few to compare on; give at least 2")
    check_options(TransferConfig.of({**options, "text": tuple(text)}))
    check_sources(text)


def transfer(
    model: LoadedModel,
    text: Sequence[str],
    /,
    *,
    windows: int | None = None,
    heldout: int = HELDOUT,
    progress: Progress = silent,
    **options: Any,
) -> Transfer:
    """Search on each text and on all of them, and score every choice on every held-out part.

    Args:
        model: the dense model.
        text: two texts or more; their names are the domains. Weights (``@2``) shape the mix alone.
        windows: of each search, the mix's included. By default up to 32, and as many as the
            shortest text has beside its held-out windows; of a text too short for both, half.
        heldout: windows to set aside of each text. None of them is in any search.
        progress: receives the stages.
        options: those of :func:`sleb.search`; the target must be ``remove``, ``size`` or
            ``speedup``.

    Raises:
        InputError: see :func:`check_transfer`; or a text leaves fewer than two windows to hold out.
        DataError, ResourceError, UnsupportedModel: see ``sleb.core.errors``.
    """
    check_transfer({**options, "text": text, "heldout": heldout})
    cutter = _Cutter(model, options.get("length", LENGTH), options.get("seed", 0), heldout)
    parts = cutter.parts(text, windows)
    aside = [held for split in parts if (held := split.heldout) is not None]
    mix = cutter.cut(text, len(parts[0].search.ids))
    domains = tuple(parse_source(spec).name for spec in text)

    plans = {
        name: search(model, split=split, progress=_Named(progress, name), **options).removed
        for name, split in zip((*domains, MIX), (*parts, mix), strict=True)
    }
    costs = _costs(model, list(plans.values()), aside, progress, options)
    return Transfer(
        domains=domains,
        windows=mix.search.record.windows,
        heldout=tuple(len(held.ids) for held in aside),
        length=mix.search.record.length,
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
    progress: Progress,
    options: Mapping[str, Any],
) -> list[Values]:
    """Increase of loss of each plan on each domain's held-out windows: [plans, windows] per
    domain, nats/token. One sweep does all, so what plans share is computed once."""
    ids = torch.cat([part.ids for part in aside])
    sets = [DENSE, *map(BlockSet, plans)]
    work = len(ids) * (block_forwards(sets, len(model.stack)) + len(set(sets)))
    most = options.get("max_memory")
    most_bytes = None if most is None else parse_bytes(most, "--max-memory")
    sweep = Sweep(model.stack, ids, NLL, batch=options.get("batch"), max_bytes=most_bytes)
    with on_threads(options.get("threads")), progress.stage("comparing", work) as tick:
        sweep.on_work(tick)
        losses = sweep.values(sets, 0, len(ids))
    ends = np.cumsum([len(part.ids) for part in aside])[:-1]
    return np.split(losses[1:] - losses[0], ends, axis=1)


def _overlap(a: Sequence[int], b: Sequence[int]) -> float:
    return len({*a} & {*b}) / len({*a, *b})


@dataclass(frozen=True)
class _Cutter:
    """Cuts texts into windows. A text's windows come in one seeded order, so those of the mix are
    among those of its own search, and never among the held-out ones."""

    model: LoadedModel
    length: int
    seed: int
    heldout: int

    def cut(self, text: Sequence[str], windows: int | None) -> CalibrationSplit:
        """Windows to search on, and held-out ones as far as there are some."""
        return CalibrationSplit.of(
            self.model.tokenizer,
            text,
            windows=windows,
            length=self.length,
            seed=self.seed,
            heldout=self.heldout,
        )

    def parts(self, text: Sequence[str], windows: int | None) -> list[CalibrationSplit]:
        """For each text as many windows to search on, and two or more held-out ones."""
        found = {spec: self.cut([spec], windows) for spec in text}
        if windows is None:
            windows = min(self._share(spec, split) for spec, split in found.items())
            for spec, split in found.items():
                if len(split.search.ids) != windows:
                    found[spec] = self.cut([spec], windows)
        for spec, split in found.items():
            left = 0 if split.heldout is None else len(split.heldout.ids)
            if left < 2:
                raise InputError(
                    f"{spec} leaves {left} windows of {self.length} tokens to hold out, and a "
                    "comparison needs two: give more text, fewer --windows, or a shorter --length"
                )
        return list(found.values())

    def _share(self, spec: str, split: CalibrationSplit) -> int:
        """How many of a text's windows to search on."""
        has = len(split.search.ids) + (0 if split.heldout is None else len(split.heldout.ids))
        if has < 4:
            raise InputError(
                f"{spec} has {has} windows of {self.length} tokens, too few to search on and to "
                "hold out: give more text, or a shorter --length"
            )
        return min(DEFAULT_WINDOWS, max(has // 2, has - self.heldout))


@dataclass(frozen=True)
class _Named:
    """A Progress whose stages say which search they belong to."""

    inner: Progress
    name: str

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        return self.inner.stage(f"{title} ({self.name})", total)
