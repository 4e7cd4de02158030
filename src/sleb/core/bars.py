"""Progress in a terminal: bars with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from sleb.core.display import QUIET_S, Shown
from sleb.core.printable import printable
from sleb.core.progress import Tick, TimeLeft, spelled


class Bars(Shown):
    """A bar for the stage that runs; lines that stay above it."""

    def __init__(self, console: Console, least: float = QUIET_S) -> None:
        super().__init__(least)
        self.console = console

    def say(self, text: str) -> None:
        """See :class:`sleb.core.display.Shown`."""
        self.console.print(printable(text), markup=False, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        """See :class:`sleb.core.progress.Progress`."""
        # on a narrow terminal the note gives way, not the times
        fixed, rest = Column(min_width=7), Column(ratio=1, no_wrap=True, overflow="ellipsis")
        start = time.monotonic()
        within = bool(self.phase())
        columns = [
            SpinnerColumn(),
            *([_Phase(self)] if within else []),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TaskProgressColumn(table_column=Column(min_width=4)),
            *([] if within else [TimeElapsedColumn(table_column=fixed)]),
            *([_Left(TimeLeft(total, start))] if total else []),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=rest),
        ]
        with Progress(*columns, console=self.console, transient=True, expand=True) as bars:
            task = bars.add_task(printable(title), total=total, note="")
            said = ""

            def tick(n: int = 1, note: str = "") -> None:
                nonlocal said
                said = note
                bars.update(task, advance=n, note=printable(note))

            yield tick
        self.ended(title, time.monotonic() - start, said)


class _Phase(ProgressColumn):
    """Which phase runs, and how long; the rest of the line is about a stage of it."""

    def __init__(self, shown: Shown) -> None:
        super().__init__(Column(no_wrap=True))
        self.shown = shown

    def render(self, task: Task) -> Text:
        """See rich."""
        return Text(self.shown.phase().rstrip())


class _Left(ProgressColumn):
    """The time left, in words."""

    def __init__(self, clock: TimeLeft) -> None:
        super().__init__(Column(min_width=11))
        self.clock = clock

    def render(self, task: Task) -> Text:
        """See rich."""
        left = self.clock.at(int(task.completed), time.monotonic())
        return Text("" if left is None else f"{spelled(left)} left")
