"""Which display of progress there is."""

from __future__ import annotations

import sys

from sleb.core import display
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent


def shown(progress: Progress | bool | None) -> Progress:
    """A progress as a program may give it: True for bars, or lines where there is no terminal."""
    return terminal_progress() if progress is True else progress or silent


def terminal_progress(*, quiet: bool = False, verbose: bool = False) -> Progress:
    """The progress display that fits stderr; none but on the first of several processes. ``quiet``:
    none at all; ``verbose``: a line for short stages, too."""
    if quiet or not group().is_main:
        return silent
    least = 0.0 if verbose else display.QUIET_S
    if not sys.stderr.isatty():
        return display.Lines(least)
    from rich.console import Console

    from sleb.core.bars import Bars

    return Bars(Console(stderr=True), least)
