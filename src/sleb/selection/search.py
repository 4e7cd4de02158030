"""Search: which blocks can go. Ties the parts together; the parts are in their own modules."""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sleb.checkpoint import Checkpoint, fingerprint
from sleb.depthfields import reindex
from sleb.errors import InputError, UnsupportedModel
from sleb.metrics import METRICS
from sleb.models.load import LoadedModel, load, load_config
from sleb.models.source import resolve
from sleb.models.stack import decoder_config
from sleb.plan import (
    Baseline,
    Calibration,
    Fingerprint,
    Plan,
    SimilarityGate,
    blocks_to_remove,
    parse_blocks,
)
from sleb.progress import Progress, silent
from sleb.selection.objective import BlockSet, Journal, Objective
from sleb.selection.racing import rank
from sleb.selection.strategies import STRATEGIES, Found, Strategy
from sleb.selection.sweep import Sweep, block_forwards
from sleb.similarity import Similarity, measure_similarity
from sleb.text import Windows, check_sources, load_windows

__all__ = ["DEFAULT_LENGTH", "DEFAULT_PROTECT", "search"]

DEFAULT_LENGTH = 256
DEFAULT_PROTECT = "0,-1"


def search(
    model: LoadedModel | str | Path,
    *,
    remove: int | str,
    metric: str = "loss",
    strategy: str | None = None,
    exact: bool = True,
    text: Sequence[str] = (),
    windows: Windows | int | None = None,
    length: int = DEFAULT_LENGTH,
    protect: str = DEFAULT_PROTECT,
    min_similarity: float | str | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    batch: int | None = None,
    trust_remote_code: bool = False,
    journal: str | Path | None = None,
    keep_journal: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Find the blocks whose removal costs least, and return the plan.

    Args:
        model: a loaded model, or anything that :func:`sleb.load` takes.
        remove: number of blocks, or a percentage such as ``"20%"`` (rounded up).
        metric: ``loss`` (SLEB's: re-scored after each removal), ``one-shot-loss``, ``cosine`` or
            ``kl``; see ``sleb.metrics``.
        strategy: ``greedy``, ``one-shot``, ``window``, ``beam`` or ``refine``; by default the
            metric's own. See ``sleb.selection.strategies``.
        exact: score every candidate on every window, as published. False lets candidates race:
            one that is clearly worse on part of the windows is not scored on the rest.
        text: calibration texts; none is the embedded default. See ``sleb.text``.
        windows: number of windows, or windows that were loaded before.
        length: tokens per window.
        protect: blocks that stay, ``"0,-1"`` by default as in the paper.
        min_similarity: only blocks whose output is at least this similar (cosine) to their input
            are candidates; ``auto`` picks the threshold (see :meth:`Similarity.auto_threshold`).
        seed: choice of windows. The result is a function of the inputs and the seed.
        batch: windows per forward pass; by default chosen for the device.
        journal: file that keeps finished scores, so that the same call resumes after a crash.
        keep_journal: leave it when the search is done, for a caller who is not done.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.errors``.
    """
    chosen = METRICS[metric]
    method = STRATEGIES[strategy or chosen.strategy]
    if chosen.token is None and strategy not in (None, chosen.strategy):
        raise InputError(f"--metric {metric} ranks all blocks at once: it has no --strategy")
    if not isinstance(model, LoadedModel):
        check_request(
            model,
            remove=remove,
            protect=protect,
            text=text,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        model = load(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    n_blocks = len(model.stack)
    n, protected = _request(remove, protect, n_blocks)
    candidates = [b for b in range(n_blocks) if b not in protected]
    _some_cut_is_exact(model.stack.model.config, candidates)
    if not isinstance(windows, Windows):
        windows, _ = load_windows(model.tokenizer, text, windows=windows, length=length, seed=seed)

    checkpoint = Checkpoint.open(model.source.path)
    with progress.stage("hashing the model", checkpoint.nbytes) as tick:
        identity = fingerprint(checkpoint, n_blocks, tick)

    similarity, gate = None, None
    if min_similarity is not None or chosen.token is None:
        similarity = measure_similarity(
            model, windows, measure="cosine", batch=batch, progress=progress
        )
    if similarity is not None and min_similarity is not None:
        candidates, gate = _above(similarity, candidates, min_similarity, n)

    if chosen.token is None:
        assert similarity is not None
        only = rank(candidates, 1 - similarity.per_window[:, candidates].T, n)
        found = Found(order=only.removed, rounds=(only,), dense=np.zeros(0))
    else:
        key = _key(identity, windows.record, metric, model.dtype, exact)
        book = Journal(Path(journal), key) if journal else None
        done = False
        try:
            ids = windows.ids if exact else windows.ids[_shuffled(windows, seed)]
            sweep = Sweep(model.stack, ids, chosen.token, batch=batch)
            found = _run(sweep, method, candidates, n, book, progress, exact)
            done = not keep_journal
        finally:
            if book:
                book.close(done=done)
    return Plan(
        model=identity,
        removed=tuple(sorted(found.order)),
        order=found.order,
        protected=tuple(sorted(protected)),
        metric=metric,
        unit=chosen.unit,
        strategy=(strategy or chosen.strategy) + ("" if exact else ", racing"),
        dtype=model.dtype,
        baseline=_baseline(found),
        rounds=found.rounds,
        similarity=gate,
        calibration=windows.record,
        versions=versions(),
    )


def check_request(
    model: str | Path,
    *,
    remove: int | str,
    protect: str,
    text: Sequence[str],
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Find mistakes in a search's options before weights are loaded, from the config alone.

    Raises:
        InputError, UnsupportedModel: as :func:`search`.
    """
    check_sources(text)
    config = load_config(resolve(model, progress).path, trust_remote_code=trust_remote_code)
    blocks = getattr(decoder_config(config), "num_hidden_layers", None)
    if isinstance(blocks, int):  # else loading the model says what is wrong with it
        _, protected = _request(remove, protect, blocks)
        _some_cut_is_exact(config, [b for b in range(blocks) if b not in protected])


def versions() -> dict[str, str]:
    """Versions of what the scores depend on."""
    packages = {name: version(name) for name in ("sleb", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}


def _run(
    sweep: Sweep,
    strategy: Strategy,
    candidates: Sequence[int],
    n: int,
    book: Journal | None,
    progress: Progress,
    exact: bool,
) -> Found:
    """Run a strategy over a sweep, with one progress bar for all of it."""
    windows, depth = sweep.ids.shape[0], len(sweep.stack)
    batches = -(-windows // sweep.batch)
    # known in advance only for the exact greedy search; a race or a beam shows its rounds
    rounds = sum(_round_work(candidates, done, depth) for done in range(n))
    known = exact and strategy is STRATEGIES["greedy"]
    with progress.stage("searching", batches * rounds if known else None) as tick:
        latest = [""]

        def note(text: str) -> None:
            latest[0] = text
            tick(0, note=text)

        sweep.on_work(lambda k: tick(k, note=latest[0]))
        objective = Objective(
            lambda sets, a, b: sweep.scores(sets, a, b).numpy(),
            windows,
            step=sweep.batch,
            journal=book,
            note=note,
            exact=exact,
        )
        return strategy(objective, candidates, n)


def _round_work(candidates: Sequence[int], done: int, depth: int) -> int:
    """Expected work of a greedy round after ``done`` removals, for the time left: block forwards
    plus one head per set. Which blocks are gone hardly matters, so the middle ones are taken."""
    start = (len(candidates) - done) // 2
    gone = BlockSet(candidates[start : start + done])
    sets = [gone | {b} for b in candidates if b not in gone]
    return block_forwards(sets, depth) + len(sets)


def _above(
    similarity: Similarity, candidates: Sequence[int], threshold: float | str, n: int
) -> tuple[list[int], SimilarityGate]:
    """The candidates whose similarity reaches the threshold, and the record of it."""
    if threshold == "auto":
        value = similarity.auto_threshold(candidates, n)
    else:
        try:
            value = float(threshold)
        except ValueError:
            raise InputError(
                f"--min-similarity {threshold!r} is neither a number nor auto"
            ) from None
    kept = [b for b in candidates if similarity.blocks[b].mean >= value]
    best = sorted((similarity.blocks[b].mean for b in candidates), reverse=True)
    if len(kept) < n:
        raise InputError(
            f"--min-similarity {value:g} leaves {len(kept)} candidates for {n} removals; "
            f"at most {best[n - 1]:.4f} leaves enough"
        )
    return kept, SimilarityGate(measure="cosine", threshold=value, candidates=tuple(kept))


def _request(remove: int | str, protect: str, n_blocks: int) -> tuple[int, frozenset[int]]:
    """Number of blocks to remove, and the protected ones; enough others must be left."""
    n = blocks_to_remove(remove, n_blocks)
    protected = parse_blocks(protect, n_blocks)
    if n > n_blocks - len(protected):
        raise InputError(
            f"cannot remove {n} of {n_blocks - len(protected)} candidates ({n_blocks} less "
            f"{len(protected)} protected); remove fewer, or protect fewer with --protect ''"
        )
    return n, protected


def _some_cut_is_exact(config: Any, candidates: Sequence[int]) -> None:
    """Raise UnsupportedModel if no candidate could be removed alone: a search would be in vain."""
    text = decoder_config(config)
    fields, n = text.to_dict(), text.num_hidden_layers
    refusal: UnsupportedModel | None = None
    for block in candidates:
        try:
            reindex(fields, [b for b in range(n) if b != block], n)
        except UnsupportedModel as error:
            refusal = refusal or error
        else:
            return
    if refusal:
        raise refusal


def _baseline(found: Found) -> Baseline | None:
    if not found.dense.size:
        return None
    n = found.dense.size
    se = round(float(found.dense.std(ddof=1) / np.sqrt(n)), 6) if n > 1 else None
    return Baseline(mean=round(float(found.dense.mean()), 6), se=se)


def _shuffled(windows: Windows, seed: int) -> list[int]:
    """An order of the windows in which every prefix is a random sample that holds about each
    source's share: windows are shuffled within their source, and sources interleaved."""
    place = random.Random(f"order {seed}")
    total = {s: windows.source.count(s) for s in set(windows.source)}
    turns = {s: iter(place.sample(range(n), n)) for s, n in total.items()}
    keys = [((next(turns[s]) + place.random()) / total[s], i) for i, s in enumerate(windows.source)]
    return [i for _, i in sorted(keys)]


def _key(
    identity: Fingerprint, calibration: Calibration, metric: str, dtype: str, exact: bool
) -> str:
    parts = [identity.model_dump(), calibration.sha256, calibration.seed, metric, dtype, exact]
    parts.append(versions())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
