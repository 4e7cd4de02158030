"""How the library reports progress without printing: it calls an object that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tick = Callable[..., None]
"""``tick(n=1, note="")``: n more units are done; ``note`` is shown beside the bar."""


class Progress(Protocol):
    """Receives stages of work. The command line draws them; the default draws nothing."""

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        """Open a stage of ``total`` units (None: unknown) and return its tick function."""
        ...


class _Silent:
    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Tick]:
        yield lambda n=1, note="": None


silent: Progress = _Silent()
