"""The narrow waist of the search: a set of removed blocks -> a score per calibration window.

Strategies see only this, so they are tested with toy functions and no torch. Memoization, the cache
of scores that survives an interruption, and progress live here once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sleb.core.errors import VerificationFailed, changes
from sleb.core.files import disk_errors, write_text
from sleb.core.plan import Saving
from sleb.core.process_group import group
from sleb.core.progress import Progress, Tick, silent, tell
from sleb.core.statistics import Values
from sleb.selection.racing import Race, leaders

logger = logging.getLogger(__name__)

BlockSet = frozenset[int]
"""Removed blocks."""
DENSE = BlockSet()
SHORTLIST = 8
ScoreFunction = Callable[[Sequence[BlockSet], int, int], Values]
Call = tuple[Sequence[BlockSet], int, int]
"""Sets, and the range of windows to score them on."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How sets are scored, and what that costs.

    ``values(sets, start, stop)`` gives float64 [len(sets), stop - start], lower is better; it is
    called on at most ``step(len(sets))`` windows at a time, by default all. Fewer windows at once
    than ``fill(len(sets))`` take as long. ``distribute`` is handed all calls of a step and gives
    each with its scores; by default they are made one after the other. ``work(sets)`` is what a
    window of all of them takes, in the units that a function given to ``on_work`` hears of.
    ``note`` completes what progress says.
    """

    values: ScoreFunction
    step: Callable[[int], int] | None = None
    fill: Callable[[int], int] | None = None
    distribute: Callable[[Sequence[Call]], Iterable[tuple[Call, Values]]] | None = None
    work: Callable[[Sequence[BlockSet]], int] = len
    on_work: Callable[[Callable[[int], None]], None] = lambda tick: None
    note: Callable[[str], str] = str

    def calls(self, calls: Sequence[Call]) -> Iterable[tuple[Call, Values]]:
        """Each call with its scores."""
        if self.distribute:
            return self.distribute(calls)
        return ((call, self.values(*call)) for call in calls)


class Objective:
    """Scores block sets on ``n_windows`` windows, computing nothing twice.

    ``scorer`` does it; a function stands for one without further abilities. Each result is in
    ``cache``, under ``kind``, before it is used. Every round of scoring is a stage of ``progress``
    with this ``title``. ``enough(order)`` tells a strategy that a target is reached by removing
    ``order``. ``final`` scores sets by what is wanted in the end, where that is too dear for every
    candidate; by default it is the objective itself. ``leaders`` puts sets in order by their scores
    [sets, windows], by default by the mean; ``kinds`` names windows of one kind. ``others`` score
    by something else, by its name, and may suggest other sets for the final comparison. ``saving``:
    what units are weighed by, if they are.
    """

    def __init__(
        self,
        scorer: Scorer | ScoreFunction,
        n_windows: int,
        *,
        cache: ScoreCache | None = None,
        kind: str = "",
        progress: Progress = silent,
        title: str = "searching",
        enough: Callable[[Sequence[int]], bool] = lambda order: False,
        exact: bool = True,
    ) -> None:
        self.scorer = scorer if isinstance(scorer, Scorer) else Scorer(values=scorer)
        self.n_windows = n_windows
        self.final: Objective = self
        self.others: dict[str, Objective] = {}
        self.leaders: Callable[[Values], list[int]] = leaders
        self.kinds: dict[str, list[int]] = {}
        self.exact, self.enough = exact, enough
        self.saving: Saving | None = None
        self._cache, self._kind, self._progress, self._title = cache, kind, progress, title
        self._known: dict[BlockSet, Values] = {}
        for sets, start, values in cache.replay(kind) if cache else ():
            self._learn(sets, start, values)

    def scores(self, sets: Sequence[BlockSet], note: str = "") -> Values:
        """Score per set and window, float64 [len(sets), n_windows]. ``note`` goes to progress."""
        with self._round(sets, note):
            return self._prefix(sets, self.n_windows)

    def best(
        self,
        sets: Sequence[BlockSet],
        k: int = 1,
        note: str = "",
        guides: Sequence[BlockSet] = (),
        saved: Sequence[float] = (),
        above: BlockSet = DENSE,
    ) -> Values:
        """Like :meth:`scores`, for a caller who needs only the ``k`` lowest means. With ``saved``,
        scores are how much each set is above another, for each of what it saves.

        Unless ``exact``, sets race: those that are clearly worse are given up early, and have NaN
        for the windows that they did not see. At least k sets stay to the end and have no NaN,
        but for a winner who is alone before that. ``guides`` names, per set, a similar one that may
        have been scored before. See ``racing``.

        The dense model is scored along, since every strategy asks for it in the end, and beside
        sets of few blocks it costs next to nothing.
        """
        every = [*sets, above]
        shares = np.array(saved or [1.0] * len(sets))[:, None]

        def weighed(known: Values, live: Sequence[int]) -> Values:
            return (known[:-1] - known[-1]) / shares[live] if saved else known[:-1]

        if self.exact:
            return weighed(self.scores(every, note), range(len(sets)))
        guide = np.stack([self._of(s) for s in guides]) if guides and not saved else None
        race = Race(len(sets), self.n_windows, k, guide)
        values = np.full((len(sets), self.n_windows), np.nan)
        so_far = ""
        with self._round(every, note) as stage:
            for windows in race.looks(self.scorer.fill):
                stage.say(note + so_far)
                live = [*(sets[i] for i in race.live), above]
                known = weighed(self._prefix(live, windows), race.live)
                values[race.live, :windows] = known
                leader, mean = race.live[int(known.mean(1).argmin())], float(known.mean(1).min())
                race.update(known)
                stage.remaining([*(sets[i] for i in race.live), above], self.n_windows - windows)
                own = ", ".join(map(str, sorted(sets[leader] - BlockSet.intersection(*sets))))
                so_far = f", {len(race.live)} left, best so far {own} at {mean:.4f}"
            stage.remaining([], 0)
        return values

    @contextmanager
    def _round(self, sets: Sequence[BlockSet], note: str) -> Iterator[_Round]:
        """A stage of progress in which ``sets`` are scored on all windows."""
        total = self.n_windows * self.scorer.work(list(dict.fromkeys(sets)))
        known = all(np.isfinite(self._of(s)).all() for s in sets)
        with (silent if known else self._progress).stage(self._title, total) as tick:
            stage = _Round(tick, self.scorer, total)
            stage.say(note)
            self.scorer.on_work(stage.work)
            yield stage

    def _prefix(self, sets: Sequence[BlockSet], windows: int) -> Values:
        """Scores on the first ``windows`` windows, float64 [len(sets), windows]."""
        step = self.scorer.step(len(sets)) if self.scorer.step else self.n_windows
        calls: list[Call] = []
        for start in range(0, windows, step):
            stop = min(start + step, windows)
            unknown = [s for s in dict.fromkeys(sets) if np.isnan(self._of(s)[start:stop]).any()]
            if unknown:
                # a range may be known in part; then all of it is known up to the same window
                first = start + min(
                    int(np.isfinite(self._of(s)[start:stop]).sum()) for s in unknown
                )
                calls.append((unknown, first, stop))
        for (scored, first, _), values in self.scorer.calls(calls):
            if self._cache:
                self._cache.append(self._kind, scored, first, values)
            self._learn(scored, first, values)
        return np.stack([self._of(s)[:windows] for s in sets])

    def _of(self, blocks: BlockSet) -> Values:
        return self._known.setdefault(blocks, np.full(self.n_windows, np.nan))

    def _learn(self, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        for blocks, row in zip(sets, values, strict=True):
            self._of(blocks)[start : start + len(row)] = row


class ShortlistObjective(Objective):
    """For scores that are too dear for every candidate: ranks by ``plain``, and scores the best
    ``SHORTLIST`` of a round anew; the rest have NaN everywhere."""

    def __init__(self, plain: Objective, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plain = plain

    def best(
        self,
        sets: Sequence[BlockSet],
        k: int = 1,
        note: str = "",
        guides: Sequence[BlockSet] = (),
        saved: Sequence[float] = (),
        above: BlockSet = DENSE,
    ) -> Values:
        """See :meth:`Objective.best`."""
        assert not saved  # refused with the options
        few = min(len(sets), max(k, SHORTLIST))
        plain = self.plain.best(sets, k=few, note=f"{note}, by plain loss", guides=guides)
        means = np.where(np.isfinite(plain).all(1), plain.mean(1), np.inf)
        chosen = np.argsort(means, kind="stable")[:few]
        values = np.full(plain.shape, np.nan)
        values[chosen] = self.scores([sets[i] for i in chosen], f"{note}, {few} of them repaired")
        return values


class _Round:
    """Moves the bar of one round of ``total`` work, of which a race leaves out a part."""

    def __init__(self, tick: Tick, scorer: Scorer, total: int) -> None:
        self._tick, self._scorer, self._total = tick, scorer, total
        self._done, self._note = 0, ""

    def say(self, note: str) -> None:
        self._note = self._scorer.note(note)
        self._tick(0, note=self._note)

    def work(self, n: int) -> None:
        n = min(n, self._total - self._done)
        self._done += n
        self._tick(n, note=self._note)

    def remaining(self, sets: Sequence[BlockSet], windows: int) -> None:
        """Only ``sets`` are left to be scored, on so many windows."""
        self.work(max(0, self._total - windows * self._scorer.work(sets) - self._done))


class ScoreCache:
    """One file for all scores of a search: a JSON line per call, which names the kind of score.

    ``settings``: all that the scores of every kind depend on, by name. A file of other settings is
    set aside under a name of its own, from which a search with those goes on; one with a damaged
    header is started anew. A line cut short by a crash is dropped. In a job of several ranks the
    file is the first one's, and the others learn what stands in it.

    Used as a context, at whose end the file goes if the search is done, since the plan then holds
    the result, or if nothing was scored; unless ``keep``. Without a path nothing is kept.
    """

    def __init__(
        self, path: str | Path | None, settings: Mapping[str, Any], *, keep: bool = False
    ) -> None:
        self.path, self.keep = None if path is None else Path(path), keep
        known = json.dumps(settings, sort_keys=True)
        key = hashlib.sha256(known.encode()).hexdigest()
        self._header = {"journal": 2, "key": key, "settings": json.loads(known)}
        self._stream: IO[str] | None = None
        self._lines: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def __enter__(self) -> ScoreCache:
        if self.path is not None:
            self._lines, self._notes = json.loads(group().broadcast_from_main(self._open))
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._stream is None or self.path is None:
            return
        self._stream.close()
        done = failed is None or failed is VerificationFailed  # that no depth is within a limit is
        if not self._lines or (done and not self.keep):  # an answer too
            self.path.unlink(missing_ok=True)

    def tell(self, progress: Progress) -> None:
        """Say what was there from before."""
        for note in self._notes:
            tell(progress, note)

    def replay(self, kind: str) -> list[tuple[list[BlockSet], int, Values]]:
        """All scores of a kind so far: sets, first window, values [sets, windows]. ``kind`` says
        what else they depend on."""
        return [
            ([*map(BlockSet, line["sets"])], line["start"], np.array(line["values"]))
            for line in self._lines
            if line["kind"] == kind
        ]

    def append(self, kind: str, sets: Sequence[BlockSet], start: int, values: Values) -> None:
        """Keep the scores of ``sets`` on the windows from ``start``, if this process is the one
        that writes."""
        if self._stream is None or self.path is None:
            return
        line = {"kind": kind, "sets": [*map(sorted, sets)], "start": start}
        line["values"] = values.tolist()
        self._lines.append(line)
        with disk_errors(self.path):
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def _open(self) -> str:
        """The lines that are there from before and what there is to say of them, as JSON."""
        assert self.path is not None
        key, notes = self._header["key"], list[str]()
        header, lines = _read(self.path)
        if header and header["key"] != key:
            notes = self._set_aside(header, lines)
            header = {}
        if not header:
            header, lines = _read(_aside(self.path, key))
        if lines:
            notes.append(f"going on from {self.path}, which has {_scores(lines)} scores of before")
        with disk_errors(self.path):
            # rewrite what was understood, so that a torn last line never precedes a new one
            text = "".join(json.dumps(line) + "\n" for line in (self._header, *lines))
            write_text(self.path, text)
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (see __exit__)
            _aside(self.path, key).unlink(missing_ok=True)
        return json.dumps([lines, notes])

    def _set_aside(self, header: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
        """Rename the file, which is of other settings; what there is to say of it."""
        assert self.path is not None
        if not lines:
            return []
        place = _aside(self.path, header["key"])
        with disk_errors(self.path):
            os.replace(self.path, place)
        differ = changes(self._header["settings"], header.get("settings", {}))
        return [
            f"{self.path} has {_scores(lines)} scores of other settings ({'; '.join(differ)}): "
            f"kept as {place}, where a search with those finds them"
        ]


def _aside(path: Path, key: str) -> Path:
    """Where a journal with this key waits until its settings are asked for again."""
    return path.with_name(f"{path.stem}.{key[:8]}{path.suffix}")


def _scores(lines: list[dict[str, Any]]) -> int:
    return sum(len(line["sets"]) for line in lines)


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and lines of a journal; both empty where there is none."""
    lines = []
    try:
        for raw in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(raw))
    except FileNotFoundError:
        return {}, []
    except ValueError:  # not JSON, or not UTF-8
        logger.info("%s ends in a torn line, which is dropped", path)
    match lines:
        case [{"journal": 2, "key": str(key)} as header, *rest] if key.isalnum():
            return header, rest
    return {}, []
