"""How the library reports progress without printing: it calls an object that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

Tick = Callable[..., None]
"""``tick(n=1, note="")``: n more units are done; ``note`` is shown beside the bar."""

SMOOTH_S = 30.0
"""Time over which a new speed takes the place of an old one in the time left."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a long run, and about how many seconds it takes."""

    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take: its phases in order, bytes of memory and of disk at most, on which
    device. ``shorter``: options that would take less time, where it takes hours on a CPU.
    ``unknown``: what comes as well, and is not estimated."""

    phases: tuple[Phase, ...]
    memory: int
    disk: int
    device: str
    shorter: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)


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
    """Seconds left of ``total`` units, steady: a new speed counts as much as time went by since,
    over half a minute. ``start``: the moment when it began."""

    def __init__(self, total: int, start: float) -> None:
        self.total, self.start = total, start
        self._left: float | None = None
        self._at = start

    def at(self, done: int, now: float) -> float | None:
        """Seconds that are left where ``done`` units are done; None before the first, and
        where work goes on behind the last."""
        if not 0 < done < self.total:
            return None
        fresh = (now - self.start) * (self.total - done) / done
        if self._left is None:
            self._left = fresh
        else:
            gone = now - self._at
            due = max(0.0, self._left - gone)
            self._left = due + (1 - math.exp(-gone / SMOOTH_S)) * (fresh - due)
        self._at = now
        return self._left


class _Silent:
    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        yield lambda n=1, note="": None


silent: Progress = _Silent()
