"""Scores on disk, so that a killed search goes on where it was."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sleb.core.errors import VerificationFailed
from sleb.core.files import disk_errors
from sleb.core.process_group import group
from sleb.core.statistics import Values
from sleb.selection.prefixes import BlockSet

__all__ = ["CachedScores", "ScoreCache"]

logger = logging.getLogger(__name__)


class ScoreCache:
    """One file for all scores of a search: a JSON line per call, which names the kind of score.

    ``key`` identifies all that the scores of every kind depend on; a file with another key, or with
    a damaged header, is started anew. A line cut short by a crash is dropped. In a job of several
    ranks the file is the first one's, and the others learn what stands in it.

    Used as a context, at whose end the file goes if the search is done, since the plan then holds
    the result, or if nothing was scored; unless ``keep``. Without a path nothing is kept.
    """

    def __init__(self, path: str | Path | None, key: str, *, keep: bool = False) -> None:
        self.path, self.keep = None if path is None else Path(path), keep
        self._header = {"journal": 2, "key": key}
        self._stream: IO[str] | None = None
        self._lines: list[dict[str, Any]] = []

    def __enter__(self) -> ScoreCache:
        if self.path is not None:
            self._lines = json.loads(group().broadcast_from_main(self._open))
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._stream is None or self.path is None:
            return
        self._stream.close()
        done = failed is None or failed is VerificationFailed  # that no depth is within a limit is
        if not self._lines or (done and not self.keep):  # an answer too
            self.path.unlink(missing_ok=True)

    def of(self, kind: str) -> CachedScores:
        """The scores of one kind; ``kind`` says what else they depend on."""
        return CachedScores(self, kind)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """What is known of one kind."""
        return [line for line in self._lines if line["kind"] == kind]

    def append(self, line: dict[str, Any]) -> None:
        """Keep a line durably, if this process is the one that writes."""
        if self._stream is not None:
            self._lines.append(line)
            self._write(line)

    def _open(self) -> str:
        assert self.path is not None
        self._lines = self._read(self.path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # rewrite what was understood, so that a torn last line never precedes a new one
            self._stream = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 (see __exit__)
            for line in (self._header, *self._lines):
                self._write(line)
        return json.dumps(self._lines)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        lines = []
        try:
            for raw in path.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(raw))
        except FileNotFoundError:
            return []
        except ValueError:  # not JSON, or not UTF-8
            logger.info("%s ends in a torn line, which is dropped", path)
        return lines[1:] if lines and lines[0] == self._header else []

    def _write(self, line: dict[str, Any]) -> None:
        assert self._stream is not None
        assert self.path is not None
        with disk_errors(self.path):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())


@dataclass(frozen=True)
class CachedScores:
    """Those of one kind in a :class:`ScoreCache`."""

    cache: ScoreCache
    kind: str

    def replay(self) -> list[tuple[list[BlockSet], int, Values]]:
        """Everything scored before: sets, first window, values [sets, windows]."""
        return [
            (
                [BlockSet(s) for s in line["sets"]],
                line["start"],
                np.array(line["values"], dtype=np.float64),
            )
            for line in self.cache.lines(self.kind)
        ]

    def append(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        """Keep the scores of ``sets`` on the windows from ``start``."""
        scored = {"sets": [sorted(s) for s in sets], "start": start, "values": values.tolist()}
        self.cache.append({"kind": self.kind, **scored})
