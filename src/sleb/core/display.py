"""Progress on stderr where there is no terminal: a line now and then; and what bars say as well."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sleb.core.printable import printable
from sleb.core.progress import Begins, Estimate, Tick, TimeLeft, spelled

QUIET_S = 2.0
LONG_S = 10.0
BRIEF_S = 20.0
"""Of a run that will take less nothing is said in advance."""
LINE_EVERY_S = 15.0
MISJUDGED = 4.0
"""By what phases that ended correct the estimate of those to come, at most: each is counted in work
of its own, and on a machine that is busy for a moment all are timed too slow. One that took less
than that was not done: what it makes was known from before."""


def since(began: float | None) -> float:
    """Seconds since then; for None since this process began, its imports among them."""
    import psutil

    return time.time() - (began or float(psutil.Process().create_time()))


class Shown:
    """What both displays have: lines that stay, for what will come, and for phases that began or
    ended. A stage that took ``least`` seconds is worth one."""

    def __init__(self, least: float = QUIET_S) -> None:
        self.least = least
        self._expected: dict[str, float] = {}
        self._phase, self._since = "", 0.0
        self._took: dict[str, float] = {}

    def say(self, text: str) -> None:
        """A line that stays."""
        raise NotImplementedError

    def tell(self, what: Estimate | Begins | str) -> None:
        """See :func:`sleb.core.progress.tell`."""
        if isinstance(what, Estimate):
            if what.seconds < BRIEF_S and self.least:
                return
            self._expected = {phase.name: phase.seconds for phase in what.phases}
            self._took.clear()
            for line in what.lines:
                self.say(line)
        elif isinstance(what, Begins):
            self.finish()
            if what.name in self._expected:
                self._phase, self._since = what.name, time.monotonic()
                later = self._corrected * sum([*self._expected.values()][self._number :])
                rest = f", and {spelled(later)} after it" if later else ""
                takes = spelled(self._corrected * self._expected[what.name])
                self.say(f"{self._prefix}{what.name}: about {takes}{rest}")
        else:
            self.say(what)

    def finish(self) -> None:
        """The phase has ended."""
        if self._phase:
            spent = time.monotonic() - self._since
            self.say(f"{self._prefix}{self._phase}: done in {spelled(spent)}")
            if MISJUDGED * spent >= self._expected[self._phase]:
                self._took[self._phase] = spent
        self._phase = ""

    @property
    def _corrected(self) -> float:
        """How much longer phases take than was estimated, by those that ended."""
        expected = sum(self._expected[name] for name in self._took)
        if not expected:
            return 1.0
        return min(MISJUDGED, sum(self._took.values()) / expected)

    @property
    def _number(self) -> int:
        return [*self._expected].index(self._phase) + 1 if self._phase else 0

    @property
    def _prefix(self) -> str:
        return f"{self._number} of {len(self._expected)}: " if self._number else ""

    def phase(self) -> str:
        """What a line on a stage begins with: the phase under way, how long it has run and of how
        long; empty where there is none."""
        if not self._phase:
            return ""
        spent = time.monotonic() - self._since
        expected = self._corrected * self._expected[self._phase]
        of = f"of {spelled(expected)}" if spent < expected else "gone"
        return f"{self._prefix}{self._phase}, {spelled(spent)} {of}; "

    def ended(self, title: str, spent: float, note: str = "") -> None:
        """A stage has ended, of which ``note`` was the last; of a phase only the whole is worth a
        line."""
        if spent >= self.least and not (self._phase and self.least):
            last = f" {note};" if note else ""
            self.say(f"{title}:{last} done in {spelled(spent)}")


class Lines(Shown):
    """A plain line now and then."""

    _line_at = 0.0
    """When the last was said; 0 before the first stage."""

    def say(self, text: str) -> None:
        """See :class:`Shown`."""
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        """See :class:`sleb.core.progress.Progress`."""
        start = time.monotonic()
        clock = TimeLeft(total, start) if total else None
        self._line_at = self._line_at or start
        done, said = 0, ""

        def tick(n: int = 1, note: str = "") -> None:
            nonlocal done, said
            done += n
            said = note

        def line() -> None:
            self._line_at = now = time.monotonic()
            left = clock.at(done, now) if clock else None
            share = f"{min(99, 100 * done // clock.total)} %, " if clock and done else ""
            about = "" if left is None else f", about {spelled(left)} left"
            more = f"; {said}" if said else ""
            spent = f"{share}{spelled(now - start)} gone{about}{more}"
            self.say(f"{self.phase()}{title}: {spent}")

        with _heartbeat(line, lambda: self._line_at):
            yield tick
        self.ended(title, time.monotonic() - start, said)


@contextmanager
def _heartbeat(line: Callable[[], None], last: Callable[[], float]) -> Iterator[None]:
    """Call ``line`` so long after the ``last`` time, also while nothing ticks, and where short
    stages follow one another."""
    over = threading.Event()

    def beat() -> None:
        least = LINE_EVERY_S / 3
        while not over.wait(max(least, last() + LINE_EVERY_S - time.monotonic())):
            line()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
