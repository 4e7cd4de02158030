"""How the library reports progress without printing: it calls an object that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from sleb.core.files import shown_size
from sleb.core.printable import paragraphs

Tick = Callable[..., None]
"""``tick(n=1, note="")``: n more units are done; ``note`` is shown beside the bar."""

SMOOTH_S, SMOOTH_PART = 30.0, 8
"""Time over which a new speed takes the place of an old one in the time left, and at most one part
in so many of what has gone by."""
EARLY_S, EARLY_PART = 30.0, 100
"""Before so many seconds, less than one part in so many says nothing of the rest."""
FIRST_S, FIRST_PART = 2.0, 8
"""Nor do the first units where they are less than one part in so many, until so many seconds
behind them."""


def spelled(seconds: float) -> str:
    """A duration as one says it."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a long run, and about how many seconds it takes."""

    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take: its phases in order, bytes of memory and of disk at most, on which
    device. ``shorter``: options that would take less time, where it takes hours on a CPU.
    ``unknown``: what comes as well, and is not estimated. ``resumed``: scores of an earlier run are
    there, and are not counted off."""

    phases: tuple[Phase, ...]
    memory: int
    disk: int
    device: str
    shorter: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    resumed: bool = False

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def lines(self) -> list[str]:
        """In a few sentences."""
        phases = ", ".join(f"{phase.name} {spelled(phase.seconds)}" for phase in self.phases)
        disk = f", {shown_size(self.disk)} on disk" if self.disk else ""
        less = ", or less, as scores of an earlier run are known" if self.resumed else ""
        lines = [f"about {spelled(self.seconds)} on {self.device}{less}: {phases}"]
        if self.memory:
            lines.append(f"about {self.memory / 1e9:.2g} GB of memory{disk}")
        if self.unknown:
            lines.append(f"not estimated: {', '.join(self.unknown)}")
        if self.shorter:
            ways = "; ".join(self.shorter)
            lines.append(f"that is long for a CPU; it would be shorter with {ways}")
        return lines

    def __str__(self) -> str:
        return paragraphs(self.lines)


@dataclass(frozen=True)
class Begins:
    """A phase of the estimate begins."""

    name: str


class Progress(Protocol):
    """Receives stages of work. The command line draws them; the default draws nothing.

    One that has ``tell(what)`` as well hears what :func:`tell` says.
    """

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        """Open a stage of ``total`` units (None: unknown) and return its tick function."""
        ...


def tell(progress: Progress, what: Estimate | Begins | str) -> None:
    """Say what a run will take, which phase of that begins, or a sentence, to a progress that
    listens."""
    listener = getattr(progress, "tell", None)
    if listener is not None:
        listener(what)


class TimeLeft:
    """Seconds left of ``total`` units, steady: a new speed counts as much as time went by since.
    ``start``: the moment when it began. Speed is that behind the first units, which may be a
    hundred times as slow as all others."""

    def __init__(self, total: int, start: float) -> None:
        self.total, self.start = total, start
        self._left: float | None = None
        self._first: tuple[int, float] | None = None
        self._at = start

    def at(self, done: int, now: float) -> float | None:
        """Seconds that are left where ``done`` units are done; None where too few are, and where
        work goes on behind the last."""
        if not 0 < done < self.total:
            return None
        self._first = self._first or (done, now)
        if now - self.start < EARLY_S and done * EARLY_PART < self.total:
            return None
        known, since = self._first
        if self._left is None and known * FIRST_PART < self.total and now < since + FIRST_S:
            return None
        if done == known:
            known, since = 0, self.start
        fresh = (now - since) * (self.total - done) / (done - known)
        if self._left is None:
            self._left = fresh
        else:
            gone = now - self._at
            due = max(0.0, self._left - gone)
            over = min(SMOOTH_S, (now - self.start) / SMOOTH_PART)
            self._left = due + (1 - math.exp(-gone / over)) * (fresh - due)
        self._at = now
        return self._left


class _Silent:
    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        yield lambda n=1, note="": None

    def __repr__(self) -> str:  # as a default in signatures
        return "silent"


silent: Progress = _Silent()
