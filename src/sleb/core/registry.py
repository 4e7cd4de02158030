"""Named components: metrics, strategies, similarity measures, text sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sleb.core.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to component, filled by decorators at import.

    An unknown name is an :class:`~sleb.core.errors.InputError` that lists what exists; registering
    a name twice is a programming error.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: add the decorated object under ``name``."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise InputError(
                f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)}; "
                f"known: {', '.join(sorted(self._entries))}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
