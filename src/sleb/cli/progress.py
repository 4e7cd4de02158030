"""Progress on stderr: bars with time left in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from sleb.core.printable import printable
from sleb.core.process_group import group
from sleb.core.progress import Progress as ProgressProtocol
from sleb.core.progress import Tick, silent

QUIET_S = 2.0
LINE_EVERY_S = 15.0


def terminal_progress(*, quiet: bool = False, verbose: bool = False) -> ProgressProtocol:
    """The progress display that fits stderr; none but on the first of several processes."""
    if not group().is_main:
        return silent
    return _Bars(Console(stderr=True)) if sys.stderr.isatty() else _Lines()


class _Bars:
    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        # on a narrow terminal the note gives way, not the times
        fixed, rest = Column(min_width=7), Column(ratio=1, no_wrap=True, overflow="ellipsis")
        left = TextColumn("left", table_column=Column(min_width=4))
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TaskProgressColumn(table_column=Column(min_width=4)),
            TimeElapsedColumn(table_column=fixed),
            *([TimeRemainingColumn(table_column=fixed), left] if total else []),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=rest),
        ]
        with Progress(*columns, console=self.console, transient=True, expand=True) as bars:
            task = bars.add_task(printable(title), total=total, note="")

            def tick(n: int = 1, note: str = "") -> None:
                bars.update(task, advance=n, note=printable(note))

            yield tick


class _Lines:
    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        start = last = time.monotonic()
        done = 0

        def tick(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= LINE_EVERY_S:
                last = now
                print(_line(title, done, total, now - start, note), file=sys.stderr, flush=True)  # noqa: T201

        yield tick
        spent = time.monotonic() - start
        if spent >= QUIET_S:
            print(printable(f"{title}: done in {spent:.0f} s"), file=sys.stderr, flush=True)  # noqa: T201


def _line(title: str, done: int, total: int | None, spent: float, note: str) -> str:
    share, left = "", ""
    if total and done:
        share = f"{min(99, 100 * done // total)} %, "
        left = f", about {max(0.0, spent * (total - done) / done):.0f} s left"
    return printable(f"{title}: {share}{spent:.0f} s gone{left}{'; ' + note if note else ''}")
