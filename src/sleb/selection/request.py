"""What a search is asked for, checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from sleb.calibration import check_sources
from sleb.checkpoints.depth_fields import reindex
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import SimilarityGate, blocks_to_remove, parse_blocks
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent
from sleb.models.load import load_config
from sleb.models.source import resolve
from sleb.models.stack import decoder_config
from sleb.selection.goal import Goal
from sleb.selection.metrics import METRICS
from sleb.selection.similarity import Similarity
from sleb.selection.strategies import STRATEGIES

__all__ = ["SearchOptions", "above", "candidates_for", "check_choice", "check_request", "goal_of"]


class SearchOptions(TypedDict, total=False):
    """Options of :func:`sleb.search` that callers hand on; described there."""

    remove: int | str | None
    max_loss_increase: float | None
    speedup: float | None
    size: int | str | None
    curve: bool
    after_repair: bool
    metric: str
    strategy: str | None
    exact: bool
    text: Sequence[str]
    length: int
    protect: str
    min_similarity: float | str | None
    seed: int
    dtype: str
    device: str
    batch: int | None
    threads: int | None
    stream: bool
    device_map: str | None
    tp: int
    max_memory: int | str | None
    compile: bool
    trust_remote_code: bool


def goal_of(options: SearchOptions) -> Goal:
    """The target among a search's options, if these go together.

    Raises:
        InputError: as :func:`check_choice`, and for none, two or an impossible one.
    """
    goal = Goal.choose(
        remove=options.get("remove"),
        max_loss_increase=options.get("max_loss_increase"),
        speedup=options.get("speedup"),
        size=options.get("size"),
        curve=options.get("curve", False),
    )
    check_choice(
        goal,
        options.get("metric", "loss"),
        options.get("strategy"),
        options.get("min_similarity"),
    )
    return goal


def check_choice(
    goal: Goal, metric: str, strategy: str | None, min_similarity: float | str | None
) -> None:
    """Refuse names that do not exist, a threshold that is no number, and a metric, strategy and
    target that do not go together.

    Raises:
        InputError: they do not.
    """
    own = METRICS[metric]
    STRATEGIES[strategy or own.strategy]
    if min_similarity is not None:
        _threshold(min_similarity)
    if own.token is None and strategy not in (None, own.strategy):
        raise InputError(f"--metric {metric} ranks all blocks at once: it has no --strategy")
    named = strategy or own.strategy
    if goal.max_loss_increase is not None and named not in ("greedy", "one-shot"):
        raise InputError(
            f"--max-loss-increase tests one removal after the other, and --strategy {named} "
            "chooses a set of known size: use greedy, or a plan's --curve"
        )


def check_request(
    model: str | Path,
    *,
    goal: Goal,
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
    source = group().sequentially(lambda: resolve(model, progress))
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    blocks = getattr(decoder_config(config), "num_hidden_layers", None)
    if isinstance(blocks, int):  # else loading the model says what is wrong with it
        candidates_for(goal, protect, blocks, config)


def candidates_for(goal: Goal, protect: str, n_blocks: int, config: Any) -> list[int]:
    """The blocks that may go.

    Raises:
        InputError: fewer than are to be removed.
        UnsupportedModel: none can be cut exactly.
    """
    protected = parse_blocks(protect, n_blocks)
    candidates = [b for b in range(n_blocks) if b not in protected]
    n = 1 if goal.remove is None else blocks_to_remove(goal.remove, n_blocks)
    if n > len(candidates):
        raise InputError(
            f"cannot remove {n} of {len(candidates)} candidates ({n_blocks} less "
            f"{len(protected)} protected); remove fewer, or protect fewer with --protect ''"
        )
    _some_cut_is_exact(config, candidates)
    return candidates


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


def _threshold(given: float | str) -> float | None:
    """``--min-similarity`` as a number; None if it is to be picked."""
    if given == "auto":
        return None
    try:
        return float(given)
    except ValueError:
        raise InputError(f"--min-similarity {given!r} is neither a number nor auto") from None


def above(
    similarity: Similarity, candidates: Sequence[int], threshold: float | str, n: int
) -> tuple[list[int], SimilarityGate]:
    """The candidates whose similarity reaches the threshold, and the record of it.

    Raises:
        InputError: fewer than ``n`` do, or the threshold is no number.
    """
    value = _threshold(threshold)
    if value is None:
        value = similarity.auto_threshold(candidates, n)
    kept = [b for b in candidates if similarity.blocks[b].mean >= value]
    best = sorted((similarity.blocks[b].mean for b in candidates), reverse=True)
    if len(kept) < n:
        raise InputError(
            f"--min-similarity {value:g} leaves {len(kept)} candidates for {n} removals; "
            f"at most {best[n - 1]:.4f} leaves enough"
        )
    return kept, SimilarityGate(measure="cosine", threshold=value, candidates=tuple(kept))
