"""The files that let a killed search go on, and who writes them in a job of several ranks."""

from __future__ import annotations

import json
from pathlib import Path

from sleb.core.errors import VerificationFailed
from sleb.core.process_group import group
from sleb.selection.objective import Journal, Replay

__all__ = ["ScoreJournals"]


class ScoreJournals:
    """The journals of a search: the file ``path`` and what stands beside it. When the search is
    done they go, unless ``keep``."""

    def __init__(self, path: str | Path | None, key: str, *, keep: bool) -> None:
        self.path, self.key, self.keep = path, key, keep
        self._open: list[Journal] = []

    def open(self, suffix: str, about: str = "") -> Journal | Replay | None:
        """A journal for one kind of scores, which also depend on what ``about`` says; None if none
        is wanted. It is the first rank's, and the others learn what stands in it."""
        if self.path is None:
            return None
        path = Path(f"{self.path}{suffix}")

        def read() -> str:
            self._open.append(Journal(path, self.key + suffix + about))
            return json.dumps(self._open[-1].lines)

        if not group().several:
            read()
            return self._open[-1]
        lines = group().broadcast_from_main(read)
        return self._open[-1] if group().is_main else Replay(json.loads(lines))

    def __enter__(self) -> None:
        pass

    def __exit__(self, failed: object, *_: object) -> None:
        # that nothing is within a limit is an answer too
        done = failed is None or failed is VerificationFailed
        for book in self._open:
            book.close(done=done and not self.keep)
