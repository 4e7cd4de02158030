"""Models taking turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.progress import Tick
from sleb.runtimes.worker import Failed, OutOfMemory, Run, Worker

if TYPE_CHECKING:
    from sleb.runtimes.bench import Case

__all__ = ["Entry", "Timed", "interleaved", "work"]

WARM_UP = 1  # rounds; memory is measured in it, as watching costs time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What takes a turn: model number ``model``, whole or ``shortened``."""

    model: int
    worker: Worker
    shortened: bool = False


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A case on one entry: seconds of each round, and bytes at the peak of the warm-up."""

    seconds: tuple[float, ...]
    peak: int


def work(case: Case) -> int:
    """Roughly how long a case takes, in steps of generation, for the progress bar alone."""
    return 1 + case.new_tokens + case.batch * (case.prompt_tokens + case.new_tokens) // 16


def interleaved(
    entries: Sequence[Entry], case: Case, rounds: int, tick: Tick, note: Callable[[str], None]
) -> dict[tuple[int, bool], Timed]:
    """Run ``case`` in rounds, once per entry in each; every other round goes backwards, so that a
    steady drift cancels (A B, B A, ...). Results by (model, shortened).

    A case for which memory ends is left out for all models, and a shortened model that does not
    run is left out alone; ``note`` is told why.
    """
    live, runs = list(entries), dict[tuple[int, bool], list[Run]]()
    for turn in range(WARM_UP + rounds):
        lacking: dict[str, bool] = {}
        for entry in list(live if turn % 2 == 0 else reversed(live)):
            key = (entry.model, entry.shortened)
            try:
                run = entry.worker.run(
                    case, shortened=entry.shortened, watched=turn < WARM_UP and not entry.shortened
                )
            except (OutOfMemory, Failed, InputError, UnsupportedModel) as error:
                if entry.shortened:
                    live.remove(entry)
                    runs.pop(key, None)
                    note(f"what is possible for {case.name}: not measured ({error})")
                elif isinstance(error, OutOfMemory):
                    lacking[entry.worker.name] = True
                else:
                    raise
            else:
                if not entry.shortened:
                    lacking.setdefault(entry.worker.name, False)
                runs.setdefault(key, []).append(run)
            tick(work(case), f"{case.name}, {entry.worker.name}")
        if any(lacking.values()):
            note(_without_memory(case, lacking))
            tick(work(case) * len(live) * (WARM_UP + rounds - turn - 1))
            return {}
    return {
        key: Timed(
            seconds=tuple(run.seconds for run in found[WARM_UP:]),
            peak=max(run.peak for run in found[:WARM_UP]),
        )
        for key, found in runs.items()
    }


def _without_memory(case: Case, lacking: dict[str, bool]) -> str:
    out = [name for name, failed in lacking.items() if failed]
    fits = [name for name, failed in lacking.items() if not failed]
    also = f", though {', '.join(fits)} had enough" if fits else ""
    return f"{case.name}: out of memory with {', '.join(out)}{also}"
