"""Prefix sharing: which activations sets of removed blocks have in common, and which may run
together.

A set's hidden state before block i is that of its *prefix*, the removed blocks below i.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

__all__ = ["BlockSet", "below", "block_forwards", "groups", "needed", "sharing"]

BlockSet = frozenset[int]
"""Removed blocks."""


def groups(items: Sequence[BlockSet], most: int) -> Iterator[Sequence[BlockSet]]:
    """Cut into groups of a power of two, at most ``most``: few sizes, so few things to prepare."""
    start = 0
    while start < len(items):
        size = 1 << (min(most, len(items) - start).bit_length() - 1)
        yield items[start : start + size]
        start += size


def sharing(
    runs: Collection[BlockSet], users: Sequence[Collection[BlockSet]]
) -> list[list[BlockSet]]:
    """``runs`` by the only one of ``users`` that needs them, those that several need alone, in an
    order of their own."""
    found: dict[tuple[int, ...], list[BlockSet]] = {}
    for p in sorted(runs, key=sorted):
        by = [k for k, those in enumerate(users) if p in those]
        found.setdefault((by[0],) if len(by) == 1 else (-1, *sorted(p)), []).append(p)
    return [found[key] for key in sorted(found)]


def needed(sets: Sequence[BlockSet], n_blocks: int) -> list[set[BlockSet]]:
    """The prefixes before each block, and after the last, that lead to the sets."""
    found = [set(sets)]
    for i in reversed(range(n_blocks)):
        found.append({below(p, i) for p in found[-1]})
    return found[::-1]


def below(blocks: BlockSet, i: int) -> BlockSet:
    """Those before block i."""
    return BlockSet(b for b in blocks if b < i)


def block_forwards(sets: Sequence[BlockSet], n_blocks: int) -> int:
    """Block forwards that one sweep over ``sets`` takes for a window, without running it."""
    return sum(len({below(s, i) for s in sets if i not in s}) for i in range(n_blocks))
